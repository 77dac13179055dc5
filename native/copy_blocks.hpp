// Gather and scatter without Python: blocks between fragments in memory that the CPU can address and slots of a region.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "stream_copy.hpp"
#include "thread_pool.hpp"

namespace flexkv {

constexpr std::uint64_t kCopyGrain = 4096;  // threads meet at page borders of the byte stream
constexpr std::uint64_t kStreamFrom = 4 << 20;  // bytes a call from which copies go past the caches

struct CopyPlan {
  const std::int64_t* offsets;
  const std::int64_t* blocks;
  std::size_t count;
  const std::uint64_t* base;
  const std::int64_t* stride;
  const std::int64_t* length;
  const std::int64_t* host_offset;
  std::size_t fragments;
  std::uint64_t block_bytes;
};

enum class Direction { kGather, kScatter };

// Copies the bytes [first, last) of the blocks' payloads laid end to end, in the order of the host's bytes.
template <Direction direction, bool stream>
void copy_walk(const CopyPlan& plan, std::uint8_t* host, std::uint64_t first, std::uint64_t last) {
  std::uint64_t left = last - first;
  std::size_t block = first / plan.block_bytes;
  auto within = static_cast<std::int64_t>(first % plan.block_bytes);
  auto f = static_cast<std::size_t>(
      std::upper_bound(plan.host_offset, plan.host_offset + plan.fragments, within) - plan.host_offset - 1);
  const auto device_at = [&](std::size_t b, std::size_t fragment) {
    return reinterpret_cast<std::uint8_t*>(plan.base[fragment] +
                                           static_cast<std::uint64_t>(plan.blocks[b] * plan.stride[fragment]));
  };
  std::uint8_t* device = device_at(block, f) + (within - plan.host_offset[f]);
  for (;;) {
    std::uint8_t* at_host = host + plan.offsets[block] + within;
    const auto rest = static_cast<std::uint64_t>(plan.host_offset[f] + plan.length[f] - within);
    const std::uint64_t bytes = std::min(rest, left);
    left -= bytes;
    within += static_cast<std::int64_t>(bytes);
    if (left != 0 && ++f == plan.fragments) {
      f = 0;
      within = 0;
      ++block;
    }
    std::uint8_t* next = left != 0 ? device_at(block, f) : device;
    if constexpr (direction == Direction::kGather) {
      if constexpr (stream) stream_copy(at_host, device, bytes, next);
      else std::memcpy(at_host, device, bytes);
    } else {
      if constexpr (stream) stream_copy(device, at_host, bytes, at_host + bytes);
      else std::memcpy(device, at_host, bytes);
    }
    if (left == 0) break;
    device = next;
  }
  if constexpr (stream) stream_end();
}

template <Direction direction>
void copy_blocks(const CopyPlan& plan, std::uint8_t* host, std::size_t threads) {
  const std::uint64_t total = plan.block_bytes * plan.count;
  const std::size_t parts = std::min<std::uint64_t>(std::max<std::size_t>(threads, 1), total / kCopyGrain + 1);
  const bool stream = total >= kStreamFrom;
  ThreadPool::instance().run(parts, [&](std::size_t part) {
    const auto [first, last] = share(total, part, parts, kCopyGrain);
    if (first == last) return;
    if (stream) copy_walk<direction, true>(plan, host, first, last);
    else copy_walk<direction, false>(plan, host, first, last);
  });
}

inline void copy_bytes(std::uint8_t* to, const std::uint8_t* from, std::uint64_t total, std::size_t threads) {
  const std::size_t parts = std::min<std::uint64_t>(std::max<std::size_t>(threads, 1), total / kCopyGrain + 1);
  ThreadPool::instance().run(parts, [&](std::size_t part) {
    const auto [first, last] = share(total, part, parts, kCopyGrain);
    std::memcpy(to + first, from + first, last - first);
  });
}

}  // namespace flexkv
