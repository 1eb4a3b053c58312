/* CRC-32 as zlib has it. */
#ifndef MEMCONSOLE_CRC_H
#define MEMCONSOLE_CRC_H

#include <stddef.h>
#include <stdint.h>

/* Goes on from the CRC of what came before, 0 at first. */
static inline uint32_t crc32_of(uint32_t crc, const void *bytes, size_t length)
{
	static const uint32_t nibbles[16] = {
		0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
		0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
	};
	const uint8_t *at = bytes;

	crc = ~crc;
	for (; length; length--, at++) {
		crc = (crc >> 4) ^ nibbles[(crc ^ *at) & 15];
		crc = (crc >> 4) ^ nibbles[(crc ^ (*at >> 4)) & 15];
	}
	return ~crc;
}

#endif
