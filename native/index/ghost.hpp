// S3-FIFO's ghost of one tier: blocks that left the small queue not long ago, in order of entry.
#pragma once
#include <deque>

#include "key_map.hpp"

namespace flexkv::index {

class Ghost {
 public:
  // Whether the block was known; it is forgotten.
  bool take(const uint8_t* key, uint32_t group) {
    const uint32_t number = find(key_word(key), group);
    if (number == kNone) return false;
    numbers_.erase(key, number);
    entry(number).group = kNone;
    --live_;
    drop_void();
    return true;
  }

  // `word`: the key's first 8 bytes. The block is not known: it was taken when it came in.
  void add(uint64_t word, uint32_t group) {
    if (next_ == kNone) *this = Ghost();  // after four thousand million entries
    numbers_.insert(reinterpret_cast<const uint8_t*>(&word), next_++);
    entries_.push_back({word, group});
    ++live_;
  }

  void shrink(uint64_t most) {
    while (live_ > most) {
      numbers_.erase(reinterpret_cast<const uint8_t*>(&entries_.front().word), next_ - uint32_t(entries_.size()));
      entries_.pop_front();
      --live_;
      drop_void();
    }
  }

  size_t memory_bytes() const { return numbers_.memory_bytes() + entries_.size() * sizeof(Entry); }

 private:
  friend class Check;
  struct Entry {
    uint64_t word;
    uint32_t group;  // kNone: void
  };

  Entry& entry(uint32_t number) { return entries_[number - (next_ - uint32_t(entries_.size()))]; }

  uint32_t find(uint64_t word, uint32_t group) {
    return numbers_.find(reinterpret_cast<const uint8_t*>(&word), [&](uint32_t number) {
      const Entry& found = entry(number);
      return found.word == word && found.group == group;
    });
  }

  // The front is never void, and no more than about half of the entries are.
  void drop_void() {
    while (!entries_.empty() && entries_.front().group == kNone) entries_.pop_front();
    if (entries_.size() <= 2 * live_ + 64) return;
    std::deque<Entry> kept;
    KeyMap numbers;
    uint32_t number = 0;
    for (const Entry& each : entries_) {
      if (each.group == kNone) continue;
      numbers.insert(reinterpret_cast<const uint8_t*>(&each.word), number++);
      kept.push_back(each);
    }
    entries_.swap(kept);
    numbers_ = std::move(numbers);
    next_ = number;
  }

  KeyMap numbers_;  // of entries, which count from next_ - entries_.size()
  std::deque<Entry> entries_;
  uint32_t next_ = 0;
  uint64_t live_ = 0;
};

}  // namespace flexkv::index
