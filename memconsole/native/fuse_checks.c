// SPDX-License-Identifier: MIT
/* What is wrong with a message of the control process, by its grammar (fuse_control.h): nothing is looked at but it. */
#include <string.h>

#include "fuse_control.h"

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
enum code control_check(const struct message *message, size_t len, struct asked *asked)
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
