// SPDX-License-Identifier: MIT
/*
 * A guest in a storm: it takes every grant it is offered, stamps it, forks, and never stops looking.
 *
 *   storm SOCKET BOARD NUMBER      BOARD: a file of struct row, of which row NUMBER is its own
 *
 * Once it has stamped a page it must never read anything else there, by any mapping or fd it ever had, it or its
 * children: a foreign stamp is another owner. What was taken from it must fault, or lead to a file that is empty.
 * Asked to unmap it obeys, keeps silent, or says that it did and keeps everything, as the dice fall.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define PAGE 4096
#define SLOTS 64
#define CHILDREN 3
#define MAGIC 0x53544f5200000000ULL

struct row {
	uint64_t grants, looks, foreign, faults, forks, seen;
};

struct slot {
	char *map;
	size_t length;
	int fd;
	char grant[AGENT_NAME];
};

static struct row *row;
static struct slot slots[SLOTS];
static uint64_t stamp, dice_state;
static sigjmp_buf back;
static uint32_t children;

static void on_signal(int sig)
{
	siglongjmp(back, sig);
}

static uint64_t dice(uint64_t sides)
{
	dice_state ^= dice_state << 13;
	dice_state ^= dice_state >> 7;
	dice_state ^= dice_state << 17;
	return dice_state % sides;
}

static void count(uint64_t *what)
{
	__atomic_add_fetch(what, 1, __ATOMIC_RELAXED);
}

static void judge(uint64_t word)
{
	count(&row->looks);
	if (word == stamp)
		return;
	__atomic_store_n(&row->seen, word, __ATOMIC_RELAXED);
	count(&row->foreign);
}

static void forget(struct slot *slot)
{
	if (slot->map)
		munmap(slot->map, slot->length);
	if (slot->fd >= 0)
		close(slot->fd);
	*slot = (struct slot){ .fd = -1 };
}

static void look_at(struct slot *slot)
{
	uint64_t word;

	if (sigsetjmp(back, 1)) {
		count(&row->faults);
		munmap(slot->map, slot->length);
		slot->map = NULL;
	} else if (slot->map) {
		judge(*(volatile uint64_t *)(slot->map + dice(slot->length / PAGE) * PAGE));
	}
	if (slot->fd >= 0 && pread(slot->fd, &word, sizeof(word), (off_t)(dice(slot->length / PAGE) * PAGE)) == sizeof(word))
		judge(word);
}

static void look(void)
{
	for (int i = 0; i < SLOTS; i++)
		if (slots[i].map || slots[i].fd >= 0)
			look_at(&slots[i]);
}

/* A child with everything its parent has, which looks for a while. */
static void fork_one(void)
{
	while (waitpid(-1, NULL, WNOHANG) > 0)
		children--;
	if (children == CHILDREN)
		return;
	children++;
	count(&row->forks);
	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (uint64_t left = 10 + dice(100); left--; usleep(10000))
		look();
	_exit(0);
}

static void answer(int sock, uint32_t id)
{
	struct agent_done done = { .head = { AGENT_MAGIC, AGENT_VERSION, AGENT_DONE, id, sizeof(done) } };

	send(sock, &done, sizeof(done), MSG_NOSIGNAL);
}

static void granted(int sock, const struct agent_grant *grant, int fd)
{
	struct slot *slot = &slots[dice(SLOTS)];

	forget(slot);
	*slot = (struct slot){ .length = grant->length, .fd = fd };
	memcpy(slot->grant, grant->grant, AGENT_NAME);
	slot->map = mmap(NULL, grant->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)grant->offset);
	if (slot->map == MAP_FAILED)
		abort();
	for (size_t at = 0; at < grant->length; at += PAGE)
		*(volatile uint64_t *)(slot->map + at) = stamp;
	count(&row->grants);
	answer(sock, grant->head.id);
}

static void asked(int sock, const struct agent_unmap *unmap)
{
	uint64_t manners = dice(3);

	for (int i = 0; i < SLOTS && !manners; i++)
		if (!strncmp(slots[i].grant, unmap->grant, AGENT_NAME))
			forget(&slots[i]);
	if (manners != 1)
		answer(sock, unmap->head.id);
}

/* Returns whether there is somebody at the other end. */
static bool serve(int sock)
{
	union {
		struct agent_head head;
		struct agent_grant grant;
		struct agent_unmap unmap;
		char bytes[AGENT_MAX];
	} message;
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &message, sizeof(message) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	int fd = -1;

	if (recvmsg(sock, &m, MSG_CMSG_CLOEXEC) <= 0)
		return false;
	c = CMSG_FIRSTHDR(&m);
	if (c && c->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	if (message.head.type == AGENT_GRANT)
		granted(sock, &message.grant, fd);
	else if (message.head.type == AGENT_UNMAP)
		asked(sock, &message.unmap);
	return true;
}

static int knock(const char *path)
{
	struct { struct agent_head head; uint32_t runs_as, count; } hello = {
		.head = { AGENT_MAGIC, AGENT_VERSION, AGENT_HELLO, 0, sizeof(hello) },
	};
	struct sockaddr_un to = { .sun_family = AF_UNIX };

	strncpy(to.sun_path, path, sizeof(to.sun_path) - 1);
	for (;;) {
		int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

		if (!connect(sock, (struct sockaddr *)&to, sizeof(to)) &&
		    send(sock, &hello, sizeof(hello), MSG_NOSIGNAL) == sizeof(hello))
			return sock;
		close(sock);
		usleep(50000);
	}
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_signal };
	FILE *board = argc == 4 ? fopen(argv[2], "r+") : NULL;
	uint64_t number = argc == 4 ? strtoull(argv[3], NULL, 10) : 0;
	struct row *rows;
	struct pollfd polled = { .events = POLLIN };

	if (!board)
		return 2;
	rows = mmap(NULL, (number + 1) * sizeof(*rows), PROT_READ | PROT_WRITE, MAP_SHARED, fileno(board), 0);
	if (rows == MAP_FAILED)
		return 1;
	row = &rows[number];
	stamp = MAGIC | number;
	dice_state = stamp * 0x9e3779b97f4a7c15ULL | 1;
	for (int i = 0; i < SLOTS; i++)
		slots[i].fd = -1;
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	polled.fd = knock(argv[1]);
	for (;;) {
		if (poll(&polled, 1, 40) > 0 && !serve(polled.fd)) {	/* it is no guest yet */
			close(polled.fd);
			usleep(50000);
			polled.fd = knock(argv[1]);
		}
		look();
		if (!dice(25))
			fork_one();
	}
}
