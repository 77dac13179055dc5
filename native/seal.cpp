// Seals: the page behind a block's payload with its identity and checksum. The format is described in
// flexkv_core/seal.py, which also checks all bounds before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <bit>
#include <cstring>
#include <algorithm>
#include <vector>

#include "bindings.hpp"
#include "hash.hpp"
#include "thread_pool.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

static_assert(std::endian::native == std::endian::little, "seals are little endian");

constexpr std::uint64_t kPage = 4096;
constexpr char kMagic[8] = {'F', 'l', 'e', 'x', 'K', 'V', 'B', '\x1a'};
constexpr std::uint32_t kVersion = 1;

struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t group;
  std::uint8_t key[32];
  std::uint64_t length;
  std::uint64_t payload_hash;
  std::uint64_t header_hash;  // of the fields before it
};
static_assert(sizeof(Header) == 72 && offsetof(Header, header_hash) == 64);

// Numbers of flexkv_core.seal.SealFault.
enum Fault : std::uint8_t { kGood, kBadMagic, kBadVersion, kBadHeader, kBadKey, kBadGroup, kBadLength, kBadChecksum };

std::uint64_t padded(std::uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const std::uint8_t, nb::shape<-1, 32>, nb::c_contig, nb::device::cpu>;

struct Blocks {
  const std::int64_t* offsets;
  const std::int64_t* lengths;
  const std::uint8_t* keys;
  const std::uint8_t* groups;
  std::size_t count;
};

Blocks blocks_of(const Int64s& offsets, const Int64s& lengths, const Keys& keys, const ConstBytes& groups) {
  const std::size_t n = offsets.shape(0);
  if (lengths.shape(0) != n || keys.shape(0) != n || groups.shape(0) != n)
    throw nb::value_error("offsets, payload_bytes, keys and groups differ in length");
  return {offsets.data(), lengths.data(), keys.data(), groups.data(), n};
}

void seal_one(std::uint8_t* block, const Blocks& blocks, std::size_t i, Hash64 hash) {
  const auto length = static_cast<std::uint64_t>(blocks.lengths[i]);
  const std::uint64_t body = padded(length);
  std::memset(block + length, 0, body - length + kPage);
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.group = blocks.groups[i];
  std::memcpy(header.key, blocks.keys + 32 * i, 32);
  header.length = length;
  header.payload_hash = hash(block, length);
  header.header_hash = hash(&header, offsetof(Header, header_hash));
  std::memcpy(block + body, &header, sizeof header);
}

Fault verify_one(const std::uint8_t* block, const Blocks& blocks, std::size_t i, Hash64 hash) {
  const auto length = static_cast<std::uint64_t>(blocks.lengths[i]);
  Header header;
  std::memcpy(&header, block + padded(length), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return kBadMagic;
  if (header.version != kVersion) return kBadVersion;
  if (header.header_hash != hash(&header, offsetof(Header, header_hash))) return kBadHeader;
  if (std::memcmp(header.key, blocks.keys + 32 * i, 32) != 0) return kBadKey;
  if (header.group != blocks.groups[i]) return kBadGroup;
  if (header.length != length) return kBadLength;
  if (header.payload_hash != hash(block, length)) return kBadChecksum;
  return kGood;
}

// Calls one(i) for every block, the blocks shared out among `threads` threads by bytes.
template <class One>
void for_each_block(const Blocks& blocks, std::size_t threads, One one) {
  const std::size_t parts = std::min(threads, blocks.count);
  if (parts <= 1) {
    for (std::size_t i = 0; i < blocks.count; ++i) one(i);
    return;
  }
  std::vector<std::uint64_t> end(blocks.count);
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < blocks.count; ++i) end[i] = total += static_cast<std::uint64_t>(blocks.lengths[i]) + kPage;
  ThreadPool::instance().run(parts, [&](std::size_t part) {
    const auto [first, last] = share(total, part, parts, 1);
    const auto begin = std::upper_bound(end.begin(), end.end(), first) - end.begin();
    // A block belongs to the part in whose share its first byte lies.
    for (std::size_t i = static_cast<std::size_t>(begin); i < blocks.count; ++i) {
      const std::uint64_t start = i == 0 ? 0 : end[i - 1];
      if (start >= last) break;
      if (start >= first) one(i);
    }
  });
}

void seal_blocks(Bytes host, Int64s offsets, Int64s lengths, Keys keys, ConstBytes groups, std::size_t threads) {
  const Blocks blocks = blocks_of(offsets, lengths, keys, groups);
  std::uint8_t* base = host.data();
  const Hash64 hash = xxh3_64();
  nb::gil_scoped_release release;
  for_each_block(blocks, threads, [&](std::size_t i) { seal_one(base + blocks.offsets[i], blocks, i, hash); });
}

void verify_blocks(ConstBytes host, Int64s offsets, Int64s lengths, Keys keys, ConstBytes groups, Bytes faults,
                   std::size_t threads) {
  const Blocks blocks = blocks_of(offsets, lengths, keys, groups);
  if (faults.shape(0) != blocks.count) throw nb::value_error("faults and offsets differ in length");
  const std::uint8_t* base = host.data();
  std::uint8_t* out = faults.data();
  const Hash64 hash = xxh3_64();
  nb::gil_scoped_release release;
  for_each_block(blocks, threads,
                 [&](std::size_t i) { out[i] = verify_one(base + blocks.offsets[i], blocks, i, hash); });
}

}  // namespace

void bind_seal(nb::module_& m) {
  m.def("seal_blocks", &seal_blocks, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("payload_bytes").noconvert(), nb::arg("keys").noconvert(), nb::arg("groups").noconvert(),
        nb::arg("threads"));
  m.def("verify_blocks", &verify_blocks, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("payload_bytes").noconvert(), nb::arg("keys").noconvert(), nb::arg("groups").noconvert(),
        nb::arg("faults").noconvert(), nb::arg("threads"));
  m.def("checksum_kernel", &xxh3_64_name);
}

}  // namespace flexkv
