// SPDX-License-Identifier: MIT
/*
 * Contents into fresh frames: what one memory file holds is copied to the same place of another, in blocks over several
 * threads; and contents wiped. Holes stay holes.
 *
 * Two ways to copy, of which the caller knows which one his kernel and his pages want:
 *
 *   by write    the source is mapped and written into the target: the kernel need not zero what it fills, and a source
 *               that is shortened meanwhile is an error, not a signal. Takes no huge pages of shmem by advice.
 *   by map      the source is read into a mapping of the target: the only way into hugetlb pages, and the way to
 *               transparent huge pages that are given where they are advised.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
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

/* A run of a file without holes, as it was last found: to look for its end takes the longer the farther it is. */
struct run {
	uint64_t start, end;
};

/* The first run that ends behind `at`; one that starts at UINT64_MAX where there is none. Returns 0 or an errno. */
static int find_run(int fd, uint64_t at, struct run *run)
{
	off_t data, hole;

	if (at >= run->start && at < run->end)
		return 0;
	data = lseek(fd, (off_t)at, SEEK_DATA);
	if (data < 0 && errno != ENXIO)
		return errno;
	*run = (struct run){ UINT64_MAX, UINT64_MAX };
	if (data < 0)
		return 0;
	hole = lseek(fd, data, SEEK_HOLE);
	if (hole < 0)
		return errno;
	*run = (struct run){ (uint64_t)data, (uint64_t)hole };
	return 0;
}

/* Copies what the source holds of at..end. */
static void copy_block(struct job *job, uint64_t at, uint64_t end, struct run *run)
{
	while (at < end && !job->code) {
		int err = find_run(job->from, at, run);

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

#define ZEROS (64u << 10)
#define PARTS (BLOCK / ZEROS)

/* Writes zeros over bytes at..end, from so few that they stay in a cache. Returns 0 or an errno. */
static int zero_run(int fd, uint64_t at, uint64_t end, uint64_t *zeroed)
{
	static const uint8_t zeros[ZEROS];
	struct iovec parts[PARTS];

	while (at < end) {
		uint64_t left = end - at;
		int nr = 0;
		ssize_t n;

		for (; left && nr < (int)PARTS; nr++) {
			parts[nr] = (struct iovec){ (void *)zeros, left < ZEROS ? left : ZEROS };
			left -= parts[nr].iov_len;
		}
		n = pwritev(fd, parts, nr, (off_t)at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? errno : EIO;
		at += (uint64_t)n;
		*zeroed += (uint64_t)n;
	}
	return 0;
}

/*
 * Writes zeros over all that a memory file of `size` bytes holds, which is about to be freed; *zeroed is how many bytes
 * were no hole. What shows the same frames, pins included, shows zeros then. By write: whoever shortens the file
 * meanwhile harms nobody.
 * Errors: MC_KERNEL (lseek, pwritev: EINVAL where it is of hugetlb pages; fallocate: EPERM where it is sealed, or
 * preserved for a kexec: then it takes writes and cannot be freed, and stays as it is).
 */
int mc_wipe(int fd, uint64_t size, uint64_t *zeroed, struct mc_fail *fail)
{
	struct run run = { 0 };

	*zeroed = 0;
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)size, 4096))	/* behind its end */
		return mc_fail_errno(fail, "fallocate");
	for (uint64_t at = 0; at < size;) {
		uint64_t end;
		int err = find_run(fd, at, &run);

		if (err)
			return mc_fail(fail, MC_KERNEL, err, "lseek");
		if (run.start >= size)
			break;
		at = at < run.start ? run.start : at;
		end = run.end < size ? run.end : size;
		err = zero_run(fd, at, end, zeroed);
		if (err)
			return mc_fail(fail, MC_KERNEL, err, "pwritev");
		at = end;
	}
	return MC_OK;
}
