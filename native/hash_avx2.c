// Compiled with wider vectors than the rest: nothing but xxhash may be included here, and only hash.cpp, which
// asks the processor first, may call it.
#define XXH_INLINE_ALL
#include "xxhash.h"

#include <stddef.h>
#include <stdint.h>

uint64_t flexkv_xxh3_64_avx2(const void* data, size_t length) { return XXH3_64bits(data, length); }
