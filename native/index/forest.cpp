// Nodes: walks, growth, split, merge, trimming. See forest.hpp.
#include "forest.hpp"

#include <cstddef>

namespace flexkv::index {

Forest::Forest(Shared& shared, uint32_t groups)
    : shared_(shared), groups_(groups), columns_(groups * shared.tiers),
group_bytes_((groups * sizeof(GroupState) + 7) / 8 * 8),
      stride_(sizeof(Node) + group_bytes_ + columns_ * sizeof(Column)), tiles_(columns_), links_(columns_) {}

Forest::~Forest() {
  for (NodeId id = 0; id < next_node_; ++id) {  // not by the trees: a change may have broken off half-way
    if (node(id).tile_capacity != 0) std::free(node(id).tiles.many);
  }
  for (uint8_t* chunk : node_chunks_) std::free(chunk);
}

// ---------------------------------------------------------------- namespaces

Space& Forest::add_space(const uint8_t* root, std::vector<Rule> rules, std::vector<Contest*> contests) {
  auto made = std::make_unique<Space>();
  Space& space = *made;
  std::memcpy(space.root, root, kKeyBytes);
  space.rules = std::move(rules);
  space.contests = std::move(contests);
  if (free_spaces_.empty()) {
    space.number = uint32_t(spaces_.size());
    spaces_.push_back(std::move(made));
  } else {
    space.number = free_spaces_.back();
    free_spaces_.pop_back();
    spaces_[space.number] = std::move(made);
  }
  for (uint32_t column = 0; column < columns_; ++column) {
    const bool listed = shared_.policies[column % shared_.tiers].kind != Policy::Kind::kCustom;
    space.queues.emplace_back(*this, space.root, column, column / shared_.tiers, 0, listed);
    space.queues.emplace_back(*this, space.root, column, column / shared_.tiers, Link::kSecond, listed);
  }
  take_tops(space);
  return space;
}

void Forest::take_tops(Space& space) {
  space.top = take_node(space.number, 0);
  space.orphans = take_node(space.number, 0);
  for (uint32_t group = 0; group < groups_; ++group) groups_of(node(space.orphans))[group].stranded = 1;
}

void Forest::free_space(Space& space) {
  for (Queue& queue : space.queues) space.contests[queue.column]->retired.leave(&queue);
  give_node(space.top);
  give_node(space.orphans);
  free_spaces_.push_back(space.number);
  spaces_[space.number].reset();
}

void Forest::retire(Space& space) {
  space.retired = true;
  for (size_t number = 0; number < space.queues.size(); ++number) {
    Queue& queue = space.queues[number];
    Contest& contest = *space.contests[queue.column];
    contest.live[number % 2].leave(&queue);
    contest.retired.fix(&queue);
  }
}

// ---------------------------------------------------------------- walks

// The child whose first block has this key.
NodeId Forest::find_child(NodeId parent, const uint8_t* wanted) {
  return by_first_key_.find(wanted, [&](NodeId id) {
    const Node& child = node(id);
    return child.parent == parent && same_key(key_in(child, 0), wanted);
  });
}

// The child that was taken last is tried first: it lies in front of its siblings. Not below a top, where there may be
// millions.
uint32_t Forest::walk(Space& space, const uint8_t* keys, uint32_t count, Path& path) {
  path.clear();
  NodeId at = space.top;
  uint32_t known = 0;
  while (known < count) {
    const uint8_t* rest = keys + size_t(known) * kKeyBytes;
    const Node& above = node(at);
    NodeId child = at == space.top ? kNone : above.first_child;
    uint32_t found = 0;
    if (child != kNone) found = common(node(child), rest, std::min(node(child).length, count - known));
    if (found == 0 && (child == kNone ? above.first_child != kNone : node(child).next != kNone)) {
      child = find_child(at, rest);
      if (child == kNone) break;
      found = common(node(child), rest, std::min(node(child).length, count - known));
      if (at != space.top) {
        unlink(child);
        hang(at, child);
      }
    }
    if (found == 0) break;
    __builtin_prefetch(columns_of(node(child)) + 1);  // for what follows the walk
    path.push_back({child, known, found});
    known += found;
    if (found < node(child).length) break;
    at = child;
  }
  return known;
}

// ---------------------------------------------------------------- nodes

NodeId Forest::take_node(uint32_t space, uint32_t start) {
  NodeId id;
  if (free_node_ != kNone) {
    id = free_node_;
    free_node_ = node(id).next;
  } else {
    if (next_node_ == node_chunks_.size() * kNodeChunk) {
      if (node_chunks_.size() == Link::kEdge / kNodeChunk) throw std::bad_alloc();  // numbers have 31 bits
      if (node_chunks_.size() == node_chunks_.capacity()) node_chunks_.reserve(2 * node_chunks_.size() + 8);
      void* memory = std::aligned_alloc(64, (kNodeChunk * stride_ + 63) / 64 * 64);
      if (memory == nullptr) throw std::bad_alloc();
      node_chunks_.push_back(static_cast<uint8_t*>(memory));
      for (auto& links : links_) links.resize(node_chunks_.size() * kNodeChunk);
    }
    id = next_node_++;
  }
  ++nodes_in_use_;
  Node& made = *new (&node(id)) Node;
  made.space = space;
  made.start = start;
  for (uint32_t column = 0; column < columns_; ++column) new (columns_of(made) + column) Column;
  for (uint32_t group = 0; group < groups_; ++group) groups_of(made)[group] = {GroupState::kNoHole, 0};
  return id;
}

void Forest::give_node(NodeId id) {
  Node& gone = node(id);
  if (gone.tile_capacity != 0) {
    tile_list_bytes_ -= gone.tile_capacity * sizeof(TileId);
    std::free(gone.tiles.many);
    gone.tile_capacity = 0;
  }
  for (uint32_t column = 0; column < columns_; ++column) drop_extra(columns_of(gone)[column]);
  gone.dirty = false;
  gone.length = 0;
  gone.parent = kNone;
  gone.next = free_node_;
  free_node_ = id;
  --nodes_in_use_;
}

void Forest::reserve_tiles(Node& here, uint32_t count) {
  const uint32_t capacity = here.tile_capacity == 0 ? 2 : here.tile_capacity;
  if (count <= capacity) return;
  const uint32_t wanted = std::max(count, here.tile_capacity == 0 ? count : capacity + capacity / 4);
  TileId* list = static_cast<TileId*>(
      std::realloc(here.tile_capacity == 0 ? nullptr : here.tiles.many, size_t(wanted) * sizeof(TileId)));
  if (list == nullptr) throw std::bad_alloc();
  if (here.tile_capacity == 0) std::memcpy(list, here.tiles.few, sizeof here.tiles.few);
  tile_list_bytes_ += (wanted - here.tile_capacity) * sizeof(TileId);
  here.tiles.many = list;
  here.tile_capacity = wanted;
}

void Forest::shrink_tiles(Node& here, uint32_t count) {
  TileId* const old = here.tiles.many;
  tile_list_bytes_ -= here.tile_capacity * sizeof(TileId);
  if (count <= std::size(here.tiles.few)) {
    std::copy(old, old + count, here.tiles.few);
    here.tile_capacity = 0;
    std::free(old);
    return;
  }
  TileId* list = static_cast<TileId*>(std::realloc(old, size_t(count) * sizeof(TileId)));
  if (list != nullptr) {
    here.tiles.many = list;
    here.tile_capacity = count;
  }
  tile_list_bytes_ += here.tile_capacity * sizeof(TileId);
}

void Forest::assign_tiles(Node& here, const std::vector<TileId>& tiles) {
  if (here.tile_capacity != 0) {
    tile_list_bytes_ -= here.tile_capacity * sizeof(TileId);
    std::free(here.tiles.many);
    here.tile_capacity = 0;
  }
  reserve_tiles(here, uint32_t(tiles.size()));
  std::copy(tiles.begin(), tiles.end(), here.tile_capacity == 0 ? here.tiles.few : here.tiles.many);
}

void Forest::hang(NodeId parent, NodeId child) {
  Node &above = node(parent), &below = node(child);
  below.parent = parent;
  below.previous = kNone;
  below.next = above.first_child;
  if (below.next != kNone) node(below.next).previous = child;
  above.first_child = child;
}

void Forest::unlink(NodeId child) {
  Node& gone = node(child);
  if (gone.previous != kNone) {
    node(gone.previous).next = gone.next;
  } else {
    node(gone.parent).first_child = gone.next;
  }
  if (gone.next != kNone) node(gone.next).previous = gone.previous;
}

// Puts `new_child` where `old_child` is among its parent's children.
void Forest::replace_child(NodeId old_child, NodeId new_child) {
  Node &old_node = node(old_child), &new_node = node(new_child);
  new_node.parent = old_node.parent;
  new_node.next = old_node.next;
  new_node.previous = old_node.previous;
  if (new_node.next != kNone) node(new_node.next).previous = new_child;
  if (new_node.previous != kNone) {
    node(new_node.previous).next = new_child;
  } else {
    node(new_node.parent).first_child = new_child;
  }
}

NodeId Forest::new_child(Space& space, NodeId parent, uint32_t start, const uint8_t* keys, uint32_t count) {
  const NodeId id = take_node(space.number, start);
  hang(parent, id);
  for (uint32_t group = 0; group < groups_; ++group) {
    groups_of(node(id))[group].stranded =
        groups_of(node(parent))[group].stranded || leads_to_hole(node(parent), group);
  }
  by_first_key_.insert(keys, id);
  extend(id, keys, count);
  return id;
}

// Adds positions without copies to a node without children.
void Forest::extend(NodeId id, const uint8_t* keys, uint32_t count) {
  Node& here = node(id);
  const uint32_t old_length = here.length, old_tiles = tiles_for(here.offset, old_length);
  const uint32_t tiles = tiles_for(here.offset, old_length + count);
  reserve_tiles(here, tiles);
  TileId* list = here.tile_capacity == 0 ? here.tiles.few : here.tiles.many;
  for (uint32_t index = old_tiles; index < tiles; ++index) list[index] = tiles_.take();
  here.length += count;
  space_of(id).positions += count;
  for (uint32_t done = 0; done < count;) {
    const uint32_t at = here.offset + old_length + done, block = at % Tiles::kBlocks;
    const uint32_t some = std::min(Tiles::kBlocks - block, count - done);
    std::memcpy(tiles_.key(list[at / Tiles::kBlocks], block), keys + size_t(done) * kKeyBytes, some * kKeyBytes);
    done += some;
  }
  const Space& space = space_of(id);
  for (uint32_t group = 0; group < groups_; ++group) {
    GroupState& state = groups_of(here)[group];
    if (space.rules[group].coverage == Coverage::kAll && state.hole == GroupState::kNoHole) state.hole = old_length;
  }
  if (recovering_) {
    note_tiles(id, old_tiles == 0 ? 0 : old_tiles - 1);
    note_keys(id, old_length, here.length);
  }
}

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

// Nothing is left but the tops of trees: gives the memory of nodes back.
void Forest::begin_again() {
  for (uint8_t* chunk : node_chunks_) std::free(chunk);
  node_chunks_ = {};
  for (auto& links : links_) links = {};
  extras_ = {};
  free_extras_ = {};
  next_node_ = 0;
  free_node_ = kNone;
  nodes_in_use_ = 0;
  for (const auto& space : spaces_) {
    if (space) take_tops(*space);
  }
}

size_t Forest::memory_bytes() const {
  size_t bytes = node_chunks_.size() * kNodeChunk * stride_ + tiles_.memory_bytes() + by_first_key_.memory_bytes() +
                 tile_list_bytes_ + columns_ * node_chunks_.size() * kNodeChunk * sizeof(Link) + extras_.size() * sizeof(Extra) + tile_notes_.capacity() * sizeof(TileNote) +
                 tile_by_key_.memory_bytes() + orphans_by_parent_.memory_bytes() +
                 orphan_parents_.size() * (sizeof(Name) + 32);
  for (const Extra& extra : extras_) bytes += extra.memory_bytes();
  for (const auto& space : spaces_) {
    if (!space) continue;
    bytes += sizeof(Space);
    for (const Queue& queue : space->queues) bytes += sizeof queue + queue.memory_bytes();
  }
  return bytes;
}

}  // namespace flexkv::index
