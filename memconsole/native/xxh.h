/*
 * xxh3-128 of n pieces of memory, as if they were one, into 16 bytes (canonical). It is compiled once for any CPU and
 * once for AVX2, the same hash; mc_hash takes what this CPU has.
 */
#ifndef MC_XXH_H
#define MC_XXH_H

#include <stdint.h>

struct mc_bytes {
	const void *at;
	uint64_t length;
};

void mc_hash_base(const struct mc_bytes *parts, unsigned int n, uint8_t *out);
void mc_hash_avx2(const struct mc_bytes *parts, unsigned int n, uint8_t *out);

static inline void mc_hash(const struct mc_bytes *parts, unsigned int n, uint8_t *out)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("avx2")) {
		mc_hash_avx2(parts, n, out);
		return;
	}
#endif
	mc_hash_base(parts, n, out);
}

#endif
