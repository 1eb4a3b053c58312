/*
 * The boot plan: what memconsole-resume does after a jump, written before it, at the start of the manifest.
 *
 *   plan    = header record*                       little-endian; records stand at multiples of 8, zeros between them
 *   header  = "MCBOOTPL" u32 version=1 u32 crc u32 length u32 records  u64 ticks  u64 boottime_ns  u64 realtime_ns
 *   record  = "MCRC" u32 crc u32 length u16 type u16 zero  body
 *   text    = u16 length bytes                     no NUL in it
 *
 *   HOLD    1 = u64 token  text session  text name  u16 length payload
 *                          the session's fd of this token goes into custody under ``name`` with the payload
 *   VERIFY  2 = u64 size  u8 digest[16]  text name
 *                          where the pages of its first ``size`` bytes must be: mc_placement (query.c)
 *   START   3 = u32 uid  u32 gid  u16 fds  u16 words  text guest  text directory  text log
 *               (u32 number  text name){fds}  (text word){words}
 *               [u16 groups  u16 variables  u16 directories  u16 unless
 *                (u32 gid){groups}  (text variable){variables}  (text path){directories}  (text path){unless}]
 *                          start a VMM in this directory, its output appended to ``log``, with at most 1000 fds of
 *                          custody by number, 3 to 1023; where the rest is there, with these groups besides, an
 *                          environment of these variables (none: this program's), and these directories made for it;
 *                          not where there is anything ``unless`` it is to be, nor is it told to go on then
 *   SAY     4 = u32 within_ms  u16 lines  u16 zero  text guest  text socket  (text line  text until){lines}
 *                          say each line to a QMP socket, again until what it returns contains ``until``; an error
 *                          ends the conversation, and so does a VMM that slept ``within_ms`` of it (patience.h)
 *   FILE    5 = u32 uid  u32 gid  u16 mode  u16 early  u32 length  text guest  text path  bytes
 *                          have a file say who runs a guest before it is told to go on, the first "@PID@" in it being
 *                          its VMM's; where one is there when it would be started, somebody else runs it. ``early``:
 *                          what its VMM needs, written before it is started, whatever is there
 *
 * ``crc`` is CRC-32: in the header of all ``length`` bytes of the plan with that field zero, in a record of what stands
 * behind it. A record's ``length`` counts its head and body. The moment in the header is when the plan was written.
 *
 * Memory must not be lost because a plan was: header, records' heads and HOLD are the same in every version, and of a
 * plan that is broken or of another version every HOLD that is whole still counts, wherever it stands. Nothing else does.
 *
 * Whoever reads passes over a record of an unknown type, and over what stands in a body behind what it knows.
 */
#ifndef MEMCONSOLE_BOOTPLAN_H
#define MEMCONSOLE_BOOTPLAN_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "crc.h"

/*
 * Raised when a reader of the version before must not act on the plan: a record or field that cannot be passed over, or
 * means something else. Not for a type or a field at a body's end without which everything is done as before.
 */
#define PLAN_VERSION 1
#define PLAN_MAX (64u << 20)		/* bytes of a plan */
#define PLAN_RECORD_MAX (1u << 20)
#define PLAN_HOLD_MAX 8192		/* more than any HOLD takes */
#define PLAN_SESSION_MAX 63
#define PLAN_NAME_MAX 200
#define PLAN_PAYLOAD_MAX 4096
#define PLAN_FDS_MAX 1000

enum plan_type { PLAN_HOLD = 1, PLAN_VERIFY, PLAN_START, PLAN_SAY, PLAN_FILE };

struct plan_header {
	char magic[8];
	uint32_t version, crc, length, records;
	struct moment written;
};

struct plan_head {
	char magic[4];
	uint32_t crc, length;
	uint16_t type, zero;
};

_Static_assert(sizeof(struct plan_header) == 48 && sizeof(struct plan_head) == 16, "no padding");

struct plan_hold {
	uint64_t token;
	char *session, *name, *payload;
	uint16_t payload_len;
};

struct plan_verify {
	uint64_t size;
	uint8_t digest[16];
	char *name;
};

struct plan_fd {
	uint32_t number;
	char *name;
};

struct plan_start {
	uint32_t uid, gid;
	char *guest, *directory, *log;
	struct plan_fd *fds;
	char **words;		/* ends with NULL, as the next three do */
	char **variables, **directories, **unless;
	uint32_t *groups;
	uint16_t nr_fds, nr_words, nr_groups, nr_variables;
};

struct plan_line {
	char *line, *until;
};

struct plan_say {
	uint32_t within_ms;
	char *guest, *socket;
	struct plan_line *lines;
	uint16_t nr_lines;
};

struct plan_file {
	uint32_t uid, gid, length;
	uint16_t mode, early;
	char *guest, *path, *bytes;
};

struct plan {
	const char *fault;	/* static text: why only the HOLDs that are whole count; NULL: the plan is whole */
	struct moment written;
	struct plan_hold *holds;
	struct plan_verify *verifies;
	struct plan_start *starts;
	struct plan_say *says;
	struct plan_file *files;
	size_t nr_holds, nr_verifies, nr_starts, nr_says, nr_files;
	bool no_memory;
};

/* What is left of a record; ``bad`` once something was taken that is not there. */
struct plan_cursor {
	const uint8_t *at, *end;
	bool bad, no_memory;
};

static inline uint64_t plan_take(struct plan_cursor *c, size_t size)
{
	uint64_t value = 0;

	if (c->bad || (size_t)(c->end - c->at) < size) {
		c->bad = true;
		return 0;
	}
	memcpy(&value, c->at, size);
	c->at += size;
	return value;
}

/* The next bytes behind their u16 length, copied and NUL-terminated; of ``least`` to ``most`` bytes. */
static inline char *plan_bytes(struct plan_cursor *c, size_t least, size_t most, uint16_t *length)
{
	uint16_t n = (uint16_t)plan_take(c, 2);
	char *copy;

	if (c->bad || n < least || n > most || (size_t)(c->end - c->at) < n) {
		c->bad = true;
		return NULL;
	}
	copy = malloc((size_t)n + 1);
	if (!copy) {
		c->bad = c->no_memory = true;
		return NULL;
	}
	memcpy(copy, c->at, n);
	copy[n] = 0;
	c->at += n;
	*length = n;
	return copy;
}

static inline char *plan_text(struct plan_cursor *c, size_t least, size_t most)
{
	uint16_t length = 0;
	char *text = plan_bytes(c, least, most, &length);

	if (text && strlen(text) != length)
		c->bad = true;
	return text;
}

/* Room for ``n`` more things of a record, zeroed, or NULL; each takes at least two bytes of it. */
static inline void *plan_room(struct plan_cursor *c, size_t n, size_t size)
{
	void *room;

	if (c->bad || n > (size_t)(c->end - c->at) / 2) {
		c->bad = true;
		return NULL;
	}
	room = calloc(n + 1, size);
	if (!room)
		c->bad = c->no_memory = true;
	return room;
}

static inline void plan_free_hold(struct plan_hold *h)
{
	free(h->session);
	free(h->name);
	free(h->payload);
}

static inline void plan_free_texts(char **texts)
{
	for (size_t i = 0; texts && texts[i]; i++)
		free(texts[i]);
	free(texts);
}

static inline void plan_free_file(struct plan_file *f)
{
	free(f->guest);
	free(f->path);
	free(f->bytes);
}

static inline void plan_free_start(struct plan_start *s)
{
	for (uint16_t i = 0; s->fds && i < s->nr_fds; i++)
		free(s->fds[i].name);
	plan_free_texts(s->words);
	plan_free_texts(s->variables);
	plan_free_texts(s->directories);
	plan_free_texts(s->unless);
	free(s->groups);
	free(s->guest);
	free(s->directory);
	free(s->log);
	free(s->fds);
}

static inline void plan_free_say(struct plan_say *s)
{
	for (uint16_t i = 0; s->lines && i < s->nr_lines; i++) {
		free(s->lines[i].line);
		free(s->lines[i].until);
	}
	free(s->guest);
	free(s->socket);
	free(s->lines);
}

static inline void plan_free(struct plan *p)
{
	for (size_t i = 0; i < p->nr_holds; i++)
		plan_free_hold(&p->holds[i]);
	for (size_t i = 0; i < p->nr_verifies; i++)
		free(p->verifies[i].name);
	for (size_t i = 0; i < p->nr_starts; i++)
		plan_free_start(&p->starts[i]);
	for (size_t i = 0; i < p->nr_says; i++)
		plan_free_say(&p->says[i]);
	for (size_t i = 0; i < p->nr_files; i++)
		plan_free_file(&p->files[i]);
	free(p->files);
	free(p->holds);
	free(p->verifies);
	free(p->starts);
	free(p->says);
	*p = (struct plan){ 0 };
}

static inline void plan_read_hold(struct plan_cursor *c, struct plan_hold *h)
{
	h->token = plan_take(c, 8);
	h->session = plan_text(c, 1, PLAN_SESSION_MAX);
	h->name = plan_text(c, 1, PLAN_NAME_MAX);
	h->payload = plan_bytes(c, 0, PLAN_PAYLOAD_MAX, &h->payload_len);
}

static inline void plan_read_verify(struct plan_cursor *c, struct plan_verify *v)
{
	v->size = plan_take(c, 8);
	for (size_t i = 0; i < sizeof(v->digest); i++)
		v->digest[i] = (uint8_t)plan_take(c, 1);
	v->name = plan_text(c, 1, PLAN_NAME_MAX);
}

/* So many texts, and NULL behind them. */
static inline char **plan_texts(struct plan_cursor *c, uint16_t n, size_t least)
{
	char **texts = plan_room(c, n, sizeof(*texts));

	for (uint16_t i = 0; !c->bad && i < n; i++)
		texts[i] = plan_text(c, least, UINT16_MAX);
	return texts;
}

static inline void plan_read_start(struct plan_cursor *c, struct plan_start *s)
{
	uint16_t directories, unless;

	s->uid = (uint32_t)plan_take(c, 4);
	s->gid = (uint32_t)plan_take(c, 4);
	s->nr_fds = (uint16_t)plan_take(c, 2);
	s->nr_words = (uint16_t)plan_take(c, 2);
	s->guest = plan_text(c, 1, PLAN_NAME_MAX);
	s->directory = plan_text(c, 1, UINT16_MAX);
	s->log = plan_text(c, 1, UINT16_MAX);
	s->fds = plan_room(c, s->nr_fds, sizeof(*s->fds));
	for (uint16_t i = 0; !c->bad && i < s->nr_fds; i++) {
		s->fds[i].number = (uint32_t)plan_take(c, 4);
		s->fds[i].name = plan_text(c, 1, PLAN_NAME_MAX);
		c->bad |= s->fds[i].number < 3 || s->fds[i].number > 1023;
	}
	s->words = plan_texts(c, s->nr_words, 0);
	c->bad |= !s->nr_words || s->nr_fds > PLAN_FDS_MAX;
	if (c->bad || c->at == c->end)
		return;
	s->nr_groups = (uint16_t)plan_take(c, 2);
	s->nr_variables = (uint16_t)plan_take(c, 2);
	directories = (uint16_t)plan_take(c, 2);
	unless = (uint16_t)plan_take(c, 2);
	s->groups = plan_room(c, s->nr_groups, sizeof(*s->groups));
	for (uint16_t i = 0; !c->bad && i < s->nr_groups; i++)
		s->groups[i] = (uint32_t)plan_take(c, 4);
	s->variables = plan_texts(c, s->nr_variables, 1);
	s->directories = plan_texts(c, directories, 1);
	s->unless = plan_texts(c, unless, 1);
}

static inline void plan_read_say(struct plan_cursor *c, struct plan_say *s)
{
	s->within_ms = (uint32_t)plan_take(c, 4);
	s->nr_lines = (uint16_t)plan_take(c, 2);
	c->bad |= plan_take(c, 2) != 0;
	s->guest = plan_text(c, 1, PLAN_NAME_MAX);
	s->socket = plan_text(c, 1, UINT16_MAX);
	s->lines = plan_room(c, s->nr_lines, sizeof(*s->lines));
	for (uint16_t i = 0; !c->bad && i < s->nr_lines; i++) {
		s->lines[i].line = plan_text(c, 1, UINT16_MAX);
		s->lines[i].until = plan_text(c, 1, UINT16_MAX);
	}
}

static inline void plan_read_file(struct plan_cursor *c, struct plan_file *f)
{
	f->uid = (uint32_t)plan_take(c, 4);
	f->gid = (uint32_t)plan_take(c, 4);
	f->mode = (uint16_t)plan_take(c, 2);
	f->early = (uint16_t)plan_take(c, 2);
	f->length = (uint32_t)plan_take(c, 4);
	f->guest = plan_text(c, 1, PLAN_NAME_MAX);
	f->path = plan_text(c, 1, UINT16_MAX);
	if (c->bad || (size_t)(c->end - c->at) < f->length) {
		c->bad = true;
		return;
	}
	f->bytes = malloc((size_t)f->length + 1);
	if (!f->bytes) {
		c->bad = c->no_memory = true;
		return;
	}
	memcpy(f->bytes, c->at, f->length);
	f->bytes[f->length] = 0;
	c->at += f->length;
}

/* One more of ``*list``, zeroed, or NULL; lists grow where their length is a power of two. */
static inline void *plan_more(void **list, size_t n, size_t size)
{
	void *grown = *list;

	if (!(n & (n - 1))) {
		grown = realloc(*list, (n ? 2 * n : 1) * size);
		if (!grown)
			return NULL;
		*list = grown;
	}
	return memset((char *)grown + n * size, 0, size);
}

/*
 * Reads a record's body into the plan. Returns false, and leaves the plan as it was, if it is none; no_memory is set if
 * that is why.
 */
static inline bool plan_read_record(struct plan *p, uint16_t type, const uint8_t *body, size_t length)
{
	struct plan_cursor c = { .at = body, .end = body + length };
	struct plan_hold *h;
	struct plan_verify *v;
	struct plan_start *s;
	struct plan_say *y;
	struct plan_file *f;
	bool fine;

#define PLAN_READ(list, number, item, read, release)					\
	item = plan_more((void **)&p->list, p->number, sizeof(*item));			\
	if (!item) {									\
		p->no_memory = true;							\
		return false;								\
	}										\
	read(&c, item);									\
	fine = !c.bad;									\
	if (fine)									\
		p->number++;								\
	else										\
		release;								\
	break

	switch (type) {
	case PLAN_HOLD:
		PLAN_READ(holds, nr_holds, h, plan_read_hold, plan_free_hold(h));
	case PLAN_VERIFY:
		PLAN_READ(verifies, nr_verifies, v, plan_read_verify, free(v->name));
	case PLAN_START:
		PLAN_READ(starts, nr_starts, s, plan_read_start, plan_free_start(s));
	case PLAN_SAY:
		PLAN_READ(says, nr_says, y, plan_read_say, plan_free_say(y));
	case PLAN_FILE:
		PLAN_READ(files, nr_files, f, plan_read_file, plan_free_file(f));
	default:
		fine = true;	/* a newer version's, to be passed over */
	}
#undef PLAN_READ
	p->no_memory |= c.no_memory;
	return fine;
}

/* The body of the record at ``at``, its type and length, if one begins there and is whole; else NULL. */
static inline const uint8_t *plan_record(const uint8_t *at, size_t left, size_t most, struct plan_head *head)
{
	if (left < sizeof(*head))
		return NULL;
	memcpy(head, at, sizeof(*head));
	if (memcmp(head->magic, "MCRC", 4) || head->length < sizeof(*head) || head->length > left ||
	    head->length > most || head->zero || crc32_of(0, at + 8, head->length - 8) != head->crc)
		return NULL;
	return at + sizeof(*head);
}

/* What is wrong with a plan as a whole, or NULL; its records are read into ``p``. */
static inline const char *plan_read_whole(struct plan *p, const uint8_t *bytes, size_t size)
{
	struct plan_header header;
	struct plan_head head;
	uint32_t crc, zero = 0;
	size_t at = sizeof(header);

	if (size < sizeof(header))
		return "it is too short";
	memcpy(&header, bytes, sizeof(header));
	if (memcmp(header.magic, "MCBOOTPL", 8))
		return "it does not begin like one";
	if (header.version != PLAN_VERSION)
		return "it is of a version this memconsole does not know";
	if (header.length < sizeof(header) || header.length > size || header.length > PLAN_MAX)
		return "it is truncated";
	crc = crc32_of(0, bytes, offsetof(struct plan_header, crc));
	crc = crc32_of(crc, &zero, sizeof(zero));
	crc = crc32_of(crc, bytes + offsetof(struct plan_header, length),
		       header.length - offsetof(struct plan_header, length));
	if (crc != header.crc)
		return "its checksum does not match";
	p->written = header.written;
	for (uint32_t n = 0; n < header.records; n++) {
		const uint8_t *body = at <= header.length ? plan_record(bytes + at, header.length - at, PLAN_RECORD_MAX, &head) : NULL;

		if (!body || !plan_read_record(p, head.type, body, head.length - sizeof(head)))
			return p->no_memory ? "there is no memory to read it" : "it has a record that is not whole";
		at += ((size_t)head.length + 7) & ~(size_t)7;
	}
	return NULL;
}

/**
 * plan_read() - read a plan
 * @p: filled; to be freed with plan_free()
 * @bytes: the manifest, of which the plan is the start
 * @size: bytes of the manifest
 *
 * A plan that is not whole has a fault, and what HOLDs could be found in all of the manifest.
 */
static inline void plan_read(struct plan *p, const uint8_t *bytes, size_t size)
{
	struct plan_head head;
	const char *fault;

	*p = (struct plan){ 0 };
	fault = plan_read_whole(p, bytes, size);
	if (!fault)
		return;
	plan_free(p);
	p->fault = fault;
	for (size_t at = 0; at < size; at += 8) {
		const uint8_t *body = plan_record(bytes + at, size - at, PLAN_HOLD_MAX, &head);

		if (body && head.type == PLAN_HOLD)
			plan_read_record(p, head.type, body, head.length - sizeof(head));
	}
}

#endif
