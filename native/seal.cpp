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
  std::uint8_t parent[32];  // with root and depth: where in the trees the block belongs, for recovery
  std::uint8_t root[32];
  std::uint64_t depth;
  std::uint64_t length;
  std::uint64_t payload_hash;
  std::uint64_t header_hash;  // of the fields before it
};
static_assert(sizeof(Header) == 144 && offsetof(Header, header_hash) == 136);

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

struct Positions {  // of the blocks of one namespace
  const std::uint8_t* root;
  const std::uint8_t* parents;
  const std::int64_t* depths;
};

void seal_one(std::uint8_t* block, const Blocks& blocks, const Positions& positions, std::size_t i, Hash64 hash) {
  const auto length = static_cast<std::uint64_t>(blocks.lengths[i]);
  const std::uint64_t body = padded(length);
  std::memset(block + length, 0, body - length + kPage);
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.group = blocks.groups[i];
  std::memcpy(header.key, blocks.keys + 32 * i, 32);
  std::memcpy(header.parent, positions.parents + 32 * i, 32);
  std::memcpy(header.root, positions.root, 32);
  header.depth = static_cast<std::uint64_t>(positions.depths[i]);
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

void seal_blocks(Bytes host, Int64s offsets, Int64s lengths, Keys keys, ConstBytes groups, nb::bytes root,
                 Keys parents, Int64s depths, std::size_t threads) {
  const Blocks blocks = blocks_of(offsets, lengths, keys, groups);
  if (root.size() != 32 || parents.shape(0) != blocks.count || depths.shape(0) != blocks.count)
    throw nb::value_error("root has not 32 bytes, or parents, depths and offsets differ in length");
  const Positions positions{static_cast<const std::uint8_t*>(root.data()), parents.data(), depths.data()};
  std::uint8_t* base = host.data();
  const Hash64 hash = xxh3_64();
  nb::gil_scoped_release release;
  for_each_block(blocks, threads, [&](std::size_t i) { seal_one(base + blocks.offsets[i], blocks, positions, i, hash); });
}

// Finds the pages of a buffer that are seals and says what they say. Rows of `numbers`: offset of the page, depth, length.
// Returns how many there are; no more than `most` are written.
std::size_t find_seals(ConstBytes buffer, nb::ndarray<std::uint8_t, nb::shape<-1, 96>, nb::c_contig, nb::device::cpu> names,
                       nb::ndarray<std::int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu> numbers, Bytes groups) {
  const std::size_t most = names.shape(0);
  if (numbers.shape(0) != most || groups.shape(0) != most) throw nb::value_error("the results differ in length");
  const Hash64 hash = xxh3_64();
  nb::gil_scoped_release release;
  std::size_t found = 0;
  for (std::size_t at = 0; at + kPage <= buffer.size(); at += kPage) {
    Header header;
    std::memcpy(&header, buffer.data() + at, sizeof header);
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.version != kVersion) continue;
    if (header.header_hash != hash(&header, offsetof(Header, header_hash)) || header.group > 255) continue;
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
  }
  return found;
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
        nb::arg("root"), nb::arg("parents").noconvert(), nb::arg("depths").noconvert(), nb::arg("threads"));
  m.def("find_seals", &find_seals, nb::arg("buffer").noconvert(), nb::arg("names").noconvert(),
        nb::arg("numbers").noconvert(), nb::arg("groups").noconvert());
  m.def("verify_blocks", &verify_blocks, nb::arg("host").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("payload_bytes").noconvert(), nb::arg("keys").noconvert(), nb::arg("groups").noconvert(),
        nb::arg("faults").noconvert(), nb::arg("threads"));
  m.def("checksum_kernel", &xxh3_64_name);
}

}  // namespace flexkv
