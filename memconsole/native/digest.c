// SPDX-License-Identifier: MIT
/*
 * Digests of contents at memory speed: xxh3-128 of every 2 MiB block over several threads, then xxh3-128 of the
 * canonical block hashes in order. A hole is hashed as the zeros it reads as and is never filled.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core.h"
#include "xxh.h"

#define BLOCK (2ULL << 20)
#define MAX_THREADS 256

struct job {
	int fd;
	uint64_t offset, length, blocks;
	uint8_t (*hashes)[16];
	uint8_t hole[16];	/* what a whole block of zeros hashes to */
	_Atomic uint64_t next;
	_Atomic int code;	/* the first failure; its detail in *fail */
	struct mc_fail *fail;
};

static void give_up(struct job *job, int code, int err, const char *source)
{
	int none = MC_OK;

	if (atomic_compare_exchange_strong(&job->code, &none, code))
		mc_fail(job->fail, code, err, source);
}

static void hash(const void *bytes, uint64_t length, uint8_t *out)
{
	mc_hash(&(struct mc_bytes){ bytes, length }, 1, out);
}

/*
 * Hashes bytes at..end of the file. They are read, not mapped: a map would fill the holes of a memfd, and kill us if
 * whoever holds the fd shrank the file meanwhile.
 */
static void hash_block(struct job *job, uint64_t at, uint64_t end, uint8_t *bytes, uint8_t *out)
{
	uint64_t length = end - at, done = 0;
	off_t data = lseek(job->fd, (off_t)at, SEEK_DATA);

	if (data >= (off_t)end && length == BLOCK) {
		memcpy(out, job->hole, sizeof(job->hole));
		return;
	}
	while (done < length) {
		ssize_t n = pread(job->fd, bytes + done, length - done, (off_t)(at + done));

		if (n < 0)
			return give_up(job, MC_KERNEL, errno, "pread");
		if (!n)
			return give_up(job, MC_RANGE, 0, "the range ends beyond the file");
		done += (uint64_t)n;
	}
	hash(bytes, length, out);
}

static void *work(void *argument)
{
	struct job *job = argument;
	uint64_t last = job->offset + job->length, block;
	uint8_t *bytes = malloc(BLOCK);

	if (!bytes)
		give_up(job, MC_MEMORY, ENOMEM, "malloc");
	while (!atomic_load(&job->code) && (block = atomic_fetch_add(&job->next, 1)) < job->blocks) {
		uint64_t at = job->offset + block * BLOCK;

		hash_block(job, at, last - at < BLOCK ? last : at + BLOCK, bytes, job->hashes[block]);
	}
	free(bytes);
	return NULL;
}

static int hash_hole(struct job *job)
{
	uint8_t *zeros = calloc(1, BLOCK);

	if (!zeros)
		return mc_fail(job->fail, MC_MEMORY, ENOMEM, "calloc");
	hash(zeros, BLOCK, job->hole);
	free(zeros);
	return MC_OK;
}

/*
 * The digest (16 bytes, canonical) of bytes offset..offset+length of fd, read by up to `threads` threads, of which
 * the caller's is one. Errors: MC_RANGE (beyond the file, no threads), MC_KERNEL (pread), MC_MEMORY.
 */
int mc_digest(int fd, uint64_t offset, uint64_t length, unsigned int threads, uint8_t *digest, struct mc_fail *fail)
{
	struct job job = { .fd = fd, .offset = offset, .length = length, .fail = fail };
	pthread_t helpers[MAX_THREADS];
	unsigned int started = 0;

	if (!threads || threads > MAX_THREADS || offset > INT64_MAX || length > INT64_MAX - offset)
		return mc_fail(fail, MC_RANGE, 0, "no threads, too many, or beyond any file");
	if (hash_hole(&job))
		return MC_MEMORY;
	job.blocks = length / BLOCK + !!(length % BLOCK);
	job.hashes = calloc(job.blocks + 1, sizeof(*job.hashes));
	if (!job.hashes)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	/* a thread that cannot start leaves its share to the others */
	while (started + 1 < threads && started + 1 < job.blocks && !pthread_create(&helpers[started], NULL, work, &job))
		started++;
	work(&job);
	while (started)
		pthread_join(helpers[--started], NULL);
	if (!job.code)
		hash(job.hashes, job.blocks * sizeof(*job.hashes), digest);
	free(job.hashes);
	return job.code;
}
