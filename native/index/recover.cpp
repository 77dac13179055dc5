// Recovery: copies that survived, in any order, each with its parent's key. See forest.hpp.
//
// While it lasts, a map tells for every key of the trees which tile it lies in. An orphan hangs below a top of its own
// until its parent appears.
#include <numeric>

#include "forest.hpp"
#include "ghost.hpp"

namespace flexkv::index {

namespace {

std::string name_of(const uint8_t* key) { return {reinterpret_cast<const char*>(key), kKeyBytes}; }

}  // namespace

// ---------------------------------------------------------------- orphans

// A position has come into being: orphans that wait for it become its children. It must be its node's last.
void Forest::join_orphans(Space& space, NodeId id, uint32_t position) {
  if (space.orphan_parents.empty()) return;
  const std::string name = name_of(key(id, position));
  const uint32_t depth = node(id).start + position + 1;
  std::vector<NodeId> joining;
  auto [first, last] = space.orphans_by_parent.equal_range(name);
  for (auto found = first; found != last;) {
    if (node(found->second).start == depth) {
      joining.push_back(found->second);
      space.orphan_parents.erase(found->second);
      found = space.orphans_by_parent.erase(found);
    } else {
      ++found;
    }
  }
  if (joining.empty()) return;
  for (NodeId orphan : joining) {
    for (uint32_t number = 0; number < columns_; ++number) {
      if (columns(orphan)[number].populated()) unpopulated(orphan, number);
    }
    unlink(orphan);
    link(id, orphan);
    for (uint32_t number = 0; number < columns_; ++number) {
      if (columns(orphan)[number].populated()) populated(orphan, number);
    }
  }
  for (uint32_t group = 0; group < groups_; ++group) spread_stranded(id, group);
  try_merge(id);
}

void Forest::rename_orphan(Space& space, NodeId old_id, NodeId new_id) {
  auto parent = space.orphan_parents.extract(old_id);
  auto [first, last] = space.orphans_by_parent.equal_range(parent.mapped());
  for (auto found = first; found != last; ++found) {
    if (found->second == old_id) found->second = new_id;
  }
  parent.key() = new_id;
  space.orphan_parents.insert(std::move(parent));
}

void Forest::forget_orphan(Space& space, NodeId id) {
  const std::string parent = space.orphan_parents.at(id);
  auto [first, last] = space.orphans_by_parent.equal_range(parent);
  for (auto found = first; found != last; ++found) {
    if (found->second != id) continue;
    space.orphans_by_parent.erase(found);
    break;
  }
  space.orphan_parents.erase(id);
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
  recovering_ = false;
  tile_by_key_ = KeyMap();
  tile_notes_ = std::vector<TileNote>();
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
    const Node& here = node(found.node);
    const uint8_t* above = space.root;
    if (found.position != 0) {
      above = key_in(here, found.position - 1);
    } else if (here.parent == space.orphans) {
      above = reinterpret_cast<const uint8_t*>(space.orphan_parents.at(found.node).data());
    } else if (here.parent != space.top) {
      above = key_in(node(here.parent), node(here.parent).length - 1);
    }
    if (here.start + found.position != depth || !same_key(above, parent)) found.node = kNone;
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
    if (at == space.orphans) {
      space.orphan_parents.emplace(found.node, name_of(parent));
      space.orphans_by_parent.emplace(name_of(parent), found.node);
    }
  }
}

void Forest::recover(Space& space, uint32_t number, uint32_t count, const uint8_t* keys, const uint8_t* parents,
                     const int64_t* depths, const int64_t* slots, uint8_t* taken, uint64_t now, Ghost* ghost) {
  begin_recovery();
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return depths[a] < depths[b]; });
  for (uint32_t row : order) {
    const uint8_t* wanted = keys + size_t(row) * kKeyBytes;
    Place found;
    recovered(space, wanted, parents + size_t(row) * kKeyBytes, uint32_t(depths[row]), found);
    if (found.node == kNone) continue;
    place(found.node, number, found.position, 1, slots + row, taken + row, now, ghost);
    if (!taken[row] || space.orphan_parents.empty()) continue;
    if (found.position + 1 == node(found.node).length) join_orphans(space, found.node, found.position);
  }
}

}  // namespace flexkv::index
