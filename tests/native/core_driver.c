// SPDX-License-Identifier: MIT
/*
 * Drives the native core under sanitizers: core_driver ROUNDS SEED. Loads mutations of a table, by bytes and by fd,
 * and puts every question to those that pass; parses spoiled dumps of page tables; scans this process by several threads; digests a file with holes.
 * Exit status 0, or 1 with the line that failed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
#include "xxh.h"

#define CHECK(condition)                                                                              \
	do {                                                                                          \
		if (!(condition)) {                                                                   \
			fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, fail.source);     \
			exit(1);                                                                      \
		}                                                                                     \
	} while (0)

#define HEADER 64
#define CHECKSUM 48	/* where it stands */

static struct mc_fail fail = { 0, "" };
static uint64_t state;

static uint64_t any(uint64_t below)
{
	state = state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (state >> 24) % below;
}

static struct mc_table *random_table(uint64_t rows)
{
	struct mc_table *t, *sealed;
	uint64_t page = any(100);

	CHECK(!mc_table_new(&t, 4096, &fail));
	CHECK(!mc_table_cover(t, 0, 1000 * (rows + 1), &fail));
	for (uint64_t i = 0; i < rows; i++) {
		uint64_t pfn = 1 + any(5000);
		uint32_t count = 1 + (uint32_t)any(200), flags = any(5) ? MC_PRESENT : MC_SWAP;

		CHECK(!mc_table_append(t, 1, &page, &pfn, &count, &flags, &fail));
		page += count + any(300);
	}
	CHECK(!mc_table_seal(&sealed, t, &fail));
	mc_table_free(t);
	return sealed;
}

/* A part of a table that is moved and moved back is the part. */
static void ask_for_a_part(const struct mc_table *t)
{
	struct mc_table *there, *back;
	uint64_t first = t->first + any(t->end - t->first + 1), to = any(1 << 20), held = 0, pages = any(5000);

	CHECK(!mc_table_new(&there, t->page_size, &fail) && !mc_table_new(&back, t->page_size, &fail));
	CHECK(!mc_table_part(there, t, first, pages, to, ~0U, 0, &fail));
	CHECK(!mc_table_part(back, there, to, pages, first, ~0U, 0, &fail));
	for (uint64_t i = 0; i < back->rows; i++) {
		int64_t row = mc_lookup(t, back->offset[i]);

		CHECK(row >= 0 && back->offset[i] >= first && back->offset[i] + back->count[i] <= first + pages);
		CHECK(back->pfn[i] == t->pfn[row] + (back->offset[i] - t->offset[row]) *
		      (t->flags[row] & MC_SWAP ? 32 : 1) && back->flags[i] == t->flags[row]);
		held += back->count[i];
	}
	CHECK(there->rows == back->rows && held <= pages);
	mc_table_free(there);
	mc_table_free(back);
}

/* Of two tables laid over each other every page is one of theirs, and labels of its frames do not change where it is. */
static void ask_for_labels(const struct mc_table *t, const struct mc_table *other)
{
	struct mc_table *both, *marked;
	uint8_t looks[3] = { 0, 1, 63 }, look[40];
	uint64_t most[40], cells = 1 + any(40);

	CHECK(!mc_table_new(&both, t->page_size, &fail) && !mc_table_new(&marked, t->page_size, &fail));
	CHECK(!mc_table_overlay(both, t, other, &fail));
	for (uint64_t i = 0; i < both->rows; i++) {
		int64_t over = mc_lookup(other, both->offset[i]), under = mc_lookup(t, both->offset[i]);
		const struct mc_table *from = over >= 0 ? other : t;
		int64_t row = over >= 0 ? over : under;

		CHECK(row >= 0 && both->flags[i] == from->flags[row]);
		CHECK(both->pfn[i] == from->pfn[row] + (both->offset[i] - from->offset[row]) * mc_step(from->flags[row]));
	}
	CHECK(!mc_table_flagged(marked, both, MC_HUGE, &fail) && marked->rows <= both->rows);
	mc_table_free(marked);
	CHECK(!mc_table_new(&marked, t->page_size, &fail));
	CHECK(!mc_table_label(marked, both, other, &fail));
	for (uint64_t i = 0; i < marked->rows; i++)
		CHECK(marked->flags[i] & MC_PRESENT && mc_lookup(both, marked->offset[i]) >= 0);
	CHECK(!mc_bin_labels(both, any(1000), any(1 << 20), cells, looks, 1 + (uint32_t)any(3), any(4), look, most, &fail));
	for (uint64_t i = 0; i < cells; i++)
		CHECK(look[i] == 0 || look[i] == 1 || look[i] == 63);
	mc_table_free(both);
	mc_table_free(marked);
}

/* What is counted in ranges and what lies outside of them is together what differs at most. */
static void ask_for_counts(const struct mc_table *t, const struct mc_table *other, uint64_t pages)
{
	struct mc_tally tallies[3] = { 0 };
	struct mc_changes outside = { 0 };
	uint64_t ranges[6], at = t->first, sum;

	for (int i = 0; i < 6; i++)
		ranges[i] = at += any(200);
	CHECK(!mc_diff_count(t, other, ranges, 3, tallies, &outside, &fail));
	sum = outside.pages;
	for (int i = 0; i < 3; i++)
		sum += tallies[i].vanished + tallies[i].moved + tallies[i].widened;
	CHECK(sum <= pages);
	mc_changes_free(&outside);
}

/* Every frame of a table turned round leads to a page that is in it. */
static void ask_by_frame(const struct mc_table *t, uint64_t present)
{
	struct mc_table *turned;
	uint64_t held = 0;
	bool done;

	CHECK(!mc_table_new(&turned, t->page_size, &fail));
	done = !mc_table_by_frame(turned, t, &fail);
	CHECK(done || t->end > 1ULL << 55);
	for (uint64_t i = 0; done && i < turned->rows; i++) {
		int64_t row = mc_lookup(t, turned->pfn[i]);

		CHECK(row >= 0 && t->pfn[row] + turned->pfn[i] - t->offset[row] == turned->offset[i]);
		held += turned->count[i];
	}
	CHECK(held <= present);
	mc_table_free(turned);
}

static void ask_everything(struct mc_table *t, struct mc_table *other)
{
	uint64_t cells[4][7], folded[4], page;
	struct mc_changes changes = { 0 };
	struct mc_stats stats;
	uint8_t digest[16];
	int file = open("/dev/zero", O_RDONLY);

	mc_stats(t, &stats);
	CHECK(stats.present + stats.swapped <= t->pages);
	mc_placement(t, digest);
	for (int i = 0; i < 20; i++) {
		int64_t row = mc_lookup(t, any(t->end + 2));

		CHECK(row < (int64_t)t->rows);
		CHECK(!mc_lookup_pfn(t, any(6000), &page, &fail));
		CHECK(page == UINT64_MAX || mc_lookup(t, page) >= 0);
	}
	CHECK(!mc_bin(t, t->first, t->end - t->first, 7, cells[0], cells[1], cells[2], cells[3], &fail));
	for (int i = 1; i < 7; i++)
		cells[0][0] += cells[0][i];
	CHECK(cells[0][0] == stats.present);
	if (t->rows && t->count[0] < 1 << 20)
		CHECK(!mc_join(t, file, 0, 1, &folded[0], &folded[1], &folded[2], &folded[3], &fail));
	if (t->page_size == other->page_size) {
		CHECK(!mc_diff(t, other, &changes, &fail));
		ask_for_counts(t, other, changes.pages);
		ask_for_labels(t, other);
	}
	ask_for_a_part(t);
	ask_by_frame(t, stats.present);
	mc_changes_free(&changes);
	close(file);
}

/* Spoils a copy of a table's bytes in one to three places; sometimes makes the checksum right again. */
static uint64_t spoil(uint8_t *bytes, uint64_t length)
{
	static const uint64_t wild[] = { 0, 1, UINT32_MAX, UINT64_MAX, 1ULL << 62, 1ULL << 63, 24, 1ULL << 56 };

	for (uint64_t n = 1 + any(3); n; n--) {
		uint64_t at = any(3) ? any(length / 4) * 4 : any(CHECKSUM / 8) * 8, value = wild[any(8)];

		switch (any(3)) {
		case 0:
			bytes[any(length)] ^= (uint8_t)(1 << any(8));
			break;
		case 1:
			memcpy(bytes + at, &value, length - at < 8 ? 4 : 8);
			break;
		default:
			value = any(1000);
			memcpy(bytes + at, &value, 4);
		}
	}
	if (any(2)) {
		uint8_t *joined = malloc(length);

		memcpy(joined, bytes, CHECKSUM);
		memcpy(joined + CHECKSUM, bytes + HEADER, length - HEADER);
		mc_hash_base(&(struct mc_bytes){ joined, length - HEADER + CHECKSUM }, 1, bytes + CHECKSUM);
		free(joined);
	}
	return any(4) ? length : any(length);
}

static int memfd_of(const uint8_t *bytes, uint64_t length, bool sealed)
{
	int fd = memfd_create("table", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && write(fd, bytes, length) == (ssize_t)length);
	if (sealed)
		CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE));
	return fd;
}

/* What is sealed outlives the table it was shared from. */
static void share_and_close(struct mc_table *original)
{
	struct mc_table *again, *sealed;

	CHECK(!mc_table_seal(&sealed, original, &fail));
	CHECK(!mc_table_share(&again, sealed, &fail));
	mc_table_free(sealed);
	CHECK(again->mapped == original->mapped && !memcmp(again->map, original->map, again->mapped));
	mc_table_free(again);
}

static bool open_spoiled(uint64_t round, struct mc_table *original)
{
	uint8_t *bytes = malloc(original->mapped), *exact;
	struct mc_table *t = NULL;
	uint64_t length;
	int code;

	memcpy(bytes, original->map, original->mapped);
	length = spoil(bytes, original->mapped);
	exact = malloc(length + !length);	/* so that a read behind the end is seen */
	memcpy(exact, bytes, length);
	if (round % 3) {
		int fd = memfd_of(exact, length, round % 3 == 1);

		code = mc_table_open(&t, fd, &fail);
		close(fd);
	} else {
		code = mc_table_load(&t, exact, length, &fail);
	}
	CHECK(code == MC_OK || code == MC_FORMAT);
	if (!code)
		ask_everything(t, original);
	mc_table_free(t);
	free(exact);
	free(bytes);
	return !code;
}

static void fuzz(uint64_t rounds)
{
	uint64_t accepted = 0;

	for (uint64_t round = 0; round < rounds; round++) {
		struct mc_table *original = random_table(any(40));

		ask_everything(original, original);
		share_and_close(original);
		accepted += open_spoiled(round, original);
		mc_table_free(original);
	}
	CHECK(accepted > rounds / 50 && accepted < rounds / 2);	/* both ways were taken */
}

/* A dump of leaves in order, with one to three bytes of it spoiled or its end cut off where `spoiled`. */
static uint64_t print_dump(char *out, bool spoiled)
{
	uint64_t at = 0, iova = any(1000), leaves = any(20);

	at += (uint64_t)sprintf(out, "Device 0000:00:04.0%s @0x%llx\nIOVA_PFN         \tPML5E\n",
				any(2) ? "" : " with pasid 0", (unsigned long long)any(1 << 30));
	for (uint64_t i = 0; i < leaves; i++) {
		uint64_t level = any(3), entry = any(1ULL << 40) << 12 | any(4);

		at += (uint64_t)sprintf(out + at, "0x%013llx |", (unsigned long long)iova);
		for (uint64_t n = level < 1 ? 5 : 5 - level; n; n--)
			at += (uint64_t)sprintf(out + at, "\t0x%016llx", (unsigned long long)(n > 1 ? 3 : entry | 1 << 13));
		out[at++] = '\n';
		iova += (1ULL << 9 * level) + any(3);
	}
	for (uint64_t n = spoiled ? 1 + any(3) : 0; n; n--)
		out[any(at)] = (char)(any(2) ? any(256) : (uint64_t)"\n\t x0|f@"[any(8)]);
	return spoiled && !any(4) ? any(at) : at;
}

static bool parse_dump(bool spoiled)
{
	static char text[1 << 14];
	struct mc_dump dump = { .device = "0000:00:04.0" };
	uint64_t length = print_dump(text, spoiled), end = 0;
	struct mc_table *t;
	int code = MC_OK;

	CHECK(!mc_table_new(&t, 4096, &fail));
	for (uint64_t at = 0, n; at < length && !code; at += n) {
		char *piece;

		n = 1 + any(any(3) ? 200 : length);
		n = n < length - at ? n : length - at;
		piece = malloc(n);	/* so that a read behind the end is seen */
		memcpy(piece, text + at, n);
		code = mc_dump_feed(t, &dump, piece, n, &fail);
		free(piece);
	}
	code = code ? code : mc_dump_end(t, &dump, &fail);
	CHECK(code == MC_OK || (spoiled && code == MC_FORMAT));
	for (uint64_t i = 0; i < t->rows; i++) {
		CHECK(t->offset[i] >= end && t->count[i] && t->pfn[i] < 1ULL << 40 && t->flags[i] & MC_PRESENT);
		end = t->offset[i] + t->count[i];
	}
	if (!code)
		ask_everything(t, t);
	mc_table_free(t);
	return !code;
}

static void fuzz_dumps(uint64_t rounds)
{
	uint64_t accepted = 0;

	for (uint64_t round = 0; round < rounds; round++) {
		parse_dump(false);
		accepted += parse_dump(true);
	}
	CHECK(accepted > rounds / 50 && accepted < rounds * 9 / 10);
}

static void scan_self(void)
{
	uint64_t length = 3ULL << 29, touched = 0;	/* three chunks and a part */
	uint8_t *map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	struct mc_stats stats;
	struct mc_table *t;

	CHECK(map != MAP_FAILED && pagemap >= 0);
	for (uint64_t at = 0; at < length; at += (1 + any(3000)) * 4096, touched++)
		map[at] = 1;
	CHECK(!mc_table_new(&t, 4096, &fail));
	CHECK(!mc_scan_pagemap(t, pagemap, (uintptr_t)map, length, 7, &fail));
	mc_stats(t, &stats);
	CHECK(stats.present == touched && t->pages == length / 4096 && t->first == 7);
	mc_table_free(t);
	CHECK(!mc_table_new(&t, 4096, &fail));
	CHECK(mc_scan_pagemap(t, pagemap, 1ULL << 60, 4096, 0, &fail) == MC_RANGE);
	mc_table_free(t);
	close(pagemap);
	munmap(map, length);
}

static void digest_holes(void)
{
	int fd = memfd_create("holes", MFD_CLOEXEC), pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t length = 9ULL << 20, at[] = { 0, 5, 4096, 3 << 20, (9 << 20) - 1 };
	uint8_t sparse[16], full[16], byte = 3;
	struct mc_table *t;

	CHECK(fd >= 0 && pagemap >= 0 && !ftruncate(fd, (off_t)length));
	for (int i = 0; i < 5; i++)
		CHECK(pwrite(fd, &byte, 1, (off_t)at[i]) == 1);
	CHECK(!mc_table_new(&t, 4096, &fail));
	CHECK(!mc_scan_fd(t, pagemap, fd, length, &fail));
	CHECK(t->rows >= 3 && t->rows <= 4);
	mc_table_free(t);
	CHECK(!mc_digest(fd, 0, length, 3, sparse, &fail));
	CHECK(!fallocate(fd, 0, 0, (off_t)length));
	CHECK(!mc_digest(fd, 0, length, 1, full, &fail));
	CHECK(!memcmp(sparse, full, 16));
	CHECK(mc_digest(fd, 0, length + 1, 2, full, &fail) == MC_RANGE);
	close(fd);
	close(pagemap);
}

static void moments(void)
{
	struct mc_moment first, second;

	mc_moment(&first);
	mc_moment(&second);
	CHECK(first.boottime_ns && first.boottime_ns <= second.boottime_ns && first.ticks <= second.ticks);
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: core_driver ROUNDS SEED\n");
		return 2;
	}
	state = strtoull(argv[2], NULL, 0);
	fuzz(strtoull(argv[1], NULL, 0));
	fuzz_dumps(400 + strtoull(argv[1], NULL, 0) / 5);	/* enough that both ways are taken */
	moments();
	if (geteuid() == 0)
		scan_self();
	if (geteuid() == 0)
		digest_holes();
	return 0;
}
