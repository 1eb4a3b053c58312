// SPDX-License-Identifier: MIT
/*
 * The kernel's requests. A message on /dev/fuse is one request, and one write is its reply (linux/fuse.h):
 *
 *	request := struct fuse_in_header body	body: the operation's struct, then its names, each ended by NUL
 *	reply   := struct fuse_out_header body	error: 0 or -errno, without a body; FORGET has no reply
 *
 * Nothing a request says is believed: lengths, ids, handles and names are checked before they are used.
 *
 * RAM files are passed through: OPEN names the memfd by its backing id, and reads, writes and mmaps never come here.
 * So the size stays, and what could change it is refused with EPERM. The kernel checks owners and modes
 * (default_permissions); whether a file is revoked, or opened for more than its mode ever allows, is checked here, as
 * root passes the kernel's check. Locks are the kernel's own (no FUSE_POSIX_LOCKS). ENOSYS to FLUSH, FSYNC, LSEEK,
 * xattrs and ioctls is never asked twice: RAM has nothing to flush, holes are the kernel's guess, the rest we lack.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuse.h"

/* Since 7.40 (Linux 6.9); not in older headers */
#define INIT_EXT (1u << 30)
#define PASSTHROUGH_HIGH (1u << 5)	/* FUSE_PASSTHROUGH, bit 37 */
#define OPEN_PASSTHROUGH (1u << 7)
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)
#define MINOR 40
#define MAX_PAGES 256
#define VALID_S 1			/* how long the kernel may believe names and attributes */
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

struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

_Static_assert(sizeof(struct init_out) == sizeof(struct fuse_init_out), "one layout in all kernels");
_Static_assert(sizeof(struct open_out) == sizeof(struct fuse_open_out), "one layout in all kernels");
_Static_assert((uint64_t)MAX_PAGES * 4096 == READ_MAX, "the kernel asks for no more than there is room for");

struct request {
	const struct fuse_in_header *head;
	const uint8_t *body;
	size_t len;		/* of the body */
};

/* One thread's room for a request and its reply. */
struct worker {
	int dev;
	union {
		struct fuse_in_header head;
		uint8_t bytes[REQUEST_MAX];
	} in;
	_Alignas(8) uint8_t out[READ_MAX + LINE_ROOM];
};

/* A map file that is being opened. */
struct opening {
	struct opening *next;
	uint64_t unique, node;
	struct content *content;
};

/* What a reply is: its length, -errno, or no reply by us and now. */
#define NO_REPLY INT64_MAX

static struct opening *openings;	/* under tree_lock */
static pthread_cond_t opening_came = PTHREAD_COND_INITIALIZER;
static bool scanner_ends;

/* Sends a reply to a request. Returns 0, or -errno: -ENOENT if whoever asked is gone. */
static int reply(int dev, uint64_t unique, int error, const void *body, size_t len)
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

	/* ENOENT: the kernel does not know it. Any other error: it forgets by itself, after VALID_S */
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

static uint32_t file_type(const struct node *node)
{
	return node->kind == KIND_DIR ? S_IFDIR : node->kind == KIND_LINK ? S_IFLNK : S_IFREG;
}

/* What is generated may be another the next moment. */
static uint64_t valid_seconds(const struct node *node)
{
	return node->kind == KIND_TEXT || node->kind == KIND_MAP ? 0 : VALID_S;
}

static void fill_attr(struct fuse_attr *attr, const struct node *node, uint64_t size)
{
	uint64_t seconds = node->changed_ns / 1000000000;
	uint32_t ns = (uint32_t)(node->changed_ns % 1000000000);

	*attr = (struct fuse_attr){
		.ino = node->id, .size = size, .blocks = (size + 511) / 512, .blksize = 4096,
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

/* A lookup counts, unless its reply cannot be sent. */
static int64_t do_lookup(const struct request *request, struct node *parent, uint8_t *out)
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

static void lookup_unsent(uint64_t id)
{
	struct node *node;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(id);
	if (node)
		node_forget(node, 1);
	pthread_mutex_unlock(&tree_lock);
}

static int64_t attr_reply(const struct node *node, uint64_t size, uint8_t *out)
{
	struct fuse_attr_out *attr = (void *)out;

	*attr = (struct fuse_attr_out){ .attr_valid = valid_seconds(node) };
	fill_attr(&attr->attr, node, size);
	return sizeof(*attr);
}

/* With a handle, the size of what this handle shows: how a reader finds the end of what he opened. */
static int64_t do_getattr(const struct request *request, struct node *node, uint8_t *out)
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
	return attr_reply(node, size, out);
}

/* Times may be set, as databases do, and are not kept; owner, mode and size are the control process's to say. */
static int64_t do_setattr(const struct request *request, struct node *node, uint8_t *out)
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

static int64_t do_readlink(struct node *node, uint8_t *out)
{
	if (node->kind != KIND_LINK)
		return -EINVAL;
	memcpy(out, node->target, node->size);
	return (int64_t)node->size;
}

static int64_t queue_opening(uint64_t unique, struct node *node)
{
	struct opening *opening, **last = &openings;
	uint32_t waiting = 0;

	for (; *last; last = &(*last)->next)
		waiting += (*last)->node == node->id;
	if (node->handles + waiting >= MAPS_MAX)
		return -EMFILE;
	opening = malloc(sizeof(*opening));
	if (!opening)
		return -ENOMEM;
	*opening = (struct opening){ .unique = unique, .node = node->id, .content = content_get(node->content) };
	*last = opening;
	pthread_cond_signal(&opening_came);
	return NO_REPLY;
}

static int64_t do_open(const struct request *request, struct node *node, uint8_t *out)
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
		open->open_flags = OPEN_PASSTHROUGH;
		open->backing_id = node->backing;
		tree.nr_handles++;
		node->handles++;	/* until RELEASE: whoever has it open, wherever the descriptor went */
		return sizeof(*open);
	}
	if (!node->content)
		return -ESTALE;
	if (node->kind == KIND_MAP)
		return queue_opening(request->head->unique, node);
	fh = handle_open(node, node->content, NULL);
	if (fh < 0)
		return fh;
	content_get(node->content);
	open->fh = (uint64_t)fh;
	open->open_flags = FOPEN_DIRECT_IO;
	return sizeof(*open);
}

static int64_t do_opendir(const struct request *request, struct node *node, uint8_t *out)
{
	if (request->len < sizeof(struct fuse_open_in))
		return -EINVAL;
	if (node->kind != KIND_DIR)
		return -ENOTDIR;
	memset(out, 0, sizeof(struct open_out));
	return sizeof(struct open_out);
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

static int64_t do_release(const struct request *request, struct node *node)
{
	const struct fuse_release_in *in = (const void *)request->body;

	if (request->len < sizeof(*in))
		return -EINVAL;
	close_file(node, in->fh);
	return 0;
}

/* Reads what a handle shows; the only operation that works without the lock. */
static int64_t do_read(const struct request *request, struct node *node, uint8_t *out)
{
	const struct fuse_read_in *in = (const void *)request->body;
	struct handle *handle;
	struct content *content;
	struct map *map;
	int64_t got;
	size_t size;

	if (request->len < sizeof(*in) || in->offset > INT64_MAX)
		return -EINVAL;
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
static int64_t do_readdir(const struct request *request, struct node *dir, uint8_t *out)
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

static int64_t do_statfs(uint8_t *out)
{
	struct fuse_statfs_out *fs = (void *)out;

	*fs = (struct fuse_statfs_out){ .st = {
		.blocks = tree.ram_bytes / 4096, .files = NODES_MAX, .ffree = NODES_MAX - tree.nr_nodes,
		.bsize = 4096, .frsize = 4096, .namelen = NAME_LEN_MAX,
	} };
	return sizeof(*fs);
}

static int64_t do_forget(const struct request *request)
{
	const struct fuse_forget_in *in = (const void *)request->body;
	struct node *node = node_by_id(request->head->nodeid);

	if (request->len >= sizeof(*in) && node)
		node_forget(node, in->nlookup);
	return NO_REPLY;
}

static int64_t do_batch_forget(const struct request *request)
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

/* Who waits for a scan that has not begun may be let go; everything else is answered at once. */
static int64_t do_interrupt(const struct request *request)
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
	case FUSE_CREATE:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_SYMLINK:
	case FUSE_LINK:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
	case FUSE_FALLOCATE:
	case FUSE_WRITE:
		return -EPERM;
	}
	return -ENOSYS;
}

/* The reply to an OPEN did not reach anybody. */
static void open_unsent(uint64_t id, uint64_t fh)
{
	struct node *node;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(id);
	if (node)
		close_file(node, fh);
	pthread_mutex_unlock(&tree_lock);
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

/* Ends one opening with the map of its content, or with what went wrong. */
static void opening_end(struct opening *opening, struct map *map, int error)
{
	struct open_out open = { .open_flags = FOPEN_DIRECT_IO };
	struct node *node;
	int64_t fh = error;

	pthread_mutex_lock(&tree_lock);
	node = node_by_id(opening->node);
	if (!error)
		fh = !node ? -ESTALE : node->revoked ? -EACCES : handle_open(node, NULL, map);
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

/* The thread that scans: so that a large guest's map keeps nobody else waiting. Ends after scanner_stop. */
void scanner_run(void)
{
	for (;;) {
		struct opening *taken, *next;
		struct map *map = NULL;
		int error;

		pthread_mutex_lock(&tree_lock);
		while (!openings && !scanner_ends)
			pthread_cond_wait(&opening_came, &tree_lock);
		taken = openings ? take_openings() : NULL;
		pthread_mutex_unlock(&tree_lock);
		if (!taken)
			return;
		error = map_scan(&map, taken->content);
		for (; taken; taken = next) {
			next = taken->next;
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
