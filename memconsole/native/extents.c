// SPDX-License-Identifier: MIT
/*
 * A table of extents while it is filled: each column is a private mapping that grows by mremap, so that nothing is
 * copied. How it leaves the process is in sealed.c.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"

#define FIRST_CAPACITY 4096
#define MAX_SPARE (1 << 21)	/* rows: 48 MiB */
#define LARGE_CAPACITY (1 << 19)	/* from here on huge pages are worth their zeroing */

/*
 * An empty table that covers nothing, to be filled and freed.
 * Errors: MC_MEMORY, MC_RANGE (page_size not a power of two).
 */
int mc_table_new(struct mc_table **out, uint32_t page_size, struct mc_fail *fail)
{
	struct mc_table *t;

	if (page_size < 512 || page_size & (page_size - 1))
		return mc_fail(fail, MC_RANGE, 0, "a page size is a power of two");
	t = calloc(1, sizeof(*t));
	if (!t)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	t->page_size = page_size;
	t->fd = -1;
	*out = t;
	return MC_OK;
}

static void *grow_column(void *column, uint64_t old, uint64_t bytes)
{
	return old ? mremap(column, old, bytes, MREMAP_MAYMOVE)
		   : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/*
 * Makes room for at least `rows` rows in all, doubling what there is.
 * Errors: MC_MEMORY, MC_KERNEL (mmap); the table is as it was.
 */
int mc_table_reserve(struct mc_table *t, uint64_t rows, struct mc_fail *fail)
{
	uint64_t old = t->capacity, capacity = old ? old : FIRST_CAPACITY;
	struct { void *at; uint64_t width; } columns[] = {
		{ t->offset, 8 }, { t->pfn, 8 }, { t->count, 4 }, { t->flags, 4 },
	};

	if (rows <= old)
		return MC_OK;
	if (rows > MC_MAX_ROWS)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "more rows than memory");
	while (capacity < rows)
		capacity *= 2;
	for (int i = 0; i < 4; i++) {
		void *at = grow_column(columns[i].at, old * columns[i].width, capacity * columns[i].width);

		if (at == MAP_FAILED) {
			int code = mc_fail_errno(fail, "mmap");

			while (i--)	/* those that grew become what the others still are; shrinking cannot fail */
				if (old)
					mremap(columns[i].at, capacity * columns[i].width, old * columns[i].width, 0);
				else
					munmap(columns[i].at, capacity * columns[i].width);
			return code;
		}
		if (capacity >= LARGE_CAPACITY)
			madvise(at, capacity * columns[i].width, MADV_HUGEPAGE);
		columns[i].at = at;
	}
	t->offset = columns[0].at;
	t->pfn = columns[1].at;
	t->count = columns[2].at;
	t->flags = columns[3].at;
	t->capacity = capacity;
	return MC_OK;
}

/* Moves all rows of a scratch table behind those of t; the scratch is empty afterwards. Errors: as reserve. */
int mc_table_take(struct mc_table *t, struct mc_table *from, struct mc_fail *fail)
{
	uint64_t n = from->rows ? from->rows - 1 : 0;
	int code = MC_OK;

	if (from->rows)	/* the first may continue our last, the others cannot */
		code = mc_table_push(t, from->offset[0], from->pfn[0], from->count[0], from->flags[0], fail);
	if (!code)
		code = mc_table_reserve(t, t->rows + n, fail);
	if (code)
		return code;
	if (n) {
		memcpy(t->offset + t->rows, from->offset + 1, n * 8);
		memcpy(t->pfn + t->rows, from->pfn + 1, n * 8);
		memcpy(t->count + t->rows, from->count + 1, n * 4);
		memcpy(t->flags + t->rows, from->flags + 1, n * 4);
	}
	t->rows += n;
	from->rows = 0;
	return MC_OK;
}

/* Widens what the table covers by pages first..first+pages. Errors: MC_RANGE beyond 2^62 pages. */
int mc_table_cover(struct mc_table *t, uint64_t first, uint64_t pages, struct mc_fail *fail)
{
	if (first > MC_MAX_PAGE || pages > MC_MAX_PAGE - first)
		return mc_fail(fail, MC_RANGE, 0, "beyond 2^62 pages");
	if (!pages)
		return MC_OK;
	if (!t->pages || first < t->first)
		t->first = first;
	if (first + pages > t->end)
		t->end = first + pages;
	t->pages += pages;
	if (t->pages > t->end - t->first)
		return mc_fail(fail, MC_RANGE, 0, "covered twice");
	return MC_OK;
}

/* Why a row cannot stand behind one that ends at `end`, or NULL. */
const char *mc_row_fault(const struct mc_table *t, uint64_t end, uint64_t offset, uint64_t pfn, uint32_t count,
			     uint32_t flags)
{
	uint32_t kind = flags & (MC_PRESENT | MC_SWAP);

	if (kind != MC_PRESENT && kind != MC_SWAP)
		return "a row is neither present nor swapped, or both";
	if (flags >= MC_DERIVED * 2)
		return "a row has a flag nobody knows";
	if (!count)
		return "a row has no pages";
	if (offset < end)
		return "rows overlap or are out of order";
	if (offset < t->first || offset >= t->end || count > t->end - offset)
		return "a row lies outside what the table covers";
	if (pfn >= 1ULL << 55)
		return "a frame number is beyond 55 bits";
	return NULL;
}

/*
 * Appends rows given as columns; a row that continues its neighbour is merged with it.
 * Errors: MC_RANGE (unsorted, overlapping, outside what is covered, bad flags), MC_MEMORY, MC_KERNEL.
 */
int mc_table_append(struct mc_table *t, uint64_t rows, const uint64_t *offset, const uint64_t *pfn,
		    const uint32_t *count, const uint32_t *flags, struct mc_fail *fail)
{
	uint64_t end = t->rows ? t->offset[t->rows - 1] + t->count[t->rows - 1] : t->first;

	for (uint64_t i = 0; i < rows; i++) {
		const char *fault = mc_row_fault(t, end, offset[i], pfn[i], count[i], flags[i]);
		int code;

		if (fault)
			return mc_fail(fail, MC_RANGE, 0, fault);
		code = mc_table_push(t, offset[i], pfn[i], count[i], flags[i], fail);
		if (code)
			return code;
		end = offset[i] + count[i];
	}
	return MC_OK;
}

/*
 * Sorts by key: least significant digit first, so that equal keys keep their order.
 * Errors: MC_MEMORY (it needs as much memory again).
 */
int mc_sort(struct mc_ref *refs, uint64_t n, struct mc_fail *fail)
{
	enum { BITS = 11, DIGITS = 1 << BITS };
	struct mc_ref *from = refs, *to;
	uint64_t starts[DIGITS], all = 0;

	to = malloc((n ? n : 1) * sizeof(*to));
	if (!to)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	for (uint64_t i = 0; i < n; i++)
		all |= refs[i].key;
	for (int shift = 0; shift < 64 && all >> shift; shift += BITS) {
		uint64_t sum = 0;
		struct mc_ref *swap = from;

		memset(starts, 0, sizeof(starts));
		for (uint64_t i = 0; i < n; i++)
			starts[from[i].key >> shift & (DIGITS - 1)]++;
		for (int d = 0; d < DIGITS; d++) {
			uint64_t size = starts[d];

			starts[d] = sum;
			sum += size;
		}
		for (uint64_t i = 0; i < n; i++)
			to[starts[from[i].key >> shift & (DIGITS - 1)]++] = from[i];
		from = to;
		to = swap;
	}
	if (from != refs) {
		memcpy(refs, from, n * sizeof(*refs));
		to = from;
	}
	free(to);
	return MC_OK;
}

static int concat_sorted(struct mc_table *t, struct mc_table **parts, const struct mc_ref *refs, uint64_t rows,
			 struct mc_fail *fail)
{
	for (uint64_t i = 0; i < rows; i++) {
		const struct mc_table *part = parts[refs[i].more];
		uint64_t row = refs[i].value;
		int code = mc_table_append(t, 1, part->offset + row, part->pfn + row, part->count + row,
					   part->flags + row, fail);

		if (code)
			return code;
	}
	return MC_OK;
}

/*
 * Fills an empty table with the rows of n others, in whatever order they come, merging rows that continue each other.
 * Errors: MC_RANGE (page sizes differ, tables overlap), MC_MEMORY, MC_KERNEL.
 */
int mc_table_concat(struct mc_table *t, struct mc_table **parts, uint64_t n, struct mc_fail *fail)
{
	uint64_t rows = 0, at = 0;
	struct mc_ref *refs;
	int code;

	for (uint64_t i = 0; i < n; i++) {
		if (parts[i]->page_size != t->page_size)
			return mc_fail(fail, MC_RANGE, 0, "page sizes differ");
		rows += parts[i]->rows;
		if (t->pages && parts[i]->pages) {	/* the span may have gaps, so cover in two steps */
			if (parts[i]->first < t->first)
				t->first = parts[i]->first;
			if (parts[i]->end > t->end)
				t->end = parts[i]->end;
			t->pages += parts[i]->pages;
		} else if (parts[i]->pages) {
			t->first = parts[i]->first;
			t->end = parts[i]->end;
			t->pages = parts[i]->pages;
		}
	}
	if (t->pages > t->end - t->first)
		return mc_fail(fail, MC_RANGE, 0, "tables overlap");
	refs = malloc((rows ? rows : 1) * sizeof(*refs));
	if (!refs)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	for (uint64_t i = 0; i < n; i++)
		for (uint64_t row = 0; row < parts[i]->rows; row++)
			refs[at++] = (struct mc_ref){ parts[i]->offset[row], row, i };
	code = mc_sort(refs, rows, fail);
	if (!code)
		code = concat_sorted(t, parts, refs, rows, fail);
	free(refs);
	return code;
}

/*
 * Appends the rows of pages first..first+pages of another table, moved so that the first page is page `to`; of their
 * flags those in `keep` stay, and those in `add` are added. What it covers is not widened.
 * Errors: MC_RANGE (page sizes differ, behind rows that are there, beyond 2^62 pages), MC_MEMORY, MC_KERNEL.
 */
int mc_table_part(struct mc_table *t, const struct mc_table *from, uint64_t first, uint64_t pages, uint64_t to,
		  uint32_t keep, uint32_t add, struct mc_fail *fail)
{
	uint64_t end = first + pages, low = 0, high = from->rows, last = t->rows - 1;
	int code = MC_OK;

	if (from->page_size != t->page_size)
		return mc_fail(fail, MC_RANGE, 0, "page sizes differ");
	if (first > MC_MAX_PAGE || pages > MC_MAX_PAGE - first || to > MC_MAX_PAGE || pages > MC_MAX_PAGE - to)
		return mc_fail(fail, MC_RANGE, 0, "beyond 2^62 pages");
	if (t->rows && to < t->offset[last] + t->count[last])
		return mc_fail(fail, MC_RANGE, 0, "rows overlap or are out of order");
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (from->offset[middle] + from->count[middle] > first)
			high = middle;
		else
			low = middle + 1;
	}
	for (uint64_t row = low; row < from->rows && from->offset[row] < end && !code; row++) {
		uint64_t at = from->offset[row], stop = at + from->count[row];
		uint64_t skip = at < first ? first - at : 0;
		uint64_t n = (stop < end ? stop : end) - at - skip;

		code = mc_table_push(t, at + skip - first + to, from->pfn[row] + skip * mc_step(from->flags[row]),
				     (uint32_t)n, (from->flags[row] & keep) | add, fail);
	}
	return code;
}

static void unmap_columns(const struct mc_table *t)
{
	if (!t->capacity)
		return;
	munmap(t->offset, t->capacity * 8);
	munmap(t->pfn, t->capacity * 8);
	munmap(t->count, t->capacity * 4);
	munmap(t->flags, t->capacity * 4);
}

/*
 * The columns of a table that was freed, for the next scan: what scans every second would else pay for fresh memory,
 * a fault and a zeroing a page, more than for finding the rows. The kernel may take the pages meanwhile.
 */
static struct mc_table spare;
static pthread_mutex_t spare_lock = PTHREAD_MUTEX_INITIALIZER;

static void swap_spare(struct mc_table *t)
{
	struct mc_table old = spare;

	spare = (struct mc_table){
		.offset = t->offset, .pfn = t->pfn, .count = t->count, .flags = t->flags, .capacity = t->capacity,
	};
	t->offset = old.offset;
	t->pfn = old.pfn;
	t->count = old.count;
	t->flags = old.flags;
	t->capacity = old.capacity;
}

/* Gives a table without columns those of one that was freed, if there are any. */
void mc_table_recycle(struct mc_table *t)
{
	pthread_mutex_lock(&spare_lock);
	if (!t->capacity)
		swap_spare(t);
	pthread_mutex_unlock(&spare_lock);
}

/* Gives back columns of private memory, or keeps them as the spare ones if those are smaller. */
static void free_columns(struct mc_table *t)
{
	if (t->capacity && t->capacity <= MAX_SPARE) {
		madvise(t->offset, t->capacity * 8, MADV_FREE);
		madvise(t->pfn, t->capacity * 8, MADV_FREE);
		madvise(t->count, t->capacity * 4, MADV_FREE);
		madvise(t->flags, t->capacity * 4, MADV_FREE);
		pthread_mutex_lock(&spare_lock);
		if (t->capacity > spare.capacity)
			swap_spare(t);
		pthread_mutex_unlock(&spare_lock);
	}
	unmap_columns(t);
	t->capacity = 0;
}

/* Unmaps and closes everything a table holds, but not the struct itself. */
void mc_table_drop(struct mc_table *t)
{
	free_columns(t);
	if (t->map)
		munmap(t->map, t->mapped);
	if (t->fd >= 0)
		close(t->fd);
	free(t->by_pfn);
}

/* Frees a table; NULL is fine. */
void mc_table_free(struct mc_table *t)
{
	if (t)
		mc_table_drop(t);
	free(t);
}
