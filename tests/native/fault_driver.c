// SPDX-License-Identifier: MIT
/*
 * Drives copy.c and fault.c: files with holes copied both ways and wiped, faults served to threads that touch the same
 * memory, boards gone on with, and arguments that cannot be. Exits 0, 1 with what is wrong, or 77 where there is no
 * userfaultfd.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

#define PAGE 4096ull
#define SIZE (8ull << 20)

#define CHECK(what) do { if (!(what)) { fprintf(stderr, "line %d: %s\n", __LINE__, #what); exit(1); } } while (0)

static int file(uint64_t size)
{
	int fd = memfd_create("driver", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
	return fd;
}

static void copies(int by_map, unsigned int threads)
{
	struct mc_fail fail;
	struct stat st;
	uint64_t copied;
	char word[8];
	int from = file(SIZE), to = file(SIZE), small = file(PAGE), target = file(PAGE);

	for (uint64_t at = 0; at < SIZE; at += 3 * PAGE)
		CHECK(pwrite(from, &at, sizeof(at), (off_t)at) == sizeof(at));
	CHECK(mc_copy(from, to, SIZE, by_map, threads, &copied, &fail) == MC_OK);
	CHECK(fstat(to, &st) == 0 && (uint64_t)st.st_blocks * 512 == copied);
	CHECK(copied == (SIZE / PAGE + 2) / 3 * PAGE);
	for (uint64_t at = 0; at < SIZE; at += 3 * PAGE)
		CHECK(pread(to, word, 8, (off_t)at) == 8 && memcmp(word, &at, 8) == 0);
	CHECK(mc_copy(from, to, 0, by_map, threads, &copied, &fail) == MC_OK && copied == 0);
	CHECK(mc_copy(-1, to, SIZE, by_map, threads, &copied, &fail) == MC_KERNEL && fail.err == EBADF);
	/* A source that is shorter than it was said to be has nothing to give behind its end. */
	CHECK(mc_copy(small, target, SIZE, 0, threads, &copied, &fail) == MC_OK && copied == 0);
	close(from);
	close(to);
	close(small);
	close(target);
}

static void wipes(void)
{
	static char seen[SIZE], zeros[SIZE];
	struct mc_fail fail;
	struct stat before, after;
	uint64_t zeroed;
	int fd = file(SIZE), sealed = memfd_create("driver", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	for (uint64_t at = 0; at < SIZE; at += 3 * PAGE)
		CHECK(pwrite(fd, "secret", 6, (off_t)at) == 6);
	for (uint64_t at = SIZE / 2; at < SIZE; at += PAGE)
		CHECK(pwrite(fd, "secret", 6, (off_t)at) == 6);
	CHECK(fstat(fd, &before) == 0);
	CHECK(mc_wipe(fd, SIZE, &zeroed, &fail) == MC_OK);
	CHECK(pread(fd, seen, SIZE, 0) == SIZE && !memcmp(seen, zeros, SIZE));
	CHECK(fstat(fd, &after) == 0 && after.st_blocks == before.st_blocks);
	CHECK(zeroed == (uint64_t)before.st_blocks * 512);
	CHECK(mc_wipe(fd, 0, &zeroed, &fail) == MC_OK && zeroed == 0);
	CHECK(mc_wipe(-1, SIZE, &zeroed, &fail) == MC_KERNEL && fail.err == EBADF);
	CHECK(pwrite(sealed, "secret", 6, 0) == 6 && fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE) == 0);
	CHECK(mc_wipe(sealed, PAGE, &zeroed, &fail) == MC_KERNEL && fail.err == EPERM && zeroed == 0);
	close(fd);
	close(sealed);
}

static int uffd_of(char *at, uint64_t size)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_SHMEM };
	struct uffdio_register r = { .range = { (uintptr_t)at, size },
				     .mode = UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_MISSING };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		exit(77);
	CHECK(ioctl(fd, UFFDIO_REGISTER, &r) == 0);
	return fd;
}

static void *touch(void *at)
{
	for (uint64_t page = 0; page < SIZE / PAGE; page++)
		(void)((volatile char *)at)[page * PAGE];
	return NULL;
}

static void faults(uint64_t batch, int holes)
{
	int fd = file(SIZE), board = file(0);
	char *at = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	int uffd = uffd_of(at, SIZE);
	struct mc_board want = { .start = (uintptr_t)at, .length = SIZE, .page = PAGE, .batch = batch }, seen;
	struct mc_faults *f;
	struct mc_fail fail;
	uint64_t rate;
	pthread_t ids[4];

	CHECK(at != MAP_FAILED);
	if (!holes)
		CHECK(fallocate(fd, 0, 0, SIZE) == 0);
	CHECK(mc_faults_start(&f, uffd, fd, board, &want, &fail) == MC_OK);
	for (int i = 0; i < 4; i++)
		CHECK(pthread_create(&ids[i], NULL, touch, at) == 0);
	for (int i = 0; i < 4; i++)
		pthread_join(ids[i], NULL);
	mc_faults_stop(f);	/* which waits until the last fault is counted */
	CHECK(mc_faults_start(&f, uffd, fd, board, &want, &fail) == MC_OK);
	mc_faults_read(f, &seen, &rate);
	CHECK(seen.pages == SIZE / PAGE && seen.refused == 0);
	CHECK(holes ? seen.missing >= SIZE / batch : seen.missing == 0 && seen.minor >= SIZE / batch);
	mc_faults_stop(f);
	want.batch = 3 * PAGE;
	CHECK(mc_faults_start(&f, uffd, fd, board, &want, &fail) == MC_RANGE);
	want.batch = batch;
	want.length = PAGE / 2;
	CHECK(mc_faults_start(&f, uffd, fd, board, &want, &fail) == MC_RANGE);
	want.length = SIZE;
	CHECK(mc_faults_start(&f, -1, fd, board, &want, &fail) == MC_KERNEL && fail.err == EBADF);
	munmap(at, SIZE);
	close(uffd);
	close(fd);
	close(board);
}

int main(void)
{
	for (int by_map = 0; by_map < 2; by_map++)
		for (unsigned int threads = 0; threads < 4; threads++)
			copies(by_map, threads);
	wipes();
	for (uint64_t batch = PAGE; batch <= 2 << 20; batch *= 8) {
		faults(batch, 0);
		faults(batch, 1);
	}
	CHECK(mc_board_bytes(0, PAGE) == 0 && mc_board_bytes(PAGE, 3) == 0 && mc_board_bytes(9 * PAGE, PAGE) == 4098);
	return 0;
}
