// Copies a run of bytes past the caches: for transfers too large to be read again from a cache.
//
// Eight pages are walked side by side, a few lines of each at a time, with non-temporal stores and a prefetch that
// reaches into the run that comes next: short runs then keep as many DRAM pages open as a long memcpy does, which
// glibc's memcpy does only for runs of many MiB. benchmarks/host_copy.py shows what it is worth.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace flexkv {

#if defined(__SSE2__)

constexpr std::uint64_t kLine = 64;
constexpr std::uint64_t kPage = 4096;
constexpr int kPieces = 8;
constexpr std::uint64_t kStep = 2 * kLine;  // of each piece before the next piece's turn
constexpr std::uint64_t kAhead = 256;       // bytes from a load to its prefetch

inline void stream_line(std::uint8_t* to, const std::uint8_t* from) {
  const auto* in = reinterpret_cast<const __m128i*>(from);
  auto* out = reinterpret_cast<__m128i*>(to);
  const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2),
                d = _mm_loadu_si128(in + 3);
  _mm_stream_si128(out, a);
  _mm_stream_si128(out + 1, b);
  _mm_stream_si128(out + 2, c);
  _mm_stream_si128(out + 3, d);
}

// Eight pieces of `width` bytes each, a multiple of a line and at most a page, that lie end to end; `to` is aligned to a line;
// `next` is what will be read after them.
inline void stream_pieces(std::uint8_t* to, const std::uint8_t* from, std::uint64_t width, const std::uint8_t* next) {
  for (std::uint64_t at = 0; at < width; at += kStep) {
    const std::uint64_t ahead = at + kAhead;
    const std::uint8_t* soon = ahead < width ? from + ahead : next + (ahead - width);
    for (int piece = 0; piece < kPieces; ++piece) {
      const auto* line = reinterpret_cast<const char*>(soon + piece * width);
      _mm_prefetch(line, _MM_HINT_T0);
      _mm_prefetch(line + kLine, _MM_HINT_T0);
    }
    for (int piece = 0; piece < kPieces; ++piece) {
      const std::uint64_t i = piece * width + at;
      stream_line(to + i, from + i);
      if (at + kLine < width) stream_line(to + i + kLine, from + i + kLine);
    }
  }
}

// Copies `bytes` bytes; `next` is where the following run will be read, only prefetched and so of any value.
inline void stream_copy(std::uint8_t* to, const std::uint8_t* from, std::uint64_t bytes, const std::uint8_t* next) {
  const std::uint64_t head = -reinterpret_cast<std::uintptr_t>(to) % kLine;
  if (bytes < head + kLine) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  while (bytes >= kPieces * kLine) {
    const std::uint64_t width = std::min(kPage, bytes / kPieces / kLine * kLine);
    const std::uint64_t group = kPieces * width;
    stream_pieces(to, from, width, bytes >= group + kPieces * kLine ? from + group : next);
    to += group, from += group, bytes -= group;
  }
  for (; bytes >= kLine; to += kLine, from += kLine, bytes -= kLine) stream_line(to, from);
  std::memcpy(to, from, bytes);
}

// Orders streamed stores before whatever tells another thread or a device of them.
inline void stream_end() { _mm_sfence(); }

#else  // other processors: their memcpy

inline void stream_copy(std::uint8_t* to, const std::uint8_t* from, std::uint64_t bytes, const std::uint8_t*) {
  std::memcpy(to, from, bytes);
}
inline void stream_end() {}

#endif

}  // namespace flexkv
