/*
 * memconsole-resume: the first thing to run after a jump, before anything that could fail for reasons of its own.
 *
 *   memconsole-resume [--runtime DIR]             adopts what the kernel before handed over
 *   memconsole-resume --rehearse [--runtime DIR]  the same with what the keeper holds, on the kernel that runs
 *   memconsole-resume --moment                    prints the three clocks of clock.h
 *
 * It retrieves every fd of the boot plan (bootplan.h) into the custody of the keeper, which it starts if none runs;
 * compares where pages are with where they were; starts the VMMs whose memory is whole; finishes the sessions; and
 * leaves a record of it, JSON in a memfd called "resume", in custody. Who came with the plan may rely on this: a fd that
 * was handed over is closed nowhere before another process holds it, and a session with a fd that is still inside is
 * kept, as "incoming:SESSION". A fd the keeper will not take is held by a child that does nothing else.
 *
 * Exit status: 0 every guest goes on, 1 nothing was adopted and everything is where it was, 2 usage, 4 not all is as the
 * plan says (stderr and the record say what), 6 nothing was handed over: a boot like any other.
 */
#define _GNU_SOURCE
#include <libgen.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "bootplan.h"
#include "core.h"
#include "keeper_client.h"
#include "liveupdate.h"
#include "resume_json.h"
#include "starter.h"

#define MANIFEST_SESSION "memconsole:manifest"
#define MANIFEST_TOKEN 1
#define MANIFEST "manifest"
#define RECORD "resume"
#define RUNTIME "/run/memconsole"
#define PATIENCE_NS 5000000000ull	/* with another opener of the device */
#define ALIVE_NS 300000000ull		/* a VMM that lives so long has taken its state */
#define PHASES_MAX 16

enum result { DONE, FAILED, USAGE, FINDINGS = 4, NOTHING = 6 };

struct held {
	int fd;			/* -1: lost */
	bool moved;		/* its pages are not where they were */
};

struct session {
	const char *name;
	int fd;			/* -1: not retrieved */
	bool whole;		/* all its fds are in custody */
};

static struct resume {
	bool rehearsal;
	char keeper_path[sizeof(((struct sockaddr_un *)0)->sun_path) + 16];
	int keeper;		/* -1: none */
	int device;
	struct plan plan;
	struct held *held;	/* a hold each */
	struct session *sessions;
	size_t nr_sessions;
	struct guest *guests;	/* a start each */
	bool homeless;		/* a fd is in nobody's custody */
	struct {
		const char *name;
		struct moment at;
	} phases[PHASES_MAX];
	int nr_phases;
	FILE *findings;		/* JSON objects */
	char *findings_text;
	size_t findings_size, nr_findings;
} r = { .keeper = -1, .device = -1 };

static void phase(const char *name)
{
	r.phases[r.nr_phases].name = name;
	r.phases[r.nr_phases++].at = moment_now();
}

__attribute__((format(printf, 3, 4))) static void finding(const char *id, const char *subject, const char *format, ...)
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
	return r.keeper < 0 ? r.keeper : 0;
}

/* Put a fd into custody; one that cannot be is held by this process to the end. Returns whether it is there. */
static bool keep(const char *name, int fd, const void *payload, size_t length)
{
	int there = -1, given = fd, code = -ENOTCONN;
	char other[KEEPER_NAME_LEN_MAX + 1];

	if (r.keeper >= 0 && keeper_request(r.keeper, OP_GET, name, NULL, 0, &there) == OK) {
		close(there);	/* what somebody put there since the boot is not thrown out */
		snprintf(other, sizeof(other), "resumed:%s", name);
		finding("name-taken", name, "custody holds another file of this name; it is kept as %s", other);
		name = other;
	}
	if (r.keeper >= 0)
		code = keeper_request(r.keeper, OP_PUT, name, payload, length, &given);
	if (code == OK)
		return true;
	r.homeless = true;
	if (code < 0)
		finding("not-in-custody", name, "the keeper did not take it: %s", strerror(-code));
	else
		finding("not-in-custody", name, "the keeper did not take it (code %d)", code);
	return false;
}

/* --- retrieve -------------------------------------------------------------------------------------------- */

static int open_device(void)
{
	uint64_t deadline = clock_ns(CLOCK_MONOTONIC) + PATIENCE_NS;

	do {
		r.device = open(LUO_DEVICE, O_RDWR | O_CLOEXEC);
		if (r.device >= 0 || errno != EBUSY)
			return r.device < 0 ? -errno : 0;
		wait_ns(AGAIN_NS);
	} while (clock_ns(CLOCK_MONOTONIC) < deadline);
	return -EBUSY;
}

static void close_device(void)
{
	if (r.device >= 0)
		close(r.device);
	r.device = -1;
}

/* The session of a name, retrieved and in custody from the first time on; its fd is -1 if there is none. */
static struct session *session_of(const char *name)
{
	char kept[KEEPER_NAME_LEN_MAX + 1];
	struct session *s;

	for (size_t i = 0; i < r.nr_sessions; i++)
		if (strcmp(r.sessions[i].name, name) == 0)
			return &r.sessions[i];
	s = &r.sessions[r.nr_sessions++];
	*s = (struct session){ .name = name, .fd = luo_session(r.device, name) };
	if (s->fd < 0) {
		finding("session-missing", name, "%s", s->fd == -EINVAL ? "it was retrieved already" : strerror(-s->fd));
		s->fd = -1;
		return s;
	}
	snprintf(kept, sizeof(kept), "incoming:%s", name);
	s->whole = keep(kept, s->fd, NULL, 0);
	return s;
}

/* Get one hold's fd, from the kernel into custody, or from custody. */
static void get(const struct plan_hold *h, struct held *held)
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
	s = session_of(h->session);
	if (s->fd < 0) {
		finding("lost", h->name, "its session %s cannot be retrieved", h->session);
		return;
	}
	held->fd = luo_file(s->fd, h->token);
	if (held->fd < 0) {
		finding("lost", h->name, "token %llu of session %s: %s", (unsigned long long)h->token, h->session,
			strerror(-held->fd));
		held->fd = -1;
		s->whole = false;
		return;
	}
	s->whole &= keep(h->name, held->fd, h->payload, h->payload_len);
}

/* The manifest's fd, in custody; or an enum result as a negative number less 1000. */
static int get_manifest(void)
{
	struct session *s;
	int fd = -1, err;

	if (r.rehearsal) {
		r.keeper = keeper_connect(r.keeper_path);
		err = r.keeper < 0 ? r.keeper : keeper_request(r.keeper, OP_GET, MANIFEST, NULL, 0, &fd);
		if (err == NOT_FOUND)
			return -1000 - NOTHING;
		if (err) {
			fprintf(stderr, "memconsole-resume: %s: %s\n", r.keeper_path, err < 0 ? strerror(-err) : "refused");
			return -1000 - FAILED;
		}
		return fd;
	}
	err = open_device();
	if (err == -ENOENT || err == -ENXIO || err == -ENODEV)
		return -1000 - NOTHING;
	if (err) {
		fprintf(stderr, "memconsole-resume: %s: %s\n", LUO_DEVICE, strerror(-err));
		return -1000 - FAILED;
	}
	fd = luo_session(r.device, MANIFEST_SESSION);
	if (fd < 0) {
		if (fd == -ENOENT)
			return -1000 - NOTHING;
		fprintf(stderr, "memconsole-resume: session %s: %s\n", MANIFEST_SESSION,
			fd == -EINVAL ? "it was retrieved already" : strerror(-fd));
		return -1000 - FAILED;
	}
	err = start_keeper();
	if (err)
		finding("no-keeper", r.keeper_path, "%s", err == -ECANCELED ? "it does not start" : strerror(-err));
	phase("keeper");
	s = &r.sessions[r.nr_sessions++];
	*s = (struct session){ .name = MANIFEST_SESSION, .fd = fd };
	s->whole = keep("incoming:" MANIFEST_SESSION, fd, NULL, 0);
	fd = luo_file(s->fd, MANIFEST_TOKEN);
	if (fd < 0) {
		finding("lost", MANIFEST, "token %d of session %s: %s", MANIFEST_TOKEN, MANIFEST_SESSION, strerror(-fd));
		s->whole = false;
		return fd;
	}
	s->whole &= keep(MANIFEST, fd, NULL, 0);
	return fd;
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
		finding("plan-broken", MANIFEST, "%s: no guest is started; what could be found of it is in custody",
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
static int in_place(const struct plan_verify *v, int fd, int pagemap, const char **why)
{
	struct mc_fail fail = { 0 };
	struct mc_table *table = NULL;
	uint8_t digest[16];
	int code = mc_table_new(&table, (uint32_t)sysconf(_SC_PAGESIZE), &fail);

	if (!code)
		code = mc_scan_fd(table, pagemap, fd, v->size, &fail);
	if (!code)
		mc_placement(table, digest);
	mc_table_free(table);
	*why = code ? fail.source : NULL;
	return code ? -1 : memcmp(digest, v->digest, sizeof(digest)) == 0;
}

static void verify(void)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	for (size_t i = 0; i < r.plan.nr_verifies; i++) {
		const struct plan_verify *v = &r.plan.verifies[i];
		struct held *held = held_as(v->name);
		const char *why = NULL;
		int same;

		if (!held || held->fd < 0)
			continue;	/* who needs it is told so */
		same = in_place(v, held->fd, pagemap, &why);
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
	guest_start(g, fds);
}

static void start_guests(void)
{
	for (size_t i = 0; i < r.plan.nr_starts; i++) {
		struct guest *g = &r.guests[i];

		*g = (struct guest){ .start = &r.plan.starts[i], .say = say_of(r.plan.starts[i].guest) };
		start(g);
	}
	phase("started");
	for (size_t i = 0; i < r.plan.nr_starts; i++) {
		struct guest *g = &r.guests[i];

		if (g->pid && g->say && pthread_create(&g->thread, NULL, guest_converse, g)) {
			snprintf(g->why, sizeof(g->why), "there is no thread for its monitor");
			g->say = NULL;
		}
	}
	for (size_t i = 0; i < r.plan.nr_starts; i++)
		if (r.guests[i].thread)
			pthread_join(r.guests[i].thread, NULL);
	phase("resumed");
}

static void finish(void)
{
	char kept[KEEPER_NAME_LEN_MAX + 1];

	for (size_t i = 0; i < r.nr_sessions; i++) {
		struct session *s = &r.sessions[i];
		int err, none = -1;

		if (s->fd < 0 || !s->whole || r.plan.fault)
			continue;	/* what may still be inside stays there */
		err = luo_finish(s->fd);
		if (err) {
			finding("session-unfinished", s->name, "%s", strerror(-err));
			continue;
		}
		snprintf(kept, sizeof(kept), "incoming:%s", s->name);
		keeper_request(r.keeper, OP_DROP, kept, NULL, 0, &none);
		close(s->fd);
		s->fd = -1;
	}
	phase("finished");
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
	bool kept;

	if (!out)
		return false;
	fprintf(out, "{\"version\":1,\"mode\":\"%s\",\"phases\":[", r.rehearsal ? "rehearse" : "luo");
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
	kept = !fclose(out) && r.keeper >= 0 && keeper_request(r.keeper, OP_PUT, RECORD, NULL, 0, &none) == OK;
	close(fd);
	return kept;
}

/* What the keeper did not take lives as long as this child. */
static void stay(void)
{
	pid_t child = fork();

	if (child)
		return;
	close_device();
	setsid();
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
		finding("no-memory", MANIFEST, "there is no memory to carry the plan out");
		r.homeless = true;
		return FINDINGS;
	}
	for (size_t i = 0; i < r.plan.nr_holds; i++)
		get(&r.plan.holds[i], &r.held[i]);
	close_device();
	phase("retrieved");
	verify();
	phase("verified");
	start_guests();
	if (!r.rehearsal)
		finish();
	watch_guests();
	if (!record())
		finding("no-record", RECORD, "what was done could not be written down");
	return r.nr_findings ? FINDINGS : DONE;
}

static int usage(void)
{
	fprintf(stderr, "usage: memconsole-resume [--rehearse] [--runtime DIR] | --moment\n");
	return USAGE;
}

int main(int argc, char **argv)
{
	struct rlimit files;
	const char *runtime = RUNTIME;
	enum result result;
	int err;

	if (argc == 2 && strcmp(argv[1], "--moment") == 0) {
		struct moment now = moment_now();

		printf("%llu %llu %llu\n", (unsigned long long)now.ticks, (unsigned long long)now.boottime_ns,
		       (unsigned long long)now.realtime_ns);
		return DONE;
	}
	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--rehearse") == 0)
			r.rehearsal = true;
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
	signal(SIGPIPE, SIG_IGN);
	r.findings = open_memstream(&r.findings_text, &r.findings_size);
	r.sessions = calloc(1, sizeof(*r.sessions));
	err = make_directory(runtime, 0755);
	if (!r.findings || !r.sessions || err) {
		fprintf(stderr, "memconsole-resume: %s: %s\n", runtime, strerror(err ? -err : ENOMEM));
		return FAILED;
	}
	result = resume();
	if (r.homeless)
		stay();
	if (result == NOTHING)
		fprintf(stderr, "memconsole-resume: nothing was handed over\n");
	return result;
}
