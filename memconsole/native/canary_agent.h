/*
 * The canary as an agent: its end of the agents socket (agent.h). It asks for nothing; it says what it has mapped, and
 * answers one message at a time.
 */
#ifndef MEMCONSOLE_CANARY_AGENT_H
#define MEMCONSOLE_CANARY_AGENT_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"
#include "canary_ram.h"
#include "canary_state.h"
#include "canary_uffd.h"
#include "clock.h"

#define MS		1000000ull
#define RETRY_NS	(150 * MS)	/* between attempts to reach the control process */

static uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static bool can_beat(const struct canary *c)
{
	return !c->paused && !c->why[0] && c->home >= 0 && c->ranges[c->home].mapped;
}

static void disconnect(struct canary *c)
{
	if (c->sock >= 0)
		close(c->sock);
	c->sock = -1;
	c->retry = now_ns() + RETRY_NS;
	handed_drop(c, NULL);
}

static void post_fd(struct canary *c, void *message, size_t size, uint16_t type, uint32_t id, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { message, size };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	struct agent_head *head = message;

	*head = (struct agent_head){ AGENT_MAGIC, AGENT_VERSION, type, id, (uint32_t)size };
	if (fd >= 0) {
		struct cmsghdr *cmsg;

		msg.msg_control = control;
		msg.msg_controllen = sizeof(control);
		cmsg = CMSG_FIRSTHDR(&msg);
		*cmsg = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET,
					  .cmsg_type = SCM_RIGHTS };
		memcpy(CMSG_DATA(cmsg), &fd, sizeof(int));
	}
	if (sendmsg(c->sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)size)
		disconnect(c);
}

static void post(struct canary *c, void *message, size_t size, uint16_t type, uint32_t id)
{
	post_fd(c, message, size, type, id, -1);
}

static void hello(struct canary *c)
{
	struct agent_hello m = { .runs_as = c->runs_as };

	for (int i = 0; i < AGENT_GRANTS; i++)
		if (c->ranges[i].mapped)
			memcpy(m.held[m.count++], c->ranges[i].grant, AGENT_NAME);
	for (int i = 0; i < WINDOWS && m.count < AGENT_GRANTS; i++)
		if (c->windows[i].at)
			memcpy(m.held[m.count++], c->windows[i].grant, AGENT_NAME);
	post(c, &m, offsetof(struct agent_hello, held) + (size_t)m.count * AGENT_NAME, AGENT_HELLO, 0);
}

static void reach(struct canary *c)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };

	c->retry = now_ns() + RETRY_NS;
	c->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (c->sock < 0)
		return;
	memcpy(to.sun_path, c->path, strlen(c->path) + 1);
	if (connect(c->sock, (struct sockaddr *)&to, sizeof(to)) < 0)
		disconnect(c);
	else
		hello(c);
}

static void report(struct canary *c, uint32_t id)
{
	struct agent_reported m = { .runs_as = c->runs_as };

	m.state = c->why[0] ? AGENT_FAILED : can_beat(c) ? AGENT_RUNNING : AGENT_PAUSED;
	for (int i = 0; i < AGENT_GRANTS; i++) {
		const struct range *r = &c->ranges[i];
		const struct header *h = &r->last;

		if (!r->used || r->access != AGENT_RW)
			continue;
		m.beats += h->beats;
		m.checked += h->checked;
		m.wrong += h->wrong;
		m.gaps += h->gaps;
		if (h->gap_ns > m.gap_ns)
			m.gap_ns = h->gap_ns;
	}
	m.restored = c->restored;
	if (c->slept.boottime_ns && c->woke.boottime_ns) {
		struct moment now = moment_now();

		m.blackout_ns = moment_between(&c->slept, &c->woke, &c->begun, &now);
	}
	memcpy(m.text, c->why, sizeof(m.text));
	post(c, &m, sizeof(m), AGENT_REPORTED, id);
}

static void sweep(struct canary *c, uint32_t id)
{
	struct agent_swept m = { .ns = now_ns() };

	for (int i = 0; i < AGENT_GRANTS; i++)
		if (c->ranges[i].mapped && c->ranges[i].access == AGENT_RW)
			m.wrong += range_sweep(&c->ranges[i], &m.pages);
	m.ns = now_ns() - m.ns;
	c->last_beat = 0;
	post(c, &m, sizeof(m), AGENT_SWEPT, id);
}

/* Answer with 0, or with an errno and why, which is the errno's text where ``why`` is empty. */
static void answer(struct canary *c, uint32_t id, int err, const char *why)
{
	struct agent_done m = { .status = err };

	if (err)
		snprintf(m.text, sizeof(m.text), "%s", *why ? why : strerror(err));
	post(c, &m, sizeof(m), AGENT_DONE, id);
}

/* Take a grant into the machine, answer, and begin to touch it. */
static void take_range(struct canary *c, const struct agent_grant *m, void *at)
{
	int err = range_take(c, m, at);
	struct range *r = err ? NULL : range_find(c, m->grant);

	answer(c, m->head.id, err, "");
	if (r)
		range_touch(r);
}

/* Hand the uffd of a mapping over, where one is wanted and can be had. Returns whether TAKEN is to come. */
static bool hand_over(struct canary *c, const struct agent_grant *m, void *at)
{
	struct agent_handed with = { .address = (uintptr_t)at };
	struct handed *h = handed_free(c);
	int uffd = h ? uffd_register(at, m->length, m->wants, &with.modes) : -1;

	if (uffd < 0)
		return false;
	*h = (struct handed){ *m, at };
	post_fd(c, &with, sizeof(with), AGENT_HANDED, m->head.id, uffd);
	close(uffd);
	return true;
}

static void serve_grant(struct canary *c, const struct agent_grant *m, int fd)
{
	char why[AGENT_TEXT] = "";
	void *at;
	int err;

	if (m->grant[AGENT_NAME - 1] || fd < 0)
		return answer(c, m->head.id, EBADMSG, "");
	if (range_find(c, m->grant) || window_find(c, m->grant))
		return answer(c, m->head.id, 0, "");
	if (m->access == AGENT_WINDOW) {
		err = window_map(c, m, fd, why, sizeof(why));
		return answer(c, m->head.id, err, why);
	}
	handed_drop(c, m->grant);
	err = range_claim(m, fd, &at);
	if (err)
		return answer(c, m->head.id, err, "");
	if (!hand_over(c, m, at))
		take_range(c, m, at);
}

static void serve_taken(struct canary *c, uint32_t id)
{
	struct handed *h = handed_find(c, id);
	void *at = h ? h->at : NULL;

	if (!at)
		return answer(c, id, ECANCELED, "");
	h->at = NULL;
	take_range(c, &h->grant, at);
}

static int serve_unmap(struct canary *c, const struct agent_unmap *m)
{
	struct range *r;
	struct window *w;

	if (m->grant[AGENT_NAME - 1])
		return 0;
	handed_drop(c, m->grant);
	r = range_find(c, m->grant);
	w = window_find(c, m->grant);
	return r ? range_unmap(c, r) : w ? window_unmap(w) : 0;
}

static void serve_save(struct canary *c, uint32_t id, int fd)
{
	char why[AGENT_TEXT] = "";
	int err;

	if (fd < 0) {
		answer(c, id, EBADMSG, "");
		return;
	}
	c->paused = true;
	c->last_beat = 0;
	/* what cannot go on here cannot go on elsewhere */
	err = c->why[0] ? EIO : state_save(c, fd, why, sizeof(why));
	answer(c, id, err, c->why[0] ? c->why : why);
}

union message {
	struct agent_head head;
	struct agent_grant grant;
	struct agent_unmap unmap;
	char bytes[AGENT_MAX];
};

/* The least a message of a type has; what a newer control process adds stands behind it. */
static size_t size_of(uint16_t type)
{
	switch (type) {
	case AGENT_GRANT:
		return sizeof(struct agent_grant);
	case AGENT_UNMAP:
		return sizeof(struct agent_unmap);
	default:
		return type < AGENT_GRANT ? SIZE_MAX : sizeof(struct agent_head);	/* the lower ones are an agent's own */
	}
}

/* Serve one message, if there is one. Returns whether there was. */
static bool serve(struct canary *c)
{
	union message m;
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &m, sizeof(m) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *cmsg;
	ssize_t got;
	int fd = -1;

	got = recvmsg(c->sock, &msg, MSG_CMSG_CLOEXEC);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	cmsg = got > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
	if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(cmsg), sizeof(fd));
	if (got < (ssize_t)sizeof(m.head) || m.head.magic != AGENT_MAGIC || m.head.version != AGENT_VERSION ||
	    m.head.length != (uint32_t)got || (size_t)got < size_of(m.head.type)) {
		if (fd >= 0)
			close(fd);
		disconnect(c);
		return false;
	}
	switch (m.head.type) {
	case AGENT_GRANT:
		serve_grant(c, &m.grant, fd);
		break;
	case AGENT_UNMAP:
		answer(c, m.head.id, serve_unmap(c, &m.unmap), "");
		break;
	case AGENT_TAKEN:
		serve_taken(c, m.head.id);
		break;
	case AGENT_REPORT:
		report(c, m.head.id);
		break;
	case AGENT_SWEEP:
		sweep(c, m.head.id);
		break;
	case AGENT_SAVE:
		serve_save(c, m.head.id, fd);
		break;
	case AGENT_PAUSE:
	case AGENT_RESUME:
	case AGENT_STOP:
		c->paused = m.head.type == AGENT_PAUSE || (c->paused && m.head.type != AGENT_RESUME);
		c->stop = m.head.type == AGENT_STOP;
		c->last_beat = 0;
		answer(c, m.head.id, 0, "");
		break;
	default:
		answer(c, m.head.id, EOPNOTSUPP, "this canary does not know that");
	}
	if (fd >= 0)
		close(fd);
	return c->sock >= 0;
}

#endif
