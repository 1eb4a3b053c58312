// SPDX-License-Identifier: MIT
#include <string.h>

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

#include "xxh.h"

void mc_hash_base(const struct mc_bytes *parts, unsigned int n, uint8_t *out)
{
	XXH128_canonical_t canonical;
	XXH3_state_t state;

	XXH3_128bits_reset(&state);
	for (unsigned int i = 0; i < n; i++)
		XXH3_128bits_update(&state, parts[i].at, parts[i].length);
	XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state));
	memcpy(out, canonical.digest, sizeof(canonical.digest));
}
