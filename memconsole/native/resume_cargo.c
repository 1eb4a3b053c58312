/*
 * What an arena carries for a handoff besides its regions, where no live update does:
 *
 *   /.handoff.TOKEN    what was to be carried, by its token: copied into memory, and taken away at the end
 *   /.handoff.1        the manifest; it counts once trusted.memconsole.handoff says "MACHINE BOOT", of who wrote it
 *
 * Guests run as soon as they are started, and the manifest with their state lies there still. So the boot in which they
 * were is added to that attribute before any of them is: in another boot it means nothing any more, for their memory went
 * on without it. In the boot that wrote it it means nothing either: the control process there takes it back.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "faultpoint.h"
#include "resume.h"
#include "resume_arena.h"

#define MARK "trusted.memconsole.handoff"
#define CARGO ".handoff."
#define CARGO_MAX (1u << 30)		/* bytes of one thing that is copied */

static struct arena *carrier;	/* the arena that has the manifest, */
static int mark_file = -1;	/* and the manifest there */

/* "MACHINE BOOT" of this boot; either may be empty. */
static void here(char *text, size_t size)
{
	char machine[64], boot[64];

	read_line("/etc/machine-id", machine, sizeof(machine));
	read_line("/proc/sys/kernel/random/boot_id", boot, sizeof(boot));
	snprintf(text, size, "%s %s", machine, boot);
}

/* Whether a manifest is of this host and waits to be taken up; what speaks against it is said. */
static bool waits(const struct arena *a, int fd)
{
	char text[160], now[160], machine[64], writer[64], lander[64] = "", mine[64], boot[64];
	ssize_t got = fgetxattr(fd, MARK, text, sizeof(text) - 1);

	if (got <= 0)
		return false;	/* it was never finished, or taken back */
	text[got] = 0;
	here(now, sizeof(now));
	machine[0] = mine[0] = 0;
	sscanf(now, "%63[^ ] %63s", mine, boot);
	if (sscanf(text, "%63[^ ] %63s %63s", machine, writer, lander) < 2 || strcmp(machine, mine)) {
		fprintf(stderr, "memconsole-resume: arena %s: another host (machine id %s) has left a handoff there: it is left alone\n",
			a->name, machine);
		return false;
	}
	if (!strcmp(writer, boot))
		return false;	/* not there yet: its control process jumps, or takes it back */
	if (lander[0] && strcmp(lander, boot)) {
		fprintf(stderr, "memconsole-resume: arena %s: its handoff was taken up by a kernel that has ended: guests ran on, and their saved state is of before: it is not used\n",
			a->name);
		return false;
	}
	return true;
}

int arena_manifest(void)
{
	uint64_t deadline = clock_ns(CLOCK_MONOTONIC) + DRIVER_NS;

	while (!arenas_look(r.runtime) && ranges_wanted() && clock_ns(CLOCK_MONOTONIC) < deadline)
		wait_ns(10 * AGAIN_NS);
	for (size_t i = 0; !carrier && i < nr_arenas; i++) {
		struct arena *a = &arenas[i];
		int fd;

		if (a->why)
			fprintf(stderr, "memconsole-resume: arena %s on %s is left alone: %s\n", a->name, a->device, a->why);
		fd = a->root < 0 ? -1 : openat(a->root, CARGO "1", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
		if (fd >= 0 && waits(a, fd)) {
			carrier = a;
			mark_file = fd;
		} else if (fd >= 0) {
			close(fd);
		}
	}
	return carrier ? 0 : -ENOENT;
}

/* A memfd with what a file holds; -errno. */
static int copied(int from, const char *name)
{
	struct stat st;
	off_t at = 0;
	int to;

	if (fstat(from, &st) || !S_ISREG(st.st_mode) || st.st_size <= 0 || st.st_size > CARGO_MAX)
		return -EINVAL;
	to = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (to < 0)
		return -errno;
	fchmod(to, 0600);
	if (posix_fallocate(to, 0, st.st_size)) {
		close(to);
		return -ENOMEM;
	}
	while (at < st.st_size) {
		char part[65536];
		ssize_t got = pread(from, part, sizeof(part), at);

		if (got <= 0 || pwrite(to, part, (size_t)got, at) != got) {
			close(to);
			return -EIO;
		}
		at += got;
	}
	return to;
}

/* Whether two files hold the same. */
static bool same_bytes(int a, int b)
{
	char one[65536], other[65536];
	struct stat x, y;

	if (fstat(a, &x) || fstat(b, &y) || x.st_size != y.st_size)
		return false;
	for (off_t at = 0; at < x.st_size;) {
		ssize_t got = pread(a, one, sizeof(one), at);

		if (got <= 0 || pread(b, other, (size_t)got, at) != got || memcmp(one, other, (size_t)got))
			return false;
		at += got;
	}
	return true;
}

int arena_cargo(const struct arena *a, uint64_t token, const char *name, const void *payload, size_t length)
{
	char file[64];
	int from, fd, there;

	snprintf(file, sizeof(file), CARGO "%llu", (unsigned long long)token);
	from = openat(a->root, file, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (from < 0)
		return -errno;
	there = r.keeper < 0 ? -1 : kept(name);
	if (there >= 0 && same_bytes(from, there)) {
		close(from);
		return there;
	}
	if (there >= 0)
		close(there);
	snprintf(file, sizeof(file), "memconsole-%.40s", name);
	fd = copied(from, file);
	close(from);
	point("hold", name, "retrieved");
	if (fd >= 0)
		keep(name, fd, payload, length);
	point("hold", name, "kept");
	return fd;
}

int arena_plan(void)
{
	return arena_cargo(carrier, MANIFEST_TOKEN, MANIFEST, NULL, 0);
}

void arena_begun(void)
{
	char text[160], now[160];
	ssize_t got;

	if (!carrier)
		return;
	got = fgetxattr(mark_file, MARK, text, 100);
	here(now, sizeof(now));
	if (got <= 0)
		return;
	text[got] = 0;
	if (strchr(strchr(text, ' ') ? strchr(text, ' ') + 1 : text, ' '))
		return;		/* an earlier start of this program came so far */
	snprintf(text + got, sizeof(text) - (size_t)got, "%s", strchr(now, ' '));
	if (fsetxattr(mark_file, MARK, text, strlen(text), XATTR_REPLACE) || fsync(mark_file))
		finding("arena-unmarked", carrier->name, "the arena does not take down that guests were started: %s", strerror(errno));
	point("arena", carrier->name, "begun");
}

/* Take away what was carried; the manifest last, for until then all of it can be done again. */
static void unlink_cargo(const struct arena *a)
{
	int fd = openat(a->root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *files = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;

	while (files && (entry = readdir(files)))
		if (!strncmp(entry->d_name, CARGO, strlen(CARGO)) && strcmp(entry->d_name, CARGO "1"))
			unlinkat(a->root, entry->d_name, 0);
	if (files)
		closedir(files);
	else if (fd >= 0)
		close(fd);
	fsync(a->root);
	point("arena", a->name, "emptied");
	unlinkat(a->root, CARGO "1", 0);
	fsync(a->root);
}

void arena_forget(bool bytes)
{
	if (!carrier || carrier->root < 0)
		return;
	if (bytes) {
		unlink_cargo(carrier);
	} else {
		fremovexattr(mark_file, MARK);
		fsync(mark_file);
	}
	close(mark_file);
	mark_file = -1;
	carrier = NULL;
}
