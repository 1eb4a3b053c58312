/*
 * Reads plans with native/bootplan.h and says what it found. stdin: u32 length, bytes, again and again; stdout for each:
 * a line a thing, as ``described`` in test_bootplan.py writes them, then a line "end". Names and bytes are hex.
 */
#include <stdio.h>

#include "../../memconsole/native/bootplan.h"

static void hex(const void *bytes, size_t length)
{
	putchar(' ');
	for (size_t i = 0; i < length; i++)
		printf("%02x", ((const uint8_t *)bytes)[i]);
	if (!length)
		putchar('-');
}

static void text(const char *string)
{
	hex(string, strlen(string));
}

static void texts(char *const *list)
{
	for (; list && *list; list++)
		text(*list);
	printf(" ;");
}

static void describe(const struct plan *p)
{
	printf("plan %llu %llu %llu\n", (unsigned long long)p->written.ticks,
	       (unsigned long long)p->written.boottime_ns, (unsigned long long)p->written.realtime_ns);
	if (p->fault)
		printf("fault %s\n", p->fault);
	for (size_t i = 0; i < p->nr_holds; i++) {
		printf("hold %llu", (unsigned long long)p->holds[i].token);
		text(p->holds[i].session);
		text(p->holds[i].name);
		hex(p->holds[i].payload, p->holds[i].payload_len);
		putchar('\n');
	}
	for (size_t i = 0; i < p->nr_verifies; i++) {
		printf("verify %llu", (unsigned long long)p->verifies[i].size);
		hex(p->verifies[i].digest, 16);
		text(p->verifies[i].name);
		putchar('\n');
	}
	for (size_t i = 0; i < p->nr_starts; i++) {
		const struct plan_start *s = &p->starts[i];

		printf("start %u %u", s->uid, s->gid);
		text(s->guest);
		text(s->directory);
		text(s->log);
		for (uint16_t n = 0; n < s->nr_fds; n++) {
			printf(" %u", s->fds[n].number);
			text(s->fds[n].name);
		}
		for (uint16_t n = 0; s->words[n]; n++)
			text(s->words[n]);
		printf(" ;");
		for (uint16_t n = 0; n < s->nr_groups; n++)
			printf(" %u", s->groups[n]);
		texts(s->variables);
		texts(s->directories);
		texts(s->unless);
		putchar('\n');
	}
	for (size_t i = 0; i < p->nr_says; i++) {
		const struct plan_say *s = &p->says[i];

		printf("say %u", s->within_ms);
		text(s->guest);
		text(s->socket);
		for (uint16_t n = 0; n < s->nr_lines; n++) {
			text(s->lines[n].line);
			text(s->lines[n].until);
		}
		putchar('\n');
	}
	for (size_t i = 0; i < p->nr_files; i++) {
		const struct plan_file *f = &p->files[i];

		printf("file %u %u %u %u", f->uid, f->gid, f->mode, f->early);
		text(f->guest);
		text(f->path);
		hex(f->bytes, f->length);
		putchar('\n');
	}
}

int main(void)
{
	uint32_t length;

	while (fread(&length, sizeof(length), 1, stdin) == 1) {
		uint8_t *bytes = malloc(length ? length : 1);	/* its own size, so that a byte too far is found */
		struct plan plan;

		if (!bytes || fread(bytes, 1, length, stdin) != length)
			return 1;
		plan_read(&plan, bytes, length);
		free(bytes);
		describe(&plan);
		puts("end");
		plan_free(&plan);
	}
	return 0;
}
