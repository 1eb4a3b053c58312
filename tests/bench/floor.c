// SPDX-License-Identifier: MIT
/*
 * The floors that scans and digests are held against, and the process they scan.
 *
 * As a program: floor hold BYTES STRIDE maps a memfd of 4 KiB pages, touches every STRIDEth, then the ones behind
 * them and so on (1: in order; more scatters the frames), prints its address and waits to be killed. As a library:
 * floor_pagemap and floor_read, timed in the process that also times what is held against them.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static uint8_t *populated(uint64_t bytes, uint64_t stride)
{
	int fd = memfd_create("floor", MFD_CLOEXEC);
	uint8_t *map;

	if (fd < 0 || ftruncate(fd, (off_t)bytes))
		die("memfd");
	map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		die("mmap");
	for (uint64_t first = 0; first < stride; first++)
		for (uint64_t page = first; page < bytes / 4096; page += stride)
			map[page * 4096] = 1;
	return map;
}

/* Nanoseconds to read the pagemap of bytes from start on in 1 MiB preads and drop it. */
uint64_t floor_pagemap(int fd, uint64_t start, uint64_t bytes)
{
	uint64_t *entries = malloc(1 << 20), page = start / 4096, end = (start + bytes) / 4096, begin;

	if (!entries)
		die("malloc");
	begin = now();
	while (page < end) {
		uint64_t n = end - page < 1 << 17 ? end - page : 1 << 17;
		ssize_t got = pread(fd, entries, n * 8, (off_t)(page * 8));

		if (got <= 0)
			die("pread");
		page += (uint64_t)got / 8;
	}
	free(entries);
	return now() - begin;
}

struct share {
	const uint64_t *words;
	uint64_t n, sum;
};

static void *read_share(void *argument)
{
	struct share *share = argument;
	uint64_t sums[8] = { 0 };

	for (uint64_t i = 0; i + 8 <= share->n; i += 8)
		for (int lane = 0; lane < 8; lane++)
			sums[lane] += share->words[i + lane];
	for (int lane = 0; lane < 8; lane++)
		share->sum += sums[lane];
	return NULL;
}

/* Nanoseconds to read so much populated memory in 8-byte words with so many threads (at most 256), best of three. */
uint64_t floor_read(uint64_t bytes, unsigned int threads)
{
	const uint64_t *words = (const uint64_t *)populated(bytes, 1);
	struct share shares[256] = { { 0 } };
	pthread_t ids[256];
	uint64_t best = UINT64_MAX;

	for (int round = 0; round < 3; round++) {
		uint64_t begin = now(), took;

		for (unsigned int i = 0; i < threads; i++) {
			shares[i] = (struct share){ words + bytes / 8 / threads * i, bytes / 8 / threads, 0 };
			if (pthread_create(&ids[i], NULL, read_share, &shares[i]))
				die("pthread_create");
		}
		for (unsigned int i = 0; i < threads; i++)
			pthread_join(ids[i], NULL);
		took = now() - begin;
		if (took < best)
			best = took;
	}
	munmap((void *)words, bytes);
	return best + (shares[0].sum == 1);	/* the sum must be used, or it is never made */
}

/* Nanoseconds to write a byte to every page of bytes of a file, mapped for it; the mapping is left out of it. */
uint64_t floor_touch(int fd, uint64_t bytes)
{
	volatile uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	uint64_t begin, took;

	if (map == MAP_FAILED)
		die("mmap");
	begin = now();
	for (uint64_t page = 0; page < bytes / 4096; page++)
		map[page * 4096] = 1;
	took = now() - begin;
	munmap((void *)map, bytes);
	return took;
}

int main(int argc, char **argv)
{
	if (argc != 4 || strcmp(argv[1], "hold") || !strtoull(argv[3], NULL, 0)) {
		fprintf(stderr, "usage: floor hold BYTES STRIDE\n");
		return 2;
	}
	printf("%" PRIuPTR "\n", (uintptr_t)populated(strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0)));
	fflush(stdout);
	for (;;)
		pause();
}
