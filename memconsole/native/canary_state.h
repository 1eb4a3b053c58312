/*
 * What a canary is besides its RAM: written into a memfd when it is told to (SAVE), read by the canary that goes on in
 * its place (--restore), under this kernel or the next.
 *
 *   state  = "MCCANARY" u32 version=1 u32 crc u32 length u32 runs_as  u64 build  moment stood
 *            u64 quantum  u64 restored  u32 home  u32 started  range[64]  vcpu
 *   moment = u64 ticks  u64 boottime_ns  u64 realtime_ns             when the last beat ended; zeros: there was none
 *   range  = char grant[64]  u64 gpa  u64 length  u64 offset  u32 access  u32 flags  header last
 *   flags  = 1 the slot is used | 2 it was mapped
 *
 * ``crc`` is CRC-32 of all of it with that field zero; ``length`` is all of it. The vCPU stands in the guest's code of
 * ``build``: a canary of another build boots its vCPU anew, which its guest, all of whose state is in RAM, survives.
 */
#ifndef MEMCONSOLE_CANARY_STATE_H
#define MEMCONSOLE_CANARY_STATE_H

#include "canary_ram.h"
#include "canary_vcpu.h"
#include "clock.h"
#include "crc.h"

/* Raised by any change: a state holds registers, and half of them are none. The RAM of a guest that is held so stays. */
#define STATE_VERSION 1

struct state_range {
	char grant[AGENT_NAME];
	uint64_t gpa, length, offset;
	uint32_t access, flags;
	struct header last;
};

struct state {
	char magic[8];
	uint32_t version, crc, length, runs_as;
	uint64_t build;
	struct moment stood;
	uint64_t quantum, restored;
	uint32_t home, started;
	struct state_range ranges[AGENT_GRANTS];
	struct vcpu vcpu;
};

static uint32_t state_crc(const struct state *s)
{
	const char *at = (const char *)s;
	size_t head = offsetof(struct state, crc), rest = offsetof(struct state, length);
	uint32_t zero = 0, crc = crc32_of(0, at, head);

	crc = crc32_of(crc, &zero, sizeof(zero));
	return crc32_of(crc, at + rest, sizeof(*s) - rest);
}

/* Write a standing canary into a file from its start. Returns 0 or an errno, and why. */
static int state_save(struct canary *c, int fd, char *why, size_t size)
{
	static struct state s;
	size_t done = 0;
	int err;

	s = (struct state){
		.magic = "MCCANARY", .version = STATE_VERSION, .length = sizeof(s), .runs_as = c->runs_as,
		.build = code_digest(), .stood = c->stood, .quantum = c->quantum, .restored = c->restored,
		.home = c->home < 0 ? AGENT_GRANTS : (uint32_t)c->home, .started = c->started,
	};
	for (int i = 0; i < AGENT_GRANTS; i++) {
		const struct range *r = &c->ranges[i];

		s.ranges[i] = (struct state_range){
			.gpa = r->gpa, .length = r->length, .offset = r->offset, .access = r->access,
			.flags = (r->used ? 1u : 0u) | (r->mapped ? 2u : 0u), .last = r->last,
		};
		memcpy(s.ranges[i].grant, r->grant, AGENT_NAME);
	}
	if (c->started) {
		err = vcpu_save(&c->vm, &s.vcpu, why, size);
		if (err)
			return -err;
	}
	s.crc = state_crc(&s);
	while (done < sizeof(s)) {
		ssize_t n = pwrite(fd, (const char *)&s + done, sizeof(s) - done, (off_t)done);

		if (n <= 0) {
			err = n ? errno : EIO;
			snprintf(why, size, "its state cannot be written: %s", strerror(err));
			return err;
		}
		done += (size_t)n;
	}
	return 0;
}

/* What is wrong with a state, or NULL. */
static const char *state_fault(const struct state *s, size_t got)
{
	uint64_t used = 0;

	if (got < offsetof(struct state, build) || memcmp(s->magic, "MCCANARY", sizeof(s->magic)))
		return "it is no canary's state";
	if (s->version != STATE_VERSION)
		return "it is of a version this canary does not know";
	if (got != sizeof(*s) || s->length != sizeof(*s))
		return "it is truncated, or longer than a state";
	if (s->crc != state_crc(s))
		return "its checksum does not match";
	if ((s->runs_as != AGENT_AS_KVM && s->runs_as != AGENT_AS_PROCESS) || s->home > AGENT_GRANTS ||
	    s->quantum < QUANTUM_MIN || s->quantum > QUANTUM_MAX)
		return "it says what cannot be";
	for (int i = 0; i < AGENT_GRANTS; i++) {
		const struct state_range *r = &s->ranges[i];

		if (r->flags > 3 || r->flags == 2 || r->grant[AGENT_NAME - 1] || (r->gpa | r->length | r->offset) % PAGE)
			return "it says what cannot be";
		if (r->flags && (r->length < MIN_PAGES * PAGE || r->length > GPA_END || r->gpa > GPA_END - r->length ||
				 (r->access != AGENT_RO && r->access != AGENT_RW)))
			return "it says what cannot be";
		used |= (uint64_t)(r->flags & 1) << i;
	}
	if (s->home < AGENT_GRANTS && (!(used >> s->home & 1) || s->ranges[s->home].access != AGENT_RW))
		return "it says what cannot be";
	return NULL;
}

/* A grant whose fd was inherited. */
struct given {
	char grant[AGENT_NAME];
	int fd;
};

/* Map a range of a state whose fd was given, if it was. Returns 0 or an errno. */
static int state_map(struct canary *c, const struct state_range *r, const struct given *given, int nr)
{
	struct agent_grant m = { .offset = r->offset, .length = r->length, .gpa = r->gpa, .access = r->access };

	int err;

	memcpy(m.grant, r->grant, AGENT_NAME);
	for (int i = 0; i < nr; i++) {
		if (strcmp(given[i].grant, r->grant))
			continue;
		err = range_map(c, &m, given[i].fd);
		if (!err)
			range_touch(range_find(c, m.grant));
		return err;
	}
	return 0;
}

/*
 * Become the canary of a state: its ranges whose fds are given are mapped, the others wait for their grants. Returns 0,
 * or an errno, and why; the process must end then.
 */
static int state_restore(struct canary *c, int fd, const struct given *given, int nr, char *why, size_t size)
{
	static struct state s;
	ssize_t got = pread(fd, &s, sizeof(s), 0);
	const char *fault;
	int err = 0;

	if (got < 0) {
		snprintf(why, size, "its state cannot be read: %s", strerror(errno));
		return EIO;
	}
	fault = state_fault(&s, (size_t)got);
	if (fault) {
		snprintf(why, size, "its state: %s", fault);
		return EINVAL;
	}
	c->runs_as = s.runs_as;
	if (c->runs_as == AGENT_AS_KVM) {
		err = -vm_open(&c->vm, AGENT_GRANTS);
		if (err) {
			snprintf(why, size, "/dev/kvm: %s", strerror(err));
			return err;
		}
	}
	for (int i = 0; i < AGENT_GRANTS; i++) {
		struct range *r = &c->ranges[i];

		*r = (struct range){ .gpa = s.ranges[i].gpa, .length = s.ranges[i].length, .offset = s.ranges[i].offset,
				     .access = s.ranges[i].access, .used = s.ranges[i].flags & 1,
				     .last = s.ranges[i].last };
		memcpy(r->grant, s.ranges[i].grant, AGENT_NAME);
	}
	c->home = s.home < AGENT_GRANTS ? (int)s.home : -1;
	c->awaited = c->home >= 0 && s.ranges[c->home].flags & 2;
	c->quantum = s.quantum;
	c->slept = s.stood;
	c->restored = s.restored + 1;
	for (int i = 0; i < AGENT_GRANTS && !err; i++) {
		if (s.ranges[i].flags & 2)
			err = state_map(c, &s.ranges[i], given, nr);
		if (err)
			snprintf(why, size, "grant %s: %s", s.ranges[i].grant, strerror(err));
	}
	if (!err && s.started && s.build == code_digest()) {
		err = -vcpu_load(&c->vm, &s.vcpu, why, size);
		c->started = !err;
	}
	return err;
}

#endif
