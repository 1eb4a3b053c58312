// SPDX-License-Identifier: MIT
/*
 * The kernel's requests about names and attributes. The kernel counts the lookups it was answered, and forgets them:
 * until then a node keeps its id, in the tree or not.
 *
 * The size of what is shown stays, and what could change it is refused with EPERM. What is generated (TEXT, MAP) may be
 * another the next moment: its attributes are believed for no time at all, everything else for VALID_S. A MAP is scanned
 * for its size, unless it was a moment ago: archivers store as many bytes as a file has by its attributes.
 *
 * RAM has the blocks its memfd has, and was changed now: what maps a memfd writes to it unseen, so any earlier time
 * could be a lie, by which a backup would leave out what changed.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "fuse_request.h"

#define VALID_S 1			/* how long the kernel may believe names and attributes */

static uint32_t file_type(const struct node *node)
{
	return node->kind == KIND_DIR ? S_IFDIR : node->kind == KIND_LINK ? S_IFLNK : S_IFREG;
}

static uint64_t valid_seconds(const struct node *node)
{
	return node->kind == KIND_TEXT || node->kind == KIND_MAP ? 0 : VALID_S;
}

/* When a node was changed last, as far as that can be known; ns since the epoch. */
static uint64_t changed_ns(const struct node *node)
{
	struct timespec now;

	if (node->kind != KIND_RAM || node->fd < 0)
		return node->changed_ns;
	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Blocks of 512 bytes that a node of ``size`` bytes has. */
static uint64_t blocks_of(const struct node *node, uint64_t size)
{
	struct stat st;

	if (node->kind == KIND_RAM && node->fd >= 0 && !fstat(node->fd, &st))
		return (uint64_t)st.st_blocks;
	return (size + 511) / 512;
}

static void fill_attr(struct fuse_attr *attr, const struct node *node, uint64_t size)
{
	uint64_t changed = changed_ns(node), seconds = changed / 1000000000;
	uint32_t ns = (uint32_t)(changed % 1000000000);

	*attr = (struct fuse_attr){
		.ino = node->id, .size = size, .blocks = blocks_of(node, size), .blksize = 4096,
		.mode = file_type(node) | (node->revoked ? 0 : node->mode), .uid = node->uid, .gid = node->gid,
		.nlink = node->kind == KIND_DIR ? 2 : 1,
		.atime = seconds, .mtime = seconds, .ctime = seconds,
		.atimensec = ns, .mtimensec = ns, .ctimensec = ns,
	};
}

/* The name at the start of a body of len bytes, its length in *len; NULL if it does not end, is empty or too long. */
static const char *name_of(const struct request *request, size_t *len)
{
	const char *name = (const char *)request->body;

	*len = strnlen(name, request->len);
	return *len && *len < request->len && *len <= NAME_LEN_MAX ? name : NULL;
}

/* A lookup counts, unless its reply cannot be sent. */
int64_t do_lookup(const struct request *request, struct node *parent, uint8_t *out)
{
	struct fuse_entry_out *entry = (void *)out;
	struct node *node;
	size_t len;
	const char *name = name_of(request, &len);

	if (!name)
		return -EINVAL;
	if (parent->kind != KIND_DIR)
		return -ENOTDIR;
	node = node_child(parent, name, len);
	if (!node)
		return -ENOENT;
	*entry = (struct fuse_entry_out){
		.nodeid = node->id, .generation = node->generation, .entry_valid = VALID_S,
		.attr_valid = valid_seconds(node),
	};
	fill_attr(&entry->attr, node, node->size);
	node->lookups++;
	node->shown = true;
	return sizeof(*entry);
}

void lookup_unsent(uint64_t id)
{
	struct node *node;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(id);
	if (node)
		node_forget(node, 1);
	pthread_mutex_unlock(&tree_lock);
}

int64_t attr_reply(const struct node *node, uint64_t size, uint8_t *out)
{
	struct fuse_attr_out *attr = (void *)out;

	*attr = (struct fuse_attr_out){ .attr_valid = valid_seconds(node) };
	fill_attr(&attr->attr, node, size);
	return sizeof(*attr);
}

static bool is_size_known(const struct node *node)
{
	struct timespec now;

	if (node->kind != KIND_MAP || !node->content || node->revoked)
		return true;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec < node->size_until_ns;
}

/*
 * With a handle, the size of what this handle shows: how a reader finds the end of what he opened. fstat(2) comes without
 * one, and is told of the last opening.
 */
int64_t do_getattr(const struct request *request, struct node *node, uint8_t *out)
{
	const struct fuse_getattr_in *in = (const void *)request->body;
	struct handle *handle = NULL;
	uint64_t size = node->size;

	if (request->len < sizeof(*in))
		return -EINVAL;
	if (in->getattr_flags & FUSE_GETATTR_FH)
		handle = handle_at(in->fh);
	if (handle && handle->node == node && handle->map)
		size = map_bytes(handle->map);
	else if (!is_size_known(node))
		return queue_size(request->head, node);
	return attr_reply(node, size, out);
}

/* Times may be set, as databases do, and are not kept; owner, mode and size are the control process's to say. */
int64_t do_setattr(const struct request *request, struct node *node, uint8_t *out)
{
	const struct fuse_setattr_in *in = (const void *)request->body;

	if (request->len < sizeof(*in))
		return -EINVAL;
	if (in->valid & (FATTR_MODE | FATTR_UID | FATTR_GID))
		return -EPERM;
	if (in->valid & FATTR_SIZE && (node->kind != KIND_RAM || node->revoked || in->size != node->size))
		return -EPERM;
	return attr_reply(node, node->size, out);
}

int64_t do_readlink(struct node *node, uint8_t *out)
{
	if (node->kind != KIND_LINK)
		return -EINVAL;
	memcpy(out, node->target, node->size);
	return (int64_t)node->size;
}

int64_t do_opendir(const struct request *request, struct node *node, uint8_t *out)
{
	if (request->len < sizeof(struct fuse_open_in))
		return -EINVAL;
	if (node->kind != KIND_DIR)
		return -ENOTDIR;
	memset(out, 0, sizeof(struct open_out));
	return sizeof(struct open_out);
}

/* Appends an entry to a directory's page of size bytes. Returns whether it fitted. */
static bool put_entry(uint8_t *out, size_t size, size_t *used, uint64_t ino, uint64_t next, uint32_t mode,
		      const char *name)
{
	size_t name_len = strlen(name), need = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + name_len);
	struct fuse_dirent entry = { .ino = ino, .off = next, .namelen = (uint32_t)name_len, .type = mode >> 12 };

	if (need > size - *used)
		return false;
	memset(out + *used, 0, need);
	memcpy(out + *used, &entry, FUSE_NAME_OFFSET);
	memcpy(out + *used + FUSE_NAME_OFFSET, name, name_len);
	*used += need;
	return true;
}

/* An entry's offset is its id + 2, behind those of "." and "..": entries come and go without moving the others. */
int64_t do_readdir(const struct request *request, struct node *dir, uint8_t *out)
{
	const struct fuse_read_in *in = (const void *)request->body;
	size_t used = 0, size;
	uint64_t up;

	if (request->len < sizeof(*in))
		return -EINVAL;
	if (dir->kind != KIND_DIR)
		return -ENOTDIR;
	size = in->size < READ_MAX ? in->size : READ_MAX;
	up = dir->parent ? dir->parent->id : ROOT;
	if (in->offset < 1 && !put_entry(out, size, &used, dir->id, 1, S_IFDIR, "."))
		return (int64_t)used;
	if (in->offset < 2 && !put_entry(out, size, &used, up, 2, S_IFDIR, ".."))
		return (int64_t)used;
	for (struct node *node = tree.oldest; node; node = node->newer)
		if (node->parent == dir && node->id + 2 > in->offset &&
		    !put_entry(out, size, &used, node->id, node->id + 2, file_type(node), node->name))
			break;
	return (int64_t)used;
}

struct shown_memory {
	uint64_t dev, ino, size;
	int fd;
};

static int by_memfd(const void *a, const void *b)
{
	const struct shown_memory *x = a, *y = b;

	if (x->dev != y->dev)
		return x->dev < y->dev ? -1 : 1;
	return x->ino < y->ino ? -1 : x->ino > y->ino;
}

/* Bytes of what the files show, and of that with frames; memory that several files show counts once. */
static void count_memory(uint64_t *total, uint64_t *resident)
{
	struct shown_memory *shown = calloc(tree.nr_linked + 1, sizeof(*shown));
	size_t nr = 0;
	struct stat st;

	*total = *resident = 0;
	if (!shown)
		return;
	for (const struct node *node = tree.oldest; node; node = node->newer)
		if (node->kind == KIND_RAM && node->fd >= 0)
			shown[nr++] = (struct shown_memory){ node->dev, node->ino, node->size, node->fd };
	qsort(shown, nr, sizeof(*shown), by_memfd);
	for (size_t i = 0; i < nr; i++) {
		if (i && !by_memfd(&shown[i - 1], &shown[i]))
			continue;
		*total += shown[i].size;
		if (!fstat(shown[i].fd, &st))
			*resident += (uint64_t)st.st_blocks * 512;
	}
	free(shown);
}

int64_t do_statfs(uint8_t *out)
{
	struct fuse_statfs_out *fs = (void *)out;
	uint64_t total, resident, unused;

	count_memory(&total, &resident);
	unused = resident < total ? (total - resident) / 4096 : 0;
	*fs = (struct fuse_statfs_out){ .st = {
		.blocks = total / 4096, .bfree = unused, .bavail = unused, .files = NODES_MAX, .ffree = NODES_MAX - tree.nr_nodes,
		.bsize = 4096, .frsize = 4096, .namelen = NAME_LEN_MAX,
	} };
	return sizeof(*fs);
}

int64_t do_forget(const struct request *request)
{
	const struct fuse_forget_in *in = (const void *)request->body;
	struct node *node = node_by_id(request->head->nodeid);

	if (request->len >= sizeof(*in) && node)
		node_forget(node, in->nlookup);
	return NO_REPLY;
}

int64_t do_batch_forget(const struct request *request)
{
	const struct fuse_batch_forget_in *in = (const void *)request->body;
	const struct fuse_forget_one *one = (const void *)(in + 1);
	size_t room = request->len < sizeof(*in) ? 0 : (request->len - sizeof(*in)) / sizeof(*one);

	for (size_t i = 0; i < room && i < in->count; i++) {
		struct node *node = node_by_id(one[i].nodeid);

		if (node)
			node_forget(node, one[i].nlookup);
	}
	return NO_REPLY;
}
