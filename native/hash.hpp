// xxh3-64 of long inputs with the widest vectors that this processor has.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flexkv {

using Hash64 = std::uint64_t (*)(const void* data, std::size_t length);

Hash64 xxh3_64();             // the best one here; asks the processor once
const char* xxh3_64_name();   // "avx512", "avx2" or "baseline"

}  // namespace flexkv
