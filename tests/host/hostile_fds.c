// SPDX-License-Identifier: MIT
/* Descriptors that the hostile guest sends from one process to another. */
#define _GNU_SOURCE
#include "hostile_fds.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

void die(const char *what)
{
	perror(what);
	exit(1);
}

void give(int to, int what)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 }, byte = 'f';
	struct iovec iov = { &byte, 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &what, sizeof(int));
	if (sendmsg(to, &m, 0) < 0)
		die("sendmsg");
}

int take(int from, void *bytes, size_t size, ssize_t *got)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { bytes, size };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	int found = -1;

	*got = recvmsg(from, &m, 0);
	c = *got > 0 ? CMSG_FIRSTHDR(&m) : NULL;
	if (c && c->cmsg_type == SCM_RIGHTS)
		memcpy(&found, CMSG_DATA(c), sizeof(int));
	return found;
}
