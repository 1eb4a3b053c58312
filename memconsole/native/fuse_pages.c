// SPDX-License-Identifier: MIT
/*
 * `pfnmap`: where the pages of a guest's memory are, as text. What is shown is true when the file is opened: it is
 * scanned then (mc_scan_fd: the memfd's own pages, whoever maps them), and a handle shows the same to its end.
 *
 *	file := titles line*			every line has LINE bytes: the n-th starts at n * LINE
 *	line := offset " " gpa " " pfn " " count " " flags "\n"
 *	offset := 16 hex digits			bytes from the start of the region's memfd
 *	gpa    := 16 hex digits | 16 "-"	bytes; dashes where the guest has no address for it
 *	pfn    := 14 hex digits			of the first page of the run
 *	count  := 8 hex digits			pages in the run
 *	flags  := 7 of "PSFXDWH" | "-"		present, swapped, file, exclusive, soft-dirty, uffd-wp, huge
 *
 * Absent pages have no line. Lines are made for the bytes that are read, so nothing of the text is ever held.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core.h"
#include "fuse.h"

#define LINE 66
#define PAGE 4096

_Static_assert(LINE == 16 + 1 + 16 + 1 + 14 + 1 + 8 + 1 + 7 + 1, "the fields fill a line");

static const char titles[LINE + 1] = "offset           gpa              pfn            count    PSFXDWH\n";

static char *put_hex(char *at, uint64_t value, int digits)
{
	for (int i = digits; i--; value >>= 4)
		at[i] = "0123456789abcdef"[value & 15];
	return at + digits;
}

static void put_line(char *at, const struct shown *shown, uint64_t line)
{
	static const uint32_t bits[] = { MC_PRESENT, MC_SWAP, MC_FILE, MC_EXCLUSIVE, MC_SOFT_DIRTY, MC_UFFD_WP, MC_HUGE };
	const struct mc_table *table = shown->table;
	const struct part *part = &shown->part;
	uint64_t row = shown->first_row + line, first = table->offset[row], end = first + table->count[row];
	uint64_t from = part->offset / PAGE, to = from + part->length / PAGE, skipped;

	/* a run may begin before the part, and end behind it */
	skipped = first < from ? from - first : 0;
	end = end > to ? to : end;
	first += skipped;
	at = put_hex(at, first * PAGE, 16);
	*at++ = ' ';
	if (part->gpa == NO_GPA)
		at = (char *)memset(at, '-', 16) + 16;
	else
		at = put_hex(at, part->gpa + first * PAGE - part->offset, 16);
	*at++ = ' ';
	at = put_hex(at, table->pfn[row] + skipped * mc_step(table->flags[row]), 14);
	*at++ = ' ';
	at = put_hex(at, end - first, 8);
	*at++ = ' ';
	for (int i = 0; i < 7; i++)
		*at++ = table->flags[row] & bits[i] ? "PSFXDWH"[i] : '-';
	*at = '\n';
}

/* The first row that ends behind page `page`. */
static uint64_t row_behind(const struct mc_table *table, uint64_t page)
{
	uint64_t low = 0, high = table->rows;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (table->offset[middle] + table->count[middle] > page)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

static int scan_part(struct shown *shown, int fd, const struct part *part, int pagemap)
{
	uint64_t first = part->offset / PAGE, end = first + part->length / PAGE, behind;
	struct mc_fail fail = { 0 };
	int code;

	shown->part = *part;
	code = mc_table_new(&shown->table, PAGE, &fail);
	/* a memfd may have been cut shorter since: what is beyond its end has no pages */
	if (!code)
		code = mc_scan_fd(shown->table, pagemap, fd, end * PAGE, &fail);
	if (code)
		return fail.err ? -fail.err : -EIO;
	shown->first_row = row_behind(shown->table, first);
	behind = end ? row_behind(shown->table, end - 1) : 0;
	if (behind < shown->table->rows && shown->table->offset[behind] < end)
		behind++;
	shown->lines = behind > shown->first_row ? behind - shown->first_row : 0;
	return 0;
}

/*
 * Scans every part. Returns 0, or -errno: EIO where frames are not shown (no CAP_SYS_ADMIN), ENOMEM, or what the
 * kernel said.
 */
int map_scan(struct map **out, const struct content *content)
{
	struct map *map = calloc(1, sizeof(*map) + content->nr * sizeof(map->shown[0]));
	int pagemap, error = 0;

	if (!map)
		return -ENOMEM;
	map->refs = 1;
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		error = -errno;
	for (; map->nr < content->nr && !error; map->nr++) {
		struct shown *shown = &map->shown[map->nr];

		error = scan_part(shown, content->of[map->nr].fd, &content->of[map->nr].part, pagemap);
		map->lines += shown->lines;
	}
	if (pagemap >= 0)
		close(pagemap);
	if (error)
		map_put(map);
	else
		*out = map;
	return error;
}

struct map *map_get(struct map *map)
{
	__atomic_add_fetch(&map->refs, 1, __ATOMIC_RELAXED);
	return map;
}

void map_put(struct map *map)
{
	if (__atomic_sub_fetch(&map->refs, 1, __ATOMIC_ACQ_REL))
		return;
	for (uint32_t i = 0; i < map->nr; i++)
		if (map->shown[i].table)
			mc_table_free(map->shown[i].table);
	free(map);
}

/* Bytes of the whole text. */
uint64_t map_bytes(const struct map *map)
{
	return (map->lines + 1) * LINE;
}

/* Writes lines line..line + nr, of which the first of all are the titles, and returns how many bytes they have. */
static size_t whole_lines(const struct map *map, uint64_t line, uint64_t nr, char *out)
{
	uint64_t done = 0, before = 1;	/* lines before the part: the titles */

	if (!line && nr) {
		memcpy(out, titles, LINE);
		done = 1;
	}
	for (uint32_t i = 0; i < map->nr && done < nr; i++) {
		const struct shown *shown = &map->shown[i];

		for (; done < nr && line + done < before + shown->lines; done++)
			put_line(out + done * LINE, shown, line + done - before);
		before += shown->lines;
	}
	return done * LINE;
}

/*
 * Writes the text's bytes offset..offset + size to out, which has room for size + 2 * LINE, and returns how many
 * there are; fewer than size only at the end.
 */
size_t map_read(const struct map *map, uint64_t offset, size_t size, char *out)
{
	uint64_t line = offset / LINE, skip = offset % LINE;
	size_t got;

	if (offset >= map_bytes(map) || !size)
		return 0;
	got = whole_lines(map, line, (skip + size + LINE - 1) / LINE, out);
	if (got <= skip)
		return 0;
	got -= skip;
	memmove(out, out + skip, got < size ? got : size);
	return got < size ? got : size;
}
