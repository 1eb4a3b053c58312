/*
 * Moments that can be told apart on both sides of a kexec.
 *
 * No clock of the kernel does it: CLOCK_BOOTTIME begins anew, and CLOCK_REALTIME is read from a battery clock of whole
 * seconds. The processor's own counter goes on. So a moment is all three, and the ticks between two moments are turned
 * into time with the rate that one kernel saw.
 */
#ifndef MEMCONSOLE_CLOCK_H
#define MEMCONSOLE_CLOCK_H

#include <stdint.h>
#include <time.h>
#if defined(__x86_64__)
#include <x86intrin.h>
#endif

#define AGAIN_NS 1000000		/* between two tries */

struct moment {
	uint64_t ticks;		/* TSC; 0 on processors whose counter is not known here */
	uint64_t boottime_ns;
	uint64_t realtime_ns;
};

static inline uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static inline struct moment moment_now(void)
{
	struct moment now = {
		.boottime_ns = clock_ns(CLOCK_BOOTTIME), .realtime_ns = clock_ns(CLOCK_REALTIME),
	};

#if defined(__x86_64__)
	now.ticks = __rdtsc();
#endif
	return now;
}

static inline void wait_ns(uint64_t ns)
{
	struct timespec ts = { (time_t)(ns / 1000000000), (long)(ns % 1000000000) };

	nanosleep(&ts, NULL);
}

/**
 * moment_between() - nanoseconds from one moment to another, whichever kernels they were in
 * @from: the earlier one
 * @to: the later one
 * @old: a moment of one kernel
 * @new: a later one of the same kernel: the two tell how fast the counter goes
 *
 * Return: nanoseconds; by CLOCK_REALTIME, to a second, where the counter does not tell.
 */
static inline uint64_t moment_between(const struct moment *from, const struct moment *to, const struct moment *old,
				      const struct moment *new)
{
	uint64_t ticks = new->ticks - old->ticks, ns = new->boottime_ns - old->boottime_ns;

	if (from->ticks && to->ticks >= from->ticks && new->ticks > old->ticks && ns)
		return (uint64_t)((double)(to->ticks - from->ticks) * (double)ns / (double)ticks);
	return to->realtime_ns > from->realtime_ns ? to->realtime_ns - from->realtime_ns : 0;
}

#endif
