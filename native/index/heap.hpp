// The candidates for eviction of one column of one namespace, in exact order: a 16-ary heap whose entries know where they
// are, so that a touch moves one entry and nothing is ever scanned or left stale. And the contest between such heaps.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "types.hpp"

namespace flexkv::index {

struct Entry {
  uint64_t tick;  // or what the policy has put in its place
  uint32_t rank;  // stranded copies below kLive; then what the policy puts before the tick
  NodeId node;
};
static_assert(sizeof(Entry) == 16);
constexpr uint32_t kLive = 1u << 31;

// Owner has: moved(node, column, place), told where a candidate's entry now is; candidate_key(node, column) and
// candidate_depth(node, column), asked where ticks are equal; prefetch(node) and prefetch_blocks(node).
template <class Owner>
class Heap {
 public:
  // `mark` is added to the places that are reported: it tells apart the heaps of one column.
  Heap(Owner& owner, const uint8_t* root, uint32_t column, uint32_t group, uint32_t mark)
      : owner(owner), root(root), column(column), group(group), mark_(mark) {}
  ~Heap() { std::free(raw_); }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  Owner& owner;
  const uint8_t* const root;
  const uint32_t column;
  const uint32_t group;
  uint32_t seat = kNone;  // in its contest

  bool empty() const { return size_ == 0; }
  const Entry& top() const { return at(0); }
  const Entry& at(uint32_t place) const { return entries_[place]; }

  // These return whether the top may have changed.
  bool push(const Entry& entry) {
    if (size_ == capacity_) resize(capacity_ < 64 ? capacity_ + 16 : capacity_ + capacity_ / 4);
    return rise(size_++, entry) == 0;
  }
  bool update(uint32_t place, const Entry& entry) {
    const uint32_t now = settle(place, entry);
    return place == 0 || now == 0;
  }
  bool remove(uint32_t place) {
    const Entry last = at(--size_);
    if (place != size_) settle(place, last);
    if (size_ < capacity_ / 4 || size_ == 0) resize(size_);
    return place == 0;
  }
  void rename(uint32_t place, NodeId node) { entries_[place].node = node; }

  // The candidates that come next are about to be looked at.
  void prefetch_next() const {
    const uint32_t stop = std::min(1 + kWays, size_);
    if (stop <= 1) return;
    uint32_t next = 1;
    for (uint32_t place = 2; place < stop; ++place) next = order(entries_[place]) < order(entries_[next]) ? place : next;
    owner.prefetch(entries_[next].node);
  }
  size_t memory_bytes() const { return raw_ == nullptr ? 0 : capacity_ * sizeof(Entry) + kSlack; }

 private:
  static constexpr uint32_t kWays = 16;  // few levels: each of the lower ones is a cache miss
  static constexpr size_t kLine = 64;
  static constexpr size_t kSlack = kLine + (kWays - 1) * sizeof(Entry);

  // Keeps what fits. Places 1 to 16, 17 to 32 ... begin at a cache line.
  void resize(uint32_t capacity) {
    if (capacity == 0) {
      std::free(raw_);
      raw_ = nullptr;
      entries_ = nullptr;
      capacity_ = 0;
      return;
    }
    const size_t old_shift = raw_ == nullptr ? 0 : size_t(reinterpret_cast<uint8_t*>(entries_) - raw_);
    uint8_t* raw = static_cast<uint8_t*>(std::realloc(raw_, capacity * sizeof(Entry) + kSlack));
    if (raw == nullptr) throw std::bad_alloc();
    const size_t gap = (kLine - reinterpret_cast<uintptr_t>(raw) % kLine) % kLine;
    const size_t shift = gap + (kWays - 1) * sizeof(Entry);
    if (raw_ != nullptr && shift != old_shift) {
      std::memmove(raw + shift, raw + old_shift, std::min(size_, capacity) * sizeof(Entry));
    }
    raw_ = raw;
    entries_ = reinterpret_cast<Entry*>(raw + shift);
    capacity_ = capacity;
  }

  using Order = unsigned __int128;
  static Order order(const Entry& entry) { return Order(entry.rank) << 64 | entry.tick; }

  bool before(const Entry& a, const Entry& b) const {
    const Order left = order(a), right = order(b);
    return left != right ? left < right : before_equal(a, b);
  }

  bool before_equal(const Entry& a, const Entry& b) const {
    if (a.node == b.node) return false;
    const uint32_t above = owner.candidate_depth(a.node, column), below = owner.candidate_depth(b.node, column);
    if (above != below) return above > below;
    return std::memcmp(owner.candidate_key(a.node, column), owner.candidate_key(b.node, column), kKeyBytes) < 0;
  }

  void set(uint32_t place, const Entry& entry) {
    entries_[place] = entry;
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
      uint32_t best = first;
      Order least = order(entries_[first]);
      for (uint32_t child = first + 1; child < stop; ++child) {
        const Order now = order(entries_[child]);
        if (now == least && before_equal(entries_[child], entries_[best])) best = child;
        best = now < least ? child : best;
        least = now < least ? now : least;
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

  uint8_t* raw_ = nullptr;
  Entry* entries_ = nullptr;
  uint32_t size_ = 0;
  uint32_t capacity_ = 0;
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
    const uint32_t above = a->owner.candidate_depth(x.node, a->column);
    const uint32_t below = b->owner.candidate_depth(y.node, b->column);
    if (above != below) return above > below;
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
