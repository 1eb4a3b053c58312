// SPDX-License-Identifier: MIT
/* RAM in QEMU's migration stream: `record` of the grammar in migration.c, from a section's head to its end. */
#include <string.h>
#include <sys/stat.h>

#include "migration.h"

#define RAM_ZERO 0x02
#define RAM_SIZES 0x04
#define RAM_PAGE 0x08
#define RAM_EOS 0x10
#define RAM_CONTINUE 0x20
#define RAM_XBZRLE 0x40
#define RAM_HOOK 0x80
#define RAM_COMPRESSED 0x100
#define RAM_MULTIFD 0x200

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
	} else if (block->fd >= 0 && mc_stream_sink_zeros(s, block, s->offset)) {
		return s->code;
	}
	return await(s, WORD, 8);
}

/* The next bytes of a page. */
int mc_stream_page(struct mc_stream *s, const uint8_t *bytes, uint64_t length)
{
	const struct mc_stream_block *block = s->block;
	uint64_t at = s->offset + s->facts.page_size - s->left;

	s->left -= length;
	if (!block->elsewhere) {
		if (put(s, bytes, length))
			return s->code;
	} else if (block->fd >= 0 && mc_stream_sink(s, block, at, bytes, length)) {
		return s->code;
	}
	return s->left ? MC_OK : await(s, WORD, 8);
}

/* A field of a record is there. */
int mc_stream_record(struct mc_stream *s)
{
	switch (s->state) {
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
