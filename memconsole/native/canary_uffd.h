/*
 * The canary's page faults, handed over: a mapping registered with an userfaultfd for the control process.
 */
#ifndef MEMCONSOLE_CANARY_UFFD_H
#define MEMCONSOLE_CANARY_UFFD_H

#include <stdint.h>

#include "agent.h"
#include "userfault.h"

/* Linux 7.3; older headers do not name them. */
#define CANARY_FEATURE_RWP	(1ull << 17)
#define CANARY_MODE_RWP		(1ull << 3)

static int uffd_open(uint64_t features, uint64_t *there)
{
	const char *call;

	return userfault_open(O_NONBLOCK, features, there, &call);
}

/*
 * Register a mapping for what is wanted of it (enum agent_wants), as far as the kernel can; *modes is what it is
 * registered for. Returns an fd, or -1 where there is nothing to be had. Touches nothing of the mapping.
 */
static int uffd_register(void *at, uint64_t length, uint32_t wants, uint32_t *modes)
{
	const uint64_t faults = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS |
				UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS;
	struct uffdio_register r = { .range = { (uintptr_t)at, length } };
	uint64_t there = 0, features = 0;
	int fd;

	*modes = 0;
	if (!wants)
		return -1;
	fd = uffd_open(0, &there);
	if (fd < 0)
		return -1;
	close(fd);	/* an fd that has said what there is does not let one choose any more */
	if (wants & AGENT_WANTS_FAULTS && (there & faults) == faults) {
		features |= faults;
		r.mode |= UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR;
	}
	if (wants & AGENT_WANTS_SHIELD && there & CANARY_FEATURE_RWP) {
		features |= CANARY_FEATURE_RWP | (there & faults);
		r.mode |= CANARY_MODE_RWP;
	}
	fd = r.mode ? uffd_open(features, &there) : -1;
	if (fd < 0)
		return -1;
	if (ioctl(fd, UFFDIO_REGISTER, &r) < 0) {
		close(fd);
		return -1;
	}
	*modes = (uint32_t)r.mode;
	return fd;
}

#endif
