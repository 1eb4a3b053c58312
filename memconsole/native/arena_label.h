/*
 * What an ext4 superblock says of an arena. 1024 bytes, little-endian:
 *
 *     0x38 u16 magic | 0x3a u16 state | 0x60 u32 incompatible features | 0x78 label, 16 bytes: "mc:NAME"
 *
 * NAME is 1 to 13 letters, digits, dots, dashes and underscores, and begins with a letter or digit: it becomes a directory.
 */
#ifndef MEMCONSOLE_ARENA_LABEL_H
#define MEMCONSOLE_ARENA_LABEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SUPER_MAGIC 0xEF53
#define STATE_ERRORS 2
#define NEEDS_RECOVERY 4
#define ARENA_NAME_MAX 13

static inline uint16_t super_le16(const uint8_t *at)
{
	return (uint16_t)(at[0] | at[1] << 8);
}

/**
 * arena_label() - whether a superblock of 1024 bytes is that of an arena
 * @name: its name, with room for ARENA_NAME_MAX letters and a zero
 * @why: static text: why it may not be mounted, or NULL
 * @replays: whether its journal will be replayed
 */
static inline bool arena_label(const uint8_t *super, char *name, const char **why, bool *replays)
{
	size_t length;

	if (super_le16(super + 0x38) != SUPER_MAGIC || memcmp(super + 0x78, "mc:", 3))
		return false;
	memcpy(name, super + 0x7b, ARENA_NAME_MAX);
	name[ARENA_NAME_MAX] = 0;
	length = strlen(name);
	if (!length || strchr("._-", name[0]) || strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") != length)
		return false;
	*why = super_le16(super + 0x3a) & STATE_ERRORS ? "its file system has noted errors: e2fsck, then memconsole arena scan" : NULL;
	*replays = super[0x60] & NEEDS_RECOVERY;
	return true;
}

#endif
