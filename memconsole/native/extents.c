// SPDX-License-Identifier: MIT
/*
 * A table of extents in a memfd. The bytes are the same in memory, on the wire and in snapshot files:
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
 * While a table is filled each column is a private mapping that grows by mremap, so that nothing is copied; sealing
 * writes header and columns into a memfd and forbids any further change, so that a receiver may map it without fear.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

#include "core.h"

#define HEADER 64
#define ROW 24
#define FIRST_CAPACITY 4096
#define LARGE_CAPACITY (1 << 19)	/* from here on huge pages are worth their zeroing */
#define MAX_PAGE (1ULL << 62)
#define MAX_ROWS (1ULL << 56)
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
	XXH3_state_t *state = XXH3_createState();
	XXH128_canonical_t canonical;

	if (!state)
		abort(); /* xxhash asks for 576 bytes */
	XXH3_128bits_reset(state);
	XXH3_128bits_update(state, header, offsetof(struct header, checksum));
	XXH3_128bits_update(state, t->offset, t->rows * 8);
	XXH3_128bits_update(state, t->pfn, t->rows * 8);
	XXH3_128bits_update(state, t->count, t->rows * 4);
	XXH3_128bits_update(state, t->flags, t->rows * 4);
	XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state));
	XXH3_freeState(state);
	memcpy(out, canonical.digest, sizeof(canonical.digest));
}

/*
 * An empty table that covers nothing, to be filled, sealed and freed.
 * Errors: MC_MEMORY, MC_RANGE (page_size not a power of two).
 */
int mc_table_new(struct mc_table **out, uint32_t page_size, struct mc_fail *fail)
{
	struct mc_table *t;

	if (page_size < 512 || page_size & (page_size - 1))
		return mc_fail(fail, MC_RANGE, 0, "a page size is a power of two");
	t = calloc(1, sizeof(*t));
	if (!t)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	t->page_size = page_size;
	t->fd = -1;
	*out = t;
	return MC_OK;
}

static void *grow_column(void *column, uint64_t old, uint64_t bytes)
{
	return old ? mremap(column, old, bytes, MREMAP_MAYMOVE)
		   : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/*
 * Makes room for at least `rows` rows in all, doubling what there is.
 * Errors: MC_MEMORY, MC_KERNEL (mmap); the table is as it was.
 */
int mc_table_reserve(struct mc_table *t, uint64_t rows, struct mc_fail *fail)
{
	uint64_t old = t->capacity, capacity = old ? old : FIRST_CAPACITY;
	struct { void *at; uint64_t width; } columns[] = {
		{ t->offset, 8 }, { t->pfn, 8 }, { t->count, 4 }, { t->flags, 4 },
	};

	if (rows <= old)
		return MC_OK;
	if (rows > MAX_ROWS)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "more rows than memory");
	while (capacity < rows)
		capacity *= 2;
	for (int i = 0; i < 4; i++) {
		void *at = grow_column(columns[i].at, old * columns[i].width, capacity * columns[i].width);

		if (at == MAP_FAILED) {
			int code = mc_fail_errno(fail, "mmap");

			while (i--)	/* those that grew become what the others still are; shrinking cannot fail */
				if (old)
					mremap(columns[i].at, capacity * columns[i].width, old * columns[i].width, 0);
				else
					munmap(columns[i].at, capacity * columns[i].width);
			return code;
		}
		if (capacity >= LARGE_CAPACITY)
			madvise(at, capacity * columns[i].width, MADV_HUGEPAGE);
		columns[i].at = at;
	}
	t->offset = columns[0].at;
	t->pfn = columns[1].at;
	t->count = columns[2].at;
	t->flags = columns[3].at;
	t->capacity = capacity;
	return MC_OK;
}

/* Moves all rows of a scratch table behind those of t; the scratch is empty afterwards. Errors: as reserve. */
int mc_table_take(struct mc_table *t, struct mc_table *from, struct mc_fail *fail)
{
	uint64_t n = from->rows ? from->rows - 1 : 0;
	int code = MC_OK;

	if (from->rows)	/* the first may continue our last, the others cannot */
		code = mc_table_push(t, from->offset[0], from->pfn[0], from->count[0], from->flags[0], fail);
	if (!code)
		code = mc_table_reserve(t, t->rows + n, fail);
	if (code)
		return code;
	if (n) {
		memcpy(t->offset + t->rows, from->offset + 1, n * 8);
		memcpy(t->pfn + t->rows, from->pfn + 1, n * 8);
		memcpy(t->count + t->rows, from->count + 1, n * 4);
		memcpy(t->flags + t->rows, from->flags + 1, n * 4);
	}
	t->rows += n;
	from->rows = 0;
	return MC_OK;
}

/* Widens what the table covers by pages first..first+pages. Errors: MC_RANGE beyond 2^62 pages. */
int mc_table_cover(struct mc_table *t, uint64_t first, uint64_t pages, struct mc_fail *fail)
{
	if (first > MAX_PAGE || pages > MAX_PAGE - first)
		return mc_fail(fail, MC_RANGE, 0, "beyond 2^62 pages");
	if (!pages)
		return MC_OK;
	if (!t->pages || first < t->first)
		t->first = first;
	if (first + pages > t->end)
		t->end = first + pages;
	t->pages += pages;
	if (t->pages > t->end - t->first)
		return mc_fail(fail, MC_RANGE, 0, "covered twice");
	return MC_OK;
}

/* Why a row cannot stand behind one that ends at `end`, or NULL. */
static const char *row_fault(const struct mc_table *t, uint64_t end, uint64_t offset, uint64_t pfn, uint32_t count,
			     uint32_t flags)
{
	uint32_t kind = flags & (MC_PRESENT | MC_SWAP);

	if (kind != MC_PRESENT && kind != MC_SWAP)
		return "a row is neither present nor swapped, or both";
	if (flags >= MC_HUGE * 2)
		return "a row has a flag nobody knows";
	if (!count)
		return "a row has no pages";
	if (offset < end)
		return "rows overlap or are out of order";
	if (offset < t->first || offset >= t->end || count > t->end - offset)
		return "a row lies outside what the table covers";
	if (pfn >= 1ULL << 55)
		return "a frame number is beyond 55 bits";
	return NULL;
}

/*
 * Appends rows given as columns; a row that continues its neighbour is merged with it.
 * Errors: MC_RANGE (unsorted, overlapping, outside what is covered, bad flags), MC_MEMORY, MC_KERNEL.
 */
int mc_table_append(struct mc_table *t, uint64_t rows, const uint64_t *offset, const uint64_t *pfn,
		    const uint32_t *count, const uint32_t *flags, struct mc_fail *fail)
{
	uint64_t end = t->rows ? t->offset[t->rows - 1] + t->count[t->rows - 1] : t->first;

	for (uint64_t i = 0; i < rows; i++) {
		const char *fault = row_fault(t, end, offset[i], pfn[i], count[i], flags[i]);
		int code;

		if (fault)
			return mc_fail(fail, MC_RANGE, 0, fault);
		code = mc_table_push(t, offset[i], pfn[i], count[i], flags[i], fail);
		if (code)
			return code;
		end = offset[i] + count[i];
	}
	return MC_OK;
}

/*
 * Sorts by key: least significant digit first, so that equal keys keep their order.
 * Errors: MC_MEMORY (it needs as much memory again).
 */
int mc_sort(struct mc_ref *refs, uint64_t n, struct mc_fail *fail)
{
	enum { BITS = 11, DIGITS = 1 << BITS };
	struct mc_ref *from = refs, *to;
	uint64_t starts[DIGITS], all = 0;

	to = malloc((n ? n : 1) * sizeof(*to));
	if (!to)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	for (uint64_t i = 0; i < n; i++)
		all |= refs[i].key;
	for (int shift = 0; shift < 64 && all >> shift; shift += BITS) {
		uint64_t sum = 0;
		struct mc_ref *swap = from;

		memset(starts, 0, sizeof(starts));
		for (uint64_t i = 0; i < n; i++)
			starts[from[i].key >> shift & (DIGITS - 1)]++;
		for (int d = 0; d < DIGITS; d++) {
			uint64_t size = starts[d];

			starts[d] = sum;
			sum += size;
		}
		for (uint64_t i = 0; i < n; i++)
			to[starts[from[i].key >> shift & (DIGITS - 1)]++] = from[i];
		from = to;
		to = swap;
	}
	if (from != refs) {
		memcpy(refs, from, n * sizeof(*refs));
		to = from;
	}
	free(to);
	return MC_OK;
}

static int concat_sorted(struct mc_table *t, struct mc_table **parts, const struct mc_ref *refs, uint64_t rows,
			 struct mc_fail *fail)
{
	for (uint64_t i = 0; i < rows; i++) {
		const struct mc_table *part = parts[refs[i].more];
		uint64_t row = refs[i].value;
		int code = mc_table_append(t, 1, part->offset + row, part->pfn + row, part->count + row,
					   part->flags + row, fail);

		if (code)
			return code;
	}
	return MC_OK;
}

/*
 * Fills an empty table with the rows of n others, in whatever order they come, merging rows that continue each other.
 * Errors: MC_RANGE (page sizes differ, tables overlap), MC_MEMORY, MC_KERNEL.
 */
int mc_table_concat(struct mc_table *t, struct mc_table **parts, uint64_t n, struct mc_fail *fail)
{
	uint64_t rows = 0, at = 0;
	struct mc_ref *refs;
	int code;

	for (uint64_t i = 0; i < n; i++) {
		if (parts[i]->page_size != t->page_size)
			return mc_fail(fail, MC_RANGE, 0, "page sizes differ");
		rows += parts[i]->rows;
		if (t->pages && parts[i]->pages) {	/* the span may have gaps, so cover in two steps */
			if (parts[i]->first < t->first)
				t->first = parts[i]->first;
			if (parts[i]->end > t->end)
				t->end = parts[i]->end;
			t->pages += parts[i]->pages;
		} else if (parts[i]->pages) {
			t->first = parts[i]->first;
			t->end = parts[i]->end;
			t->pages = parts[i]->pages;
		}
	}
	if (t->pages > t->end - t->first)
		return mc_fail(fail, MC_RANGE, 0, "tables overlap");
	refs = malloc((rows ? rows : 1) * sizeof(*refs));
	if (!refs)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	for (uint64_t i = 0; i < n; i++)
		for (uint64_t row = 0; row < parts[i]->rows; row++)
			refs[at++] = (struct mc_ref){ parts[i]->offset[row], row, i };
	code = mc_sort(refs, rows, fail);
	if (!code)
		code = concat_sorted(t, parts, refs, rows, fail);
	free(refs);
	return code;
}

static void free_columns(struct mc_table *t)
{
	if (!t->capacity)
		return;
	munmap(t->offset, t->capacity * 8);
	munmap(t->pfn, t->capacity * 8);
	munmap(t->count, t->capacity * 4);
	munmap(t->flags, t->capacity * 4);
	t->capacity = 0;
}

/* Maps the sealed memfd of so many rows for reading; the columns are in it from now on. */
static int map_sealed(struct mc_table *t, uint64_t rows, struct mc_fail *fail)
{
	uint64_t bytes = HEADER + rows * ROW;
	void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, t->fd, 0);

	if (map == MAP_FAILED)
		return mc_fail_errno(fail, "mmap");
	free_columns(t);
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

/*
 * Ends the filling: the table becomes a memfd of exactly its bytes, which nobody can change any more.
 * Errors: MC_KERNEL (memfd_create, e.g. EMFILE, write, F_ADD_SEALS, mmap), MC_MEMORY. Only to be freed afterwards.
 */
int mc_table_seal(struct mc_table *t, struct mc_fail *fail)
{
	struct header header = {
		.version = 1, .page_size = t->page_size, .rows = t->rows,
		.first = t->first, .end = t->end, .pages = t->pages,
	};
	int code;

	memcpy(header.magic, magic, sizeof(magic));
	checksum(t, &header, header.checksum);
	if ((code = make_memfd(t, fail)) || (code = write_all(t->fd, &header, HEADER, fail)) ||
	    (code = write_all(t->fd, t->offset, t->rows * 8, fail)) ||
	    (code = write_all(t->fd, t->pfn, t->rows * 8, fail)) ||
	    (code = write_all(t->fd, t->count, t->rows * 4, fail)) ||
	    (code = write_all(t->fd, t->flags, t->rows * 4, fail)) || (code = seal_memfd(t, fail)))
		return code;
	return map_sealed(t, t->rows, fail);
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
	if (t->first > t->end || t->end > MAX_PAGE || t->pages > t->end - t->first)
		return mc_fail(fail, MC_FORMAT, 0, "it covers more pages than it spans");
	checksum(t, header, sum);
	if (memcmp(sum, header->checksum, sizeof(sum)))
		return mc_fail(fail, MC_FORMAT, 0, "its checksum does not match");
	end = t->first;
	for (uint64_t i = 0; i < t->rows; i++) {
		const char *fault = row_fault(t, end, t->offset[i], t->pfn[i], t->count[i], t->flags[i]);

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
	if (header->version != 1)
		return mc_fail(fail, MC_FORMAT, 0, "it is of a version this memconsole does not know");
	if (header->rows > MAX_ROWS || size != HEADER + header->rows * ROW)
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
	struct mc_table *t = calloc(1, sizeof(*t));
	int code;

	if (!t)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	t->fd = -1;
	code = load_into(t, bytes, length, fail);
	if (code)
		mc_table_free(t);
	else
		*out = t;
	return code;
}

/* A file somebody could still shrink or write: its bytes as they are now, in a table of its own. */
static int load_file(struct mc_table **out, int fd, uint64_t size, struct mc_fail *fail)
{
	uint8_t *bytes = malloc(size);
	uint64_t done = 0;
	int code;

	if (!bytes)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "malloc");
	while (done < size) {
		ssize_t n = pread(fd, bytes + done, size - done, (off_t)done);

		if (n <= 0) {
			code = n ? mc_fail_errno(fail, "pread") : mc_fail(fail, MC_FORMAT, 0, "it shrank while read");
			free(bytes);
			return code;
		}
		done += (uint64_t)n;
	}
	code = mc_table_load(out, bytes, size, fail);
	free(bytes);
	return code;
}

/*
 * A table from an fd that holds one: mapped in place where it is sealed against change, else copied. The fd
 * stays the caller's.
 * Errors: MC_FORMAT (foreign, truncated, corrupt), MC_KERNEL, MC_MEMORY.
 */
int mc_table_open(struct mc_table **out, int fd, struct mc_fail *fail)
{
	int seals = fcntl(fd, F_GET_SEALS), code;
	struct header header;
	struct mc_table *t;
	struct stat st;
	uint64_t rows;
	ssize_t n;

	if (fstat(fd, &st))
		return mc_fail_errno(fail, "fstat");
	n = pread(fd, &header, HEADER, 0);
	if (n < 0)
		return mc_fail_errno(fail, "pread");
	code = header_rows(&header, n < HEADER ? 0 : (uint64_t)st.st_size, &rows, fail);
	if (code)
		return code;
	if (seals < 0 || (seals & SEALS) != SEALS)
		return load_file(out, fd, (uint64_t)st.st_size, fail);
	t = calloc(1, sizeof(*t));
	if (!t)
		return mc_fail(fail, MC_MEMORY, ENOMEM, "calloc");
	t->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	code = t->fd < 0 ? mc_fail_errno(fail, "F_DUPFD_CLOEXEC") : adopt(t, rows, fail);
	if (code)
		mc_table_free(t);
	else
		*out = t;
	return code;
}

/* Unmaps and closes everything a table holds, but not the struct itself. */
void mc_table_drop(struct mc_table *t)
{
	free_columns(t);
	if (t->map)
		munmap(t->map, t->mapped);
	if (t->fd >= 0)
		close(t->fd);
	free(t->by_pfn);
}

/* Frees a table; NULL is fine. */
void mc_table_free(struct mc_table *t)
{
	if (t)
		mc_table_drop(t);
	free(t);
}
