// SPDX-License-Identifier: MIT
/*
 * A guest that keeps every way into its memory it can find, and tries them all when told to.
 *
 *   hostile_revoke SOCKET MANNERS [FD]...   MANNERS: "ignore" never answers UNMAP; "lie" unmaps and closes what shows,
 *                                           says that it did, and keeps what does not show
 *                                           FD: a socket to an accomplice, who is sent the fd
 *
 * It takes one grant over the agents socket (native/agent.h), prints "ready", and then for every line on its stdin:
 *
 *   try     prints "NAME WHAT" for each way, WHAT being the first 8 bytes read, or why not; then "end"
 *   scrawl  writes "SCRAWLED" by every way that writes; then "end"
 *   drop    lets its pins go; then "end"
 *
 * Page 0 is looked at by every way; the pins hold pages 1 (a pipe) and 2 (an io_uring's fixed buffer).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"
#include "hostile_fds.h"

#define PAGE 4096
#define WORD 8

static sigjmp_buf back;
static int sock = -1, fd = -1;
static char *map = MAP_FAILED, *alias = MAP_FAILED;
static size_t length;
static char held[AGENT_NAME];	/* the grant it has */
static bool obeys;
static char **accomplices;	/* numbers of sockets; NULL ends them */

static int flight[2];		/* a socket in whose queue the fd waits */
static int helper[2], child[2];	/* sockets to two processes: one got the fd sent, one was forked with everything */
static pid_t child_pid;
static int pinned[2];		/* a pipe that holds a page */
static int ring = -1;
static struct io_uring_params params;
static char *rings, *sqes, *ringed;	/* ringed: where the fixed buffer was mapped when it was pinned */

static void on_signal(int sig)
{
	siglongjmp(back, sig);
}

/* --- ways in ------------------------------------------------------------------------------------------------- */

static void say(char *out, const char *word)
{
	snprintf(out, WORD + 1, "%.8s", word);
}

static void failed(char *out)
{
	snprintf(out, 64, "errno %d", errno);
}

static void by_memory(const char *at, char *out)
{
	int sig;

	if (at == MAP_FAILED)
		return (void)strcpy(out, "unmapped");
	sig = sigsetjmp(back, 1);
	if (sig)
		snprintf(out, 64, "%s", sig == SIGBUS ? "SIGBUS" : "SIGSEGV");
	else
		say(out, (const char *)(volatile const char *)at);
}

static void by_pread(int file, char *out)
{
	char word[WORD + 1] = { 0 };
	ssize_t n = pread(file, word, WORD, 0);

	if (n == WORD)
		say(out, word);
	else if (n < 0)
		failed(out);
	else
		strcpy(out, "nothing");
}

static void by_mapping_again(int file, char *out)
{
	char *at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0);

	if (at == MAP_FAILED)
		return failed(out);
	by_memory(at, out);
	munmap(at, PAGE);
}

static void by_reopening(int file, char *out)
{
	char path[64];
	int again;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
	again = open(path, O_RDWR);
	if (again < 0)
		return failed(out);
	by_pread(again, out);
	close(again);
}

static void by_map_files(char *out)
{
	char path[64];
	int again;

	snprintf(path, sizeof(path), "/proc/self/map_files/%lx-%lx", (long)map, (long)(map + length));
	again = open(path, O_RDWR);
	if (again < 0)
		return failed(out);
	by_mapping_again(again, out);
	close(again);
}

static void by_mem_file(char *out)
{
	int mem = open("/proc/self/mem", O_RDONLY);
	char word[WORD + 1] = { 0 };

	if (mem >= 0 && pread(mem, word, WORD, (off_t)(uintptr_t)map) == WORD)
		say(out, word);
	else
		failed(out);
	close(mem);
}

static void by_other_process(char *out)
{
	char word[WORD + 1] = { 0 };
	struct iovec here = { word, WORD }, there = { map, WORD };

	if (process_vm_readv(child_pid, &here, 1, &there, 1, 0) == WORD)
		say(out, word);
	else
		failed(out);
}

static void by_answer(int of, char *out)
{
	ssize_t n = write(of, "t", 1) == 1 ? read(of, out, 63) : -1;

	if (n <= 0)
		strcpy(out, "dead");
	else
		out[n] = 0;
}

/* The fd that waits in a queue, taken out, used, and sent on its way again. */
static void by_flight(char *out)
{
	char byte;
	ssize_t got;
	int found = take(flight[0], &byte, 1, &got);

	by_pread(found, out);
	give(flight[1], found);
	close(found);
}

static void by_pipe(char *out)
{
	char word[WORD + 1] = { 0 };
	int copy[2];

	if (pipe(copy))
		die("pipe");
	if (tee(pinned[0], copy[1], WORD, SPLICE_F_NONBLOCK) == WORD && read(copy[0], word, WORD) == WORD)
		say(out, word);
	else
		failed(out);
	close(copy[0]);
	close(copy[1]);
}

static void by_ring(char *out)
{
	uint32_t *tail, *array, *mask, *head;
	struct io_uring_sqe *sqe;
	char word[WORD + 1] = { 0 };
	int file = memfd_create("out", 0);

	if (ring < 0)
		return (void)strcpy(out, "no ring");
	tail = (uint32_t *)(rings + params.sq_off.tail);
	mask = (uint32_t *)(rings + params.sq_off.ring_mask);
	array = (uint32_t *)(rings + params.sq_off.array);
	sqe = (struct io_uring_sqe *)sqes + (*tail & *mask);
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_WRITE_FIXED;
	sqe->fd = file;
	sqe->addr = (uintptr_t)ringed;
	sqe->len = WORD;
	array[*tail & *mask] = *tail & *mask;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		return failed(out);
	head = (uint32_t *)(rings + params.cq_off.head);
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	if (pread(file, word, WORD, 0) == WORD)
		say(out, word);
	else
		strcpy(out, "nothing");
	close(file);
}

static void try_all(void)
{
	char out[64];
	const char *names[] = { "mapping", "alias", "fd", "fd-mmap", "reopen", "map-files", "mem", "child-mem",
				"child", "helper", "flight", "pipe", "ring" };

	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
		memset(out, 0, sizeof(out));
		switch (i) {
		case 0: by_memory(map, out); break;
		case 1: by_memory(alias, out); break;
		case 2: by_pread(fd, out); break;
		case 3: by_mapping_again(fd, out); break;
		case 4: by_reopening(fd, out); break;
		case 5: by_map_files(out); break;
		case 6: by_mem_file(out); break;
		case 7: by_other_process(out); break;
		case 8: by_answer(child[0], out); break;
		case 9: by_answer(helper[0], out); break;
		case 10: by_flight(out); break;
		case 11: by_pipe(out); break;
		default: by_ring(out);
		}
		printf("%s %s\n", names[i], out[0] ? out : "zeros");
	}
}

static void scrawl_on(char *at)
{
	if (at != MAP_FAILED && !sigsetjmp(back, 1))
		memcpy(at, "SCRAWLED", WORD);
}

static void scrawl(void)
{
	char byte;
	ssize_t got;
	int found = take(flight[0], &byte, 1, &got), mem = open("/proc/self/mem", O_RDWR);

	scrawl_on(map);
	scrawl_on(alias);
	(void)!pwrite(fd, "SCRAWLED", WORD, 0);
	(void)!pwrite(found, "SCRAWLED", WORD, 0);
	(void)!pwrite(mem, "SCRAWLED", WORD, (off_t)(uintptr_t)map);
	if (ftruncate(fd, (off_t)length) || ftruncate(found, (off_t)length))
		(void)0;	/* to make an emptied file large again would be a way in */
	give(flight[1], found);
	close(found);
	close(mem);
}

/* --- what it keeps ------------------------------------------------------------------------------------------- */

/* A process that answers each byte with what it sees: by memory when it was forked, by the fd it is sent else. */
static pid_t spawn(int pair[2], bool forked)
{
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		die("socketpair");
	pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		char out[64], byte;
		ssize_t got;
		int file = -1;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(pair[0]);
		if (!forked)
			file = take(pair[1], &byte, 1, &got);
		for (;;) {
			if (read(pair[1], &byte, 1) != 1)
				_exit(0);
			memset(out, 0, sizeof(out));
			if (forked)
				by_memory(map, out);
			else
				by_mapping_again(file, out);
			if (!out[0])
				strcpy(out, "zeros");
			if (write(pair[1], out, strlen(out)) < 0)
				_exit(0);
		}
	}
	close(pair[1]);
	return pid;
}

static void pin(void)
{
	struct iovec page = { map + PAGE, PAGE }, fixed = { map + 2 * PAGE, PAGE };
	size_t bytes;

	if (pipe(pinned) || vmsplice(pinned[1], &page, 1, 0) != PAGE)
		die("vmsplice");
	ringed = fixed.iov_base;
	ring = (int)syscall(SYS_io_uring_setup, 4, &params);
	if (ring < 0)
		return;
	bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
	if (params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe) > bytes)
		bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
	rings = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	sqes = mmap(NULL, params.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring,
		    IORING_OFF_SQES);
	if (rings == MAP_FAILED || sqes == MAP_FAILED ||
	    syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &fixed, 1))
		die("io_uring");
}

static void keep(void)
{
	spawn(helper, false);
	map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		die("mmap");
	for (size_t at = 0; at < length; at += PAGE)
		(void)*(volatile char *)(map + at);
	alias = mremap(map, 0, length, MREMAP_MAYMOVE);	/* a second mapping of the same pages */
	if (alias == MAP_FAILED)
		die("mremap");
	give(helper[0], fd);
	child_pid = spawn(child, true);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, flight))
		die("socketpair");
	give(flight[1], fd);
	for (char **to = accomplices; *to; to++)
		give(atoi(*to), fd);
	pin();
}

/* Let go of all that shows in /proc: mappings, fds, and the processes that have them. */
static void hide(void)
{
	munmap(map, length);
	munmap(alias, length);
	alias = MAP_FAILED;
	map = MAP_FAILED;
	close(fd);
	fd = -1;
	close(helper[0]);
	close(child[0]);
	helper[0] = child[0] = -1;
	usleep(50000);	/* until both have ended */
}

/* --- the agents socket --------------------------------------------------------------------------------------- */

static void reach(const char *path)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	struct agent_hello m = { .count = held[0] != 0 };
	uint32_t size = 24 + m.count * AGENT_NAME;
	char one;

	m.head = (struct agent_head){ AGENT_MAGIC, AGENT_VERSION, AGENT_HELLO, 0, size };
	memcpy(m.held[0], held, AGENT_NAME);

	strncpy(to.sun_path, path, sizeof(to.sun_path) - 1);
	/* Until it was attached as a guest nobody lets it in. */
	for (;;) {
		sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
		if (connect(sock, (struct sockaddr *)&to, sizeof(to)) == 0 && send(sock, &m, size, MSG_NOSIGNAL) == size) {
			struct pollfd p = { .fd = sock, .events = POLLIN };

			if (poll(&p, 1, 300) == 0 || recv(sock, &one, 1, MSG_PEEK) > 0)
				return;
		}
		close(sock);
		usleep(50000);
	}
}

static void answer(uint32_t id)
{
	struct agent_done m = { .head = { AGENT_MAGIC, AGENT_VERSION, AGENT_DONE, id, sizeof(m) } };

	if (send(sock, &m, sizeof(m), MSG_NOSIGNAL) < 0)
		die("send");
}

static void serve(void)
{
	static union {
		struct agent_head head;
		struct agent_grant grant;
		char bytes[AGENT_MAX];
	} m;
	ssize_t got;
	int found = take(sock, &m, sizeof(m), &got);

	if (got <= 0) {
		close(sock);
		sock = -1;
		return;
	}
	if (m.head.type == AGENT_GRANT && fd < 0) {
		fd = found;
		length = m.grant.length;
		memcpy(held, m.grant.grant, AGENT_NAME);
		keep();
		answer(m.head.id);
		printf("ready\n");
	} else if (m.head.type == AGENT_UNMAP && obeys) {
		hide();
		held[0] = 0;
		answer(m.head.id);
	}
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_signal };
	char line[64];

	if (argc < 3)
		return 2;
	accomplices = argv + 3;
	obeys = strcmp(argv[2], "lie") == 0;
	setvbuf(stdout, NULL, _IOLBF, 0);
	setvbuf(stdin, NULL, _IONBF, 0);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
	reach(argv[1]);
	for (;;) {
		struct pollfd p[2] = { { .fd = 0, .events = POLLIN }, { .fd = sock, .events = POLLIN } };

		poll(p, 2, -1);
		if (p[1].revents)
			serve();
		if (sock < 0)
			reach(argv[1]);
		if (!p[0].revents)
			continue;
		if (!fgets(line, sizeof(line), stdin))
			return 0;
		if (strcmp(line, "try\n") == 0) {
			try_all();
		} else if (strcmp(line, "scrawl\n") == 0) {
			scrawl();
		} else {
			close(pinned[0]);
			close(pinned[1]);
			syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0);
			close(ring);
			ring = -1;
		}
		printf("end\n");
	}
}
