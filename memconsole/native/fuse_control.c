// SPDX-License-Identifier: MIT
/*
 * What the control process asks of memconsole-fuse, on a SOCK_SEQPACKET socket: a message a request, a message a reply,
 * integers little-endian, descriptors by SCM_RIGHTS:
 *
 *	greeting = reply			sent on connect with op 0 and a status; any code but OK ends the connection
 *	request  = version:u8 op:u8 kind:u8 flags:u8 path_len:u16 payload_len:u16 mode:u32 uid:u32 gid:u32 zero:u32
 *		   path payload
 *	reply    = version:u8 op:u8 code:u8 more:u8 payload_len:u16 errno:u16 payload
 *	path     = name ("/" name)*		from the mount's root; a name has 1 to 255 bytes and is not "." or ".."
 *	status   = pid:u32 passthrough:u32 entries:u32 handles:u32 requests:u64 ram_bytes:u64 connection:u32 minor:u32
 *		   mountpoint			passthrough: 0, or the errno that tells why there is none
 *	entry    = id:u64 size:u64 mode:u32 uid:u32 gid:u32 open:u32 path_len:u16 kind:u8 revoked:u8 zero:u32 path
 *	revoked  = open:u32 cut:u32
 *	part     = offset:u64 length:u64 gpa:u64	bytes of a memfd; gpa all ones if there is none
 *
 *	op	request					fds	reply payload
 *	1 PUT	kind path mode uid gid, by kind:
 *		 1 DIR					0
 *		 2 LINK	payload: target			0
 *		 3 RAM					1	the memfd, passed through
 *		 4 TEXT					1	a memfd of the text, which nobody changes any more
 *		 5 MAP	payload: part*			parts	memfds, a part each
 *	2 REVOKE path				0	revoked
 *	3 REMOVE path, flags 1: with its entries	0	revoked, of all together
 *	4 LIST	payload: id:u64, the last one seen	0	entry*, by id; ``more`` if there are others
 *	5 STAT						0	status
 *	6 QUIT	flags 1: even if in use			0	unmounts and ends; refused with BUSY while files are open
 *
 * PUT on what is there changes owner and mode, and at once what a LINK, TEXT or MAP shows; a RAM file is for one memfd
 * and its life. REVOKE and REMOVE: nobody opens it any more. ``cut`` says whether the kernel has given up the inode of
 * files opened before: reading and writing them gives EIO. It does so when a lookup shows another generation, so one is
 * made, by a child that holds nothing of ours. The kernel does not look at the inode when such a file is mapped or
 * spliced: ``open`` says how many there still are (open file descriptions: duplicates, forks and descriptors in flight
 * are one). What is mapped stays mapped. Truncating the memfd ends all of it.
 *
 * Every request is answered, a bad one with the code of what is wrong with it, and leaves everything as it was.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#include "daemon.h"
#include "fuse.h"

#define VERSION 1
#define PAYLOAD_MAX 4096
#define PROBE_MS 5000

enum op { OP_GREETING, OP_PUT, OP_REVOKE, OP_REMOVE, OP_LIST, OP_STAT, OP_QUIT };

enum code {
	OK,
	BAD_MESSAGE,		/* lengths do not add up, or a field that must be zero is not */
	BAD_VERSION,		/* of a version this server does not speak */
	BAD_OP,			/* no such operation, or no such kind of entry */
	BAD_PATH,		/* not a path, or its directory is none */
	BAD_FDS,		/* not as many descriptors as the operation takes, or of the wrong kind */
	TOO_LONG,		/* longer than any request may be */
	NOT_FOUND,		/* there is nothing at this path, or nothing it could be put into */
	TAKEN,			/* there is something else at this path */
	NOT_EMPTY,		/* the directory has entries */
	FULL,			/* no room for another entry */
	NO_PASSTHROUGH,		/* the kernel shows no RAM here; errno tells why */
	KERNEL,			/* a system call failed; errno tells how */
	BUSY,			/* files on the mount are open or mapped */
	DENIED,			/* the peer is neither root nor this server's own user */
	CROWDED,		/* too many connections */
};

struct request {
	uint8_t version, op, kind, flags;
	uint16_t path_len, payload_len;
	uint32_t mode, uid, gid, zero;
};

struct answer {
	uint8_t version, op, code, more;
	uint16_t payload_len, error;
};

struct status {
	uint32_t pid, passthrough, entries, handles;
	uint64_t requests, ram_bytes;
	uint32_t connection, minor;
};

struct entry {
	uint64_t id, size;
	uint32_t mode, uid, gid, open;
	uint16_t path_len;
	uint8_t kind, revoked;
	uint32_t zero;
};

struct revoked {
	uint32_t open, cut;
};

struct message {
	struct request head;
	char body[PATH_LEN_MAX + 1 + PAYLOAD_MAX];	/* path, payload */
};

/* A message and the descriptors that came with it; those that are taken become -1, the others are closed. */
struct asked {
	const struct request *head;
	const char *path, *payload;
	int *fds;
	uint32_t nr_fds;
	int error;		/* for the reply */
};

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

static bool path_is_good(const char *path, size_t len)
{
	while (len) {
		const char *slash = memchr(path, '/', len);
		size_t part = slash ? (size_t)(slash - path) : len;

		if (!part || part > NAME_LEN_MAX || memchr(path, 0, part))
			return false;
		if (path[0] == '.' && (part == 1 || (part == 2 && path[1] == '.')))
			return false;
		if (!slash)
			return true;
		path += part + 1;
		len -= part + 1;
	}
	return false;	/* empty, or a slash at the end */
}

/* Looks at the memfd of a RAM or TEXT file. */
static enum code check_file(struct asked *asked, struct stat *st)
{
	if (fstat(asked->fds[0], st)) {
		asked->error = errno;
		return KERNEL;
	}
	return S_ISREG(st->st_mode) ? OK : BAD_FDS;
}

/* What is shown becomes the asked content, whose descriptors are taken. Returns OK or KERNEL. */
static enum code make_content(struct asked *asked, struct content **out)
{
	struct content *content = content_new(asked->nr_fds);

	if (!content) {
		asked->error = ENOMEM;
		return KERNEL;
	}
	for (uint32_t i = 0; i < asked->nr_fds; i++) {
		content->of[i].fd = asked->fds[i];
		asked->fds[i] = -1;
		if (asked->head->kind == KIND_MAP)
			memcpy(&content->of[i].part, asked->payload + i * sizeof(struct part), sizeof(struct part));
	}
	*out = content;
	return OK;
}

/* What an entry is made of, before it has its place in the tree. */
struct fresh {
	struct content *content;
	char *target;
	struct stat st;
	int32_t backing;
};

static void fresh_drop(struct fresh *fresh)
{
	if (fresh->content)
		content_put(fresh->content);
	if (fresh->backing)
		backing_close(fresh->backing);
	free(fresh->target);
}

static enum code prepare_ram(struct asked *asked, struct fresh *fresh)
{
	enum code code = check_file(asked, &fresh->st);

	if (code)
		return code;
	if (!fresh->st.st_size)
		return BAD_FDS;
	if (server.passthrough) {
		asked->error = server.passthrough;
		return NO_PASSTHROUGH;
	}
	asked->error = backing_open(asked->fds[0], &fresh->backing);
	return asked->error ? KERNEL : OK;
}

static enum code prepare(struct asked *asked, struct fresh *fresh)
{
	enum code code;

	switch (asked->head->kind) {
	case KIND_LINK:
		fresh->target = strndup(asked->payload, asked->head->payload_len);
		asked->error = fresh->target ? 0 : ENOMEM;
		return fresh->target ? OK : KERNEL;
	case KIND_RAM:
		return prepare_ram(asked, fresh);
	case KIND_TEXT:
		code = check_file(asked, &fresh->st);
		return code ? code : make_content(asked, &fresh->content);
	case KIND_MAP:
		return make_content(asked, &fresh->content);
	}
	return OK;
}

/* The entry at a path, made if it is not there; with tree_lock held. */
static enum code place(struct asked *asked, const struct fresh *fresh, struct node **out)
{
	const char *slash = memrchr(asked->path, '/', asked->head->path_len);
	size_t dir_len = slash ? (size_t)(slash - asked->path) : 0;
	const char *name = slash ? slash + 1 : asked->path;
	size_t len = asked->head->path_len - (size_t)(name - asked->path);
	struct node *parent = node_find(asked->path, dir_len), *node;

	if (!parent)
		return NOT_FOUND;
	if (parent->kind != KIND_DIR)
		return BAD_PATH;
	node = node_child(parent, name, len);
	if (node && (node->kind != asked->head->kind || node->revoked))
		return TAKEN;
	if (node && node->kind == KIND_RAM && (node->dev != fresh->st.st_dev || node->ino != fresh->st.st_ino))
		return TAKEN;
	if (!node && tree.nr_nodes >= NODES_MAX)
		return FULL;
	if (!node)
		node = node_add(parent, name, len, asked->head->kind);
	asked->error = node ? 0 : ENOMEM;
	*out = node;
	return node ? OK : KERNEL;
}

/* Gives an entry what was prepared for it, and takes what it had; with tree_lock held. */
static void settle(struct node *node, const struct request *head, struct fresh *fresh)
{
	node->mode = head->mode;
	node->uid = head->uid;
	node->gid = head->gid;
	node_touch(node);
	if (node->kind == KIND_RAM) {
		if (node->backing)
			return;		/* the same memfd: the kernel has it already */
		node->backing = fresh->backing;
		node->dev = fresh->st.st_dev;
		node->ino = fresh->st.st_ino;
		node->size = (uint64_t)fresh->st.st_size;
		tree.ram_bytes += node->size;
		fresh->backing = 0;
	} else if (node->kind == KIND_LINK) {
		char *before = node->target;

		node->target = fresh->target;
		node->size = strlen(node->target);
		fresh->target = before;
	} else if (fresh->content) {
		struct content *before = node->content;

		node->content = fresh->content;
		node->size = node->kind == KIND_TEXT ? (uint64_t)fresh->st.st_size : 0;
		fresh->content = before;
	}
}

static enum code put(struct asked *asked)
{
	struct fresh fresh = { 0 };
	struct node *node = NULL;
	enum code code = prepare(asked, &fresh);
	uint64_t known = 0;

	if (!code) {
		pthread_mutex_lock(&tree_lock);
		code = place(asked, &fresh, &node);
		if (!code) {
			settle(node, asked->head, &fresh);
			known = node->lookups ? node->id : 0;
		}
		pthread_mutex_unlock(&tree_lock);
	}
	fresh_drop(&fresh);
	if (known)
		invalidate_node(known);
	return code;
}

/*
 * Looks a path of our own mount up, in a child that holds no descriptor of ours: should this server end meanwhile, the
 * child's request ends with it. Returns whether the lookup came back in time.
 */
static bool look_up(const char *path)
{
	pid_t child = fork();
	struct pollfd ended;
	struct stat st;
	bool done;

	if (!child) {
		syscall(SYS_close_range, 0, ~0U, 0);
		lstat(path, &st);
		_exit(0);
	}
	if (child < 0)
		return false;
	ended = (struct pollfd){ .fd = (int)syscall(SYS_pidfd_open, child, 0), .events = POLLIN };
	done = ended.fd >= 0 && poll(&ended, 1, PROBE_MS) == 1;
	if (!done)
		kill(child, SIGKILL);
	waitpid(child, NULL, done ? 0 : WNOHANG);
	if (ended.fd >= 0)
		close(ended.fd);
	return done;
}

/*
 * Revokes a linked file: with tree_lock held, which is let go of meanwhile; only this thread takes nodes out, so the
 * node stays. Returns whether the kernel has given up the inode it knew.
 */
static bool cut(struct node *node)
{
	char path[PATH_LEN_MAX + 1 + PATH_LEN_MAX + 1];
	uint64_t parent = node->parent->id;
	bool known = node->lookups, looked;
	size_t len;

	if (!node->revoked) {
		node->revoked = true;
		node->generation++;
		node->shown = false;
		node_touch(node);
		node_drop_data(node);
	}
	node->cut |= !known;
	if (node->cut || !server.mountpoint)
		return node->cut;
	len = (size_t)sprintf(path, "%s/", server.mountpoint);
	len += node_path(node, path + len);
	path[len] = 0;
	pthread_mutex_unlock(&tree_lock);
	invalidate_node(node->id);
	invalidate_name(parent, node->name);
	looked = look_up(path);
	pthread_mutex_lock(&tree_lock);
	node->cut = looked && node->shown;
	return node->cut;
}

static bool is_file(const struct node *node)
{
	return node->kind == KIND_RAM || node->kind == KIND_TEXT || node->kind == KIND_MAP;
}

static enum code revocation(struct asked *asked, struct revoked *revoked)
{
	struct node *node;
	enum code code = OK;

	pthread_mutex_lock(&tree_lock);
	node = node_find(asked->path, asked->head->path_len);
	if (!node)
		code = NOT_FOUND;
	else if (!is_file(node))
		code = BAD_PATH;
	else
		*revoked = (struct revoked){ .cut = cut(node), .open = node->handles };
	pthread_mutex_unlock(&tree_lock);
	return code;
}

static bool is_in(const struct node *node, const struct node *dir)
{
	while (node && node != dir)
		node = node->parent;
	return node;
}

static bool has_entries(const struct node *dir)
{
	for (const struct node *node = tree.oldest; node; node = node->newer)
		if (node->parent == dir)
			return true;
	return false;
}

/* Takes one node without entries away, for good; with tree_lock held, which is let go of meanwhile. */
static void take_away(struct node *node, struct revoked *revoked)
{
	uint64_t parent = node->parent->id;
	bool known = node->lookups;
	char name[NAME_LEN_MAX + 1];

	if (is_file(node) && !cut(node))
		revoked->cut = 0;
	revoked->open += node->handles;
	strcpy(name, node->name);
	node_unlink(node);
	pthread_mutex_unlock(&tree_lock);
	if (known)
		invalidate_name(parent, name);
	pthread_mutex_lock(&tree_lock);
}

static enum code removal(struct asked *asked, struct revoked *revoked)
{
	struct node *top, *node, *older;
	enum code code = OK;

	*revoked = (struct revoked){ .cut = 1 };
	pthread_mutex_lock(&tree_lock);
	top = node_find(asked->path, asked->head->path_len);
	if (!top)
		code = NOT_FOUND;
	else if (!asked->head->flags && has_entries(top))
		code = NOT_EMPTY;
	/* a directory is older than its entries, so backwards they go before it */
	for (node = code ? NULL : tree.newest; node; node = older) {
		older = node->older;
		if (is_in(node, top))
			take_away(node, revoked);
	}
	pthread_mutex_unlock(&tree_lock);
	return code;
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

static bool mode_is_good(const struct request *head)
{
	return head->op == OP_PUT ? !(head->mode & ~0777U) : !head->mode && !head->uid && !head->gid && !head->kind;
}

/* The length a request's payload must have for nr_fds descriptors, or whether len will do. */
static bool payload_is_good(const struct request *head, const char *payload, uint32_t nr_fds)
{
	if (head->op == OP_LIST)
		return head->payload_len == sizeof(uint64_t);
	if (head->op != OP_PUT)
		return !head->payload_len;
	if (head->kind == KIND_LINK)
		return head->payload_len && !memchr(payload, 0, head->payload_len);
	return head->payload_len == (head->kind == KIND_MAP ? nr_fds * sizeof(struct part) : 0);
}

static bool parts_are_good(const struct asked *asked)
{
	for (uint32_t i = 0; i < asked->nr_fds; i++) {
		struct part part;

		memcpy(&part, asked->payload + i * sizeof(part), sizeof(part));
		if ((part.offset | part.length) % 4096 || (part.gpa != NO_GPA && part.gpa % 4096) || !part.length)
			return false;
		if (part.offset >= 1ULL << 62 || part.length >= 1ULL << 62)
			return false;
	}
	return true;
}

/* How many descriptors a request takes at least and at most. */
static bool fds_are_good(const struct request *head, uint32_t nr_fds)
{
	if (head->op != OP_PUT || head->kind == KIND_DIR || head->kind == KIND_LINK)
		return !nr_fds;
	return head->kind == KIND_MAP ? nr_fds >= 1 && nr_fds <= PARTS_MAX : nr_fds == 1;
}

/* What is wrong with a message of ``len`` bytes, or OK; then asked->path and asked->payload are set. */
static enum code check(const struct message *message, size_t len, struct asked *asked)
{
	const struct request *head = &message->head;

	asked->head = head;
	if (len > sizeof(*message))
		return TOO_LONG;
	if (len < sizeof(*head))
		return BAD_MESSAGE;
	if (head->version != VERSION)
		return BAD_VERSION;
	if (head->op < OP_PUT || head->op > OP_QUIT)
		return BAD_OP;
	if (head->op == OP_PUT && (head->kind < KIND_DIR || head->kind > KIND_MAP))
		return BAD_OP;
	if (head->path_len > PATH_LEN_MAX || head->payload_len > PAYLOAD_MAX)
		return TOO_LONG;
	if (len != sizeof(*head) + head->path_len + head->payload_len || head->zero || !mode_is_good(head))
		return BAD_MESSAGE;
	if (head->flags & ~(head->op == OP_QUIT || head->op == OP_REMOVE ? 1 : 0))
		return BAD_MESSAGE;
	asked->path = message->body;
	asked->payload = message->body + head->path_len;
	if (head->op == OP_PUT || head->op == OP_REVOKE || head->op == OP_REMOVE) {
		if (!path_is_good(asked->path, head->path_len))
			return BAD_PATH;
	} else if (head->path_len) {
		return BAD_MESSAGE;
	}
	if (!fds_are_good(head, asked->nr_fds))
		return BAD_FDS;
	if (!payload_is_good(head, asked->payload, asked->nr_fds))
		return BAD_MESSAGE;
	return head->op == OP_PUT && head->kind == KIND_MAP && !parts_are_good(asked) ? BAD_MESSAGE : OK;
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
	enum code code = check(message, len, asked);
	uint8_t op = len >= sizeof(message->head) ? message->head.op : OP_GREETING;
	struct revoked revoked = { 0 };

	if (code)
		return answer(client, op, code, 0, false, NULL, 0);
	switch (op) {
	case OP_PUT:
		code = put(asked);
		break;
	case OP_REVOKE:
		code = revocation(asked, &revoked);
		return answer(client, op, code, 0, false, &revoked, code ? 0 : sizeof(revoked));
	case OP_REMOVE:
		code = removal(asked, &revoked);
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
