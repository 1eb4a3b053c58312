// SPDX-License-Identifier: MIT
/*
 * A table of extents that leaves the process: sealed in a memfd, and opened by whoever gets it. The bytes are the same
 * in memory, on the wire and in snapshot files:
 *
 *   table   := header offset[rows] pfn[rows] count[rows] flags[rows]        little-endian, no padding
 *   header  := magic "MCEXTENT", u32 version = 1, u32 page_size, u64 rows, u64 first, u64 end, u64 pages,
 *              u8 checksum[16]                                              64 bytes
 *   offset  := u64 page number, ascending; rows do not overlap and lie in first..end
 *   pfn     := u64 frame number of the first page; of a swapped page: swap type + slot * 32
 *   count   := u32 pages, at least 1
 *   flags   := u32, PRESENT or SWAP and the rest; absent pages have no row
 *   checksum:= xxh3-128 (canonical) of the header before it and of all columns
 *
 * Sealing forbids any further change by others than its maker; a receiver, who cannot know its maker, takes a copy.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"
#include "xxh.h"

/*
 * Raised with every change of the header, the columns, what the checksum covers or what a flag means: a table is taken
 * whole or not at all, so a reader refuses every other version, and there is nothing in it that it could pass over.
 */
#define TABLE_VERSION 1
#define HEADER 64
#define ROW 24
#define CHUNK (1u << 20)
/* Not F_SEAL_WRITE: proving that nobody writes costs a drain of every CPU; here nobody ever had it mapped. */
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE)

struct header {
	char magic[8];
	uint32_t version, page_size;
	uint64_t rows, first, end, pages;
	uint8_t checksum[16];
};

_Static_assert(sizeof(struct header) == HEADER, "the header is 64 bytes");

static const char magic[8] = "MCEXTENT";

static void checksum(const struct mc_table *t, const struct header *header, uint8_t *out)
{
	struct mc_bytes parts[] = {
		{ header, offsetof(struct header, checksum) }, { t->offset, t->rows * 8 }, { t->pfn, t->rows * 8 },
		{ t->count, t->rows * 4 }, { t->flags, t->rows * 4 },
	};

	mc_hash(parts, 5, out);
}

/* Maps the sealed memfd of so many rows for reading; the columns are in it from now on. */
static int map_sealed(struct mc_table *t, uint64_t rows, struct mc_fail *fail)
{
	uint64_t bytes = HEADER + rows * ROW;
	void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, t->fd, 0);

	if (map == MAP_FAILED)
		return mc_fail_errno(fail, "mmap");
	t->map = map;
	t->mapped = bytes;
	t->rows = rows;
	t->offset = (uint64_t *)(t->map + HEADER);
	t->pfn = t->offset + rows;
	t->count = (uint32_t *)(t->pfn + rows);
	t->flags = t->count + rows;
	return MC_OK;
}

static int write_all(int fd, const void *bytes, uint64_t length, struct mc_fail *fail)
{
	const uint8_t *at = bytes;

	while (length) {
		ssize_t n = write(fd, at, length);

		if (n < 0)
			return mc_fail_errno(fail, "write");
		at += n;
		length -= (uint64_t)n;
	}
	return MC_OK;
}

static int make_memfd(struct mc_table *t, struct mc_fail *fail)
{
	t->fd = memfd_create("memconsole-extents", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	return t->fd < 0 ? mc_fail_errno(fail, "memfd_create") : MC_OK;
}

static int seal_memfd(struct mc_table *t, struct mc_fail *fail)
{
	return fcntl(t->fd, F_ADD_SEALS, SEALS | F_SEAL_SEAL) ? mc_fail_errno(fail, "F_ADD_SEALS") : MC_OK;
}

static struct mc_table *new_opened(struct mc_fail *fail)
{
	struct mc_table *t = calloc(1, sizeof(*t));

	if (t)
		t->fd = -1;
	else
		mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	return t;
}

static int seal_into(struct mc_table *t, const struct mc_table *from, struct mc_fail *fail)
{
	struct header header = {
		.version = TABLE_VERSION, .page_size = from->page_size, .rows = from->rows,
		.first = from->first, .end = from->end, .pages = from->pages,
	};
	int code;

	t->page_size = from->page_size;
	t->first = from->first;
	t->end = from->end;
	t->pages = from->pages;
	memcpy(header.magic, magic, sizeof(magic));
	checksum(from, &header, header.checksum);
	if ((code = make_memfd(t, fail)) || (code = write_all(t->fd, &header, HEADER, fail)) ||
	    (code = write_all(t->fd, from->offset, from->rows * 8, fail)) ||
	    (code = write_all(t->fd, from->pfn, from->rows * 8, fail)) ||
	    (code = write_all(t->fd, from->count, from->rows * 4, fail)) ||
	    (code = write_all(t->fd, from->flags, from->rows * 4, fail)) || (code = seal_memfd(t, fail)))
		return code;
	return map_sealed(t, from->rows, fail);
}

/*
 * A copy of a table in a memfd of exactly its bytes, which nobody can change any more.
 * Errors: MC_KERNEL (memfd_create, e.g. EMFILE, write, F_ADD_SEALS, mmap), MC_MEMORY.
 */
int mc_table_seal(struct mc_table **out, const struct mc_table *table, struct mc_fail *fail)
{
	struct mc_table *t = new_opened(fail);
	int code = t ? seal_into(t, table, fail) : MC_MEMORY;

	if (code)
		mc_table_free(t);
	else
		*out = t;
	return code;
}

/* Whether the mapped bytes are a table, every claim of the header checked against them. */
static int validate(struct mc_table *t, struct mc_fail *fail)
{
	const struct header *header = (const void *)t->map;
	uint8_t sum[16];
	uint64_t end, held = 0;

	t->page_size = header->page_size;
	t->first = header->first;
	t->end = header->end;
	t->pages = header->pages;
	if (t->page_size < 512 || t->page_size & (t->page_size - 1))
		return mc_fail(fail, MC_FORMAT, 0, "the page size is not a power of two");
	if (t->first > t->end || t->end > MC_MAX_PAGE || t->pages > t->end - t->first)
		return mc_fail(fail, MC_FORMAT, 0, "it covers more pages than it spans");
	checksum(t, header, sum);
	if (memcmp(sum, header->checksum, sizeof(sum)))
		return mc_fail(fail, MC_FORMAT, 0, "its checksum does not match");
	end = t->first;
	for (uint64_t i = 0; i < t->rows; i++) {
		const char *fault = mc_row_fault(t, end, t->offset[i], t->pfn[i], t->count[i], t->flags[i]);

		if (fault)
			return mc_fail(fail, MC_FORMAT, 0, fault);
		end = t->offset[i] + t->count[i];
		held += t->count[i];
	}
	if (held > t->pages)
		return mc_fail(fail, MC_FORMAT, 0, "its rows hold more pages than it covers");
	return MC_OK;
}

/* The number of rows a header of a file of `size` bytes promises, if the two agree. */
static int header_rows(const struct header *header, uint64_t size, uint64_t *rows, struct mc_fail *fail)
{
	if (size < HEADER || memcmp(header->magic, magic, sizeof(magic)))
		return mc_fail(fail, MC_FORMAT, 0, "it does not begin like a table of extents");
	if (header->version != TABLE_VERSION)
		return mc_fail(fail, MC_FORMAT, 0, "it is of a version this memconsole does not know");
	if (header->rows > MC_MAX_ROWS || size != HEADER + header->rows * ROW)
		return mc_fail(fail, MC_FORMAT, 0, "it is truncated, or longer than its header says");
	*rows = header->rows;
	return MC_OK;
}

static int adopt(struct mc_table *t, uint64_t rows, struct mc_fail *fail)
{
	int code = map_sealed(t, rows, fail);

	return code ? code : validate(t, fail);
}

static int load_into(struct mc_table *t, const uint8_t *bytes, uint64_t length, struct mc_fail *fail)
{
	struct header header = { 0 };
	uint64_t rows;
	int code;

	memcpy(&header, bytes, length < HEADER ? length : HEADER);
	if ((code = header_rows(&header, length, &rows, fail)) || (code = make_memfd(t, fail)) ||
	    (code = write_all(t->fd, bytes, length, fail)) || (code = seal_memfd(t, fail)))
		return code;
	return adopt(t, rows, fail);
}

/*
 * A table from the bytes of one, copied into a memfd of its own.
 * Errors: MC_FORMAT (foreign, truncated, corrupt), MC_KERNEL, MC_MEMORY.
 */
int mc_table_load(struct mc_table **out, const void *bytes, uint64_t length, struct mc_fail *fail)
{
	struct mc_table *t = new_opened(fail);
	int code = t ? load_into(t, bytes, length, fail) : MC_MEMORY;

	if (code)
		mc_table_free(t);
	else
		*out = t;
	return code;
}

/* The bytes of a file as they are now, whatever becomes of it meanwhile, in a memfd that is this table's alone. */
static int copy_file(struct mc_table *t, int fd, uint64_t size, struct mc_fail *fail)
{
	uint8_t *chunk = malloc(CHUNK);
	uint64_t done = 0;
	int code = chunk ? make_memfd(t, fail) : mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");

	while (!code && done < size) {
		ssize_t n = pread(fd, chunk, size - done < CHUNK ? size - done : CHUNK, (off_t)done);

		if (n > 0)
			code = write_all(t->fd, chunk, (uint64_t)n, fail);
		else
			code = n ? mc_fail_errno(fail, "pread") : mc_fail(fail, MC_FORMAT, 0, "it shrank while read");
		done += n > 0 ? (uint64_t)n : 0;
	}
	free(chunk);
	return code ? code : seal_memfd(t, fail);
}

/* Reads the header of what an fd holds, and the number of rows that it promises. */
static int read_header(int fd, uint64_t *size, uint64_t *rows, struct mc_fail *fail)
{
	struct header header;
	struct stat st;
	ssize_t n;

	if (fstat(fd, &st))
		return mc_fail_errno(fail, "fstat");
	n = pread(fd, &header, HEADER, 0);
	if (n < 0)
		return mc_fail_errno(fail, "pread");
	*size = n < HEADER ? 0 : (uint64_t)st.st_size;
	return header_rows(&header, *size, rows, fail);
}

static int open_into(struct mc_table *t, int fd, struct mc_fail *fail)
{
	uint64_t size, rows;
	int code;

	if ((code = read_header(fd, &size, &rows, fail)) || (code = copy_file(t, fd, size, fail)) ||
	    (code = read_header(t->fd, &size, &rows, fail)))
		return code;
	return adopt(t, rows, fail);
}

/*
 * A table from an fd that holds one, always from a copy of its own: seals do not say that nobody can write. Under
 * F_SEAL_FUTURE_WRITE a mapping made before it still does, and what was checked would change. The fd stays the caller's.
 * Errors: MC_FORMAT (foreign, truncated, corrupt), MC_KERNEL, MC_MEMORY.
 */
int mc_table_open(struct mc_table **out, int fd, struct mc_fail *fail)
{
	struct mc_table *t = new_opened(fail);
	int code = t ? open_into(t, fd, fail) : MC_MEMORY;

	if (code)
		mc_table_free(t);
	else
		*out = t;
	return code;
}

static int share_into(struct mc_table *t, const struct mc_table *sealed, struct mc_fail *fail)
{
	t->page_size = sealed->page_size;
	t->first = sealed->first;
	t->end = sealed->end;
	t->pages = sealed->pages;
	t->fd = fcntl(sealed->fd, F_DUPFD_CLOEXEC, 3);
	return t->fd < 0 ? mc_fail_errno(fail, "F_DUPFD_CLOEXEC") : map_sealed(t, sealed->rows, fail);
}

/*
 * The same table once more, of one that is sealed, in the same memfd: it was made or checked here, and stays.
 * Errors: MC_KERNEL, MC_MEMORY.
 */
int mc_table_share(struct mc_table **out, const struct mc_table *sealed, struct mc_fail *fail)
{
	struct mc_table *t = new_opened(fail);
	int code = t ? share_into(t, sealed, fail) : MC_MEMORY;

	if (code)
		mc_table_free(t);
	else
		*out = t;
	return code;
}
