// SPDX-License-Identifier: MIT
/* Answers the control process on its socket; the grammar stands in fuse_control.h. */
#define _GNU_SOURCE
#include <string.h>

#include "daemon.h"
#include "fuse_control.h"

static enum quit quits;

/* Whether, and how, the control process wants the server to end. */
enum quit control_quits(void)
{
	return quits;
}

static int answer(int client, uint8_t op, enum code code, int error, bool more, const void *payload, size_t len)
{
	struct answer head = {
		.version = VERSION, .op = op, .code = code, .more = more, .payload_len = (uint16_t)len,
		.error = (uint16_t)(error < 0 ? -error : error),
	};
	struct iovec parts[] = { { &head, sizeof(head) }, { (void *)payload, len } };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };

	return sendmsg(client, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static int answer_status(int client, uint8_t op)
{
	const char *mountpoint = server.mountpoint ? server.mountpoint : "";
	size_t len = strlen(mountpoint);
	char payload[sizeof(struct status) + PATH_LEN_MAX];
	struct status status = {
		.pid = (uint32_t)getpid(), .passthrough = (uint32_t)server.passthrough,
		.requests = __atomic_load_n(&server.requests, __ATOMIC_RELAXED),
		.connection = server.connection, .minor = server.minor,
	};

	pthread_mutex_lock(&tree_lock);
	status.entries = (uint32_t)tree.nr_linked;
	status.handles = tree.nr_handles;
	status.ram_bytes = tree.ram_bytes;
	pthread_mutex_unlock(&tree_lock);
	memcpy(payload, &status, sizeof(status));
	memcpy(payload + sizeof(status), mountpoint, len);
	return answer(client, op, OK, 0, false, payload, sizeof(status) + len);
}

static int list(int client, const struct asked *asked)
{
	char page[PAYLOAD_MAX], path[PATH_LEN_MAX];
	const struct node *node;
	uint64_t last = 0;
	size_t used = 0;

	memcpy(&last, asked->payload, asked->head->payload_len);
	pthread_mutex_lock(&tree_lock);
	for (node = tree.oldest; node; node = node->newer) {
		struct entry entry = {
			.id = node->id, .size = node->size, .mode = node->mode, .uid = node->uid, .gid = node->gid, .open = node->handles,
			.kind = (uint8_t)node->kind, .revoked = node->revoked,
		};

		if (node->id <= last)
			continue;
		entry.path_len = (uint16_t)node_path(node, path);
		if (used + sizeof(entry) + entry.path_len > sizeof(page))
			break;
		memcpy(page + used, &entry, sizeof(entry));
		memcpy(page + used + sizeof(entry), path, entry.path_len);
		used += sizeof(entry) + entry.path_len;
	}
	pthread_mutex_unlock(&tree_lock);
	return answer(client, OP_LIST, OK, 0, node, page, used);
}

static enum code quit(struct asked *asked)
{
	bool lazily = asked->head->flags;
	int error = unmount(lazily);

	if (error == -EBUSY)
		return BUSY;
	asked->error = error;
	if (error)
		return KERNEL;
	quits = lazily ? QUIT_LAZILY : QUIT;
	return OK;
}

/* Carry out one message. Returns 0, or -errno if the client could not be answered. */
static int serve(int client, const struct message *message, size_t len, struct asked *asked)
{
	enum code code = control_check(message, len, asked);
	uint8_t op = len >= sizeof(message->head) ? message->head.op : OP_GREETING;
	struct revoked revoked = { 0 };

	if (code)
		return answer(client, op, code, 0, false, NULL, 0);
	switch (op) {
	case OP_PUT:
		code = entry_put(asked);
		break;
	case OP_REVOKE:
		code = entry_revoke(asked, &revoked);
		return answer(client, op, code, 0, false, &revoked, code ? 0 : sizeof(revoked));
	case OP_REMOVE:
		code = entry_remove(asked, &revoked);
		return answer(client, op, code, 0, false, &revoked, code ? 0 : sizeof(revoked));
	case OP_LIST:
		return list(client, asked);
	case OP_STAT:
		return answer_status(client, op);
	case OP_QUIT:
		code = quit(asked);
		break;
	}
	return answer(client, op, code, asked->error, false, NULL, 0);
}

/* Receive and serve one message. Returns 0, or -1 if the client is gone or does not listen. */
int control_serve(int client)
{
	static struct message message;
	int fds[PARTS_MAX], error;
	struct asked asked = { .fds = memset(fds, -1, sizeof(fds)) };
	ssize_t len = daemon_receive(client, &message, sizeof(message), fds, PARTS_MAX, &asked.nr_fds);

	if (len < 0)
		return len == -EAGAIN || len == -EINTR ? 0 : -1;
	/* nothing at all is the end; a message of no bytes with descriptors is a bad one */
	error = len || asked.nr_fds ? serve(client, &message, (size_t)len, &asked) : -EPIPE;
	for (uint32_t i = 0; i < PARTS_MAX; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	return error ? -1 : 0;
}

/* Greets a new connection. Returns 0, or -1 if it may not stay. */
int control_greet(int client, bool room)
{
	if (daemon_knows(client) && room)
		return answer_status(client, OP_GREETING) ? -1 : 0;
	answer(client, OP_GREETING, daemon_knows(client) ? CROWDED : DENIED, 0, false, NULL, 0);
	return -1;
}
