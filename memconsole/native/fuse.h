// SPDX-License-Identifier: MIT
/*
 * memconsole-fuse: guest memory as files. What its sources share:
 *
 *   fuse_tree.c	the tree: nodes, what they hold, who still uses them
 *   fuse_pages.c	`pfnmap` files: scanned when opened, turned into text where read
 *   fuse_requests.c	the kernel's requests (FUSE protocol 7.x), taken and answered; by fuse_request.h
 *   fuse_names.c	those about names and attributes
 *   fuse_open.c	those about open files, and the thread that scans
 *   fuse_control.c	the control process's requests, answered; by fuse_control.h
 *   fuse_checks.c	what is wrong with one of them
 *   fuse_entries.c	how the tree gets its entries by them, and loses them
 *   fuse_mount.c	mounted where, and no more
 *   fuse.c		threads, end
 *
 * One lock (``tree_lock``) guards nodes and handles and is held for memory-only work: never over a system call that
 * may wait. What a node holds is counted, so that a reader keeps what it opened while the node gets something else.
 */
#ifndef MC_FUSE_H
#define MC_FUSE_H

#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NODES_MAX 65536
#define HANDLES_MAX 16384
#define HANDLES_OF_ROOT 1024	/* of these, that nobody else may have */
#define HANDLES_OF_USER 256	/* that one user but root may have */
#define PARTS_MAX 64
#define MAPS_MAX 8		/* scans of one node that may be open at a time */
#define PATH_LEN_MAX 1023
#define NAME_LEN_MAX 255
#define READ_MAX (1u << 20)	/* bytes one read may ask for */
#define REQUEST_MAX 16384	/* bytes one request may have; the kernel wants room for 8192 */
#define NO_GPA UINT64_MAX
#define ROOT FUSE_ROOT_ID

enum kind { KIND_DIR = 1, KIND_LINK, KIND_RAM, KIND_TEXT, KIND_MAP };

/* A range of a memfd that a `pfnmap` shows, in bytes; gpa is NO_GPA where the guest sees it nowhere. */
struct part {
	uint64_t offset, length, gpa;
};

/* What a file shows: the memfd of a text, or the memfds whose pages a map lists. Counted. */
struct content {
	uint32_t refs;
	uint32_t nr;
	struct {
		int fd;
		struct part part;
	} of[];
};

struct mc_table;

/* The rows of a scan that lie in one part. */
struct shown {
	struct mc_table *table;
	uint64_t first_row, lines;
	struct part part;
};

/* A scan of a content, kept for the handle it was opened with; its lines are those of its parts in order. Counted. */
struct map {
	uint32_t refs;
	uint64_t lines;		/* without the line of titles */
	uint32_t nr;
	struct shown shown[];
};

struct node {
	uint64_t id, generation;
	uint64_t lookups;	/* the kernel's references */
	uint32_t handles;	/* files that are open: file descriptions, not descriptors */
	uint32_t kind, mode, uid, gid;	/* mode without the file type */
	bool linked;		/* it is in the tree; else it only lives until the kernel forgets it */
	bool revoked;
	bool cut;		/* revoked, and the kernel has given up the inode it had for it */
	bool shown;		/* a lookup was answered with the present generation */
	uint64_t size;		/* bytes; of a MAP, as of its last scan */
	uint64_t size_until_ns;	/* MAP: until when (CLOCK_MONOTONIC) its size is told without another scan */
	uint64_t changed_ns;
	int32_t backing;	/* RAM: the kernel's id of the memfd, 0 if none */
	int fd;			/* RAM: the memfd, -1 if none: asked for its blocks, and emptied in parts */
	uint64_t dev, ino;	/* RAM: which memfd it is */
	bool sealless;		/* RAM: it is a file that no seal keeps from growing: reads and writes come here */
	char *target;		/* LINK */
	struct content *content;	/* TEXT, MAP */
	struct node *parent;
	struct node *older, *newer;	/* linked nodes by id */
	struct node *next_by_id, *next_by_name;
	char name[];
};

struct handle {
	struct node *node;
	struct content *content;	/* TEXT */
	struct map *map;		/* MAP */
	uint32_t uid;			/* who opened it */
};

struct tree {
	struct node *oldest, *newest;
	uint64_t next_id, nr_nodes, nr_linked, ram_bytes;
	uint32_t nr_handles;
	struct handle handles[HANDLES_MAX];
};

/* What is served, and where: set once before the threads start. */
struct server {
	int dev;			/* /dev/fuse */
	const char *mountpoint;		/* absolute, NULL when nothing is mounted */
	int passthrough;		/* 0, or the errno that tells why RAM cannot be shown */
	uint32_t connection;		/* its number in /sys/fs/fuse/connections */
	uint32_t major, minor;		/* of the kernel's protocol */
	uint64_t requests;		/* answered; atomic */
};

extern struct tree tree;
extern pthread_mutex_t tree_lock;
extern struct server server;

/* fuse_tree.c; all but the first and the content_ functions with tree_lock held */
int tree_init(void);
struct node *node_by_id(uint64_t id);
struct node *node_child(const struct node *parent, const char *name, size_t len);
struct node *node_find(const char *path, size_t len);
struct node *node_add(struct node *parent, const char *name, size_t len, enum kind kind);
void node_unlink(struct node *node);
void node_forget(struct node *node, uint64_t lookups);
void node_release(struct node *node);
void node_drop_data(struct node *node);
void node_touch(struct node *node);
size_t node_path(const struct node *node, char *path);
struct content *content_new(uint32_t nr);
struct content *content_get(struct content *content);
void content_put(struct content *content);
int64_t handle_open(struct node *node, struct content *content, struct map *map, uint32_t uid);
struct handle *handle_at(uint64_t fh);
void handle_close(uint64_t fh);

/* fuse_pages.c */
int map_scan(struct map **out, const struct content *content);
struct map *map_get(struct map *map);
void map_put(struct map *map);
uint64_t map_bytes(const struct map *map);
size_t map_read(const struct map *map, uint64_t offset, size_t size, char *out);

/* fuse_requests.c */
struct worker;
struct worker *worker_new(int dev);
void worker_free(struct worker *worker);
int worker_serve(struct worker *worker);
void backing_close(int32_t id);
int backing_open(int fd, int32_t *id);
void invalidate_node(uint64_t id);
void invalidate_name(uint64_t parent, const char *name);

/* fuse_open.c */
void scanner_run(void);
void scanner_stop(void);

/* fuse_control.c */
int control_serve(int client);
int control_greet(int client, bool room);
enum quit { STAY, QUIT, QUIT_LAZILY } control_quits(void);

/* fuse_mount.c */
int mount_at(const char *path);
int unmount(bool lazily);
#endif
