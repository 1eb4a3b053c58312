/* What a scan is, between its reading (pagescan.c) and its rows (runs.c). */
#ifndef MC_PAGESCAN_H
#define MC_PAGESCAN_H

#include "core.h"

/* Entry bits, fs/proc/task_mmu.c */
#define PM_FRAME ((1ULL << 55) - 1)
#define PM_SOFT_DIRTY (1ULL << 55)
#define PM_EXCLUSIVE (1ULL << 56)
#define PM_UFFD_WP (1ULL << 57)
#define PM_GUARD (1ULL << 58)
#define PM_FILE (1ULL << 61)
#define PM_SWAP (1ULL << 62)
#define PM_PRESENT (1ULL << 63)

struct mc_scan {
	struct mc_table *table;
	int pagemap;
	bool probes;		/* the kernel has PAGEMAP_SCAN */
	uint64_t mask;		/* entry bits that count: entries that agree in them make one row */
	uint64_t shift;		/* row offset = virtual page + shift */
	uint64_t page_size, huge;	/* bytes; pages in a huge page */
	struct mc_fail *fail;
};

int mc_scan_entries(struct mc_scan *s, uint64_t page, const uint64_t *entries, uint64_t n);

#endif
