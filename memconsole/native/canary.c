/*
 * memconsole-canary: a tiny VMM whose guest knows at once when its memory is not what it was.
 *
 *   memconsole-canary --socket PATH --name NAME [--as kvm|process|auto]
 *   memconsole-canary --socket PATH --name NAME --restore FD [--give GRANT=FD]... [--paused yes]
 *                                   goes on as the canary that wrote its state there, with the grants of these fds
 *   memconsole-canary --probe       says whether KVM runs the guest here, how many pages it checks in a second of
 *                                   processor time, and how many this process checks in one
 *
 * Its RAM is what the control process grants over the agents socket (agent.h); what runs in it is canary_guest.h.
 * One thread does everything: between two beats it serves the socket, so a request always finds the vCPU at the
 * end of a beat. It outlives the control process and connects again when there is a new one.
 *
 * Exit status: 0 after STOP or SIGTERM, 1 when it cannot start, 2 on a wrong command line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

#include "canary_agent.h"
#include "canary_kvm.h"
#include "canary_options.h"
#include "canary_ram.h"
#include "canary_state.h"

#define BEAT_NS		(5 * MS)	/* from one beat to the next */
#define FAST_NS		(MS / 2)	/* a beat shorter than this visits more pages next time */
#define SLOW_NS		(2 * MS)	/* a longer one fewer */
#define GAP_NS		(50 * MS)	/* a longer pause between two beats is counted as a gap */
#define HUNG_NS		(5000 * MS)	/* a beat that has had so much of a processor never ends */
#define HUNG_KICKS	240		/* nor one that was interrupted so often: its vCPU sleeps */
#define KICK_US		250000		/* a vCPU that does not come back is interrupted this often */
#define PROBE_NS	(100 * MS)
#define PROBE_PAGES	1024	/* enough that the way into the vCPU and back does not count */

static volatile sig_atomic_t terminated;
static sigjmp_buf taken_away;

static void on_terminate(int sig)
{
	(void)sig;
	terminated = 1;
}

static void on_kick(int sig)
{
	(void)sig;
}

static void on_sigbus(int sig)
{
	(void)sig;
	siglongjmp(taken_away, 1);
}

/* --- beats ----------------------------------------------------------------------------------------------- */

static struct range *next_visit(struct canary *c)
{
	do
		c->visit = (c->visit + 1) % AGENT_GRANTS;
	while (!c->ranges[c->visit].mapped || c->ranges[c->visit].access != AGENT_RW);
	return &c->ranges[c->visit];
}

/* Processor time of this thread in ns, a vCPU's included: what others take meanwhile does not count. */
static uint64_t worked_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

/* A vCPU that the host gives no processor, or that a signal has stopped, is late and not hung: the clock does not tell. */
static void beat_in_vcpu(struct canary *c, struct header *home, const struct range *r)
{
	uint64_t worked = 0;
	int kicks = 0, err;

	if (!c->started) {
		err = vm_start(&c->vm, c->ranges[c->home].gpa);
		if (err) {
			snprintf(c->why, sizeof(c->why), "the vCPU does not start: %s", strerror(-err));
			return;
		}
		c->started = true;
	}
	*(volatile uint64_t *)&home->next = r->gpa;
	do {
		err = vm_beat(&c->vm, c->why, sizeof(c->why));
		if (err == -EINTR && kicks++ == 0)
			worked = worked_ns();
		if (err == -EINTR && (worked_ns() - worked > HUNG_NS || kicks > HUNG_KICKS))
			snprintf(c->why, sizeof(c->why), "the vCPU does not come to the end of a beat");
	} while (err == -EINTR && !c->why[0] && !terminated);
}

/* One beat, and the book-keeping of the time since the one before. */
static void beat(struct canary *c)
{
	struct header *home = c->ranges[c->home].header;
	struct range *r = next_visit(c);
	uint64_t begun = now_ns();
	uint64_t pages = r->length / PAGE - FIRST_PAGE;
	uint64_t done, took;

	r->header->quantum = c->quantum < pages ? c->quantum : pages;
	if (c->runs_as == AGENT_AS_KVM)
		beat_in_vcpu(c, home, r);
	else if (r->header->pages == r->length / PAGE)
		canary_beat(r->header);
	else	/* a vCPU finds the end of its RAM by itself; this process would write over its own memory */
		snprintf(c->why, sizeof(c->why), "its header says %llu pages, its range has %llu",
			 (unsigned long long)r->header->pages, (unsigned long long)(r->length / PAGE));
	done = now_ns();
	took = done - begun;
	if (c->last_beat) {
		uint64_t gap = done - c->last_beat;

		if (gap > home->gap_ns)
			home->gap_ns = gap;
		home->gaps += gap > GAP_NS;
	}
	r->last = *r->header;
	c->ranges[c->home].last = *home;
	c->last_beat = done;
	c->stood = moment_now();
	if (c->restored && !c->woke.boottime_ns)
		c->woke = c->stood;
	c->beat_at = begun + BEAT_NS;
	if (took > SLOW_NS && c->quantum > QUANTUM_MIN)
		c->quantum /= 2;
	else if (took < FAST_NS && c->quantum < QUANTUM_MAX)
		c->quantum *= 2;
}

/* --- life ------------------------------------------------------------------------------------------------ */

/* Wait until a beat is due, a message came, or it is time to look for the control process again. */
static void rest(struct canary *c)
{
	struct pollfd p = { .fd = c->sock, .events = POLLIN };
	uint64_t now = now_ns();
	uint64_t until = now + 2 * RETRY_NS;
	struct timespec ts;

	if (c->sock < 0 && c->retry < until)
		until = c->retry;
	if (can_beat(c) && c->beat_at < until)
		until = c->beat_at;
	until = until > now ? until - now : 0;
	ts = (struct timespec){ (time_t)(until / 1000000000), (long)(until % 1000000000) };
	ppoll(&p, c->sock >= 0, &ts, NULL);
}

static void live(struct canary *c)
{
	/* Memory that was taken away by force: say so for as long as somebody asks, and touch none of it again. */
	if (sigsetjmp(taken_away, 1)) {
		snprintf(c->why, sizeof(c->why), "its memory was taken away");
		if (c->sock >= 0)
			disconnect(c);
	}
	while (!terminated && !c->stop) {
		if (c->sock < 0 && now_ns() >= c->retry)
			reach(c);
		while (c->sock >= 0 && !c->stop && serve(c))
			;
		if (can_beat(c) && now_ns() >= c->beat_at)
			beat(c);
		rest(c);
	}
}

/* --- start ----------------------------------------------------------------------------------------------- */

/* Check pages for so long. Returns how many in a second of processor time, or -1 and c->why. */
static int64_t probe_range(struct canary *c, struct range *r, uint64_t duration)
{
	uint64_t begun = now_ns(), worked = worked_ns();

	while (!c->why[0] && (now_ns() - begun < duration || r->header->beats < 2))
		beat(c);
	if (!c->why[0] && r->header->wrong)
		snprintf(c->why, sizeof(c->why), "the guest reads other bytes than it wrote");
	worked = worked_ns() - worked;
	return c->why[0] ? -1 : (int64_t)(r->header->position * 1000000000ull / (worked ? worked : 1));
}

/* Run the guest in memory of our own for so long. Returns pages checked a second, or -1 and says why not. */
static int64_t probe(uint32_t as, uint64_t duration, char *why, size_t size)
{
	struct canary c = { .runs_as = as, .home = 0, .quantum = QUANTUM_MIN, .sock = -1,
			    .vm = { .kvm = -1, .fd = -1, .vcpu = -1 } };
	struct range *r = &c.ranges[0];
	uint64_t length = (FIRST_PAGE + PROBE_PAGES) * PAGE;
	int64_t speed = -1;
	void *at;
	int err = as == AGENT_AS_KVM ? vm_open(&c.vm, AGENT_GRANTS) : 0;

	at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!err && at == MAP_FAILED)
		err = -errno;
	if (!err && as == AGENT_AS_KVM)
		err = vm_slot(&c.vm, 0, 0, length, at, 0);
	if (err) {
		snprintf(why, size, "/dev/kvm: %s", strerror(-err));
	} else {
		*r = (struct range){ .length = length, .access = AGENT_RW, .mapped = true, .used = true, .header = at };
		r->fresh = true;
		range_touch(r);
		speed = probe_range(&c, r, duration);
		snprintf(why, size, "%s", c.why);
	}
	if (at != MAP_FAILED)
		munmap(at, length);
	vm_close(&c.vm);
	return speed;
}

static void catch(int sig, void (*handler)(int))
{
	struct sigaction action = { .sa_handler = handler };

	sigaction(sig, &action, NULL);
}

/* Begin anew, with no RAM yet. Returns 0, or -1 and why. */
static int begin(struct canary *c, const char *as, char *why, size_t size)
{
	bool kvm = as && strcmp(as, "kvm") == 0;
	int64_t speed = as && strcmp(as, "process") == 0 ? -1 : probe(AGENT_AS_KVM, 0, why, size);

	if (speed < 0 && kvm)
		return -1;
	c->runs_as = speed >= 0 && vm_open(&c->vm, AGENT_GRANTS) == 0 ? AGENT_AS_KVM : AGENT_AS_PROCESS;
	return 0;
}

/* Go on as the canary whose state was given; the fds given are closed. Returns 0, or -1 and why. */
static int go_on(struct canary *c, const struct options *o, char *why, size_t size)
{
	int err = state_restore(c, o->state, o->given, o->nr_given, why, size);

	close(o->state);
	for (int i = 0; i < o->nr_given; i++)
		close(o->given[i].fd);
	c->paused = o->paused;
	return err ? -1 : 0;
}

int main(int argc, char **argv)
{
	static struct canary c = { .sock = -1, .home = -1, .quantum = 16, .vm = { .kvm = -1, .fd = -1, .vcpu = -1 } };
	struct itimerval kick = { { 0, KICK_US }, { 0, KICK_US } };
	struct options o = { .state = -1 };
	char why[AGENT_TEXT] = "";

	if (!parse(&c, &o, argc, argv))
		return usage();
	c.begun = moment_now();
	close_others(&o);
	catch(SIGTERM, on_terminate);
	catch(SIGINT, on_terminate);
	catch(SIGALRM, on_kick);
	catch(SIGHUP, SIG_IGN);
	catch(SIGPIPE, SIG_IGN);
	setitimer(ITIMER_REAL, &kick, NULL);
	if (o.probe) {
		int64_t speed = probe(AGENT_AS_KVM, PROBE_NS, why, sizeof(why));

		if (speed < 0)
			printf("none %s\n", why);
		else
			printf("kvm %lld %lld\n", (long long)speed,
			       (long long)probe(AGENT_AS_PROCESS, PROBE_NS, why, sizeof(why)));
		return 0;
	}
	if (o.state >= 0 ? go_on(&c, &o, why, sizeof(why)) : begin(&c, o.as, why, sizeof(why))) {
		fprintf(stderr, "%s: %s: %s\n", o.name,
			o.state >= 0 ? "it cannot go on" : "KVM does not run this guest", why);
		return 1;
	}
	prctl(PR_SET_NAME, o.name);
	fprintf(stderr, "%s: runs as %s\n", o.name, c.runs_as == AGENT_AS_KVM ? "kvm" : "process");
	catch(SIGBUS, on_sigbus);
	live(&c);
	vm_close(&c.vm);
	return 0;
}
