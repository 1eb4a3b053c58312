/*
 * The canary's command line; what it means stands at the top of canary.c.
 */
#ifndef MEMCONSOLE_CANARY_OPTIONS_H
#define MEMCONSOLE_CANARY_OPTIONS_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "canary_state.h"

#define INHERITED_MAX	1023		/* highest fd that can be given */

static int usage(void)
{
	fprintf(stderr, "usage: memconsole-canary --socket PATH --name NAME [--as kvm|process|auto] | --probe\n"
			"       memconsole-canary --socket PATH --name NAME --restore FD [--give GRANT=FD]... [--paused yes]\n");
	return 2;
}

struct options {
	const char *name, *as;
	bool probe, paused;
	int state;		/* fd, or -1 */
	struct given given[AGENT_GRANTS];
	int nr_given;
};

/* An fd from the command line, or -1. */
static int fd_of(const char *text)
{
	char *end;
	long fd = strtol(text, &end, 10);

	return *end || end == text || fd < 3 || fd > INHERITED_MAX ? -1 : (int)fd;
}

static bool parse_given(struct options *o, const char *text)
{
	const char *sign = strrchr(text, '=');
	struct given *given = &o->given[o->nr_given];

	if (!sign || o->nr_given == AGENT_GRANTS || sign == text || sign - text >= AGENT_NAME)
		return false;
	memcpy(given->grant, text, (size_t)(sign - text));
	given->fd = fd_of(sign + 1);
	o->nr_given++;
	return given->fd >= 0;
}

static bool parse(struct canary *c, struct options *o, int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "--probe") == 0)
		return o->probe = true;
	for (int i = 1; i < argc; i += 2) {
		const char *word = argv[i], *value = argv[i + 1];

		if (!value)
			return false;
		if (strcmp(word, "--socket") == 0)
			c->path = value;
		else if (strcmp(word, "--name") == 0)
			o->name = value;
		else if (strcmp(word, "--as") == 0)
			o->as = value;
		else if (strcmp(word, "--restore") == 0 && (o->state = fd_of(value)) >= 0)
			continue;
		else if (strcmp(word, "--give") == 0 && parse_given(o, value))
			continue;
		else if (strcmp(word, "--paused") == 0 && strcmp(value, "yes") == 0)
			o->paused = true;
		else
			return false;
	}
	if (!c->path || strlen(c->path) >= sizeof(((struct sockaddr_un *)0)->sun_path) || !o->name)
		return false;
	if (o->state >= 0)	/* it runs as what it ran as */
		return !o->as;
	return !o->nr_given && !o->paused &&
	       (!o->as || !strcmp(o->as, "kvm") || !strcmp(o->as, "process") || !strcmp(o->as, "auto"));
}

/* Close what the starter left open, but not what was given. */
static void close_others(const struct options *o)
{
	for (int fd = 3; fd <= INHERITED_MAX; fd++) {
		bool given = fd == o->state;

		for (int i = 0; i < o->nr_given; i++)
			given |= fd == o->given[i].fd;
		if (!given)
			close(fd);
	}
	syscall(SYS_close_range, (unsigned int)INHERITED_MAX + 1, ~0u, 0u);	/* without the call, they stay */
}

#endif
