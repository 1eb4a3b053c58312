// SPDX-License-Identifier: MIT
/*
 * QEMU's migration stream, without the RAM that is elsewhere: pages of the blocks that were named are left out, or written
 * to where they belong, as they come; and the name of the capability x-ignore-shared, without which no QEMU loads a stream
 * that had it, is written in (the stream is locked) or taken out. Memory is constant whatever the stream is.
 *
 * Numbers are big-endian; `n:name` is a byte n and so many bytes; everything stands as QEMU 10.0 writes it:
 *
 *   stream    = "QEVM" be32:3 [config] *(command | section) tail
 *   config    = 07 be32:length machine *(05 n:name be32:version body)
 *                 "configuration/capabilities"      body = be32:count *(n:capability)
 *                 "configuration/target-page-bits"  body = be32:bits        (else pages are of 4 KiB)
 *                 "configuration/uuid"              body = 16 bytes
 *   command   = 08 be16:11 be16:0                                           switchover-start
 *   section   = (01 be32:id n:"ram" be32:instance be32:version              begins
 *              | 02 be32:id                                                 goes on
 *              | 03 be32:id) *record be64:10 [7e be32:id]                   ends: behind it is the tail
 *   record    = be64 offset|04 *(n:block be64:length [be64:gpa])            offset is the sum of all lengths; once;
 *                                                                           gpa stands with x-ignore-shared
 *              | be64 offset|02 [n:block] 00                                a page of zeros
 *              | be64 offset|08 [n:block] page                              no block's name with flag 20: as before
 *   tail      = device sections, 00, 06 be32:length "{" ... "}"             copied; the description must end it
 *
 * What else QEMU can write is refused by name (MC_RANGE): live sections that are not RAM (VFIO, dirty bitmaps), sections of
 * devices before RAM has ended, other commands (postcopy, return path), other capabilities (mapped-ram), and pages that are
 * compressed (xbzrle), sent elsewhere (multifd, RDMA) or filled with what is not zero.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core.h"

#define IN (256u << 10)
#define OUT (64u << 10)
#define PIECES 64
#define MAX_PAGE_BITS 16

#define VM_EOF 0x00
#define VM_START 0x01
#define VM_PART 0x02
#define VM_END 0x03
#define VM_FULL 0x04
#define VM_SUBSECTION 0x05
#define VM_DESCRIPTION 0x06
#define VM_CONFIGURATION 0x07
#define VM_COMMAND 0x08
#define VM_FOOTER 0x7e
#define SWITCHOVER_START 11

#define RAM_ZERO 0x02
#define RAM_SIZES 0x04
#define RAM_PAGE 0x08
#define RAM_EOS 0x10
#define RAM_CONTINUE 0x20
#define RAM_XBZRLE 0x40
#define RAM_HOOK 0x80
#define RAM_COMPRESSED 0x100
#define RAM_MULTIFD 0x200

#define CAPABILITIES "configuration/capabilities"
#define SHARED "x-ignore-shared"

/* What is awaited. Every field is accumulated to its length; PAGE and TAIL are passed on in the pieces they come in. */
enum state {
	FILE_HEADER, SECTION,
	CONFIG, MACHINE, SUB_LENGTH, SUB_NAME, SUB_VERSION, CAP_COUNT, CAP_LENGTH, CAP_NAME, PAGE_BITS, UUID,
	COMMAND, START, START_NAME, START_VERSION, PART, EARLY, EARLY_NAME, FOOTER,
	WORD, SIZE_LENGTH, SIZE_NAME, SIZE, BLOCK_LENGTH, BLOCK_NAME, ZERO, PAGE, TAIL
};

struct mc_stream {
	struct mc_stream_facts facts;
	enum state state, body;		/* what is awaited; and behind the version of a part of the configuration */
	uint32_t want, held;		/* bytes of the field that is awaited, and of it that are there */
	uint8_t field[256];
	int code;			/* of the failure after which nothing is taken any more */
	struct mc_fail failure;

	int to, lock, shared, configured;
	uint32_t caps, ram_id;
	uint8_t begun, ended, open;	/* RAM's section; whether a footer may follow */
	uint8_t page_flags;
	uint64_t sizes;			/* what block lengths are still to add up to */
	struct mc_stream_block *block, *written, *sizing;	/* of the last record; the last kept one; being declared */
	uint64_t offset, left;		/* of the page that comes, and bytes of it that are to come */

	uint64_t window, described, last;	/* of the tail: its last bytes; where its description ends; its last byte */

	struct iovec pieces[PIECES];	/* of one run for a sink, which end at sink_at; they point into what was fed */
	int nr, sink;
	uint64_t sink_at, sink_bytes;

	uint32_t out;
	uint8_t in_buffer[IN], out_buffer[OUT];
};

static uint32_t be16(const uint8_t *p)
{
	return (uint32_t)p[0] << 8 | p[1];
}

static uint32_t be32(const uint8_t *p)
{
	return be16(p) << 16 | be16(p + 2);
}

static uint64_t be64(const uint8_t *p)
{
	return (uint64_t)be32(p) << 32 | be32(p + 4);
}

static void store(uint8_t *p, uint64_t value, unsigned int bytes)
{
	while (bytes--) {
		p[bytes] = (uint8_t)value;
		value >>= 8;
	}
}

/* Ends it: the code and the reason, and what the reason is about. */
static int stop(struct mc_stream *s, int code, const char *why, const void *name, size_t length)
{
	if (name) {
		memcpy(s->facts.what, name, length);
		s->facts.what[length] = 0;
	}
	return s->code = mc_fail(&s->failure, code, 0, why);
}

static int spoiled(struct mc_stream *s, const char *why)
{
	return stop(s, MC_FORMAT, why, NULL, 0);
}

static int unknown(struct mc_stream *s, const char *why)
{
	return stop(s, MC_RANGE, why, NULL, 0);
}

static int broken(struct mc_stream *s, const char *call)
{
	return s->code = mc_fail_errno(&s->failure, call);
}

static int await(struct mc_stream *s, enum state state, uint32_t want)
{
	s->state = state;
	s->want = want;
	s->held = 0;
	return MC_OK;
}

/* A name is awaited: of so many bytes, one at least. */
static int await_name(struct mc_stream *s, enum state state, uint8_t length)
{
	return length ? await(s, state, length) : spoiled(s, "a name in it is empty");
}

/* --- what goes out --- */

static int write_out(struct mc_stream *s, const uint8_t *bytes, uint64_t length)
{
	while (length) {
		ssize_t n = write(s->to, bytes, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return broken(s, "write");
		bytes += n;
		length -= (uint64_t)n;
	}
	return MC_OK;
}

static int flush(struct mc_stream *s)
{
	uint32_t length = s->out;

	s->out = 0;
	return length ? write_out(s, s->out_buffer, length) : MC_OK;
}

static int put(struct mc_stream *s, const void *bytes, uint64_t length)
{
	s->facts.out += length;
	if (s->to < 0)
		return MC_OK;
	if (s->out + length > OUT && flush(s))
		return s->code;
	if (length > OUT)
		return write_out(s, bytes, length);
	memcpy(s->out_buffer + s->out, bytes, length);
	s->out += (uint32_t)length;
	return MC_OK;
}

static int put_number(struct mc_stream *s, uint64_t value, unsigned int bytes)
{
	uint8_t raw[8];

	store(raw, value, bytes);
	return put(s, raw, bytes);
}

static int put_name(struct mc_stream *s, const void *name, size_t length)
{
	return put_number(s, length, 1) ? s->code : put(s, name, length);
}

/* --- what goes to where RAM is --- */

static int flush_sink(struct mc_stream *s)
{
	struct iovec *piece = s->pieces;
	uint64_t at = s->sink_at - s->sink_bytes;

	while (s->nr) {
		ssize_t n = pwritev(s->sink, piece, s->nr, (off_t)at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return broken(s, "pwritev");
		at += (uint64_t)n;
		while (s->nr && (size_t)n >= piece->iov_len) {
			n -= (ssize_t)piece->iov_len;
			piece++;
			s->nr--;
		}
		if (s->nr) {
			piece->iov_base = (uint8_t *)piece->iov_base + n;
			piece->iov_len -= (size_t)n;
		}
	}
	s->sink_bytes = 0;
	return MC_OK;
}

static int sink(struct mc_stream *s, const struct mc_stream_block *block, uint64_t at, const void *bytes, uint64_t length)
{
	at += block->base;
	if (s->nr && (s->nr == PIECES || s->sink != block->fd || s->sink_at != at) && flush_sink(s))
		return s->code;
	if (!s->nr)
		s->sink_at = at;
	s->sink = block->fd;
	s->pieces[s->nr++] = (struct iovec){ (void *)bytes, length };
	s->sink_at += length;
	s->sink_bytes += length;
	return MC_OK;
}

/* Zeros over a page of a sink that holds something else; where it holds nothing, nothing is put. */
static int sink_zeros(struct mc_stream *s, const struct mc_stream_block *block, uint64_t at)
{
	static const uint8_t zeros[4096];
	uint8_t held[4096];

	if (flush_sink(s))
		return s->code;
	at += block->base;
	for (uint64_t end = at + s->facts.page_size; at < end; at += sizeof(held)) {
		ssize_t n = pread(block->fd, held, sizeof(held), (off_t)at);

		if (n < 0)
			return broken(s, "pread");
		if (n == (ssize_t)sizeof(held) && !memcmp(held, zeros, sizeof(held)))
			continue;
		if (pwrite(block->fd, zeros, sizeof(zeros), (off_t)at) != (ssize_t)sizeof(zeros))
			return broken(s, "pwrite");
	}
	return MC_OK;
}

/* --- the header and the configuration --- */

static int on_file_header(struct mc_stream *s)
{
	if (memcmp(s->field, "QEVM", 4))
		return spoiled(s, "it does not begin as a migration stream of QEMU");
	if (be32(s->field + 4) != 3)
		return spoiled(s, "it is of a version of QEMU's format that is not known");
	return put(s, s->field, 8) ? s->code : await(s, SECTION, 1);
}

static int on_config(struct mc_stream *s)
{
	uint32_t length = be32(s->field);

	if (!length || length >= sizeof(s->facts.machine))
		return spoiled(s, "its machine type is of no possible length");
	return put_number(s, VM_CONFIGURATION, 1) || put(s, s->field, 4) ? s->code : await(s, MACHINE, length);
}

static int on_machine(struct mc_stream *s)
{
	memcpy(s->facts.machine, s->field, s->want);
	s->configured = 1;
	return put(s, s->field, s->want) ? s->code : await(s, SECTION, 1);
}

static int put_subsection(struct mc_stream *s, const char *name)
{
	return put_number(s, VM_SUBSECTION, 1) || put_name(s, name, strlen(name)) || put_number(s, 1, 4) ? s->code : MC_OK;
}

/* The configuration has ended: the lock, where there is to be one. */
static int put_lock(struct mc_stream *s)
{
	int configured = s->configured;

	s->configured = 0;
	if (!s->lock)
		return MC_OK;
	if (!configured)
		return unknown(s, "its machine type writes no configuration, which alone could lock it");
	s->lock = 2;	/* locked */
	return put_subsection(s, CAPABILITIES) || put_number(s, 1, 4) || put_name(s, SHARED, strlen(SHARED)) ? s->code : MC_OK;
}

static int named(const struct mc_stream *s, const char *name)
{
	return s->want == strlen(name) && !memcmp(s->field, name, s->want);
}

static int on_sub_name(struct mc_stream *s)
{
	if (named(s, CAPABILITIES))
		s->body = CAP_COUNT;
	else if (named(s, "configuration/target-page-bits"))
		s->body = PAGE_BITS;
	else if (named(s, "configuration/uuid"))
		s->body = UUID;
	else
		return stop(s, MC_RANGE, "a part of its configuration is not known", s->field, s->want);
	return await(s, SUB_VERSION, 4);
}

static int on_sub_version(struct mc_stream *s)
{
	if (be32(s->field) != 1)
		return unknown(s, "a part of its configuration is of a version that is not known");
	return await(s, s->body, s->body == UUID ? 16 : 4);
}

static int on_cap_count(struct mc_stream *s)
{
	s->caps = be32(s->field);
	return s->caps ? await(s, CAP_LENGTH, 1) : await(s, SECTION, 1);
}

static int on_cap_name(struct mc_stream *s)
{
	if (!named(s, SHARED))
		return stop(s, MC_RANGE, "it was written with a capability that is not known", s->field, s->want);
	if (s->shared)
		return spoiled(s, "it names a capability twice");
	s->shared = s->facts.was_locked = 1;
	return --s->caps ? await(s, CAP_LENGTH, 1) : await(s, SECTION, 1);
}

static int on_page_bits(struct mc_stream *s)
{
	uint32_t bits = be32(s->field);

	if (bits < 12 || bits > MAX_PAGE_BITS)
		return spoiled(s, "its pages are of no possible size");
	s->facts.page_size = 1u << bits;
	if (put_subsection(s, "configuration/target-page-bits") || put(s, s->field, 4))
		return s->code;
	return await(s, SECTION, 1);
}

static int on_uuid(struct mc_stream *s)
{
	return put_subsection(s, "configuration/uuid") || put(s, s->field, 16) ? s->code : await(s, SECTION, 1);
}

/* --- sections --- */

static int tail(struct mc_stream *s, const uint8_t *bytes, uint64_t length);

static int on_section(struct mc_stream *s)
{
	uint8_t kind = s->field[0], first = s->facts.in == 9;

	if (kind == VM_FOOTER && s->open)
		return await(s, FOOTER, 4);
	if (s->ended)
		return await(s, TAIL, 0) ? s->code : tail(s, s->field, 1);
	s->open = 0;
	if (first && kind == VM_CONFIGURATION)
		return await(s, CONFIG, 4);
	if (s->configured && kind == VM_SUBSECTION)
		return await(s, SUB_LENGTH, 1);
	if ((s->configured || first) && put_lock(s))
		return s->code;
	switch (kind) {
	case VM_COMMAND:
		return await(s, COMMAND, 4);
	case VM_START:
		return await(s, START, 5);
	case VM_PART:
	case VM_END:
		s->ended = kind == VM_END;
		return await(s, PART, 4);
	case VM_FULL:
		return await(s, EARLY, 5);
	default:
		return spoiled(s, "a section of it is of no known kind");
	}
}

static int on_command(struct mc_stream *s)
{
	static const char *const names[] = { "", "open-return-path", "ping", "postcopy-advise", "postcopy-listen",
					     "postcopy-run", "postcopy-ram-discard", "postcopy-resume", "packaged",
					     "enable-colo", "recv-bitmap" };
	uint32_t command = be16(s->field);
	const char *name = command < sizeof(names) / sizeof(*names) ? names[command] : "";

	if (command != SWITCHOVER_START || be16(s->field + 2))
		return stop(s, MC_RANGE, "a command in it is not known", name, strlen(name));
	return put_number(s, VM_COMMAND, 1) || put(s, s->field, 4) ? s->code : await(s, SECTION, 1);
}

static int on_start(struct mc_stream *s)
{
	s->ram_id = s->begun ? s->ram_id : be32(s->field);
	return await_name(s, START_NAME, s->field[4]);
}

static int on_start_name(struct mc_stream *s)
{
	if (!named(s, "ram"))
		return stop(s, MC_RANGE, "a live section of it is not RAM", s->field, s->want);
	if (s->begun)
		return spoiled(s, "its RAM begins twice");
	s->begun = 1;
	return put_number(s, VM_START, 1) || put_number(s, s->ram_id, 4) || put_name(s, s->field, s->want) ?
		       s->code : await(s, START_VERSION, 8);
}

static int on_start_version(struct mc_stream *s)
{
	if (be32(s->field) || be32(s->field + 4) != 4)
		return unknown(s, "its RAM is of a version that is not known");
	return put(s, s->field, 8) ? s->code : await(s, WORD, 8);
}

static int on_part(struct mc_stream *s)
{
	if (!s->begun || be32(s->field) != s->ram_id)
		return spoiled(s, "a live section goes on that has not begun");
	s->written = NULL;	/* each section says the block of its first page */
	return put_number(s, s->ended ? VM_END : VM_PART, 1) || put(s, s->field, 4) ? s->code : await(s, WORD, 8);
}

static int on_early_name(struct mc_stream *s)
{
	return stop(s, MC_RANGE, "a device stands before its RAM has ended", s->field, s->want);
}

static int on_footer(struct mc_stream *s)
{
	s->open = 0;
	if (be32(s->field) != s->ram_id)
		return spoiled(s, "a footer is not that of its section");
	if (put_number(s, VM_FOOTER, 1) || put(s, s->field, 4))
		return s->code;
	return s->ended ? await(s, TAIL, 0) : await(s, SECTION, 1);
}

/* --- RAM --- */

static struct mc_stream_block *find(struct mc_stream *s, const void *name, size_t length)
{
	for (uint32_t i = 0; i < s->facts.blocks; i++) {
		struct mc_stream_block *block = &s->facts.block[i];

		if (strlen(block->name) == length && !memcmp(block->name, name, length))
			return block;
	}
	return NULL;
}

/* RAM has ended: every block has its pages here or elsewhere, or nothing is made of the stream. */
static int check_blocks(struct mc_stream *s)
{
	if (!s->sizing)
		return spoiled(s, "its RAM has no sizes");
	for (uint32_t i = 0; i < s->facts.blocks; i++) {
		const struct mc_stream_block *block = &s->facts.block[i];

		if (s->to >= 0 && !block->elsewhere && !block->kept)
			return stop(s, MC_FORMAT, "a block of RAM has no page in it and is said nowhere to be elsewhere",
				    block->name, strlen(block->name));
	}
	return MC_OK;
}

static int on_eos(struct mc_stream *s)
{
	if (s->offset)
		return spoiled(s, "a section's end is not at its end");
	if (s->ended && check_blocks(s))
		return s->code;
	s->open = 1;
	return put(s, s->field, 8) ? s->code : await(s, SECTION, 1);
}

static int await_page(struct mc_stream *s)
{
	struct mc_stream_block *block = s->block;

	if (s->offset >= block->length || block->length - s->offset < s->facts.page_size)
		return stop(s, MC_FORMAT, "a page lies beyond its block", block->name, strlen(block->name));
	if (block->elsewhere) {
		block->dropped++;
	} else {
		int same = s->written == block;

		block->kept++;
		s->written = block;
		if (put_number(s, s->offset | s->page_flags | (same ? RAM_CONTINUE : 0), 8) ||
		    (!same && put_name(s, block->name, strlen(block->name))))
			return s->code;
	}
	if (s->page_flags == RAM_ZERO)
		return await(s, ZERO, 1);
	s->left = s->facts.page_size;
	return await(s, PAGE, 0);
}

static int on_sizes(struct mc_stream *s)
{
	if (s->sizing)
		return spoiled(s, "it says the sizes of its RAM twice");
	if (!s->offset)
		return spoiled(s, "its RAM is of no size");
	s->sizes = s->offset;
	return put(s, s->field, 8) ? s->code : await(s, SIZE_LENGTH, 1);
}

static int on_word(struct mc_stream *s)
{
	uint64_t word = be64(s->field), flags = word & (s->facts.page_size - 1);

	s->offset = word - flags;
	if (flags == (RAM_PAGE | RAM_CONTINUE) || flags == (RAM_ZERO | RAM_CONTINUE)) {
		s->page_flags = (uint8_t)(flags & ~(uint64_t)RAM_CONTINUE);
		return s->block ? await_page(s) : spoiled(s, "a page is of the block of one before, and none was");
	}
	if (flags == RAM_PAGE || flags == RAM_ZERO) {
		s->page_flags = (uint8_t)flags;
		return await(s, BLOCK_LENGTH, 1);
	}
	if (flags == RAM_EOS)
		return on_eos(s);
	if (flags == RAM_SIZES)
		return on_sizes(s);
	if (flags & RAM_XBZRLE)
		return unknown(s, "pages in it are differences (xbzrle)");
	if (flags & RAM_COMPRESSED)
		return unknown(s, "pages in it are compressed");
	if (flags & RAM_MULTIFD)
		return unknown(s, "its pages went another way (multifd)");
	if (flags & RAM_HOOK)
		return unknown(s, "its pages went another way (RDMA)");
	return spoiled(s, "a record of its RAM is of no known kind");
}

static int on_size_name(struct mc_stream *s)
{
	struct mc_stream_block *block;

	if (memchr(s->field, 0, s->want))
		return spoiled(s, "a block of RAM has no possible name");
	block = find(s, s->field, s->want);
	if (block && (block->declared || !block->elsewhere))
		return stop(s, MC_FORMAT, "it has two blocks of RAM of one name", s->field, s->want);
	if (!block) {
		if (s->facts.blocks == MC_STREAM_BLOCKS)
			return unknown(s, "it has more blocks of RAM than can be told apart here");
		block = &s->facts.block[s->facts.blocks++];
		memcpy(block->name, s->field, s->want);
		block->fd = -1;
	}
	s->sizing = block;
	return await(s, SIZE, s->shared ? 16 : 8);
}

/* All sizes are said: whatever is elsewhere is one of them. */
static int check_elsewhere(struct mc_stream *s)
{
	for (uint32_t i = 0; i < s->facts.blocks; i++) {
		const struct mc_stream_block *block = &s->facts.block[i];

		if (!block->declared)
			return stop(s, MC_FORMAT, "it has no block of RAM of this name", block->name, strlen(block->name));
	}
	return await(s, WORD, 8);
}

/* A file that a block's pages go to holds all of them: nothing is written behind its end. */
static int check_sink(struct mc_stream *s, const struct mc_stream_block *block)
{
	struct stat st;

	if (block->fd < 0)
		return MC_OK;
	if (fstat(block->fd, &st))
		return broken(s, "fstat");
	if ((uint64_t)st.st_size < block->base || (uint64_t)st.st_size - block->base < block->length)
		return stop(s, MC_FORMAT, "the file for a block's pages is shorter than the block", block->name,
			    strlen(block->name));
	return MC_OK;
}

static int on_size(struct mc_stream *s)
{
	struct mc_stream_block *block = s->sizing;
	uint64_t length = be64(s->field);

	if (!length || length > s->sizes || length % s->facts.page_size)
		return stop(s, MC_FORMAT, "a block of RAM is of no possible size", block->name, strlen(block->name));
	if (block->elsewhere && block->length != length)
		return stop(s, MC_FORMAT, "a block of RAM is of another size than it is elsewhere", block->name,
			    strlen(block->name));
	block->length = length;
	block->declared = 1;
	s->sizes -= length;
	if (check_sink(s, block) || put_name(s, block->name, strlen(block->name)) || put(s, s->field, 8))
		return s->code;
	/* A place where no block is: a QEMU that has the capability refuses it as well. */
	if (s->lock && put_number(s, UINT64_MAX, 8))
		return s->code;
	return s->sizes ? await(s, SIZE_LENGTH, 1) : check_elsewhere(s);
}

static int on_block_name(struct mc_stream *s)
{
	s->block = find(s, s->field, s->want);
	if (!s->block || !s->block->declared)
		return stop(s, MC_FORMAT, "a page is of a block that it has no size of", s->field, s->want);
	return await_page(s);
}

static int on_zero(struct mc_stream *s)
{
	struct mc_stream_block *block = s->block;

	if (s->field[0])
		return unknown(s, "a page in it is filled with what is not zero");
	if (!block->elsewhere) {
		if (put(s, s->field, 1))
			return s->code;
	} else if (block->fd >= 0 && sink_zeros(s, block, s->offset)) {
		return s->code;
	}
	return await(s, WORD, 8);
}

static int page(struct mc_stream *s, const uint8_t *bytes, uint64_t length)
{
	const struct mc_stream_block *block = s->block;
	uint64_t at = s->offset + s->facts.page_size - s->left;

	s->left -= length;
	if (!block->elsewhere) {
		if (put(s, bytes, length))
			return s->code;
	} else if (block->fd >= 0 && sink(s, block, at, bytes, length)) {
		return s->code;
	}
	return s->left ? MC_OK : await(s, WORD, 8);
}

/*
 * Devices. Their sections have no lengths; what says that they are whole is the description, which closes the stream: its
 * own end is known as soon as 00 06 be32:length "{" has been seen, and it has no zero byte, so the last such place is it.
 */
static int tail(struct mc_stream *s, const uint8_t *bytes, uint64_t length)
{
	uint64_t at = s->facts.in - length;	/* facts.in counts them already */

	for (uint64_t i = 0; i < length; i++) {
		s->window = (s->window << 8 | bytes[i]) & 0xffffffffffffffULL;
		if (bytes[i] == '{' && s->window >> 40 == (VM_EOF << 8 | VM_DESCRIPTION))
			s->described = at + i + (uint32_t)(s->window >> 8);
	}
	s->last = bytes[length - 1];
	s->facts.devices += length;
	return put(s, bytes, length);
}

static int step(struct mc_stream *s)
{
	switch (s->state) {
	case FILE_HEADER: return on_file_header(s);
	case SECTION: return on_section(s);
	case CONFIG: return on_config(s);
	case MACHINE: return on_machine(s);
	case SUB_LENGTH: return await_name(s, SUB_NAME, s->field[0]);
	case SUB_NAME: return on_sub_name(s);
	case SUB_VERSION: return on_sub_version(s);
	case CAP_COUNT: return on_cap_count(s);
	case CAP_LENGTH: return await_name(s, CAP_NAME, s->field[0]);
	case CAP_NAME: return on_cap_name(s);
	case PAGE_BITS: return on_page_bits(s);
	case UUID: return on_uuid(s);
	case COMMAND: return on_command(s);
	case START: return on_start(s);
	case START_NAME: return on_start_name(s);
	case START_VERSION: return on_start_version(s);
	case PART: return on_part(s);
	case EARLY: return await_name(s, EARLY_NAME, s->field[4]);
	case EARLY_NAME: return on_early_name(s);
	case FOOTER: return on_footer(s);
	case WORD: return on_word(s);
	case SIZE_LENGTH: return await_name(s, SIZE_NAME, s->field[0]);
	case SIZE_NAME: return on_size_name(s);
	case SIZE: return on_size(s);
	case BLOCK_LENGTH: return await_name(s, BLOCK_NAME, s->field[0]);
	case BLOCK_NAME: return on_block_name(s);
	case ZERO: return on_zero(s);
	default: return spoiled(s, "it is in no state");	/* PAGE and TAIL are no fields */
	}
}

/* Takes what it can of the bytes: of a field, a page, or the tail. Returns how many; where it fails, s->code says so. */
static uint64_t take(struct mc_stream *s, const uint8_t *bytes, uint64_t length)
{
	uint64_t n = length;

	if (s->state == PAGE && n > s->left)
		n = s->left;
	else if (s->state != PAGE && s->state != TAIL && n > s->want - s->held)
		n = s->want - s->held;
	s->facts.in += n;
	if (s->state == PAGE) {
		page(s, bytes, n);
	} else if (s->state == TAIL) {
		tail(s, bytes, n);
	} else {
		memcpy(s->field + s->held, bytes, n);
		s->held += (uint32_t)n;
		if (s->held == s->want)
			step(s);
	}
	return n;
}

static int outcome(const struct mc_stream *s, struct mc_fail *fail)
{
	if (s->code)
		*fail = s->failure;
	return s->code;
}

/*
 * Takes the next bytes of the stream, cut anywhere.
 * Errors: MC_FORMAT (it is spoiled, or not what was said of it), MC_RANGE (it is whole, for all that is known, and has what
 * is refused here), MC_KERNEL (write, pwritev, pread, pwrite, fstat); facts->what names what the reason is about. After one
 * all that was written is of no use, and every further call returns it again.
 */
int mc_stream_feed(struct mc_stream *s, const void *bytes, uint64_t length, struct mc_fail *fail)
{
	const uint8_t *at = bytes, *end = at + length;

	while (at < end && !s->code)
		at += take(s, at, (uint64_t)(end - at));
	if (!s->code)
		flush_sink(s);	/* its pieces are the caller's bytes */
	s->nr = 0;
	return outcome(s, fail);
}

/* The stream has ended: whether there, and all written. Errors: as of mc_stream_feed. */
int mc_stream_end(struct mc_stream *s, struct mc_fail *fail)
{
	s->facts.cut = !s->code && (s->state != TAIL || s->described != s->facts.in || s->last != '}');
	if (s->facts.cut && s->state != TAIL)
		spoiled(s, s->facts.in ? "it is cut off in the middle" : "it is empty");
	else if (s->facts.cut)
		spoiled(s, "it is cut off: no description closes it");
	if (!s->code)
		flush(s);
	return outcome(s, fail);
}

/*
 * Takes all that comes out of a file or a pipe, to its end, or until `stopper` can be read (-1: there is none).
 * Errors: as of mc_stream_feed; MC_KERNEL (poll, read); MC_GONE: it was stopped.
 */
int mc_stream_run(struct mc_stream *s, int from, int stopper, struct mc_fail *fail)
{
	struct pollfd looked[2] = { { .fd = from, .events = POLLIN }, { .fd = stopper, .events = POLLIN } };

	while (!s->code) {
		ssize_t n;

		if (poll(looked, 2, -1) < 0) {
			if (errno != EINTR)
				broken(s, "poll");
			continue;
		}
		if (looked[1].revents) {
			s->code = mc_fail(&s->failure, MC_GONE, 0, "it was stopped");
			break;
		}
		n = read(from, s->in_buffer, IN);
		if (!n)
			return mc_stream_end(s, fail);
		if (n > 0)
			mc_stream_feed(s, s->in_buffer, (uint64_t)n, fail);
		else if (errno != EINTR)
			broken(s, "read");
	}
	return outcome(s, fail);
}

/* Of RAM: this block of so many bytes is elsewhere. Its pages are left out; they go to the file `fd` from `base`, unless fd is -1. */
int mc_stream_elsewhere(struct mc_stream *s, const char *name, uint64_t length, int fd, uint64_t base, struct mc_fail *fail)
{
	size_t letters = strlen(name);
	struct mc_stream_block *block;

	if (s->facts.in || s->facts.blocks == MC_STREAM_BLOCKS || !letters || letters > 255 || find(s, name, letters) ||
	    !length || base > INT64_MAX || length > INT64_MAX - base)
		return mc_fail(fail, MC_RANGE, 0, "no such block can be elsewhere");
	block = &s->facts.block[s->facts.blocks++];
	memcpy(block->name, name, letters);
	block->length = length;
	block->elsewhere = 1;
	block->fd = fd;
	block->base = base;
	return MC_OK;
}

/* A filter whose output goes to `to` (-1: nowhere, it only reads), locked or not. Errors: MC_MEMORY. */
int mc_stream_new(struct mc_stream **out, int to, int lock, struct mc_fail *fail)
{
	struct mc_stream *s = calloc(1, sizeof(*s));

	if (!s)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	s->to = to;
	s->lock = lock != 0;
	s->facts.page_size = 4096;
	await(s, FILE_HEADER, 8);
	*out = s;
	return MC_OK;
}

const struct mc_stream_facts *mc_stream_read(const struct mc_stream *s)
{
	return &s->facts;
}

void mc_stream_free(struct mc_stream *s)
{
	free(s);
}
