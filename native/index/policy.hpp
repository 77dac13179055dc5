// Eviction policies, as flexkv_core/policies/README.md defines them: the state of a copy, and its place in the order.
#pragma once
#include <algorithm>

#include "types.hpp"

namespace flexkv::index {

struct State {
  uint64_t tick = 0;  // of a third party's policy: its state
  uint32_t aux = 0;   // lfu: uses; slru: hits; s3fifo: queue and uses
  bool operator==(const State&) const = default;
};

// A third party's policy. May be slow; never throws.
class CustomPolicy {
 public:
  virtual ~CustomPolicy() = default;
  virtual int64_t insert(int64_t now) = 0;
  virtual int64_t hit(int64_t state, int64_t now) = 0;
  virtual int64_t order(int64_t state) = 0;
};

struct Policy {
  enum class Kind : uint8_t { kLru, kLfu, kSlru, kFifo, kMru, kFilo, kS3Fifo, kCustom };
  static constexpr uint32_t kMostUses = (1u << 30) - 1;
  static constexpr uint64_t kLatest = uint64_t(1) << 62;  // lru: where rewards stop
  static constexpr uint32_t kMain = 1u << 8;  // s3fifo: in the main queue
  static constexpr uint32_t kUses = 3;        // s3fifo: mask, and the most

  Kind kind = Kind::kLru;
  uint64_t reward = 0;         // lru: ticks
  uint32_t threshold = 2;      // slru: hits
  CustomPolicy* custom = nullptr;

  State inserted(uint64_t now, bool known_to_ghost) const {
    switch (kind) {
      case Kind::kLfu: return {now, 1};
      case Kind::kS3Fifo: return {now, known_to_ghost ? kMain : 0};
      case Kind::kCustom: return {uint64_t(custom->insert(int64_t(now))), 0};
      default: return {now, 0};
    }
  }

  State hit(State state, uint64_t now) const {
    switch (kind) {
      case Kind::kLru:
        state.tick = reward != 0 ? std::min(std::max(state.tick, now) + reward, kLatest) : now;
        break;
      case Kind::kMru: state.tick = now; break;
      case Kind::kLfu:
      case Kind::kSlru:
        state.aux = std::min(state.aux + 1, kMostUses);
        state.tick = now;
        break;
      case Kind::kS3Fifo: state.aux = (state.aux & kMain) | std::min((state.aux & kUses) + 1, kUses); break;
      case Kind::kCustom: state.tick = uint64_t(custom->hit(int64_t(state.tick), int64_t(now))); break;
      case Kind::kFifo:
      case Kind::kFilo: break;
    }
    return state;
  }

  // Whether a hit may move a copy in the order.
  bool moves_on_hit() const { return kind != Kind::kFifo && kind != Kind::kFilo && kind != Kind::kS3Fifo; }

  // First what counts before the tick (below 2^30), then what takes the tick's place.
  uint32_t primary(State state) const {
    if (kind == Kind::kLfu) return state.aux;
    if (kind == Kind::kSlru) return state.aux >= threshold ? 1 : 0;
    return 0;
  }
  uint64_t secondary(State state) const {
    if (kind == Kind::kMru || kind == Kind::kFilo) return ~state.tick;
    if (kind == Kind::kCustom) return uint64_t(custom->order(int64_t(state.tick))) ^ (uint64_t(1) << 63);
    return state.tick;
  }
  bool in_main(State state) const { return kind == Kind::kS3Fifo && (state.aux & kMain) != 0; }
};

}  // namespace flexkv::index
