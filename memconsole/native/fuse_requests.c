// SPDX-License-Identifier: MIT
/*
 * The kernel's requests. A message on /dev/fuse is one request, and one write is its reply (linux/fuse.h):
 *
 *	request := struct fuse_in_header body	body: the operation's struct, then its names, each ended by NUL
 *	reply   := struct fuse_out_header body	error: 0 or -errno, without a body; FORGET has no reply
 *
 * Nothing a request says is believed: lengths, ids, handles and names are checked before they are used.
 *
 * Locks are the kernel's own (no FUSE_POSIX_LOCKS). ENOSYS to FLUSH, FSYNC, LSEEK, xattrs and ioctls is never asked
 * twice: RAM has nothing to flush, holes are the kernel's guess, the rest we lack.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuse_request.h"

/* Since 7.40 (Linux 6.9); not in older headers */
#define INIT_EXT (1u << 30)
#define PASSTHROUGH_HIGH (1u << 5)	/* FUSE_PASSTHROUGH, bit 37 */
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)
#define MINOR 40
#define MAX_PAGES 256
#define LINE_ROOM 256			/* what map_read needs beyond what it is asked for */

struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};

struct init_out {
	uint32_t major, minor, max_readahead, flags;
	uint16_t max_background, congestion_threshold;
	uint32_t max_write, time_gran;
	uint16_t max_pages, map_alignment;
	uint32_t flags2, max_stack_depth, unused[6];
};

_Static_assert(sizeof(struct init_out) == sizeof(struct fuse_init_out), "one layout in all kernels");
_Static_assert((uint64_t)MAX_PAGES * 4096 == READ_MAX, "the kernel asks for no more than there is room for");

/* One thread's room for a request and its reply. */
struct worker {
	int dev;
	union {
		struct fuse_in_header head;
		uint8_t bytes[REQUEST_MAX];
	} in;
	_Alignas(8) uint8_t out[READ_MAX + LINE_ROOM];
};

/* Sends a reply to a request. Returns 0, or -errno: -ENOENT if whoever asked is gone. */
int reply(int dev, uint64_t unique, int error, const void *body, size_t len)
{
	struct fuse_out_header head = { .len = (uint32_t)(sizeof(head) + len), .error = error, .unique = unique };
	struct iovec parts[] = { { &head, sizeof(head) }, { (void *)body, len } };

	__atomic_add_fetch(&server.requests, 1, __ATOMIC_RELAXED);
	return writev(dev, parts, 2) < 0 ? -errno : 0;
}

static void notify(int code, const void *body, size_t len, const char *name, size_t name_len)
{
	struct fuse_out_header head = { .len = (uint32_t)(sizeof(head) + len + name_len), .error = code };
	struct iovec parts[] = { { &head, sizeof(head) }, { (void *)body, len }, { (void *)name, name_len } };

	/* ENOENT: the kernel does not know it. Any other error: it forgets by itself, after a second */
	if (writev(server.dev, parts, name_len ? 3 : 2) < 0 && errno != ENOENT)
		fprintf(stderr, "memconsole-fuse: notify %d: %s\n", code, strerror(errno));
}

/* Makes the kernel ask for a node's attributes again. Never with tree_lock held: it may wait for a request. */
void invalidate_node(uint64_t id)
{
	struct fuse_notify_inval_inode_out out = { .ino = id, .off = -1 };

	notify(FUSE_NOTIFY_INVAL_INODE, &out, sizeof(out), NULL, 0);
}

/* Makes the kernel look a name up again. Never with tree_lock held: it may wait for a request. */
void invalidate_name(uint64_t parent, const char *name)
{
	struct fuse_notify_inval_entry_out out = { .parent = parent, .namelen = (uint32_t)strlen(name) };

	notify(FUSE_NOTIFY_INVAL_ENTRY, &out, sizeof(out), name, strlen(name) + 1);
}

/* Registers a memfd with the kernel, which holds it from here on. Returns 0 or -errno. */
int backing_open(int fd, int32_t *id)
{
	struct backing_map map = { .fd = fd };
	int got = ioctl(server.dev, BACKING_OPEN, &map);

	if (got < 0)
		return -errno;
	*id = got;
	return 0;
}

/* Lets the kernel forget a registered memfd; files that are open keep it. */
void backing_close(int32_t id)
{
	uint32_t number = (uint32_t)id;

	ioctl(server.dev, BACKING_CLOSE, &number);
}

static int64_t do_init(const struct request *request, uint8_t *out)
{
	const struct fuse_init_in *in = (const void *)request->body;
	struct init_out *init = (void *)out;
	bool extended;

	if (request->len < offsetof(struct fuse_init_in, flags2))
		return -EIO;
	if (in->major != FUSE_KERNEL_VERSION || in->minor < 31)
		return -EPROTO;
	extended = request->len >= sizeof(*in) && in->flags & INIT_EXT;
	*init = (struct init_out){
		.major = FUSE_KERNEL_VERSION, .minor = MINOR, .max_readahead = in->max_readahead,
		.flags = in->flags & (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | INIT_EXT),
		.max_background = 16, .congestion_threshold = 12, .max_write = 4096, .time_gran = 1, .max_pages = MAX_PAGES,
	};
	server.major = in->major;
	server.minor = in->minor;
	server.passthrough = EOPNOTSUPP;
	if (extended && in->flags2 & PASSTHROUGH_HIGH) {
		init->flags2 = PASSTHROUGH_HIGH;
		init->max_stack_depth = 1;
		server.passthrough = 0;
	}
	return sizeof(*init);
}

/* Carries out a request with tree_lock held, a body that is needed no longer in out. */
static int64_t dispatch(const struct request *request, uint8_t *out)
{
	struct node *node;

	switch (request->head->opcode) {	/* those that are about no node, or need none */
	case FUSE_INIT:
		return server.major ? -EIO : do_init(request, out);
	case FUSE_DESTROY:
		return 0;
	case FUSE_FORGET:
		return do_forget(request);
	case FUSE_BATCH_FORGET:
		return do_batch_forget(request);
	case FUSE_INTERRUPT:
		return do_interrupt(request);
	case FUSE_RELEASEDIR:
		return 0;
	}
	node = node_by_id(request->head->nodeid);
	if (!node)
		return -ESTALE;
	switch (request->head->opcode) {
	case FUSE_LOOKUP:
		return do_lookup(request, node, out);
	case FUSE_GETATTR:
		return do_getattr(request, node, out);
	case FUSE_SETATTR:
		return do_setattr(request, node, out);
	case FUSE_READLINK:
		return do_readlink(node, out);
	case FUSE_OPEN:
		return do_open(request, node, out);
	case FUSE_RELEASE:
		return do_release(request, node);
	case FUSE_READ:
		return do_read(request, node, out);
	case FUSE_OPENDIR:
		return do_opendir(request, node, out);
	case FUSE_READDIR:
		return do_readdir(request, node, out);
	case FUSE_STATFS:
		return do_statfs(out);
	case FUSE_WRITE:
		return do_write(request, node, out);
	case FUSE_FALLOCATE:
		return do_fallocate(request, node);
	case FUSE_CREATE:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_SYMLINK:
	case FUSE_LINK:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
		return -EPERM;
	}
	return -ENOSYS;
}

struct worker *worker_new(int dev)
{
	struct worker *worker = malloc(sizeof(*worker));

	if (worker)
		worker->dev = dev;
	return worker;
}

void worker_free(struct worker *worker)
{
	free(worker);
}

/* Waits for one request and answers it. Returns 0, or -errno when there are no more (ENODEV: unmounted). */
int worker_serve(struct worker *worker)
{
	struct request request = { .head = &worker->in.head };
	const struct fuse_in_header *head = request.head;
	ssize_t len = read(worker->dev, worker->in.bytes, sizeof(worker->in.bytes));
	int64_t done;
	int error;

	if (len < 0)	/* ENOENT: the request was taken back */
		return errno == EINTR || errno == ENOENT || errno == EAGAIN ? 0 : -errno;
	if (!len)
		return -ENODEV;
	if ((size_t)len < sizeof(*head) || head->len != (size_t)len)
		return 0;	/* there is no one to answer */
	request.body = worker->in.bytes + sizeof(*head);
	request.len = (size_t)len - sizeof(*head);
	pthread_mutex_lock(&tree_lock);
	done = dispatch(&request, worker->out);
	pthread_mutex_unlock(&tree_lock);
	if (done == NO_REPLY)
		return 0;
	error = reply(worker->dev, head->unique, done < 0 ? (int)done : 0, worker->out, done < 0 ? 0 : (size_t)done);
	if (done < 0)
		return 0;
	if (head->opcode == FUSE_LOOKUP && error)
		lookup_unsent(((const struct fuse_entry_out *)worker->out)->nodeid);
	else if (head->opcode == FUSE_OPEN && error)
		open_unsent(head->nodeid, ((const struct open_out *)worker->out)->fh);
	return 0;
}
