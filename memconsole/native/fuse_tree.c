// SPDX-License-Identifier: MIT
/*
 * The tree: directories, links, RAM files, texts and maps, by id and by name. A node that is taken out of the tree
 * lives on, unreachable by name, until the kernel forgets it and its last handle is closed; ids are never used twice.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fuse.h"

#define BUCKETS 4096

struct tree tree;
pthread_mutex_t tree_lock = PTHREAD_MUTEX_INITIALIZER;
static struct node *by_id[BUCKETS], *by_name[BUCKETS];

static struct node **id_bucket(uint64_t id)
{
	return &by_id[id % BUCKETS];
}

/* FNV-1a over the parent's id and the name. */
static struct node **name_bucket(uint64_t parent, const char *name, size_t len)
{
	uint64_t hash = 0xcbf29ce484222325 ^ parent;

	for (size_t i = 0; i < len; i++)
		hash = (hash ^ (uint8_t)name[i]) * 0x100000001b3;
	return &by_name[(hash ^ hash >> 32) % BUCKETS];
}

static struct node *node_new(const char *name, size_t len, enum kind kind)
{
	struct node *node = calloc(1, sizeof(*node) + len + 1);
	struct node **bucket;

	if (!node)
		return NULL;
	memcpy(node->name, name, len);
	node->id = tree.next_id++;
	node->kind = kind;
	node->fd = -1;
	node_touch(node);
	bucket = id_bucket(node->id);
	node->next_by_id = *bucket;
	*bucket = node;
	tree.nr_nodes++;
	return node;
}

/*
 * Makes the root. Returns 0 or -ENOMEM. The other ids begin where no server before this one came to: a mapping shows its
 * inode in /proc/PID/maps long after its mount is gone, and must not look like another file's.
 */
int tree_init(void)
{
	struct timespec now;
	struct node *root;

	tree.next_id = ROOT;
	root = node_new("", 0, KIND_DIR);
	if (!root)
		return -ENOMEM;
	root->mode = 0755;
	root->lookups = 1;
	clock_gettime(CLOCK_REALTIME, &now);
	tree.next_id = (uint64_t)now.tv_sec << 24;
	return 0;
}

/* The node of an id the kernel may know, or NULL. */
struct node *node_by_id(uint64_t id)
{
	struct node *node = *id_bucket(id);

	while (node && node->id != id)
		node = node->next_by_id;
	return node;
}

/* The entry of a directory, or NULL. */
struct node *node_child(const struct node *parent, const char *name, size_t len)
{
	struct node *node = *name_bucket(parent->id, name, len);

	while (node && (node->parent != parent || strlen(node->name) != len || memcmp(node->name, name, len)))
		node = node->next_by_name;
	return node;
}

/* The node at a path from the root ("" is the root itself, no slash at either end), or NULL. */
struct node *node_find(const char *path, size_t len)
{
	struct node *node = node_by_id(ROOT);

	while (len && node) {
		const char *slash = memchr(path, '/', len);
		size_t part = slash ? (size_t)(slash - path) : len;

		node = node_child(node, path, part);
		path += slash ? part + 1 : part;
		len -= slash ? part + 1 : part;
	}
	return node;
}

/* A new entry of a directory that has none of that name. Returns NULL without memory. */
struct node *node_add(struct node *parent, const char *name, size_t len, enum kind kind)
{
	struct node *node = node_new(name, len, kind), **bucket;

	if (!node)
		return NULL;
	bucket = name_bucket(parent->id, name, len);
	node->parent = parent;
	node->next_by_name = *bucket;
	*bucket = node;
	node->linked = true;
	node->older = tree.newest;
	if (tree.newest)
		tree.newest->newer = node;
	else
		tree.oldest = node;
	tree.newest = node;
	tree.nr_linked++;
	node_touch(parent);
	return node;
}

static void node_free_unused(struct node *node)
{
	struct node **at;

	if (node->linked || node->lookups || node->handles || node->id == ROOT)
		return;
	at = id_bucket(node->id);
	while (*at != node)
		at = &(*at)->next_by_id;
	*at = node->next_by_id;
	tree.nr_nodes--;
	node_drop_data(node);
	free(node->target);
	free(node);
}

/* Takes a node without entries out of the tree. The node may be gone afterwards. */
void node_unlink(struct node *node)
{
	struct node **at = name_bucket(node->parent->id, node->name, strlen(node->name));

	while (*at != node)
		at = &(*at)->next_by_name;
	*at = node->next_by_name;
	if (node->older)
		node->older->newer = node->newer;
	else
		tree.oldest = node->newer;
	if (node->newer)
		node->newer->older = node->older;
	else
		tree.newest = node->older;
	node_touch(node->parent);
	node->parent = NULL;
	node->linked = false;
	tree.nr_linked--;
	node_drop_data(node);
	node_free_unused(node);
}

/* Gives back references of the kernel's. The node may be gone afterwards. */
void node_forget(struct node *node, uint64_t lookups)
{
	node->lookups -= lookups < node->lookups ? lookups : node->lookups;
	node_free_unused(node);
}

/* Ends one opening of a RAM file. The node may be gone afterwards. */
void node_release(struct node *node)
{
	if (!node->handles)
		return;
	node->handles--;
	tree.nr_handles--;
	node_free_unused(node);
}

/* Lets go of what a file shows; handles that are open keep theirs. */
void node_drop_data(struct node *node)
{
	if (node->kind == KIND_RAM && node->backing) {
		backing_close(node->backing);
		node->backing = 0;
		close(node->fd);
		node->fd = -1;
		tree.ram_bytes -= node->size;
	}
	if (node->content)
		content_put(node->content);
	node->content = NULL;
}

/* Stamps a change. */
void node_touch(struct node *node)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	node->changed_ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Writes a linked node's path (at most PATH_LEN_MAX bytes, not terminated) and returns its length. */
size_t node_path(const struct node *node, char *path)
{
	size_t len = 0, at;

	for (const struct node *up = node; up->parent; up = up->parent)
		len += strlen(up->name) + (up != node);
	at = len;
	for (const struct node *up = node; up->parent; up = up->parent) {
		size_t part = strlen(up->name);

		if (up != node)
			path[--at] = '/';
		at -= part;
		memcpy(path + at, up->name, part);
	}
	return len;
}

/* Room for nr descriptors, all -1, with one reference; NULL without memory. */
struct content *content_new(uint32_t nr)
{
	struct content *content = calloc(1, sizeof(*content) + nr * sizeof(content->of[0]));

	if (!content)
		return NULL;
	content->refs = 1;
	content->nr = nr;
	for (uint32_t i = 0; i < nr; i++)
		content->of[i].fd = -1;
	return content;
}

struct content *content_get(struct content *content)
{
	__atomic_add_fetch(&content->refs, 1, __ATOMIC_RELAXED);
	return content;
}

void content_put(struct content *content)
{
	if (__atomic_sub_fetch(&content->refs, 1, __ATOMIC_ACQ_REL))
		return;
	for (uint32_t i = 0; i < content->nr; i++)
		if (content->of[i].fd >= 0)
			close(content->of[i].fd);
	free(content);
}

/* Whether a user may have one more handle: root as long as there is room, all others leave it some and have a share. */
static bool has_room_for(uint32_t uid)
{
	uint32_t others = 0, own = 0;

	for (uint32_t slot = 0; uid && slot < HANDLES_MAX; slot++) {
		const struct handle *handle = &tree.handles[slot];

		others += handle->node && handle->uid;
		own += handle->node && handle->uid == uid;
	}
	return own < HANDLES_OF_USER && others < HANDLES_MAX - HANDLES_OF_ROOT;
}

/*
 * A handle's number, never 0; it owns content and map from here on. Returns -EMFILE if its user has as many as one may
 * have, or all but root have, and -ENFILE if there is no room.
 */
int64_t handle_open(struct node *node, struct content *content, struct map *map, uint32_t uid)
{
	static uint32_t next;

	if (!has_room_for(uid))
		return -EMFILE;
	for (uint32_t tries = 0; tries < HANDLES_MAX; tries++) {
		uint32_t slot = next++ % HANDLES_MAX;

		if (tree.handles[slot].node)
			continue;
		tree.handles[slot] = (struct handle){ node, content, map, uid };
		tree.nr_handles++;
		node->handles++;
		return slot + 1;
	}
	return -ENFILE;
}

/* The open handle of a number, or NULL. */
struct handle *handle_at(uint64_t fh)
{
	return fh && fh <= HANDLES_MAX && tree.handles[fh - 1].node ? &tree.handles[fh - 1] : NULL;
}

/* Ends an open handle and what it owns. */
void handle_close(uint64_t fh)
{
	struct handle *handle = &tree.handles[fh - 1];
	struct node *node = handle->node;

	if (handle->content)
		content_put(handle->content);
	if (handle->map)
		map_put(handle->map);
	*handle = (struct handle){ 0 };
	tree.nr_handles--;
	node->handles--;
	node_free_unused(node);
}
