/*
 * The keeper's protocol on its SOCK_SEQPACKET socket: a message a request and a message a reply, integers little-endian:
 *
 *	greeting = reply			sent on connect with op 0; any code but OK ends the connection
 *	request  = version:u8 op:u8 name_len:u8 flags:u8 payload_len:u16 zero:u16 name payload
 *	reply    = version:u8 op:u8 code:u8 more:u8 payload_len:u16 zero:u16 payload
 *	status   = pid:u32 held:u32 room:u32 clients:u32 bytes:u64 bytes_room:u64 guards:u32 zero:u32
 *	guards   = 1 exempt from the OOM killer | 2 locked in memory | 4 room for all ENTRIES_MAX descriptors
 *
 *	op	request			fds	reply payload	fds
 *	1 PUT	name payload		1			0	replaces what the name held, at once
 *	2 GET	name			0	payload		1
 *	3 DROP	name			0			0
 *	4 LIST	name or nothing		0	(len:u8 name)*	0	names after this one in byte order; ``more`` if cut
 *	5 STAT				0	status		0	also the payload of an OK greeting
 *	6 QUIT	flags 1: even if held	0			0	refused with HOLDING unless empty or flags 1
 *	7 JUMP	nothing			0	errno:u32	0	boots the loaded kernel; answered only if that fails
 *	8 LAND	name session		0	errno:u32	0	retrieves a session the kernel before handed over and holds it,
 *								unless the name holds something; the payload is its name
 *
 * Every request is answered (but a JUMP that is made), a bad one with the code of what is wrong with it, and leaves everything as it was.
 * Descriptors that come with a refused request are closed. A client that does not read its replies is cut off.
 * Only root and the user the keeper runs as may talk to it (SO_PEERCRED); others get DENIED.
 */
#ifndef MEMCONSOLE_KEEPER_H
#define MEMCONSOLE_KEEPER_H

#include <stdint.h>

/*
 * Raised when a peer of the version before would do or take for done something else: the keeper outlives the control
 * process that started it, so old and new meet. Not for a new operation or flag, which an old keeper refuses by its code
 * (BAD_OP, BAD_MESSAGE), nor for fields at the end of a status, which an old client passes over.
 */
#define KEEPER_VERSION 1
#define KEEPER_NAME_LEN_MAX 255
#define KEEPER_PAYLOAD_MAX 4096

enum op { OP_GREETING, OP_PUT, OP_GET, OP_DROP, OP_LIST, OP_STAT, OP_QUIT, OP_JUMP, OP_LAND };

enum code {
	OK,
	BAD_MESSAGE,		/* lengths do not add up, or a field that must be zero is not */
	BAD_VERSION,		/* of a version this keeper does not speak */
	BAD_OP,			/* no such operation */
	BAD_NAME,		/* empty, or with a NUL in it */
	BAD_FDS,		/* not as many descriptors as the operation takes */
	TOO_LONG,		/* longer than any request may be */
	NOT_FOUND,		/* nothing is held under this name */
	FULL,			/* no room for another descriptor */
	FULL_BYTES,		/* no room for another name and payload */
	NO_MEMORY,		/* the kernel gave no memory */
	HOLDING,		/* told to quit while holding descriptors */
	DENIED,			/* the peer is neither root nor the keeper's own user */
	BUSY,			/* too many connections */
	NOT_JUMPED,		/* the kernel refused to boot the loaded one; the payload is its errno */
	NOT_LANDED,		/* the kernel did not give the session; the payload is its errno */
};

enum guard { GUARD_OOM = 1, GUARD_LOCKED = 2, GUARD_ROOM = 4 };

struct request {
	uint8_t version, op, name_len, flags;
	uint16_t payload_len, zero;
};

struct reply {
	uint8_t version, op, code, more;
	uint16_t payload_len, zero;
};

struct status {
	uint32_t pid, held, room, clients;
	uint64_t bytes, bytes_room;
	uint32_t guards, zero;
};

struct message {
	struct request head;
	char body[KEEPER_NAME_LEN_MAX + KEEPER_PAYLOAD_MAX];
};

_Static_assert(sizeof(struct request) == 8 && sizeof(struct reply) == 8 && sizeof(struct status) == 40, "no padding");

#endif
