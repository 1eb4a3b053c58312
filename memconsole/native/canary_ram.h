/*
 * The canary's RAM: ranges the control process granted, mapped here and in the machine, taken over with their contents.
 */
#ifndef MEMCONSOLE_CANARY_RAM_H
#define MEMCONSOLE_CANARY_RAM_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "agent.h"
#include "canary_kvm.h"
#include "clock.h"
#include "mapping.h"

#define QUANTUM_MIN	4
#define QUANTUM_MAX	1024

struct range {
	char grant[AGENT_NAME];
	uint64_t gpa;
	uint64_t length;
	uint64_t offset;	/* in the file that was granted */
	uint32_t access;
	bool mapped;
	bool fresh;		/* mapped, and nothing of it touched yet */
	bool again;		/* it was mapped before, as the same */
	bool used;		/* the slot stands for a range that is, or was, mapped */
	struct header *header;	/* the mapping; NULL while there is none */
	struct header last;	/* what the header said at its last beat */
};

#define WINDOWS		8		/* it has at most */

/* A device's registers, in this process alone: the vCPU has no driver. They are not saved, but granted again. */
struct window {
	char grant[AGENT_NAME];
	uint64_t length;
	volatile uint32_t *at;	/* NULL while there is none */
};

/* A grant that is mapped and touched by nobody: its uffd was handed over, and is not known to be in custody yet. */
struct handed {
	struct agent_grant grant;
	void *at;		/* NULL while there is none */
};

struct canary {
	const char *path;
	int sock;
	uint64_t retry;
	struct vm vm;
	uint32_t runs_as;
	bool started;		/* the vCPU has its first state */
	bool paused;
	bool stop;
	struct range ranges[AGENT_GRANTS];
	struct window windows[WINDOWS];
	struct handed handed[AGENT_GRANTS];
	int home;		/* index of the range the vCPU runs in; -1 before there was one */
	int visit;		/* index of the range visited last */
	uint64_t quantum;
	uint64_t beat_at;	/* when the next beat is due */
	uint64_t last_beat;	/* 0 after a commanded pause */
	bool awaited;		/* restored, and the range the vCPU runs in is not mapped yet */
	uint64_t restored;	/* how often it was, since its first start */
	struct moment begun;	/* when this process began */
	struct moment stood;	/* when its last beat ended */
	struct moment slept;	/* when the last beat before it was restored ended */
	struct moment woke;	/* when the first one after that did */
	char why[AGENT_TEXT];	/* why it cannot go on; empty while it can */
};

static uint64_t code_digest(void)
{
	uint64_t digest = 0xcbf29ce484222325ull;

	for (const char *at = __start_guest_code; at < __stop_guest_code; at++)
		digest = (digest ^ (uint8_t)*at) * 0x100000001b3ull;
	return digest;
}

/*
 * Take a range's contents over, or begin anew in memory that holds none. What stood here when the range was
 * unmapped must stand here again; if it does not, the whole header page counts as wrong.
 */
static void range_adopt(struct range *r, bool seen_before)
{
	struct header *h = r->header;
	uint64_t pages = r->length / PAGE;
	uint64_t build = code_digest();
	bool lost = seen_before && (h->magic != HEADER_MAGIC || h->beats != r->last.beats ||
				    h->position != r->last.position);
	bool known = h->magic == HEADER_MAGIC && h->pages == pages;
	uint64_t differ;

	if (!known)
		*h = (struct header){ .magic = HEADER_MAGIC, .pages = pages };
	if (h->busy)
		h->torn = 1;
	differ = vm_prepare((uint8_t *)h);
	if (known && !h->busy && h->seal != header_seal(h))
		h->wrong += sizeof(h->seal);
	if (known && h->build == build)
		h->wrong += differ;
	if (lost)
		h->wrong += PAGE;
	h->busy = 0;
	h->build = build;
	h->seal = header_seal(h);
	r->last = *h;
}

static struct range *range_find(struct canary *c, const char *grant)
{
	for (int i = 0; i < AGENT_GRANTS; i++)
		if (c->ranges[i].mapped && strcmp(c->ranges[i].grant, grant) == 0)
			return &c->ranges[i];
	return NULL;
}

static uint64_t range_place(const struct canary *c, uint64_t length)
{
	const struct range *home = c->home >= 0 ? &c->ranges[c->home] : NULL;
	uint64_t end = 0;

	if (home && !home->mapped && home->length == length)
		return home->gpa;
	for (int i = 0; i < AGENT_GRANTS; i++)
		if (c->ranges[i].used && c->ranges[i].gpa + c->ranges[i].length > end)
			end = c->ranges[i].gpa + c->ranges[i].length;
	return (end + (2u << 20) - 1) & ~((2ull << 20) - 1);
}

/* The slot of the same range mapped before, or a free one, or the slot of one long unmapped; NULL: none is left. */
static struct range *range_slot(struct canary *c, uint64_t gpa, uint64_t length)
{
	struct range *slot = NULL;

	for (int i = 0; i < AGENT_GRANTS; i++) {
		struct range *r = &c->ranges[i];

		if (r->used && !r->mapped && r->gpa == gpa && r->length == length)
			return r;
		if (!r->mapped && (!slot || (slot->used && !r->used)))
			slot = r;
	}
	return slot;
}

/* Map what a grant's file holds, in this process alone, and touch nothing of it. Returns 0 or an errno. */
static int range_claim(const struct agent_grant *m, int fd, void **at)
{
	bool writes = m->access == AGENT_RW;
	struct stat st;

	if ((m->offset | m->length) % PAGE || m->length < MIN_PAGES * PAGE || m->length > GPA_END ||
	    (m->gpa != AGENT_NO_GPA && (m->gpa % PAGE || m->gpa > GPA_END - m->length)) ||
	    (m->access != AGENT_RO && !writes))
		return EINVAL;
	/* A file shorter than the grant would end in SIGBUS, not in an answer; a device does not say how long it is. */
	if (fstat(fd, &st) < 0)
		return errno;
	if (S_ISREG(st.st_mode) &&
	    (m->offset > (uint64_t)st.st_size || m->length > (uint64_t)st.st_size - m->offset))
		return ERANGE;
	*at = map_for_huge_pages(m->length, PROT_READ | (writes ? PROT_WRITE : 0), fd, (off_t)m->offset);
	if (*at == MAP_FAILED)
		return errno;
	madvise(*at, m->length, MADV_HUGEPAGE);	/* advice: kernels without it do as they please */
	return 0;
}

static int range_insert(struct canary *c, const struct agent_grant *m, void *at)
{
	uint64_t gpa = m->gpa == AGENT_NO_GPA ? range_place(c, m->length) : m->gpa;
	bool writes = m->access == AGENT_RW;
	bool homeless = c->home < 0 || (!c->ranges[c->home].mapped && !c->awaited);
	struct range *r;
	bool again;
	int err;

	if (gpa > GPA_END - m->length)
		return EINVAL;
	for (int i = 0; i < AGENT_GRANTS; i++)
		if (c->ranges[i].mapped && gpa < c->ranges[i].gpa + c->ranges[i].length &&
		    c->ranges[i].gpa < gpa + m->length)
			return EEXIST;
	r = range_slot(c, gpa, m->length);
	if (!r)
		return ENOSPC;
	if (c->runs_as == AGENT_AS_KVM) {
		err = vm_slot(&c->vm, (unsigned int)(r - c->ranges), gpa, m->length, at, !writes);
		if (err)
			return -err;
	}
	again = r->used && r->gpa == gpa && r->length == m->length && r->access == m->access;
	if (writes && homeless && !(again && r == &c->ranges[c->home])) {
		c->home = (int)(r - c->ranges);
		c->started = false;
	}
	memcpy(r->grant, m->grant, AGENT_NAME);
	r->gpa = gpa;
	r->length = m->length;
	r->offset = m->offset;
	r->access = m->access;
	r->header = at;
	r->used = true;
	r->mapped = true;
	if (r == &c->ranges[c->home])
		c->awaited = false;
	r->fresh = writes;
	r->again = again;
	c->last_beat = 0;
	return 0;
}

/* Give the machine, at its GPA, what was claimed; untouched. Returns 0, or an errno, and nothing is mapped then. */
static int range_take(struct canary *c, const struct agent_grant *m, void *at)
{
	int err = range_insert(c, m, at);

	if (err)
		munmap(at, m->length);
	return err;
}

/* Map a grant at its GPA, and touch nothing of it. Returns 0 or an errno; nothing is left half done. */
static int range_map(struct canary *c, const struct agent_grant *m, int fd)
{
	void *at;
	int err = range_claim(m, fd, &at);

	return err ? err : range_take(c, m, at);
}

/* Touch a range for the first time: only once whoever serves its page faults has what it takes. */
static void range_touch(struct range *r)
{
	if (r->fresh)
		range_adopt(r, r->again);
	r->fresh = false;
}

static struct handed *handed_find(struct canary *c, uint32_t id)
{
	for (int i = 0; i < AGENT_GRANTS; i++)
		if (c->handed[i].at && c->handed[i].grant.head.id == id)
			return &c->handed[i];
	return NULL;
}

static struct handed *handed_free(struct canary *c)
{
	for (int i = 0; i < AGENT_GRANTS; i++)
		if (!c->handed[i].at)
			return &c->handed[i];
	return NULL;
}

/* Unmap what waits to be taken: of one grant, or (NULL) of all. */
static void handed_drop(struct canary *c, const char *grant)
{
	for (int i = 0; i < AGENT_GRANTS; i++) {
		struct handed *h = &c->handed[i];

		if (!h->at || (grant && strcmp(h->grant.grant, grant)))
			continue;
		munmap(h->at, h->grant.length);
		h->at = NULL;
	}
}

/* Check every stamp of a range at once, between two beats. Returns how many bytes are wrong, and adds to ``*pages``. */
static uint64_t range_sweep(const struct range *r, uint64_t *pages)
{
	const struct header *h = r->header;
	uint64_t span = r->length / PAGE - FIRST_PAGE, wrong = 0;
	uint64_t sweep = h->position / span, visited = h->position - sweep * span;

	if (h->magic != HEADER_MAGIC || h->pages != r->length / PAGE || h->seal != header_seal(h))
		return PAGE;
	for (uint64_t at = 0; at < span; at++) {
		const uint64_t *stamp = (const uint64_t *)((const char *)h + (FIRST_PAGE + at) * PAGE);
		uint64_t generation = sweep + (at < visited);

		if (!generation)
			break;
		for (unsigned int w = 0; w < STAMP_WORDS; w++)
			if (!(h->torn && stamp[w] == stamp_word(w, at, generation + 1)))
				wrong += bytes_that_differ(stamp[w], stamp_word(w, at, generation));
		++*pages;
	}
	return wrong;
}

/* Take a range out of the machine and out of this process; its counters stay known. Returns 0 or an errno. */
static int range_unmap(struct canary *c, struct range *r)
{
	int err;

	if (c->runs_as == AGENT_AS_KVM) {
		err = vm_slot(&c->vm, (unsigned int)(r - c->ranges), r->gpa, 0, r->header, 0);
		if (err)
			return -err;
	}
	if (munmap(r->header, r->length) < 0)
		return errno;
	r->header = NULL;
	r->mapped = false;
	c->last_beat = 0;
	return 0;
}

static struct window *window_find(struct canary *c, const char *grant)
{
	for (int i = 0; i < WINDOWS; i++)
		if (c->windows[i].at && strcmp(c->windows[i].grant, grant) == 0)
			return &c->windows[i];
	return NULL;
}

/* Map a device's registers, and read the first: all ones mean that no device answers. Returns 0 or an errno, and why. */
static int window_map(struct canary *c, const struct agent_grant *m, int fd, char *why, size_t size)
{
	struct window *w = NULL;
	struct stat st;
	void *at;

	if (m->offset % PAGE || !m->length || m->length % PAGE)
		return EINVAL;
	if (fstat(fd, &st) < 0)
		return errno;
	/* a resource file of sysfs has a size; VFIO's file of a device refuses to be mapped beyond its regions */
	if (S_ISREG(st.st_mode) && (m->offset > (uint64_t)st.st_size || m->length > (uint64_t)st.st_size - m->offset))
		return ERANGE;
	for (int i = 0; i < WINDOWS && !w; i++)
		if (!c->windows[i].at)
			w = &c->windows[i];
	if (!w)
		return ENOSPC;
	at = mmap(NULL, m->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)m->offset);
	if (at == MAP_FAILED)
		return errno;
	if (*(volatile uint32_t *)at == UINT32_MAX) {
		munmap(at, m->length);
		snprintf(why, size, "no device answers behind it: its memory is not enabled");
		return EIO;
	}
	memcpy(w->grant, m->grant, AGENT_NAME);
	w->length = m->length;
	w->at = at;
	return 0;
}

static int window_unmap(struct window *w)
{
	if (munmap((void *)(uintptr_t)w->at, w->length) < 0)
		return errno;
	w->at = NULL;
	return 0;
}

#endif
