// SPDX-License-Identifier: MIT
/*
 * memconsole-fuse: guests' memory as files, served without the control process.
 *
 * It mounts a FUSE filesystem and shows the tree that the control process gives it (fuse_control.c). RAM files are the
 * guests' own memfds, passed through by the kernel: when this server ends, whatever was mapped stays mapped. The
 * control process may end and come back at any time; the tree stays as it is.
 *
 * A process must never hold a file of a mount it serves: it could not be killed. So nothing here opens anything on it.
 *
 * usage: memconsole-fuse [-f] SOCKET MOUNTPOINT	-f: stay in the foreground; both absolute paths
 * exit:  0 serving in the background, told to quit, or unmounted; 1 failed; 2 usage; 3 one already serves this socket
 *	  or mountpoint
 *
 * A mount at MOUNTPOINT whose server is dead is taken away first. SIGTERM and SIGINT unmount and end, but not while
 * files are open or mapped; SIGHUP and SIGPIPE are ignored.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/vfs.h>

#include "daemon.h"
#include "fuse.h"

#define FSTYPE "fuse.memconsole"
#define CLIENTS_MAX 16
#define WORKERS 3
#define FILES_MAX 65536
#define HUNG_S 10

struct server server = { .dev = -1 };

static bool signalled(uint32_t number);
static bool quits(void);

static struct daemon self = {
	.program = "memconsole-fuse", .clients_max = CLIENTS_MAX, .ended = -1,
	.greet = control_greet, .serve = control_serve, .signalled = signalled, .quits = quits,
};

static int fail(const char *what)
{
	return daemon_fail(&self, what);
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
		fail(path);
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
			fprintf(stderr, "memconsole-fuse: another server already serves %s\n", mountpoint);
			return 3;
		}
		abort_connection(number);
		if (umount2(mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW))
			return fail(mountpoint);
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

/* Mounts, and answers the kernel's first request. Returns 0 or the exit status. */
static int mount_tree(const char *path)
{
	static char mountpoint[PATH_MAX];
	struct worker *worker;
	char options[128];
	int status, error = 0;

	if (resolve(path, mountpoint))
		return fail(path);
	if (strlen(mountpoint) > PATH_LEN_MAX) {
		fprintf(stderr, "memconsole-fuse: MOUNTPOINT has at most %d bytes\n", PATH_LEN_MAX);
		return 2;
	}
	status = clear(mountpoint);
	if (status)
		return status;
	server.dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (server.dev < 0)
		return fail("/dev/fuse");
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=%u,group_id=%u,allow_other,default_permissions",
		 server.dev, geteuid(), getegid());
	if (mount("memconsole", mountpoint, FSTYPE, MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME, options))
		return fail(mountpoint);
	server.mountpoint = mountpoint;
	worker = worker_new(server.dev);
	while (worker && !server.major && !error)
		error = worker_serve(worker);
	worker_free(worker);
	if (!server.major) {
		errno = worker ? -error : ENOMEM;
		fail("the kernel's first request");
		unmount(true);
		return 1;
	}
	probe_passthrough();
	server.connection = mounted(mountpoint);
	return 0;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	int error;

	prctl(PR_SET_NAME, "mc-fuse-worker");
	while (!(error = worker_serve(worker)))
		;
	if (error != -ENODEV)
		fprintf(stderr, "memconsole-fuse: /dev/fuse: %s\n", strerror(-error));
	worker_free(worker);
	eventfd_write(self.ended, 1);
	return NULL;
}

static void *scan(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, "mc-fuse-scanner");
	scanner_run();
	return NULL;
}

static int start_threads(void)
{
	pthread_t thread;

	self.ended = eventfd(0, EFD_CLOEXEC);
	if (self.ended < 0)
		return fail("eventfd");
	for (int i = 0; i < WORKERS; i++) {
		struct worker *worker = worker_new(server.dev);

		errno = worker ? pthread_create(&thread, NULL, work, worker) : ENOMEM;
		if (errno)
			return fail("pthread_create");
	}
	errno = pthread_create(&thread, NULL, scan, NULL);
	return errno ? fail("pthread_create") : 0;
}

/* A signal asks to end: done unless files are in use. Returns whether it is. */
static bool signalled(uint32_t number)
{
	int error = unmount(false);

	if (error)
		fprintf(stderr, "memconsole-fuse: signal %u ignored: %s\n", number, strerror(-error));
	return !error;
}

static bool quits(void)
{
	return control_quits();
}

/* Make the server hard to kill and roomy, as far as may be. */
static void guard(void)
{
	prctl(PR_SET_NAME, "mc-fuse");
	if (!daemon_exempt())
		fprintf(stderr, "memconsole-fuse: not exempt from the OOM killer\n");
	daemon_room(FILES_MAX);
}

int main(int argc, char **argv)
{
	int foreground = argc == 4 && !strcmp(argv[1], "-f"), ready = -1, status;
	const char *path, *mountpoint;

	if (argc != 3 + foreground) {
		fprintf(stderr, "usage: memconsole-fuse [-f] SOCKET MOUNTPOINT\n");
		return 2;
	}
	path = argv[argc - 2];
	mountpoint = argv[argc - 1];
	if (mountpoint[0] != '/') {
		fprintf(stderr, "memconsole-fuse: MOUNTPOINT is an absolute path\n");
		return 2;
	}
	status = daemon_claim(&self, path);
	if (status)
		return status;
	if (!foreground && (ready = daemon_detach()) < 0)
		return fail("cannot go into the background");
	guard();
	if (daemon_prepare(&self))
		return 1;
	if (tree_init())
		return fail("tree");
	status = mount_tree(mountpoint);
	if (status)
		return status;
	status = start_threads() || daemon_ready(&self, path, ready);
	if (!status)
		daemon_loop(&self);
	else
		unmount(true);
	unlink(path);
	return status;
}
