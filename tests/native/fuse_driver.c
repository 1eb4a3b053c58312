// SPDX-License-Identifier: MIT
/*
 * The FUSE server's parsers under sanitizers, without a kernel's mount: requests come over a socketpair in the place of
 * /dev/fuse, and over another in the place of the control process's connection.
 *
 * usage: fuse_driver ROUNDS SEED
 *
 * Well-formed requests are spoiled (bits, lengths, truncation, splices) and sent to several threads at once while
 * entries come and go. What must hold: every request with a whole header gets exactly one reply with its unique number
 * and a sane error, except those that have none; and at the end nothing is left open, referenced or leaked.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuse.h"
#include "fuse_driver.h"

#define THREADS 3
#define MESSAGE 8192

struct server server = { .dev = -1 };
static uint64_t state;

void require(bool holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "fuse_driver: %s\n", what);
	abort();
}

uint64_t dice(uint64_t sides)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % sides;
}

/* --- the kernel's side ------------------------------------------------------------------------------------------ */

struct kernel {
	_Alignas(8) uint8_t bytes[MESSAGE];
	size_t len;
};

static uint64_t ids[64], handles[64];
static uint32_t nr_ids, nr_handles;
static uint64_t unique = 2, first_id;

static void make(struct kernel *k, uint32_t opcode, uint64_t node, const void *body, size_t len)
{
	struct fuse_in_header head = {
		.len = (uint32_t)(sizeof(head) + len), .opcode = opcode, .unique = unique, .nodeid = node,
		.uid = (uint32_t)(unique / 2 % 3),
	};

	unique += 2;
	memcpy(k->bytes, &head, sizeof(head));
	memcpy(k->bytes + sizeof(head), body, len);
	k->len = sizeof(head) + len;
}

static uint64_t some_node(void)
{
	return nr_ids && dice(10) ? ids[dice(nr_ids)] : dice(2) ? ROOT : dice(1 << 20);
}

static uint64_t some_handle(void)
{
	return nr_handles && dice(10) ? handles[dice(nr_handles)] : dice(HANDLES_MAX + 2);
}

static void make_any(struct kernel *k)
{
	static const char *const names[] = { "guests", "web", "ram", "status", "pfnmap", "bar", "none", "", "." };
	static const uint32_t plain[] = {
		FUSE_READLINK, FUSE_STATFS, FUSE_OPENDIR, FUSE_FSYNC, FUSE_GETXATTR, FUSE_LISTXATTR, FUSE_GETLK, FUSE_SETLK,
		FUSE_IOCTL, FUSE_POLL, FUSE_FALLOCATE, FUSE_WRITE, FUSE_CREATE, FUSE_MKNOD, FUSE_UNLINK, FUSE_RENAME2,
		FUSE_READDIRPLUS, FUSE_LSEEK, FUSE_COPY_FILE_RANGE, FUSE_ACCESS, FUSE_FLUSH, FUSE_DESTROY, FUSE_RELEASEDIR,
	};
	union {
		struct fuse_getattr_in getattr;
		struct fuse_setattr_in setattr;
		struct fuse_open_in open;
		struct fuse_read_in read;
		struct fuse_release_in release;
		struct fuse_forget_in forget;
		struct fuse_interrupt_in interrupt;
		struct fuse_init_in init;
		struct { struct fuse_batch_forget_in head; struct fuse_forget_one one[4]; } batch;
		uint8_t noise[256];
	} body = { 0 };
	const char *name = names[dice(9)];

	switch (dice(14)) {
	case 0: case 1: case 2:
		make(k, FUSE_LOOKUP, some_node(), name, strlen(name) + 1);
		return;
	case 3:
		body.getattr.getattr_flags = (uint32_t)dice(2);
		body.getattr.fh = some_handle();
		make(k, FUSE_GETATTR, some_node(), &body, sizeof(body.getattr));
		return;
	case 4:
		body.setattr.valid = (uint32_t)dice(1 << 11);
		body.setattr.size = dice(2) ? 1 << 16 : dice(1 << 20);
		make(k, FUSE_SETATTR, some_node(), &body, sizeof(body.setattr));
		return;
	case 5: case 6:
		body.open.flags = dice(3) ? O_RDONLY : O_RDWR;
		make(k, FUSE_OPEN, some_node(), &body, sizeof(body.open));
		return;
	case 7: case 8:
		body.read.fh = some_handle();
		body.read.offset = dice(4) ? dice(512) : dice(UINT64_MAX);
		body.read.size = dice(3) ? (uint32_t)dice(4096) : (uint32_t)dice(UINT32_MAX);
		make(k, dice(2) ? FUSE_READ : FUSE_READDIR, some_node(), &body, sizeof(body.read));
		return;
	case 9:
		body.release.fh = some_handle();
		make(k, FUSE_RELEASE, some_node(), &body, sizeof(body.release));
		return;
	case 10:
		body.forget.nlookup = dice(4) ? dice(3) : dice(UINT64_MAX);
		make(k, FUSE_FORGET, dice(2) ? some_node() : first_id + dice(64), &body, sizeof(body.forget));
		return;
	case 11:
		body.batch.head.count = (uint32_t)(dice(2) ? 4 : dice(UINT32_MAX));
		for (int i = 0; i < 4; i++)
			body.batch.one[i] = (struct fuse_forget_one){ first_id + dice(64), dice(3) };
		make(k, FUSE_BATCH_FORGET, ROOT, &body, sizeof(body.batch));
		return;
	case 12:
		body.interrupt.unique = unique - dice(16) * 2;
		make(k, FUSE_INTERRUPT, 0, &body, sizeof(body.interrupt));
		return;
	}
	for (size_t i = 0; i < sizeof(body); i++)
		body.noise[i] = (uint8_t)dice(256);
	make(k, dice(8) ? plain[dice(sizeof(plain) / sizeof(*plain))] : (uint32_t)dice(80), some_node(), &body,
	     dice(sizeof(body)));
}

static int device[2];
static uint64_t owed[1 << 16];
static uint32_t nr_owed;

static bool has_reply(const struct fuse_in_header *head)
{
	return head->opcode != FUSE_FORGET && head->opcode != FUSE_BATCH_FORGET && head->opcode != FUSE_INTERRUPT;
}

static void settle(uint64_t number)
{
	for (uint32_t i = 0; i < nr_owed; i++)
		if (owed[i] == number) {
			owed[i] = owed[--nr_owed];
			return;
		}
	require(false, "a reply to nothing, or a second one");
}

/* Takes replies until none comes any more for some milliseconds. */
static void take_replies(int patience)
{
	static _Alignas(8) uint8_t bytes[READ_MAX + 4096];
	const struct fuse_out_header *head = (const void *)bytes;
	struct pollfd polled = { .fd = device[0], .events = POLLIN };

	while (poll(&polled, 1, patience) == 1) {
		ssize_t len = recv(device[0], bytes, sizeof(bytes), 0);

		require(len >= (ssize_t)sizeof(*head) && head->len == (size_t)len, "a reply's length is not its length");
		if (!head->unique)
			continue;	/* a notification */
		require(head->error <= 0 && head->error > -512, "an error that is none");
		require(!head->error || len == sizeof(*head), "an error with a body");
		settle(head->unique);
		if (len == sizeof(*head) + sizeof(struct fuse_entry_out)) {
			uint64_t id = ((const struct fuse_entry_out *)(head + 1))->nodeid;

			ids[nr_ids < 64 ? nr_ids++ : dice(64)] = id;
		} else if (len == sizeof(*head) + sizeof(struct fuse_open_out)) {
			handles[nr_handles < 64 ? nr_handles++ : dice(64)] = ((const struct fuse_open_out *)(head + 1))->fh;
		}
	}
}

static void send_request(const struct kernel *k)
{
	const struct fuse_in_header *head = (const void *)k->bytes;

	if (k->len >= sizeof(*head) && head->len == k->len && has_reply(head))
		owed[nr_owed++] = head->unique;
	if (k->len)	/* nothing at all would be the end */
		require(send(device[0], k->bytes, k->len, 0) == (ssize_t)k->len, "send");
}

static void fuzz_requests(uint64_t rounds)
{
	static struct kernel k;
	struct fuse_in_header *head = (void *)k.bytes;

	for (uint64_t i = 0; i < rounds; i++) {
		uint64_t number;

		make_any(&k);
		number = head->unique;
		if (dice(2))
			spoil(k.bytes + 4, &(size_t){ k.len - 4 }, sizeof(k.bytes) - 4);
		if (!dice(8))
			k.len = dice(k.len + 1);
		if (dice(8))
			head->len = (uint32_t)k.len;
		head->unique = number;	/* the kernel's to choose; what it is, is the only way to tell replies apart */
		send_request(&k);
		if (i % 16 == 15)
			take_replies(0);
		if (i % 64 == 63) {
			if (!dice(3))
				shrink(dice(2) ? "guests/web/status" : "guests/web/pfnmap", true);
			if (!dice(3))
				shrink(dice(2) ? "guests/web/ram" : "guests/web/pfnmap", dice(2));
			if (!dice(8))
				shrink("guests", true);
			grow();
		}
	}
	for (int patience = 0; nr_owed && patience < 100; patience++)
		take_replies(100);
	require(!nr_owed, "requests without a reply");
}

static void *work(void *worker)
{
	while (!worker_serve(worker))
		;
	return NULL;
}

static void *scan(void *unused)
{
	scanner_run();
	return unused;
}

/* What is still open and known is closed and forgotten, and then nothing is there any more. */
static void clear(void)
{
	static struct kernel k;
	struct fuse_release_in release = { 0 };
	struct fuse_forget_in forget = { .nlookup = UINT64_MAX };

	while (tree.oldest) {
		char path[PATH_LEN_MAX + 1];

		path[node_path(tree.oldest, path)] = 0;
		shrink(path, true);
	}
	for (uint64_t id = first_id; id < tree.next_id; id++) {
		struct node *node;

		while ((node = node_by_id(id)) && node->handles) {
			release.fh = 0;
			for (uint64_t fh = 1; fh <= HANDLES_MAX && !release.fh; fh++)
				release.fh = handle_at(fh) && handle_at(fh)->node == node ? fh : 0;
			make(&k, FUSE_RELEASE, id, &release, sizeof(release));
			send_request(&k);
			take_replies(100);
		}
		make(&k, FUSE_FORGET, id, &forget, sizeof(forget));
		send_request(&k);
	}
	for (int patience = 0; patience < 500; patience++) {
		bool left;

		take_replies(10);
		pthread_mutex_lock(&tree_lock);
		left = tree.nr_nodes > 1;
		pthread_mutex_unlock(&tree_lock);
		if (!left)
			break;
	}
	require(tree.nr_nodes == 1 && !tree.nr_linked && !tree.nr_handles && !tree.ram_bytes, "something is left");
}

/* How many handles of a node a user gets. */
static uint32_t opened_by(struct node *node, uint32_t uid)
{
	uint32_t opened = 0;

	while (handle_open(node, NULL, NULL, uid) > 0)
		opened++;
	return opened;
}

/* One user has a share of the handles, and whatever all users do, root has some. */
static void share_out(void)
{
	struct node *node;
	uint32_t others = 0;

	pthread_mutex_lock(&tree_lock);
	node = node_add(node_by_id(ROOT), "crowd", 5, KIND_TEXT);
	require(opened_by(node, 1000) == HANDLES_OF_USER, "a user has more or less than a share");
	for (uint32_t uid = 1001; uid < 1100; uid++)
		others += opened_by(node, uid);
	require(others == HANDLES_MAX - HANDLES_OF_ROOT - HANDLES_OF_USER, "users have more or less than theirs together");
	require(handle_open(node, NULL, NULL, 5000) == -EMFILE, "a user without any has one of root's");
	require(opened_by(node, 0) == HANDLES_OF_ROOT, "root has not what is kept for it");
	require(handle_open(node, NULL, NULL, 0) == -ENFILE, "there is more than there is");
	for (uint64_t fh = 1; fh <= HANDLES_MAX; fh++)
		handle_close(fh);
	require(opened_by(node, 1000) == HANDLES_OF_USER, "a share that was given back is not there");
	for (uint64_t fh = 1; fh <= HANDLES_MAX; fh++)
		if (handle_at(fh))
			handle_close(fh);
	node_unlink(node);
	pthread_mutex_unlock(&tree_lock);
}

int main(int argc, char **argv)
{
	struct fuse_init_in init = { .major = 7, .minor = 40, .flags = ~0u, .flags2 = ~0u };
	static struct kernel k;
	struct worker *workers[THREADS];
	pthread_t threads[THREADS], scanner;
	uint64_t rounds;

	if (argc != 3)
		return 2;
	rounds = strtoull(argv[1], NULL, 0);
	state = strtoull(argv[2], NULL, 0) | 1;
	require(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, device) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, control), "pairs");
	require(!setsockopt(device[1], SOL_SOCKET, SO_SNDBUF, &(int){ 8 << 20 }, sizeof(int)), "SO_SNDBUF");
	server.dev = device[1];
	require(!tree_init(), "tree_init");
	share_out();
	first_id = tree.next_id;
	for (int i = 0; i < THREADS; i++)
		workers[i] = worker_new(device[1]);
	make(&k, FUSE_INIT, 0, &init, sizeof(init));
	send_request(&k);
	require(!worker_serve(workers[0]) && server.major == 7 && !server.passthrough, "INIT");
	take_replies(0);
	for (int i = 0; i < THREADS; i++)
		require(!pthread_create(&threads[i], NULL, work, workers[i]), "pthread_create");
	require(!pthread_create(&scanner, NULL, scan, NULL), "pthread_create");
	grow();
	fuzz_requests(rounds);
	fuzz_control(rounds / 4);
	clear();
	scanner_stop();
	shutdown(device[0], SHUT_WR);
	for (int i = 0; i < THREADS; i++) {
		pthread_join(threads[i], NULL);
		worker_free(workers[i]);
	}
	pthread_join(scanner, NULL);
	free(node_by_id(ROOT));
	return 0;
}
