// SPDX-License-Identifier: MIT
/*
 * A guest's page faults, served: memory that is put in place when the guest first touches it.
 *
 *   guest touches a page ─→ its thread waits, a message on the uffd ─→ the thread here
 *     MISSING  the memory file has no page there: a batch of pages is put into the file first
 *     MINOR    the file has the page, the guest's page table does not
 *   ─→ UFFDIO_CONTINUE maps the batch into the guest, which goes on
 *
 * The guest registers its mapping and hands the uffd over; it keeps waiting while nobody serves, and nothing is lost
 * when a server dies as long as somebody holds the uffd. What was served is counted on a board, a memory file that
 * outlives the server too:
 *
 *   board  = header bitmap		the header is struct mc_board, padded to 4096 bytes
 *   bitmap = a bit a page of the range, set once the page was mapped here (bit 0 of byte 0 is the first page)
 *
 * One thread a range, one writer a board; readers take numbers as they are.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

#define HEADER 4096
#define MAGIC 0x31595a414c434dULL	/* "MCLAZY1" */
#define MESSAGES 16
#define SECOND 1000000000ULL
#define RETRY_NS 1000000L	/* before a guest that could not be served asks again */

struct mc_faults {
	int uffd, file, stop;
	uint64_t page;
	struct mc_board *board;
	uint8_t *bits;
	uint64_t bytes;		/* of the board */
	pthread_t thread;
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * SECOND + (uint64_t)ts.tv_nsec;
}

static void mark(struct mc_faults *f, uint64_t start, uint64_t bytes)
{
	uint64_t page = (start - f->board->start) / f->page;
	uint64_t end = page + bytes / f->page;

	f->board->pages += bytes / f->page;
	for (; page < end && page % 8; page++)
		f->bits[page / 8] |= (uint8_t)(1u << page % 8);
	for (; page + 8 <= end; page += 8)
		f->bits[page / 8] = 0xff;
	for (; page < end; page++)
		f->bits[page / 8] |= (uint8_t)(1u << page % 8);
}

/* Maps what the file holds of at..end into the guest, and wakes whoever waits there. Returns 0 or an errno. */
static int map_pages(struct mc_faults *f, uint64_t at, uint64_t end)
{
	struct uffdio_range all = { at, end - at };
	bool skipped = false;

	while (at < end) {
		struct uffdio_continue c = { .range = { at, end - at } };
		int err = ioctl(f->uffd, UFFDIO_CONTINUE, &c) ? errno : 0;

		if (c.mapped > 0) {
			mark(f, at, (uint64_t)c.mapped);
			at += (uint64_t)c.mapped;
		} else if (err == EEXIST || err == EFAULT) {	/* mapped already; or the file has no page here */
			skipped = true;
			at += f->page;
		} else if (err != EAGAIN) {
			return err;
		}
	}
	if (skipped)
		ioctl(f->uffd, UFFDIO_WAKE, &all);
	return 0;
}

static void count(struct mc_board *b, bool missing, uint64_t begun)
{
	uint64_t end = now_ns(), second = end / SECOND;

	if (second != b->second) {
		b->before = second == b->second + 1 ? b->in_second : 0;
		b->in_second = 0;
		b->second = second;
	}
	b->in_second++;
	b->missing += missing;
	b->minor += !missing;
	b->busy_ns += end - begun;
	if (end - begun > b->longest_ns)
		b->longest_ns = end - begun;
}

/* Serves one fault. Returns 0, or the errno that says there is no guest any more. */
static int serve(struct mc_faults *f, const struct uffd_msg *m)
{
	const struct mc_board *b = f->board;
	uint64_t begun = now_ns(), at = m->arg.pagefault.address & ~(f->page - 1), in_file, first, last;
	bool missing = !(m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
	int err;

	if (at < b->start || at >= b->start + b->length)
		return 0;
	/* A batch is aligned in the file, as huge pages are; what of it lies outside the range is not the guest's. */
	in_file = at - b->start + b->offset;
	first = in_file & ~(b->batch - 1);
	last = first + b->batch;
	if (first < b->offset)
		first = b->offset;
	if (last > b->offset + b->length)
		last = b->offset + b->length;
	if (missing && fallocate(f->file, 0, (off_t)first, (off_t)(last - first)) &&
	    fallocate(f->file, 0, (off_t)in_file, (off_t)f->page)) {
		struct uffdio_range page = { at, f->page };
		struct timespec pause = { 0, RETRY_NS };

		f->board->refused++;
		nanosleep(&pause, NULL);
		ioctl(f->uffd, UFFDIO_WAKE, &page);
		return 0;
	}
	err = map_pages(f, first - b->offset + b->start, last - b->offset + b->start);
	count(f->board, missing, begun);
	/* ENOENT: the mapping changed under us; the guest asks again if it still wants the page. */
	return err == ESRCH || err == EBADF ? err : 0;
}

static void *serve_all(void *argument)
{
	struct mc_faults *f = argument;
	struct pollfd p[2] = { { .fd = f->uffd, .events = POLLIN }, { .fd = f->stop, .events = POLLIN } };
	struct uffd_msg messages[MESSAGES];

	for (;;) {
		ssize_t got;

		if (poll(p, 2, -1) < 0)
			continue;
		if (p[1].revents || !(p[0].revents & POLLIN))
			return NULL;
		got = read(f->uffd, messages, sizeof(messages));
		for (ssize_t i = 0; i * (ssize_t)sizeof(*messages) < got; i++)
			if (messages[i].event == UFFD_EVENT_PAGEFAULT &&
			    !(messages[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) && serve(f, &messages[i]))
				return NULL;
	}
}

/* Bytes of the board of a range, or 0 where length and page size cannot be. */
uint64_t mc_board_bytes(uint64_t length, uint64_t page)
{
	if (!page || page & (page - 1) || length % page || !length)
		return 0;
	return HEADER + (length / page + 7) / 8;
}

static bool fits(const struct mc_board *b, const struct mc_board *want)
{
	return b->magic == MAGIC && b->start == want->start && b->length == want->length &&
	       b->offset == want->offset && b->page == want->page;
}

static int map_board(struct mc_faults *f, int fd, const struct mc_board *want, struct mc_fail *fail)
{
	struct stat st;

	f->bytes = mc_board_bytes(want->length, want->page);
	if (!f->bytes || want->start % want->page || want->offset % want->page || want->batch < want->page ||
	    want->batch & (want->batch - 1))
		return mc_fail(fail, MC_RANGE, 0, "a range or a batch that is not made of pages");
	if (fstat(fd, &st) || (st.st_size < (off_t)f->bytes && ftruncate(fd, (off_t)f->bytes)))
		return mc_fail_errno(fail, "ftruncate");
	f->board = mmap(NULL, f->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (f->board == MAP_FAILED) {
		f->board = NULL;
		return mc_fail_errno(fail, "mmap");
	}
	f->bits = (uint8_t *)f->board + HEADER;
	if (!fits(f->board, want)) {
		memset(f->board, 0, f->bytes);
		*f->board = *want;
		f->board->magic = MAGIC;
	}
	f->board->batch = want->batch;
	return MC_OK;
}

/*
 * Stops serving and lets go of everything; the guest goes on until it touches what it lacks, and waits then. The uffd
 * stays whoever else's it is.
 */
void mc_faults_stop(struct mc_faults *f)
{
	uint64_t one = 1;

	if (f->thread) {
		while (write(f->stop, &one, sizeof(one)) < 0 && errno == EINTR)
			;
		pthread_join(f->thread, NULL);
	}
	if (f->board)
		munmap(f->board, f->bytes);
	for (int *fd = (int[]){ f->uffd, f->file, f->stop, -2 }; *fd != -2; fd++)
		if (*fd >= 0)
			close(*fd);
	free(f);
}

static int start(struct mc_faults *f, int uffd, int file, int board, const struct mc_board *want,
		 struct mc_fail *fail)
{
	int code, err;

	f->page = want->page;
	code = map_board(f, board, want, fail);
	if (code)
		return code;
	f->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 3);
	f->file = fcntl(file, F_DUPFD_CLOEXEC, 3);
	f->stop = eventfd(0, EFD_CLOEXEC);
	if (f->uffd < 0 || f->file < 0 || f->stop < 0)
		return mc_fail_errno(fail, "F_DUPFD_CLOEXEC");
	/* An uffd that blocks cannot be waited for together with anything else. */
	if (fcntl(f->uffd, F_SETFL, O_NONBLOCK))
		return mc_fail_errno(fail, "F_SETFL");
	err = pthread_create(&f->thread, NULL, serve_all, f);
	if (err) {
		f->thread = 0;
		return mc_fail(fail, MC_KERNEL, err, "pthread_create");
	}
	return MC_OK;
}

/*
 * Serves, in a thread of its own, the faults that arrive on `uffd` for want->length bytes of the guest's memory from
 * want->start on, which are those of the memory file `file` from want->offset on. want->batch is how many bytes are
 * put in place a fault. `board` is an empty memory file, or the board of an earlier server of the same range, which is
 * gone on with. The fds stay the caller's.
 * Errors: MC_RANGE, MC_KERNEL, MC_MEMORY.
 */
int mc_faults_start(struct mc_faults **out, int uffd, int file, int board, const struct mc_board *want,
		    struct mc_fail *fail)
{
	struct mc_faults *f = calloc(1, sizeof(*f));
	int code;

	if (!f)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	f->uffd = f->file = f->stop = -1;
	code = start(f, uffd, file, board, want, fail);
	if (code)
		mc_faults_stop(f);
	else
		*out = f;
	return code;
}

/* What was served up to now. *rate is faults in the last whole second. */
void mc_faults_read(const struct mc_faults *f, struct mc_board *out, uint64_t *rate)
{
	uint64_t second = now_ns() / SECOND;

	*out = *f->board;
	*rate = second == out->second ? out->before : second == out->second + 1 ? out->in_second : 0;
}
