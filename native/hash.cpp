#include "hash.hpp"

#define XXH_INLINE_ALL
#include "xxhash.h"

extern "C" {
std::uint64_t flexkv_xxh3_64_avx2(const void* data, std::size_t length);
std::uint64_t flexkv_xxh3_64_avx512(const void* data, std::size_t length);
}

namespace flexkv {
namespace {

std::uint64_t baseline(const void* data, std::size_t length) { return XXH3_64bits(data, length); }

struct Choice {
  Hash64 hash;
  const char* name;
};

const Choice& choice() {
  static const Choice best = []() -> Choice {
#ifdef FLEXKV_X86
    if (__builtin_cpu_supports("avx512f")) return {flexkv_xxh3_64_avx512, "avx512"};
    if (__builtin_cpu_supports("avx2")) return {flexkv_xxh3_64_avx2, "avx2"};
#endif
    return {baseline, "baseline"};
  }();
  return best;
}

}  // namespace

Hash64 xxh3_64() { return choice().hash; }
const char* xxh3_64_name() { return choice().name; }

}  // namespace flexkv
