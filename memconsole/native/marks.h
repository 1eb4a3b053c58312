/*
 * Marks: which VMMs were started, so that no other start of memconsole-resume starts a second one on the same memory.
 *
 * A mark is a pidfd in the keeper's custody, "started:GUEST". The VMM's process puts it there itself, as the last thing
 * before it becomes the VMM: it is there if and only if the VMM is. Who looks must hold the lock (resume.c), which that
 * process has until then.
 */
#ifndef MEMCONSOLE_MARKS_H
#define MEMCONSOLE_MARKS_H

#include <poll.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "keeper_client.h"
#include "patience.h"

#define KILLED_MS 10000

struct mark {
	uint32_t pid;
	uint32_t may_run;	/* it goes on by itself, or was told to: its state in custody is behind it */
	uint64_t start_ticks;
	struct moment at;
};

static void mark_name(char *name, size_t size, const char *guest)
{
	snprintf(name, size, "started:%s", guest);
}

/* Put a mark with the pidfd of its process. Returns an enum code or -errno. */
static int mark_put(int keeper, const char *guest, const struct mark *mark)
{
	char name[KEEPER_NAME_LEN_MAX + 1];
	int pidfd = (int)syscall(SYS_pidfd_open, mark->pid, 0), given = pidfd, code;

	if (pidfd < 0)
		return -errno;
	mark_name(name, sizeof(name), guest);
	code = keeper_request(keeper, OP_PUT, name, mark, sizeof(*mark), &given);
	close(pidfd);
	return code;
}

/* The mark of a guest. Returns its pidfd; -1: it was not started. */
static int mark_get(int keeper, const char *guest, struct mark *mark)
{
	char name[KEEPER_NAME_LEN_MAX + 1];
	struct kept kept = { .space = mark, .room = sizeof(*mark) };

	mark_name(name, sizeof(name), guest);
	if (keeper_get(keeper, name, &kept) != OK)
		return -1;
	if (kept.length == sizeof(*mark))
		return kept.fd;
	close(kept.fd);
	return -1;
}

static void mark_drop(int keeper, const char *guest)
{
	char name[KEEPER_NAME_LEN_MAX + 1];
	int none = -1;

	mark_name(name, sizeof(name), guest);
	keeper_request(keeper, OP_DROP, name, NULL, 0, &none);
}

/* Whether the process of a pidfd has ended. */
static bool mark_ended(int pidfd)
{
	struct pollfd p = { .fd = pidfd, .events = POLLIN };

	return poll(&p, 1, 0) == 1;
}

/* Kill the process of a mark and its pidfd. Returns whether it is gone. */
static bool mark_kill(int pidfd, const struct mark *mark)
{
	struct patience patience;

	syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
	patience_begin(&patience, (pid_t)mark->pid, KILLED_MS);
	return patience_poll(&patience, pidfd);
}

#endif
