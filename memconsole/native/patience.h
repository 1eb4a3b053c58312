/*
 * How long a process is waited for, told by what it does and not by the clock alone.
 *
 * A process that the host gives no processor to cannot answer, and is not dead. So the time in which one of its threads
 * ran or waited for a processor is not held against it; the time in which all of them slept is. A process that is busy
 * for ever is waited for PATIENCE_MOST times as long. (backend/peers/patience.py is the same for the control process.)
 *
 *   /proc/PID/task/TID/schedstat = "RAN WAITED SLICES\n"	ns on a processor, ns runnable without one; decimal
 *
 * It is read only when the clock alone says that the time is over, so that those who answer cost nothing. Without
 * schedstat (CONFIG_SCHED_INFO) the clock decides.
 */
#ifndef MEMCONSOLE_PATIENCE_H
#define MEMCONSOLE_PATIENCE_H

#include <dirent.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "clock.h"
#include "proctext.h"

#define PATIENCE_MOST 12	/* a machine with a load of so many takes so many times as long for everything */
#define PATIENCE_THREADS 512	/* more of them are not looked at */

struct patience {
	pid_t pid;
	uint64_t within_ns;	/* how long it may sleep */
	uint64_t silent_ns;	/* how long it did */
	uint64_t looked, end;	/* CLOCK_MONOTONIC */
	int nr;
	struct thread_time {
		int tid;
		uint64_t ns;
	} threads[PATIENCE_THREADS];
};

/* Nanoseconds for which a thread wanted a processor, whether it got one or not; 0: it ended, or that is not counted. */
static uint64_t thread_wanted(pid_t pid, int tid)
{
	unsigned long long ran = 0, waited = 0;
	char path[64], text[128];

	snprintf(path, sizeof(path), "/proc/%d/task/%d/schedstat", (int)pid, tid);
	if (!proc_text(path, text, sizeof(text)))
		return 0;
	return sscanf(text, "%llu %llu", &ran, &waited) == 2 ? ran + waited : 0;
}

/* What a thread had when it was looked at before; 0 for a new one. */
static uint64_t thread_before(const struct patience *p, int tid)
{
	for (int i = 0; i < p->nr; i++)
		if (p->threads[i].tid == tid)
			return p->threads[i].ns;
	return 0;
}

/* Look at all threads. Returns for how many nanoseconds the busiest wanted a processor since the look before. */
static uint64_t patience_look(struct patience *p)
{
	struct thread_time found[PATIENCE_THREADS];
	uint64_t busiest = 0;
	struct dirent *entry;
	char path[64];
	int nr = 0;
	DIR *tasks;

	snprintf(path, sizeof(path), "/proc/%d/task", (int)p->pid);
	tasks = opendir(path);
	while (tasks && nr < PATIENCE_THREADS && (entry = readdir(tasks))) {
		struct thread_time now = { .tid = atoi(entry->d_name) };
		uint64_t before = thread_before(p, now.tid);

		if (now.tid <= 0)
			continue;
		now.ns = thread_wanted(p->pid, now.tid);
		if (now.ns > before && now.ns - before > busiest)
			busiest = now.ns - before;
		found[nr++] = now;
	}
	if (tasks)
		closedir(tasks);
	for (int i = 0; i < nr; i++)
		p->threads[i] = found[i];
	p->nr = nr;
	return busiest;
}

static void patience_begin(struct patience *p, pid_t pid, unsigned int within_ms)
{
	p->pid = pid;
	p->within_ns = within_ms * 1000000ull;
	p->silent_ns = 0;
	p->looked = clock_ns(CLOCK_MONOTONIC);
	p->end = p->looked + PATIENCE_MOST * p->within_ns;
	p->nr = 0;
	patience_look(p);
}

/* Milliseconds that may be waited before this is asked again; 0: there is no reason to wait any longer. */
static int patience_left(struct patience *p)
{
	uint64_t now = clock_ns(CLOCK_MONOTONIC), left;

	if (p->silent_ns + (now - p->looked) >= p->within_ns) {
		uint64_t busy = patience_look(p);

		p->silent_ns += now - p->looked > busy ? now - p->looked - busy : 0;
		p->looked = now;
	}
	if (now >= p->end || p->silent_ns + (now - p->looked) >= p->within_ns)
		return 0;
	left = p->within_ns - p->silent_ns - (now - p->looked);
	if (left > p->end - now)
		left = p->end - now;
	return (int)(left / 1000000) + 1;
}

/* Whether something can be read from an fd before patience with its process is over. */
static bool patience_poll(struct patience *p, int fd)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN };
	int left = 0;

	if (poll(&polled, 1, 0) == 1)
		return true;
	do {
		left = patience_left(p);
		if (poll(&polled, 1, left) == 1)
			return true;
	} while (left);
	return false;
}

#endif
