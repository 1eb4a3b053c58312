/*
 * Where memory is mapped: at an address at which the kernel can map it by huge pages.
 *
 * A page table entry for 2 MiB leads to 2 MiB of a file that begin at a multiple of 2 MiB: so the address and the
 * offset in the file have to be the same beyond it. Left alone the kernel sees to that for some files and settings only.
 */
#ifndef MEMCONSOLE_MAPPING_H
#define MEMCONSOLE_MAPPING_H

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/types.h>

#define HUGE_PAGE	(2ull << 20)

/**
 * map_for_huge_pages() - map a part of a file, shared
 * @length: bytes, in whole pages
 * @prot: PROT_*
 * @fd: the file
 * @offset: where in it the part begins, in whole pages
 *
 * Returns the address, or MAP_FAILED and errno.
 */
static void *map_for_huge_pages(size_t length, int prot, int fd, off_t offset)
{
	char *room, *at, *end;

	if (length < HUGE_PAGE)
		return mmap(NULL, length, prot, MAP_SHARED, fd, offset);
	room = mmap(NULL, length + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED)
		return MAP_FAILED;
	at = room + (((uint64_t)offset - (uintptr_t)room) & (HUGE_PAGE - 1));
	end = room + length + HUGE_PAGE;
	if (mmap(at, length, prot, MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED) {
		munmap(room, length + HUGE_PAGE);
		return MAP_FAILED;
	}
	if (at > room)
		munmap(room, (size_t)(at - room));
	if (at + length < end)
		munmap(at + length, (size_t)(end - (at + length)));
	return at;
}

#endif
