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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "daemon.h"
#include "fuse.h"

#define CLIENTS_MAX 16
#define WORKERS 3
#define FILES_MAX 65536

struct server server = { .dev = -1 };

static bool signalled(uint32_t number);
static bool quits(void);

static struct daemon self = {
	.program = "memconsole-fuse", .clients_max = CLIENTS_MAX, .ended = -1,
	.greet = control_greet, .serve = control_serve, .signalled = signalled, .quits = quits,
};

static int fail(const char *doing, const char *what)
{
	return daemon_fail(&self, doing, what);
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	int error;

	prctl(PR_SET_NAME, "mc-fuse-worker");
	while (!(error = worker_serve(worker)))
		;
	if (error != -ENODEV)
		fprintf(stderr, "memconsole-fuse: cannot read requests from /dev/fuse: %s; the mount ends\n", strerror(-error));
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
		return fail("make", "an eventfd");
	for (int i = 0; i < WORKERS; i++) {
		struct worker *worker = worker_new(server.dev);

		errno = worker ? pthread_create(&thread, NULL, work, worker) : ENOMEM;
		if (errno)
			return fail("start", "a thread");
	}
	errno = pthread_create(&thread, NULL, scan, NULL);
	return errno ? fail("start", "a thread") : 0;
}

/* A signal asks to end: done unless files are in use. Returns whether it is. */
static bool signalled(uint32_t number)
{
	int error = unmount(false);

	if (error)
		fprintf(stderr, "memconsole-fuse: signal %u is ignored: the mount cannot be unmounted: %s\n", number,
			strerror(-error));
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
		fprintf(stderr, "memconsole-fuse: it is not exempt from the OOM killer (no CAP_SYS_RESOURCE): "
			"the mount ends where the kernel kills it\n");
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
		fprintf(stderr, "memconsole-fuse: MOUNTPOINT must be an absolute path\n");
		return 2;
	}
	status = daemon_claim(&self, path);
	if (status)
		return status;
	if (!foreground && (ready = daemon_detach()) < 0)
		return fail("go into", "the background");
	guard();
	if (daemon_prepare(&self))
		return 1;
	if (tree_init())
		return fail("make", "the tree of its files");
	status = mount_at(mountpoint);
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
