/*
 * Messages between the control process and the agents of its guests.
 *
 * Over a SOCK_SEQPACKET unix socket, one message a packet, all numbers little-endian:
 *
 *   message  = head body                 head.length counts the whole packet, at most AGENT_MAX
 *   head     = u32 magic  u16 version  u16 type  u32 id  u32 length
 *   name     = 64 bytes of text, NUL-padded, the last byte always NUL
 *
 *   agent -> control
 *     HELLO    = u32 runs_as  u32 count  count * name       first message; the grants it has mapped
 *     DONE     = s32 status  u32 zero  char text[120]       answers by id; status is 0 or an errno
 *     HANDED   = u32 modes  u32 zero  u64 address            with an uffd by SCM_RIGHTS, with which the mapping at
 *                address is registered (UFFDIO_REGISTER_MODE_*); comes before the answer to a GRANT that wants one,
 *                where it can be had; by the GRANT's id
 *     REPORTED = u32 runs_as  u32 state  u64 beats  u64 checked  u64 wrong  u64 gap_ns  u64 gaps
 *                u64 restored  u64 blackout_ns  char text[120]
 *     SWEPT    = u64 pages  u64 wrong  u64 ns                answers SWEEP: pages checked, bytes that are wrong
 *   control -> agent
 *     GRANT    = name  u64 offset  u64 length  u64 gpa  u32 access  u32 wants    with one fd by SCM_RIGHTS
 *     UNMAP    = name
 *     SAVE     with one fd: stop, stay stopped, and write what it is besides its RAM into that file (canary_state.h)
 *     TAKEN    the uffd handed over for the GRANT of that id is in custody, or nobody has it; no body
 *     PAUSE, RESUME, REPORT, STOP, SWEEP have no body
 *
 * Offsets and lengths are bytes. A GRANT the agent has mapped already is answered with success. Whoever breaks
 * the grammar is disconnected; an agent connects again after 100-200 ms and says in HELLO what it still has mapped.
 * A mapping whose uffd was handed over is touched from TAKEN on, and the GRANT answered then; if the connection ends
 * before, it is unmapped, and the grant comes again.
 */
#ifndef MEMCONSOLE_AGENT_H
#define MEMCONSOLE_AGENT_H

#include <stdint.h>

#define AGENT_MAGIC	0x4741434du	/* "MCAG" */
/*
 * Raised when a peer of the version before would do or take for done something else: agents live in guests, which live
 * longer than any control process. Not for a new type, which an agent answers with EOPNOTSUPP and the control process
 * passes over, nor for fields at the end of a body, which both pass over.
 */
#define AGENT_VERSION	1
#define AGENT_MAX	8192
#define AGENT_NAME	64
#define AGENT_TEXT	120
#define AGENT_GRANTS	64		/* grants one agent holds at most */
#define AGENT_NO_GPA	UINT64_MAX

enum agent_type {
	AGENT_HELLO = 1,
	AGENT_DONE = 2,
	AGENT_REPORTED = 3,
	AGENT_SWEPT = 4,
	AGENT_HANDED = 5,
	AGENT_GRANT = 16,
	AGENT_UNMAP = 17,
	AGENT_PAUSE = 18,
	AGENT_RESUME = 19,
	AGENT_REPORT = 20,
	AGENT_STOP = 21,
	AGENT_SAVE = 22,
	AGENT_SWEEP = 23,
	AGENT_TAKEN = 24,
};

/* WINDOW: registers of a device, to be read and written, and no RAM. */
enum agent_access { AGENT_RO = 1, AGENT_RW = 2, AGENT_WINDOW = 3 };
/* What the uffd of a grant is wanted for: its missing and minor faults; taking read and write access away. */
enum agent_wants { AGENT_WANTS_FAULTS = 1, AGENT_WANTS_SHIELD = 2 };
enum agent_runs_as { AGENT_AS_KVM = 1, AGENT_AS_PROCESS = 2 };
/* FAILED: its vCPU or its memory is beyond going on; the text says why. */
enum agent_state { AGENT_RUNNING = 1, AGENT_PAUSED = 2, AGENT_FAILED = 3 };

struct agent_head {
	uint32_t magic;
	uint16_t version;
	uint16_t type;
	uint32_t id;
	uint32_t length;
};

struct agent_hello {
	struct agent_head head;
	uint32_t runs_as;
	uint32_t count;
	char held[AGENT_GRANTS][AGENT_NAME];
};

struct agent_done {
	struct agent_head head;
	int32_t status;
	uint32_t zero;
	char text[AGENT_TEXT];
};

struct agent_handed {
	struct agent_head head;
	uint32_t modes;
	uint32_t zero;
	uint64_t address;
};

struct agent_reported {
	struct agent_head head;
	uint32_t runs_as;
	uint32_t state;
	uint64_t beats;
	uint64_t checked;
	uint64_t wrong;
	uint64_t gap_ns;
	uint64_t gaps;
	uint64_t restored;	/* how often it was, since its first start */
	uint64_t blackout_ns;	/* from the last beat before it was restored last to the first one after */
	char text[AGENT_TEXT];
};

struct agent_swept {
	struct agent_head head;
	uint64_t pages;
	uint64_t wrong;
	uint64_t ns;
};

struct agent_grant {
	struct agent_head head;
	char grant[AGENT_NAME];
	uint64_t offset;
	uint64_t length;
	uint64_t gpa;
	uint32_t access;
	uint32_t wants;
};

struct agent_unmap {
	struct agent_head head;
	char grant[AGENT_NAME];
};

_Static_assert(sizeof(struct agent_head) == 16, "the head is 16 bytes");
_Static_assert(sizeof(struct agent_grant) == 112, "no padding in a grant");
_Static_assert(sizeof(struct agent_done) == 144, "no padding in an answer");
_Static_assert(sizeof(struct agent_handed) == 32, "no padding where an uffd is handed over");
_Static_assert(sizeof(struct agent_reported) == 200, "no padding in a report");
_Static_assert(sizeof(struct agent_hello) <= AGENT_MAX, "a full HELLO fits into a message");

#endif
