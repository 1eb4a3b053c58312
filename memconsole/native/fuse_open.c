// SPDX-License-Identifier: MIT
/*
 * The kernel's requests about open files.
 *
 * RAM files are passed through: OPEN names the memfd by its backing id, and reads, writes and mmaps never come here.
 * Of a file without seals (of an arena) only mmaps are: a write behind its end would have it grow, so reads and writes
 * come here, which end where it ends.
 * The kernel checks owners and modes (default_permissions); whether a file is revoked, or opened for more than its mode
 * ever allows, is checked here, as root passes the kernel's check.
 *
 * A map is scanned when it is opened, and when its size is asked for, by a thread of its own: so that a large guest's map
 * keeps nobody else waiting. Its size is told for SIZE_NS without another scan, and for longer where a scan takes long:
 * asking for sizes all the time keeps the thread at work for a tenth of it at most.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fuse_request.h"

#define SIZE_NS 1000000000ull
#define SIZE_SCANS 10		/* times as long as the scan took */
#define SIZES_MAX 256		/* requests for the size of one node that may wait */
#define OPEN_PASSTHROUGH (1u << 7)	/* since 7.40 (Linux 6.9); not in older headers */

_Static_assert(sizeof(struct open_out) == sizeof(struct fuse_open_out), "one layout in all kernels");

/* A map file that is being opened, or (sized) asked for its size. */
struct opening {
	struct opening *next;
	uint64_t unique, node;
	uint32_t uid;
	bool sized;
	struct content *content;
};

static struct opening *openings;	/* under tree_lock */
static pthread_cond_t opening_came = PTHREAD_COND_INITIALIZER;
static bool scanner_ends;

static uint64_t monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Puts a request for a node's map at the end of the queue; for how many of its kind the node may have, or error. */
static int64_t queue(const struct fuse_in_header *head, const struct node *node, bool sized, uint32_t most, int error)
{
	struct opening *opening, **last = &openings;
	uint32_t waiting = sized ? 0 : node->handles;

	for (; *last; last = &(*last)->next)
		waiting += (*last)->node == node->id && (*last)->sized == sized;
	if (waiting >= most)
		return error;
	opening = malloc(sizeof(*opening));
	if (!opening)
		return -ENOMEM;
	*opening = (struct opening){
		.unique = head->unique, .node = node->id, .uid = head->uid, .sized = sized,
		.content = content_get(node->content),
	};
	*last = opening;
	pthread_cond_signal(&opening_came);
	return NO_REPLY;
}

/* Root may have a node's scans opened when its user has as many as may be. */
static int64_t queue_opening(const struct fuse_in_header *head, const struct node *node)
{
	return queue(head, node, false, head->uid ? MAPS_MAX : 2 * MAPS_MAX, -EMFILE);
}

/* Answers a GETATTR of a map once it was scanned. */
int64_t queue_size(const struct fuse_in_header *head, const struct node *node)
{
	return queue(head, node, true, SIZES_MAX, -EAGAIN);
}

int64_t do_open(const struct request *request, struct node *node, uint8_t *out)
{
	const struct fuse_open_in *in = (const void *)request->body;
	struct open_out *open = (void *)out;
	int64_t fh;

	if (request->len < sizeof(*in))
		return -EINVAL;
	if (node->kind == KIND_DIR || node->kind == KIND_LINK)
		return node->kind == KIND_DIR ? -EISDIR : -ELOOP;
	if (node->revoked)
		return -EACCES;
	if ((in->flags & O_ACCMODE) != O_RDONLY && (node->kind != KIND_RAM || !(node->mode & 0222)))
		return -EACCES;
	*open = (struct open_out){ 0 };
	if (node->kind == KIND_RAM) {
		if (!node->backing)
			return -EACCES;		/* taken out of the tree */
		open->open_flags = OPEN_PASSTHROUGH | (node->sealless ? FOPEN_DIRECT_IO : 0);
		open->backing_id = node->backing;
		tree.nr_handles++;
		node->handles++;	/* until RELEASE: whoever has it open, wherever the descriptor went */
		return sizeof(*open);
	}
	if (!node->content)
		return -ESTALE;
	if (node->kind == KIND_MAP)
		return queue_opening(request->head, node);
	fh = handle_open(node, node->content, NULL, request->head->uid);
	if (fh < 0)
		return fh;
	content_get(node->content);
	open->fh = (uint64_t)fh;
	open->open_flags = FOPEN_DIRECT_IO;
	return sizeof(*open);
}

/* Ends what an OPEN of a node began. */
static void close_file(struct node *node, uint64_t fh)
{
	struct handle *handle = handle_at(fh);

	if (node->kind == KIND_RAM)
		node_release(node);
	else if (handle && handle->node == node)
		handle_close(fh);
}

int64_t do_release(const struct request *request, struct node *node)
{
	const struct fuse_release_in *in = (const void *)request->body;

	if (request->len < sizeof(*in))
		return -EINVAL;
	close_file(node, in->fh);
	return 0;
}

/* How many of so many bytes from an offset on lie within a file of this size. */
static size_t within(const struct node *node, uint64_t offset, uint32_t size)
{
	if (offset >= node->size)
		return 0;
	return size < node->size - offset ? size : (size_t)(node->size - offset);
}

/* Reads or writes a RAM file without seals, without the lock. Returns how many bytes, or -errno. */
static int64_t transfer(struct node *node, uint64_t offset, void *to, const void *from, size_t size)
{
	int fd;
	int64_t got;

	if (node->revoked || node->fd < 0)
		return -EIO;
	fd = fcntl(node->fd, F_DUPFD_CLOEXEC, 3);
	if (fd < 0)
		return -errno;
	pthread_mutex_unlock(&tree_lock);
	got = to ? pread(fd, to, size, (off_t)offset) : pwrite(fd, from, size, (off_t)offset);
	got = got < 0 ? -errno : got;
	close(fd);
	pthread_mutex_lock(&tree_lock);
	return got;
}

/* Writes to a RAM file without seals; it stays as large as it is. */
int64_t do_write(const struct request *request, struct node *node, uint8_t *out)
{
	const struct fuse_write_in *in = (const void *)request->body;
	struct fuse_write_out *done = (void *)out;
	int64_t put;
	size_t size;

	if (request->len < sizeof(*in) || in->size > request->len - sizeof(*in))
		return -EINVAL;
	if (node->kind != KIND_RAM || !node->sealless || !(node->mode & 0222))
		return -EPERM;
	size = within(node, in->offset, in->size);
	if (!size && in->size)
		return -EFBIG;
	put = transfer(node, in->offset, NULL, request->body + sizeof(*in), size);
	if (put < 0)
		return put;
	*done = (struct fuse_write_out){ .size = (uint32_t)put };
	return sizeof(*done);
}

/* Reads what a handle shows, without the lock. */
int64_t do_read(const struct request *request, struct node *node, uint8_t *out)
{
	const struct fuse_read_in *in = (const void *)request->body;
	struct handle *handle;
	struct content *content;
	struct map *map;
	int64_t got;
	size_t size;

	if (request->len < sizeof(*in) || in->offset > INT64_MAX)
		return -EINVAL;
	if (node->kind == KIND_RAM && node->sealless)
		return transfer(node, in->offset, out, NULL,
				within(node, in->offset, in->size < READ_MAX ? in->size : READ_MAX));
	handle = handle_at(in->fh);
	if (!handle || handle->node != node)
		return -EBADF;
	if (node->revoked)
		return -EIO;
	size = in->size < READ_MAX ? in->size : READ_MAX;
	content = handle->content ? content_get(handle->content) : NULL;
	map = handle->map ? map_get(handle->map) : NULL;
	pthread_mutex_unlock(&tree_lock);
	if (map) {
		got = (int64_t)map_read(map, in->offset, size, (char *)out);
		map_put(map);
	} else {
		got = pread(content->of[0].fd, out, size, (off_t)in->offset);
		got = got < 0 ? -errno : got;
		content_put(content);
	}
	pthread_mutex_lock(&tree_lock);
	return got;
}

/*
 * Gives parts of a RAM file back (virtio-mem and balloons punch holes) or puts them in place; its size stays. What the
 * memfd itself refuses is refused. The kernel has seen to it that the file is open for writing.
 */
int64_t do_fallocate(const struct request *request, struct node *node)
{
	const struct fuse_fallocate_in *in = (const void *)request->body;
	int fd, error;

	if (request->len < sizeof(*in))
		return -EINVAL;
	if (node->kind != KIND_RAM || !(node->mode & 0222))
		return -EPERM;
	if (node->revoked || node->fd < 0)
		return -EIO;
	if (in->mode & ~(uint32_t)(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE))
		return -EOPNOTSUPP;
	if (in->offset > node->size || in->length > node->size - in->offset)
		return -ENOSPC;		/* a grant does not grow */
	fd = fcntl(node->fd, F_DUPFD_CLOEXEC, 3);
	if (fd < 0)
		return -errno;
	pthread_mutex_unlock(&tree_lock);
	error = fallocate(fd, (int)in->mode, (off_t)in->offset, (off_t)in->length) ? -errno : 0;
	close(fd);
	pthread_mutex_lock(&tree_lock);
	return error;
}

/* Who waits for a scan that has not begun may be let go; everything else is answered at once. */
int64_t do_interrupt(const struct request *request)
{
	const struct fuse_interrupt_in *in = (const void *)request->body;

	if (request->len < sizeof(*in))
		return NO_REPLY;
	for (struct opening **at = &openings; *at; at = &(*at)->next) {
		struct opening *opening = *at;

		if (opening->unique != in->unique)
			continue;
		*at = opening->next;
		reply(server.dev, opening->unique, -EINTR, NULL, 0);
		content_put(opening->content);
		free(opening);
		break;
	}
	return NO_REPLY;
}

/* The reply to an OPEN did not reach anybody. */
void open_unsent(uint64_t id, uint64_t fh)
{
	struct node *node;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(id);
	if (node)
		close_file(node, fh);
	pthread_mutex_unlock(&tree_lock);
}

/* Notes what a scan of a node's content has found; one that failed leaves the size as it was. */
static void note_size(const struct opening *opening, const struct map *map, uint64_t until_ns)
{
	struct node *node;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(opening->node);
	if (node && node->content == opening->content) {
		node->size_until_ns = until_ns;
		if (map) {
			node->size = map_bytes(map);
			node_touch(node);
		}
	}
	pthread_mutex_unlock(&tree_lock);
}

/* Ends one request for a size. */
static void sizing_end(struct opening *opening)
{
	uint8_t out[sizeof(struct fuse_attr_out)] __attribute__((aligned(8)));
	struct node *node;
	int64_t len;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(opening->node);
	len = node ? attr_reply(node, node->size, out) : -ESTALE;
	pthread_mutex_unlock(&tree_lock);
	reply(server.dev, opening->unique, len < 0 ? (int)len : 0, out, len < 0 ? 0 : (size_t)len);
	content_put(opening->content);
	free(opening);
}

/* Ends one opening with the map of its content, or with what went wrong. */
static void opening_end(struct opening *opening, struct map *map, int error)
{
	struct open_out open = { .open_flags = FOPEN_DIRECT_IO };
	struct node *node;
	int64_t fh = error;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(opening->node);
	if (!error)
		fh = !node ? -ESTALE : node->revoked ? -EACCES : handle_open(node, NULL, map, opening->uid);
	if (fh > 0)
		map_get(map);
	pthread_mutex_unlock(&tree_lock);
	open.fh = (uint64_t)fh;
	if (fh < 0)
		reply(server.dev, opening->unique, (int)fh, NULL, 0);
	else if (reply(server.dev, opening->unique, 0, &open, sizeof(open)))
		open_unsent(opening->node, open.fh);
	content_put(opening->content);
	free(opening);
}

/* Takes the oldest opening, and all others of the same content: one scan that begins now is true for all of them. */
static struct opening *take_openings(void)
{
	struct opening *taken = openings, **last = &taken->next, **at;

	openings = taken->next;
	*last = NULL;
	for (at = &openings; *at;) {
		struct opening *opening = *at;

		if (opening->content != taken->content) {
			at = &opening->next;
			continue;
		}
		*at = opening->next;
		opening->next = NULL;
		*last = opening;
		last = &opening->next;
	}
	return taken;
}

/* The thread that scans. Ends after scanner_stop. */
void scanner_run(void)
{
	for (;;) {
		struct opening *taken, *next;
		struct map *map = NULL;
		uint64_t begun, took;
		int error;

		pthread_mutex_lock(&tree_lock);
		while (!openings && !scanner_ends)
			pthread_cond_wait(&opening_came, &tree_lock);
		taken = openings ? take_openings() : NULL;
		pthread_mutex_unlock(&tree_lock);
		if (!taken)
			return;
		begun = monotonic_ns();
		error = map_scan(&map, taken->content);
		took = monotonic_ns() - begun;
		note_size(taken, map, begun + took + (SIZE_SCANS * took > SIZE_NS ? SIZE_SCANS * took : SIZE_NS));
		for (; taken; taken = next) {
			next = taken->next;
			if (taken->sized)
				sizing_end(taken);
			else
				opening_end(taken, map, error);
		}
		if (map)
			map_put(map);
	}
}

void scanner_stop(void)
{
	pthread_mutex_lock(&tree_lock);
	scanner_ends = true;
	pthread_cond_signal(&opening_came);
	pthread_mutex_unlock(&tree_lock);
}
