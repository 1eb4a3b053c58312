/*
 * Fault points, as the control process has them (backend/steps.py): where MEMCONSOLE_FAULT is the name of one, the
 * process that gets there kills itself. Where it is @FILE, that happens at the first point whose name is not in the
 * file yet, once it was added: started again and again, a program dies at each of its points in turn.
 */
#ifndef MEMCONSOLE_FAULTPOINT_H
#define MEMCONSOLE_FAULTPOINT_H

#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define POINT_MAX 256

/* Whether a line of a file is this name. */
static bool point_seen(const char *path, const char *name)
{
	char line[POINT_MAX];
	FILE *in = fopen(path, "re");
	bool seen = false;

	while (in && !seen && fgets(line, sizeof(line), in)) {
		line[strcspn(line, "\n")] = 0;
		seen = strcmp(line, name) == 0;
	}
	if (in)
		fclose(in);
	return seen;
}

/* The point "resume.WHAT.WHICH.WHEN". */
static void point(const char *what, const char *which, const char *when)
{
	const char *fault = getenv("MEMCONSOLE_FAULT");
	char name[POINT_MAX];
	FILE *out;

	if (!fault)
		return;
	snprintf(name, sizeof(name) - 1, "resume.%s%s%s.%s", what, *which ? "." : "", which, when);
	if (fault[0] == '@') {
		if (point_seen(fault + 1, name))
			return;
		out = fopen(fault + 1, "ae");
		if (!out || fprintf(out, "%s\n", name) < 0 || fclose(out))
			return;
	} else if (strcmp(fault, name)) {
		return;
	}
	kill(getpid(), SIGKILL);
}

#endif
