// SPDX-License-Identifier: MIT
/* How the tree gets its entries, and loses them, as the control process asks for it (fuse_control.h). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fuse_control.h"

#define PROBE_MS 5000

/* Looks at the memfd of a RAM or TEXT file. */
static enum code check_file(struct asked *asked, struct stat *st)
{
	if (fstat(asked->fds[0], st)) {
		asked->error = errno;
		return KERNEL;
	}
	return S_ISREG(st->st_mode) ? OK : BAD_FDS;
}

/* What is shown becomes the asked content, whose descriptors are taken. Returns OK or KERNEL. */
static enum code make_content(struct asked *asked, struct content **out)
{
	struct content *content = content_new(asked->nr_fds);

	if (!content) {
		asked->error = ENOMEM;
		return KERNEL;
	}
	for (uint32_t i = 0; i < asked->nr_fds; i++) {
		content->of[i].fd = asked->fds[i];
		asked->fds[i] = -1;
		if (asked->head->kind == KIND_MAP)
			memcpy(&content->of[i].part, asked->payload + i * sizeof(struct part), sizeof(struct part));
	}
	*out = content;
	return OK;
}

/* What an entry is made of, before it has its place in the tree. */
struct fresh {
	struct content *content;
	char *target;
	struct stat st;
	int32_t backing;
	int fd;			/* with a backing */
};

static void fresh_drop(struct fresh *fresh)
{
	if (fresh->content)
		content_put(fresh->content);
	if (fresh->backing) {
		backing_close(fresh->backing);
		close(fresh->fd);
	}
	free(fresh->target);
}

static enum code prepare_ram(struct asked *asked, struct fresh *fresh)
{
	enum code code = check_file(asked, &fresh->st);

	if (code)
		return code;
	if (!fresh->st.st_size)
		return BAD_FDS;
	if (server.passthrough) {
		asked->error = server.passthrough;
		return NO_PASSTHROUGH;
	}
	fresh->fd = fcntl(asked->fds[0], F_DUPFD_CLOEXEC, 3);
	asked->error = fresh->fd < 0 ? -errno : backing_open(asked->fds[0], &fresh->backing);
	if (asked->error && fresh->fd >= 0)
		close(fresh->fd);
	return asked->error ? KERNEL : OK;
}

static enum code prepare(struct asked *asked, struct fresh *fresh)
{
	enum code code;

	switch (asked->head->kind) {
	case KIND_LINK:
		fresh->target = strndup(asked->payload, asked->head->payload_len);
		asked->error = fresh->target ? 0 : ENOMEM;
		return fresh->target ? OK : KERNEL;
	case KIND_RAM:
		return prepare_ram(asked, fresh);
	case KIND_TEXT:
		code = check_file(asked, &fresh->st);
		return code ? code : make_content(asked, &fresh->content);
	case KIND_MAP:
		return make_content(asked, &fresh->content);
	}
	return OK;
}

/* The entry at a path, made if it is not there; with tree_lock held. */
static enum code place(struct asked *asked, const struct fresh *fresh, struct node **out)
{
	const char *slash = memrchr(asked->path, '/', asked->head->path_len);
	size_t dir_len = slash ? (size_t)(slash - asked->path) : 0;
	const char *name = slash ? slash + 1 : asked->path;
	size_t len = asked->head->path_len - (size_t)(name - asked->path);
	struct node *parent = node_find(asked->path, dir_len), *node;

	if (!parent)
		return NOT_FOUND;
	if (parent->kind != KIND_DIR)
		return BAD_PATH;
	node = node_child(parent, name, len);
	if (node && (node->kind != asked->head->kind || node->revoked))
		return TAKEN;
	if (node && node->kind == KIND_RAM && (node->dev != fresh->st.st_dev || node->ino != fresh->st.st_ino))
		return TAKEN;
	if (!node && tree.nr_nodes >= NODES_MAX)
		return FULL;
	if (!node)
		node = node_add(parent, name, len, asked->head->kind);
	asked->error = node ? 0 : ENOMEM;
	*out = node;
	return node ? OK : KERNEL;
}

/* Gives an entry what was prepared for it, and takes what it had; with tree_lock held. */
static void settle(struct node *node, const struct request *head, struct fresh *fresh)
{
	node->mode = head->mode;
	node->uid = head->uid;
	node->gid = head->gid;
	node_touch(node);
	if (node->kind == KIND_RAM) {
		if (node->backing)
			return;		/* the same memfd: the kernel has it already */
		node->backing = fresh->backing;
		node->fd = fresh->fd;
		node->dev = fresh->st.st_dev;
		node->ino = fresh->st.st_ino;
		node->size = (uint64_t)fresh->st.st_size;
		node->sealless = fcntl(node->fd, F_GET_SEALS) < 0;
		tree.ram_bytes += node->size;
		fresh->backing = 0;
	} else if (node->kind == KIND_LINK) {
		char *before = node->target;

		node->target = fresh->target;
		node->size = strlen(node->target);
		fresh->target = before;
	} else if (fresh->content) {
		struct content *before = node->content;

		node->content = fresh->content;
		node->size = node->kind == KIND_TEXT ? (uint64_t)fresh->st.st_size : 0;
		node->size_until_ns = 0;
		fresh->content = before;
	}
}

/* PUT: makes the entry of a path, or changes what it shows. */
enum code entry_put(struct asked *asked)
{
	struct fresh fresh = { 0 };
	struct node *node = NULL;
	enum code code = prepare(asked, &fresh);
	uint64_t known = 0;

	if (!code) {
		pthread_mutex_lock(&tree_lock);
		code = place(asked, &fresh, &node);
		if (!code) {
			settle(node, asked->head, &fresh);
			known = node->lookups ? node->id : 0;
		}
		pthread_mutex_unlock(&tree_lock);
	}
	fresh_drop(&fresh);
	if (known)
		invalidate_node(known);
	return code;
}

/*
 * Looks a path of our own mount up, in a child that holds no descriptor of ours: should this server end meanwhile, the
 * child's request ends with it. Returns whether the lookup came back in time.
 */
static bool look_up(const char *path)
{
	pid_t child = fork();
	struct pollfd ended;
	struct stat st;
	bool done;

	if (!child) {
		syscall(SYS_close_range, 0, ~0U, 0);
		lstat(path, &st);
		_exit(0);
	}
	if (child < 0)
		return false;
	ended = (struct pollfd){ .fd = (int)syscall(SYS_pidfd_open, child, 0), .events = POLLIN };
	done = ended.fd >= 0 && poll(&ended, 1, PROBE_MS) == 1;
	if (!done)
		kill(child, SIGKILL);
	waitpid(child, NULL, done ? 0 : WNOHANG);
	if (ended.fd >= 0)
		close(ended.fd);
	return done;
}

/*
 * Revokes a linked file: with tree_lock held, which is let go of meanwhile; only this thread takes nodes out, so the
 * node stays. Returns whether the kernel has given up the inode it knew.
 */
static bool cut(struct node *node)
{
	char path[PATH_LEN_MAX + 1 + PATH_LEN_MAX + 1];
	uint64_t parent = node->parent->id;
	bool known = node->lookups, looked;
	size_t len;

	if (!node->revoked) {
		node->revoked = true;
		node->generation++;
		node->shown = false;
		node_touch(node);
		node_drop_data(node);
	}
	node->cut |= !known;
	if (node->cut || !server.mountpoint)
		return node->cut;
	len = (size_t)sprintf(path, "%s/", server.mountpoint);
	len += node_path(node, path + len);
	path[len] = 0;
	pthread_mutex_unlock(&tree_lock);
	invalidate_node(node->id);
	invalidate_name(parent, node->name);
	looked = look_up(path);
	pthread_mutex_lock(&tree_lock);
	node->cut = looked && node->shown;
	return node->cut;
}

static bool is_file(const struct node *node)
{
	return node->kind == KIND_RAM || node->kind == KIND_TEXT || node->kind == KIND_MAP;
}

/* REVOKE: the file of a path is opened no more. */
enum code entry_revoke(struct asked *asked, struct revoked *revoked)
{
	struct node *node;
	enum code code = OK;

	pthread_mutex_lock(&tree_lock);
	node = node_find(asked->path, asked->head->path_len);
	if (!node)
		code = NOT_FOUND;
	else if (!is_file(node))
		code = BAD_PATH;
	else
		*revoked = (struct revoked){ .cut = cut(node), .open = node->handles };
	pthread_mutex_unlock(&tree_lock);
	return code;
}

static bool is_in(const struct node *node, const struct node *dir)
{
	while (node && node != dir)
		node = node->parent;
	return node;
}

static bool has_entries(const struct node *dir)
{
	for (const struct node *node = tree.oldest; node; node = node->newer)
		if (node->parent == dir)
			return true;
	return false;
}

/* Takes one node without entries away, for good; with tree_lock held, which is let go of meanwhile. */
static void take_away(struct node *node, struct revoked *revoked)
{
	uint64_t parent = node->parent->id;
	bool known = node->lookups;
	char name[NAME_LEN_MAX + 1];

	if (is_file(node) && !cut(node))
		revoked->cut = 0;
	revoked->open += node->handles;
	strcpy(name, node->name);
	node_unlink(node);
	pthread_mutex_unlock(&tree_lock);
	if (known)
		invalidate_name(parent, name);
	pthread_mutex_lock(&tree_lock);
}

/* REMOVE: takes the entry of a path away, and with flags what is in it. */
enum code entry_remove(struct asked *asked, struct revoked *revoked)
{
	struct node *top, *node, *older;
	enum code code = OK;

	*revoked = (struct revoked){ .cut = 1 };
	pthread_mutex_lock(&tree_lock);
	top = node_find(asked->path, asked->head->path_len);
	if (!top)
		code = NOT_FOUND;
	else if (!asked->head->flags && has_entries(top))
		code = NOT_EMPTY;
	/* a directory is older than its entries, so backwards they go before it */
	for (node = code ? NULL : tree.newest; node; node = older) {
		older = node->older;
		if (is_in(node, top))
			take_away(node, revoked);
	}
	pthread_mutex_unlock(&tree_lock);
	return code;
}
