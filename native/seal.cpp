// Seals for Python: arrays in, the GIL released. The work is in seal_blocks.hpp; flexkv_core/seal.py checks all bounds
// before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings.hpp"
#include "seal_blocks.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const std::uint8_t, nb::shape<-1, 32>, nb::c_contig, nb::device::cpu>;

SealBlocks blocks_of(const Int64s& offsets, const Int64s& lengths, const Keys& keys, const ConstBytes& groups) {
  const std::size_t n = offsets.shape(0);
  if (lengths.shape(0) != n || keys.shape(0) != n || groups.shape(0) != n)
    throw nb::value_error("offsets, payload_bytes, keys and groups differ in length");
  return {offsets.data(), lengths.data(), keys.data(), groups.data(), n};
}

void seal(Bytes host, Int64s offsets, Int64s lengths, Keys keys, ConstBytes groups, std::size_t threads) {
  const SealBlocks blocks = blocks_of(offsets, lengths, keys, groups);
  std::uint8_t* base = host.data();
  nb::gil_scoped_release release;
  seal_blocks(base, blocks, threads);
}

void verify(ConstBytes host, Int64s offsets, Int64s lengths, Keys keys, ConstBytes groups, Bytes faults,
            std::size_t threads) {
  const SealBlocks blocks = blocks_of(offsets, lengths, keys, groups);
  if (faults.shape(0) != blocks.count) throw nb::value_error("faults and offsets differ in length");
  const std::uint8_t* base = host.data();
  std::uint8_t* out = faults.data();
  nb::gil_scoped_release release;
  verify_blocks(base, blocks, out, threads);
}

}  // namespace

void bind_seal(nb::module_& m) {
  m.def("seal_blocks", &seal, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("payload_bytes").noconvert(), nb::arg("keys").noconvert(), nb::arg("groups").noconvert(),
        nb::arg("threads"));
  m.def("verify_blocks", &verify, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("payload_bytes").noconvert(), nb::arg("keys").noconvert(), nb::arg("groups").noconvert(),
        nb::arg("faults").noconvert(), nb::arg("threads"));
  m.def("checksum_kernel", &xxh3_64_name);
}

}  // namespace flexkv
