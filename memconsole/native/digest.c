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

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

#include "core.h"

#define BLOCK (2ULL << 20)
#define PIECE (128 << 10)	/* read and hashed while still in the second level cache */
#define MAX_THREADS 256

struct job {
	int fd;
	uint64_t offset, length, blocks;
	XXH128_canonical_t *hashes;
	_Atomic uint64_t next;
	_Atomic int code;	/* the first failure, and its detail once */
	struct mc_fail *fail;
};

static void give_up(struct job *job, int code, int err, const char *source)
{
	int none = MC_OK;

	if (atomic_compare_exchange_strong(&job->code, &none, code))
		mc_fail(job->fail, code, err, source);
}

static void hash_block(struct job *job, uint64_t block, XXH3_state_t *state, uint8_t *piece)
{
	uint64_t at = job->offset + block * BLOCK, end = at + BLOCK;

	if (end > job->offset + job->length)
		end = job->offset + job->length;
	XXH3_128bits_reset(state);
	while (at < end) {
		ssize_t n = pread(job->fd, piece, end - at < PIECE ? end - at : PIECE, (off_t)at);

		if (n < 0)
			return give_up(job, MC_KERNEL, errno, "pread");
		if (!n)
			return give_up(job, MC_RANGE, 0, "the range ends beyond the file");
		XXH3_128bits_update(state, piece, (size_t)n);
		at += (uint64_t)n;
	}
	XXH128_canonicalFromHash(&job->hashes[block], XXH3_128bits_digest(state));
}

static void *work(void *argument)
{
	struct job *job = argument;
	uint8_t *piece = malloc(PIECE);
	XXH3_state_t *state = XXH3_createState();

	if (!piece || !state)
		give_up(job, MC_MEMORY, ENOMEM, "malloc");
	while (!atomic_load(&job->code)) {
		uint64_t block = atomic_fetch_add(&job->next, 1);

		if (block >= job->blocks)
			break;
		hash_block(job, block, state, piece);
	}
	XXH3_freeState(state);
	free(piece);
	return NULL;
}

/*
 * The digest (16 bytes, canonical) of bytes offset..offset+length of fd, read by up to `threads` threads, of which
 * the caller's is one. Errors: MC_RANGE (beyond the file, no threads), MC_KERNEL (pread), MC_MEMORY.
 */
int mc_digest(int fd, uint64_t offset, uint64_t length, unsigned int threads, uint8_t *digest, struct mc_fail *fail)
{
	struct job job = { .fd = fd, .offset = offset, .length = length, .fail = fail };
	pthread_t helpers[MAX_THREADS];
	XXH128_canonical_t canonical;
	unsigned int started = 0;

	if (!threads || threads > MAX_THREADS || offset > INT64_MAX || length > INT64_MAX - offset)
		return mc_fail(fail, MC_RANGE, 0, "no threads, too many, or beyond any file");
	job.blocks = length / BLOCK + !!(length % BLOCK);
	job.hashes = malloc((job.blocks ? job.blocks : 1) * sizeof(*job.hashes));
	if (!job.hashes)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	/* a thread that cannot start leaves its share to the others */
	while (started + 1 < threads && started + 1 < job.blocks && !pthread_create(&helpers[started], NULL, work, &job))
		started++;
	work(&job);
	while (started)
		pthread_join(helpers[--started], NULL);
	if (!job.code) {
		XXH128_canonicalFromHash(&canonical, XXH3_128bits(job.hashes, job.blocks * sizeof(*job.hashes)));
		memcpy(digest, canonical.digest, sizeof(canonical.digest));
	}
	free(job.hashes);
	return job.code;
}
