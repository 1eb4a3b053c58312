// SPDX-License-Identifier: MIT
#include <string.h>

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

#include "xxh.h"

void mc_hash_base(const void *bytes, uint64_t length, uint8_t *out)
{
	XXH128_canonical_t canonical;

	XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes, length));
	memcpy(out, canonical.digest, sizeof(canonical.digest));
}
