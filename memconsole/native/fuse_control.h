// SPDX-License-Identifier: MIT
/*
 * What the control process asks of memconsole-fuse, on a SOCK_SEQPACKET socket: a message a request, a message a reply,
 * integers little-endian, descriptors by SCM_RIGHTS:
 *
 *	greeting = reply			sent on connect with op 0 and a status; any code but OK ends the connection
 *	request  = version:u8 op:u8 kind:u8 flags:u8 path_len:u16 payload_len:u16 mode:u32 uid:u32 gid:u32 zero:u32
 *		   path payload
 *	reply    = version:u8 op:u8 code:u8 more:u8 payload_len:u16 errno:u16 payload
 *	path     = name ("/" name)*		from the mount's root; a name has 1 to 255 bytes and is not "." or ".."
 *	status   = pid:u32 passthrough:u32 entries:u32 handles:u32 requests:u64 ram_bytes:u64 connection:u32 minor:u32
 *		   mountpoint			passthrough: 0, or the errno that tells why there is none
 *	entry    = id:u64 size:u64 mode:u32 uid:u32 gid:u32 open:u32 path_len:u16 kind:u8 revoked:u8 zero:u32 path
 *	revoked  = open:u32 cut:u32
 *	part     = offset:u64 length:u64 gpa:u64	bytes of a memfd; gpa all ones if there is none
 *
 *	op	request					fds	reply payload
 *	1 PUT	kind path mode uid gid, by kind:
 *		 1 DIR					0
 *		 2 LINK	payload: target			0
 *		 3 RAM					1	the memfd, passed through
 *		 4 TEXT					1	a memfd of the text, which nobody changes any more
 *		 5 MAP	payload: part*			parts	memfds, a part each
 *	2 REVOKE path				0	revoked
 *	3 REMOVE path, flags 1: with its entries	0	revoked, of all together
 *	4 LIST	payload: id:u64, the last one seen	0	entry*, by id; ``more`` if there are others
 *	5 STAT						0	status
 *	6 QUIT	flags 1: even if in use			0	unmounts and ends; refused with BUSY while files are open
 *
 * PUT on what is there changes owner and mode, and at once what a LINK, TEXT or MAP shows; a RAM file is for one memfd
 * and its life. REVOKE and REMOVE: nobody opens it any more. ``cut`` says whether the kernel has given up the inode of
 * files opened before: reading and writing them gives EIO. It does so when a lookup shows another generation, so one is
 * made, by a child that holds nothing of ours. The kernel does not look at the inode when such a file is mapped or
 * spliced: ``open`` says how many there still are (open file descriptions: duplicates, forks and descriptors in flight
 * are one). What is mapped stays mapped. Truncating the memfd ends all of it.
 *
 * Every request is answered, a bad one with the code of what is wrong with it, and leaves everything as it was.
 */
#ifndef MC_FUSE_CONTROL_H
#define MC_FUSE_CONTROL_H

#include "fuse.h"

/*
 * Raised when a peer of the version before would do or take for done something else: the server outlives the control
 * process that started it, so old and new meet. Not for a new operation or kind, which an old server refuses by its code,
 * nor for fields behind a NUL after a status's mountpoint, or at the end of what was revoked.
 */
#define VERSION 1
#define PAYLOAD_MAX 4096

enum op { OP_GREETING, OP_PUT, OP_REVOKE, OP_REMOVE, OP_LIST, OP_STAT, OP_QUIT };

enum code {
	OK,
	BAD_MESSAGE,		/* lengths do not add up, or a field that must be zero is not */
	BAD_VERSION,		/* of a version this server does not speak */
	BAD_OP,			/* no such operation, or no such kind of entry */
	BAD_PATH,		/* not a path, or its directory is none */
	BAD_FDS,		/* not as many descriptors as the operation takes, or of the wrong kind */
	TOO_LONG,		/* longer than any request may be */
	NOT_FOUND,		/* there is nothing at this path, or nothing it could be put into */
	TAKEN,			/* there is something else at this path */
	NOT_EMPTY,		/* the directory has entries */
	FULL,			/* no room for another entry */
	NO_PASSTHROUGH,		/* the kernel shows no RAM here; errno tells why */
	KERNEL,			/* a system call failed; errno tells how */
	BUSY,			/* files on the mount are open or mapped */
	DENIED,			/* the peer is neither root nor this server's own user */
	CROWDED,		/* too many connections */
};

struct request {
	uint8_t version, op, kind, flags;
	uint16_t path_len, payload_len;
	uint32_t mode, uid, gid, zero;
};

struct answer {
	uint8_t version, op, code, more;
	uint16_t payload_len, error;
};

struct status {
	uint32_t pid, passthrough, entries, handles;
	uint64_t requests, ram_bytes;
	uint32_t connection, minor;
};

struct entry {
	uint64_t id, size;
	uint32_t mode, uid, gid, open;
	uint16_t path_len;
	uint8_t kind, revoked;
	uint32_t zero;
};

struct revoked {
	uint32_t open, cut;
};

struct message {
	struct request head;
	char body[PATH_LEN_MAX + 1 + PAYLOAD_MAX];	/* path, payload */
};

/* A message and the descriptors that came with it; those that are taken become -1, the others are closed. */
struct asked {
	const struct request *head;
	const char *path, *payload;
	int *fds;
	uint32_t nr_fds;
	int error;		/* for the reply */
};

/* fuse_checks.c */
enum code control_check(const struct message *message, size_t len, struct asked *asked);

/* fuse_entries.c */
enum code entry_put(struct asked *asked);
enum code entry_revoke(struct asked *asked, struct revoked *revoked);
enum code entry_remove(struct asked *asked, struct revoked *revoked);
#endif
