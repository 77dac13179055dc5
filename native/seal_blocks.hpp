// Seals without Python: the page behind a block's payload with its identity and checksum. flexkv_core/seal.py describes
// the format.
#pragma once
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hash.hpp"
#include "thread_pool.hpp"

namespace flexkv {

static_assert(std::endian::native == std::endian::little, "seals are little endian");

constexpr std::uint64_t kSealPage = 4096;
constexpr char kSealMagic[8] = {'F', 'l', 'e', 'x', 'K', 'V', 'B', '\x1a'};
constexpr std::uint32_t kSealVersion = 1;

struct SealHeader {
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
static_assert(sizeof(SealHeader) == 144 && offsetof(SealHeader, header_hash) == 136);

// Numbers of flexkv_core.seal.SealFault.
enum Fault : std::uint8_t { kGood, kBadMagic, kBadVersion, kBadHeader, kBadKey, kBadGroup, kBadLength, kBadChecksum };

inline std::uint64_t seal_padded(std::uint64_t bytes) { return (bytes + kSealPage - 1) / kSealPage * kSealPage; }

struct SealBlocks {
  const std::int64_t* offsets;
  const std::int64_t* lengths;
  const std::uint8_t* keys;
  const std::uint8_t* groups;
  std::size_t count;
};

struct SealPlaces {  // where blocks of one namespace belong
  const std::uint8_t* root;
  const std::uint8_t* parents;
  const std::int64_t* depths;
};

inline void seal_one(std::uint8_t* block, const SealBlocks& blocks, const SealPlaces& places, std::size_t i,
                     Hash64 hash) {
  const auto length = static_cast<std::uint64_t>(blocks.lengths[i]);
  const std::uint64_t body = seal_padded(length);
  std::memset(block + length, 0, body - length + kSealPage);
  SealHeader header{};
  std::memcpy(header.magic, kSealMagic, sizeof kSealMagic);
  header.version = kSealVersion;
  header.group = blocks.groups[i];
  std::memcpy(header.key, blocks.keys + 32 * i, 32);
  std::memcpy(header.parent, places.parents + 32 * i, 32);
  std::memcpy(header.root, places.root, 32);
  header.depth = static_cast<std::uint64_t>(places.depths[i]);
  header.length = length;
  header.payload_hash = hash(block, length);
  header.header_hash = hash(&header, offsetof(SealHeader, header_hash));
  std::memcpy(block + body, &header, sizeof header);
}

inline Fault verify_one(const std::uint8_t* block, const SealBlocks& blocks, std::size_t i, Hash64 hash) {
  const auto length = static_cast<std::uint64_t>(blocks.lengths[i]);
  SealHeader header;
  std::memcpy(&header, block + seal_padded(length), sizeof header);
  if (std::memcmp(header.magic, kSealMagic, sizeof kSealMagic) != 0) return kBadMagic;
  if (header.version != kSealVersion) return kBadVersion;
  if (header.header_hash != hash(&header, offsetof(SealHeader, header_hash))) return kBadHeader;
  if (std::memcmp(header.key, blocks.keys + 32 * i, 32) != 0) return kBadKey;
  if (header.group != blocks.groups[i]) return kBadGroup;
  if (header.length != length) return kBadLength;
  if (header.payload_hash != hash(block, length)) return kBadChecksum;
  return kGood;
}

// Calls one(i) for every block, the blocks shared out among `threads` threads by bytes.
template <class One>
void for_each_block(const SealBlocks& blocks, std::size_t threads, One one) {
  const std::size_t parts = std::min(threads, blocks.count);
  if (parts <= 1) {
    for (std::size_t i = 0; i < blocks.count; ++i) one(i);
    return;
  }
  std::vector<std::uint64_t> end(blocks.count);
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < blocks.count; ++i) end[i] = total += static_cast<std::uint64_t>(blocks.lengths[i]) + kSealPage;
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

inline void seal_blocks(std::uint8_t* host, const SealBlocks& blocks, const SealPlaces& places, std::size_t threads) {
  const Hash64 hash = xxh3_64();
  for_each_block(blocks, threads, [&](std::size_t i) { seal_one(host + blocks.offsets[i], blocks, places, i, hash); });
}

// Calls found(offset, header) for every page of a buffer that is an undamaged seal.
template <class Found>
void find_seals(const std::uint8_t* buffer, std::size_t size, Found found) {
  const Hash64 hash = xxh3_64();
  for (std::size_t at = 0; at + kSealPage <= size; at += kSealPage) {
    SealHeader header;
    std::memcpy(&header, buffer + at, sizeof header);
    if (std::memcmp(header.magic, kSealMagic, sizeof kSealMagic) != 0 || header.version != kSealVersion) continue;
    if (header.header_hash != hash(&header, offsetof(SealHeader, header_hash)) || header.group > 255) continue;
    found(at, header);
  }
}

inline void verify_blocks(const std::uint8_t* host, const SealBlocks& blocks, std::uint8_t* faults, std::size_t threads) {
  const Hash64 hash = xxh3_64();
  for_each_block(blocks, threads,
                 [&](std::size_t i) { faults[i] = verify_one(host + blocks.offsets[i], blocks, i, hash); });
}

}  // namespace flexkv
