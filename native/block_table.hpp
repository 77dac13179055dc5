// Blocks, that is (key, group), with something about each. Entries lie in pieces that never move, are found through a
// KeyMap and are named by number: growing copies no entry, and an entry that has gone leaves its place to the next.
#pragma once
#include <memory>
#include <stdexcept>
#include <vector>

#include "index/key_map.hpp"

namespace flexkv {

// An Entry has `key` (32 bytes) and `group`, and starts as zeros.
template <class Entry>
class BlockTable {
 public:
  static constexpr uint32_t kNone = index::kNone;

  uint32_t find(const uint8_t* key, uint32_t group) const {
    return map_.find(key, [&](uint32_t number) {
      const Entry& entry = (*this)[number];
      return entry.group == group && index::same_key(entry.key, key);
    });
  }

  // Of a block that is not there.
  uint32_t insert(const uint8_t* key, uint32_t group) {
    uint32_t number = free_;
    if (number == kNone) {
      if (made_ == kNone) throw std::length_error("more blocks than can be numbered");
      if (made_ % kPiece == 0) pieces_.push_back(std::make_unique<Entry[]>(kPiece));
      number = made_;
    }
    Entry& entry = (*this)[number];
    map_.insert(key, number);
    if (number == free_) {
      std::memcpy(&free_, entry.key, sizeof free_);
    } else {
      ++made_;
    }
    entry = Entry{};
    std::memcpy(entry.key, key, index::kKeyBytes);
    entry.group = group;
    ++size_;
    return number;
  }

  void erase(uint32_t number) {
    Entry& entry = (*this)[number];
    map_.erase(entry.key, number);
    std::memcpy(entry.key, &free_, sizeof free_);  // free entries are chained through their keys
    free_ = number;
    --size_;
  }

  void clear() { *this = BlockTable(); }

  Entry& operator[](uint32_t number) { return pieces_[number / kPiece][number % kPiece]; }
  const Entry& operator[](uint32_t number) const { return pieces_[number / kPiece][number % kPiece]; }
  uint32_t size() const { return size_; }
  void prefetch(const uint8_t* key) const { map_.prefetch(key); }
  size_t memory_bytes() const { return map_.memory_bytes() + pieces_.size() * kPiece * sizeof(Entry); }

 private:
  static constexpr uint32_t kPiece = 512;

  index::KeyMap map_;
  std::vector<std::unique_ptr<Entry[]>> pieces_;
  uint32_t made_ = 0, free_ = kNone, size_ = 0;
};

}  // namespace flexkv
