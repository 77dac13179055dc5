// The candidates for eviction of one column of one namespace, in exact order: an 8-ary heap whose entries know where they
// are, so that a touch moves one entry and nothing is ever scanned or left stale. And the contest between such heaps.
#pragma once
#include <algorithm>
#include <memory>

#include "types.hpp"

namespace flexkv::index {

#pragma pack(push, 4)
struct Entry {
  uint64_t tick;   // or what the policy has put in its place
  uint32_t rank;   // stranded copies below kLive; then what the policy puts before the tick
  uint32_t depth;  // of equals the deeper goes first
  NodeId node;
};
#pragma pack(pop)
constexpr uint32_t kLive = 1u << 31;

// Owner has: moved(node, column, place), told where a candidate's entry now is; candidate_key(node, column).
template <class Owner>
class Heap {
 public:
  // `mark` is added to the places that are reported: it tells apart the heaps of one column.
  Heap(Owner& owner, const uint8_t* root, uint32_t column, uint32_t group, uint32_t mark)
      : owner(owner), root(root), column(column), group(group), mark_(mark) {}

  Owner& owner;
  const uint8_t* const root;
  const uint32_t column;
  const uint32_t group;
  uint32_t seat = kNone;  // in its contest

  bool empty() const { return size_ == 0; }
  const Entry& top() const { return at(0); }
  const Entry& at(uint32_t place) const { return chunks_[(place + kShift) / kChunk][(place + kShift) % kChunk]; }

  // These return whether the top may have changed.
  bool push(const Entry& entry) {
    const uint32_t place = size_++;
    if ((place + kShift) / kChunk == chunks_.size()) {
      chunks_.push_back(std::unique_ptr<Entry[]>(new Entry[kChunk]));
    }
    return rise(place, entry) == 0;
  }
  bool update(uint32_t place, const Entry& entry) {
    const uint32_t now = settle(place, entry);
    return place == 0 || now == 0;
  }
  bool remove(uint32_t place) {
    const Entry last = at(--size_);
    if (place != size_) settle(place, last);
    while (!chunks_.empty() && (size_ == 0 || (size_ - 1 + kShift) / kChunk + 2 < chunks_.size())) chunks_.pop_back();
    return place == 0;
  }
  void rename(uint32_t place, NodeId node) { slot(place).node = node; }
  void clear() {
    chunks_.clear();
    size_ = 0;
  }
  size_t memory_bytes() const { return chunks_.size() * sizeof(Entry) * kChunk + chunks_.capacity() * sizeof(void*); }

 private:
  static constexpr uint32_t kWays = 8;
  static constexpr uint32_t kShift = kWays - 1;  // so that siblings share a chunk
  static constexpr uint32_t kChunk = 128;

  Entry& slot(uint32_t place) { return chunks_[(place + kShift) / kChunk][(place + kShift) % kChunk]; }

  bool before(const Entry& a, const Entry& b) const {
    if (a.rank != b.rank) return a.rank < b.rank;
    if (a.tick != b.tick) return a.tick < b.tick;
    if (a.depth != b.depth) return a.depth > b.depth;
    if (a.node == b.node) return false;
    return std::memcmp(owner.candidate_key(a.node, column), owner.candidate_key(b.node, column), kKeyBytes) < 0;
  }

  void set(uint32_t place, const Entry& entry) {
    slot(place) = entry;
    owner.moved(entry.node, column, place | mark_);
  }

  uint32_t rise(uint32_t place, const Entry& entry) {
    while (place != 0) {
      const uint32_t parent = (place - 1) / kWays;
      if (!before(entry, at(parent))) break;
      set(place, at(parent));
      place = parent;
    }
    set(place, entry);
    return place;
  }

  uint32_t sink(uint32_t place, const Entry& entry) {
    for (;;) {
      const uint32_t first = place * kWays + 1;
      if (first >= size_) break;
      const uint32_t stop = std::min(first + kWays, size_);
      const Entry* children = &at(first);
      uint32_t best = first;
      for (uint32_t child = first + 1; child < stop; ++child) {
        if (before(children[child - first], children[best - first])) best = child;
      }
      if (!before(at(best), entry)) break;
      set(place, at(best));
      place = best;
    }
    set(place, entry);
    return place;
  }

  uint32_t settle(uint32_t place, const Entry& entry) {
    const Entry copy = entry;
    const uint32_t up = rise(place, copy);
    return up != place ? up : sink(place, copy);
  }

  std::vector<std::unique_ptr<Entry[]>> chunks_;
  uint32_t size_ = 0;
  const uint32_t mark_;
};

// Heaps that stand for one eviction, the one with the first candidate on top.
template <class H>
class Tournament {
 public:
  bool empty() const { return heaps_.empty(); }
  H* top() const { return heaps_.empty() ? nullptr : heaps_[0]; }

  // To be called when a heap's top may have changed.
  void fix(H* heap) {
    if (heap->empty()) {
      leave(heap);
      return;
    }
    if (heap->seat == kNone) {
      heap->seat = uint32_t(heaps_.size());
      heaps_.push_back(heap);
    }
    settle(heap->seat);
  }

  void leave(H* heap) {
    if (heap->seat == kNone) return;
    const uint32_t at = heap->seat;
    heap->seat = kNone;
    H* last = heaps_.back();
    heaps_.pop_back();
    if (last == heap) return;
    seat(last, at);
    settle(at);
  }

 private:
  static bool before(const H* a, const H* b) {
    const Entry &x = a->top(), &y = b->top();
    if (x.rank != y.rank) return x.rank < y.rank;
    if (x.tick != y.tick) return x.tick < y.tick;
    if (x.depth != y.depth) return x.depth > y.depth;
    if (a->group != b->group) return a->group < b->group;
    const int order =
        std::memcmp(a->owner.candidate_key(x.node, a->column), b->owner.candidate_key(y.node, b->column), kKeyBytes);
    return order != 0 ? order < 0 : std::memcmp(a->root, b->root, kKeyBytes) < 0;
  }

  void seat(H* heap, uint32_t at) {
    heaps_[at] = heap;
    heap->seat = at;
  }

  void settle(uint32_t at) {
    H* heap = heaps_[at];
    while (at != 0 && before(heap, heaps_[(at - 1) / 2])) {
      seat(heaps_[(at - 1) / 2], at);
      at = (at - 1) / 2;
    }
    for (;;) {
      uint32_t child = 2 * at + 1;
      if (child >= heaps_.size()) break;
      if (child + 1 < heaps_.size() && before(heaps_[child + 1], heaps_[child])) ++child;
      if (!before(heaps_[child], heap)) break;
      seat(heaps_[child], at);
      at = child;
    }
    seat(heap, at);
  }

  std::vector<H*> heaps_;
};

}  // namespace flexkv::index
