// SPDX-License-Identifier: MIT
/*
 * Labelled tables: what a page is to a reader (whose it is, on which node, who reaches it) as a number in the upper
 * bits of its row's flags. They are made for a picture and never leave the process: mc_row_fault refuses such flags.
 */
#include <string.h>

#include "core.h"

#define LABELS 0xffff0000U

/* Appends the part begin..end of a row of another table, with flags of its own. */
static int push_part(struct mc_table *t, const struct mc_table *from, uint64_t row, uint64_t begin, uint64_t end,
		     uint32_t flags, struct mc_fail *fail)
{
	uint64_t pfn = from->pfn[row] + (begin - from->offset[row]) * mc_step(from->flags[row]);

	return mc_table_push(t, begin, pfn, (uint32_t)(end - begin), flags, fail);
}

/* Appends what rows of `under` from *row on hold between the pages at and end; *row is then the first that goes on. */
static int push_gap(struct mc_table *t, const struct mc_table *under, uint64_t *row, uint64_t at, uint64_t end,
		    struct mc_fail *fail)
{
	while (*row < under->rows && under->offset[*row] < end) {
		uint64_t begin = under->offset[*row] > at ? under->offset[*row] : at;
		uint64_t stop = mc_row_end(under, *row) < end ? mc_row_end(under, *row) : end;

		if (begin < stop) {
			int code = push_part(t, under, *row, begin, stop, under->flags[*row], fail);

			if (code)
				return code;
		}
		if (mc_row_end(under, *row) > end)
			break;
		++*row;
	}
	return MC_OK;
}

/*
 * Fills an empty table with the rows of `over`, and with those of `under` where `over` has none; it covers from the
 * first page to the last that either covers. Errors: MC_RANGE (page sizes differ), MC_MEMORY, MC_KERNEL.
 */
int mc_table_overlay(struct mc_table *t, const struct mc_table *under, const struct mc_table *over,
		     struct mc_fail *fail)
{
	uint64_t first = under->first, end = under->end, below = 0, at = 0;
	int code = MC_OK;

	if (under->page_size != t->page_size || over->page_size != t->page_size)
		return mc_fail(fail, MC_RANGE, 0, "page sizes differ");
	if (over->pages && (!under->pages || over->first < first))
		first = over->first;
	if (over->pages && (!under->pages || over->end > end))
		end = over->end;
	for (uint64_t row = 0; row < over->rows && !code; row++) {
		code = push_gap(t, under, &below, at, over->offset[row], fail);
		at = mc_row_end(over, row);
		if (!code)
			code = push_part(t, over, row, over->offset[row], at, over->flags[row], fail);
	}
	if (!code)
		code = push_gap(t, under, &below, at, UINT64_MAX, fail);
	return code ? code : mc_table_cover(t, first, end - first, fail);
}

/*
 * Fills an empty table with the present rows of another, each frame with the label that `frames` (by frame) has for
 * it, 0 where it has none. Errors: MC_RANGE (page sizes differ), MC_MEMORY, MC_KERNEL.
 */
int mc_table_label(struct mc_table *t, const struct mc_table *from, const struct mc_table *frames,
		   struct mc_fail *fail)
{
	int code = MC_OK;

	if (from->page_size != t->page_size || frames->page_size != t->page_size)
		return mc_fail(fail, MC_RANGE, 0, "page sizes differ");
	for (uint64_t row = 0; row < from->rows && !code; row++) {
		uint64_t at = from->offset[row], end = mc_row_end(from, row), frame = from->pfn[row];
		uint64_t there = mc_row_at(frames, frame);

		if (!(from->flags[row] & MC_PRESENT))
			continue;
		while (at < end && !code) {
			uint64_t left = end - at;
			uint32_t label = 0;

			while (there < frames->rows && mc_row_end(frames, there) <= frame)
				there++;
			if (there < frames->rows && frames->offset[there] <= frame) {
				label = frames->flags[there] & LABELS;
				if (mc_row_end(frames, there) - frame < left)
					left = mc_row_end(frames, there) - frame;
			} else if (there < frames->rows && frames->offset[there] - frame < left) {
				left = frames->offset[there] - frame;
			}
			code = push_part(t, from, row, at, at + left, (from->flags[row] & ~LABELS) | label, fail);
			at += left;
			frame += left;
		}
	}
	return code ? code : mc_table_cover(t, from->first, from->end - from->first, fail);
}

/*
 * Fills an empty table with the present rows of another, labelled 2 where they have a flag of `mask`, else 1.
 * Errors: MC_RANGE (page sizes differ), MC_MEMORY, MC_KERNEL.
 */
int mc_table_flagged(struct mc_table *t, const struct mc_table *from, uint32_t mask, struct mc_fail *fail)
{
	int code = MC_OK;

	if (from->page_size != t->page_size)
		return mc_fail(fail, MC_RANGE, 0, "page sizes differ");
	for (uint64_t row = 0; row < from->rows && !code; row++) {
		uint32_t label = from->flags[row] & mask ? 2 : 1;

		if (from->flags[row] & MC_PRESENT)
			code = push_part(t, from, row, from->offset[row], mc_row_end(from, row),
					 MC_PRESENT | label << MC_LABEL_SHIFT, fail);
	}
	return code ? code : mc_table_cover(t, from->first, from->end - from->first, fail);
}

#define LOOKS 64

/* Of pages counted by look the look of the cell: the most frequent of those that shout, else of all but 0, else 0. */
static uint8_t chosen(const uint64_t *counts, uint64_t loud)
{
	uint8_t best = 0;

	for (uint8_t look = 1; look < LOOKS; look++) {
		bool shouts = loud >> look & 1, before = best && loud >> best & 1;

		if (counts[look] && (!best || (shouts && !before) ||
				     (shouts == before && counts[look] > counts[best])))
			best = look;
	}
	return best;
}

/*
 * The look of each of `cells` equal cells of first..first+pages (as mc_bin divides them), and how many of its pages
 * have it. looks maps the labels below `labels` to one of 64 looks; a page without a row has look 0, and so has one of
 * a label beyond. A look whose bit is in `loud` stands for its cell with a single page.
 * Errors: MC_RANGE (no cells, beyond 2^62 pages, a look beyond 63).
 */
int mc_bin_labels(const struct mc_table *t, uint64_t first, uint64_t pages, uint64_t cells, const uint8_t *looks,
		  uint32_t labels, uint64_t loud, uint8_t *look, uint64_t *most, struct mc_fail *fail)
{
	uint64_t row, from = first, counts[LOOKS];

	if (!cells || pages > MC_MAX_PAGE || first > MC_MAX_PAGE)
		return mc_fail(fail, MC_RANGE, 0, "no cells, or beyond 2^62 pages");
	for (uint32_t label = 0; label < labels; label++)
		if (looks[label] >= LOOKS)
			return mc_fail(fail, MC_RANGE, 0, "a look beyond 63");
	row = mc_row_at(t, first);
	for (uint64_t cell = 0; cell < cells; cell++) {
		uint64_t to = first + (uint64_t)((unsigned __int128)pages * (cell + 1) / cells), held = 0;

		memset(counts, 0, sizeof(counts));
		for (; row < t->rows && t->offset[row] < to; row++) {
			uint64_t begin = t->offset[row] > from ? t->offset[row] : from, end = mc_row_end(t, row);
			uint32_t label = t->flags[row] >> MC_LABEL_SHIFT;

			if (begin < to) {
				counts[label < labels ? looks[label] : 0] += (end < to ? end : to) - begin;
				held += (end < to ? end : to) - begin;
			}
			if (end > to)
				break;
		}
		counts[0] += to - from - held;
		look[cell] = chosen(counts, loud);
		most[cell] = counts[look[cell]];
		from = to;
	}
	return MC_OK;
}
