// SPDX-License-Identifier: MIT
/*
 * Where the tree is mounted: at one place, and, by bind mounts that others make of it, at more. Its end is the end of all
 * of them.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fuse.h"

#define FSTYPE "fuse.memconsole"
#define HUNG_S 10
#define ELSEWHERE_MAX 64

static int fail(const char *doing, const char *what)
{
	fprintf(stderr, "memconsole-fuse: cannot %s %s: %s\n", doing, what, strerror(errno));
	return 1;
}

/* Writes a field of mountinfo, where blanks are written as \ooo, as it is meant. */
static void unescape(char *field)
{
	char *to = field;

	while (*field) {
		unsigned int code;

		if (*field == '\\' && sscanf(field + 1, "%3o", &code) == 1) {
			*to++ = (char)code;
			field += 4;
		} else {
			*to++ = *field++;
		}
	}
	*to = 0;
}

/* The connection number of our topmost mount at a path (/proc/self/mountinfo: minor), 0 if there is none of ours. */
static uint32_t mounted(const char *mountpoint)
{
	FILE *file = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t room = 0;
	uint32_t found = 0;

	while (file && getline(&line, &room, file) > 0) {
		char *at = malloc(strlen(line) + 1), *type = strstr(line, " - ");
		unsigned int minor;

		if (at && type && sscanf(line, "%*d %*d %*u:%u %*s %s", &minor, at) == 2) {
			unescape(at);
			if (!strcmp(at, mountpoint))
				found = strncmp(type + 3, FSTYPE " ", strlen(FSTYPE) + 1) ? 0 : minor;
		}
		free(at);
	}
	free(line);
	if (file)
		fclose(file);
	return found;
}

/* Ends a connection whose server is dead, so that nobody waits for it any more. Without fusectl it ended by itself. */
static void abort_connection(uint32_t number)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/sys/fs/fuse/connections/%u/abort", number);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (write(fd, "1", 1) != 1)
		fail("abort the dead connection by", path);
	close(fd);
}

/* Takes mounts of dead servers away. Returns 0 or the exit status. */
static int clear(const char *mountpoint)
{
	uint32_t number;

	while ((number = mounted(mountpoint))) {
		struct statfs fs;
		int error;

		alarm(HUNG_S);	/* ends this process, should the server neither answer nor be dead */
		error = statfs(mountpoint, &fs) ? errno : 0;	/* never answered from a cache */
		alarm(0);
		if (error != ENOTCONN && error != ECONNABORTED) {
			fprintf(stderr, "memconsole-fuse: another server already serves %s: stop it first, or name another MOUNTPOINT\n",
				mountpoint);
			return 3;
		}
		abort_connection(number);
		if (umount2(mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW))
			return fail("unmount the dead mount at", mountpoint);
	}
	return 0;
}

/* Asks the kernel by doing it. */
static void probe_passthrough(void)
{
	int fd = memfd_create("memconsole-fuse-probe", MFD_CLOEXEC);
	int32_t id;

	if (server.passthrough)
		return;
	if (fd < 0) {
		server.passthrough = errno;
		return;
	}
	server.passthrough = -backing_open(fd, &id);
	if (!server.passthrough)
		backing_close(id);
	close(fd);
}

/* The path without links, as mountinfo shows it, even if the mount there is dead. Returns 0 or -1 with errno. */
static int resolve(const char *path, char *resolved)
{
	char parent[PATH_MAX];
	const char *name = strrchr(path, '/') + 1;

	if (realpath(path, resolved))
		return 0;
	if (errno != ENOTCONN || strlen(path) >= sizeof(parent))
		return -1;
	snprintf(parent, sizeof(parent), "%.*s", (int)(name - path), path);
	if (!realpath(parent, resolved) || strlen(resolved) + 1 + strlen(name) >= PATH_MAX)
		return -1;
	if (strcmp(resolved, "/"))
		strcat(resolved, "/");
	strcat(resolved, name);
	return 0;
}

/* Mounts, the place itself as the source: whatever shows the same later tells whose it is. Answers the kernel's first request. Returns 0 or the exit status. */
int mount_at(const char *path)
{
	static char mountpoint[PATH_MAX];
	struct worker *worker;
	char options[128];
	int status, error = 0;

	if (resolve(path, mountpoint))
		return fail("find", path);
	if (strlen(mountpoint) > PATH_LEN_MAX) {
		fprintf(stderr, "memconsole-fuse: MOUNTPOINT must have at most %d bytes\n", PATH_LEN_MAX);
		return 2;
	}
	status = clear(mountpoint);
	if (status)
		return status;
	server.dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (server.dev < 0)
		return fail("open", "/dev/fuse");
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=%u,group_id=%u,allow_other,default_permissions",
		 server.dev, geteuid(), getegid());
	if (mount(mountpoint, mountpoint, FSTYPE, MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME, options))
		return fail("mount on", mountpoint);
	server.mountpoint = mountpoint;
	worker = worker_new(server.dev);
	while (worker && !server.major && !error)
		error = worker_serve(worker);
	worker_free(worker);
	if (!server.major) {
		errno = worker ? -error : ENOMEM;
		fail("answer", "the kernel's first request");
		unmount(true);
		return 1;
	}
	probe_passthrough();
	server.connection = mounted(mountpoint);
	return 0;
}

/* A mount of a part of the tree: which part ("/guests"), and where. */
struct elsewhere {
	char *root, *path;
};

/* The mounts of the tree at other places, the newest last. Returns how many. */
static size_t elsewhere(struct elsewhere *found)
{
	FILE *file = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t room = 0, nr = 0;

	while (file && nr < ELSEWHERE_MAX && getline(&line, &room, file) > 0) {
		char *root = malloc(strlen(line) + 1), *path = malloc(strlen(line) + 1);
		unsigned int minor;

		if (root && path && sscanf(line, "%*d %*d 0:%u %s %s", &minor, root, path) == 3 &&
		    minor == server.connection) {
			unescape(root);
			unescape(path);
			if (strcmp(path, server.mountpoint)) {
				found[nr++] = (struct elsewhere){ root, path };
				continue;
			}
		}
		free(root);
		free(path);
	}
	free(line);
	if (file)
		fclose(file);
	return nr;
}

/* Mounts a part of the tree where it was, in a child that holds nothing of ours (fuse_entries.c, look_up). */
static void put_back(const struct elsewhere *part)
{
	char from[2 * PATH_MAX];
	pid_t child = fork();

	if (!child) {
		syscall(SYS_close_range, 0, ~0U, 0);
		snprintf(from, sizeof(from), "%s%s", server.mountpoint, part->root);
		_exit(mount(from, part->path, NULL, MS_BIND, NULL) ? 1 : 0);
	}
	if (child > 0)
		waitpid(child, NULL, 0);
}

static int take(const char *path, bool lazily)
{
	if (!umount2(path, UMOUNT_NOFOLLOW | (lazily ? MNT_DETACH : 0)))
		return 0;
	return errno == EINVAL || errno == ENOENT ? 0 : -errno;		/* somebody else has unmounted it */
}

/*
 * Takes the mount away, wherever it is. Returns 0 or -errno; -EBUSY while files are open or mapped, unless lazily, and
 * then all of it stays.
 */
int unmount(bool lazily)
{
	struct elsewhere parts[ELSEWHERE_MAX];
	size_t nr, gone;
	int error = 0;

	if (!server.mountpoint)
		return 0;
	nr = elsewhere(parts);
	for (gone = nr; gone && !error; gone -= !error)
		error = take(parts[gone - 1].path, lazily);
	if (!error)
		error = take(server.mountpoint, lazily);
	for (size_t i = 0; i < nr; i++) {
		if (error && i >= gone)
			put_back(&parts[i]);
		free(parts[i].root);
		free(parts[i].path);
	}
	return error;
}
