/* SPDX-License-Identifier: MIT */
/*
 * A request of the kernel's, between the thread that took it (fuse_requests.c) and what it is about: names and attributes
 * (fuse_names.c), or open files (fuse_open.c). All do_ functions are called with tree_lock held; they return the length
 * of a reply's body, which they wrote to `out`, or -errno, or NO_REPLY.
 */
#ifndef MC_FUSE_REQUEST_H
#define MC_FUSE_REQUEST_H

#include "fuse.h"

#define NO_REPLY INT64_MAX	/* not by us and now */

struct request {
	const struct fuse_in_header *head;
	const uint8_t *body;
	size_t len;		/* of the body */
};

/* struct fuse_open_out as it is since 7.40 */
struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

/* fuse_requests.c */
int reply(int dev, uint64_t unique, int error, const void *body, size_t len);

/* fuse_names.c */
int64_t attr_reply(const struct node *node, uint64_t size, uint8_t *out);
int64_t do_lookup(const struct request *request, struct node *parent, uint8_t *out);
int64_t do_getattr(const struct request *request, struct node *node, uint8_t *out);
int64_t do_setattr(const struct request *request, struct node *node, uint8_t *out);
int64_t do_readlink(struct node *node, uint8_t *out);
int64_t do_opendir(const struct request *request, struct node *node, uint8_t *out);
int64_t do_readdir(const struct request *request, struct node *dir, uint8_t *out);
int64_t do_statfs(uint8_t *out);
int64_t do_forget(const struct request *request);
int64_t do_batch_forget(const struct request *request);
void lookup_unsent(uint64_t id);

/* fuse_open.c */
int64_t queue_size(const struct fuse_in_header *head, const struct node *node);
int64_t do_open(const struct request *request, struct node *node, uint8_t *out);
int64_t do_write(const struct request *request, struct node *node, uint8_t *out);
int64_t do_fallocate(const struct request *request, struct node *node);
int64_t do_release(const struct request *request, struct node *node);
int64_t do_read(const struct request *request, struct node *node, uint8_t *out);
int64_t do_interrupt(const struct request *request);
void open_unsent(uint64_t id, uint64_t fh);

#endif
