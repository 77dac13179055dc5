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
