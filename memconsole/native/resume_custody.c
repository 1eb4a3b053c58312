/*
 * How memconsole-resume comes by what was handed over, and whose custody it is in meanwhile; resume.c says in what order.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpoint.h"
#include "keeper_client.h"
#include "liveupdate.h"
#include "resume.h"
#include "resume_arena.h"

int take_lock(const char *runtime)
{
	char path[sizeof(r.keeper_path)];

	snprintf(path, sizeof(path), "%.100s/resume.lock", runtime);
	r.lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (r.lock < 0)
		return -errno;
	while (flock(r.lock, LOCK_EX) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

/* --- custody --------------------------------------------------------------------------------------------- */

/* Start the keeper of the runtime directory, unless it runs. Returns 0 or -errno. */
static int start_keeper(void)
{
	char program[4096];
	ssize_t length = readlink("/proc/self/exe", program, sizeof(program) - 32);
	int status;
	pid_t child;

	r.keeper = keeper_connect(r.keeper_path);
	if (r.keeper >= 0)
		return 0;
	if (length < 0)
		return -errno;
	program[length] = 0;
	strcpy(strrchr(program, '/'), "/memconsole-keeper");
	child = fork();
	if (!child) {
		execl(program, program, r.keeper_path, (char *)NULL);
		_exit(127);
	}
	if (child < 0 || waitpid(child, &status, 0) < 0)
		return -errno;
	if (!WIFEXITED(status) || (WEXITSTATUS(status) && WEXITSTATUS(status) != 3))
		return -ECANCELED;	/* it said why */
	r.keeper = keeper_connect(r.keeper_path);
	r.started_keeper = !WEXITSTATUS(status) && r.keeper >= 0;
	return r.keeper < 0 ? r.keeper : 0;
}

int kept(const char *name)
{
	int fd = -1;

	return keeper_request(r.keeper, OP_GET, name, NULL, 0, &fd) == OK ? fd : -1;
}

static bool is_kept(const char *name)
{
	int fd = kept(name);

	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

static bool same_file(int a, int b)
{
	struct stat one, other;

	return fstat(a, &one) == 0 && fstat(b, &other) == 0 && one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

bool keep(const char *name, int fd, const void *payload, size_t length)
{
	int there = kept(name), given = fd, code = -ENOTCONN;
	char other[KEEPER_NAME_LEN_MAX + 1];

	if (there >= 0) {
		bool same = same_file(there, fd);

		close(there);
		if (same)
			return true;	/* an earlier start of this program came so far */
		/* what somebody put there since the boot is not thrown out */
		snprintf(other, sizeof(other), "resumed:%s", name);
		finding("name-taken", name, "custody holds another file of this name; the one from the previous kernel is kept as %s", other);
		name = other;
	}
	if (r.keeper >= 0)
		code = keeper_request(r.keeper, OP_PUT, name, payload, length, &given);
	if (code == OK)
		return true;
	r.homeless = true;
	if (code < 0)
		finding("not-in-custody", name, "the keeper cannot be given it: %s", strerror(-code));
	else
		finding("not-in-custody", name, "the keeper refused it (code %d)", code);
	return false;
}

/* --- retrieve -------------------------------------------------------------------------------------------- */

/* The process that has the device open and its name, or 0: it has one opener at a time. */
static int device_holder(char *name, size_t size)
{
	DIR *proc = opendir("/proc"), *fds;
	struct dirent *process, *entry;
	char path[600], link[64];
	ssize_t got;
	int found = 0, fd;

	while (proc && !found && (process = readdir(proc))) {
		if (process->d_name[0] < '1' || process->d_name[0] > '9')
			continue;
		snprintf(path, sizeof(path), "/proc/%s/fd", process->d_name);
		fds = opendir(path);
		while (fds && !found && (entry = readdir(fds))) {
			snprintf(path, sizeof(path), "/proc/%s/fd/%s", process->d_name, entry->d_name);
			got = readlink(path, link, sizeof(link) - 1);
			link[got < 0 ? 0 : got] = 0;
			if (!strcmp(link, LUO_DEVICE))
				found = atoi(process->d_name);
		}
		if (fds)
			closedir(fds);
	}
	if (proc)
		closedir(proc);
	snprintf(path, sizeof(path), "/proc/%d/comm", found);
	fd = found ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	got = fd < 0 ? 0 : read(fd, name, size - 1);
	name[got > 0 ? got - 1 : 0] = 0;	/* it ends with a newline */
	if (fd >= 0)
		close(fd);
	return found;
}

/* Whether to try the device again; says once who has it, and notes that it was waited for. */
static bool wait_for_device(uint64_t deadline)
{
	char name[64], who[96] = "a process that /proc does not show";
	int pid;

	if (clock_ns(CLOCK_MONOTONIC) >= deadline)
		return false;
	if (!r.waited) {
		pid = device_holder(name, sizeof(name));
		if (pid)
			snprintf(who, sizeof(who), "process %d (%s)", pid, name);
		fprintf(stderr, "memconsole-resume: %s is busy: %s has it open; waiting\n", LUO_DEVICE, who);
		finding("device-busy", LUO_DEVICE, "%s had it open: memconsole-resume waited for it", who);
		r.waited = true;
	}
	wait_ns(AGAIN_NS);
	return true;
}

static int open_device(void)
{
	uint64_t deadline = clock_ns(CLOCK_MONOTONIC) + PATIENCE_NS;

	do {
		r.device = open(LUO_DEVICE, O_RDWR | O_CLOEXEC);
		if (r.device >= 0 || errno != EBUSY)
			return r.device < 0 ? -errno : 0;
	} while (wait_for_device(deadline));
	return -EBUSY;
}

void close_device(void)
{
	if (r.device >= 0)
		close(r.device);
	r.device = -1;
}

/* Retrieve a session without the keeper: this process alone has it. Returns an fd or -errno. */
static int retrieve_alone(const char *name)
{
	int err = r.device >= 0 ? 0 : open_device();

	return err ? err : luo_session(r.device, name);
}

/* Have the keeper retrieve a session, and get it from there; ``held`` says whether it is in custody. -errno. */
static int retrieve(const char *name, bool *held)
{
	uint64_t deadline = clock_ns(CLOCK_MONOTONIC) + PATIENCE_NS;
	char in_custody[KEEPER_NAME_LEN_MAX + 1];
	int code, fd = -1;

	snprintf(in_custody, sizeof(in_custody), "incoming:%s", name);
	*held = false;
	if (r.keeper < 0) {
		fd = retrieve_alone(name);
		if (fd >= 0)
			*held = keep(in_custody, fd, NULL, 0);
		return fd;
	}
	do {
		code = keeper_request(r.keeper, OP_LAND, in_custody, name, strlen(name), &fd);
	} while (code == -EBUSY && wait_for_device(deadline));
	point("session", name, "landed");
	if (code < 0)
		return code;
	if (code) {
		finding("not-in-custody", in_custody, "the keeper refused it (code %d)", code);
		r.homeless = true;
		return retrieve_alone(name);
	}
	fd = kept(in_custody);
	*held = fd >= 0;
	return *held ? fd : -EIO;
}

/* The session of a name, retrieved and in custody from the first time on; its fd is -1 if there is none. */
static struct session *session_of(const char *name)
{
	struct session *s;

	for (size_t i = 0; i < r.nr_sessions; i++)
		if (strcmp(r.sessions[i].name, name) == 0)
			return &r.sessions[i];
	s = &r.sessions[r.nr_sessions++];
	*s = (struct session){ .name = name };
	s->fd = retrieve(name, &s->whole);
	if (s->fd < 0) {
		s->err = s->fd;
		s->fd = -1;
	}
	return s;
}

/* A file that is not in a session any more, because an earlier start of this program came so far. Returns it, or -1. */
static int left_in_custody(const struct plan_hold *h)
{
	return r.keeper < 0 ? -1 : kept(h->name);
}

void get(const struct plan_hold *h, struct held *held)
{
	struct session *s;
	int code;

	held->fd = -1;
	if (r.rehearsal) {
		code = keeper_request(r.keeper, OP_GET, h->name, NULL, 0, &held->fd);
		if (code)
			finding("not-in-custody", h->name, "the keeper does not hold it (code %d)", code);
		return;
	}
	if (in_arena(h)) {
		get_from_arena(h, held);
		return;
	}
	s = session_of(h->session);
	if (s->fd < 0) {
		held->fd = left_in_custody(h);
		if (held->fd >= 0)
			return;
		if (s->err)
			finding("session-missing", s->name, "%s",
				s->err == -EINVAL ? "another process retrieved the session before" : strerror(-s->err));
		s->err = 0;
		finding("lost", h->name, "its session %s cannot be retrieved", h->session);
		return;
	}
	held->fd = luo_file(s->fd, h->token);
	point("hold", h->name, "retrieved");
	if (held->fd == -ENOENT) {
		held->fd = left_in_custody(h);
		if (held->fd >= 0)
			return;
		held->fd = -ENOENT;
	}
	if (held->fd < 0) {
		finding("lost", h->name, "the kernel does not give token %llu of session %s: %s", (unsigned long long)h->token, h->session,
			strerror(-held->fd));
		held->fd = -1;
		s->whole = false;
		return;
	}
	s->whole &= keep(h->name, held->fd, h->payload, h->payload_len);
	point("hold", h->name, "kept");
}

/* The plan that the keeper holds; see get_manifest(). */
static int manifest_in_custody(void)
{
	int fd = -1, err;

	r.keeper = keeper_connect(r.keeper_path);
	err = r.keeper < 0 ? r.keeper : keeper_request(r.keeper, OP_GET, r.manifest, NULL, 0, &fd);
	if (err == NOT_FOUND)
		return -1000 - NOTHING;
	if (err) {
		fprintf(stderr, "memconsole-resume: cannot ask the keeper at %s for the plan: %s\n", r.keeper_path,
			err < 0 ? strerror(-err) : "it refused");
		return -1000 - FAILED;
	}
	r.recorded = is_kept(RECORD);
	return fd;
}

/* A keeper that was started for nothing ends; it does not if it holds something. */
static int nothing(void)
{
	int none = -1;

	if (r.started_keeper)
		keeper_request(r.keeper, OP_QUIT, "", NULL, 0, &none);
	return -1000 - NOTHING;
}

/* What both roads say once there is a manifest: whether there is a keeper, and whether all was done before. */
static void keeper_met(int no_keeper)
{
	if (no_keeper)
		finding("no-keeper", r.keeper_path, "%s",
			no_keeper == -ECANCELED ? "the keeper does not start" : strerror(-no_keeper));
	phase("keeper");
	r.recorded = is_kept(RECORD);
}

/* The manifest that live update carried; see get_manifest(). */
static int manifest_of_session(void)
{
	struct session *s;
	int fd, err, no_keeper;

	if (access(LUO_DEVICE, F_OK) < 0)
		return -1000 - NOTHING;
	no_keeper = start_keeper();
	s = &r.sessions[r.nr_sessions++];
	*s = (struct session){ .name = MANIFEST_SESSION };
	s->fd = retrieve(MANIFEST_SESSION, &s->whole);
	if (s->fd < 0) {
		if (s->fd == -ENOENT || s->fd == -ENXIO || s->fd == -ENODEV) {
			r.nr_sessions = 0;
			return nothing();
		}
		nothing();
		fprintf(stderr, "memconsole-resume: cannot retrieve session %s: %s\n", MANIFEST_SESSION,
			s->fd == -EINVAL ? "another process retrieved it before" : strerror(-s->fd));
		return -1000 - (s->fd == -EBUSY ? DEVICE_BUSY : FAILED);
	}
	if (r.waited)
		phase("device");
	if (is_kept(LANDED))
		return -1000 - NOTHING;
	keeper_met(no_keeper);
	fd = luo_file(s->fd, MANIFEST_TOKEN);
	point("hold", MANIFEST, "retrieved");
	if (fd == -ENOENT) {
		err = kept(MANIFEST);
		if (err >= 0)
			return err;
	}
	if (fd < 0) {
		finding("lost", MANIFEST, "the kernel does not give token %d of session %s: %s", MANIFEST_TOKEN, MANIFEST_SESSION, strerror(-fd));
		s->whole = false;
		return fd;
	}
	s->whole &= keep(MANIFEST, fd, NULL, 0);
	point("hold", MANIFEST, "kept");
	return fd;
}

/* The manifest that an arena has, where nothing was handed over; see get_manifest(). */
static int manifest_of_arena(void)
{
	int fd, no_keeper;

	if (arena_manifest())
		return -1000 - NOTHING;
	no_keeper = start_keeper();
	if (is_kept(LANDED)) {
		arena_forget(true);
		return -1000 - NOTHING;
	}
	keeper_met(no_keeper);
	r.of_arena = true;
	r.sessions[r.nr_sessions++] = (struct session){ .name = MANIFEST_SESSION, .fd = -1, .whole = true };
	fd = arena_plan();
	if (fd < 0)
		finding("lost", MANIFEST, "its arena does not give it: %s", strerror(-fd));
	return fd;
}

int get_manifest(void)
{
	int fd;

	if (r.rehearsal)
		return manifest_in_custody();
	fd = manifest_of_session();
	return fd == -1000 - NOTHING ? manifest_of_arena() : fd;
}
