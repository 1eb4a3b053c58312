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
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>

#include "daemon.h"
#include "keeper.h"
#include "liveupdate.h"

#define ENTRIES_MAX 65536
#define BYTES_MAX (64ULL << 20)
#define FDS_SPARE (DAEMON_CLIENTS_MAX + 16)	/* clients, listener, lock, signals, stdio, one being received, one refused */

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
	bool quit;
} keeper;

static int greet(int client, bool room);
static int receive(int client);
static bool signalled(uint32_t number);
static bool quits(void);

static struct daemon self = {
	.program = "memconsole-keeper", .clients_max = DAEMON_CLIENTS_MAX, .ended = -1,
	.greet = greet, .serve = receive, .signalled = signalled, .quits = quits,
};

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
		.pid = getpid(), .held = keeper.held, .room = keeper.room, .clients = self.nr_clients,
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
	if (entry->fd >= 0)
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

/*
 * Retrieve a session that was handed over. Closing one discards what is still inside, so it is this process that gets it
 * from the kernel, with a place for it made before: there is no moment at which only somebody else has it.
 */
static int land(int client, const struct message *message)
{
	char session[LUO_NAME_MAX + 1] = "";
	uint32_t refused = 0, at;
	enum code code;
	int found, device;

	find(message->body, message->head.name_len, &found);
	if (found)
		return answer(client, OP_LAND, OK, 0, &refused, sizeof(refused), -1);
	code = put(message, -1);
	if (code)
		return answer(client, OP_LAND, code, 0, NULL, 0, -1);
	at = find(message->body, message->head.name_len, &found);
	memcpy(session, message->body + message->head.name_len, message->head.payload_len);
	device = open(LUO_DEVICE, O_RDWR | O_CLOEXEC);
	if (device < 0)
		refused = errno;
	else
		keeper.entries[at]->fd = luo_session(device, session);
	if (device >= 0 && keeper.entries[at]->fd < 0)
		refused = -keeper.entries[at]->fd;
	if (refused)
		drop(message);
	if (device >= 0)
		close(device);
	return answer(client, OP_LAND, refused ? NOT_LANDED : OK, 0, &refused, sizeof(refused), -1);
}

/* What is wrong with a message of ``len`` bytes that came with ``nr_fds`` descriptors, or OK. */
static enum code check(const struct message *message, size_t len, uint32_t nr_fds)
{
	const struct request *head = &message->head;

	if (len > sizeof(*message))
		return TOO_LONG;
	if (len < sizeof(*head))
		return BAD_MESSAGE;
	if (head->version != KEEPER_VERSION)
		return BAD_VERSION;
	if (head->op < OP_PUT || head->op > OP_LAND)
		return BAD_OP;
	if (head->payload_len > (head->op == OP_LAND ? LUO_NAME_MAX : KEEPER_PAYLOAD_MAX))
		return TOO_LONG;
	if (len != sizeof(*head) + head->name_len + head->payload_len || head->zero)
		return BAD_MESSAGE;
	if (head->flags & ~(head->op == OP_QUIT ? 1 : 0))
		return BAD_MESSAGE;
	if (head->payload_len && head->op != OP_PUT && head->op != OP_LAND)
		return BAD_MESSAGE;
	if (head->op >= OP_STAT && head->op <= OP_JUMP) {
		if (head->name_len)
			return BAD_MESSAGE;
	} else if ((!head->name_len && head->op != OP_LIST) || memchr(message->body, 0, head->name_len)) {
		return BAD_NAME;
	}
	if (head->op == OP_LAND && (!head->payload_len || memchr(message->body + head->name_len, 0, head->payload_len)))
		return BAD_NAME;
	if (nr_fds != (head->op == OP_PUT))
		return BAD_FDS;
	return OK;
}

/* Carry out one message. Returns 0, or -errno if the client could not be answered. */
static int serve(int client, const struct message *message, size_t len, uint32_t nr_fds, int *fd)
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
	case OP_LAND:
		return land(client, message);
	case OP_QUIT:
		code = keeper.held && !message->head.flags ? HOLDING : OK;
		keeper.quit = code == OK;
		break;
	}
	return answer(client, op, code, 0, NULL, 0, -1);
}

/* Receive and serve one message. Returns 0, or -1 if the client is gone or does not listen. */
static int receive(int client)
{
	static struct message message;
	uint32_t nr_fds;
	int fd = -1, error;
	ssize_t len = daemon_receive(client, &message, sizeof(message), &fd, 1, &nr_fds);

	if (len < 0)
		return len == -EAGAIN || len == -EINTR ? 0 : -1;
	/* nothing at all is the end; a message of no bytes with descriptors is a bad one */
	error = len || nr_fds ? serve(client, &message, (size_t)len, nr_fds, &fd) : -EPIPE;
	if (fd >= 0)
		close(fd);
	return error ? -1 : 0;
}

/* Greet a new connection. Returns 0, or -1 if it may not stay. */
static int greet(int client, bool room)
{
	if (daemon_knows(client) && room)
		return answer_status(client, OP_GREETING) ? -1 : 0;
	answer(client, OP_GREETING, daemon_knows(client) ? BUSY : DENIED, 0, NULL, 0, -1);
	return -1;
}

/* A signal asks to end: only an empty keeper does. */
static bool signalled(uint32_t number)
{
	if (keeper.held)
		fprintf(stderr, "memconsole-keeper: signal %u is ignored: it holds %u descriptors, whose memory would be lost\n",
			number, keeper.held);
	return !keeper.held;
}

static bool quits(void)
{
	return keeper.quit;
}

static void release(void)
{
	while (self.nr_clients)
		close(self.clients[--self.nr_clients]);
	while (keeper.held) {
		struct entry *entry = keeper.entries[--keeper.held];

		close(entry->fd);
		free(entry);
	}
}

/* Make the keeper hard to kill and roomy; what cannot be had is missing from ``guards``. */
static void guard(void)
{
	rlim_t files;

	prctl(PR_SET_NAME, "mc-keeper");
	if (daemon_exempt())
		keeper.guards |= GUARD_OOM;
	if (!mlockall(MCL_CURRENT | (geteuid() ? 0 : MCL_FUTURE)))
		keeper.guards |= GUARD_LOCKED;
	files = daemon_room(ENTRIES_MAX + FDS_SPARE);
	if (files >= ENTRIES_MAX + FDS_SPARE) {
		keeper.room = ENTRIES_MAX;
		keeper.guards |= GUARD_ROOM;
	} else if (files > FDS_SPARE) {
		keeper.room = (uint32_t)(files - FDS_SPARE);
	}
}

int main(int argc, char **argv)
{
	int foreground = argc == 3 && !strcmp(argv[1], "-f"), ready = -1, status;
	const char *path = argv[argc - 1];

	if (argc != 2 + foreground) {
		fprintf(stderr, "usage: memconsole-keeper [-f] SOCKET\n");
		return 2;
	}
	status = daemon_claim(&self, path);
	if (status)
		return status;
	if (!foreground && (ready = daemon_detach()) < 0)
		return daemon_fail(&self, "go into", "the background");
	guard();
	if (daemon_prepare(&self) || daemon_ready(&self, path, ready))
		return 1;
	daemon_loop(&self);
	unlink(path);
	release();
	return 0;
}
