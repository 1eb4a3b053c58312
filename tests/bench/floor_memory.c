// SPDX-License-Identifier: MIT
/* The floors of revokes and of page faults served: the bare calls, timed in the process that times what is held to them. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull

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

static char *file_map(uint64_t bytes, int *fd)
{
	char *map;

	*fd = memfd_create("floor", MFD_CLOEXEC);
	if (*fd < 0 || ftruncate(*fd, (off_t)bytes))
		die("memfd");
	map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (map == MAP_FAILED)
		die("mmap");
	return map;
}

struct part {
	char *to;
	const char *from;
	uint64_t bytes;
};

static void *copy(void *argument)
{
	struct part *part = argument;

	return memcpy(part->to, part->from, part->bytes);
}

/* Nanoseconds to memcpy so much touched memory into a fresh memfd with so many threads (at most 64). */
uint64_t floor_memcpy(uint64_t bytes, unsigned int threads)
{
	struct part parts[64];
	pthread_t ids[64];
	int from, to;
	char *source = file_map(bytes, &from), *target;
	uint64_t begin, took;

	memset(source, 7, bytes);
	begin = now();
	target = file_map(bytes, &to);
	for (unsigned int i = 0; i < threads; i++) {
		uint64_t at = bytes / threads * i;

		parts[i] = (struct part){ target + at, source + at, bytes / threads };
		if (pthread_create(&ids[i], NULL, copy, &parts[i]))
			die("pthread_create");
	}
	for (unsigned int i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
	took = now() - begin;
	munmap(source, bytes);
	munmap(target, bytes);
	close(from);
	close(to);
	return took;
}

/* Nanoseconds to cut so much touched and mapped memory of a memfd off by ftruncate. */
uint64_t floor_empty(uint64_t bytes)
{
	uint64_t begin, took;
	int fd;
	char *map = file_map(bytes, &fd);

	memset(map, 7, bytes);
	begin = now();
	if (ftruncate(fd, 0))
		die("ftruncate");
	took = now() - begin;
	munmap(map, bytes);
	close(fd);
	return took;
}

/* A populated memfd mapped anew and registered for minor faults; the uffd, the memfd and the address into `out`. */
void floor_register(uint64_t bytes, uint64_t *out)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM };
	struct uffdio_register r = { .mode = UFFDIO_REGISTER_MODE_MINOR };
	int fd, uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	char *map = file_map(bytes, &fd);

	memset(map, 7, bytes);
	munmap(map, bytes);
	/* Where a batch of 2 MiB begins on a boundary of 2 MiB, and what lies around it is nobody's. */
	map = mmap(NULL, bytes + (2ull << 20), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	map = (char *)(((uintptr_t)map + (2ull << 20) - 1) & ~((2ull << 20) - 1));
	map = mmap(map, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	r.range.start = (uintptr_t)map;
	r.range.len = bytes;
	if (uffd < 0 || map == MAP_FAILED || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &r))
		die("userfaultfd");
	out[0] = (uint64_t)uffd;
	out[1] = (uint64_t)fd;
	out[2] = (uintptr_t)map;
}

void floor_unregister(const uint64_t *in, uint64_t bytes)
{
	munmap((void *)in[2], bytes);
	close((int)in[0]);
	close((int)in[1]);
}

/* Nanoseconds to touch every stride-th byte. */
uint64_t floor_touch(uint64_t address, uint64_t bytes, uint64_t stride)
{
	uint64_t begin = now();

	for (uint64_t at = 0; at < bytes; at += stride)
		(void)*(volatile char *)(address + at);
	return now() - begin;
}

static struct {
	int uffd, stop;
	uint64_t batch;
	pthread_t thread;
} handler;

/* The least a handler can do: wait, read, continue a batch. */
static void *handle(void *unused)
{
	struct pollfd p[2] = { { .fd = handler.uffd, .events = POLLIN }, { .fd = handler.stop, .events = POLLIN } };
	struct uffd_msg m;

	(void)unused;
	for (;;) {
		struct uffdio_continue c = { .mode = 0 };

		poll(p, 2, -1);
		if (p[1].revents)
			return NULL;
		if (read(handler.uffd, &m, sizeof(m)) != sizeof(m))
			continue;
		c.range.start = m.arg.pagefault.address & ~(handler.batch - 1);
		c.range.len = handler.batch;
		if (ioctl(handler.uffd, UFFDIO_CONTINUE, &c))
			die("UFFDIO_CONTINUE");
	}
}

void floor_serve(int uffd, uint64_t batch)
{
	handler.uffd = uffd;
	handler.batch = batch;
	handler.stop = eventfd(0, EFD_CLOEXEC);
	if (pthread_create(&handler.thread, NULL, handle, NULL))
		die("pthread_create");
}

void floor_stop(void)
{
	uint64_t one = 1;

	if (write(handler.stop, &one, sizeof(one)) < 0)
		die("write");
	pthread_join(handler.thread, NULL);
	close(handler.stop);
}
