// SPDX-License-Identifier: MIT
/* What both sides of fuse_driver share: its dice, and what the control process's side does. */
#ifndef FUSE_DRIVER_H
#define FUSE_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Ends the driver unless it holds. */
void require(bool holds, const char *what);

/* A number below sides, the next of the seed's. */
uint64_t dice(uint64_t sides);

/* The connection to the control process: the driver's end, and the server's. */
extern int control[2];

/* Puts entries of every kind into the tree; those that are there are put once more. */
void grow(void);

/* Revokes the entry of a path, or removes it. */
void shrink(const char *path, bool remove);

/* Flips bits of a message, cuts it short or goes on behind it, within room. */
void spoil(uint8_t *bytes, size_t *len, size_t room);

/* Sends so many spoiled messages of the control process. */
void fuzz_control(uint64_t rounds);

#endif
