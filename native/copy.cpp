// Gather and scatter: blocks between fragments in device memory that the CPU can address and slots of the host region.
// Bounds are checked by flexkv_core/device/cpu.py before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>

#include "bindings.hpp"
#include "stream_copy.hpp"
#include "thread_pool.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

constexpr std::uint64_t kGrain = 4096;  // threads meet at page borders of the byte stream
constexpr std::uint64_t kStreamFrom = 4 << 20;  // bytes a call from which copies go past the caches

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Addresses = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct Plan {
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

Plan plan_of(const Int64s& offsets, const Int64s& blocks, const Addresses& base, const Int64s& stride,
             const Int64s& length, const Int64s& host_offset) {
  const std::size_t f = base.shape(0);
  if (offsets.shape(0) != blocks.shape(0)) throw nb::value_error("offsets and device_blocks differ in length");
  if (f == 0 || stride.shape(0) != f || length.shape(0) != f || host_offset.shape(0) != f)
    throw nb::value_error("the arrays of the fragments are empty or differ in length");
  return {offsets.data(), blocks.data(), offsets.shape(0), base.data(), stride.data(), length.data(),
          host_offset.data(), f, static_cast<std::uint64_t>(host_offset.data()[f - 1] + length.data()[f - 1])};
}

enum class Direction { kGather, kScatter };

// Copies the bytes [first, last) of the blocks' payloads laid end to end, in the order of the host's bytes.
template <Direction direction, bool stream>
void walk(const Plan& plan, std::uint8_t* host, std::uint64_t first, std::uint64_t last) {
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
void run(const Plan& plan, std::uint8_t* host, std::size_t threads) {
  const std::uint64_t total = plan.block_bytes * plan.count;
  const std::size_t parts = std::min<std::uint64_t>(std::max<std::size_t>(threads, 1), total / kGrain + 1);
  const bool stream = total >= kStreamFrom;
  nb::gil_scoped_release release;
  ThreadPool::instance().run(parts, [&](std::size_t part) {
    const auto [first, last] = share(total, part, parts, kGrain);
    if (first == last) return;
    if (stream) walk<direction, true>(plan, host, first, last);
    else walk<direction, false>(plan, host, first, last);
  });
}

void gather(Bytes host, Int64s offsets, Int64s blocks, Addresses base, Int64s stride, Int64s length,
            Int64s host_offset, std::size_t threads) {
  run<Direction::kGather>(plan_of(offsets, blocks, base, stride, length, host_offset), host.data(), threads);
}

void scatter(ConstBytes host, Int64s offsets, Int64s blocks, Addresses base, Int64s stride, Int64s length,
             Int64s host_offset, std::size_t threads) {
  // Only read through: `walk` is shared with gather.
  run<Direction::kScatter>(plan_of(offsets, blocks, base, stride, length, host_offset),
                           const_cast<std::uint8_t*>(host.data()), threads);
}

void memcpy_parallel(Bytes to, ConstBytes from, std::size_t threads) {
  const std::uint64_t total = to.shape(0);
  if (from.shape(0) != total) throw nb::value_error("dst and src differ in length");
  std::uint8_t* dst = to.data();
  const std::uint8_t* src = from.data();
  const std::size_t parts = std::min<std::uint64_t>(std::max<std::size_t>(threads, 1), total / kGrain + 1);
  nb::gil_scoped_release release;
  ThreadPool::instance().run(parts, [&](std::size_t part) {
    const auto [first, last] = share(total, part, parts, kGrain);
    std::memcpy(dst + first, src + first, last - first);
  });
}

}  // namespace

void bind_copy(nb::module_& m) {
  m.def("gather", &gather, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("device_blocks").noconvert(), nb::arg("base").noconvert(), nb::arg("page_stride").noconvert(),
        nb::arg("length").noconvert(), nb::arg("host_offset").noconvert(), nb::arg("threads"));
  m.def("scatter", &scatter, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("device_blocks").noconvert(), nb::arg("base").noconvert(), nb::arg("page_stride").noconvert(),
        nb::arg("length").noconvert(), nb::arg("host_offset").noconvert(), nb::arg("threads"));
  m.def("memcpy_parallel", &memcpy_parallel, nb::arg("dst").noconvert(), nb::arg("src").noconvert(),
        nb::arg("threads"));
}

}  // namespace flexkv
