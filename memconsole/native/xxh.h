/* xxh3-128 of bytes into 16 bytes (canonical), compiled once for any CPU and once for AVX2: the same hash. */
#ifndef MC_XXH_H
#define MC_XXH_H

#include <stdint.h>

void mc_hash_base(const void *bytes, uint64_t length, uint8_t *out);
void mc_hash_avx2(const void *bytes, uint64_t length, uint8_t *out);

#endif
