// Gather and scatter: blocks between fragments in device memory that the CPU can address and slots of the host region.
// Bounds are checked by flexkv_core/device/cpu.py before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>

#include "bindings.hpp"
#include "thread_pool.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

constexpr std::uint64_t kGrain = 4096;  // threads meet at page borders of the byte stream

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

// Calls copy(host, device, bytes) for the runs of bytes [first, last) of the blocks' payloads laid end to end.
template <class Copy>
void walk(const Plan& plan, std::uint8_t* host, std::uint64_t first, std::uint64_t last, Copy copy) {
  std::uint64_t left = last - first;
  std::size_t block = first / plan.block_bytes;
  auto within = static_cast<std::int64_t>(first % plan.block_bytes);
  std::size_t f = static_cast<std::size_t>(
      std::upper_bound(plan.host_offset, plan.host_offset + plan.fragments, within) - plan.host_offset - 1);
  while (left != 0) {
    const std::int64_t skip = within - plan.host_offset[f];
    const std::uint64_t bytes = std::min(static_cast<std::uint64_t>(plan.length[f] - skip), left);
    const std::uint64_t address =
        plan.base[f] + static_cast<std::uint64_t>(plan.blocks[block] * plan.stride[f] + skip);
    copy(host + plan.offsets[block] + within, reinterpret_cast<std::uint8_t*>(address), bytes);
    left -= bytes;
    within += static_cast<std::int64_t>(bytes);
    if (++f == plan.fragments) {
      f = 0;
      within = 0;
      ++block;
    }
  }
}

template <class Copy>
void run(const Plan& plan, std::uint8_t* host, std::size_t threads, Copy copy) {
  const std::uint64_t total = plan.block_bytes * plan.count;
  const std::size_t parts = std::min<std::uint64_t>(std::max<std::size_t>(threads, 1), total / kGrain + 1);
  nb::gil_scoped_release release;
  ThreadPool::instance().run(parts, [&](std::size_t part) {
    const auto [first, last] = share(total, part, parts, kGrain);
    walk(plan, host, first, last, copy);
  });
}

void gather(Bytes host, Int64s offsets, Int64s blocks, Addresses base, Int64s stride, Int64s length,
            Int64s host_offset, std::size_t threads) {
  run(plan_of(offsets, blocks, base, stride, length, host_offset), host.data(), threads,
      [](std::uint8_t* at_host, std::uint8_t* at_device, std::uint64_t bytes) {
        std::memcpy(at_host, at_device, bytes);
      });
}

void scatter(ConstBytes host, Int64s offsets, Int64s blocks, Addresses base, Int64s stride, Int64s length,
             Int64s host_offset, std::size_t threads) {
  // Only read through: `walk` is shared with gather.
  run(plan_of(offsets, blocks, base, stride, length, host_offset), const_cast<std::uint8_t*>(host.data()), threads,
      [](std::uint8_t* at_host, std::uint8_t* at_device, std::uint64_t bytes) {
        std::memcpy(at_device, at_host, bytes);
      });
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
