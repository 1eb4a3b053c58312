// SPDX-License-Identifier: MIT
/* Rows of a table from the kernel: /proc/PID/pagemap, and kpageflags or kpagecount beside it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "pagescan.h"
#include "userfault.h"

#define CHUNK (1 << 17)		/* pagemap entries in a read: 1 MiB */
#define MAX_PAGES (1ULL << 51)	/* an address space */
#define MAX_HELPERS 7		/* threads beside the caller's; beyond this memory is the limit */
#define WINDOW (32ULL << 20)		/* how much of a file is mapped at a time: as much is resident meanwhile */
#define WINDOW_HUGETLB (1ULL << 30)	/* the largest page of a pool; those are not counted as resident */
#define MARGIN 8		/* entries in front of those of a chunk, for alignment: mc_scan_entries reads one */

#define FILE_BITS (PM_FRAME | PM_FILE | PM_SWAP | PM_PRESENT)
#define ALL_BITS (FILE_BITS | PM_SOFT_DIRTY | PM_EXCLUSIVE | PM_UFFD_WP | PM_GUARD)

/* What an end of file in a pagemap means: no address space any more, or an address beyond it. */
static int explain_end(struct mc_scan *s)
{
	uint64_t entry;

	if (pread(s->pagemap, &entry, sizeof(entry), 0) == sizeof(entry))
		return mc_fail(s->fail, MC_RANGE, 0, "the range ends beyond the process's address space");
	return mc_fail(s->fail, MC_GONE, 0, "pagemap");
}

/* Reads the entries of pages page..end, of which there are at most CHUNK, and appends their rows. */
static int scan_chunk(struct mc_scan *s, uint64_t page, uint64_t end, uint64_t *entries)
{
	while (page < end) {
		ssize_t got = pread(s->pagemap, entries, (end - page) * 8, (off_t)(page * 8));
		int code;

		if (got < 0)
			return errno == ESRCH ? mc_fail(s->fail, MC_GONE, 0, "pagemap") : mc_fail_errno(s->fail, "pagemap");
		if (got == 0)
			return explain_end(s);
		code = mc_scan_entries(s, page, entries, (uint64_t)got / 8);
		if (code)
			return code;
		page += (uint64_t)got / 8;
	}
	return MC_OK;
}

/* A range that several threads scan a chunk at a time; each chunk's rows are taken over when its turn comes. */
struct shared {
	struct mc_scan scan;
	uint64_t page, end;	/* chunks end on multiples of CHUNK: no huge page is seen in two halves */
	uint64_t chunks;
	_Atomic uint64_t next;
	pthread_mutex_t lock;
	pthread_cond_t turned;
	uint64_t turn;		/* under lock, as are the table and: */
	int code;
	struct mc_fail fail;
};

/* Whether it is this chunk's turn already: its rows can go straight into the table, which is nobody else's until then. */
static bool has_turn(struct shared *shared, uint64_t chunk)
{
	bool has;

	pthread_mutex_lock(&shared->lock);
	has = shared->turn == chunk;
	pthread_mutex_unlock(&shared->lock);
	return has;
}

/* Ends a chunk: rows that are not in the table yet go there when it is their turn. Returns whether to go on. */
static bool take_turn(struct shared *shared, uint64_t chunk, struct mc_scan *s, int code)
{
	bool failed;

	pthread_mutex_lock(&shared->lock);
	while (!code && !shared->code && shared->turn != chunk)
		pthread_cond_wait(&shared->turned, &shared->lock);
	if (!code && !shared->code && s->table != shared->scan.table)
		code = mc_table_take(shared->scan.table, s->table, s->fail);
	if (code && !shared->code) {
		shared->code = code;
		shared->fail = *s->fail;
	}
	shared->turn++;
	pthread_cond_broadcast(&shared->turned);
	failed = shared->code;
	pthread_mutex_unlock(&shared->lock);
	return !failed;
}

static void *scan_chunks(void *argument)
{
	struct shared *shared = argument;
	struct mc_fail fail = { 0 };
	struct mc_table rows = { .fd = -1 };
	struct mc_scan s = shared->scan;
	uint64_t *buffer = aligned_alloc(64, (MARGIN + CHUNK) * 8), chunk;
	bool more = true;

	s.fail = &fail;
	while (more && (chunk = atomic_fetch_add(&shared->next, 1)) < shared->chunks) {
		uint64_t from = (shared->page / CHUNK + chunk) * CHUNK, to = from + CHUNK;
		int code = MC_MEMORY;

		if (from < shared->page)
			from = shared->page;
		if (to > shared->end)
			to = shared->end;
		s.table = has_turn(shared, chunk) ? shared->scan.table : &rows;
		if (buffer)
			code = scan_chunk(&s, from, to, buffer + MARGIN);
		else
			mc_fail(&fail, MC_MEMORY, ENOMEM, "malloc");
		more = take_turn(shared, chunk, &s, code);
	}
	mc_table_drop(&rows);
	free(buffer);
	return NULL;
}

/* How many CPUs this process may use. */
static uint64_t usable_cpus(void)
{
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) ? 1 : (uint64_t)CPU_COUNT(&set);
}

/* Appends the rows of pages page..page+pages, by as many threads as there are CPUs and work for them. */
static int scan_range(struct mc_scan *s, uint64_t page, uint64_t pages)
{
	struct shared shared = {
		.scan = *s, .page = page, .end = page + pages,
		.lock = PTHREAD_MUTEX_INITIALIZER, .turned = PTHREAD_COND_INITIALIZER,
	};
	uint64_t helpers = usable_cpus() - 1, started = 0;
	pthread_t threads[MAX_HELPERS];

	if (!pages)
		return MC_OK;
	shared.chunks = (shared.end - 1) / CHUNK - page / CHUNK + 1;
	if (helpers > MAX_HELPERS)
		helpers = MAX_HELPERS;
	if (helpers > shared.chunks - 1)
		helpers = shared.chunks - 1;
	while (started < helpers && !pthread_create(&threads[started], NULL, scan_chunks, &shared))
		started++;	/* one that cannot start leaves its share to the others */
	scan_chunks(&shared);
	while (started)
		pthread_join(threads[--started], NULL);
	if (shared.code)
		*s->fail = shared.fail;
	return shared.code;
}

/*
 * Appends what `pagemap` (an open /proc/PID/pagemap) says of the length bytes from address start on; the page at
 * start gets offset base. HUGE is what PAGEMAP_SCAN says; on kernels before 6.7, which lack it, no row has it.
 * Errors: MC_GONE (the process ended), MC_DENIED (frames hidden: no CAP_SYS_ADMIN), MC_RANGE (not whole pages,
 * beyond the address space), MC_KERNEL, MC_MEMORY.
 */
int mc_scan_pagemap(struct mc_table *table, int pagemap, uint64_t start, uint64_t length, uint64_t base,
		    struct mc_fail *fail)
{
	struct mc_scan s = {
		.table = table, .pagemap = pagemap, .probes = true, .mask = ALL_BITS,
		.page_size = table->page_size, .huge = table->page_size / 8, .fail = fail,
	};
	int code;

	if (start % s.page_size || length % s.page_size)
		return mc_fail(fail, MC_RANGE, 0, "the range is not whole pages");
	start /= s.page_size;
	length /= s.page_size;
	if (start > MAX_PAGES || length > MAX_PAGES - start)
		return mc_fail(fail, MC_RANGE, 0, "the range ends beyond the process's address space");
	mc_table_recycle(table);
	code = mc_table_cover(table, base, length, fail);
	if (code)
		return code;
	s.shift = base - start;
	return scan_range(&s, start, length);
}

/* A file that is being scanned through a window at `at`. */
struct file {
	int fd;
	uint8_t *at;
	uint64_t window;	/* bytes that are mapped at a time */
	uint64_t block;		/* hugetlb: bytes a page, 0 otherwise */
	int uffd;		/* hugetlb: maps what is there; -1 otherwise */
};

/*
 * Prepares a file for scanning. hugetlbfs has no SEEK_DATA, and reading its holes would fill them, but
 * UFFDIO_CONTINUE maps a page only if it is there.
 */
static int open_file(struct file *file, int fd, struct mc_fail *fail)
{
	const char *call;
	struct statfs fs;
	uint64_t there;

	*file = (struct file){ .fd = fd, .window = WINDOW, .uffd = -1 };
	if (fstatfs(fd, &fs))
		return mc_fail_errno(fail, "fstatfs");
	if (fs.f_type != HUGETLBFS_MAGIC)
		return MC_OK;
	file->block = (uint64_t)fs.f_bsize;
	file->window = WINDOW_HUGETLB;
	file->uffd = userfault_open(UFFD_USER_MODE_ONLY, UFFD_FEATURE_MINOR_HUGETLBFS, &there, &call);
	return file->uffd < 0 ? mc_fail_errno(fail, call) : MC_OK;
}

static int populate_hugetlb(const struct file *file, uint8_t *at, uint64_t length, struct mc_fail *fail)
{
	struct uffdio_register whole = {
		.range = { (uintptr_t)at, length }, .mode = UFFDIO_REGISTER_MODE_MINOR,
	};

	if (ioctl(file->uffd, UFFDIO_REGISTER, &whole))
		return mc_fail_errno(fail, "UFFDIO_REGISTER");
	for (uint64_t done = 0; done < length; done += file->block) {
		struct uffdio_continue page = {
			.range = { (uintptr_t)at + done, file->block }, .mode = UFFDIO_CONTINUE_MODE_DONTWAKE,
		};

		if (ioctl(file->uffd, UFFDIO_CONTINUE, &page) && errno != EFAULT)	/* EFAULT: a hole */
			return mc_fail_errno(fail, "UFFDIO_CONTINUE");
	}
	return MC_OK;
}

/* Maps bytes from..to of the file, makes its pages present without adding any, and scans them. */
static int scan_window(struct mc_scan *s, const struct file *file, uint64_t from, uint64_t to)
{
	uint64_t length = to - from, pages = (length + s->page_size - 1) / s->page_size;
	uint8_t *at = file->at + from % file->window;	/* as aligned as in the file, so that huge pages can be mapped huge */
	int code = MC_OK;

	if (mmap(at, length, PROT_READ, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file->fd, (off_t)from) == MAP_FAILED)
		return mc_fail_errno(s->fail, "mmap");
	if (file->block)
		code = populate_hugetlb(file, at, length, s->fail);
	else if (madvise(at, length, MADV_POPULATE_READ))
		code = mc_fail_errno(s->fail, "MADV_POPULATE_READ");
	if (code)
		return code;	/* and the room goes, with all that is mapped in it */
	s->shift = from / s->page_size - (uintptr_t)at / s->page_size;
	code = scan_range(s, (uintptr_t)at / s->page_size, pages);
	/* The room stays taken: a table that grows would be put into a gap of it, and end with the room. */
	if (mmap(at, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED &&
	    !code)
		code = mc_fail_errno(s->fail, "mmap");
	return code;
}

/* Scans the data (not the holes) of the first size bytes of a file. */
static int scan_data(struct mc_scan *s, const struct file *file, uint64_t size)
{
	uint64_t from = 0;

	while (from < size) {
		off_t data = lseek(file->fd, (off_t)from, SEEK_DATA), hole;

		if (data < 0)
			return errno == ENXIO ? MC_OK : mc_fail_errno(s->fail, "SEEK_DATA");
		hole = lseek(file->fd, data, SEEK_HOLE);
		if (hole < 0)
			return errno == ENXIO ? MC_OK : mc_fail_errno(s->fail, "SEEK_HOLE");
		if ((uint64_t)hole > size)
			hole = (off_t)size;
		for (from = (uint64_t)data; from < (uint64_t)hole;) {
			uint64_t to = (from / file->window + 1) * file->window;
			int code;

			if (to > (uint64_t)hole)
				to = (uint64_t)hole;
			code = scan_window(s, file, from, to);
			if (code)
				return code;
			from = to;
		}
	}
	return MC_OK;
}

/*
 * Appends what the first size bytes of a memfd hold, whoever maps it: offsets are the file's pages. Holes stay
 * holes and have no rows; swapped pages are brought in. pagemap is our own (/proc/self/pagemap). Of the flags only
 * PRESENT, FILE and HUGE are set: the others would describe our mapping, not the file.
 * Errors: MC_DENIED, MC_RANGE (not whole pages), MC_KERNEL, MC_MEMORY.
 */
int mc_scan_fd(struct mc_table *table, int pagemap, int fd, uint64_t size, struct mc_fail *fail)
{
	struct mc_scan s = {
		.table = table, .pagemap = pagemap, .probes = true, .mask = FILE_BITS,
		.page_size = table->page_size, .huge = table->page_size / 8, .fail = fail,
	};
	struct file file;
	uint8_t *room;
	int code;

	if (size % s.page_size)
		return mc_fail(fail, MC_RANGE, 0, "the size is not whole pages");
	mc_table_recycle(table);
	code = mc_table_cover(table, 0, size / s.page_size, fail);
	if (code)
		return code;
	code = open_file(&file, fd, fail);
	if (code)
		return code;
	room = mmap(NULL, 2 * file.window, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED) {
		code = mc_fail_errno(fail, "mmap");
	} else {
		file.at = (uint8_t *)(((uintptr_t)room + file.window - 1) / file.window * file.window);
		code = scan_data(&s, &file, size);
		munmap(room, 2 * file.window);
	}
	if (file.uffd >= 0)
		close(file.uffd);
	return code;
}

struct fold {
	uint64_t any, every, least, most;
};

static int fold_frames(struct fold *f, int file, uint64_t pfn, uint64_t n, uint64_t *values, struct mc_fail *fail)
{
	while (n) {
		uint64_t want = n < CHUNK ? n : CHUNK;
		ssize_t got = pread(file, values, want * 8, (off_t)(pfn * 8));

		if (got < 0)
			return mc_fail_errno(fail, "kpage");
		if (!got)
			return mc_fail(fail, MC_RANGE, 0, "a frame lies beyond memory");
		for (ssize_t i = 0; i < got / 8; i++) {
			f->any |= values[i];
			f->every &= values[i];
			f->least = values[i] < f->least ? values[i] : f->least;
			f->most = values[i] > f->most ? values[i] : f->most;
		}
		pfn += (uint64_t)got / 8;
		n -= (uint64_t)got / 8;
	}
	return MC_OK;
}

/*
 * Folds the u64 a frame of `file` (/proc/kpageflags or /proc/kpagecount) over each of `rows` rows from `row` on:
 * bits set in any frame, in every frame, the least and the largest value. Rows that are not present fold to 0.
 * Errors: MC_RANGE (a frame beyond the file), MC_KERNEL, MC_MEMORY.
 */
int mc_join(const struct mc_table *table, int file, uint64_t row, uint64_t rows, uint64_t *any, uint64_t *every,
	    uint64_t *least, uint64_t *most, struct mc_fail *fail)
{
	uint64_t *values = malloc(CHUNK * 8);
	int code = MC_OK;

	if (!values)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	for (uint64_t i = 0; i < rows && !code; i++) {
		struct fold f = { 0 };

		if (table->flags[row + i] & MC_PRESENT) {
			f.every = f.least = ~0ULL;
			code = fold_frames(&f, file, table->pfn[row + i], table->count[row + i], values, fail);
		}
		any[i] = f.any;
		every[i] = f.every;
		least[i] = f.least;
		most[i] = f.most;
	}
	free(values);
	return code;
}
