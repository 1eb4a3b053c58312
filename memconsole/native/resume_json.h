/*
 * Pieces of the record of a resume, as JSON.
 */
#ifndef MEMCONSOLE_RESUME_JSON_H
#define MEMCONSOLE_RESUME_JSON_H

#include <stdio.h>

#include "starter.h"

static inline void put_text(FILE *out, const char *text)
{
	fputc('"', out);
	for (; *text; text++) {
		unsigned char c = (unsigned char)*text;

		if (c == '"' || c == '\\')
			fprintf(out, "\\%c", c);
		else if (c < 32)
			fprintf(out, "\\u%04x", c);
		else
			fputc(c, out);
	}
	fputc('"', out);
}

static inline void put_moment(FILE *out, const struct moment *at)
{
	fprintf(out, "{\"ticks\":%llu,\"boottime_ns\":%llu,\"realtime_ns\":%llu}", (unsigned long long)at->ticks,
		(unsigned long long)at->boottime_ns, (unsigned long long)at->realtime_ns);
}

static inline void put_guest(FILE *out, const struct guest *g)
{
	static const char *const states[] = { "held", "started", "resumed" };

	fputs("{\"guest\":", out);
	put_text(out, g->start->guest);
	fprintf(out, ",\"state\":\"%s\",\"pid\":%d,\"start_ticks\":%llu,\"why\":", states[g->state], (int)g->pid,
		(unsigned long long)g->start_ticks);
	put_text(out, g->why);
	fputs(",\"at\":", out);
	put_moment(out, &g->at);
	fprintf(out, ",\"told\":%s}", g->told ? "true" : "false");
}

#endif
