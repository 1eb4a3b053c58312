/*
 * Directories and files that a VMM is started with, or that say who runs it.
 */
#ifndef MEMCONSOLE_STARTER_FILES_H
#define MEMCONSOLE_STARTER_FILES_H

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bootplan.h"

/* Make a directory and those above it. Returns 0 or -errno. */
static int make_directory(const char *path, mode_t mode)
{
	char *copy = strdup(path);
	int err = 0;

	if (!copy)
		return -ENOMEM;
	for (char *at = copy + 1; !err; at++) {
		char was = *at;

		if (was && was != '/')
			continue;
		*at = 0;
		if (mkdir(copy, mode) < 0 && errno != EEXIST)
			err = -errno;
		*at = was;
		if (!was)
			break;
	}
	free(copy);
	return err;
}

static int write_all(int fd, const char *bytes, size_t length)
{
	while (length) {
		ssize_t n = write(fd, bytes, length);

		if (n <= 0)
			return errno;
		bytes += n;
		length -= (size_t)n;
	}
	return 0;
}

/* Write a file of the plan, whole or not at all. Returns 0, or the errno of what cannot be done. */
static int put_file(const struct plan_file *f, pid_t pid)
{
	static const char mark[] = "@PID@";
	char fresh[4096], number[16], *slash;
	const char *at = f->bytes, *next;
	int fd, err;

	if (snprintf(fresh, sizeof(fresh), "%s", f->path) >= (int)sizeof(fresh) - 16)
		return ENAMETOOLONG;
	slash = strrchr(fresh, '/');
	if (slash && slash != fresh) {
		*slash = 0;
		err = -make_directory(fresh, 0755);
		if (err)
			return err;
	}
	snprintf(fresh, sizeof(fresh), "%s.memconsole", f->path);
	snprintf(number, sizeof(number), "%d", (int)pid);
	unlink(fresh);
	fd = open(fresh, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0)
		return errno;
	err = 0;
	next = memmem(at, f->length, mark, sizeof(mark) - 1);
	if (next) {		/* the first alone: others are words of people */
		err = write_all(fd, at, (size_t)(next - at));
		if (!err)
			err = write_all(fd, number, strlen(number));
		at = next + sizeof(mark) - 1;
	}
	if (!err)
		err = write_all(fd, at, (size_t)(f->bytes + f->length - at));
	if (!err && (fchown(fd, f->uid, f->gid) || fchmod(fd, f->mode & 07777)))
		err = errno;
	close(fd);
	if (!err && rename(fresh, f->path))
		err = errno;
	if (err)
		unlink(fresh);
	return err;
}

#endif
