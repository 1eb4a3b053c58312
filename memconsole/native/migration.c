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
 *              | 08 be16:1 be16:0 | 08 be16:2 be16:4 be32                   return path opened, pinged: left out
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
 * devices before RAM has ended, other commands (postcopy), other capabilities (mapped-ram), and pages that are
 * compressed (xbzrle), sent elsewhere (multifd, RDMA) or filled with what is not zero.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "migration.h"

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
#define OPEN_RETURN_PATH 1
#define PING_COMMAND 2
#define SWITCHOVER_START 11

#define CAPABILITIES "configuration/capabilities"
#define SHARED "x-ignore-shared"

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

	/* Whoever loads what is written has nobody to answer. */
	if (command == OPEN_RETURN_PATH && !be16(s->field + 2))
		return await(s, SECTION, 1);
	if (command == PING_COMMAND && be16(s->field + 2) == 4)
		return await(s, PING, 4);
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

/* --- devices, and the whole --- */

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
	case PING: return await(s, SECTION, 1);
	case START: return on_start(s);
	case START_NAME: return on_start_name(s);
	case START_VERSION: return on_start_version(s);
	case PART: return on_part(s);
	case EARLY: return await_name(s, EARLY_NAME, s->field[4]);
	case EARLY_NAME: return on_early_name(s);
	case FOOTER: return on_footer(s);
	default: return mc_stream_record(s);
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
		mc_stream_page(s, bytes, n);
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
		mc_stream_flush_sink(s);	/* its pieces are the caller's bytes */
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
		mc_stream_flush(s);
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
		/* A socket whose writer ended, and left something there that it has not read. */
		if (!n || (n < 0 && errno == ECONNRESET))
			return mc_stream_end(s, fail);
		if (n > 0)
			mc_stream_feed(s, s->in_buffer, (uint64_t)n, fail);
		else if (errno != EINTR)
			broken(s, "read");
	}
	return outcome(s, fail);
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
