/* SPDX-License-Identifier: MIT */
/*
 * A filter of QEMU's migration stream, between the sources that it is in:
 *
 *   migration.c	the grammar; a filter's life; headers, sections and devices
 *   migration_ram.c	the records of RAM: sizes of blocks, and pages; which blocks are elsewhere
 *   migration_out.c	what goes out, and to where RAM is
 *
 * Functions that return an int return s->code: MC_OK, or that of the failure that ended it.
 */
#ifndef MC_MIGRATION_H
#define MC_MIGRATION_H

#include <string.h>
#include <sys/uio.h>

#include "core.h"

#define IN (256u << 10)
#define OUT (64u << 10)
#define PIECES 64

/* What is awaited. Every field is accumulated to its length; PAGE and TAIL are passed on in the pieces they come in. */
enum state {
	FILE_HEADER, SECTION,
	CONFIG, MACHINE, SUB_LENGTH, SUB_NAME, SUB_VERSION, CAP_COUNT, CAP_LENGTH, CAP_NAME, PAGE_BITS, UUID,
	COMMAND, PING, START, START_NAME, START_VERSION, PART, EARLY, EARLY_NAME, FOOTER,
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

static inline uint32_t be16(const uint8_t *p)
{
	return (uint32_t)p[0] << 8 | p[1];
}

static inline uint32_t be32(const uint8_t *p)
{
	return be16(p) << 16 | be16(p + 2);
}

static inline uint64_t be64(const uint8_t *p)
{
	return (uint64_t)be32(p) << 32 | be32(p + 4);
}

static inline void store(uint8_t *p, uint64_t value, unsigned int bytes)
{
	while (bytes--) {
		p[bytes] = (uint8_t)value;
		value >>= 8;
	}
}

/* Ends it: the code and the reason, and what the reason is about. */
static inline int stop(struct mc_stream *s, int code, const char *why, const void *name, size_t length)
{
	if (name) {
		memcpy(s->facts.what, name, length);
		s->facts.what[length] = 0;
	}
	return s->code = mc_fail(&s->failure, code, 0, why);
}

static inline int spoiled(struct mc_stream *s, const char *why)
{
	return stop(s, MC_FORMAT, why, NULL, 0);
}

static inline int unknown(struct mc_stream *s, const char *why)
{
	return stop(s, MC_RANGE, why, NULL, 0);
}

static inline int broken(struct mc_stream *s, const char *call)
{
	return s->code = mc_fail_errno(&s->failure, call);
}

static inline int await(struct mc_stream *s, enum state state, uint32_t want)
{
	s->state = state;
	s->want = want;
	s->held = 0;
	return MC_OK;
}

/* A name is awaited: of so many bytes, one at least. */
static inline int await_name(struct mc_stream *s, enum state state, uint8_t length)
{
	return length ? await(s, state, length) : spoiled(s, "a name in it is empty");
}

/* migration_out.c */
int mc_stream_put(struct mc_stream *s, const void *bytes, uint64_t length);
int mc_stream_flush(struct mc_stream *s);
int mc_stream_sink(struct mc_stream *s, const struct mc_stream_block *block, uint64_t at, const void *bytes,
		   uint64_t length);
int mc_stream_sink_zeros(struct mc_stream *s, const struct mc_stream_block *block, uint64_t at);
int mc_stream_flush_sink(struct mc_stream *s);

/* migration_ram.c */
int mc_stream_record(struct mc_stream *s);
int mc_stream_page(struct mc_stream *s, const uint8_t *bytes, uint64_t length);

static inline int put(struct mc_stream *s, const void *bytes, uint64_t length)
{
	s->facts.out += length;
	return s->to < 0 ? MC_OK : mc_stream_put(s, bytes, length);
}

static inline int put_number(struct mc_stream *s, uint64_t value, unsigned int bytes)
{
	uint8_t raw[8];

	store(raw, value, bytes);
	return put(s, raw, bytes);
}

static inline int put_name(struct mc_stream *s, const void *name, size_t length)
{
	return put_number(s, length, 1) ? s->code : put(s, name, length);
}

#endif
