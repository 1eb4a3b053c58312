// SPDX-License-Identifier: MIT
/*
 * Contents into fresh frames: what one memory file holds is copied to the same place of another, in blocks over several
 * threads; holes stay holes.
 *
 * Two ways, of which the caller knows which one his kernel and his pages want:
 *
 *   by write    the source is mapped and written into the target: the kernel need not zero what it fills, and a source
 *               that is shortened meanwhile is an error, not a signal. Takes no huge pages of shmem by advice.
 *   by map      the source is read into a mapping of the target: the only way into hugetlb pages, and the way to
 *               transparent huge pages that are given where they are advised.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"

#define BLOCK (2ULL << 20)
#define MAX_THREADS 64

struct job {
	int from, to;
	uint64_t size;
	uint8_t *map;		/* of the source (by write) or of the target (by map) */
	bool through_map;
	_Atomic uint64_t next, copied;
	_Atomic int code;	/* the first failure; its detail in *fail */
	struct mc_fail *fail;
};

static void give_up(struct job *job, int err, const char *source)
{
	int none = MC_OK;

	if (atomic_compare_exchange_strong(&job->code, &none, err == ENOMEM ? MC_MEMORY : MC_KERNEL))
		mc_fail(job->fail, MC_KERNEL, err, source);
}

/* Copies bytes at..end, all of which the source holds. */
static void copy_run(struct job *job, uint64_t at, uint64_t end)
{
	const char *call = job->through_map ? "pread" : "pwrite";

	while (at < end) {
		ssize_t n = job->through_map ? pread(job->from, job->map + at, end - at, (off_t)at)
					     : pwrite(job->to, job->map + at, end - at, (off_t)at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return give_up(job, n ? errno : EIO, call);
		at += (uint64_t)n;
		atomic_fetch_add(&job->copied, (uint64_t)n);
	}
}

/* A run of the source without holes, as it was last found: to look for its end takes the longer the farther it is. */
struct run {
	uint64_t start, end;
};

/* The first run that ends behind `at`; one that starts at UINT64_MAX where there is none. Returns 0 or an errno. */
static int find_run(struct job *job, uint64_t at, struct run *run)
{
	off_t data, hole;

	if (at >= run->start && at < run->end)
		return 0;
	data = lseek(job->from, (off_t)at, SEEK_DATA);
	if (data < 0 && errno != ENXIO)
		return errno;
	*run = (struct run){ UINT64_MAX, UINT64_MAX };
	if (data < 0)
		return 0;
	hole = lseek(job->from, data, SEEK_HOLE);
	if (hole < 0)
		return errno;
	*run = (struct run){ (uint64_t)data, (uint64_t)hole };
	return 0;
}

/* Copies what the source holds of at..end. */
static void copy_block(struct job *job, uint64_t at, uint64_t end, struct run *run)
{
	while (at < end && !job->code) {
		int err = find_run(job, at, run);

		if (err)
			return give_up(job, err, "lseek");
		if (run->start >= end)
			return;
		if (at < run->start)
			at = run->start;
		copy_run(job, at, run->end < end ? run->end : end);
		at = run->end < end ? run->end : end;
	}
}

static void *work(void *argument)
{
	struct job *job = argument;
	struct run run = { 0 };
	uint64_t at;

	while (!job->code && (at = atomic_fetch_add(&job->next, BLOCK)) < job->size)
		copy_block(job, at, at + BLOCK < job->size ? at + BLOCK : job->size, &run);
	return NULL;
}

/*
 * Copies the first `size` bytes of memory file `from` to `to`, which is as large and holds nothing, with so many
 * threads; *copied is how many bytes were no hole. Whoever writes to the source meanwhile is copied or is not.
 * Errors: MC_KERNEL (mmap, lseek, pread, pwrite: EFAULT or EIO where the source was shortened meanwhile, ENOSPC where
 * memory ran out), MC_MEMORY; the target is of no use then.
 */
int mc_copy(int from, int to, uint64_t size, int through_map, unsigned int threads, uint64_t *copied,
	    struct mc_fail *fail)
{
	struct job job = { .from = from, .to = to, .size = size, .through_map = through_map, .fail = fail };
	pthread_t ids[MAX_THREADS];
	unsigned int started = 0;

	*copied = 0;
	if (!size)
		return MC_OK;
	job.map = mmap(NULL, size, through_map ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED,
		       through_map ? to : from, 0);
	if (job.map == MAP_FAILED)
		return mc_fail_errno(fail, "mmap");
	if (through_map)
		madvise(job.map, size, MADV_HUGEPAGE);	/* advice: kernels without it go on in small pages */
	while (started + 1 < threads && started < MAX_THREADS && !pthread_create(&ids[started], NULL, work, &job))
		started++;
	work(&job);	/* this thread too: where no other could be made, it does all of it */
	while (started)
		pthread_join(ids[--started], NULL);
	munmap(job.map, size);
	*copied = job.copied;
	return job.code;
}
