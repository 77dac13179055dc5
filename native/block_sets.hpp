// How often each block is in: pins, blocks on their way.
#pragma once
#include "block_table.hpp"

namespace flexkv {

class BlockTally {
 public:
  static constexpr uint32_t kMost = ~0u;

  uint32_t count(const uint8_t* key, uint32_t group) const {
    const uint32_t number = table_.find(key, group);
    return number == Table::kNone ? 0 : table_[number].count;
  }

  // Returns the count after it. Throws std::length_error beyond 2^32 - 1; nothing changes then.
  uint32_t add(const uint8_t* key, uint32_t group) {
    uint32_t number = table_.find(key, group);
    if (number == Table::kNone) number = table_.insert(key, group);
    Entry& entry = table_[number];
    if (entry.count == kMost) throw std::length_error("a block is counted too often");
    return ++entry.count;
  }

  // Takes back one; false if there is none.
  bool take(const uint8_t* key, uint32_t group) {
    const uint32_t number = table_.find(key, group);
    if (number == Table::kNone) return false;
    if (--table_[number].count == 0) table_.erase(number);
    return true;
  }

  void clear() { table_.clear(); }
  uint32_t size() const { return table_.size(); }
  void prefetch(const uint8_t* key) const { table_.prefetch(key); }
  size_t memory_bytes() const { return table_.memory_bytes(); }

 private:
  struct Entry {
    uint8_t key[index::kKeyBytes];
    uint32_t count;
    uint8_t group;
  };
  using Table = BlockTable<Entry>;
  Table table_;
};

}  // namespace flexkv
