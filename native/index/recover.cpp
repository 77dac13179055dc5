// Recovery: copies that survived, in any order, each with its parent's key. See forest.hpp.
//
// While it lasts, a map tells for every key of the trees which tile it lies in. An orphan hangs below a top of its own
// until its parent appears.
#include <numeric>

#include "forest.hpp"
#include "ghost.hpp"

namespace flexkv::index {

// ---------------------------------------------------------------- orphans

void Forest::add_orphan(Space& space, NodeId id, const uint8_t* parent) {
  std::memcpy(orphan_parents_[id].bytes, parent, kKeyBytes);
  orphans_by_parent_.insert(parent, id);
  ++space.orphan_count;
}

void Forest::rename_orphan(NodeId old_id, NodeId new_id) {
  auto entry = orphan_parents_.extract(old_id);
  orphans_by_parent_.replace(entry.mapped().bytes, old_id, new_id);
  entry.key() = new_id;
  orphan_parents_.insert(std::move(entry));
}

void Forest::forget_orphan(Space& space, NodeId id) {
  const auto found = orphan_parents_.find(id);
  orphans_by_parent_.erase(found->second.bytes, id);
  orphan_parents_.erase(found);
  --space.orphan_count;
}

// The key of the position above one.
const uint8_t* Forest::parent_key(const Space& space, NodeId id, uint32_t position) {
  const Node& here = node(id);
  if (position != 0) return key_in(here, position - 1);
  if (here.parent == space.top) return space.root;
  if (here.parent == space.orphans) return orphan_parents_.at(id).bytes;
  return key_in(node(here.parent), node(here.parent).length - 1);
}

// Whether orphans may wait for a position with this key.
bool Forest::awaited(const uint8_t* wanted) {
  return orphans_by_parent_.find(wanted, [&](uint32_t orphan) {
    return same_key(orphan_parents_.at(orphan).bytes, wanted);
  }) != kNone;
}

// A position has come into being: orphans that wait for it become its children. It must be its node's last.
void Forest::join_orphans(Space& space, NodeId id, uint32_t position) {
  if (space.orphan_count == 0) return;
  const uint8_t* name = key(id, position);
  const uint32_t depth = node(id).start + position + 1;
  std::vector<NodeId> joining;
  orphans_by_parent_.find(name, [&](NodeId orphan) {
    const Node& there = node(orphan);
    if (there.space == space.number && there.start == depth &&
        same_key(orphan_parents_.at(orphan).bytes, name)) {
      joining.push_back(orphan);
    }
    return false;
  });
  if (joining.empty()) return;
  for (NodeId orphan : joining) {
    forget_orphan(space, orphan);
    for (uint32_t number = 0; number < columns_; ++number) {
      if (columns(orphan)[number].populated()) unpopulated(orphan, number);
    }
    unlink(orphan);
    hang(id, orphan);
    for (uint32_t number = 0; number < columns_; ++number) {
      if (columns(orphan)[number].populated()) populated(orphan, number);
    }
  }
  for (uint32_t group = 0; group < groups_; ++group) spread_stranded(id, group);
  if (!recovering_) try_merge(id);
}

// ---------------------------------------------------------------- where each key lies

void Forest::begin_recovery() {
  if (recovering_) return;
  recovering_ = true;
  for (const auto& space : spaces_) {
    if (!space) continue;
    for (NodeId top : {space->top, space->orphans}) {
      each_below(top, [&](NodeId id) {
        if (sentinel(node(id))) return;
        note_tiles(id, 0);
        note_keys(id, 0, node(id).length);
      });
    }
  }
}

void Forest::end_recovery() {
  if (!recovering_) return;
  recovering_ = false;
  tile_by_key_ = KeyMap();
  tile_notes_ = std::vector<TileNote>();
  // What joined piece by piece becomes one.
  for (const auto& space : spaces_) {
    if (!space) continue;
    std::vector<NodeId> waiting{space->top, space->orphans};
    while (!waiting.empty()) {
      NodeId id = waiting.back();
      waiting.pop_back();
      for (;;) {
        const NodeId child = node(id).first_child;
        if (child == kNone || node(child).next != kNone || !try_merge(id)) break;
        id = child;
      }
      for (NodeId child = node(id).first_child; child != kNone; child = node(child).next) waiting.push_back(child);
    }
  }
}

void Forest::note_tiles(NodeId id, uint32_t first_tile) {
  const Node& here = node(id);
  if (tile_notes_.size() < tiles_.ever()) tile_notes_.resize(std::max<size_t>(tiles_.ever(), tile_notes_.size() * 5 / 4));
  for (uint32_t index = first_tile; index < tiles_for(here.offset, here.length); ++index) {
    tile_notes_[tile_of(here, index)] = {id, int64_t(here.start) - here.offset + int64_t(index) * Tiles::kBlocks};
  }
}

void Forest::note_keys(NodeId id, uint32_t start, uint32_t stop) {
  const Node& here = node(id);
  for (uint32_t at = start; at < stop; ++at) {
    const TileId tile = tile_of(here, (here.offset + at) / Tiles::kBlocks);
    const uint8_t* name = key_in(here, at);
    if (tile_by_key_.find(name, [&](uint32_t number) { return number == tile; }) == kNone) tile_by_key_.insert(name, tile);
  }
}

Forest::Place Forest::locate(Space& space, const uint8_t* wanted) {
  Place place{kNone, 0};
  tile_by_key_.find(wanted, [&](uint32_t tile) {
    if (tile >= tile_notes_.size() || tile_notes_[tile].owner == kNone) return false;
    const TileNote& note = tile_notes_[tile];
    const Node& owner = node(note.owner);
    if (owner.space != space.number) return false;
    for (uint32_t block = 0; block < Tiles::kBlocks; ++block) {
      const int64_t position = note.depth + block - owner.start;
      if (position < 0 || position >= owner.length || !same_key(tiles_.key(tile, block), wanted)) continue;
      place = {note.owner, uint32_t(position)};
      return true;
    }
    return false;
  });
  return place;
}

// ---------------------------------------------------------------- recovery

// Finds or makes the position of a copy; `found.node` is kNone if the copy contradicts what is known.
void Forest::recovered(Space& space, const uint8_t* wanted, const uint8_t* parent, uint32_t depth, Place& found) {
  found = locate(space, wanted);
  if (found.node != kNone) {
    if (node(found.node).start + found.position != depth ||
        !same_key(parent_key(space, found.node, found.position), parent)) {
      found.node = kNone;
    }
    return;
  }
  NodeId at = space.top;
  if ((depth == 0) != same_key(parent, space.root)) return;
  if (depth != 0) {
    const Place above = locate(space, parent);
    if (above.node == kNone) {
      at = space.orphans;
    } else {
      if (node(above.node).start + above.position + 1 != depth) return;
      at = above.node;
      if (above.position + 1 < node(at).length) at = split(at, above.position + 1);
    }
  }
  if (!sentinel(node(at)) && node(at).first_child == kNone) {
    found = {at, node(at).length};
    extend(at, wanted, 1);
  } else {
    found = {new_child(space, at, depth, wanted, 1), 0};
    if (at == space.orphans) add_orphan(space, found.node, parent);
  }
}

namespace {

// Rows in order of depth; of equals in the given order.
std::vector<uint32_t> by_depth(const int64_t* depths, uint32_t count) {
  std::vector<uint32_t> order(count);
  const int64_t deepest = count == 0 ? 0 : *std::max_element(depths, depths + count);
  if (deepest > int64_t(count) * 4 + 1024) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return depths[a] < depths[b]; });
    return order;
  }
  std::vector<uint32_t> starts(size_t(deepest) + 2, 0);
  for (uint32_t row = 0; row < count; ++row) ++starts[size_t(depths[row]) + 1];
  for (size_t depth = 1; depth < starts.size(); ++depth) starts[depth] += starts[depth - 1];
  for (uint32_t row = 0; row < count; ++row) order[starts[size_t(depths[row])]++] = row;
  return order;
}

}  // namespace

void Forest::recover(Space& space, uint32_t number, uint32_t count, const uint8_t* keys, const uint8_t* parents,
                     const int64_t* depths, const int64_t* slots, uint8_t* taken, uint64_t now, Ghost* ghost) {
  begin_recovery();
  const std::vector<uint32_t> order = by_depth(depths, count);
  for (uint32_t at = 0; at < count; ++at) {
    if (at + 16 < count) {
      __builtin_prefetch(keys + size_t(order[at + 16]) * kKeyBytes);
      __builtin_prefetch(parents + size_t(order[at + 16]) * kKeyBytes);
    }
    if (at + 8 < count) {
      tile_by_key_.prefetch(keys + size_t(order[at + 8]) * kKeyBytes);
      tile_by_key_.prefetch(parents + size_t(order[at + 8]) * kKeyBytes);
    }
    const uint32_t row = order[at];
    const uint8_t* wanted = keys + size_t(row) * kKeyBytes;
    Place found;
    recovered(space, wanted, parents + size_t(row) * kKeyBytes, uint32_t(depths[row]), found);
    if (found.node == kNone) continue;
    place(found.node, number, found.position, 1, slots + row, taken + row, now, ghost);
    if (!taken[row] || space.orphan_count == 0) continue;
    if (found.position + 1 == node(found.node).length) join_orphans(space, found.node, found.position);
  }
}

}  // namespace flexkv::index
