// From a key to numbers of what carries it (nodes, tiles): a multimap of which the caller verifies the candidates.
//
// 1,024 small open-addressing tables, so that no insertion pays for the growth of more than a thousandth of it. An entry
// is 32 bits of the key and the number: growing looks at no key.
#pragma once
#include <memory>

#include "types.hpp"

namespace flexkv::index {

class KeyMap {
 public:
  KeyMap() : shards_(kShards) {}

  void insert(const uint8_t* key, uint32_t number) {
    const uint64_t word = key_word(key);
    Shard& shard = shards_[word % kShards];
    if ((shard.count + 1) * 4 > shard.capacity * 3) grow(shard);
    put(shard, tag_of(word), number);
    ++shard.count;
  }

  // Calls `accept(number)` for those that may carry the key, until it returns true; kNone if it never does.
  template <class Accept>
  uint32_t find(const uint8_t* key, Accept accept) const {
    const uint64_t word = key_word(key);
    const Shard& shard = shards_[word % kShards];
    if (shard.capacity == 0) return kNone;
    const uint32_t tag = tag_of(word), mask = shard.capacity - 1;
    for (uint32_t at = tag & mask; shard.slots[at].number != kNone; at = (at + 1) & mask) {
      if (shard.slots[at].tag == tag && accept(shard.slots[at].number)) return shard.slots[at].number;
    }
    return kNone;
  }

  void replace(const uint8_t* key, uint32_t old_number, uint32_t new_number) {
    Entry* entry = locate(key, old_number);
    if (entry != nullptr) entry->number = new_number;
  }

  void erase(const uint8_t* key, uint32_t number) {
    Entry* entry = locate(key, number);
    if (entry == nullptr) return;
    Shard& shard = shards_[key_word(key) % kShards];
    const uint32_t mask = shard.capacity - 1;
    // Close the gap: move back each later entry of the cluster that may lie there.
    uint32_t gap = uint32_t(entry - shard.slots.get());
    for (uint32_t at = (gap + 1) & mask; shard.slots[at].number != kNone; at = (at + 1) & mask) {
      const uint32_t home = shard.slots[at].tag & mask;
      if (((at - home) & mask) >= ((at - gap) & mask)) {
        shard.slots[gap] = shard.slots[at];
        gap = at;
      }
    }
    shard.slots[gap].number = kNone;
    --shard.count;
    if (shard.count == 0) shard = Shard{};
  }

  void prefetch(const uint8_t* key) const {
    const uint64_t word = key_word(key);
    const Shard& shard = shards_[word % kShards];
    if (shard.capacity != 0) __builtin_prefetch(&shard.slots[tag_of(word) & (shard.capacity - 1)]);
  }

  size_t memory_bytes() const {
    size_t bytes = shards_.size() * sizeof(Shard);
    for (const Shard& shard : shards_) bytes += shard.capacity * sizeof(Entry);
    return bytes;
  }

 private:
  friend class Check;
  static constexpr uint32_t kShards = 1024;
  struct Entry {
    uint32_t tag;
    uint32_t number;
  };
  struct Shard {
    std::unique_ptr<Entry[]> slots;
    uint32_t capacity = 0;  // a power of two, or 0
    uint32_t count = 0;
  };

  static uint32_t tag_of(uint64_t word) { return uint32_t(word >> 32); }

  static void put(Shard& shard, uint32_t tag, uint32_t number) {
    const uint32_t mask = shard.capacity - 1;
    uint32_t at = tag & mask;
    while (shard.slots[at].number != kNone) at = (at + 1) & mask;
    shard.slots[at] = {tag, number};
  }

  static void grow(Shard& shard) {
    Shard larger;
    larger.capacity = shard.capacity == 0 ? 8 : shard.capacity * 2;
    larger.count = shard.count;
    larger.slots = std::make_unique<Entry[]>(larger.capacity);
    for (uint32_t at = 0; at < larger.capacity; ++at) larger.slots[at].number = kNone;
    for (uint32_t at = 0; at < shard.capacity; ++at) {
      if (shard.slots[at].number != kNone) put(larger, shard.slots[at].tag, shard.slots[at].number);
    }
    shard = std::move(larger);
  }

  Entry* locate(const uint8_t* key, uint32_t number) {
    const uint64_t word = key_word(key);
    Shard& shard = shards_[word % kShards];
    if (shard.capacity == 0) return nullptr;
    const uint32_t tag = tag_of(word), mask = shard.capacity - 1;
    for (uint32_t at = tag & mask; shard.slots[at].number != kNone; at = (at + 1) & mask) {
      if (shard.slots[at].tag == tag && shard.slots[at].number == number) return &shard.slots[at];
    }
    return nullptr;
  }

  std::vector<Shard> shards_;
};

}  // namespace flexkv::index
