// The candidates for eviction of one column of one namespace, in exact order, and the contest between such queues.
//
// What comes in order (the latest touched under LRU, the newest under FIFO) goes to either end of a linked list; what
// does not goes to a heap. Links and places lie in an array of their own by node, so a touch moves one candidate and
// nothing is ever scanned or left stale.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "types.hpp"

namespace flexkv::index {

// What compares: (rank, what the policy puts before the tick, tick or what takes its place). The lowest goes first.
using Order = unsigned __int128;
constexpr uint64_t kLive = uint64_t(1) << 31;  // of the rank; stranded copies are below it
inline Order order_of(uint64_t rank, uint64_t tick) { return Order(rank) << 64 | tick; }
inline bool is_stranded(Order order) { return uint64_t(order >> 64) < kLive; }

// Where a node's candidate of a column stands. `previous` holds the place, if it is in the heap; its top bit says that it
// is in the second of the column's queues.
struct Link {
  static constexpr uint32_t kSecond = 1u << 31;
  static constexpr uint32_t kEdge = kSecond - 1;  // no node in this direction
  static constexpr uint32_t kInHeap = kNone - 1;
  uint32_t previous = kEdge;
  uint32_t next = kNone;  // kNone: there is no candidate

  bool absent() const { return next == kNone; }
  bool in_heap() const { return next == kInHeap; }
  bool second() const { return (previous & kSecond) != 0; }
  uint32_t before() const { return previous & kEdge; }
};

// Owner has: link(node, column); order(node, column), depth(node, column), candidate_key(node, column) of a candidate;
// prefetch(node, column) and prefetch_blocks(node).
template <class Owner>
class Candidates {
 public:
  // `listed`: whether orders may be asked for again; a third party's may not. `mark`: kSecond for the second queue.
  Candidates(Owner& owner, const uint8_t* root, uint32_t column, uint32_t group, uint32_t mark, bool listed)
      : owner(owner), root(root), column(column), group(group), mark_(mark), listed_(listed) {}
  ~Candidates() { std::free(raw_); }
  Candidates(const Candidates&) = delete;
  Candidates& operator=(const Candidates&) = delete;

  Owner& owner;
  const uint8_t* const root;
  const uint32_t column;
  const uint32_t group;
  uint32_t seat = kNone;  // in its contest

  bool empty() const { return size_ == 0 && front_ == Link::kEdge; }
  NodeId top() {
    if (front_ == Link::kEdge) return entries_[0].node;
    if (size_ == 0) return front_;
    return before(Entry(front_, front_order()), entries_[0]) ? front_ : entries_[0].node;
  }
  Order top_order() {
    if (front_ == Link::kEdge) return entries_[0].order();
    if (size_ == 0) return front_order();
    return std::min(front_order(), entries_[0].order());
  }

  // These return whether the top may have changed.
  bool push(NodeId node, Order order) {
    if (listed_) {
      if (front_ == Link::kEdge) {
        front_ = back_ = node;
        owner.link(node, column) = {Link::kEdge | mark_, Link::kEdge};
        front_order_ = back_order_ = order;
        front_known_ = true;
        return true;
      }
      if (order > back_order_) {
        owner.link(back_, column).next = node;
        owner.link(node, column) = {back_ | mark_, Link::kEdge};
        back_ = node;
        back_order_ = order;
        return false;
      }
      if (front_known_ && order < front_order_) {
        Link& old = owner.link(front_, column);
        old.previous = node | mark_;
        owner.link(node, column) = {Link::kEdge | mark_, front_};
        front_ = node;
        front_order_ = order;
        return true;
      }
    }
    if (size_ == capacity_) resize(capacity_ < 64 ? capacity_ + 16 : capacity_ + capacity_ / 4);
    return rise(size_++, Entry(node, order)) == 0;
  }

  bool update(NodeId node, Order order) {
    const Link link = owner.link(node, column);
    if (!link.in_heap()) {
      if (node == front_ && front_known_ && order == front_order_) return true;
      if (node == back_ && order >= back_order_) {
        back_order_ = order;
        if (node == front_) front_order_ = order;
        return node == front_;
      }
      const bool was_front = unlink(link);
      return push(node, order) || was_front;
    }
    if (listed_ && (front_ == Link::kEdge || order > back_order_)) {
      const bool was_top = remove_place(link.before());
      return push(node, order) || was_top;
    }
    const uint32_t place = link.before(), now = settle(place, Entry(node, order));
    return place == 0 || now == 0;
  }

  bool remove(NodeId node) {
    const Link link = owner.link(node, column);
    owner.link(node, column) = Link{};
    return link.in_heap() ? remove_place(link.before()) : unlink(link);
  }

  // The candidate is in another node now, at the same place.
  void rename(NodeId from, NodeId to) {
    const Link link = owner.link(from, column);
    owner.link(to, column) = link;
    owner.link(from, column) = Link{};
    if (link.in_heap()) {
      entries_[link.before()].node = to;
      return;
    }
    if (link.before() == Link::kEdge) {
      front_ = to;
    } else {
      owner.link(link.before(), column).next = to;
    }
    if (link.next == Link::kEdge) {
      back_ = to;
    } else {
      owner.link(link.next, column).previous = to | mark_;
    }
  }

  // The next candidates are about to be looked at.
  void prefetch_next(NodeId top) {
    if (top == front_) {
      const uint32_t next = owner.link(top, column).next;
      if (next == Link::kEdge) return;
      owner.prefetch_blocks(next);
      const uint32_t later = owner.link(next, column).next;
      if (later != Link::kEdge) owner.prefetch(later, column);
      return;
    }
    const uint32_t stop = std::min(1 + kWays, size_);
    if (stop <= 1) return;
    uint32_t next = 1;
    for (uint32_t place = 2; place < stop; ++place) next = entries_[place].order() < entries_[next].order() ? place : next;
    owner.prefetch(entries_[next].node, column);
  }

  size_t memory_bytes() const { return raw_ == nullptr ? 0 : capacity_ * sizeof(Entry) + kSlack; }

 private:
  friend class Check;
  static constexpr uint32_t kWays = 16;  // few levels: each of the lower ones is a cache miss
  static constexpr size_t kLine = 64;

  struct Entry {
    Entry(NodeId node, Order order) : tick(uint64_t(order)), rank(uint32_t(order >> 64)), node(node) {}
    Order order() const { return order_of(rank, tick); }
    uint64_t tick;
    uint32_t rank;
    NodeId node;
  };
  static_assert(sizeof(Entry) == 16);
  static constexpr size_t kSlack = kLine + (kWays - 1) * sizeof(Entry);

  Order front_order() {
    if (!front_known_) front_order_ = owner.order(front_, column);
    front_known_ = true;
    return front_order_;
  }

  bool unlink(const Link& link) {
    const uint32_t previous = link.before();
    if (previous == Link::kEdge) {
      front_ = link.next;
      front_known_ = false;
    } else {
      owner.link(previous, column).next = link.next;
    }
    if (link.next == Link::kEdge) {
      back_ = previous;  // its order is below back_order_: what comes behind that may come behind it
    } else {
      owner.link(link.next, column).previous = previous | mark_;
    }
    return previous == Link::kEdge;
  }

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

  bool before(const Entry& a, const Entry& b) const {
    const Order left = a.order(), right = b.order();
    return left != right ? left < right : before_equal(a, b);
  }

  bool before_equal(const Entry& a, const Entry& b) const {
    if (a.node == b.node) return false;
    const uint32_t above = owner.depth(a.node, column), below = owner.depth(b.node, column);
    if (above != below) return above > below;
    return std::memcmp(owner.candidate_key(a.node, column), owner.candidate_key(b.node, column), kKeyBytes) < 0;
  }

  void set(uint32_t place, const Entry& entry) {
    entries_[place] = entry;
    owner.link(entry.node, column) = {place | mark_, Link::kInHeap};
  }

  uint32_t rise(uint32_t place, const Entry& entry) {
    while (place != 0) {
      const uint32_t parent = (place - 1) / kWays;
      if (!before(entry, entries_[parent])) break;
      set(place, entries_[parent]);
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
      Order least = entries_[first].order();
      for (uint32_t child = first + 1; child < stop; ++child) {
        const Order now = entries_[child].order();
        if (now == least && before_equal(entries_[child], entries_[best])) best = child;
        best = now < least ? child : best;
        least = now < least ? now : least;
      }
      if (!before(entries_[best], entry)) break;
      set(place, entries_[best]);
      place = best;
    }
    set(place, entry);
    return place;
  }

  uint32_t settle(uint32_t place, const Entry entry) {
    const uint32_t up = rise(place, entry);
    return up != place ? up : sink(place, entry);
  }

  bool remove_place(uint32_t place) {
    const Entry last = entries_[--size_];
    if (place != size_) settle(place, last);
    if (size_ < capacity_ / 4 || size_ == 0) resize(size_);
    return place == 0;
  }

  uint32_t front_ = Link::kEdge, back_ = Link::kEdge;
  bool front_known_ = false;
  const uint32_t mark_;
  const bool listed_;
  uint32_t size_ = 0;
  uint32_t capacity_ = 0;
  Order front_order_ = 0, back_order_ = 0;
  uint8_t* raw_ = nullptr;
  Entry* entries_ = nullptr;
};

// Queues that stand for one eviction, the one with the first candidate on top.
template <class Q>
class Tournament {
 public:
  bool empty() const { return queues_.empty(); }
  Q* top() const { return queues_.empty() ? nullptr : queues_[0]; }

  // To be called when a queue's top may have changed.
  void fix(Q* queue) {
    if (queue->empty()) {
      leave(queue);
      return;
    }
    if (queue->seat == kNone) {
      queue->seat = uint32_t(queues_.size());
      queues_.push_back(queue);
    }
    if (queues_.size() > 1) settle(queue->seat);
  }

  void leave(Q* queue) {
    if (queue->seat == kNone) return;
    const uint32_t at = queue->seat;
    queue->seat = kNone;
    Q* last = queues_.back();
    queues_.pop_back();
    if (last == queue) return;
    seat(last, at);
    settle(at);
  }

 private:
  friend class Check;
  static bool before(Q* a, Q* b) {
    const Order left = a->top_order(), right = b->top_order();
    if (left != right) return left < right;
    const NodeId x = a->top(), y = b->top();
    const uint32_t above = a->owner.depth(x, a->column), below = b->owner.depth(y, b->column);
    if (above != below) return above > below;
    if (a->group != b->group) return a->group < b->group;
    const int keys = std::memcmp(a->owner.candidate_key(x, a->column), b->owner.candidate_key(y, b->column), kKeyBytes);
    return keys != 0 ? keys < 0 : std::memcmp(a->root, b->root, kKeyBytes) < 0;
  }

  void seat(Q* queue, uint32_t at) {
    queues_[at] = queue;
    queue->seat = at;
  }

  void settle(uint32_t at) {
    Q* queue = queues_[at];
    while (at != 0 && before(queue, queues_[(at - 1) / 2])) {
      seat(queues_[(at - 1) / 2], at);
      at = (at - 1) / 2;
    }
    for (;;) {
      uint32_t child = 2 * at + 1;
      if (child >= queues_.size()) break;
      if (child + 1 < queues_.size() && before(queues_[child + 1], queues_[child])) ++child;
      if (!before(queues_[child], queue)) break;
      seat(queues_[child], at);
      at = child;
    }
    seat(queue, at);
  }

  std::vector<Q*> queues_;
};

}  // namespace flexkv::index
