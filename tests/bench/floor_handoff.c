// SPDX-License-Identifier: MIT
/*
 * The floor of a handoff: one process that carries a canary's VM over a kexec, and does nothing that need not be done.
 *
 *   floor_handoff jump BYTES KERNEL INITRD COMMAND_LINE   a VM runs; its RAM is preserved meanwhile, then its state; kexec
 *   floor_handoff resume FILE                             in the next kernel: it goes on; "NS" is appended to FILE
 *
 * VM, state and clock are the canary's own code: both blackouts go from the end of the last beat before the jump to the
 * end of the first one after it.
 */
#define _GNU_SOURCE
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <stdlib.h>

#include "canary_state.h"
#include "liveupdate.h"

#define LUO_CREATE_SESSION 0xBA00
#define LUO_PRESERVE_FD 0xBA40
#define SESSION "floor"
#define GRANT "ram"
#define QUANTUM 64
#define LONG_NS 500000000ull	/* tells how fast the counter goes */

enum token { RAM = 1, STATE };

static struct canary c = { .home = -1, .quantum = QUANTUM, .runs_as = AGENT_AS_KVM, .vm = { .kvm = -1 } };

static void die(const char *what, int err)
{
	fprintf(stderr, "floor_handoff: %s: %s %s\n", what, strerror(err < 0 ? -err : err), c.why);
	exit(1);
}

static int made(const char *what, long result)
{
	if (result < 0)
		die(what, errno);
	return (int)result;
}

static void beat(void)
{
	struct range *r = &c.ranges[c.home];

	r->header->quantum = QUANTUM;
	*(volatile uint64_t *)&r->header->next = r->gpa;
	while (vm_beat(&c.vm, c.why, sizeof(c.why)) == -EINTR)
		;
	if (c.why[0])
		die("beat", EIO);
	r->last = *r->header;
	c.stood = moment_now();
}

static void beat_for(uint64_t ns)
{
	for (uint64_t end = clock_ns(CLOCK_MONOTONIC) + ns; clock_ns(CLOCK_MONOTONIC) < end;)
		beat();
}

/* A VM whose RAM is full, and has been walked by its guest more than once. Returns its memfd. */
static int born(uint64_t bytes)
{
	struct agent_grant grant = { .grant = GRANT, .length = bytes, .access = AGENT_RW };
	int ram = made("memfd_create", memfd_create("floor", MFD_CLOEXEC)), err;

	made("ftruncate", ftruncate(ram, (off_t)bytes));
	err = vm_open(&c.vm, AGENT_GRANTS);
	if (err)
		die("/dev/kvm", err);
	err = range_map(&c, &grant, ram);
	if (err)
		die("map", err);
	made("populate", madvise(c.ranges[c.home].header, bytes, MADV_POPULATE_WRITE));
	range_touch(&c.ranges[c.home]);
	err = vm_start(&c.vm, 0);
	if (err)
		die("start", err);
	c.started = true;
	while (c.ranges[c.home].header->checked < bytes / PAGE)
		beat();
	return ram;
}

static void preserve(int session, int fd, enum token token)
{
	struct luo_fd argument = { .size = sizeof(argument), .fd = fd, .token = token };

	made("PRESERVE_FD", ioctl(session, LUO_PRESERVE_FD, &argument));
}

static int jump(uint64_t bytes, const char *kernel, const char *initrd, const char *line)
{
	struct luo_named argument = { .size = sizeof(argument), .fd = -1, .name = SESSION };
	int device = made(LUO_DEVICE, open(LUO_DEVICE, O_RDWR | O_CLOEXEC));
	int state = made("memfd_create", memfd_create("state", MFD_CLOEXEC));
	int ram = born(bytes), err;

	made("CREATE_SESSION", ioctl(device, LUO_CREATE_SESSION, &argument));
	close(device);
	preserve(argument.fd, ram, RAM);
	made("kexec_file_load", syscall(SYS_kexec_file_load, made(kernel, open(kernel, O_RDONLY)),
					made(initrd, open(initrd, O_RDONLY)), strlen(line) + 1, line, 0ul));
	sync();
	beat();
	err = state_save(&c, state, c.why, sizeof(c.why));
	if (err)
		die("save", err);
	preserve(argument.fd, state, STATE);
	reboot(RB_KEXEC);
	die("kexec", errno);
	return 1;
}

static int resume(const char *path)
{
	struct given given = { .grant = GRANT };
	struct moment woke, now;
	int device, session, state, err;
	FILE *out;

	c.begun = moment_now();
	device = made(LUO_DEVICE, open(LUO_DEVICE, O_RDWR | O_CLOEXEC));
	session = luo_session(device, SESSION);
	if (session < 0)
		die("session", session);
	given.fd = luo_file(session, RAM);
	state = luo_file(session, STATE);
	if (given.fd < 0 || state < 0)
		die("retrieve", given.fd < 0 ? given.fd : state);
	err = state_restore(&c, state, &given, 1, c.why, sizeof(c.why));
	if (err)
		die("restore", err);
	beat();
	woke = c.stood;
	luo_finish(session);
	beat_for(LONG_NS);
	now = moment_now();
	if (c.ranges[c.home].header->wrong)
		die("its memory is wrong", EIO);
	out = fopen(path, "a");
	if (!out)
		die(path, errno);
	fprintf(out, "%llu\n", (unsigned long long)moment_between(&c.slept, &woke, &c.begun, &now));
	return fclose(out) ? 1 : 0;
}

int main(int argc, char **argv)
{
	if (argc == 6 && strcmp(argv[1], "jump") == 0)
		return jump(strtoull(argv[2], NULL, 10), argv[3], argv[4], argv[5]);
	if (argc == 3 && strcmp(argv[1], "resume") == 0)
		return resume(argv[2]);
	fprintf(stderr, "usage: floor_handoff jump BYTES KERNEL INITRD COMMAND_LINE | resume FILE\n");
	return 2;
}
