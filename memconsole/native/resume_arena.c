/*
 * Arenas as memconsole-resume comes by them: ranges set aside at boot with an ext4 (dax) on each, labelled "mc:NAME".
 * What survives a kexec by itself lies there: /REGION is a region, the plan's token its inode. The other files that a
 * plan names are resume_cargo.c's.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "arena_label.h"
#include "core.h"
#include "faultpoint.h"
#include "resume.h"
#include "resume_arena.h"

#ifndef ARENA_SYS		/* tests have a tree of their own in their place */
#define ARENA_SYS "/sys"
#define ARENA_DEV "/dev"
#endif
#define OPTIONS "dax=always"
#define SUPER_AT 1024
#define EXTENTS 512

struct arena arenas[ARENAS_MAX];
size_t nr_arenas;

void read_line(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? 0 : read(fd, text, size - 1);

	text[got > 0 ? got : 0] = 0;
	text[strcspn(text, "\n")] = 0;
	if (fd >= 0)
		close(fd);
}

/* Where a device is mounted, from the kernel's list; whether it is. Names with blanks are none of ours. */
static bool mounted_at(dev_t device, char *path, size_t size)
{
	FILE *list = fopen("/proc/self/mountinfo", "re");
	char line[4096], root[256], at[256];
	unsigned int major, minor;
	bool found = false;

	while (list && !found && fgets(line, sizeof(line), list))
		if (sscanf(line, "%*d %*d %u:%u %255s %255s", &major, &minor, root, at) == 4 &&
		    makedev(major, minor) == device && !strcmp(root, "/"))
			found = (size_t)snprintf(path, size, "%s", at) < size;
	if (list)
		fclose(list);
	return found;
}

static void mount_arena(struct arena *a, const char *runtime, dev_t device)
{
	char source[256], path[sizeof(a->path)];

	if (mounted_at(device, a->path, sizeof(a->path)))
		return;
	snprintf(source, sizeof(source), ARENA_DEV "/%s", a->device);
	snprintf(path, sizeof(path), "%.120s/arenas", runtime);
	if (mkdir(path, 0700) < 0 && errno != EEXIST)
		a->why = "there is no directory to mount it at";
	snprintf(path, sizeof(path), "%.120s/arenas/%.13s", runtime, a->name);
	if (!a->why && mkdir(path, 0700) < 0 && errno != EEXIST)
		a->why = "there is no directory to mount it at";
	if (a->why)
		return;
	memcpy(a->path, path, sizeof(path));
	if (mount(source, path, "ext4", MS_NOATIME | MS_NODEV | MS_NOSUID | MS_NOEXEC, OPTIONS) == 0)
		a->mine = true;
	else if (errno == EINVAL || errno == EUCLEAN || errno == EIO)
		a->why = "its file system or its journal is damaged (e2fsck -f -n says how)";
	else
		a->why = "it cannot be mounted (dmesg says why)";
}

/* Say that a journal was replayed, and leave a mark for the control process, which finds the arena mounted. */
static void note_replayed(const struct arena *a, const char *runtime)
{
	char path[256];
	int fd;

	fprintf(stderr, "memconsole-resume: arena %s: its journal was replayed: it was not still when the kernel before ended\n",
		a->name);
	snprintf(path, sizeof(path), "%.120s/arenas/.replayed-%.13s", runtime, a->name);
	fd = open(path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd >= 0)
		close(fd);
}

static void add_arena(const char *device, const char *runtime)
{
	uint8_t super[1024] = { 0 };
	char path[256];
	bool replays = false;
	struct stat st;
	struct arena *a = &arenas[nr_arenas];
	int fd;

	*a = (struct arena){ .root = -1 };
	snprintf(path, sizeof(path), ARENA_DEV "/%.20s", device);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return;
	if (fstat(fd, &st) || pread(fd, super, sizeof(super), SUPER_AT) != sizeof(super) ||
	    !arena_label(super, a->name, &a->why, &replays)) {
		close(fd);
		return;
	}
	close(fd);
	snprintf(a->device, sizeof(a->device), "%.20s", device);
	nr_arenas++;
	if (!a->why)
		mount_arena(a, runtime, st.st_rdev);
	if (a->why)
		return;
	if (a->mine && replays)
		note_replayed(a, runtime);
	a->root = open(a->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (a->root >= 0 && flock(a->root, LOCK_EX | LOCK_NB) < 0) {
		close(a->root);
		a->root = -1;
		a->why = "another control process uses it";
	} else if (a->root < 0) {
		a->why = "it cannot be opened";
	}
	point("arena", a->name, "found");
}

bool arenas_look(const char *runtime)
{
	DIR *devices = opendir(ARENA_SYS "/class/block");
	struct dirent *entry;
	bool any = false;

	while (devices && nr_arenas < ARENAS_MAX && (entry = readdir(devices))) {
		bool known = strncmp(entry->d_name, "pmem", 4) != 0;

		any |= !known;
		for (size_t i = 0; i < nr_arenas; i++)
			known |= !strcmp(arenas[i].device, entry->d_name);
		if (!known)
			add_arena(entry->d_name, runtime);
	}
	if (devices)
		closedir(devices);
	return any;
}

bool ranges_wanted(void)
{
	char line[8192];
	char *at = line;

	read_line("/proc/cmdline", line, sizeof(line));
	while ((at = strstr(at, "memmap="))) {
		size_t word = strcspn(at, " ");

		if (memchr(at, '!', word))
			return true;
		at += word;
	}
	return false;
}

static struct arena *arena_named(const char *name)
{
	uint64_t deadline = clock_ns(CLOCK_MONOTONIC) + DRIVER_NS;

	for (;;) {
		arenas_look(r.runtime);
		for (size_t i = 0; i < nr_arenas; i++)
			if (!strcmp(arenas[i].name, name))
				return &arenas[i];
		if (clock_ns(CLOCK_MONOTONIC) >= deadline)
			return NULL;
		wait_ns(AGAIN_NS);
	}
}

static void let_go(struct arena *a)
{
	if (a->root >= 0)
		close(a->root);
	a->root = -1;
}

void arenas_close(void)
{
	for (size_t i = 0; i < nr_arenas; i++)
		let_go(&arenas[i]);
}

/* --- regions --------------------------------------------------------------------------------------------- */

bool in_arena(const struct plan_hold *h)
{
	return !strncmp(h->session, ARENA_SESSION, strlen(ARENA_SESSION));
}

/* The file of a region, called region:NAME:0; -errno, and -ESTALE for another file of this name. */
static int region_file(const struct arena *a, const struct plan_hold *h)
{
	char name[PLAN_NAME_MAX + 1];
	struct stat st;
	char *end;
	int fd;

	snprintf(name, sizeof(name), "%s", h->name + strlen("region:"));
	end = strrchr(name, ':');
	if (!end || strcmp(end, ":0") || strchr(name, '/') || name[0] == '.')
		return -EINVAL;
	*end = 0;
	fd = openat(a->root, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0)
		return -errno;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_ino != h->token) {
		close(fd);
		return -ESTALE;
	}
	return fd;
}

void get_from_arena(const struct plan_hold *h, struct held *held)
{
	const char *name = h->session + strlen(ARENA_SESSION);
	struct arena *a;

	held->fd = r.keeper >= 0 && r.recorded ? kept(h->name) : -1;
	if (r.recorded)
		return;
	a = arena_named(name);
	if (!a || a->root < 0) {
		held->fd = r.keeper < 0 ? -1 : kept(h->name);
		if (held->fd < 0)
			finding("lost", h->name, "arena %s %s", name,
				a ? a->why : "is not there: boot with the memmap= of the kernel before; nothing was written to its range");
		return;
	}
	if (strncmp(h->name, "region:", 7)) {
		held->fd = arena_cargo(a, h->token, h->name, h->payload, h->payload_len);
	} else {
		held->fd = region_file(a, h);
		if (held->fd >= 0)
			keep(h->name, held->fd, h->payload, h->payload_len);
		point("hold", h->name, "kept");
	}
	if (held->fd < 0) {
		finding("lost", h->name, "arena %s does not have it: %s", name, strerror(-held->fd));
		held->fd = -1;
	}
}

/* The physical address of a file's device, or UINT64_MAX. */
static uint64_t device_start(int fd)
{
	char path[256], text[32];
	struct stat st;

	if (fstat(fd, &st))
		return UINT64_MAX;
	snprintf(path, sizeof(path), ARENA_SYS "/dev/block/%u:%u/device/resource", major(st.st_dev), minor(st.st_dev));
	read_line(path, text, sizeof(text));
	return text[0] ? strtoull(text, NULL, 0) : UINT64_MAX;
}

int arena_scan(struct mc_table *table, int fd, uint64_t size, struct mc_fail *fail)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = device_start(fd);
	struct fiemap *map = calloc(1, sizeof(*map) + EXTENTS * sizeof(map->fm_extents[0]));
	uint64_t at = 0;
	int code = map ? MC_OK : mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");

	if (!code && start == UINT64_MAX)
		code = mc_fail(fail, MC_KERNEL, ENOENT, "the place of the arena is not shown");
	if (!code)
		code = mc_table_cover(table, 0, size / page, fail);
	while (!code && at < size) {
		const struct fiemap_extent *e = NULL;

		*map = (struct fiemap){ .fm_start = at, .fm_length = size - at, .fm_extent_count = EXTENTS };
		if (ioctl(fd, FS_IOC_FIEMAP, map) < 0) {
			code = mc_fail_errno(fail, "FIEMAP");
			break;
		}
		for (uint32_t i = 0; !code && i < map->fm_mapped_extents && i < EXTENTS; i++) {
			uint64_t length;

			e = &map->fm_extents[i];
			if (e->fe_logical >= size)
				break;
			length = e->fe_length < size - e->fe_logical ? e->fe_length : size - e->fe_logical;
			if (e->fe_flags & (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC | FIEMAP_EXTENT_DATA_INLINE))
				code = mc_fail(fail, MC_KERNEL, EIO, "a part of it has no place in the arena");
			for (uint64_t done = 0; !code && done < length;) {
				uint64_t part = length - done < 1ull << 40 ? length - done : 1ull << 40;

				code = mc_table_push(table, (e->fe_logical + done) / page, (start + e->fe_physical + done) / page,
						     (uint32_t)(part / page), MC_PRESENT | MC_FILE, fail);
				done += part;
			}
		}
		if (!e || e->fe_flags & FIEMAP_EXTENT_LAST)
			break;
		at = e->fe_logical + e->fe_length;
	}
	free(map);
	return code;
}
