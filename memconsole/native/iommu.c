// SPDX-License-Identifier: MIT
/*
 * What Intel's driver prints of a device's second-level page tables, as rows of a table of extents by IOVA:
 *
 *   dump   := { table | note | "\n" }
 *   table  := "Device " BDF [ " with pasid " HEX ] " @0x" HEX "\n"  "IOVA_PFN" titles "\n"  { leaf }
 *   leaf   := "0x" HEX13 " |" 3..5 * ( "\t0x" HEX16 ) "\n"	IOVA_PFN, then PML5E PML4E PDPE [ PDE [ PTE ] ]
 *   note   := "DMA Remapping is not enabled on " NAME "\n"
 *
 * A leaf of a large page ends with its own entry, or (before Linux 6.7) has zeros in the place of those below it. Bits
 * 12-51 of the last entry are the frame; bit 0 allows reading, bit 1 writing. A device's address space is the table
 * without a pasid, or of pasid 0; others are those of processes that share theirs with the device.
 *
 * The text may come in pieces of any size. Leaves that continue each other become one row, so that what is kept grows
 * with the runs, never with the text.
 */
#include <string.h>

#include "core.h"

#define IOVA_DIGITS 13
#define ENTRY_DIGITS 16
#define HEAD (2 + IOVA_DIGITS + 2)	/* "0x", digits, " |" */
#define ENTRY (3 + ENTRY_DIGITS)	/* "\t0x", digits */
#define FRAME ((1ULL << 40) - 1)
#define DIGIT 16

/* DIGIT and the value of a hexadecimal digit as the kernel prints it; 0 of any other byte. */
static const uint8_t digits[256] = {
	['0'] = 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
	['a'] = 26, 27, 28, 29, 30, 31,
};

static int bad(struct mc_fail *fail, const char *why)
{
	return mc_fail(fail, MC_FORMAT, 0, why);
}

/* n digits, as a number; DIGIT is cleared in *all where one of them is none. */
static inline uint64_t number(const char *at, int n, uint8_t *all)
{
	uint64_t value = 0;

	for (int i = 0; i < n; i++) {
		uint8_t digit = digits[(uint8_t)at[i]];

		*all &= digit;
		value = value << 4 | (digit & 15);
	}
	return value;
}

static int push_leaf(struct mc_table *t, uint64_t iova, uint64_t entry, uint32_t pages, struct mc_fail *fail)
{
	uint64_t last = t->rows - 1;
	uint32_t flags = MC_PRESENT | (entry & 1 ? MC_READ : 0) | (entry & 2 ? MC_WRITE : 0) | (pages > 1 ? MC_HUGE : 0);

	if (t->rows && iova < t->offset[last] + t->count[last])
		return bad(fail, "leaves overlap or are out of order");
	return mc_table_push(t, iova, entry >> 12 & FRAME & -(uint64_t)pages, pages, flags, fail);
}

static int leaf(struct mc_table *t, struct mc_dump *d, const char *line, uint64_t length, struct mc_fail *fail)
{
	uint64_t iova, entry[5] = { 0 }, count = (length - HEAD) / ENTRY;
	uint8_t all = DIGIT;

	if (length < HEAD + 3 * ENTRY || count > 5 || length != HEAD + count * ENTRY || line[0] != '0' || line[1] != 'x' ||
	    line[HEAD - 2] != ' ' || line[HEAD - 1] != '|')
		return bad(fail, "a line is neither a leaf nor a title");
	iova = number(line + 2, IOVA_DIGITS, &all);
	for (uint64_t i = 0; i < count; i++) {
		const char *at = line + HEAD + i * ENTRY;

		if (at[0] != '\t' || at[1] != '0' || at[2] != 'x')
			all = 0;
		entry[i] = number(at + 3, ENTRY_DIGITS, &all);
	}
	if (!(all & DIGIT))
		return bad(fail, "a leaf has something else than numbers");
	if (!d->titled)
		return bad(fail, "a leaf stands before any title");
	if (!entry[2])
		return bad(fail, "a leaf has no entry");
	if (!d->wanted)
		return MC_OK;
	d->leaves++;
	if (entry[4])
		return push_leaf(t, iova, entry[4], 1, fail);
	return push_leaf(t, iova, entry[3] ? entry[3] : entry[2], entry[3] ? 1 << 9 : 1 << 18, fail);
}

static bool begins(const char *at, const char *end, const char *word)
{
	uint64_t n = strlen(word);

	return (uint64_t)(end - at) >= n && !memcmp(at, word, n);
}

static const char *skip_digits(const char *at, const char *end)
{
	while (at < end && digits[(uint8_t)*at])
		at++;
	return at;
}

/* "Device " BDF [ " with pasid " HEX ] " @0x" HEX */
static int title(struct mc_dump *d, const char *line, uint64_t length, struct mc_fail *fail)
{
	static const char head[] = "Device ", pasid[] = " with pasid ", root[] = " @0x";
	const char *end = line + length, *name = line + strlen(head), *at = memchr(name, ' ', (uint64_t)(end - name));
	uint64_t n = strnlen(d->device, sizeof(d->device));
	bool own = true;

	if (!at)
		return bad(fail, "a title names no table");
	d->titled = 1;
	d->wanted = (uint64_t)(at - name) == n && !memcmp(name, d->device, n);
	if (begins(at, end, pasid)) {
		const char *first = at + strlen(pasid);

		at = skip_digits(first, end);
		if (at == first)
			return bad(fail, "a title has no pasid");
		for (; first < at; first++)
			own = own && *first == '0';
	}
	d->wanted = d->wanted && own;
	d->own |= d->wanted;
	if (!begins(at, end, root) || at + strlen(root) == end || skip_digits(at + strlen(root), end) != end)
		return bad(fail, "a title names no table");
	return MC_OK;
}

static int one_line(struct mc_table *t, struct mc_dump *d, const char *line, uint64_t length, struct mc_fail *fail)
{
	const char *end = line + length;

	if (length && line[0] == '0')
		return leaf(t, d, line, length, fail);
	if (begins(line, end, "Device "))
		return title(d, line, length, fail);
	if (!length || begins(line, end, "IOVA_PFN") || begins(line, end, "DMA Remapping is not enabled on "))
		return MC_OK;
	return bad(fail, "a line is neither a leaf nor a title");
}

/* Ends the line that an earlier piece began; how many bytes of this piece belong to it. */
static uint64_t rest_of_line(struct mc_dump *d, const char *at, uint64_t length, const char *newline)
{
	uint64_t n = newline ? (uint64_t)(newline - at) : length;

	if (n > sizeof(d->line) - d->held)
		return UINT64_MAX;
	memcpy(d->line + d->held, at, n);
	d->held += (uint32_t)n;
	return n;
}

/*
 * Takes the next bytes of a dump; whole lines become rows, the beginning of one is kept.
 * Errors: MC_FORMAT (not as the kernel writes it, leaves out of order), MC_MEMORY, MC_KERNEL.
 */
int mc_dump_feed(struct mc_table *table, struct mc_dump *dump, const void *bytes, uint64_t length,
		 struct mc_fail *fail)
{
	const char *at = bytes, *end = at + length;
	int code = MC_OK;

	while (at < end && !code) {
		const char *newline = memchr(at, '\n', (uint64_t)(end - at));

		if (dump->held || !newline) {
			uint64_t n = rest_of_line(dump, at, (uint64_t)(end - at), newline);

			if (n == UINT64_MAX)
				return bad(fail, "a line is too long");
			at += n;
			if (!newline)
				return MC_OK;
			code = one_line(table, dump, dump->line, dump->held, fail);
			dump->held = 0;
		} else {
			code = one_line(table, dump, at, (uint64_t)(newline - at), fail);
		}
		at = newline + 1;
	}
	return code;
}

/* The dump has ended: the table covers what it has rows of. Errors: MC_FORMAT where it ended within a line. */
int mc_dump_end(struct mc_table *table, struct mc_dump *dump, struct mc_fail *fail)
{
	if (dump->held)
		return bad(fail, "it is cut off within a line");
	if (!table->rows)
		return MC_OK;
	table->first = table->offset[0];
	table->end = table->offset[table->rows - 1] + table->count[table->rows - 1];
	table->pages = 0;
	for (uint64_t i = 0; i < table->rows; i++)
		table->pages += table->count[i];
	return MC_OK;
}
