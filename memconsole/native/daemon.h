/*
 * What the small daemons share: they hold something that must not go when the control process does, and are asked over
 * one SOCK_SEQPACKET socket by root or their own user. One thread answers; connections and descriptors are bounded.
 *
 *	claim ─ detach ─ prepare ─ (the daemon's own beginnings) ─ ready ─ loop ─ unlink
 */
#ifndef MEMCONSOLE_DAEMON_H
#define MEMCONSOLE_DAEMON_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define DAEMON_CLIENTS_MAX 64
#define DAEMON_SERVED 3		/* exit status: one already serves this socket */
#define DAEMON_PAUSE_MS 100

struct daemon {
	const char *program;
	uint32_t clients_max;
	int (*greet)(int client, bool room);	/* 0, or -1 if the connection may not stay */
	int (*serve)(int client);		/* one message: 0, or -1 if the client is gone or does not listen */
	bool (*signalled)(uint32_t number);	/* whether to end */
	bool (*quits)(void);			/* whether a request, or anything else, ended it */
	int ended;		/* readable when there is nothing more to serve; -1: never */
	int listener, signals;
	int clients[DAEMON_CLIENTS_MAX];
	uint32_t nr_clients;
};

/* Says what it cannot do to what, by errno. Returns the exit status. */
static inline int daemon_fail(const struct daemon *daemon, const char *doing, const char *what)
{
	fprintf(stderr, "%s: cannot %s %s: %s\n", daemon->program, doing, what, strerror(errno));
	return 1;
}

/* Binds the socket, in the place of one whose daemon is gone. Returns 0 or the exit status. */
static inline int daemon_claim(struct daemon *daemon, const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char lock_path[sizeof(address.sun_path) + 8];
	int lock;

	if (path[0] != '/' || strlen(path) >= sizeof(address.sun_path)) {
		fprintf(stderr, "%s: SOCKET must be an absolute path of at most %zu bytes\n", daemon->program,
			sizeof(address.sun_path) - 1);
		return 2;
	}
	strcpy(address.sun_path, path);
	snprintf(lock_path, sizeof(lock_path), "%s.lock", path);
	lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);	/* held, never closed, until the process ends */
	if (lock < 0)
		return daemon_fail(daemon, "lock", lock_path);
	if (flock(lock, LOCK_EX | LOCK_NB)) {
		if (errno != EWOULDBLOCK)
			return daemon_fail(daemon, "lock", lock_path);
		fprintf(stderr, "%s: another one already serves %s: stop it first, or name another SOCKET\n",
			daemon->program, path);
		return DAEMON_SERVED;
	}
	umask(0177);
	if (unlink(path) && errno != ENOENT)
		return daemon_fail(daemon, "replace", path);
	daemon->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (daemon->listener < 0 || bind(daemon->listener, (struct sockaddr *)&address, sizeof(address)))
		return daemon_fail(daemon, "listen on", path);
	return 0;
}

/* Goes on in a child of init's, in a session of its own. Returns what to write a byte to when ready, or -1. */
static inline int daemon_detach(void)
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

/* Exempts the process from the OOM killer. Returns whether it is. */
static inline bool daemon_exempt(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, "-1000", 5) == 5;

	if (fd >= 0)
		close(fd);
	return done;
}

/* Gets room for so many descriptors, or as many as may be. Returns how many there can be. */
static inline rlim_t daemon_room(rlim_t wanted)
{
	struct rlimit files = { wanted, wanted }, now;

	if (!getrlimit(RLIMIT_NOFILE, &now) && now.rlim_cur < wanted && setrlimit(RLIMIT_NOFILE, &files)) {
		now.rlim_cur = now.rlim_max < wanted ? now.rlim_max : wanted;
		setrlimit(RLIMIT_NOFILE, &now);
	}
	return getrlimit(RLIMIT_NOFILE, &now) ? 0 : now.rlim_cur;
}

/* Leaves the directory it was started in, and has signals come as messages. Returns 0 or the exit status. */
static inline int daemon_prepare(struct daemon *daemon)
{
	sigset_t signals;

	if (chdir("/"))
		return daemon_fail(daemon, "change its directory to", "/");
	signal(SIGHUP, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	if (sigprocmask(SIG_SETMASK, &signals, NULL))
		return daemon_fail(daemon, "block", "signals");
	daemon->signals = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	return daemon->signals < 0 ? daemon_fail(daemon, "receive", "signals") : 0;
}

/*
 * Listens, and tells whoever waits at ``ready`` (-1: nobody) that it does. From here on SO_PEERCRED of a client shows
 * this process. Returns 0 or the exit status.
 */
static inline int daemon_ready(struct daemon *daemon, const char *path, int ready)
{
	if (listen(daemon->listener, (int)daemon->clients_max))
		return daemon_fail(daemon, "listen on", path);
	if (ready < 0)
		return 0;
	if (write(ready, "", 1) != 1)
		return daemon_fail(daemon, "tell", "the process that started it that it is ready");
	close(ready);
	dup2(STDIN_FILENO, STDERR_FILENO);
	return 0;
}

/* Whether a client is root or of this process's own user. */
static inline bool daemon_knows(int client)
{
	struct ucred peer;
	socklen_t len = sizeof(peer);

	return !getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &len) && (!peer.uid || peer.uid == geteuid());
}

/* Takes a connection, and closes it again if it may not stay. Returns -1 if the kernel cannot give one now. */
static inline int daemon_accept(struct daemon *daemon)
{
	int client = accept4(daemon->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	bool room = daemon->nr_clients < daemon->clients_max;

	if (client < 0)
		return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED ? 0 : -1;
	if (room)
		daemon->clients[daemon->nr_clients++] = client;
	if (daemon->greet(client, room)) {
		daemon->nr_clients -= room;
		close(client);
	}
	return 0;
}

/* Serves until a signal, a request or ``ended`` ends it. */
static inline void daemon_loop(struct daemon *daemon)
{
	bool quit = false;
	int pause = 0;

	while (!quit && !daemon->quits()) {
		struct pollfd polled[3 + DAEMON_CLIENTS_MAX] = {
			{ .fd = daemon->signals, .events = POLLIN },
			{ .fd = daemon->ended, .events = POLLIN },
			{ .fd = pause ? -1 : daemon->listener, .events = POLLIN },
		};
		uint32_t nr = daemon->nr_clients;
		struct signalfd_siginfo info;

		for (uint32_t i = 0; i < nr; i++)
			polled[3 + i] = (struct pollfd){ .fd = daemon->clients[i], .events = POLLIN };
		if (poll(polled, 3 + nr, pause ? DAEMON_PAUSE_MS : -1) < 0)
			continue;	/* EINTR, or ENOMEM: what is held stays whatever happens */
		pause = 0;
		if (polled[0].revents && read(daemon->signals, &info, sizeof(info)) == sizeof(info))
			quit = daemon->signalled(info.ssi_signo);
		quit |= polled[1].revents;
		/* backwards, so that the last client may take the place of one that left */
		for (uint32_t i = nr; i-- > 0 && !quit && !daemon->quits();) {
			if (!polled[3 + i].revents || !daemon->serve(daemon->clients[i]))
				continue;
			close(daemon->clients[i]);
			daemon->clients[i] = daemon->clients[--daemon->nr_clients];
		}
		if (polled[2].revents && !quit && !daemon->quits())
			pause = daemon_accept(daemon) < 0;
	}
}

/*
 * Receives a message of at most ``room`` bytes and its descriptors, of which those beyond ``fds_max`` are closed and
 * counted in ``*nr_fds``; places for none of them are left as they are. Returns the length the message had, which may be
 * beyond ``room``, or -errno; 0 without descriptors is the end.
 */
static inline ssize_t daemon_receive(int client, void *message, size_t room, int *fds, uint32_t fds_max, uint32_t *nr_fds)
{
	union {
		char space[CMSG_SPACE(253 * sizeof(int))];	/* SCM_MAX_FD */
		struct cmsghdr align;
	} control;
	struct iovec part = { message, room };
	struct msghdr header = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
		.msg_controllen = CMSG_SPACE((fds_max + 1) * sizeof(int)),
	};
	/* MSG_TRUNC makes the return value the length the message had */
	ssize_t len = recvmsg(client, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC | MSG_TRUNC);

	if (len < 0)
		return -errno;
	*nr_fds = header.msg_flags & MSG_CTRUNC ? fds_max + 1 : 0;	/* some did not fit: too many, or no room */
	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header); cmsg; cmsg = CMSG_NXTHDR(&header, cmsg)) {
		size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count; i++, ++*nr_fds) {
			int got;

			memcpy(&got, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(int));
			if (*nr_fds < fds_max)
				fds[*nr_fds] = got;
			else
				close(got);
		}
	}
	return len;
}

#endif
