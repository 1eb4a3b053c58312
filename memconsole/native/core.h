/* What the C sources of the native core share; the declarations themselves stand in core.cdef. */
#ifndef MC_CORE_H
#define MC_CORE_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core.cdef"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tables are little-endian and used in place");

#define MC_MAX_PAGE (1ULL << 62)
#define MC_MAX_ROWS (1ULL << 56)

/* A row to be sorted by key; what `more` holds is its user's affair. */
struct mc_ref {
	uint64_t key;
	uint64_t value;
	uint64_t more;
};

static inline int mc_fail(struct mc_fail *fail, int code, int err, const char *source)
{
	fail->err = err;
	fail->source = source;
	return code;
}

/* MC_KERNEL with the present errno, or MC_MEMORY where that is what errno says. */
static inline int mc_fail_errno(struct mc_fail *fail, const char *source)
{
	return mc_fail(fail, errno == ENOMEM ? MC_MEMORY : MC_KERNEL, errno, source);
}

/* What the pfn column grows by from one page to the next: swap slots are kept as type + offset * 32. */
static inline uint64_t mc_step(uint32_t flags)
{
	return flags & MC_SWAP ? 32 : 1;
}

/* The page behind a row's last one. */
static inline uint64_t mc_row_end(const struct mc_table *t, uint64_t row)
{
	return t->offset[row] + t->count[row];
}

const char *mc_row_fault(const struct mc_table *table, uint64_t end, uint64_t offset, uint64_t pfn, uint32_t count,
			 uint32_t flags);
int mc_table_reserve(struct mc_table *table, uint64_t rows, struct mc_fail *fail);
void mc_table_recycle(struct mc_table *table);
void mc_table_drop(struct mc_table *table);
int mc_table_take(struct mc_table *table, struct mc_table *from, struct mc_fail *fail);
uint64_t mc_row_at(const struct mc_table *table, uint64_t page);
int mc_sort(struct mc_ref *refs, uint64_t n, struct mc_fail *fail);

/*
 * Appends a row behind the last one, or widens the last one where the new row continues it (next page, next
 * frame, same flags). The caller keeps rows sorted and inside what the table covers.
 */
static inline int mc_table_push(struct mc_table *t, uint64_t offset, uint64_t pfn, uint32_t count, uint32_t flags,
				struct mc_fail *fail)
{
	if (!count) /* a row of no pages says nothing, and is not accepted back */
		return MC_OK;
	if (t->rows) {
		uint64_t last = t->rows - 1;
		uint64_t n = t->count[last];

		if (t->flags[last] == flags && t->offset[last] + n == offset &&
		    t->pfn[last] + n * mc_step(flags) == pfn && n + count <= UINT32_MAX) {
			t->count[last] = (uint32_t)(n + count);
			return MC_OK;
		}
	}
	if (t->rows == t->capacity) {
		int code = mc_table_reserve(t, t->rows + 1, fail);

		if (code)
			return code;
	}
	t->offset[t->rows] = offset;
	t->pfn[t->rows] = pfn;
	t->count[t->rows] = count;
	t->flags[t->rows] = flags;
	t->rows++;
	return MC_OK;
}

#endif
