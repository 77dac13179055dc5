// Answers: which tier and slot, how long a prefix. See forest.hpp.
#include "forest.hpp"

namespace flexkv::index {

namespace {

// Joins the low and high parts of slots. High parts are mostly zero: below 2^32 slots, 16 TiB.
inline void widen_tile(const uint32_t* low, const uint8_t* high, int64_t* out) {
  uint32_t all;
  std::memcpy(&all, high, sizeof all);
  for (uint32_t i = 0; i < Tiles::kBlocks; ++i) out[i] = int64_t(low[i]);
  if (all == 0) return;
  for (uint32_t i = 0; i < Tiles::kBlocks; ++i) out[i] |= int64_t(high[i]) << 32;
}

inline void widen(const uint32_t* low, const uint8_t* high, uint32_t count, int64_t* out) {
  for (uint32_t i = 0; i < count; ++i) out[i] = int64_t(uint64_t(low[i]) | uint64_t(high[i]) << 32);
}

}  // namespace

// Writes for each group what the fastest tier has: `tiers` and `slots` are (groups, known).
void Forest::fill_match(Space&, const Path& path, uint32_t known, uint8_t* tiers, int64_t* slots) {
  for (size_t number = 0; number < path.size(); ++number) {
    const Step& step = path[number];
    const Node& here = node(step.node);
    if (number + 2 < path.size()) {
      const Node& later = node(path[number + 2].node);
      const TileId tile = tile_of(later, 0);
      __builtin_prefetch(tiles_.low(tile, 0));
      __builtin_prefetch(tiles_.high(tile, 0));
    }
    // Slots of positions [from, to) of one column, all of them held.
    auto copy = [&](uint32_t column, uint32_t from, uint32_t to, int64_t* out) {
      uint32_t at = here.offset + from;
      const uint32_t end = here.offset + to;
      if (end - at <= 8 * Tiles::kBlocks) {  // short: tile by tile
        while (at < end) {
          const TileId tile = tile_of(here, at / Tiles::kBlocks);
          const uint32_t block = at % Tiles::kBlocks, some = std::min(Tiles::kBlocks - block, end - at);
          const uint32_t* low = tiles_.low(tile, column);
          const uint8_t* high = tiles_.high(tile, column);
          if (some == Tiles::kBlocks) {
            widen_tile(low, high, out);
          } else {
            widen(low + block, high + block, some, out);
          }
          out += some;
          at += some;
        }
        return;
      }
      while (at < end) {
        uint32_t index = at / Tiles::kBlocks;
        const TileId first = tile_of(here, index);
        TileId last = first;
        uint32_t stop = (index + 1) * Tiles::kBlocks;
        while (stop < end && Tiles::adjacent(last, tile_of(here, index + 1))) {
          last = tile_of(here, ++index);
          stop += Tiles::kBlocks;
        }
        const uint32_t some = std::min(stop, end) - at, block = at % Tiles::kBlocks;
        widen(tiles_.low(first, column) + block, tiles_.high(first, column) + block, some, out);
        out += some;
        at += some;
      }
    };
    for (uint32_t group = 0; group < groups_; ++group) {
      const Column* all = columns_of(const_cast<Node&>(here)) + group * shared_.tiers;
      uint8_t* tier_out = tiers + size_t(group) * known + step.base;
      int64_t* slot_out = slots + size_t(group) * known + step.base;
      uint32_t done = 0;
      bool gaps = false;
      for (uint32_t tier = 0; tier < shared_.tiers; ++tier) gaps = gaps || !all[tier].prefix();
      if (!gaps) {
        for (uint32_t tier = 0; tier < shared_.tiers && done < step.count; ++tier) {
          const uint32_t stop = std::min(all[tier].top, step.count);
          if (stop <= done) continue;
          copy(group * shared_.tiers + tier, done, stop, slot_out + done);
          if (stop - done <= 8 && step.base + done + 8 <= known) {  // what is written too much is written again
            const uint64_t eight = tier * uint64_t(0x0101010101010101);
            std::memcpy(tier_out + done, &eight, sizeof eight);
          } else {
            std::memset(tier_out + done, int(tier), stop - done);
          }
          done = stop;
        }
      } else {
        for (; done < step.count; ++done) {
          tier_out[done] = kNoTier;
          slot_out[done] = kNoSlot;
          for (uint32_t tier = 0; tier < shared_.tiers; ++tier) {
            if (done >= all[tier].top) continue;
            const uint64_t slot = slot_in(here, done, group * shared_.tiers + tier);
            if (slot == kEmpty) continue;
            tier_out[done] = uint8_t(tier);
            slot_out[done] = int64_t(slot);
            break;
          }
        }
      }
      for (; done < step.count; ++done) {
        tier_out[done] = kNoTier;
        slot_out[done] = kNoSlot;
      }
    }
  }
}

// The longest prefix that every group's rule can be supplied for (flexkv_core/index/coverage.py says it in NumPy).
uint32_t Forest::covered(Space& space, const Path& path, uint32_t known, const uint8_t* tiers) {
  if (groups_ == 1 && space.rules[0].coverage == Coverage::kAll) {
    for (const Step& step : path) {
      const uint32_t hole = groups_of(node(step.node))[0].hole;
      if (hole < step.count) return step.base + hole;
    }
    return known;
  }
  std::vector<uint32_t> run(groups_, 0);  // held positions right before the boundary
  uint32_t longest = 0;
  for (uint32_t boundary = 1; boundary <= known; ++boundary) {
    bool supplied = true;
    for (uint32_t group = 0; group < groups_; ++group) {
      run[group] = tiers[size_t(group) * known + boundary - 1] == kNoTier ? 0 : run[group] + 1;
      const Rule& rule = space.rules[group];
      const uint32_t span = rule.coverage == Coverage::kAll      ? boundary
                            : rule.coverage == Coverage::kWindow ? std::min(rule.window, boundary)
                                                                 : 1;
      supplied = supplied && run[group] >= span;
    }
    if (supplied) longest = boundary;
  }
  return longest;
}

// `slots` has `count` entries; what the path does not reach is kNoSlot.
void Forest::fill_residency(const Path& path, uint32_t number, uint32_t count, int64_t* slots) {
  std::fill(slots, slots + count, kNoSlot);
  for (const Step& step : path) {
    const Node& here = node(step.node);
    const uint32_t stop = std::min(columns(step.node)[number].top, step.count);
    for (uint32_t at = 0; at < stop; ++at) {
      const uint64_t slot = slot_in(here, at, number);
      if (slot != kEmpty) slots[step.base + at] = int64_t(slot);
    }
  }
}

bool Forest::find_range(uint32_t tier, uint64_t start, uint64_t stop, std::vector<Held>& found) {
  bool free = true;
  for (const auto& space : spaces_) {
    if (!space) continue;
    for (NodeId top : {space->top, space->orphans}) {
      each_below(top, [&](NodeId id) {
        const Node& here = node(id);
        for (uint32_t number = tier; number < columns_; number += shared_.tiers) {
          const Column& column = columns(id)[number];
          for (uint32_t at = 0; at < column.top; ++at) {
            const uint64_t slot = slot_in(here, at, number);
            if (slot < start || slot >= stop || slot == kEmpty) continue;
            found.push_back({id, number, at});
            free = free && !is_pinned(column, at);
          }
        }
      });
    }
  }
  return free;
}

void Forest::copies(Space& space, uint32_t number, CopyRows& rows) {
  for (NodeId top : {space.top, space.orphans}) {
    each_below(top, [&](NodeId id) {
      const Node& here = node(id);
      const uint32_t stop = columns(id)[number].top;
      for (uint32_t at = 0; at < stop; ++at) {
        const uint64_t slot = slot_in(here, at, number);
        if (slot == kEmpty) continue;
        const uint8_t* name = key_in(here, at);
        const uint8_t* parent = parent_key(space, id, at);
        rows.keys.insert(rows.keys.end(), name, name + kKeyBytes);
        rows.parents.insert(rows.parents.end(), parent, parent + kKeyBytes);
        rows.depths.push_back(here.start + at);
        rows.slots.push_back(int64_t(slot));
      }
    });
  }
}

void Forest::prefetch(NodeId id, uint32_t column) const {
  const uint8_t* memory = reinterpret_cast<const uint8_t*>(&node(id));
  __builtin_prefetch(memory);
  __builtin_prefetch(memory + 64);
  __builtin_prefetch(memory + 128);
  __builtin_prefetch(&links_[column][id]);
}

// The last tile of a node: its candidates for eviction lie there.
void Forest::prefetch_blocks(NodeId id) {
  const Node& here = node(id);
  if (here.length == 0) return;
  const TileId tile = tile_of(here, (here.offset + here.length - 1) / Tiles::kBlocks);
  __builtin_prefetch(tiles_.key(tile, 0));
  __builtin_prefetch(tiles_.low(tile, 0));
  __builtin_prefetch(tiles_.high(tile, 0));
}

// What taking a leaf out of the tree will look at.
void Forest::prefetch_pruning(NodeId id) {
  const Node& here = node(id);
  if (here.next != kNone) __builtin_prefetch(&node(here.next));
  if (here.previous != kNone) __builtin_prefetch(&node(here.previous));
  if (here.length != 0) by_first_key_.prefetch(key_in(here, 0));
}

}  // namespace flexkv::index
