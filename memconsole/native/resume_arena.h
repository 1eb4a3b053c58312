/*
 * How memconsole-resume comes by what lies in arenas (resume_arena.c, resume_cargo.c).
 */
#ifndef MEMCONSOLE_RESUME_ARENA_H
#define MEMCONSOLE_RESUME_ARENA_H

#include "core.h"
#include "resume.h"

#define ARENA_SESSION "arena:"	/* before an arena's name, where a plan's hold has a session */
#define ARENAS_MAX 64
#ifndef DRIVER_NS
#define DRIVER_NS 10000000000ull	/* for a range to become a device, where the plan or the command line names it */
#endif

struct arena {
	char name[17], device[32];
	char path[200];		/* where it is mounted */
	int root;		/* its directory, locked; -1: it is not to be had */
	bool mine;		/* mounted by this program */
	const char *why;	/* static text: why it is not to be had */
};

extern struct arena arenas[ARENAS_MAX];
extern size_t nr_arenas;

/* The first line of a small file; empty if it cannot be read. */
void read_line(const char *path, char *text, size_t size);

/* Look at every range once more: drivers may come late. Returns whether there is any. */
bool arenas_look(const char *runtime);

/* Whether the command line sets ranges aside, which are then to become devices. */
bool ranges_wanted(void);

/* Find the manifest that waits in an arena. Returns 0, or -ENOENT; what is left alone is said on stderr. */
int arena_manifest(void);

/* Its fd, in custody, or -errno. */
int arena_plan(void);

/* Guests are about to be started by it: from now on it means nothing in any other boot. */
void arena_begun(void);

/* Everybody has what it names: it means nothing any more; without bytes it stays to be looked at. */
void arena_forget(bool bytes);

/* What was carried by its token, as memory in custody; -errno. An earlier start of this program may have come so far. */
int arena_cargo(const struct arena *a, uint64_t token, const char *name, const void *payload, size_t length);

/* Let go of the locks. */
void arenas_close(void);

/* Whether a plan's hold lies in an arena. */
bool in_arena(const struct plan_hold *h);

/* Get one such hold's fd into custody. */
void get_from_arena(const struct plan_hold *h, struct held *held);

/* Append where the first size bytes of a file lie in its arena; nothing is touched. Errors: MC_KERNEL, MC_MEMORY. */
int arena_scan(struct mc_table *table, int fd, uint64_t size, struct mc_fail *fail);

#endif
