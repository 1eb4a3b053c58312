// SPDX-License-Identifier: MIT
/*
 * A hostile process: it holds on to a file of guest memory by every path there is, and tries each when told.
 *
 * usage: hostile UID PATH	becomes that user (and loses all else) first
 *
 * It reads commands, a line each, and answers each with a line: "ok", "ok WORD", an errno's name, or "SIGBUS"/"SIGSEGV".
 * File descriptor, mapping, pipe and children are kept from one command to the next.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#define PAGE 4096

static const char *path;
static int file = -1, pipes[2] = { -1, -1 }, mailbox[2] = { -1, -1 }, child_ends[2] = { -1, -1 };
static uint8_t *map = MAP_FAILED;
static off_t size;
static sigjmp_buf back;
static char word[PAGE + 1];

static void fault(int number)
{
	siglongjmp(back, number);
}

/* The first bytes at an address, as a word; with `write`, written there first. */
static int touch(uint8_t *at, const char *write)
{
	if (at == MAP_FAILED)
		return -ENXIO;
	if (write)
		memcpy(at, write, strlen(write));
	memcpy(word, at, 8);
	return 8;
}

static int took(ssize_t n)
{
	return n < 0 ? -errno : (int)n;
}

static int reopen(int flags)
{
	int fd = open(path, flags);

	if (fd < 0)
		return -errno;
	if (file >= 0)
		close(file);
	file = fd;
	size = lseek(fd, 0, SEEK_END);
	return 0;
}

static int try_open(const char *where, int flags)
{
	int fd = open(where, flags, 0600);

	if (fd < 0)
		return -errno;
	close(fd);
	return 0;
}

static int map_file(int prot)
{
	uint8_t *at = mmap(NULL, (size_t)size, prot, MAP_SHARED, file, 0);

	if (at == MAP_FAILED)
		return -errno;
	if (map != MAP_FAILED)
		munmap(map, (size_t)size);
	map = at;
	return 0;
}

/* Maps again without giving up the first mapping, and looks. */
static int map_again(void)
{
	uint8_t *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);

	return at == MAP_FAILED ? -errno : touch(at, NULL);
}

/* Stretches the mapping beyond the file, and looks there. */
static int grow_map(void)
{
	uint8_t *at = mremap(map, (size_t)size, (size_t)size * 2, MREMAP_MAYMOVE);

	if (at == MAP_FAILED)
		return -errno;
	map = at;
	return touch(map + size, NULL);
}

static int own_link(const char *format, unsigned long first, unsigned long second, int flags)
{
	char where[128];

	snprintf(where, sizeof(where), format, first, second);
	return try_open(where, flags);
}

/* A child that sleeps with all its parent's mappings, and looks when asked. */
static int start_child(void)
{
	int ask[2], say[2], got;
	char order;

	if (pipe(ask) || pipe(say))
		return -errno;
	if (!fork()) {
		/* a parent that died before this: the end of its pipe ends the child as well */
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(ask[1]);
		close(say[0]);
		while (read(ask[0], &order, 1) == 1) {
			got = sigsetjmp(back, 1);
			got = got ? -1000 - got : touch(map, NULL);
			if (write(say[1], &got, sizeof(got)) != sizeof(got) || write(say[1], word, 8) != 8)
				break;
		}
		_exit(0);
	}
	child_ends[0] = ask[1];
	child_ends[1] = say[0];
	return 0;
}

static int ask_child(void)
{
	int got;

	if (write(child_ends[0], "?", 1) != 1 || read(child_ends[1], &got, sizeof(got)) != sizeof(got))
		return -errno;
	return read(child_ends[1], word, 8) == 8 ? got : -EIO;
}

/* Sends the descriptor to whoever reads a socket. */
static int give(int to)
{
	char space[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec part = { "x", 1 };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space) };

	CMSG_FIRSTHDR(&header)->cmsg_level = SOL_SOCKET;
	CMSG_FIRSTHDR(&header)->cmsg_type = SCM_RIGHTS;
	CMSG_FIRSTHDR(&header)->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(CMSG_FIRSTHDR(&header)), &file, sizeof(int));
	return sendmsg(to, &header, 0) < 0 ? -errno : 0;
}

/* A descriptor in flight: nobody's table shows it. */
static int post(void)
{
	int err = socketpair(AF_UNIX, SOCK_SEQPACKET, 0, mailbox) ? -errno : give(mailbox[0]);

	if (!err) {
		close(file);
		file = -1;
	}
	return err;
}

static int fetch(void)
{
	char space[CMSG_SPACE(sizeof(int))], byte;
	struct iovec part = { &byte, 1 };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space) };

	if (recvmsg(mailbox[1], &header, MSG_DONTWAIT) < 0 || !CMSG_FIRSTHDR(&header))
		return -errno;
	memcpy(&file, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof(int));
	return 0;
}

static int splice_out(void)
{
	loff_t at = 0;
	ssize_t n;

	if (pipes[0] < 0 && pipe2(pipes, O_NONBLOCK))
		return -errno;
	n = splice(file, &at, pipes[1], NULL, 8, 0);
	return n <= 0 ? took(n) : took(read(pipes[0], word, 8));
}

/* Pins a page of the mapping in a pipe. */
static int pin(void)
{
	struct iovec part = { map, PAGE };

	if (map == MAP_FAILED)
		return -ENXIO;
	if (pipes[0] < 0 && pipe2(pipes, O_NONBLOCK))
		return -errno;
	return took(vmsplice(pipes[1], &part, 1, 0));
}

static int obey(const char *order)
{
	char beside[PATH_MAX + 8];
	struct timespec now[2] = { { 0, UTIME_NOW }, { 0, UTIME_NOW } };

	snprintf(beside, sizeof(beside), "%s.new", path);
#define IS(name) (!strcmp(order, name))
	if (IS("open")) return reopen(O_RDWR);
	if (IS("open-ro")) return reopen(O_RDONLY);
	if (IS("open-trunc")) return try_open(path, O_RDWR | O_TRUNC);
	if (IS("open-path")) return try_open(path, O_PATH);
	if (!strncmp(order, "try ", 4)) return try_open(order + 4, O_RDWR);
	if (!strncmp(order, "peek ", 5)) return try_open(order + 5, O_RDONLY);
	if (IS("create")) return try_open(beside, O_RDWR | O_CREAT);
	if (IS("close")) { close(file); file = -1; return 0; }
	if (IS("map")) return map_file(PROT_READ | PROT_WRITE);
	if (IS("map-ro")) return map_file(PROT_READ);
	if (IS("map-exec")) return map_file(PROT_READ | PROT_EXEC);
	if (IS("map-again")) return map_again();
	if (IS("unmap")) { munmap(map, (size_t)size); map = MAP_FAILED; return 0; }
	if (IS("grow-map")) return grow_map();
	if (IS("make-writable")) return mprotect(map, (size_t)size, PROT_READ | PROT_WRITE) ? -errno : touch(map, "hostile!");
	if (IS("load")) return touch(map, NULL);
	if (IS("store")) return touch(map, "hostile!");
	if (IS("read")) return took(pread(file, word, 8, 0));
	if (IS("write")) return took(pwrite(file, "hostile!", 8, 0));
	if (IS("write-end")) return took(pwrite(file, "hostile!", 8, size));
	if (IS("splice")) return splice_out();
	if (IS("pin")) return pin();
	if (IS("unpin")) return took(read(pipes[0], word, PAGE));
	if (IS("truncate")) return took(ftruncate(file, 0));
	if (IS("grow")) return took(ftruncate(file, size * 2));
	if (IS("same-size")) return took(ftruncate(file, size));
	if (IS("allocate")) return took(fallocate(file, 0, 0, size * 2));
	if (IS("allocate-inside")) return took(fallocate(file, FALLOC_FL_KEEP_SIZE, 0, PAGE));
	if (IS("punch")) return took(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE));
	if (IS("remove-pages")) return took(madvise(map, PAGE, MADV_REMOVE));
	if (IS("seal")) return took(fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK));
	if (IS("chmod")) return took(fchmod(file, 0666));
	if (IS("chown")) return took(fchown(file, getuid(), 0));
	if (IS("xattr")) return took(fsetxattr(file, "user.x", "y", 1, 0));
	if (IS("times")) return took(futimens(file, now));
	if (IS("lock")) return took(fcntl(file, F_SETLK, &(struct flock){ .l_type = F_WRLCK }));
	if (IS("sync")) return took(fsync(file));
	if (IS("unlink")) return took(unlink(path));
	if (IS("rename")) return took(rename(path, beside));
	if (IS("link")) return took(link(path, beside));
	if (IS("self-fd")) return own_link("/proc/self/fd/%lu", (unsigned long)file, 0, O_RDWR);
	if (IS("map-files"))
		return own_link("/proc/self/map_files/%lx-%lx", (unsigned long)map, (unsigned long)map + (unsigned long)size, O_RDWR);
	if (IS("fork")) return start_child();
	if (IS("child-load")) return ask_child();
	if (IS("post")) return post();
	if (IS("fetch")) return fetch();
	if (!strncmp(order, "give ", 5)) return give(atoi(order + 5));
	return -ENOSYS;
#undef IS
}

int main(int argc, char **argv)
{
	uid_t uid = argc == 3 ? (uid_t)atoi(argv[1]) : 0;
	char line[PATH_MAX];

	if (argc != 3)
		return 2;
	path = argv[2];
	if (uid && (setgroups(0, NULL) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid)))
		return 1;
	signal(SIGBUS, fault);
	signal(SIGSEGV, fault);
	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	while (fgets(line, sizeof(line), stdin)) {
		int got;

		line[strcspn(line, "\n")] = 0;
		memset(word, 0, sizeof(word));
		got = sigsetjmp(back, 1);
		got = got ? -1000 - got : obey(line);
		if (got < -1000)
			printf("%s\n", -got - 1000 == SIGBUS ? "SIGBUS" : "SIGSEGV");
		else if (got < 0)
			printf("%s\n", strerrorname_np(-got));
		else
			printf("ok%s%s\n", *word ? " " : "", word);
	}
	return 0;
}
