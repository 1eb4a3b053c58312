// SPDX-License-Identifier: MIT
/*
 * memconsole-fuse: guests' memory as files, served without the control process.
 *
 * It mounts a FUSE filesystem and shows the tree that the control process gives it (fuse_control.c). RAM files are the
 * guests' own memfds, passed through by the kernel: when this server ends, whatever was mapped stays mapped. The
 * control process may end and come back at any time; the tree stays as it is.
 *
 * A process must never hold a file of a mount it serves: it could not be killed. So nothing here opens anything on it.
 *
 * usage: memconsole-fuse [-f] SOCKET MOUNTPOINT	-f: stay in the foreground; both absolute paths
 * exit:  0 serving in the background, told to quit, or unmounted; 1 failed; 2 usage; 3 one already serves this socket
 *	  or mountpoint
 *
 * A mount at MOUNTPOINT whose server is dead is taken away first. SIGTERM and SIGINT unmount and end, but not while
 * files are open or mapped; SIGHUP and SIGPIPE are ignored.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fuse.h"

#define FSTYPE "fuse.memconsole"
#define CLIENTS_MAX 16
#define WORKERS 3
#define FILES_MAX 65536
#define PAUSE_MS 100
#define HUNG_S 10

struct server server = { .dev = -1 };

static struct {
	int listener, signals, ended;
	int clients[CLIENTS_MAX];
	uint32_t nr_clients;
} loop = { .listener = -1 };

static int fail(const char *what)
{
	fprintf(stderr, "memconsole-fuse: %s: %s\n", what, strerror(errno));
	return 1;
}

/* Writes a field of mountinfo, where blanks are written as \ooo, as it is meant. */
static void unescape(char *field)
{
	char *to = field;

	while (*field) {
		unsigned int code;

		if (*field == '\\' && sscanf(field + 1, "%3o", &code) == 1) {
			*to++ = (char)code;
			field += 4;
		} else {
			*to++ = *field++;
		}
	}
	*to = 0;
}

/* The connection number of our topmost mount at a path (/proc/self/mountinfo: minor), 0 if there is none of ours. */
static uint32_t mounted(const char *mountpoint)
{
	FILE *file = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t room = 0;
	uint32_t found = 0;

	while (file && getline(&line, &room, file) > 0) {
		char *at = malloc(strlen(line) + 1), *type = strstr(line, " - ");
		unsigned int minor;

		if (at && type && sscanf(line, "%*d %*d %*u:%u %*s %s", &minor, at) == 2) {
			unescape(at);
			if (!strcmp(at, mountpoint))
				found = strncmp(type + 3, FSTYPE " ", strlen(FSTYPE) + 1) ? 0 : minor;
		}
		free(at);
	}
	free(line);
	if (file)
		fclose(file);
	return found;
}

/* Ends a connection whose server is dead, so that nobody waits for it any more. Without fusectl it ended by itself. */
static void abort_connection(uint32_t number)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/sys/fs/fuse/connections/%u/abort", number);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (write(fd, "1", 1) != 1)
		fail(path);
	close(fd);
}

/* Takes mounts of dead servers away. Returns 0 or the exit status. */
static int clear(const char *mountpoint)
{
	uint32_t number;

	while ((number = mounted(mountpoint))) {
		struct statfs fs;
		int error;

		alarm(HUNG_S);	/* ends this process, should the server neither answer nor be dead */
		error = statfs(mountpoint, &fs) ? errno : 0;	/* never answered from a cache */
		alarm(0);
		if (error != ENOTCONN && error != ECONNABORTED) {
			fprintf(stderr, "memconsole-fuse: another server already serves %s\n", mountpoint);
			return 3;
		}
		abort_connection(number);
		if (umount2(mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW))
			return fail(mountpoint);
	}
	return 0;
}

/* Asks the kernel by doing it. */
static void probe_passthrough(void)
{
	int fd = memfd_create("memconsole-fuse-probe", MFD_CLOEXEC);
	int32_t id;

	if (server.passthrough)
		return;
	if (fd < 0) {
		server.passthrough = errno;
		return;
	}
	server.passthrough = -backing_open(fd, &id);
	if (!server.passthrough)
		backing_close(id);
	close(fd);
}

/* The path without links, as mountinfo shows it, even if the mount there is dead. Returns 0 or -1 with errno. */
static int resolve(const char *path, char *resolved)
{
	char parent[PATH_MAX];
	const char *name = strrchr(path, '/') + 1;

	if (realpath(path, resolved))
		return 0;
	if (errno != ENOTCONN || strlen(path) >= sizeof(parent))
		return -1;
	snprintf(parent, sizeof(parent), "%.*s", (int)(name - path), path);
	if (!realpath(parent, resolved) || strlen(resolved) + 1 + strlen(name) >= PATH_MAX)
		return -1;
	if (strcmp(resolved, "/"))
		strcat(resolved, "/");
	strcat(resolved, name);
	return 0;
}

/* Mounts, and answers the kernel's first request. Returns 0 or the exit status. */
static int mount_tree(const char *path)
{
	static char mountpoint[PATH_MAX];
	struct worker *worker;
	char options[128];
	int status, error = 0;

	if (resolve(path, mountpoint))
		return fail(path);
	if (strlen(mountpoint) > PATH_LEN_MAX) {
		fprintf(stderr, "memconsole-fuse: MOUNTPOINT has at most %d bytes\n", PATH_LEN_MAX);
		return 2;
	}
	status = clear(mountpoint);
	if (status)
		return status;
	server.dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (server.dev < 0)
		return fail("/dev/fuse");
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=%u,group_id=%u,allow_other,default_permissions",
		 server.dev, geteuid(), getegid());
	if (mount("memconsole", mountpoint, FSTYPE, MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME, options))
		return fail(mountpoint);
	server.mountpoint = mountpoint;
	worker = worker_new(server.dev);
	while (worker && !server.major && !error)
		error = worker_serve(worker);
	worker_free(worker);
	if (!server.major) {
		errno = worker ? -error : ENOMEM;
		fail("the kernel's first request");
		unmount(true);
		return 1;
	}
	probe_passthrough();
	server.connection = mounted(mountpoint);
	return 0;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	int error;

	prctl(PR_SET_NAME, "mc-fuse-worker");
	while (!(error = worker_serve(worker)))
		;
	if (error != -ENODEV)
		fprintf(stderr, "memconsole-fuse: /dev/fuse: %s\n", strerror(-error));
	worker_free(worker);
	eventfd_write(loop.ended, 1);
	return NULL;
}

static void *scan(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, "mc-fuse-scanner");
	scanner_run();
	return NULL;
}

static int start_threads(void)
{
	pthread_t thread;

	loop.ended = eventfd(0, EFD_CLOEXEC);
	if (loop.ended < 0)
		return fail("eventfd");
	for (int i = 0; i < WORKERS; i++) {
		struct worker *worker = worker_new(server.dev);

		errno = worker ? pthread_create(&thread, NULL, work, worker) : ENOMEM;
		if (errno)
			return fail("pthread_create");
	}
	errno = pthread_create(&thread, NULL, scan, NULL);
	return errno ? fail("pthread_create") : 0;
}

/* Takes a connection. Returns -1 if the kernel cannot give one now. */
static int greet(void)
{
	int client = accept4(loop.listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (client < 0)
		return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED ? 0 : -1;
	if (control_greet(client, loop.nr_clients < CLIENTS_MAX))
		close(client);
	else
		loop.clients[loop.nr_clients++] = client;
	return 0;
}

/* A signal asks to end: done unless files are in use. Returns whether it is. */
static bool signalled(void)
{
	struct signalfd_siginfo info;
	int error;

	if (read(loop.signals, &info, sizeof(info)) != sizeof(info))
		return false;
	error = unmount(false);
	if (error)
		fprintf(stderr, "memconsole-fuse: signal %u ignored: %s\n", info.ssi_signo, strerror(-error));
	return !error;
}

/* Until told to quit, or unmounted. */
static void serve_control(void)
{
	bool quit = false;
	int pause = 0;

	while (!quit && !control_quits()) {
		struct pollfd polled[3 + CLIENTS_MAX] = {
			{ .fd = loop.signals, .events = POLLIN },
			{ .fd = loop.ended, .events = POLLIN },
			{ .fd = pause ? -1 : loop.listener, .events = POLLIN },
		};
		uint32_t nr = loop.nr_clients;

		for (uint32_t i = 0; i < nr; i++)
			polled[3 + i] = (struct pollfd){ .fd = loop.clients[i], .events = POLLIN };
		if (poll(polled, 3 + nr, pause ? PAUSE_MS : -1) < 0)
			continue;
		pause = 0;
		quit = (polled[0].revents && signalled()) || polled[1].revents;
		/* backwards, so that the last client may take the place of one that left */
		for (uint32_t i = nr; i-- > 0 && !quit && !control_quits();) {
			if (!polled[3 + i].revents || !control_serve(loop.clients[i]))
				continue;
			close(loop.clients[i]);
			loop.clients[i] = loop.clients[--loop.nr_clients];
		}
		if (polled[2].revents && !quit && !control_quits())
			pause = greet() < 0;
	}
}

/* Bind the socket, in the place of one whose server is gone. Returns 0 or the exit status. */
static int claim(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char lock_path[sizeof(address.sun_path) + 8];
	int lock;

	if (path[0] != '/' || strlen(path) >= sizeof(address.sun_path)) {
		fprintf(stderr, "memconsole-fuse: SOCKET is an absolute path of at most %zu bytes\n",
			sizeof(address.sun_path) - 1);
		return 2;
	}
	strcpy(address.sun_path, path);
	snprintf(lock_path, sizeof(lock_path), "%s.lock", path);
	lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);	/* held, never closed, until the process ends */
	if (lock < 0)
		return fail(lock_path);
	if (flock(lock, LOCK_EX | LOCK_NB)) {
		if (errno != EWOULDBLOCK)
			return fail(lock_path);
		fprintf(stderr, "memconsole-fuse: a server already serves %s\n", path);
		return 3;
	}
	umask(0177);
	if (unlink(path) && errno != ENOENT)
		return fail(path);
	loop.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (loop.listener < 0 || bind(loop.listener, (struct sockaddr *)&address, sizeof(address)))
		return fail(path);
	return 0;
}

/* Go on in a child of init's, in a session of its own. Returns what to write a byte to when ready, or -1. */
static int detach(void)
{
	int ends[2], null, status;
	char byte;
	pid_t child;

	if (pipe2(ends, O_CLOEXEC))
		return -1;
	child = fork();
	if (child < 0)
		return -1;
	if (child) {
		close(ends[1]);
		if (read(ends[0], &byte, 1) == 1)
			exit(0);
		exit(waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 1);
	}
	close(ends[0]);
	setsid();
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	return null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0 ? -1 : ends[1];
}

/* Make the server hard to kill and roomy, as far as may be. */
static void guard(void)
{
	struct rlimit files = { FILES_MAX, FILES_MAX }, now;
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	prctl(PR_SET_NAME, "mc-fuse");
	if (fd >= 0 && write(fd, "-1000", 5) != 5)
		fprintf(stderr, "memconsole-fuse: not exempt from the OOM killer\n");
	if (fd >= 0)
		close(fd);
	if (!getrlimit(RLIMIT_NOFILE, &now) && now.rlim_cur < files.rlim_cur && setrlimit(RLIMIT_NOFILE, &files)) {
		now.rlim_cur = now.rlim_max;
		setrlimit(RLIMIT_NOFILE, &now);
	}
}

static int watch_signals(void)
{
	sigset_t signals;

	signal(SIGHUP, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	if (sigprocmask(SIG_SETMASK, &signals, NULL))
		return fail("sigprocmask");
	loop.signals = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	return loop.signals < 0 ? fail("signalfd") : 0;
}

/* What can fail after the mount is there. */
static int start(const char *path, int ready)
{
	if (start_threads())
		return 1;
	if (listen(loop.listener, CLIENTS_MAX))	/* from here on SO_PEERCRED of a client shows this process */
		return fail(path);
	if (ready < 0)
		return 0;
	if (write(ready, "", 1) != 1)
		return fail("pipe");
	close(ready);
	dup2(STDIN_FILENO, STDERR_FILENO);
	return 0;
}

int main(int argc, char **argv)
{
	int foreground = argc == 4 && !strcmp(argv[1], "-f"), ready = -1, status;
	const char *path, *mountpoint;

	if (argc != 3 + foreground) {
		fprintf(stderr, "usage: memconsole-fuse [-f] SOCKET MOUNTPOINT\n");
		return 2;
	}
	path = argv[argc - 2];
	mountpoint = argv[argc - 1];
	if (mountpoint[0] != '/') {
		fprintf(stderr, "memconsole-fuse: MOUNTPOINT is an absolute path\n");
		return 2;
	}
	status = claim(path);
	if (status)
		return status;
	if (!foreground && (ready = detach()) < 0)
		return fail("cannot go into the background");
	if (chdir("/"))
		return fail("/");
	guard();
	if (watch_signals())
		return 1;
	if (tree_init())
		return fail("tree");
	status = mount_tree(mountpoint);
	if (status)
		return status;
	status = start(path, ready);
	if (!status)
		serve_control();
	else
		unmount(true);
	unlink(path);
	return status;
}
