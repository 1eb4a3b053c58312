// SPDX-License-Identifier: MIT
/* What a filter of QEMU's migration stream writes: the stream without what is left out, and pages to where RAM is. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "migration.h"

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

int mc_stream_flush(struct mc_stream *s)
{
	uint32_t length = s->out;

	s->out = 0;
	return length ? write_out(s, s->out_buffer, length) : MC_OK;
}

/* Puts bytes of a stream that goes somewhere. */
int mc_stream_put(struct mc_stream *s, const void *bytes, uint64_t length)
{
	if (s->out + length > OUT && mc_stream_flush(s))
		return s->code;
	if (length > OUT)
		return write_out(s, bytes, length);
	memcpy(s->out_buffer + s->out, bytes, length);
	s->out += (uint32_t)length;
	return MC_OK;
}

/* --- what goes to where RAM is --- */

int mc_stream_flush_sink(struct mc_stream *s)
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

/* Bytes of a page, to where its block is; they have to stand until mc_stream_flush_sink. */
int mc_stream_sink(struct mc_stream *s, const struct mc_stream_block *block, uint64_t at, const void *bytes,
		   uint64_t length)
{
	at += block->base;
	if (s->nr && (s->nr == PIECES || s->sink != block->fd || s->sink_at != at) && mc_stream_flush_sink(s))
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
int mc_stream_sink_zeros(struct mc_stream *s, const struct mc_stream_block *block, uint64_t at)
{
	static const uint8_t zeros[4096];
	uint8_t held[4096];

	if (mc_stream_flush_sink(s))
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
