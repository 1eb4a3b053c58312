/*
 * memconsole-resume: the first thing to run after a jump, before anything that could fail for reasons of its own.
 *
 *   memconsole-resume [--runtime DIR]             adopts what the kernel before handed over
 *   memconsole-resume --rehearse [--plan NAME] [--runtime DIR]
 *                                                 the same with what the keeper holds, on the kernel that runs; the
 *                                                 plan is "manifest", or what custody calls so
 *
 * It retrieves every fd of the boot plan (bootplan.h) into the custody of the keeper, which it starts if none runs: from
 * live update's sessions, and from arenas, which it mounts; where nothing was handed over, an arena may have the plan;
 * compares where pages are with where they were; starts the VMMs whose memory is whole; finishes the sessions; and
 * leaves a record of it, JSON in a memfd called "resume", in custody. Who came with the plan may rely on this: a fd that
 * was handed over is closed nowhere before another process holds it, and a session with a fd that is still inside is
 * kept, as "incoming:SESSION", with a line for each region and state that came in it. A fd the keeper will not take is
 * held by a child that does nothing else.
 *
 * It may be killed at any moment, and is then started again: what it does is either done again with the same result, or
 * seen to be done.
 *	session		the keeper retrieves it, and has it before anybody else does (LAND)
 *	fd		the kernel gives it again until its session is finished, which is when custody holds all of them
 *	VMM		it leaves a mark in custody as it starts (marks.h); one that has a mark is not started again
 *	what lies in an arena stays there until the record is in custody, and means nothing in another boot (resume_arena.c)
 *	the manifest's session is finished last, when the record is in custody: it says that there is something to do
 * Without a keeper none of this holds.
 *
 * Exit status: 0 every guest goes on, 1 nothing was adopted and everything is where it was, 2 usage, 4 not all is as the
 * plan says (stderr and the record say what), 6 nothing was handed over, or it was taken over already: a boot like any
 * other, 7 another process had the device open all the time (stderr says which): to be started again.
 */
#define _GNU_SOURCE
#include <libgen.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "bootplan.h"
#include "core.h"
#include "faultpoint.h"
#include "keeper_client.h"
#include "liveupdate.h"
#include "resume.h"
#include "resume_arena.h"
#include "resume_json.h"
#include "starter.h"

/*
 * Raised when the control process of the version before would take a guest, a moment or a file of the record for
 * something else: a field that is gone or means something else. Not for a new field, which it passes over.
 */
#define RECORD_VERSION 1

struct resume r = { .manifest = MANIFEST, .keeper = -1, .device = -1, .lock = -1 };

void phase(const char *name)
{
	point(name, "", "reached");
	r.phases[r.nr_phases].name = name;
	r.phases[r.nr_phases++].at = moment_now();
}

void finding(const char *id, const char *subject, const char *format, ...)
{
	char text[512];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	fprintf(stderr, "memconsole-resume: %s: %s: %s\n", id, subject, text);
	fprintf(r.findings, "%s{\"id\":", r.nr_findings++ ? "," : "");
	put_text(r.findings, id);
	fputs(",\"subject\":", r.findings);
	put_text(r.findings, subject);
	fputs(",\"text\":", r.findings);
	put_text(r.findings, text);
	fputc('}', r.findings);
}

static void read_plan(int manifest)
{
	struct stat st;
	void *at = MAP_FAILED;

	if (fstat(manifest, &st) == 0 && st.st_size > 0)
		at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, manifest, 0);
	if (at == MAP_FAILED) {
		r.plan.fault = "it cannot be mapped";
	} else {
		plan_read(&r.plan, at, (size_t)st.st_size);
		munmap(at, (size_t)st.st_size);
	}
	if (r.plan.fault)
		finding("plan-broken", MANIFEST, "the boot plan is broken (%s): no guest is started; what could be read of it is in custody",
			r.plan.fault);
}

/* --- verify, start, finish ------------------------------------------------------------------------------- */

static struct held *held_as(const char *name)
{
	for (size_t i = 0; i < r.plan.nr_holds; i++)
		if (strcmp(r.plan.holds[i].name, name) == 0)
			return &r.held[i];
	return NULL;
}

/* Whether the pages of a file are where the plan says; -1, and why, if that cannot be told. */
static int in_place(const struct plan_verify *v, int fd, bool arena, int pagemap, const char **why)
{
	struct mc_fail fail = { 0 };
	struct mc_table *table = NULL;
	uint8_t digest[16];
	int code = mc_table_new(&table, (uint32_t)sysconf(_SC_PAGESIZE), &fail);

	if (!code)
		code = arena ? arena_scan(table, fd, v->size, &fail) : mc_scan_fd(table, pagemap, fd, v->size, &fail);
	if (!code)
		mc_placement(table, digest);
	mc_table_free(table);
	*why = code ? fail.source : NULL;
	return code ? -1 : memcmp(digest, v->digest, sizeof(digest)) == 0;
}

/* Whether an earlier start of this program, which looked at a file, let a VMM have it: its pages are not still since. */
static bool given_before(const char *name)
{
	struct mark mark;
	int pidfd = -1;

	for (size_t i = 0; r.keeper >= 0 && pidfd < 0 && i < r.plan.nr_starts; i++)
		for (uint16_t n = 0; pidfd < 0 && n < r.plan.starts[i].nr_fds; n++)
			if (strcmp(r.plan.starts[i].fds[n].name, name) == 0)
				pidfd = mark_get(r.keeper, r.plan.starts[i].guest, &mark);
	if (pidfd < 0)
		return false;
	close(pidfd);
	return true;
}

static void verify(void)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	for (size_t i = 0; i < r.plan.nr_verifies; i++) {
		const struct plan_verify *v = &r.plan.verifies[i];
		struct held *held = held_as(v->name);
		const char *why = NULL;
		int same;

		if (!held || held->fd < 0 || given_before(v->name))
			continue;	/* who needs what is missing is told so */
		same = in_place(v, held->fd, in_arena(&r.plan.holds[held - r.held]), pagemap, &why);
		if (same == 1)
			continue;
		finding("pages-moved", v->name, "%s", why ? why : "its pages are not in the frames they were in");
		/* under the same kernel pages may move, and nobody is hurt */
		held->moved = !r.rehearsal;
	}
	if (pagemap >= 0)
		close(pagemap);
}

static const struct plan_say *say_of(const char *guest)
{
	for (size_t i = 0; i < r.plan.nr_says; i++)
		if (strcmp(r.plan.says[i].guest, guest) == 0)
			return &r.plan.says[i];
	return NULL;
}

static void start(struct guest *g)
{
	int fds[PLAN_FDS_MAX];

	if (guest_found(g, r.keeper))
		return;
	for (uint16_t i = 0; i < g->start->nr_fds; i++) {
		const struct held *held = held_as(g->start->fds[i].name);

		fds[i] = held ? held->fd : -1;
		if (fds[i] < 0 || held->moved) {
			snprintf(g->why, sizeof(g->why), fds[i] < 0 ? "%.180s is not in custody"
								     : "the pages of %.180s are not where they were",
				 g->start->fds[i].name);
			return;
		}
		lseek(fds[i], 0, SEEK_SET);	/* a QEMU reads its state from where the file stands */
	}
	if (guest_others(g, true))
		return;
	point("start", g->start->guest, "before");
	guest_start(g, fds, r.keeper);
	point("start", g->start->guest, "after");
}

static void start_guests(void)
{
	if (r.plan.nr_starts)
		arena_begun();
	for (size_t i = 0; i < r.plan.nr_starts; i++) {
		struct guest *g = &r.guests[i];

		*g = (struct guest){ .start = &r.plan.starts[i], .say = say_of(r.plan.starts[i].guest),
				    .plan = &r.plan, .pidfd = -1, .keeper = r.keeper < 0 ? NULL : r.keeper_path };
		start(g);
	}
	phase("started");
	for (size_t i = 0; i < r.plan.nr_starts; i++) {
		struct guest *g = &r.guests[i];

		if (g->pid && g->say && pthread_create(&g->thread, NULL, guest_converse, g)) {
			snprintf(g->why, sizeof(g->why), "no thread can be started that talks to its monitor");
			g->say = NULL;
		}
	}
	for (size_t i = 0; i < r.plan.nr_starts; i++)
		if (r.guests[i].thread)
			pthread_join(r.guests[i].thread, NULL);
	phase("resumed");
}

/* Keep a session for what else may be in it, and note what came in it: it is closed when none of that is left. */
static void keep_session(const struct session *s)
{
	char in_custody[KEEPER_NAME_LEN_MAX + 1], came[KEEPER_PAYLOAD_MAX];
	size_t used = 0;
	int fd = s->fd;

	for (size_t i = 0; i < r.plan.nr_holds; i++) {
		const struct plan_hold *h = &r.plan.holds[i];
		size_t length = strlen(h->name);

		if (r.held[i].fd < 0 || strcmp(h->session, s->name) ||
		    (strncmp(h->name, "region:", 7) && strncmp(h->name, "state:", 6)))
			continue;
		if (used + length + 1 > sizeof(came)) {
			used = 0;	/* nobody can tell when it may be closed */
			break;
		}
		memcpy(came + used, h->name, length);
		used += length;
		came[used++] = '\n';
	}
	snprintf(in_custody, sizeof(in_custody), "incoming:%s", s->name);
	if (r.keeper >= 0)
		keeper_request(r.keeper, OP_PUT, in_custody, came, used, &fd);
}

static void finish_session(struct session *s)
{
	char in_custody[KEEPER_NAME_LEN_MAX + 1];
	int err, none = -1;

	if (s->fd < 0)
		return;
	if (!s->whole || r.plan.fault) {	/* what may still be inside stays there */
		finding("session-kept", s->name, "the session is kept as incoming:%s: files that no entry refers to may be in it",
			s->name);
		keep_session(s);
		return;
	}
	point("finish", s->name, "before");
	err = luo_finish(s->fd);
	point("finish", s->name, "after");
	if (err) {
		finding("session-unfinished", s->name, "the kernel does not finish the session: %s", strerror(-err));
		keep_session(s);
		return;
	}
	snprintf(in_custody, sizeof(in_custody), "incoming:%s", s->name);
	keeper_request(r.keeper, OP_DROP, in_custody, NULL, 0, &none);
	close(s->fd);
	s->fd = -1;
}

/* All but the manifest's, which is the first: with it goes the word that there is something to do. */
static void finish(void)
{
	for (size_t i = 1; i < r.nr_sessions; i++)
		finish_session(&r.sessions[i]);
	phase("finished");
}

/* Once the record is there, nobody needs to know of anything else that was under way. */
static void tidy(void)
{
	for (size_t i = 0; i < r.plan.nr_starts; i++)
		mark_drop(r.keeper, r.plan.starts[i].guest);
	point("marks", "", "dropped");
	if (r.of_arena)
		arena_forget(!r.plan.fault);
	else if (r.nr_sessions)
		finish_session(&r.sessions[0]);
}

/* VMMs nobody talked to are given a moment: one that cannot take its state ends at once. */
static void watch_guests(void)
{
	uint64_t deadline = clock_ns(CLOCK_MONOTONIC) + ALIVE_NS;
	bool silent = false;

	for (size_t i = 0; i < r.plan.nr_starts; i++)
		silent |= r.guests[i].state == GUEST_STARTED;
	while (silent && clock_ns(CLOCK_MONOTONIC) < deadline) {
		for (size_t i = 0; i < r.plan.nr_starts; i++)
			guest_ended(&r.guests[i]);
		wait_ns(10 * AGAIN_NS);
	}
	for (size_t i = 0; i < r.plan.nr_starts; i++) {
		const struct guest *g = &r.guests[i];

		if (g->why[0])
			finding("guest-held", g->start->guest, "%s", g->why);
	}
}

/* --- the record ------------------------------------------------------------------------------------------ */

/* Write what was done into custody. Returns whether it is there. */
static bool record(void)
{
	int fd = memfd_create("memconsole-resume", MFD_CLOEXEC), none = fd;
	FILE *out = fd < 0 ? NULL : fdopen(dup(fd), "w");
	bool there;

	if (!out)
		return false;
	fprintf(out, "{\"version\":%d,\"mode\":\"%s\",\"phases\":[", RECORD_VERSION, r.rehearsal ? "rehearse" : r.of_arena ? "arena" : "luo");
	for (int i = 0; i < r.nr_phases; i++) {
		fprintf(out, "%s{\"name\":\"%s\",\"at\":", i ? "," : "", r.phases[i].name);
		put_moment(out, &r.phases[i].at);
		fputc('}', out);
	}
	fputs("],\"guests\":[", out);
	for (size_t i = 0; i < r.plan.nr_starts; i++) {
		fputs(i ? "," : "", out);
		put_guest(out, &r.guests[i]);
	}
	fputs("],\"held\":[", out);
	for (size_t i = 0, n = 0; i < r.plan.nr_holds; i++) {
		if (r.held[i].fd < 0)
			continue;
		fputs(n++ ? "," : "", out);
		put_text(out, r.plan.holds[i].name);
	}
	fflush(r.findings);
	fprintf(out, "],\"findings\":[%s]}\n", r.findings_text);
	there = !fclose(out) && r.keeper >= 0 && keeper_request(r.keeper, OP_PUT, RECORD, NULL, 0, &none) == OK;
	close(fd);
	point("record", "", "kept");
	return there;
}

/* What the keeper did not take lives as long as this child. */
static void stay(void)
{
	pid_t child = fork();
	int null;

	if (child)
		return;
	close_device();
	arenas_close();
	close(r.lock);
	setsid();
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int fd = 0; fd < 3 && null >= 0; fd++)
		dup2(null, fd);		/* whoever reads what this program says waits for its end */
	prctl(PR_SET_NAME, "mc-holder");
	for (;;)
		pause();
}

static enum result resume(void)
{
	int manifest;

	phase("begun");
	manifest = get_manifest();
	if (manifest <= -1000)
		return (enum result)(-1000 - manifest);
	if (manifest >= 0)
		read_plan(manifest);
	else
		r.plan.fault = "it was not handed over";
	phase("planned");
	r.held = calloc(r.plan.nr_holds + 1, sizeof(*r.held));
	r.guests = calloc(r.plan.nr_starts + 1, sizeof(*r.guests));
	if (r.held && r.guests && !r.rehearsal)
		r.sessions = realloc(r.sessions, (r.plan.nr_holds + 1) * sizeof(*r.sessions));
	if (!r.held || !r.guests || !r.sessions) {
		finding("no-memory", MANIFEST, "memconsole-resume has no memory to carry out the boot plan");
		r.homeless = true;
		return FINDINGS;
	}
	for (size_t i = 0; i < r.plan.nr_holds; i++)
		get(&r.plan.holds[i], &r.held[i]);
	close_device();
	phase("retrieved");
	if (r.recorded) {
		finish();
		tidy();
		return r.nr_findings ? FINDINGS : DONE;
	}
	verify();
	phase("verified");
	start_guests();
	if (!r.rehearsal)
		finish();
	watch_guests();
	point("watched", "", "reached");
	if (record())
		tidy();
	else
		finding("no-record", RECORD, "the record of what was done cannot be put into custody");
	return r.nr_findings ? FINDINGS : DONE;
}

static int usage(void)
{
	fprintf(stderr, "usage: memconsole-resume [--rehearse [--plan NAME]] [--runtime DIR]\n");
	return USAGE;
}

int main(int argc, char **argv)
{
	struct rlimit files;
	const char *runtime = RUNTIME;
	enum result result;
	int err;

	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--rehearse") == 0)
			r.rehearsal = true;
		else if (strcmp(argv[i], "--plan") == 0 && r.rehearsal && i + 1 < argc)
			r.manifest = argv[++i];
		else if (strcmp(argv[i], "--runtime") == 0 && i + 1 < argc && argv[i + 1][0] == '/')
			runtime = argv[++i];
		else
			return usage();
	}
	if (snprintf(r.keeper_path, sizeof(r.keeper_path), "%s/keeper", runtime) >= (int)sizeof(r.keeper_path) - 16)
		return usage();
	if (!getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	r.runtime = runtime;
	signal(SIGPIPE, SIG_IGN);
	r.findings = open_memstream(&r.findings_text, &r.findings_size);
	r.sessions = calloc(1, sizeof(*r.sessions));
	err = make_directory(runtime, 0755);
	if (!err)
		err = take_lock(runtime);
	if (!r.findings || !r.sessions || err) {
		fprintf(stderr, "memconsole-resume: cannot use the runtime directory %s: %s\n", runtime, strerror(err ? -err : ENOMEM));
		return FAILED;
	}
	result = resume();
	if (r.homeless)
		stay();
	if (result == NOTHING)
		fprintf(stderr, "memconsole-resume: nothing was handed over\n");
	return result;
}
