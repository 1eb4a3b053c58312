/*
 * What the parts of memconsole-resume share: what it is at, and how it comes by sessions and files (resume_custody.c).
 */
#ifndef MEMCONSOLE_RESUME_H
#define MEMCONSOLE_RESUME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/un.h>

#include "bootplan.h"
#include "clock.h"

#define MANIFEST_SESSION "memconsole:manifest"
#define MANIFEST_TOKEN 1
#define MANIFEST "manifest"
#define RECORD "resume"
#define LANDED "landed"			/* what the control process that took over makes of the record */
#define RUNTIME "/run/memconsole"
#ifndef PATIENCE_NS
#define PATIENCE_NS 60000000000ull	/* with another opener of the device; then the unit starts this anew */
#endif
#define ALIVE_NS 300000000ull		/* a VMM that lives so long has taken its state */
#define PHASES_MAX 16

enum result { DONE, FAILED, USAGE, FINDINGS = 4, NOTHING = 6, DEVICE_BUSY = 7 };

struct held {
	int fd;			/* -1: lost */
	bool moved;		/* its pages are not where they were */
};

struct session {
	const char *name;
	int fd;			/* -1: not retrieved */
	int err;		/* why not; 0: it was said */
	bool whole;		/* all its fds are in custody */
};

struct resume {
	bool rehearsal;
	const char *manifest;	/* what custody calls it */
	const char *runtime;	/* the runtime directory */
	bool of_arena;		/* the manifest was not handed over: an arena has it (resume_arena.c) */
	bool recorded;		/* an earlier start of this program did all but finish the last session */
	bool started_keeper;
	int lock;		/* one at a time, and no VMM on its way to be one */
	char keeper_path[sizeof(((struct sockaddr_un *)0)->sun_path) + 16];
	int keeper;		/* -1: none */
	int device;
	struct plan plan;
	struct held *held;	/* a hold each */
	struct session *sessions;
	size_t nr_sessions;
	struct guest *guests;	/* a start each */
	bool waited;		/* for the device, which another process had open */
	bool homeless;		/* a fd is in nobody's custody */
	struct {
		const char *name;
		struct moment at;
	} phases[PHASES_MAX];
	int nr_phases;
	FILE *findings;		/* JSON objects */
	char *findings_text;
	size_t findings_size, nr_findings;
};

extern struct resume r;

/* One more thing that is not as the plan says: on stderr, and in the record. */
__attribute__((format(printf, 3, 4))) void finding(const char *id, const char *subject, const char *format, ...);

/* When the program came to where it is now. */
void phase(const char *name);

/* Wait until no other start of this program is at work, nor a process that one has made to be a VMM. -errno. */
int take_lock(const char *runtime);

/* The manifest's fd, in custody; or an enum result as a negative number less 1000. */
int get_manifest(void);

/* Get one hold's fd, from the kernel into custody, or from custody. */
void get(const struct plan_hold *h, struct held *held);

void close_device(void);

/* An fd out of custody, or -1. */
int kept(const char *name);

/* Put a fd into custody; one that cannot be is held by this process to the end. Returns whether it is there. */
bool keep(const char *name, int fd, const void *payload, size_t length);

#endif
