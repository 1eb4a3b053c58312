/*
 * LUO's calls as include/uapi/linux/liveupdate.h has them, for those who only retrieve. The device has one opener at a
 * time; every call returns an fd or 0, or -errno.
 */
#ifndef MEMCONSOLE_LIVEUPDATE_H
#define MEMCONSOLE_LIVEUPDATE_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

#ifndef LUO_DEVICE		/* tests have another file in its place, which is busy when they want it */
#define LUO_DEVICE "/dev/liveupdate"
#endif
#define LUO_NAME_MAX 63
#define LUO_RETRIEVE_SESSION 0xBA01
#define LUO_RETRIEVE_FD 0xBA41
#define LUO_FINISH 0xBA42

struct luo_named {
	uint32_t size;
	int32_t fd;
	char name[LUO_NAME_MAX + 1];
};

struct luo_fd {
	uint32_t size;
	int32_t fd;
	uint64_t token;
};

struct luo_plain {
	uint32_t size, reserved;
};

/* The kernel hands fds out without FD_CLOEXEC. */
static inline int luo_taken(int fd)
{
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	return fd;
}

/* A session the kernel before handed over, of at most 63 bytes: -ENOENT there is none, -EINVAL it was retrieved. */
static inline int luo_session(int device, const char *name)
{
	struct luo_named argument = { .size = sizeof(argument), .fd = -1 };

	memcpy(argument.name, name, strnlen(name, LUO_NAME_MAX));
	return ioctl(device, LUO_RETRIEVE_SESSION, &argument) < 0 ? -errno : luo_taken(argument.fd);
}

/* A file of a session: -ENOENT there is none of this token; any failure lasts. */
static inline int luo_file(int session, uint64_t token)
{
	struct luo_fd argument = { .size = sizeof(argument), .fd = -1, .token = token };

	return ioctl(session, LUO_RETRIEVE_FD, &argument) < 0 ? -errno : luo_taken(argument.fd);
}

/* All of it was retrieved; what was not is discarded. */
static inline int luo_finish(int session)
{
	struct luo_plain argument = { .size = sizeof(argument) };

	return ioctl(session, LUO_FINISH, &argument) < 0 ? -errno : 0;
}

#endif
