// SPDX-License-Identifier: MIT
/*
 * Runs of pagemap entries that continue each other, and the rows they become. Where runs begin is found 64 entries at
 * a time as a bit mask, because on a used host a run has a handful of pages and a branch for each would be mispredicted.
 */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <linux/types.h>
#include <sys/ioctl.h>

#include "core.h"
#include "pagescan.h"

#define SWAP_TYPE_MARKER 31	/* include/linux/swap.h: SWP_PTE_MARKER, a note in the page table, not a slot */
#define BLOCK 64		/* entries looked at together: bits of a mask */

/* include/uapi/linux/fs.h since 6.7; not in older headers */
struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_HUGE (1 << 6)

/*
 * Bit i is set where entry i does not continue entry i - 1: not the next frame or slot with the same flags, and not
 * an absent page behind an absent one. Reads entries -1..BLOCK.
 */
static uint64_t breaks_base(const uint64_t *entries, uint64_t mask)
{
	uint64_t breaks = 0;

	for (int i = 0; i < BLOCK; i++) {
		uint64_t before = entries[i - 1] & mask;
		uint64_t step = before >> 63 | (before >> 57 & 32);	/* PM_PRESENT: 1, PM_SWAP: 32, neither: 0 */

		breaks |= (uint64_t)((entries[i] & mask) != before + step) << i;
	}
	return breaks;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static uint64_t breaks_avx2(const uint64_t *entries, uint64_t mask)
{
	const __m256i masks = _mm256_set1_epi64x((long long)mask), swap_step = _mm256_set1_epi64x(32);
	uint64_t same = 0;

	for (int i = 0; i < BLOCK; i += 4) {
		__m256i entry = _mm256_and_si256(_mm256_loadu_si256((const void *)(entries + i)), masks);
		__m256i before = _mm256_and_si256(_mm256_loadu_si256((const void *)(entries + i - 1)), masks);
		__m256i step = _mm256_or_si256(_mm256_srli_epi64(before, 63),
					       _mm256_and_si256(_mm256_srli_epi64(before, 57), swap_step));
		__m256i equal = _mm256_cmpeq_epi64(entry, _mm256_add_epi64(before, step));

		same |= (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(equal)) << i;
	}
	return ~same;
}
#endif

static uint64_t breaks(const uint64_t *entries, uint64_t mask)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("avx2"))
		return breaks_avx2(entries, mask);
#endif
	return breaks_base(entries, mask);
}

/* The flags of a row, each one the entry's bit moved to where core.cdef wants it. */
static inline uint32_t row_flags(uint64_t entry)
{
	return (uint32_t)((entry >> 63 & MC_PRESENT) | (entry >> 61 & MC_SWAP) | (entry >> 59 & MC_FILE) |
			  (entry >> 53 & MC_EXCLUSIVE) | (entry >> 51 & MC_SOFT_DIRTY) | (entry >> 52 & MC_UFFD_WP));
}

/* How many of n pages from page on are mapped huge, counted from the first; 0 where the kernel cannot say. */
static uint64_t huge_pages(struct mc_scan *s, uint64_t page, uint64_t n)
{
	struct page_region region = { 0 };
	struct pm_scan_arg arg = {
		.size = sizeof(arg), .start = page * s->page_size, .end = (page + n) * s->page_size,
		.vec = (uintptr_t)&region, .vec_len = 1, .category_mask = PAGE_IS_HUGE, .return_mask = PAGE_IS_HUGE,
	};
	int got = ioctl(s->pagemap, PAGEMAP_SCAN, &arg);

	if (got < 0 && (errno == ENOTTY || errno == EINVAL))
		s->probes = false;
	if (got < 1 || region.start != arg.start)
		return 0;
	return (region.end - region.start) / s->page_size;
}

/*
 * Emits a present run that holds whole aligned huge pages' worth of frames. Whether it is mapped huge is asked of
 * one page at a time, and of twice as much after each yes: a yes costs the kernel one step a huge page, but asking
 * about small pages costs as much as reading them.
 */
static int emit_candidates(struct mc_scan *s, uint64_t page, uint64_t pfn, uint64_t n, uint32_t flags)
{
	uint64_t ask = 1;

	while (n >= s->huge && s->probes) {
		uint64_t whole = n - n % s->huge, asked = ask < whole ? ask : whole;
		uint64_t yes = huge_pages(s, page, asked), done = yes;
		int code;

		if (yes)	/* one page of a huge page speaks for all of it */
			done = (yes + s->huge - 1) / s->huge * s->huge;
		ask = yes == asked ? (ask < s->huge ? s->huge : ask * 2) : 1;
		if (!yes)
			done = s->huge;
		code = mc_table_push(s->table, page + s->shift, pfn, (uint32_t)done, flags | (yes ? MC_HUGE : 0),
				     s->fail);
		if (code)
			return code;
		page += done;
		pfn += done;
		n -= done;
	}
	return n ? mc_table_push(s->table, page + s->shift, pfn, (uint32_t)n, flags, s->fail) : MC_OK;
}

/* Emits n pages from `page` on, of which the first has this entry and the others continue it. */
static int emit(struct mc_scan *s, uint64_t page, uint64_t entry, uint64_t n)
{
	uint64_t pfn = entry & PM_FRAME, before = -page & (s->huge - 1);
	uint32_t flags = row_flags(entry);
	int code;

	if (!(entry & (PM_PRESENT | PM_SWAP)) || entry & PM_GUARD)
		return MC_OK;
	if (!pfn)
		return mc_fail(s->fail, MC_DENIED, 0, "pagemap");
	if (flags & MC_SWAP && (pfn & 31) == SWAP_TYPE_MARKER)
		return MC_OK;
	if (flags & MC_SWAP || n < s->huge || n - s->huge < before || (pfn + before) & (s->huge - 1))
		return mc_table_push(s->table, page + s->shift, pfn, (uint32_t)n, flags, s->fail);
	if (before) {
		code = mc_table_push(s->table, page + s->shift, pfn, (uint32_t)before, flags, s->fail);
		if (code)
			return code;
	}
	return emit_candidates(s, page + before, pfn + before, n - before, flags);
}

/* Room for the rows of a block that `append` fills in without looking. */
static int make_room(struct mc_scan *s)
{
	struct mc_table *t = s->table;

	return t->capacity - t->rows > BLOCK ? MC_OK : mc_table_reserve(t, t->rows + BLOCK + 1, s->fail);
}

/* Whether a run may need more than to be appended as it is: absent pages and short runs of frames do not. */
static inline bool is_special(const struct mc_scan *s, uint64_t entry, uint64_t n)
{
	return (entry & (PM_PRESENT | PM_FRAME)) == PM_PRESENT || entry & PM_SWAP || n >= s->huge;
}

/* Appends a run that is not special and does not continue the last row; of absent pages, no row. */
static inline void append(struct mc_scan *s, uint64_t page, uint64_t entry, uint64_t n)
{
	struct mc_table *t = s->table;

	t->offset[t->rows] = page + s->shift;
	t->pfn[t->rows] = entry & PM_FRAME;
	t->count[t->rows] = (uint32_t)n;
	t->flags[t->rows] = row_flags(entry);
	t->rows += entry >> 63;	/* PM_PRESENT */
}

/*
 * Appends the rows of n entries of pages page, page + 1...; entries[-1] and those up to the next multiple of BLOCK
 * behind them must be readable, whatever they are.
 * Errors: MC_DENIED (frames hidden), MC_MEMORY, MC_KERNEL.
 */
int mc_scan_entries(struct mc_scan *s, uint64_t page, const uint64_t *entries, uint64_t n)
{
	uint64_t from = 0;	/* where the run began that is not yet ended */
	int code = make_room(s);

	for (uint64_t block = 0; block < n && !code; block += BLOCK) {
		uint64_t ends = breaks(entries + block, s->mask);

		if (!block)
			ends &= ~1ULL;	/* a beginning only */
		if (n - block < BLOCK)
			ends &= (1ULL << (n - block)) - 1;
		for (; ends && !code; ends &= ends - 1) {
			uint64_t entry = entries[from] & s->mask, end = block + (uint64_t)__builtin_ctzll(ends);

			if (!from || is_special(s, entry, end - from)) {
				code = emit(s, page + from, entry, end - from);
				if (!code)
					code = make_room(s);
			} else {
				append(s, page + from, entry, end - from);
			}
			from = end;
		}
		if (!code)
			code = make_room(s);
	}
	return code || !n ? code : emit(s, page + from, entries[from] & s->mask, n - from);
}
