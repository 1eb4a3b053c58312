// SPDX-License-Identifier: MIT
/*
 * Drives the filter of migration streams under sanitizers: migration_driver ROUNDS SEED FILE... Each file is a stream that
 * is whole; it is filtered in pieces of any size, cut at every byte of its head and many of the rest, and spoiled ROUNDS
 * times. Whatever the bytes are, the outcome is one of those that core.h names, with a reason, and nothing is written
 * outside of the blocks that are elsewhere. Exit status 0, or 1 with the line that failed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"

#define CHECK(condition)                                                                              \
	do {                                                                                          \
		if (!(condition)) {                                                                   \
			fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, fail.source);     \
			exit(1);                                                                      \
		}                                                                                     \
	} while (0)

#define FRAME 4096	/* bytes of the sink before and behind the block */

static struct mc_fail fail = { 0, "" };
static uint64_t state;
static int target, sink_fd;

static uint64_t any(uint64_t below)
{
	state = state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (state >> 24) % below;
}

static uint8_t *contents(const char *path, uint64_t *length)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	uint8_t *bytes;

	CHECK(fd >= 0 && !fstat(fd, &st));
	bytes = malloc((size_t)st.st_size);
	*length = (uint64_t)st.st_size;
	CHECK(read(fd, bytes, *length) == st.st_size);
	close(fd);
	return bytes;
}

/* The size of pc.ram in a stream that is whole. */
static uint64_t ram_of(const uint8_t *bytes, uint64_t length)
{
	struct mc_stream *s;
	uint64_t size;

	CHECK(!mc_stream_new(&s, -1, 0, &fail));
	mc_stream_feed(s, bytes, length, &fail);
	CHECK(mc_stream_read(s)->blocks && !strcmp(mc_stream_read(s)->block[0].name, "pc.ram"));
	size = mc_stream_read(s)->block[0].length;
	mc_stream_free(s);
	return size;
}

/* Filters bytes in pieces, each of them in memory of its own, so that a read behind the end of one is seen. */
static int filter(const uint8_t *bytes, uint64_t length, uint64_t ram, uint64_t largest, int lock)
{
	struct mc_stream *s;
	int code = MC_OK;

	CHECK(!ftruncate(target, 0) && !lseek(target, 0, SEEK_SET));
	CHECK(!mc_stream_new(&s, target, lock, &fail));
	CHECK(!mc_stream_elsewhere(s, "pc.ram", ram, sink_fd, FRAME, &fail));
	for (uint64_t at = 0, n; at < length && !code; at += n) {
		uint8_t *piece;

		n = 1 + any(largest);
		n = n < length - at ? n : length - at;
		piece = malloc(n);
		memcpy(piece, bytes + at, n);
		code = mc_stream_feed(s, piece, n, &fail);
		free(piece);
	}
	fail.source = NULL;
	code = mc_stream_end(s, &fail);
	CHECK(code == MC_OK || ((code == MC_FORMAT || code == MC_RANGE) && fail.source));
	CHECK(memchr(mc_stream_read(s)->what, 0, 256) && memchr(mc_stream_read(s)->machine, 0, 256));
	fail.source = "";
	CHECK(lseek(target, 0, SEEK_END) <= (off_t)mc_stream_read(s)->out);
	CHECK(code || lseek(target, 0, SEEK_END) == (off_t)mc_stream_read(s)->out);
	mc_stream_free(s);
	return code;
}

/* A sink whose block is framed by bytes that must stay as they are. */
static uint8_t *make_sink(uint64_t ram)
{
	uint8_t *map;

	sink_fd = memfd_create("sink", MFD_CLOEXEC);
	CHECK(sink_fd >= 0 && !ftruncate(sink_fd, (off_t)(ram + 2 * FRAME)));
	map = mmap(NULL, ram + 2 * FRAME, PROT_READ | PROT_WRITE, MAP_SHARED, sink_fd, 0);
	CHECK(map != MAP_FAILED);
	memset(map, 0xa5, FRAME);
	memset(map + FRAME + ram, 0xa5, FRAME);
	return map;
}

static void check_frame(const uint8_t *map, uint64_t ram)
{
	struct stat st;

	for (int i = 0; i < FRAME; i++)
		CHECK(map[i] == 0xa5 && map[FRAME + ram + (uint64_t)i] == 0xa5);
	CHECK(!fstat(sink_fd, &st) && (uint64_t)st.st_size == ram + 2 * FRAME);
}

/* Spoils a copy in one to four places, more of them in its head and at the heads of its records. */
static void spoil(uint8_t *bytes, uint64_t length)
{
	static const uint8_t wild[] = { 0, 1, 2, 3, 4, 5, 7, 8, 0x10, 0x20, 0x22, 0x28, 0x40, 0x7e, 0x7f, 0xff };

	for (uint64_t n = 1 + any(4); n; n--) {
		uint64_t at = any(2) ? any(length < 300 ? length : 300) : any(length);

		switch (any(3)) {
		case 0:
			bytes[at] ^= (uint8_t)(1 << any(8));
			break;
		case 1:
			bytes[at] = wild[any(sizeof(wild))];
			break;
		default:
			at = at + 16 < length ? at : 0;
			memmove(bytes + at, bytes + at + 1 + any(7), 8);
		}
	}
}

static void drive(const char *path, uint64_t rounds)
{
	uint64_t length, ram, refused = 0;
	uint8_t *whole = contents(path, &length), *copy = malloc(length), *map;

	ram = ram_of(whole, length);
	map = make_sink(ram);
	for (int i = 0; i < 8; i++)
		CHECK(!filter(whole, length, ram, 1 + any(i % 2 ? 40 : 9000), i % 3 == 0));
	CHECK(filter(whole, length, ram + 4096, 9000, 0) == MC_FORMAT);
	for (uint64_t cut = 0; cut < length; cut += 1 + (cut > 400 ? any(length / 50) : 0))
		CHECK(filter(whole, cut, ram, 9000, 0) == MC_FORMAT);
	for (uint64_t round = 0; round < rounds; round++) {
		memcpy(copy, whole, length);
		spoil(copy, length);
		refused += filter(copy, any(4) ? length : any(length), ram, any(2) ? 50 : 9000, round % 2) != MC_OK;
		check_frame(map, ram);
	}
	CHECK(refused > rounds / 5 && refused <= rounds);
	munmap(map, ram + 2 * FRAME);
	close(sink_fd);
	free(copy);
	free(whole);
}

int main(int argc, char **argv)
{
	if (argc < 4) {
		fprintf(stderr, "usage: migration_driver ROUNDS SEED FILE...\n");
		return 2;
	}
	state = strtoull(argv[2], NULL, 0);
	target = memfd_create("target", MFD_CLOEXEC);
	for (int i = 3; i < argc; i++)
		drive(argv[i], strtoull(argv[1], NULL, 0));
	return 0;
}
