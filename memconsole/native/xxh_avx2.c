// SPDX-License-Identifier: MIT
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define XXH_VECTOR 2 /* XXH_AVX2, which xxhash.h defines too late for this */
#define mc_hash_base mc_hash_avx2
#include "xxh_base.c"
#endif
