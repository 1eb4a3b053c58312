// SPDX-License-Identifier: MIT
/* Descriptors that the hostile guest sends from one process to another. */
#ifndef HOSTILE_FDS_H
#define HOSTILE_FDS_H

#include <stddef.h>
#include <sys/types.h>

/* Says what failed and why, and ends. */
void die(const char *what);

/* Sends a descriptor over a socket; ends where that fails. */
void give(int to, int what);

/* Receives a message of at most size bytes: the descriptor that came with it, or -1; got is what recvmsg(2) returns. */
int take(int from, void *bytes, size_t size, ssize_t *got);

#endif
