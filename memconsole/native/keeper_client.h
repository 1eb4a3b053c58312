/*
 * The keeper from the other side: one connection, one request at a time.
 */
#ifndef MEMCONSOLE_KEEPER_CLIENT_H
#define MEMCONSOLE_KEEPER_CLIENT_H

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "keeper.h"

/* What a GET brings: an fd, close-on-exec, and as much of the payload as there is room for. */
struct kept {
	int fd;
	void *space;
	size_t room, length;
};

/* One exchange; ``fd``: what is put, or -1; ``kept``: what comes back, its fd -1 if none does. See keeper_request(). */
static inline int keeper_exchange(int sock, enum op op, const char *name, const void *payload, size_t length, int fd,
			   struct kept *kept)
{
	struct request head = {
		.version = KEEPER_VERSION, .op = (uint8_t)op, .name_len = (uint8_t)strlen(name),
		.payload_len = (uint16_t)length,
	};
	struct iovec out[] = { { &head, sizeof(head) }, { (void *)name, strlen(name) }, { (void *)payload, length } };
	struct {
		struct reply head;
		char payload[KEEPER_PAYLOAD_MAX];
	} reply;
	struct iovec in = { &reply, sizeof(reply) };
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	struct msghdr message = { .msg_iov = out, .msg_iovlen = 3 };
	struct cmsghdr *cmsg;
	uint32_t refused;
	ssize_t got;

	kept->fd = -1;
	if (fd >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control.space);
		cmsg = CMSG_FIRSTHDR(&message);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	}
	if (sendmsg(sock, &message, MSG_NOSIGNAL) < 0)
		return -errno;
	message = (struct msghdr){ .msg_iov = &in, .msg_iovlen = 1, .msg_control = &control,
				   .msg_controllen = sizeof(control.space) };
	got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
	if (got < 0)
		return -errno;
	cmsg = CMSG_FIRSTHDR(&message);
	if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS)
		memcpy(&kept->fd, CMSG_DATA(cmsg), sizeof(kept->fd));
	kept->length = got > (ssize_t)sizeof(reply.head) ? (size_t)got - sizeof(reply.head) : 0;
	if (got < (ssize_t)sizeof(reply.head) || reply.head.version != KEEPER_VERSION || reply.head.op != op ||
	    reply.head.payload_len != kept->length || (op == OP_GET && reply.head.code == OK) != (kept->fd >= 0)) {
		if (kept->fd >= 0)
			close(kept->fd);
		kept->fd = -1;
		return -EPROTO;
	}
	if (reply.head.code == NOT_LANDED && kept->length == sizeof(refused)) {
		memcpy(&refused, reply.payload, sizeof(refused));
		return -(int)refused;
	}
	if (kept->room)
		memcpy(kept->space, reply.payload, kept->length < kept->room ? kept->length : kept->room);
	return reply.head.code;
}

/**
 * keeper_request() - ask the keeper for something
 * @sock: a connection that was greeted; -1: none, which is an error like any other
 * @op: PUT, GET, DROP, LAND or QUIT
 * @fd: in: to be put, or -1; out: what GET found, close-on-exec, or -1
 *
 * Return: an enum code; -errno if there was no answer that makes sense, or why the kernel gave no session.
 */
static inline int keeper_request(int sock, enum op op, const char *name, const void *payload, size_t length, int *fd)
{
	struct kept kept = { .room = 0 };
	int code = keeper_exchange(sock, op, name, payload, length, *fd, &kept);

	*fd = kept.fd;
	return code;
}

/* Get an fd and its payload. Returns an enum code, or -errno. */
static inline int keeper_get(int sock, const char *name, struct kept *kept)
{
	return keeper_exchange(sock, OP_GET, name, NULL, 0, -1, kept);
}

/**
 * keeper_connect() - reach the keeper on a socket
 *
 * Return: a connection, close-on-exec, or -errno; -EACCES if the keeper denies this process, -EBUSY if it is full.
 */
static inline int keeper_connect(const char *path)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	struct {
		struct reply head;
		struct status status;
	} greeting;
	int sock, err = 0;

	if (strlen(path) >= sizeof(to.sun_path))
		return -ENAMETOOLONG;
	strcpy(to.sun_path, path);
	sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return -errno;
	if (connect(sock, (struct sockaddr *)&to, sizeof(to)) < 0)
		err = -errno;
	else if (recv(sock, &greeting, sizeof(greeting), 0) < (ssize_t)sizeof(greeting.head))
		err = -ECONNRESET;
	else if (greeting.head.version != KEEPER_VERSION || greeting.head.op != OP_GREETING)
		err = -EPROTO;
	else if (greeting.head.code != OK)
		err = greeting.head.code == DENIED ? -EACCES : -EBUSY;
	if (err) {
		close(sock);
		return err;
	}
	return sock;
}

#endif
