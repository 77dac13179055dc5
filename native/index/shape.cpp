// How nodes change shape: split, merge, trimmed, pruned. See forest.hpp.
#include "forest.hpp"

#include <cstddef>

namespace flexkv::index {

// A candidate is in another node now.
void Forest::rename_candidate(Space& space, uint32_t column, NodeId from, NodeId to) {
  const Link& link = links_[column][from];
  if (!link.absent()) queue_of(space, column, link.second()).rename(from, to);
}

void Forest::give_tile(TileId tile) {
  if (recovering_ && tile < tile_notes_.size()) tile_notes_[tile] = {};
  tiles_.give(tile);
}

void Forest::copy_block(TileId from, uint32_t from_block, TileId to, uint32_t to_block) {
  std::memcpy(tiles_.key(to, to_block), tiles_.key(from, from_block), kKeyBytes);
  for (uint32_t column = 0; column < columns_; ++column) {
    tiles_.set_slot(to, to_block, column, tiles_.slot(from, from_block, column));
  }
}

// Makes the first `position` positions a node of their own, which is returned; `id` keeps the others and its children.
NodeId Forest::split(NodeId id, uint32_t position) {
  const NodeId head_id = take_node(node(id).space, node(id).start);
  Node &tail = node(id), &head = node(head_id);
  Space& space = space_of(id);
  head.length = position;
  head.offset = tail.offset;
  by_first_key_.replace(key_in(tail, 0), id, head_id);

  // Tiles. One that both have is copied for the head.
  const uint32_t cut = tail.offset + position, tiles = tiles_for(tail.offset, tail.length);
  std::vector<TileId> list(tiles);
  for (uint32_t index = 0; index < tiles; ++index) list[index] = tile_of(tail, index);
  std::vector<TileId> upper(list.begin(), list.begin() + cut / Tiles::kBlocks);
  if (cut % Tiles::kBlocks != 0) {
    const TileId shared = list[cut / Tiles::kBlocks], copy = tiles_.take();
    const uint32_t first = cut / Tiles::kBlocks == 0 ? tail.offset : 0;
    for (uint32_t block = first; block < cut % Tiles::kBlocks; ++block) copy_block(shared, block, copy, block);
    upper.push_back(copy);
  }
  assign_tiles(head, upper);
  assign_tiles(tail, std::vector<TileId>(list.begin() + cut / Tiles::kBlocks, list.end()));
  tail.offset = cut % Tiles::kBlocks;
  tail.start += position;
  tail.length -= position;

  for (uint32_t column = 0; column < columns_; ++column) {
    Column &above = columns_of(head)[column], &below = columns_of(tail)[column];
    const uint32_t top = below.top, held = below.held;
    above.set_state(below.state());
    if (below.prefix()) {
      above.held = above.top = std::min(top, position);
    } else {
      for (uint32_t at = 0; at < std::min(top, position); ++at) {
        if (slot_in(head, at, column) == kEmpty) continue;
        ++above.held;
        above.top = at + 1;
      }
    }
    below.held = held - above.held;
    below.top = top > position ? top - position : 0;
    above.branches = below.populated() ? 1 : 0;
    if (below.extra != kNone) {
      Extra& lower = extras_[below.extra];
      Extra both;
      std::swap(both, lower);
      for (const Run& run : both.runs) {
        if (run.end > position) append_run(lower.runs, run.end == kNone ? kNone : run.end - position, run.state);
      }
      Extra upper_extra;
      for (const Run& run : both.runs) {
        append_run(upper_extra.runs, run.end >= position ? kNone : run.end, run.state);
        if (run.end >= position) break;
      }
      for (const PinRun& run : both.pins) {
        if (run.start < position) upper_extra.pins.push_back({run.start, std::min(run.stop, position), run.count});
        if (run.stop > position) {
          lower.pins.push_back({std::max(run.start, position) - position, run.stop - position, run.count});
        }
      }
      if (!upper_extra.empty()) extra_of(above) = std::move(upper_extra);
      tidy_extra(above);
      tidy_extra(below);
    }
    if (below.held == 0) rename_candidate(space, column, id, head_id);  // where it has one, it is in the head now
  }

  for (uint32_t group = 0; group < groups_; ++group) {
    GroupState &above = groups_of(head)[group], &below = groups_of(tail)[group];
    above.stranded = below.stranded;
    above.hole = GroupState::kNoHole;
    if (below.hole == GroupState::kNoHole) continue;
    if (below.hole < position) {
      above.hole = below.hole;
      uint32_t at = 0;
      while (at < tail.length && held_by_any(tail, group, at)) ++at;
      below.hole = at < tail.length ? at : GroupState::kNoHole;
    } else {
      below.hole -= position;
    }
  }

  replace_child(id, head_id);
  tail.parent = head_id;
  tail.next = tail.previous = kNone;
  head.first_child = id;
  by_first_key_.insert(key_in(tail, 0), id);
  for (uint32_t group = 0; group < groups_; ++group) {
    groups_of(tail)[group].stranded = groups_of(head)[group].stranded || leads_to_hole(head, group);
  }
  if (head.parent == space.orphans) rename_orphan(id, head_id);
  if (recovering_) {
    note_tiles(head_id, 0);
    if (cut % Tiles::kBlocks != 0) note_keys(head_id, position - std::min(position, cut % Tiles::kBlocks), position);
  }
  return head_id;
}

// Joins the tiles of a node and its only child into the child's list.
void Forest::merge_tiles(Node& upper, Node& lower) {
  const uint32_t upper_count = tiles_for(upper.offset, upper.length);
  const uint32_t lower_count = tiles_for(lower.offset, lower.length);
  std::vector<TileId> list;
  list.reserve(upper_count + lower_count);
  const uint32_t end = (upper.offset + upper.length) % Tiles::kBlocks;
  if (end == lower.offset) {  // nothing moves but the blocks of one shared tile
    for (uint32_t index = 0; index < upper_count; ++index) list.push_back(tile_of(upper, index));
    if (end != 0) {
      const TileId from = list.back(), to = tile_of(lower, 0);
      list.pop_back();
      const uint32_t first = upper_count == 1 ? upper.offset : 0;
      for (uint32_t block = first; block < end; ++block) copy_block(from, block, to, block);
      give_tile(from);
    }
    for (uint32_t index = 0; index < lower_count; ++index) list.push_back(tile_of(lower, index));
    lower.offset = upper.offset;
  } else if (lower.length <= upper.length) {  // the child's blocks move
    for (uint32_t index = 0; index < upper_count; ++index) list.push_back(tile_of(upper, index));
    for (uint32_t position = 0; position < lower.length; ++position) {
      const uint32_t to = upper.offset + upper.length + position, from = lower.offset + position;
      if (to / Tiles::kBlocks == list.size()) list.push_back(tiles_.take());
      copy_block(tile_of(lower, from / Tiles::kBlocks), from % Tiles::kBlocks, list.back(), to % Tiles::kBlocks);
    }
    for (uint32_t index = lower_count; index-- > 0;) give_tile(tile_of(lower, index));
    lower.offset = upper.offset;
  } else {  // the parent's blocks move, to lie right before the child's
    const uint32_t fresh = upper.length <= lower.offset ? 0 : tiles_for(0, upper.length - lower.offset);
    const uint32_t offset = fresh * Tiles::kBlocks + lower.offset - upper.length;
    for (uint32_t index = 0; index < fresh; ++index) list.push_back(tiles_.take());
    for (uint32_t index = 0; index < lower_count; ++index) list.push_back(tile_of(lower, index));
    for (uint32_t position = 0; position < upper.length; ++position) {
      const uint32_t to = offset + position, from = upper.offset + position;
      copy_block(tile_of(upper, from / Tiles::kBlocks), from % Tiles::kBlocks, list[to / Tiles::kBlocks],
                 to % Tiles::kBlocks);
    }
    for (uint32_t index = upper_count; index-- > 0;) give_tile(tile_of(upper, index));
    lower.offset = uint8_t(offset);
  }
  assign_tiles(lower, list);
}

// Makes a node and its only child one. The child stays, so that its children keep their parent.
bool Forest::try_merge(NodeId parent) {
  if (sentinel(node(parent))) return false;
  const NodeId id = node(parent).first_child;
  if (id == kNone || node(id).next != kNone) return false;
  Node &upper = node(parent), &lower = node(id);
  const bool aligned = (upper.offset + upper.length) % Tiles::kBlocks == lower.offset;
  if (!aligned && std::min(upper.length, lower.length) > kMergeLimit) return false;
  Space& space = space_of(parent);
  const uint32_t shift = upper.length;

  by_first_key_.erase(key_in(lower, 0), id);
  by_first_key_.replace(key_in(upper, 0), parent, id);
  for (uint32_t column = 0; column < columns_; ++column) {
    Column &above = columns_of(upper)[column], &below = columns_of(lower)[column];
    rename_candidate(space, column, parent, id);
    const bool same = above.extra == kNone && below.extra == kNone && (above.held == 0 || below.held == 0 ||
                                                                       above.state() == below.state());
    if (same) {
      if (below.held == 0) below.set_state(above.state());
    } else {
      Extra joined;
      auto add_runs = [&](const Column& from, uint32_t start, uint32_t stop) {
        if (from.extra == kNone || extras_[from.extra].runs.empty()) {
          append_run(joined.runs, stop, from.state());
          return;
        }
        for (const Run& run : extras_[from.extra].runs) {
          const uint32_t end = run.end == kNone || start + run.end >= stop ? stop : start + run.end;
          append_run(joined.runs, end, run.state);
          if (end == stop) break;
        }
      };
      add_runs(above, 0, shift);
      add_runs(below, shift, kNone);
      if (above.extra != kNone) joined.pins = extras_[above.extra].pins;
      if (below.extra != kNone) {
        for (const PinRun& run : extras_[below.extra].pins) {
          const uint32_t start = run.start + shift, stop = run.stop + shift;
          if (!joined.pins.empty() && joined.pins.back().stop == start && joined.pins.back().count == run.count) {
            joined.pins.back().stop = stop;
          } else {
            joined.pins.push_back({start, stop, run.count});
          }
        }
      }
      extra_of(below) = std::move(joined);
      tidy_extra(below);
    }
    below.top = below.top != 0 ? below.top + shift : above.top;
    below.held += above.held;
  }
  for (uint32_t group = 0; group < groups_; ++group) {
    const GroupState &above = groups_of(upper)[group];
    GroupState& below = groups_of(lower)[group];
    below.stranded = above.stranded;
    if (above.hole != GroupState::kNoHole) {
      below.hole = above.hole;
    } else if (below.hole != GroupState::kNoHole) {
      below.hole += shift;
    }
  }
  const uint32_t moved = recovering_ ? shift + lower.length : 0;
  merge_tiles(upper, lower);
  lower.start = upper.start;
  lower.length += shift;
  replace_child(parent, id);
  if (upper.parent == space.orphans) rename_orphan(parent, id);
  give_node(parent);
  if (recovering_) {
    note_tiles(id, 0);
    note_keys(id, 0, moved);
  }
  return true;
}

// Takes the positions at a childless node's end that nothing holds out of the tree; false if none are left.
bool Forest::trim(NodeId id) {
  Node& here = node(id);
  uint32_t length = 0;
  for (uint32_t column = 0; column < columns_; ++column) length = std::max(length, columns_of(here)[column].top);
  if (length == here.length) return true;
  const uint32_t old_tiles = tiles_for(here.offset, here.length);
  const uint32_t tiles = length == 0 ? 0 : tiles_for(here.offset, length);
  if (length == 0) by_first_key_.erase(key_in(here, 0), id);
  for (uint32_t index = old_tiles; index-- > tiles;) {
    give_tile(tile_of(here, index));
  }
  space_of(id).positions -= here.length - length;
  here.length = length;
  if (tiles != 0 && tiles <= here.tile_capacity / 4) shrink_tiles(here, tiles);
  for (uint32_t group = 0; group < groups_; ++group) {
    GroupState& state = groups_of(here)[group];
    if (state.hole != GroupState::kNoHole && state.hole >= length) state.hole = GroupState::kNoHole;
  }
  return length != 0;
}

void Forest::mark_dirty(NodeId id, std::vector<NodeId>& dirty) {
  if (node(id).dirty) return;
  node(id).dirty = true;
  dirty.push_back(id);
}

void Forest::prune(std::vector<NodeId>& dirty) {
  for (NodeId id : dirty) {
    if (!node(id).dirty) continue;
    node(id).dirty = false;
    while (!sentinel(node(id)) && node(id).first_child == kNone && !trim(id)) {
      const NodeId parent = node(id).parent;
      Space& space = space_of(id);
      if (parent == space.orphans) forget_orphan(space, id);
      unlink(id);
      give_node(id);
      id = parent;
      if (sentinel(node(id))) break;
      if (node(id).first_child != kNone) {
        try_merge(id);
        break;
      }
    }
  }
  dirty.clear();
  const size_t tops = 2 * (spaces_.size() - free_spaces_.size());
  if (nodes_in_use_ == tops && node_chunks_.size() > 2 * (tops / kNodeChunk + 1)) begin_again();
}

}  // namespace flexkv::index
