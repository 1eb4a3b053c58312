/*
 * memconsole-keeper: keeps file descriptors by name while the control process is away.
 *
 * It holds the only references to memory and sessions that must not vanish, so it does nothing else: one thread, one
 * poll loop, no dependencies, memory and descriptors bounded, never the victim of the OOM killer. It cannot be started
 * again without loss: when it ends, so do the descriptors nobody else holds.
 *
 * usage: memconsole-keeper [-f] SOCKET		-f: stay in the foreground; SOCKET: absolute path
 * exit:  0 listening in the background, or told to quit; 1 failed; 2 usage; 3 one already serves this socket
 *
 * Its protocol stands in keeper.h.
 *
 * SIGTERM and SIGINT end it only while it holds nothing; SIGHUP and SIGPIPE are ignored.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "keeper.h"

#define ENTRIES_MAX 65536
#define BYTES_MAX (64ULL << 20)
#define CLIENTS_MAX 64
#define FDS_SPARE (CLIENTS_MAX + 16)	/* clients, listener, lock, signals, stdio, one being received, one refused */
#define PAUSE_MS 100

struct entry {
	int fd;
	uint16_t payload_len;
	uint8_t name_len;
	char data[];		/* name, then payload */
};

static struct keeper {
	struct entry *entries[ENTRIES_MAX];	/* sorted by name in byte order */
	uint32_t held, room, guards;
	uint64_t bytes;
	int clients[CLIENTS_MAX];
	uint32_t nr_clients;
	int listener, signals;
	int quit;
} keeper;

/* Bytes an entry counts for. */
static uint64_t entry_bytes(size_t name_len, size_t payload_len)
{
	return sizeof(struct entry) + name_len + payload_len;
}

/* Order of two names: negative, 0 or positive. */
static int compare(const char *a, size_t a_len, const char *b, size_t b_len)
{
	int order = memcmp(a, b, a_len < b_len ? a_len : b_len);

	return order ? order : (a_len > b_len) - (a_len < b_len);
}

/* Index of the first entry whose name is not before ``name``; ``*found`` says whether it is that very name. */
static uint32_t find(const char *name, size_t name_len, int *found)
{
	uint32_t low = 0, high = keeper.held;

	*found = 0;
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct entry *entry = keeper.entries[middle];
		int order = compare(entry->data, entry->name_len, name, name_len);

		if (!order) {
			*found = 1;
			return middle;
		}
		if (order < 0)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Send a reply, with ``fd`` if that is not negative. Returns 0, or -errno if nothing was sent. */
static int answer(int client, uint8_t op, enum code code, int more, const void *payload, size_t len, int fd)
{
	struct reply head = {
		.version = KEEPER_VERSION, .op = op, .code = code, .more = more, .payload_len = len,
	};
	struct iovec parts[] = { { &head, sizeof(head) }, { (void *)payload, len } };
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };

	if (fd >= 0) {
		struct cmsghdr *cmsg;

		message.msg_control = &control;
		message.msg_controllen = sizeof(control.space);
		cmsg = CMSG_FIRSTHDR(&message);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	}
	return sendmsg(client, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static int answer_status(int client, uint8_t op)
{
	struct status status = {
		.pid = getpid(), .held = keeper.held, .room = keeper.room, .clients = keeper.nr_clients,
		.bytes = keeper.bytes, .bytes_room = BYTES_MAX, .guards = keeper.guards,
	};

	return answer(client, op, OK, 0, &status, sizeof(status), -1);
}

/* Hold ``fd``, which is the keeper's from here on if the code is OK, under the message's name. */
static enum code put(const struct message *message, int fd)
{
	const struct request *head = &message->head;
	uint64_t bytes = entry_bytes(head->name_len, head->payload_len), before = 0;
	struct entry *entry;
	int found;
	uint32_t at = find(message->body, head->name_len, &found);

	if (found)
		before = entry_bytes(head->name_len, keeper.entries[at]->payload_len);
	else if (keeper.held >= keeper.room)
		return FULL;
	if (keeper.bytes - before + bytes > BYTES_MAX)
		return FULL_BYTES;
	entry = malloc(bytes);
	if (!entry)
		return NO_MEMORY;
	entry->fd = fd;
	entry->name_len = head->name_len;
	entry->payload_len = head->payload_len;
	memcpy(entry->data, message->body, (size_t)head->name_len + head->payload_len);
	if (found) {
		close(keeper.entries[at]->fd);
		free(keeper.entries[at]);
	} else {
		memmove(&keeper.entries[at + 1], &keeper.entries[at], (keeper.held - at) * sizeof(entry));
		keeper.held++;
	}
	keeper.entries[at] = entry;
	keeper.bytes += bytes - before;
	return OK;
}

static int get(int client, const struct message *message)
{
	const struct entry *entry;
	int found, error;
	uint32_t at = find(message->body, message->head.name_len, &found);

	if (!found)
		return answer(client, OP_GET, NOT_FOUND, 0, NULL, 0, -1);
	entry = keeper.entries[at];
	error = answer(client, OP_GET, OK, 0, entry->data + entry->name_len, entry->payload_len, entry->fd);
	if (error == -EAGAIN || error == -EPIPE || error == -ECONNRESET || !error)
		return error;
	return answer(client, OP_GET, NO_MEMORY, 0, NULL, 0, -1);	/* ETOOMANYREFS, ENOBUFS, ENOMEM */
}

static enum code drop(const struct message *message)
{
	struct entry *entry;
	int found;
	uint32_t at = find(message->body, message->head.name_len, &found);

	if (!found)
		return NOT_FOUND;
	entry = keeper.entries[at];
	keeper.held--;
	memmove(&keeper.entries[at], &keeper.entries[at + 1], (keeper.held - at) * sizeof(entry));
	keeper.bytes -= entry_bytes(entry->name_len, entry->payload_len);
	close(entry->fd);
	free(entry);
	return OK;
}

static int list(int client, const struct message *message)
{
	char page[KEEPER_PAYLOAD_MAX];
	size_t used = 0;
	int found;
	uint32_t at = find(message->body, message->head.name_len, &found) + found;

	for (; at < keeper.held; at++) {
		const struct entry *entry = keeper.entries[at];

		if (used + 1 + entry->name_len > sizeof(page))
			break;
		page[used++] = entry->name_len;
		memcpy(page + used, entry->data, entry->name_len);
		used += entry->name_len;
	}
	return answer(client, OP_LIST, OK, at < keeper.held, page, used, -1);
}

/* Boot the loaded kernel with everything still held. Returns only if the kernel refused, and the client was told or not. */
static int jump(int client)
{
	uint32_t refused;

	reboot(RB_KEXEC);
	refused = errno;
	return answer(client, OP_JUMP, NOT_JUMPED, 0, &refused, sizeof(refused), -1);
}

/* What is wrong with a message of ``len`` bytes that came with ``nr_fds`` descriptors, or OK. */
static enum code check(const struct message *message, size_t len, int nr_fds)
{
	const struct request *head = &message->head;

	if (len > sizeof(*message))
		return TOO_LONG;
	if (len < sizeof(*head))
		return BAD_MESSAGE;
	if (head->version != KEEPER_VERSION)
		return BAD_VERSION;
	if (head->op < OP_PUT || head->op > OP_JUMP)
		return BAD_OP;
	if (head->payload_len > KEEPER_PAYLOAD_MAX)
		return TOO_LONG;
	if (len != sizeof(*head) + head->name_len + head->payload_len || head->zero)
		return BAD_MESSAGE;
	if (head->flags & ~(head->op == OP_QUIT ? 1 : 0) || (head->payload_len && head->op != OP_PUT))
		return BAD_MESSAGE;
	if (head->op >= OP_STAT) {
		if (head->name_len)
			return BAD_MESSAGE;
	} else if ((!head->name_len && head->op != OP_LIST) || memchr(message->body, 0, head->name_len)) {
		return BAD_NAME;
	}
	if (nr_fds != (head->op == OP_PUT))
		return BAD_FDS;
	return OK;
}

/* Carry out one message. Returns 0, or -errno if the client could not be answered. */
static int serve(int client, const struct message *message, size_t len, int nr_fds, int *fd)
{
	enum code code = check(message, len, nr_fds);
	uint8_t op = len >= sizeof(message->head) ? message->head.op : OP_GREETING;

	if (code)
		return answer(client, op, code, 0, NULL, 0, -1);
	switch (op) {
	case OP_PUT:
		code = put(message, *fd);
		if (code == OK)
			*fd = -1;
		break;
	case OP_GET:
		return get(client, message);
	case OP_DROP:
		code = drop(message);
		break;
	case OP_LIST:
		return list(client, message);
	case OP_STAT:
		return answer_status(client, op);
	case OP_JUMP:
		return jump(client);
	case OP_QUIT:
		code = keeper.held && !message->head.flags ? HOLDING : OK;
		keeper.quit = code == OK;
		break;
	}
	return answer(client, op, code, 0, NULL, 0, -1);
}

/* Take the descriptors out of a control message; those beyond the first are closed. Returns how many there were. */
static int take_fds(struct msghdr *header, int *fd)
{
	int nr = header->msg_flags & MSG_CTRUNC ? 2 : 0;	/* some did not fit: more than one, or no room */

	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(header); cmsg; cmsg = CMSG_NXTHDR(header, cmsg)) {
		size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count; i++, nr++) {
			int got;

			memcpy(&got, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(int));
			if (*fd < 0)
				*fd = got;
			else
				close(got);
		}
	}
	return nr;
}

/* Receive and serve one message. Returns 0, or -1 if the client is gone or does not listen. */
static int receive(int client)
{
	static struct message message;
	union {
		char space[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = { &message, sizeof(message) };
	struct msghdr header = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.space),
	};
	/* MSG_TRUNC makes the return value the length the message had */
	ssize_t len = recvmsg(client, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC | MSG_TRUNC);
	int fd = -1, nr_fds, error;

	if (len < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -1;
	nr_fds = take_fds(&header, &fd);
	/* nothing at all is the end; a message of no bytes with descriptors is a bad one */
	error = len || nr_fds ? serve(client, &message, len, nr_fds, &fd) : -EPIPE;
	if (fd >= 0)
		close(fd);
	return error ? -1 : 0;
}

/* Take a connection, greet it, and close it again if it may not stay. Returns -1 if the kernel cannot give one now. */
static int greet(void)
{
	int client = accept4(keeper.listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct ucred peer;
	socklen_t len = sizeof(peer);
	enum code code = OK;

	if (client < 0)
		return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED ? 0 : -1;
	if (getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &len) || (peer.uid && peer.uid != geteuid()))
		code = DENIED;
	else if (keeper.nr_clients == CLIENTS_MAX)
		code = BUSY;
	if (code) {
		answer(client, OP_GREETING, code, 0, NULL, 0, -1);
		close(client);
		return 0;
	}
	keeper.clients[keeper.nr_clients++] = client;
	if (answer_status(client, OP_GREETING)) {
		keeper.nr_clients--;
		close(client);
	}
	return 0;
}

/* A signal asks to end: only an empty keeper does. */
static void signalled(void)
{
	struct signalfd_siginfo info;

	if (read(keeper.signals, &info, sizeof(info)) != sizeof(info))
		return;
	if (keeper.held)
		fprintf(stderr, "memconsole-keeper: signal %u ignored: %u descriptors are held\n", info.ssi_signo, keeper.held);
	else
		keeper.quit = 1;
}

static void loop(void)
{
	int pause = 0;

	while (!keeper.quit) {
		struct pollfd polled[2 + CLIENTS_MAX] = {
			{ .fd = keeper.signals, .events = POLLIN },
			{ .fd = pause ? -1 : keeper.listener, .events = POLLIN },
		};
		uint32_t nr = keeper.nr_clients;

		for (uint32_t i = 0; i < nr; i++)
			polled[2 + i] = (struct pollfd){ .fd = keeper.clients[i], .events = POLLIN };
		if (poll(polled, 2 + nr, pause ? PAUSE_MS : -1) < 0)
			continue;	/* EINTR, or ENOMEM: the descriptors stay whatever happens */
		pause = 0;
		if (polled[0].revents)
			signalled();
		/* backwards, so that the last client may take the place of one that left */
		for (uint32_t i = nr; i-- > 0 && !keeper.quit;) {
			if (!polled[2 + i].revents || !receive(keeper.clients[i]))
				continue;
			close(keeper.clients[i]);
			keeper.clients[i] = keeper.clients[--keeper.nr_clients];
		}
		if (polled[1].revents && !keeper.quit)
			pause = greet() < 0;
	}
}

static void release(void)
{
	while (keeper.nr_clients)
		close(keeper.clients[--keeper.nr_clients]);
	while (keeper.held) {
		struct entry *entry = keeper.entries[--keeper.held];

		close(entry->fd);
		free(entry);
	}
}

/* Make the keeper hard to kill and roomy; what cannot be had is missing from ``guards``. */
static void guard(void)
{
	struct rlimit files = { ENTRIES_MAX + FDS_SPARE, ENTRIES_MAX + FDS_SPARE }, now;
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	prctl(PR_SET_NAME, "mc-keeper");
	if (fd >= 0) {
		if (write(fd, "-1000", 5) == 5)
			keeper.guards |= GUARD_OOM;
		close(fd);
	}
	if (!mlockall(MCL_CURRENT | (geteuid() ? 0 : MCL_FUTURE)))
		keeper.guards |= GUARD_LOCKED;
	if (!getrlimit(RLIMIT_NOFILE, &now) && now.rlim_cur < files.rlim_cur && setrlimit(RLIMIT_NOFILE, &files)) {
		now.rlim_cur = now.rlim_max < files.rlim_cur ? now.rlim_max : files.rlim_cur;
		setrlimit(RLIMIT_NOFILE, &now);
	}
	getrlimit(RLIMIT_NOFILE, &now);
	if (now.rlim_cur >= files.rlim_cur) {
		keeper.room = ENTRIES_MAX;
		keeper.guards |= GUARD_ROOM;
	} else if (now.rlim_cur > FDS_SPARE) {
		keeper.room = now.rlim_cur - FDS_SPARE;
	}
}

static int fail(const char *what)
{
	fprintf(stderr, "memconsole-keeper: %s: %s\n", what, strerror(errno));
	return 1;
}

/* Bind the socket, in the place of one whose keeper is gone. Returns 0 or the exit status. */
static int claim(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char lock_path[sizeof(address.sun_path) + 8];
	int lock;

	if (path[0] != '/' || strlen(path) >= sizeof(address.sun_path)) {
		fprintf(stderr, "memconsole-keeper: SOCKET is an absolute path of at most %zu bytes\n",
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
		fprintf(stderr, "memconsole-keeper: a keeper already serves %s\n", path);
		return 3;
	}
	umask(0177);
	if (unlink(path) && errno != ENOENT)
		return fail(path);
	keeper.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (keeper.listener < 0 || bind(keeper.listener, (struct sockaddr *)&address, sizeof(address)))
		return fail(path);
	return 0;
}

/* Go on in a child of init's, in a session of its own. Returns what to write a byte to when ready, or -1. */
static int detach(void)
{
	int ends[2], null;
	char byte;
	pid_t child;

	if (pipe2(ends, O_CLOEXEC))
		return -1;
	child = fork();
	if (child < 0)
		return -1;
	if (child) {
		close(ends[1]);
		exit(read(ends[0], &byte, 1) == 1 ? 0 : 1);
	}
	close(ends[0]);
	setsid();
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	return null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0 ? -1 : ends[1];
}

int main(int argc, char **argv)
{
	int foreground = argc == 3 && !strcmp(argv[1], "-f"), ready = -1, status;
	const char *path = argv[argc - 1];
	sigset_t signals;

	if (argc != 2 + foreground) {
		fprintf(stderr, "usage: memconsole-keeper [-f] SOCKET\n");
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
	signal(SIGHUP, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	if (sigprocmask(SIG_SETMASK, &signals, NULL))
		return fail("sigprocmask");
	keeper.signals = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	if (keeper.signals < 0)
		return fail("signalfd");
	if (listen(keeper.listener, CLIENTS_MAX))	/* from here on SO_PEERCRED of a client shows this process */
		return fail(path);
	if (!foreground) {
		if (write(ready, "", 1) != 1)
			return fail("pipe");
		close(ready);
		dup2(STDIN_FILENO, STDERR_FILENO);
	}
	loop();
	unlink(path);
	release();
	return 0;
}
