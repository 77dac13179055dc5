// What is said of ranges of a node's positions: states of recency and pins. Most columns have one state and no pin, and
// need none of this.
#pragma once
#include "policy.hpp"
#include "types.hpp"

namespace flexkv::index {

struct Run {  // positions up to `end` have this state
  uint32_t end;
  State state;
};

struct PinRun {  // positions [start, stop) have `count` pins
  uint32_t start;
  uint32_t stop;
  uint32_t count;
};

// Runs in order of position; the last one is open-ended (kNone). Empty: the column's own state holds everywhere.
using Runs = std::vector<Run>;

inline void append_run(Runs& runs, uint32_t end, const State& state) {
  if (!runs.empty() && runs.back().state == state) {
    runs.back().end = end;
  } else {
    runs.push_back({end, state});
  }
}

// Give positions [start, stop) a state.
inline void set_run(Runs& runs, uint32_t start, uint32_t stop, const State& state) {
  Runs made;
  made.reserve(runs.size() + 2);
  uint32_t at = 0;
  bool placed = false;
  for (const Run& run : runs) {
    if (at < start && run.end > at) append_run(made, std::min(run.end, start), run.state);
    if (!placed && run.end > start) {
      append_run(made, stop, state);
      placed = true;
    }
    if (run.end > stop) append_run(made, run.end, run.state);
    at = run.end;
  }
  runs.swap(made);
}

inline const State& state_in(const Runs& runs, uint32_t position) {
  auto found = std::upper_bound(runs.begin(), runs.end(), position,
                                [](uint32_t value, const Run& run) { return value < run.end; });
  return found->state;
}

// Add `change` (1 or -1) to the pins of [start, stop). Returns how many positions came to be, or ceased to be, pinned.
inline int64_t change_pins(std::vector<PinRun>& pins, uint32_t start, uint32_t stop, int32_t change) {
  std::vector<PinRun> made;
  made.reserve(pins.size() + 2);
  int64_t pinned = 0;
  auto add = [&](uint32_t from, uint32_t to, uint32_t count) {
    if (from >= to || count == 0) return;
    if (!made.empty() && made.back().stop == from && made.back().count == count) {
      made.back().stop = to;
    } else {
      made.push_back({from, to, count});
    }
  };
  uint32_t at = start;  // up to where [start, stop) is done
  for (const PinRun& run : pins) {
    add(run.start, std::min(run.stop, start), run.count);
    const uint32_t from = std::max(run.start, start), to = std::min(run.stop, stop);
    if (from < to) {
      if (at < from && change > 0) {
        add(at, from, 1);
        pinned += from - at;
      }
      if (change < 0 && run.count == 1) pinned -= to - from;
      add(from, to, run.count + uint32_t(change));
      at = to;
    } else if (run.start >= stop && at < stop && change > 0) {
      add(at, stop, 1);
      pinned += stop - at;
      at = stop;
    }
    add(std::max(run.start, stop), run.stop, run.count);
  }
  if (at < stop && change > 0) {
    add(at, stop, 1);
    pinned += stop - at;
  }
  pins.swap(made);
  return pinned;
}

// Whether every position of [start, stop) has a pin.
inline bool all_pinned(const std::vector<PinRun>& pins, uint32_t start, uint32_t stop) {
  for (const PinRun& run : pins) {
    if (run.start <= start && start < run.stop) start = std::min(run.stop, stop);
  }
  return start >= stop;
}

inline bool any_pinned(const std::vector<PinRun>& pins, uint32_t start, uint32_t stop) {
  for (const PinRun& run : pins) {
    if (run.start < stop && start < run.stop) return true;
  }
  return false;
}

// Runs and pins of one column of one node, where there are any.
struct Extra {
  Runs runs;
  std::vector<PinRun> pins;

  bool empty() const { return runs.empty() && pins.empty(); }
  size_t memory_bytes() const { return runs.capacity() * sizeof(Run) + pins.capacity() * sizeof(PinRun); }
};

}  // namespace flexkv::index
