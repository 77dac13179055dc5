// Gather and scatter for Python: arrays in, the GIL released. The work is in copy_blocks.hpp.
// Bounds are checked by flexkv_core/device/cpu.py before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings.hpp"
#include "copy_blocks.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Addresses = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

CopyPlan plan_of(const Int64s& offsets, const Int64s& blocks, const Addresses& base, const Int64s& stride,
                 const Int64s& length, const Int64s& host_offset) {
  const std::size_t f = base.shape(0);
  if (offsets.shape(0) != blocks.shape(0)) throw nb::value_error("offsets and device_blocks differ in length");
  if (f == 0 || stride.shape(0) != f || length.shape(0) != f || host_offset.shape(0) != f)
    throw nb::value_error("the arrays of the fragments are empty or differ in length");
  return {offsets.data(), blocks.data(), offsets.shape(0), base.data(), stride.data(), length.data(),
          host_offset.data(), f, static_cast<std::uint64_t>(host_offset.data()[f - 1] + length.data()[f - 1])};
}

void gather(Bytes host, Int64s offsets, Int64s blocks, Addresses base, Int64s stride, Int64s length,
            Int64s host_offset, std::size_t threads) {
  const CopyPlan plan = plan_of(offsets, blocks, base, stride, length, host_offset);
  std::uint8_t* to = host.data();
  nb::gil_scoped_release release;
  copy_blocks<Direction::kGather>(plan, to, threads);
}

void scatter(ConstBytes host, Int64s offsets, Int64s blocks, Addresses base, Int64s stride, Int64s length,
             Int64s host_offset, std::size_t threads) {
  const CopyPlan plan = plan_of(offsets, blocks, base, stride, length, host_offset);
  auto* from = const_cast<std::uint8_t*>(host.data());  // only read through: the walk is shared with gather
  nb::gil_scoped_release release;
  copy_blocks<Direction::kScatter>(plan, from, threads);
}

void memcpy_parallel(Bytes to, ConstBytes from, std::size_t threads) {
  const std::uint64_t total = to.shape(0);
  if (from.shape(0) != total) throw nb::value_error("dst and src differ in length");
  std::uint8_t* dst = to.data();
  const std::uint8_t* src = from.data();
  nb::gil_scoped_release release;
  copy_bytes(dst, src, total, threads);
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
