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

void seal(Bytes host, Int64s offsets, Int64s lengths, Keys keys, ConstBytes groups, nb::bytes root, Keys parents,
          Int64s depths, std::size_t threads) {
  const SealBlocks blocks = blocks_of(offsets, lengths, keys, groups);
  if (root.size() != 32 || parents.shape(0) != blocks.count || depths.shape(0) != blocks.count)
    throw nb::value_error("root has not 32 bytes, or parents, depths and offsets differ in length");
  const SealPlaces places{static_cast<const std::uint8_t*>(root.data()), parents.data(), depths.data()};
  std::uint8_t* base = host.data();
  nb::gil_scoped_release release;
  seal_blocks(base, blocks, places, threads);
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

// What the seals in a buffer say. Rows of `names`: root, key, parent; of `numbers`: offset of the page, depth, length.
// Returns how many there are; no more than fit are written.
std::size_t find(ConstBytes buffer, nb::ndarray<std::uint8_t, nb::shape<-1, 96>, nb::c_contig, nb::device::cpu> names,
                 nb::ndarray<std::int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu> numbers, Bytes groups) {
  const std::size_t most = names.shape(0);
  if (numbers.shape(0) != most || groups.shape(0) != most) throw nb::value_error("the results differ in length");
  nb::gil_scoped_release release;
  std::size_t found = 0;
  find_seals(buffer.data(), buffer.size(), [&](std::size_t at, const SealHeader& header) {
    if (found < most) {
      std::uint8_t* name = names.data() + 96 * found;
      std::memcpy(name, header.root, 32);
      std::memcpy(name + 32, header.key, 32);
      std::memcpy(name + 64, header.parent, 32);
      std::int64_t* number = numbers.data() + 3 * found;
      number[0] = static_cast<std::int64_t>(at);
      number[1] = static_cast<std::int64_t>(header.depth);
      number[2] = static_cast<std::int64_t>(header.length);
      groups.data()[found] = static_cast<std::uint8_t>(header.group);
    }
    ++found;
  });
  return found;
}

}  // namespace

void bind_seal(nb::module_& m) {
  m.def("seal_blocks", &seal, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("payload_bytes").noconvert(), nb::arg("keys").noconvert(), nb::arg("groups").noconvert(),
        nb::arg("root"), nb::arg("parents").noconvert(), nb::arg("depths").noconvert(), nb::arg("threads"));
  m.def("find_seals", &find, nb::arg("buffer").noconvert(), nb::arg("names").noconvert(),
        nb::arg("numbers").noconvert(), nb::arg("groups").noconvert());
  m.def("verify_blocks", &verify, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("payload_bytes").noconvert(), nb::arg("keys").noconvert(), nb::arg("groups").noconvert(),
        nb::arg("faults").noconvert(), nb::arg("threads"));
  m.def("checksum_kernel", &xxh3_64_name);
}

}  // namespace flexkv
