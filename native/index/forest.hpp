// The trees of all namespaces with one number of KV groups: path-compressed nodes over tiles.
//
// A node is a run of positions without a branch. For each column (tier, group) it knows how many copies it has, the
// deepest one, and the children whose subtrees have any. At most the deepest copy of a node can go first, and only if
// nothing below it has a copy: so queues of candidates hold one entry a node, not a block.
//
// Files: forest.cpp (namespaces, walks, nodes), shape.cpp (split, merge, prune), residency.cpp (copies, recency, pins, holes), match.cpp,
// recover.cpp. What spans namespaces (evicting, ghosts, the clock) is index.hpp.
#pragma once
#include <deque>
#include <map>
#include <unordered_map>

#include "candidates.hpp"
#include "key_map.hpp"
#include "runs.hpp"
#include "tiles.hpp"

namespace flexkv::index {

class Forest;
using Queue = Candidates<Forest>;

// What competes for the room of one tier and slot class.
struct Contest {
  Tournament<Queue> live[2];  // by queue of s3fifo; other policies use the first
  Tournament<Queue> retired;
  uint64_t copies = 0;
  uint64_t small = 0;  // s3fifo: copies in the small queue
};

struct Column {
  uint32_t held = 0;      // copies in this node
  uint32_t top = 0;       // one more than the position of the deepest of them
  uint32_t branches = 0;  // children whose subtree has a copy
  uint32_t extra = kNone;
  uint32_t aux = 0;  // with the tick: the state of all copies, unless there are runs
  uint64_t tick = 0;

  State state() const { return {tick, aux}; }
  void set_state(const State& state) {
    tick = state.tick;
    aux = state.aux;
  }
  bool populated() const { return held != 0 || branches != 0; }
  bool prefix() const { return held == top; }  // copies have no gaps
};

// Of one group in one node.
struct GroupState {
  static constexpr uint32_t kNoHole = 0x7fffffff;
  uint32_t hole : 31;      // first position of an `all` group that no tier holds; kNoHole if all are held
  uint32_t stranded : 1;   // there is a hole above, or this is an orphan
};

struct Node {
  NodeId parent = kNone;
  NodeId first_child = kNone;
  NodeId next = kNone;  // siblings
  NodeId previous = kNone;
  uint32_t space = 0;
  uint32_t start = 0;   // depth of the first position
  uint32_t length = 0;  // positions; 0: the tops of a namespace's trees
  uint32_t tile_capacity = 0;  // 0: the tiles are in `few`
  union {
    TileId few[2];
    TileId* many;
  } tiles{};
  uint8_t offset = 0;  // of the first position in the first tile
  bool dirty = false;  // waits to be pruned
};

// One namespace.
struct Space {
  uint8_t root[kKeyBytes];
  std::vector<Rule> rules;
  uint32_t number = 0;
  NodeId top = kNone;      // its children are first blocks
  NodeId orphans = kNone;  // its children are orphans
  bool retired = false;
  uint64_t copies = 0;
  uint64_t positions = 0;
  std::deque<Queue> queues;        // two a column
  std::vector<Contest*> contests;    // one a column
  uint64_t orphan_count = 0;
};

// What forests share with the index that owns them.
struct Shared {
  uint32_t tiers = 0;
  std::vector<Policy> policies;  // one a tier
  std::vector<uint64_t> counts;  // copies by tier
  uint64_t pinned = 0;
  uint64_t visited = 0;
};

struct Step {  // of a walk: `count` positions of a node, the first of them at position `base` of the path
  NodeId node;
  uint32_t base;
  uint32_t count;
};
using Path = std::vector<Step>;

// Slots that a tier's ghost knows (s3fifo); asked and updated on insertion.
class Ghost;

class Forest {
 public:
  Forest(Shared& shared, uint32_t groups);
  ~Forest();
  Forest(const Forest&) = delete;
  Forest& operator=(const Forest&) = delete;

  // ---- namespaces
  Space& add_space(const uint8_t* root, std::vector<Rule> rules, std::vector<Contest*> contests);
  void free_space(Space& space);
  void retire(Space& space);
  Space& space_of(NodeId id) { return *spaces_[node(id).space]; }

  // ---- reading
  uint32_t walk(Space& space, const uint8_t* keys, uint32_t count, Path& path);
  uint32_t covered(Space& space, const Path& path, uint32_t known, const uint8_t* tiers);
  void fill_match(Space& space, const Path& path, uint32_t known, uint8_t* tiers, int64_t* slots);
  void fill_residency(const Path& path, uint32_t column, uint32_t count, int64_t* slots);
  struct CopyRows {
    std::vector<uint8_t> keys, parents;
    std::vector<int64_t> depths, slots;
  };
  void copies(Space& space, uint32_t column, CopyRows& rows);

  // ---- changing (columns are group * tiers + tier)
  void touch(Space& space, const Path& path, uint64_t now);
  void insert(Space& space, const uint8_t* keys, uint32_t count, uint32_t column, const int64_t* slots, uint8_t* taken,
              uint64_t now, Ghost* ghost);
  bool holds(const Path& path, uint32_t column, uint32_t start, uint32_t stop);
  bool pinned(const Path& path, uint32_t column, uint32_t start, uint32_t stop, bool all);
  void pin(const Path& path, uint32_t column, uint32_t start, uint32_t stop, int32_t change);
  void remove(Space& space, const Path& path, uint32_t column, uint32_t start, uint32_t stop, int64_t* slots);
  struct RemovedRows {
    std::vector<uint8_t> tiers, keys, groups;
    std::vector<int64_t> slots;
  };
  bool remove_subtree(Space& space, const uint8_t* keys, uint32_t count, RemovedRows& rows);
  void drop_tier(uint32_t tier);
  struct Held {
    NodeId node;
    uint32_t column;
    uint32_t position;
  };
  bool find_range(uint32_t tier, uint64_t start, uint64_t stop, std::vector<Held>& found);  // false: one is pinned
  void recover(Space& space, uint32_t column, uint32_t count, const uint8_t* keys, const uint8_t* parents,
               const int64_t* depths, const int64_t* slots, uint8_t* taken, uint64_t now, Ghost* ghost);
  void end_recovery();

  // ---- eviction's view of one candidate
  uint32_t candidate_position(NodeId id, uint32_t column) { return columns(id)[column].top - 1; }
  State state_at(NodeId id, uint32_t column, uint32_t position);
  void set_state(NodeId id, uint32_t column, uint32_t start, uint32_t stop, const State& state);
  void count_state(NodeId id, uint32_t column, const State& state, int64_t change);
  uint64_t detach(NodeId id, uint32_t column, uint32_t position);
  void attach(NodeId id, uint32_t column, uint32_t position, uint64_t slot);
  void refresh(NodeId id, uint32_t column);
  void mark_dirty(NodeId id, std::vector<NodeId>& dirty);
  void prune(std::vector<NodeId>& dirty);
  uint8_t* key(NodeId id, uint32_t position) { return key_in(node(id), position); }
  void prefetch_pruning(NodeId id);

  // ---- asked by queues of candidates
  Link& link(NodeId id, uint32_t column) { return links_[column][id]; }
  Order order(NodeId id, uint32_t column);
  uint32_t depth(NodeId id, uint32_t column) { return node(id).start + columns(id)[column].top - 1; }
  const uint8_t* candidate_key(NodeId id, uint32_t column) { return key(id, columns(id)[column].top - 1); }
  void prefetch(NodeId id, uint32_t column) const;
  void prefetch_blocks(NodeId id);

  uint64_t nodes() const { return nodes_in_use_; }
  size_t memory_bytes() const;

 private:
  friend class Check;
  static constexpr uint32_t kNodeChunk = 1024;
  static constexpr uint32_t kMergeLimit = 4096;       // blocks that a merge may copy

  Node& node(NodeId id) {
    return *reinterpret_cast<Node*>(node_chunks_[id / kNodeChunk] + size_t(id % kNodeChunk) * stride_);
  }
  const Node& node(NodeId id) const { return const_cast<Forest*>(this)->node(id); }
  // A node is followed by the states of its groups, then by its columns.
  Column* columns_of(Node& node) const {
    return reinterpret_cast<Column*>(reinterpret_cast<uint8_t*>(&node) + sizeof(Node) + group_bytes_);
  }
  Column* columns(NodeId id) { return columns_of(node(id)); }
  static GroupState* groups_of(Node& node) {
    return reinterpret_cast<GroupState*>(reinterpret_cast<uint8_t*>(&node) + sizeof(Node));
  }

  TileId tile_of(const Node& node, uint32_t index) const {
    return node.tile_capacity == 0 ? node.tiles.few[index] : node.tiles.many[index];
  }
  uint8_t* key_in(const Node& node, uint32_t position) {
    const uint32_t at = node.offset + position;
    return tiles_.key(tile_of(node, at / Tiles::kBlocks), at % Tiles::kBlocks);
  }
  uint64_t slot_in(const Node& node, uint32_t position, uint32_t column) {
    const uint32_t at = node.offset + position;
    return tiles_.slot(tile_of(node, at / Tiles::kBlocks), at % Tiles::kBlocks, column);
  }
  void put_slot(const Node& node, uint32_t position, uint32_t column, uint64_t slot) {
    const uint32_t at = node.offset + position;
    tiles_.set_slot(tile_of(node, at / Tiles::kBlocks), at % Tiles::kBlocks, column, slot);
  }
  static uint32_t tiles_for(uint32_t offset, uint32_t length) {
    return (offset + length + Tiles::kBlocks - 1) / Tiles::kBlocks;
  }

  // ---- nodes
  NodeId take_node(uint32_t space, uint32_t start);
  void give_node(NodeId id);
  void take_tops(Space& space);
  void begin_again();
  void reserve_tiles(Node& node, uint32_t count);
  void shrink_tiles(Node& node, uint32_t count);
  void assign_tiles(Node& node, const std::vector<TileId>& tiles);
  void hang(NodeId parent, NodeId child);
  void unlink(NodeId child);
  void replace_child(NodeId old_child, NodeId new_child);
  NodeId find_child(NodeId parent, const uint8_t* key);
  [[gnu::always_inline]] uint32_t common(const Node& here, const uint8_t* keys, uint32_t count);
  NodeId new_child(Space& space, NodeId parent, uint32_t start, const uint8_t* keys, uint32_t count);
  void extend(NodeId id, const uint8_t* keys, uint32_t count);
  NodeId split(NodeId id, uint32_t position);
  bool try_merge(NodeId parent);
  void merge_tiles(Node& upper, Node& lower);
  void rename_candidate(Space& space, uint32_t column, NodeId from, NodeId to);
  void give_tile(TileId tile);
  void copy_block(TileId from, uint32_t from_block, TileId to, uint32_t to_block);
  bool trim(NodeId id);
  bool sentinel(const Node& node) const { return node.length == 0; }

  // ---- copies
  void place(NodeId id, uint32_t column, uint32_t start, uint32_t count, const int64_t* slots, uint8_t* taken,
             uint64_t now, Ghost* ghost);
  void populated(NodeId id, uint32_t column);
  void unpopulated(NodeId id, uint32_t column);
  void count_copies(Space& space, uint32_t column, int64_t change);
  bool held_by_any(const Node& node, uint32_t group, uint32_t position);
  void advance_hole(NodeId id, uint32_t group);
  void set_hole(NodeId id, uint32_t group, uint32_t hole);
  void spread_stranded(NodeId id, uint32_t group);
  bool leads_to_hole(Node& node, uint32_t group);
  void leave_queue(NodeId id, uint32_t column);
  Queue& queue_of(Space& space, uint32_t column, bool second) { return space.queues[2 * column + (second ? 1 : 0)]; }
  void fix(Space& space, uint32_t column, bool second);
  Extra& extra_of(Column& column);
  void drop_extra(Column& column);
  void tidy_extra(Column& column);
  bool is_pinned(const Column& column, uint32_t position) const;
  void touch_column(NodeId id, uint32_t column, uint32_t count, uint64_t now);
  template <class Act>
  void each_below(NodeId top, Act act);  // parents first; `act` must not change the tree
  template <class Act>
  static void each_part(const Path& path, uint32_t start, uint32_t stop, Act act);

  // ---- orphans and recovery
  struct Name {
    uint8_t bytes[kKeyBytes];
  };
  void add_orphan(Space& space, NodeId id, const uint8_t* parent);
  const uint8_t* parent_key(const Space& space, NodeId id, uint32_t position);
  bool awaited(const uint8_t* key);
  void join_orphans(Space& space, NodeId id, uint32_t position);
  void rename_orphan(NodeId old_id, NodeId new_id);
  void forget_orphan(Space& space, NodeId id);
  struct Place {
    NodeId node;
    uint32_t position;
  };
  Place locate(Space& space, const uint8_t* key);
  void recovered(Space& space, const uint8_t* key, const uint8_t* parent, uint32_t depth, Place& found);
  void begin_recovery();
  void note_keys(NodeId id, uint32_t start, uint32_t stop);
  void note_tiles(NodeId id, uint32_t first_tile);

  Shared& shared_;
  const uint32_t groups_;
  const uint32_t columns_;
  const size_t group_bytes_;
  const size_t stride_;
  Tiles tiles_;
  KeyMap by_first_key_;
  std::vector<uint8_t*> node_chunks_;
  std::vector<std::vector<Link>> links_;  // by column and node
  uint32_t next_node_ = 0;
  NodeId free_node_ = kNone;
  uint64_t nodes_in_use_ = 0;
  size_t tile_list_bytes_ = 0;
  std::deque<Extra> extras_;
  std::vector<uint32_t> free_extras_;
  std::vector<std::unique_ptr<Space>> spaces_;
  std::vector<uint32_t> free_spaces_;
  Path scratch_;
  std::vector<NodeId> waiting_;

  std::unordered_map<NodeId, Name> orphan_parents_;  // orphan -> key of its parent
  KeyMap orphans_by_parent_;

  // While copies are recovered: where each key lies, whatever its depth. Tiles do not move when nodes are split.
  struct TileNote {
    NodeId owner = kNone;
    int64_t depth = 0;  // of the tile's first block, whether or not the owner begins there
  };
  bool recovering_ = false;
  KeyMap tile_by_key_;
  std::vector<TileNote> tile_notes_;
};

template <class Act>
void Forest::each_below(NodeId top, Act act) {
  NodeId at = top;
  for (;;) {
    act(at);
    if (node(at).first_child != kNone) {
      at = node(at).first_child;
      continue;
    }
    while (at != top && node(at).next == kNone) at = node(at).parent;
    if (at == top) return;
    at = node(at).next;
  }
}

// How many of `count` keys the node's positions begin with. Keys are chained: where one is equal, all before it are.
inline uint32_t Forest::common(const Node& here, const uint8_t* keys, uint32_t count) {
  if (same_key(key_in(here, count - 1), keys + size_t(count - 1) * kKeyBytes)) return count;
  uint32_t low = 0, high = count - 1;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (same_key(key_in(here, middle), keys + size_t(middle) * kKeyBytes)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls act(node, first, last, base) for each node's part [first, last) of [start, stop) of a path; `base` is the
// position in the path of `first`.
template <class Act>
void Forest::each_part(const Path& path, uint32_t start, uint32_t stop, Act act) {
  for (const Step& step : path) {
    const uint32_t from = std::max(step.base, start), to = std::min(step.base + step.count, stop);
    if (from < to) act(step.node, from - step.base, to - step.base, from);
  }
}

}  // namespace flexkv::index
