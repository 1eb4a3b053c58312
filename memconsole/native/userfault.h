/*
 * A userfaultfd by userfaultfd(2): it works for every user and kernel that /dev/userfaultfd works for, where the faults
 * are those of the process itself.
 */
#ifndef MEMCONSOLE_USERFAULT_H
#define MEMCONSOLE_USERFAULT_H

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* An fd that has these features, *there being all that the kernel has; or -1, errno and in *call what failed. */
static inline int userfault_open(int flags, uint64_t features, uint64_t *there, const char **call)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | flags);

	*call = "userfaultfd";
	if (fd < 0)
		return -1;
	if (ioctl(fd, UFFDIO_API, &api) < 0) {
		*call = "UFFDIO_API";
		close(fd);
		return -1;
	}
	*there = api.features;
	return fd;
}

#endif
