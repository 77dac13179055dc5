// S3-FIFO's ghost of one tier: blocks that left the small queue not long ago, in order of entry.
#pragma once
#include <deque>
#include <unordered_map>

#include "types.hpp"

namespace flexkv::index {

class Ghost {
 public:
  // Whether the block was known; it is forgotten.
  bool take(const uint8_t* key, uint32_t group) {
    auto found = entries_.find({key_word(key), group});
    if (found == entries_.end()) return false;
    entries_.erase(found);
    if (order_.size() > 2 * entries_.size() + 64) tidy();
    return true;
  }

  void add(uint64_t word, uint32_t group) {
    const Name name{word, group};
    entries_[name] = next_;
    order_.push_back({name, next_++});
    if (order_.size() > 2 * entries_.size() + 64) tidy();
  }

  void shrink(uint64_t most) {
    while (entries_.size() > most) {
      const auto found = entries_.find(order_.front().name);
      if (found != entries_.end() && found->second == order_.front().number) entries_.erase(found);
      order_.pop_front();
    }
  }

  size_t memory_bytes() const {
    return entries_.size() * (sizeof(Name) + 3 * sizeof(uint64_t)) + entries_.bucket_count() * sizeof(void*) +
           order_.size() * sizeof(Entry);
  }

 private:
  struct Name {
    uint64_t word;  // the key's first 8 bytes
    uint32_t group;
    bool operator==(const Name&) const = default;
  };
  struct Hash {
    size_t operator()(const Name& name) const { return name.word + name.group; }
  };
  struct Entry {
    Name name;
    uint64_t number;  // an entry that is not the name's latest is void
  };

  void tidy() {
    std::deque<Entry> live;
    for (const Entry& entry : order_) {
      const auto found = entries_.find(entry.name);
      if (found != entries_.end() && found->second == entry.number) live.push_back(entry);
    }
    order_.swap(live);
  }

  std::unordered_map<Name, uint64_t, Hash> entries_;
  std::deque<Entry> order_;
  uint64_t next_ = 0;
};

}  // namespace flexkv::index
