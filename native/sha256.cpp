#include "sha256.hpp"

#include <bit>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FLEXKV_SHA_NI 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace flexkv::sha256 {
namespace {

constexpr uint32_t kInitial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

alignas(64) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// ---- portable -------------------------------------------------------------------------------------

uint32_t load_big(const uint8_t* p) {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | uint32_t{p[3]};
}

void portable_start(State& state) { std::memcpy(state.words, kInitial, sizeof kInitial); }

void portable_digest(const State& state, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    for (int byte = 0; byte < 4; ++byte) out[4 * i + byte] = uint8_t(state.words[i] >> (24 - 8 * byte));
  }
}

void portable_one(State& state, const uint8_t* data, size_t chunks) {
  for (; chunks > 0; --chunks, data += kChunk) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = load_big(data + 4 * i);
    for (int i = 16; i < 64; ++i) {
      const uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state.words[0], b = state.words[1], c = state.words[2], d = state.words[3];
    uint32_t e = state.words[4], f = state.words[5], g = state.words[6], h = state.words[7];
    for (int i = 0; i < 64; ++i) {
      const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const uint32_t add[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state.words[i] += add[i];
  }
}

void portable_two(State& a, const uint8_t* data_a, State& b, const uint8_t* data_b, size_t chunks) {
  portable_one(a, data_a, chunks);
  portable_one(b, data_b, chunks);
}

constexpr Implementation kPortable{"portable", portable_start, portable_digest, portable_one, portable_two};

// ---- SHA-NI ---------------------------------------------------------------------------------------
#ifdef FLEXKV_SHA_NI

#define FLEXKV_TARGET __attribute__((target("sha,sse4.1,ssse3")))

// The instructions want the state as (f e b a) and (h g d c), low word first; it is kept so between chunks.
void ni_start(State& state) {
  const uint32_t words[8] = {kInitial[5], kInitial[4], kInitial[1], kInitial[0],
                             kInitial[7], kInitial[6], kInitial[3], kInitial[2]};
  std::memcpy(state.words, words, sizeof words);
}

FLEXKV_TARGET void ni_digest(const State& state, uint8_t* out) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const __m128i abef = _mm_shuffle_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(state.words)), 0x1b);
  const __m128i cdgh = _mm_shuffle_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(state.words + 4)), 0x1b);
  auto* to = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(to, _mm_shuffle_epi8(_mm_unpacklo_epi64(abef, cdgh), swap));
  _mm_storeu_si128(to + 1, _mm_shuffle_epi8(_mm_unpackhi_epi64(abef, cdgh), swap));
}

// N independent streams in step: sha256rnds2 has twice the latency of its throughput, so two streams fill the unit.
template <int N>
FLEXKV_TARGET inline __attribute__((always_inline)) void ni_compress(State* const (&states)[N],
                                                                     const uint8_t* (&data)[N], size_t chunks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const auto* round = reinterpret_cast<const __m128i*>(kRound);
  __m128i abef[N], cdgh[N];
#pragma GCC unroll 2
  for (int s = 0; s < N; ++s) {
    abef[s] = _mm_load_si128(reinterpret_cast<const __m128i*>(states[s]->words));
    cdgh[s] = _mm_load_si128(reinterpret_cast<const __m128i*>(states[s]->words + 4));
  }
  for (; chunks > 0; --chunks) {
    __m128i w[N][4], abef_before[N], cdgh_before[N];
#pragma GCC unroll 2
    for (int s = 0; s < N; ++s) {
      abef_before[s] = abef[s];
      cdgh_before[s] = cdgh[s];
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {  // four rounds each
#pragma GCC unroll 2
      for (int s = 0; s < N; ++s) {
        if (r < 4) {
          w[s][r] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data[s]) + r), swap);
        }
        __m128i wk = _mm_add_epi32(w[s][r & 3], _mm_load_si128(round + r));
        cdgh[s] = _mm_sha256rnds2_epu32(cdgh[s], abef[s], wk);
        if (r >= 3 && r < 15) {
          const __m128i middle = _mm_alignr_epi8(w[s][r & 3], w[s][(r + 3) & 3], 4);
          w[s][(r + 1) & 3] = _mm_sha256msg2_epu32(_mm_add_epi32(w[s][(r + 1) & 3], middle), w[s][r & 3]);
        }
        wk = _mm_shuffle_epi32(wk, 0x0e);
        abef[s] = _mm_sha256rnds2_epu32(abef[s], cdgh[s], wk);
        if (r >= 1 && r < 13) w[s][(r + 3) & 3] = _mm_sha256msg1_epu32(w[s][(r + 3) & 3], w[s][r & 3]);
      }
    }
#pragma GCC unroll 2
    for (int s = 0; s < N; ++s) {
      abef[s] = _mm_add_epi32(abef[s], abef_before[s]);
      cdgh[s] = _mm_add_epi32(cdgh[s], cdgh_before[s]);
      data[s] += kChunk;
    }
  }
#pragma GCC unroll 2
  for (int s = 0; s < N; ++s) {
    _mm_store_si128(reinterpret_cast<__m128i*>(states[s]->words), abef[s]);
    _mm_store_si128(reinterpret_cast<__m128i*>(states[s]->words + 4), cdgh[s]);
  }
}

FLEXKV_TARGET void ni_one(State& state, const uint8_t* data, size_t chunks) {
  State* const states[1] = {&state};
  const uint8_t* from[1] = {data};
  ni_compress<1>(states, from, chunks);
}

FLEXKV_TARGET void ni_two(State& a, const uint8_t* data_a, State& b, const uint8_t* data_b, size_t chunks) {
  State* const states[2] = {&a, &b};
  const uint8_t* from[2] = {data_a, data_b};
  ni_compress<2>(states, from, chunks);
}

constexpr Implementation kShaNi{"sha-ni", ni_start, ni_digest, ni_one, ni_two};

bool has_sha_ni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 9)) || !(c & (1u << 19))) return false;  // SSSE3, SSE4.1
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));                          // SHA
}
#endif  // FLEXKV_SHA_NI
}  // namespace

const Implementation& portable() { return kPortable; }

const Implementation& best() {
#ifdef FLEXKV_SHA_NI
  static const Implementation& chosen = has_sha_ni() ? kShaNi : kPortable;
  return chosen;
#else
  return kPortable;
#endif
}
}  // namespace flexkv::sha256
