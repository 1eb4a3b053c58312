// SPDX-License-Identifier: MIT
/* Questions to a table: where a page or a frame is, how a range looks from afar, what changed between two. */
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

#include "core.h"

#define MC_FEW 8	/* questions for a frame that are not worth an index */

/* The first row that ends behind `page`: the one that holds it, else the next; t->rows when there is none. */
uint64_t mc_row_at(const struct mc_table *t, uint64_t page)
{
	uint64_t low = 0, high = t->rows;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (mc_row_end(t, middle) > page)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

/* The row that holds a page, or -1. */
int64_t mc_lookup(const struct mc_table *t, uint64_t page)
{
	uint64_t row = mc_row_at(t, page);

	return row < t->rows && t->offset[row] <= page ? (int64_t)row : -1;
}

/* The *n present rows in order of their frame (key), with their row (value), into *out, which the caller frees. */
static int sort_frames(const struct mc_table *t, struct mc_ref **out, uint64_t *n, struct mc_fail *fail)
{
	struct mc_ref *refs = malloc((t->rows ? t->rows : 1) * sizeof(*refs));
	int code;

	*n = 0;
	if (!refs)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	for (uint64_t row = 0; row < t->rows; row++)
		if (t->flags[row] & MC_PRESENT)
			refs[(*n)++] = (struct mc_ref){ t->pfn[row], row, 0 };
	code = mc_sort(refs, *n, fail);
	if (code)
		free(refs);
	else
		*out = refs;
	return code;
}

/* Rows by frame, with the largest end of this and all before (more). */
static int index_frames(struct mc_table *t, struct mc_fail *fail)
{
	struct mc_ref *refs;
	uint64_t n, most = 0;
	int code = sort_frames(t, &refs, &n, fail);

	if (code)
		return code;
	for (uint64_t i = 0; i < n; i++) {
		uint64_t end = refs[i].key + t->count[refs[i].value];

		if (end > most)
			most = end;
		refs[i].more = most;
	}
	t->by_pfn = refs;
	t->frames = n;
	return MC_OK;
}

/* The lowest page in frame pfn, from a look at every row; UINT64_MAX when there is none. */
static uint64_t find_frame(const struct mc_table *t, uint64_t pfn)
{
	for (uint64_t row = 0; row < t->rows; row++)
		if (pfn - t->pfn[row] < t->count[row] && t->flags[row] & MC_PRESENT)
			return t->offset[row] + (pfn - t->pfn[row]);
	return UINT64_MAX;
}

/*
 * The lowest page in frame pfn into *page, or UINT64_MAX when no present page is. After the first few calls, of which
 * each looks at all rows, they are sorted by frame (24 bytes a row are kept, 48 are needed meanwhile); not to be called
 * by two threads at once.
 * Errors: MC_MEMORY.
 */
int mc_lookup_pfn(struct mc_table *t, uint64_t pfn, uint64_t *page, struct mc_fail *fail)
{
	uint64_t low = 0, high;

	*page = UINT64_MAX;
	if (!t->by_pfn && t->frames < MC_FEW) {
		t->frames++;
		*page = find_frame(t, pfn);
		return MC_OK;
	}
	if (!t->by_pfn) {
		int code = index_frames(t, fail);

		if (code)
			return code;
	}
	high = t->frames;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (t->by_pfn[middle].key > pfn)
			high = middle;
		else
			low = middle + 1;
	}
	/* a frame may be mapped several times: look back while anything before still reaches it */
	while (low-- && t->by_pfn[low].more > pfn) {
		uint64_t row = t->by_pfn[low].value, into = pfn - t->by_pfn[low].key;

		if (into < t->count[row] && t->offset[row] + into < *page)
			*page = t->offset[row] + into;
	}
	return MC_OK;
}

/*
 * Fills an empty table with the present rows of another, turned round: offset is the frame, pfn the page in it. Of
 * several pages in one frame one is kept. Errors: MC_RANGE (a page beyond 55 bits), MC_MEMORY, MC_KERNEL.
 */
int mc_table_by_frame(struct mc_table *t, const struct mc_table *from, struct mc_fail *fail)
{
	struct mc_ref *refs;
	uint64_t n, end = 0;
	int code = sort_frames(from, &refs, &n, fail);

	if (code)
		return code;
	for (uint64_t i = 0; i < n && !code; i++) {
		uint64_t row = refs[i].value, frame = refs[i].key, stop = frame + from->count[row];
		uint64_t skip = frame < end ? end - frame : 0;

		if (mc_row_end(from, row) > 1ULL << 55)
			code = mc_fail(fail, MC_RANGE, 0, "a page is beyond 55 bits");
		else if (stop > end)
			code = mc_table_push(t, frame + skip, from->offset[row] + skip, (uint32_t)(stop - frame - skip),
					     MC_PRESENT, fail);
		if (stop > end)
			end = stop;
	}
	if (n && !code)
		code = mc_table_cover(t, refs[0].key, end - refs[0].key, fail);
	free(refs);
	return code;
}

/*
 * Counts the pages of first..first+pages into `cells` equal cells (cell i begins at first + pages * i / cells):
 * present, swapped and huge pages, and how many rows touch the cell. With more cells than pages some are empty.
 * Errors: MC_RANGE (no cells, more than 2^62 pages).
 */
int mc_bin(const struct mc_table *t, uint64_t first, uint64_t pages, uint64_t cells, uint64_t *present,
	   uint64_t *swapped, uint64_t *huge, uint64_t *runs, struct mc_fail *fail)
{
	uint64_t row, from = first;

	if (!cells || pages > 1ULL << 62 || first > 1ULL << 62)
		return mc_fail(fail, MC_RANGE, 0, "no cells, or beyond 2^62 pages");
	memset(present, 0, cells * 8);
	memset(swapped, 0, cells * 8);
	memset(huge, 0, cells * 8);
	memset(runs, 0, cells * 8);
	row = mc_row_at(t, first);
	for (uint64_t cell = 0; cell < cells; cell++) {
		uint64_t to = first + (uint64_t)((unsigned __int128)pages * (cell + 1) / cells);

		for (; row < t->rows && t->offset[row] < to; row++) {
			uint64_t end = mc_row_end(t, row), begin = t->offset[row] > from ? t->offset[row] : from;
			uint64_t n = (end < to ? end : to) - begin;

			if (begin < to) {
				present[cell] += t->flags[row] & MC_PRESENT ? n : 0;
				swapped[cell] += t->flags[row] & MC_SWAP ? n : 0;
				huge[cell] += t->flags[row] & MC_HUGE ? n : 0;
				runs[cell]++;
			}
			if (end > to)
				break;
		}
		from = to;
	}
	return MC_OK;
}

/* The part of a table not yet compared: the row, and where in it we stand. */
struct cursor {
	const struct mc_table *table;
	uint64_t row, at;
};

static bool ended(const struct cursor *c)
{
	return c->row == c->table->rows;
}

static uint64_t start_of(const struct cursor *c)
{
	uint64_t offset;

	if (ended(c))
		return UINT64_MAX;
	offset = c->table->offset[c->row];
	return offset > c->at ? offset : c->at;
}

static void advance(struct cursor *c, uint64_t to)
{
	c->at = to;
	while (!ended(c) && mc_row_end(c->table, c->row) <= to)
		c->row++;
}

/* Frame and flags of page `at` into *pfn and *flags (0 when it has no row); returns how far that holds. */
static uint64_t seen(const struct cursor *c, uint64_t at, uint64_t *pfn, uint32_t *flags)
{
	uint64_t start = start_of(c);

	*pfn = *flags = 0;
	if (at < start)
		return start;
	*flags = c->table->flags[c->row];
	*pfn = c->table->pfn[c->row] + (at - c->table->offset[c->row]) * mc_step(*flags);
	return mc_row_end(c->table, c->row);
}

/* Whether b goes on where a ends, on both sides. */
static bool continues(const struct mc_change *a, const struct mc_change *b)
{
	return a->offset + a->count == b->offset && a->old_flags == b->old_flags && a->new_flags == b->new_flags &&
	       (!a->old_flags || a->old_pfn + a->count * mc_step(a->old_flags) == b->old_pfn) &&
	       (!a->new_flags || a->new_pfn + a->count * mc_step(a->new_flags) == b->new_pfn);
}

/* Takes a range that two tables see differently, in order of offset. */
typedef int take_change(void *to, struct mc_change change, struct mc_fail *fail);

static int add_change(void *to, struct mc_change change, struct mc_fail *fail)
{
	struct mc_changes *out = to;

	out->pages += change.count;
	if (out->rows && continues(&out->change[out->rows - 1], &change)) {
		out->change[out->rows - 1].count += change.count;
		return MC_OK;
	}
	if (out->rows == out->capacity) {
		uint64_t capacity = out->capacity ? out->capacity * 2 : 64;
		struct mc_change *grown = realloc(out->change, capacity * sizeof(*grown));

		if (!grown)
			return mc_fail(fail, MC_MEMORY, ENOMEM, "realloc");
		out->change = grown;
		out->capacity = capacity;
	}
	out->change[out->rows++] = change;
	return MC_OK;
}

static int differ(const struct mc_table *old, const struct mc_table *new, take_change *take, void *to_whom,
		  struct mc_fail *fail)
{
	struct cursor a = { old, 0, 0 }, b = { new, 0, 0 };

	if (old->page_size != new->page_size)
		return mc_fail(fail, MC_RANGE, 0, "page sizes differ");
	while (!ended(&a) || !ended(&b)) {
		uint64_t from = start_of(&a) < start_of(&b) ? start_of(&a) : start_of(&b), to, other;
		struct mc_change change = { .offset = from };

		to = seen(&a, from, &change.old_pfn, &change.old_flags);
		other = seen(&b, from, &change.new_pfn, &change.new_flags);
		if (other < to)
			to = other;
		change.count = to - from;
		if (change.old_pfn != change.new_pfn || change.old_flags != change.new_flags) {
			int code = take(to_whom, change, fail);

			if (code)
				return code;
		}
		advance(&a, to);
		advance(&b, to);
	}
	return MC_OK;
}

/*
 * The page ranges that two tables of one space see differently, in order of offset, into *out (empty at first;
 * free it with mc_changes_free even after an error). Errors: MC_RANGE (page sizes differ), MC_MEMORY.
 */
int mc_diff(const struct mc_table *old, const struct mc_table *new, struct mc_changes *out, struct mc_fail *fail)
{
	return differ(old, new, add_change, out, fail);
}

/* Ranges in which changes are counted, the one we stand in or before, and where those between them go. */
struct counting {
	const uint64_t *ranges;
	uint64_t n, at;
	struct mc_tally *tallies;
	struct mc_changes *outside;
};

static void count_change(struct mc_tally *tally, const struct mc_change *change, uint64_t pages)
{
	if (!change->new_flags)
		tally->vanished += pages;
	else if (!change->old_flags || change->old_pfn != change->new_pfn)
		tally->moved += pages;
	else if (change->new_flags & ~change->old_flags & MC_WRITE)
		tally->widened += pages;
}

static int tally_change(void *to, struct mc_change change, struct mc_fail *fail)
{
	struct counting *c = to;
	int code = MC_OK;

	while (change.count && !code) {
		struct mc_change part = change;
		const uint64_t *range;

		while (c->at < c->n && c->ranges[2 * c->at + 1] <= change.offset)
			c->at++;
		range = c->at < c->n ? c->ranges + 2 * c->at : NULL;
		if (range && range[0] <= change.offset) {
			if (part.count > range[1] - change.offset)
				part.count = range[1] - change.offset;
			count_change(c->tallies + c->at, &change, part.count);
		} else {
			if (range && part.count > range[0] - change.offset)
				part.count = range[0] - change.offset;
			code = add_change(c->outside, part, fail);
		}
		change.offset += part.count;
		change.count -= part.count;
		change.old_pfn += change.old_flags ? part.count * mc_step(change.old_flags) : 0;
		change.new_pfn += change.new_flags ? part.count * mc_step(change.new_flags) : 0;
	}
	return code;
}

/*
 * Counts what two tables of one space see differently in each of n page ranges (first, end; in order, apart) into
 * tallies, which are zero at first; what lies in none of them goes to *outside, as mc_diff has it.
 * Errors: MC_RANGE (page sizes differ, ranges overlap or are out of order), MC_MEMORY.
 */
int mc_diff_count(const struct mc_table *old, const struct mc_table *new, const uint64_t *ranges, uint64_t n,
		  struct mc_tally *tallies, struct mc_changes *outside, struct mc_fail *fail)
{
	struct counting counting = { ranges, n, 0, tallies, outside };

	for (uint64_t i = 0; i < n; i++)
		if (ranges[2 * i] > ranges[2 * i + 1] || (i && ranges[2 * i] < ranges[2 * i - 1]))
			return mc_fail(fail, MC_RANGE, 0, "ranges overlap or are out of order");
	return differ(old, new, tally_change, &counting, fail);
}

void mc_changes_free(struct mc_changes *changes)
{
	free(changes->change);
	memset(changes, 0, sizeof(*changes));
}

/* Counts pages by kind. */
void mc_stats(const struct mc_table *t, struct mc_stats *stats)
{
	memset(stats, 0, sizeof(*stats));
	for (uint64_t row = 0; row < t->rows; row++) {
		stats->present += t->flags[row] & MC_PRESENT ? t->count[row] : 0;
		stats->swapped += t->flags[row] & MC_SWAP ? t->count[row] : 0;
		stats->huge += t->flags[row] & MC_HUGE ? t->count[row] : 0;
	}
}

/*
 * The xxh3-128 (16 bytes, canonical) of where every present page is: u64 offset, pfn, count of each run of
 * consecutive frames. Flags do not count, nor where they split a run: the same placement, the same digest.
 */
void mc_placement(const struct mc_table *t, uint8_t *digest)
{
	XXH3_state_t *state = XXH3_createState();
	XXH128_canonical_t canonical;
	uint64_t run[3] = { 0, 0, 0 };

	if (!state)
		abort(); /* xxhash asks for 576 bytes */
	XXH3_128bits_reset(state);
	for (uint64_t row = 0; row < t->rows; row++) {
		if (!(t->flags[row] & MC_PRESENT))
			continue;
		if (run[0] + run[2] == t->offset[row] && run[1] + run[2] == t->pfn[row] && run[2]) {
			run[2] += t->count[row];
			continue;
		}
		if (run[2])
			XXH3_128bits_update(state, run, sizeof(run));
		run[0] = t->offset[row];
		run[1] = t->pfn[row];
		run[2] = t->count[row];
	}
	if (run[2])
		XXH3_128bits_update(state, run, sizeof(run));
	XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state));
	XXH3_freeState(state);
	memcpy(digest, canonical.digest, sizeof(canonical.digest));
}
