// SPDX-License-Identifier: MIT
/* The control process's side of fuse_driver: entries that come and go, and messages that are spoiled. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuse.h"
#include "fuse_driver.h"

struct put {
	uint8_t version, op, kind, flags;
	uint16_t path_len, payload_len;
	uint32_t mode, uid, gid, zero;
	char body[PATH_LEN_MAX + 8192];
};

int control[2];

/* Sends one message with nr descriptors of a fresh memfd, serves it, and returns the reply's code. */
static int ask(const void *message, size_t len, uint32_t nr)
{
	union {
		char space[CMSG_SPACE(256 * sizeof(int))];
		struct cmsghdr align;
	} room = { 0 };
	struct iovec part = { (void *)message, len };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };
	int fds[256], served;
	uint8_t reply[8192];
	ssize_t got;

	for (uint32_t i = 0; i < nr; i++) {
		fds[i] = memfd_create("driver", MFD_CLOEXEC);
		require(fds[i] >= 0 && !ftruncate(fds[i], 1 << 16) && pwrite(fds[i], "text", 4, 8192) == 4, "memfd");
	}
	if (nr) {
		header.msg_control = &room;
		header.msg_controllen = CMSG_SPACE(nr * sizeof(int));
		CMSG_FIRSTHDR(&header)->cmsg_level = SOL_SOCKET;
		CMSG_FIRSTHDR(&header)->cmsg_type = SCM_RIGHTS;
		CMSG_FIRSTHDR(&header)->cmsg_len = CMSG_LEN(nr * sizeof(int));
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&header)), fds, nr * sizeof(int));
	}
	require(sendmsg(control[0], &header, 0) == (ssize_t)len, "sendmsg");
	for (uint32_t i = 0; i < nr; i++)
		close(fds[i]);
	served = control_serve(control[1]);
	if (!len && !nr)
		return served;	/* an end, in the eyes of the server */
	require(!served, "the control request was not answered");
	got = recv(control[0], reply, sizeof(reply), MSG_DONTWAIT);
	require(got >= 8 && reply[0] == 1, "the reply to the control request is none");
	return reply[2];
}

static size_t make_put(struct put *put, uint8_t kind, const char *path, const void *payload, size_t payload_len)
{
	*put = (struct put){
		.version = 1, .op = 1, .kind = kind, .path_len = (uint16_t)strlen(path),
		.payload_len = (uint16_t)payload_len, .mode = 0600,
	};
	memcpy(put->body, path, strlen(path));
	if (payload_len)
		memcpy(put->body + strlen(path), payload, payload_len);
	return offsetof(struct put, body) + put->path_len + put->payload_len;
}

void grow(void)
{
	struct part part = { 0, 1 << 16, 1 << 20 };
	struct put put;
	struct node *ram;

	ask(&put, make_put(&put, KIND_DIR, "guests", NULL, 0), 0);
	ask(&put, make_put(&put, KIND_DIR, "guests/web", NULL, 0), 0);
	ask(&put, make_put(&put, KIND_LINK, "guests/web/bar", "/sys/devices", 12), 0);
	ask(&put, make_put(&put, KIND_TEXT, "guests/web/status", NULL, 0), 1);
	ask(&put, make_put(&put, KIND_MAP, "guests/web/pfnmap", &part, sizeof(part)), 1);
	/* the kernel would not take a memfd from a socket: this file has a number it never gave */
	pthread_mutex_lock(&tree_lock);
	if (!node_find("guests/web/ram", 14)) {
		ram = node_add(node_find("guests/web", 10), "ram", 3, KIND_RAM);
		ram->mode = 0600;
		ram->size = 1 << 16;
		ram->backing = 7;
		tree.ram_bytes += ram->size;
	}
	pthread_mutex_unlock(&tree_lock);
}

void shrink(const char *path, bool remove)
{
	struct put put;
	size_t len = make_put(&put, 0, path, NULL, 0);

	put.op = remove ? 3 : 2;
	put.flags = remove;
	put.mode = 0;
	ask(&put, len, 0);
}

void spoil(uint8_t *bytes, size_t *len, size_t room)
{
	for (uint64_t n = dice(4); n--;) {
		if (*len)
			bytes[dice(*len)] ^= (uint8_t)(1 << dice(8));
	}
	if (!dice(6))
		*len = dice(*len + 1);
	if (!dice(12) && *len + 64 < room) {
		for (int i = 0; i < 64; i++)
			bytes[*len + i] = (uint8_t)dice(256);
		*len += dice(64);
	}
}

void fuzz_control(uint64_t rounds)
{
	static const char *const paths[] = {
		"guests", "guests/web", "a/b/c", "..", "guests/../x", "", "/", "x//y", "guests/web/status", "guests/web/new",
	};
	struct part parts[3] = { { 0, 4096, NO_GPA }, { 4096, 1ULL << 61, 0 }, { 0, 1 << 16, 4096 } };
	struct put put;

	for (uint64_t i = 0; i < rounds; i++) {
		uint8_t kind = (uint8_t)dice(7);
		uint32_t nr = dice(8) ? kind == KIND_MAP ? 3 : kind == KIND_RAM || kind == KIND_TEXT : (uint32_t)dice(253);
		size_t len = make_put(&put, kind, paths[dice(10)], parts,
				      kind == KIND_LINK ? 8 : kind == KIND_MAP ? sizeof(parts) : 0);

		put.op = dice(3) ? 1 : (uint8_t)dice(6);	/* not QUIT */
		if (put.op != 1)
			put.mode = put.kind = 0;
		spoil((uint8_t *)&put, &len, sizeof(put));
		if (put.op == 6)
			put.op = 5;
		ask(&put, len, nr);
	}
}
