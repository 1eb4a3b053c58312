/*
 * memconsole-guard: ends the guests of an embedded control process that ended without doing so.
 *
 * Their memory goes with that process, and nobody would know of them: a killed console must not leave VMs behind.
 *
 * usage: memconsole-guard [DIRECTORY]	stdin: a SOCK_SEQPACKET socket; DIRECTORY: the process's own, removed with it
 *
 * A packet with a pidfd names one process more; a packet without one is the end in good order. Once the other end is
 * closed without that, every process that was named is sent SIGKILL and DIRECTORY is removed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PROCESSES_MAX 4096

enum said { NAMED, ORDERLY, GONE };

static int processes[PROCESSES_MAX];
static int named;

/* What the other end says next; a pidfd that came is in processes[]. */
static enum said hear(void)
{
	char byte;
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec data = { .iov_base = &byte, .iov_len = sizeof(byte) };
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof(control.room),
	};
	struct cmsghdr *header;
	ssize_t got;

	do
		got = recvmsg(STDIN_FILENO, &message, MSG_CMSG_CLOEXEC);
	while (got < 0 && errno == EINTR);
	if (got <= 0)
		return GONE;
	header = CMSG_FIRSTHDR(&message);
	if (!header || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
		return ORDERLY;
	memcpy(&processes[named++], CMSG_DATA(header), sizeof(int));
	return NAMED;
}

/* Those that ended make room for others: a signal that cannot be sent is to one of them. */
static void forget_ended(void)
{
	int kept = 0;

	for (int i = 0; i < named; i++) {
		if (syscall(SYS_pidfd_send_signal, processes[i], 0, NULL, 0) == 0)
			processes[kept++] = processes[i];
		else
			close(processes[i]);
	}
	named = kept;
}

int main(int argc, char **argv)
{
	enum said said;

	if (argc > 2)
		return 2;
	/* What ends the console, a closed terminal or ^C, is no reason to end before it. */
	signal(SIGHUP, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGTERM, SIG_IGN);
	while ((said = hear()) == NAMED) {
		forget_ended();
		if (named == PROCESSES_MAX)
			return 1;
	}
	if (said == ORDERLY)
		return 0;
	for (int i = 0; i < named; i++)
		syscall(SYS_pidfd_send_signal, processes[i], SIGKILL, NULL, 0);
	if (argc == 2)
		execlp("rm", "rm", "-rf", "--", argv[1], (char *)NULL);
	return argc == 2;
}
