/*
 * What the canary does in its RAM: one function, compiled once, that runs in a vCPU or in the process itself.
 *
 * A range of RAM begins with its own header, code and stack, and is walked page by page after them:
 *
 *   page 0     struct header
 *   page 1-2   guest code
 *   page 3     stack
 *   page 4...  stamped: u64 index, generation, mix, check at the start of each page
 *
 * The walk checks the stamp of the generation before and writes this one's, so every page is checked once a sweep.
 * All that is counted lives in the header: a range that is mapped again goes on where it stood.
 */
#ifndef MEMCONSOLE_CANARY_GUEST_H
#define MEMCONSOLE_CANARY_GUEST_H

#include <stddef.h>
#include <stdint.h>

#define PAGE		4096ull
#define CODE_PAGE	1
#define CODE_PAGES	2
#define STACK_TOP	4		/* the stack grows down from the start of this page */
#define FIRST_PAGE	4
#define MIN_PAGES	(FIRST_PAGE + 1)
#define BEAT_PORT	0x77

#define HEADER_MAGIC	0x315952414e4143ull	/* "CANARY1" */

struct header {
	uint64_t magic;
	uint64_t pages;		/* in the range, this one included */
	uint64_t next;		/* written by the VMM: address of the header to visit at the next beat */
	uint64_t quantum;	/* written by the VMM: pages to visit a beat */
	uint64_t position;	/* pages visited since the first beat */
	uint64_t beats;
	uint64_t checked;	/* stamps checked */
	uint64_t wrong;		/* bytes that were not what they should be */
	uint64_t seal;		/* of the fields above that the guest writes */
	uint64_t busy;		/* a beat is under way */
	uint64_t torn;		/* written by the VMM: the last beat was cut short, its pages may be stamped already */
	uint64_t build;		/* digest of the code that was written into the range */
	uint64_t gap_ns;	/* written by the VMM: longest pause between two beats, commanded ones left out */
	uint64_t gaps;		/* written by the VMM: pauses above GAP_NS */
};

#define STAMP_WORDS	4

#if defined(__x86_64__)
#define GUEST_TARGET	__attribute__((target("general-regs-only")))
#else
#define GUEST_TARGET
#endif
/* Freestanding, position-independent, no calls, no vector registers: a bare vCPU runs it. */
#define GUEST_CODE	GUEST_TARGET __attribute__((section("guest_code"), noinline, used, no_stack_protector, \
			no_sanitize("address", "undefined"), optimize("O2", "no-tree-loop-distribute-patterns")))
#define GUEST_INLINE	static inline GUEST_TARGET __attribute__((always_inline, no_sanitize("address", "undefined")))

GUEST_INLINE uint64_t header_seal(const struct header *h)
{
	return (h->pages ^ (h->position * 0x9e3779b97f4a7c15ull) ^ (h->beats * 0xc2b2ae3d27d4eb4full) ^
		(h->checked * 0x165667b19e3779f9ull) ^ (h->wrong << 17)) + HEADER_MAGIC;
}

GUEST_INLINE uint64_t stamp_word(unsigned int word, uint64_t index, uint64_t generation)
{
	uint64_t mix = (index * 0x9e3779b97f4a7c15ull) ^ (generation * 0xc2b2ae3d27d4eb4full);

	return word == 0 ? index : word == 1 ? generation : word == 2 ? mix : ~(mix + index + generation);
}

GUEST_INLINE uint64_t bytes_that_differ(uint64_t is, uint64_t should)
{
	uint64_t count = 0;

	for (uint64_t diff = is ^ should; diff; diff >>= 8)
		count += (diff & 0xff) != 0;
	return count;
}

/**
 * canary_beat() - one beat: check and stamp the next pages of a range
 * @h: header of the range, followed by its pages
 *
 * Visits h->quantum pages. Counts wrong bytes of stamps, and of the header itself if its seal does not hold.
 */
GUEST_CODE void canary_beat(struct header *h)
{
	uint64_t span = h->pages - FIRST_PAGE;
	uint64_t sweep = h->position / span;
	uint64_t at = h->position - sweep * span;
	uint64_t wrong = h->wrong;
	uint64_t checked = h->checked;
	uint64_t quantum = h->quantum;

	if (h->seal != header_seal(h))
		wrong += sizeof(h->seal);
	*(volatile uint64_t *)&h->busy = 1;
	for (uint64_t n = 0; n < quantum; n++) {
		volatile uint64_t *stamp = (volatile uint64_t *)((char *)h + (FIRST_PAGE + at) * PAGE);

		for (unsigned int w = 0; w < STAMP_WORDS; w++) {
			uint64_t ours = stamp_word(w, at, sweep + 1);
			uint64_t is = stamp[w];

			if (sweep && is != stamp_word(w, at, sweep) && !(h->torn && is == ours))
				wrong += bytes_that_differ(is, stamp_word(w, at, sweep));
			stamp[w] = ours;
		}
		checked += sweep != 0;
		if (++at == span) {
			at = 0;
			sweep++;
		}
	}
	h->torn = 0;
	h->wrong = wrong;
	h->checked = checked;
	h->beats++;
	*(volatile uint64_t *)&h->position = sweep * span + at;
	h->seal = header_seal(h);
	*(volatile uint64_t *)&h->busy = 0;
}

extern const char __start_guest_code[] __attribute__((visibility("hidden")));
extern const char __stop_guest_code[] __attribute__((visibility("hidden")));

#if defined(__x86_64__)
/* The vCPU's whole program: %rbx holds the home range's header, whose next field names the range to visit. */
__asm__(".pushsection guest_code,\"ax\",@progbits\n"
	".hidden canary_entry\n"
	".globl canary_entry\n"
	"canary_entry:\n"
	"	mov	16(%rbx), %rdi\n"
	"	call	canary_beat\n"
	"	out	%al, $0x77\n"
	"	jmp	canary_entry\n"
	".popsection\n");
extern const char canary_entry[] __attribute__((visibility("hidden")));
_Static_assert(offsetof(struct header, next) == 16 && BEAT_PORT == 0x77, "canary_entry knows both numbers");
#endif

#endif
