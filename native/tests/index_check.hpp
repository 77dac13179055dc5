// Every figure that the index keeps, recomputed from scratch and compared: for tests, and slow.
//
// The checks read the private parts of the index (`friend class Check`), change nothing, and throw Broken with the first
// thing that is not as it must be.
#pragma once
#include <map>
#include <set>
#include <sstream>

#include "index/index.hpp"

namespace flexkv::index {

struct Broken : std::logic_error {
  using std::logic_error::logic_error;
};

#define FLEXKV_CHECK(condition, ...)                                                                    \
  do {                                                                                                  \
    if (!(condition)) {                                                                                 \
      std::ostringstream text;                                                                          \
      text << __FILE__ << ":" << __LINE__ << ": " << #condition << ": " << flexkv::index::told(__VA_ARGS__); \
      throw flexkv::index::Broken(text.str());                                                          \
    }                                                                                                   \
  } while (false)

template <class... Values>
std::string told(const Values&... values) {
  std::ostringstream text;
  ((text << values << " "), ...);
  return text.str();
}

class Check {
 public:
  static void all(Index& index) { Check(index).run(); }

 private:
  struct Totals {  // of one contest
    uint64_t copies = 0;
    uint64_t small = 0;
  };
  struct Queued {  // of one queue
    uint64_t listed = 0;
    uint64_t in_heap = 0;
  };

  explicit Check(Index& index) : index_(index) {}

  void run() {
    FLEXKV_CHECK(!index_.torn(), "torn");
    for (auto& [groups, forest] : index_.forests_) check_forest(*forest);
    uint64_t pinned = 0, spaces = 0;
    for (auto& [groups, forest] : index_.forests_) {
      for (const auto& space : forest->spaces_) spaces += space != nullptr;
    }
    pinned = pinned_;
    FLEXKV_CHECK(index_.spaces_.size() == spaces, index_.spaces_.size(), spaces);
    FLEXKV_CHECK(index_.shared_.pinned == pinned, index_.shared_.pinned, pinned);
    FLEXKV_CHECK(index_.dirty_.empty());
    for (const auto& [root, tree] : index_.spaces_) {
      FLEXKV_CHECK(std::memcmp(root.data(), tree.space->root, kKeyBytes) == 0);
      FLEXKV_CHECK(tree.forest->spaces_.at(tree.space->number).get() == tree.space);
      FLEXKV_CHECK(!tree.space->retired || tree.space->copies != 0);
    }
    for (uint32_t tier = 0; tier < index_.shared_.tiers; ++tier) {
      FLEXKV_CHECK(index_.shared_.counts[tier] == counts_[tier], tier, index_.shared_.counts[tier], counts_[tier]);
      if (index_.ghosts_[tier]) check_ghost(*index_.ghosts_[tier]);
    }
    for (auto& [name, contest] : index_.contests_) {
      FLEXKV_CHECK(contest.copies == totals_[&contest].copies, name.first, contest.copies);
      FLEXKV_CHECK(contest.small == totals_[&contest].small, name.first, contest.small, totals_[&contest].small);
      for (auto* each : {&contest.live[0], &contest.live[1], &contest.retired}) check_tournament(*each);
    }
  }

  // ---------------------------------------------------------------- trees

  void check_forest(Forest& forest) {
    std::vector<bool> used(forest.tiles_.ever(), false);
    std::set<uint32_t> extras;
    uint64_t nodes = 0, tiles = 0, lists = 0, orphans = 0;
    uint32_t named = 0;
    for (const auto& space : forest.spaces_) {
      if (!space) continue;
      uint64_t positions = 0, copies = 0, orphans_here = 0;
      std::map<const Queue*, Queued> queued;
      for (NodeId top : {space->top, space->orphans}) {
        std::vector<NodeId> waiting{top};
        while (!waiting.empty()) {
          const NodeId id = waiting.back();
          waiting.pop_back();
          const Node& here = forest.node(id);
          ++nodes;
          FLEXKV_CHECK(forest.spaces_[here.space].get() == space.get(), id);
          FLEXKV_CHECK(!here.dirty, id);
          check_children(forest, id, *space, waiting);
          for (uint32_t group = 0; group < forest.groups_; ++group) check_group(forest, id, *space, group);
          for (uint32_t column = 0; column < forest.columns_; ++column) {
            copies += check_column(forest, id, *space, column, extras);
            check_candidate(forest, id, *space, column, queued);
          }
          if (id == top) {
            FLEXKV_CHECK(here.length == 0 && here.parent == kNone, id);
            continue;
          }
          ++named;
          positions += here.length;
          if (top == space->orphans && here.parent == top) {
            ++orphans_here;
            const auto found = forest.orphan_parents_.find(id);
            FLEXKV_CHECK(found != forest.orphan_parents_.end(), id);
            FLEXKV_CHECK(carries(forest.orphans_by_parent_, found->second.bytes, id), id);
            FLEXKV_CHECK(here.start != 0, id);
          }
          FLEXKV_CHECK(carries(forest.by_first_key_, forest.key_in(here, 0), id), id);
          FLEXKV_CHECK(forest.find_child(here.parent, forest.key_in(here, 0)) == id, id);
          lists += here.tile_capacity * sizeof(TileId);
          FLEXKV_CHECK(here.offset < Tiles::kBlocks, id);
          const uint32_t count = Forest::tiles_for(here.offset, here.length);
          FLEXKV_CHECK(count <= (here.tile_capacity == 0 ? 2 : here.tile_capacity), id, count, here.tile_capacity);
          for (uint32_t at = 0; at < count; ++at, ++tiles) {
            const TileId tile = forest.tile_of(here, at);
            FLEXKV_CHECK(tile < used.size() && !used[tile], id, at, tile);
            used[tile] = true;
            if (!forest.recovering_) continue;
            FLEXKV_CHECK(forest.tile_notes_.at(tile).owner == id, id, at);
            FLEXKV_CHECK(forest.tile_notes_[tile].depth == int64_t(here.start) - here.offset + at * Tiles::kBlocks, id, at);
          }
          for (uint32_t at = 0; forest.recovering_ && at < here.length; ++at) {
            const Forest::Place place = forest.locate(*space, forest.key_in(here, at));
            // A key may be at two places: as an orphan of a wrong depth, and where it belongs.
            FLEXKV_CHECK(place.node != kNone, id, at);
            FLEXKV_CHECK(same_key(forest.key(place.node, place.position), forest.key_in(here, at)), id, at);
          }
        }
      }
      FLEXKV_CHECK(space->positions == positions, space->positions, positions);
      FLEXKV_CHECK(space->copies == copies, space->copies, copies);
      FLEXKV_CHECK(space->orphan_count == orphans_here, space->orphan_count, orphans_here);
      orphans += orphans_here;
      check_queues(forest, *space, queued);
    }
    FLEXKV_CHECK(forest.orphan_parents_.size() == orphans, orphans);
    check_map(forest.orphans_by_parent_, uint32_t(orphans));
    check_map(forest.by_first_key_, named);
    if (!forest.recovering_) check_map(forest.tile_by_key_, 0);
    FLEXKV_CHECK(forest.nodes_in_use_ == nodes, forest.nodes_in_use_, nodes);
    FLEXKV_CHECK(forest.tile_list_bytes_ == lists, forest.tile_list_bytes_, lists);
    FLEXKV_CHECK(forest.waiting_.empty());
    uint64_t free_nodes = 0;
    for (NodeId id = forest.free_node_; id != kNone; id = forest.node(id).next, ++free_nodes) {
      FLEXKV_CHECK(free_nodes <= forest.next_node_, id);
      for (const auto& links : forest.links_) FLEXKV_CHECK(links[id].absent(), id);
    }
    FLEXKV_CHECK(free_nodes + nodes == forest.next_node_, free_nodes, nodes, forest.next_node_);
    check_tiles(forest.tiles_, used, tiles);
    for (uint32_t each : forest.free_extras_) FLEXKV_CHECK(extras.insert(each).second, each);
    FLEXKV_CHECK(extras.size() == forest.extras_.size(), extras.size(), forest.extras_.size());
  }

  void check_children(Forest& forest, NodeId id, const Space& space, std::vector<NodeId>& waiting) {
    const Node& here = forest.node(id);
    NodeId previous = kNone;
    uint32_t children = 0;
    for (NodeId child = here.first_child; child != kNone; previous = child, child = forest.node(child).next, ++children) {
      const Node& below = forest.node(child);
      FLEXKV_CHECK(below.parent == id && below.previous == previous, id, child);
      FLEXKV_CHECK(below.length != 0, child);
      FLEXKV_CHECK(id == space.orphans || below.start == here.start + here.length, id, child);
      waiting.push_back(child);
    }
    if (here.length == 0) return;
    if (children == 0) {
      bool held = false;
      for (uint32_t column = 0; column < forest.columns_; ++column) {
        held = held || forest.columns(id)[column].top == here.length;
      }
      FLEXKV_CHECK(held, "a leaf whose last position nobody holds", id);
    } else if (children == 1 && !forest.recovering_) {
      const Node& below = forest.node(here.first_child);
      FLEXKV_CHECK(here.length + below.length > Forest::kMergeLimit, "an only child", id, here.first_child);
    }
  }

  void check_group(Forest& forest, NodeId id, const Space& space, uint32_t group) {
    Node& here = forest.node(id);
    const GroupState state = forest.groups_of(here)[group];
    uint32_t hole = GroupState::kNoHole;
    for (uint32_t at = here.length; at-- > 0 && space.rules[group].coverage == Coverage::kAll;) {
      bool held = false;
      for (uint32_t tier = 0; tier < index_.shared_.tiers; ++tier) {
        held = held || forest.slot_in(here, at, group * index_.shared_.tiers + tier) != kEmpty;
      }
      if (!held) hole = at;
    }
    FLEXKV_CHECK(state.hole == hole, id, group, state.hole, hole);
    bool stranded = id == space.orphans;
    if (here.parent != kNone) {
      const GroupState above = forest.groups_of(forest.node(here.parent))[group];
      stranded = above.stranded || above.hole != GroupState::kNoHole;
    }
    FLEXKV_CHECK(bool(state.stranded) == stranded, id, group);
  }

  uint64_t check_column(Forest& forest, NodeId id, Space& space, uint32_t number, std::set<uint32_t>& extras) {
    const Node& here = forest.node(id);
    const Column& column = forest.columns(id)[number];
    uint32_t held = 0, top = 0, branches = 0;
    for (uint32_t at = 0; at < here.length; ++at) {
      if (forest.slot_in(here, at, number) == kEmpty) continue;
      ++held;
      top = at + 1;
      if (!in_main(forest, id, number, at)) ++totals_[space.contests[number]].small;
    }
    for (NodeId child = here.first_child; child != kNone; child = forest.node(child).next) {
      branches += forest.columns(child)[number].populated();
    }
    FLEXKV_CHECK(column.held == held && column.top == top, id, number, column.held, held, column.top, top);
    FLEXKV_CHECK(column.branches == branches, id, number, column.branches, branches);
    counts_[number % index_.shared_.tiers] += held;
    totals_[space.contests[number]].copies += held;
    if (column.extra == kNone) return held;
    FLEXKV_CHECK(extras.insert(column.extra).second, id, number);
    const Extra& extra = forest.extras_.at(column.extra);
    FLEXKV_CHECK(!extra.empty() && extra.runs.size() != 1, id, number);
    FLEXKV_CHECK(extra.runs.empty() || extra.runs.back().end == kNone, id, number);
    for (size_t i = 1; i < extra.runs.size(); ++i) {
      FLEXKV_CHECK(extra.runs[i - 1].end < extra.runs[i].end, id, number);
      FLEXKV_CHECK(extra.runs[i - 1].state != extra.runs[i].state, id, number);
    }
    uint32_t last = 0;
    for (const PinRun& run : extra.pins) {
      FLEXKV_CHECK(last <= run.start && run.start < run.stop && run.count != 0, id, number);
      FLEXKV_CHECK(run.stop <= top, id, number);
      for (uint32_t at = run.start; at < run.stop; ++at) {
        FLEXKV_CHECK(forest.slot_in(here, at, number) != kEmpty, "a pin without a copy", id, number, at);
      }
      pinned_ += run.stop - run.start;
      last = run.stop;
    }
    return held;
  }

  bool in_main(Forest& forest, NodeId id, uint32_t number, uint32_t position) {
    const Policy& policy = index_.shared_.policies[number % index_.shared_.tiers];
    return policy.kind != Policy::Kind::kS3Fifo || policy.in_main(forest.state_at(id, number, position));
  }

  // ---------------------------------------------------------------- who goes first

  void check_candidate(Forest& forest, NodeId id, Space& space, uint32_t number, std::map<const Queue*, Queued>& queued) {
    const Column& column = forest.columns(id)[number];
    const Link link = forest.links_[number][id];
    const bool wanted = column.top != 0 && column.branches == 0 && !forest.is_pinned(column, column.top - 1);
    FLEXKV_CHECK(link.absent() == !wanted, id, number, wanted);
    if (!wanted) return;
    const Order order = forest.order(id, number);
    const Policy& policy = index_.shared_.policies[number % index_.shared_.tiers];
    const bool second = policy.kind == Policy::Kind::kS3Fifo && !is_stranded(order) && in_main(forest, id, number, column.top - 1);
    FLEXKV_CHECK(link.second() == second, id, number, second);
    Queue& queue = forest.queue_of(space, number, second);
    if (!link.in_heap()) {
      ++queued[&queue].listed;
      return;
    }
    ++queued[&queue].in_heap;
    FLEXKV_CHECK(link.before() < queue.size_, id, number);
    FLEXKV_CHECK(queue.entries_[link.before()].node == id, id, number);
    FLEXKV_CHECK(queue.entries_[link.before()].order() == order, id, number);
  }

  void check_queues(Forest& forest, Space& space, std::map<const Queue*, Queued>& queued) {
    for (size_t at = 0; at < space.queues.size(); ++at) {
      Queue& queue = space.queues[at];
      const Queued expected = queued[&queue];
      FLEXKV_CHECK(queue.size_ == expected.in_heap, at, queue.size_, expected.in_heap);
      FLEXKV_CHECK(queue.size_ <= queue.capacity_, at);
      for (uint32_t place = 1; place < queue.size_; ++place) {
        FLEXKV_CHECK(!queue.before(queue.entries_[place], queue.entries_[(place - 1) / Queue::kWays]), at, place);
      }
      uint64_t listed = 0;
      uint32_t previous = Link::kEdge;
      Order order = 0;
      for (uint32_t id = queue.front_; id != Link::kEdge; ++listed) {
        const Link& link = forest.links_[queue.column][id];
        FLEXKV_CHECK(!link.absent() && !link.in_heap() && link.before() == previous, at, id);
        const Order now = forest.order(id, queue.column);
        FLEXKV_CHECK(listed == 0 || order < now, at, id);
        FLEXKV_CHECK(now <= queue.back_order_, at, id);
        FLEXKV_CHECK(listed != 0 || !queue.front_known_ || queue.front_order_ == now, at, id);
        order = now;
        previous = id;
        id = link.next;
      }
      FLEXKV_CHECK(queue.back_ == previous || listed == 0, at);
      FLEXKV_CHECK(listed == expected.listed, at, listed, expected.listed);
      const Contest& contest = *space.contests[queue.column];
      const Tournament<Queue>& place = space.retired ? contest.retired : contest.live[at % 2];
      FLEXKV_CHECK((queue.seat == kNone) == queue.empty(), at);
      FLEXKV_CHECK(queue.empty() || place.queues_.at(queue.seat) == &queue, at);
    }
  }

  void check_tournament(const Tournament<Queue>& tournament) {
    for (size_t at = 0; at < tournament.queues_.size(); ++at) {
      FLEXKV_CHECK(tournament.queues_[at]->seat == at, at);
      FLEXKV_CHECK(at == 0 || !Tournament<Queue>::before(tournament.queues_[at], tournament.queues_[(at - 1) / 2]), at);
    }
  }

  // ---------------------------------------------------------------- memory

  static bool carries(const KeyMap& map, const uint8_t* key, uint32_t number) {
    return map.find(key, [&](uint32_t each) { return each == number; }) == number;
  }

  static void check_map(const KeyMap& map, uint32_t expected) {
    uint64_t count = 0;
    for (const KeyMap::Shard& shard : map.shards_) {
      uint32_t here = 0;
      for (uint32_t at = 0; at < shard.capacity; ++at) {
        if (shard.slots[at].number == kNone) continue;
        ++here;
        for (uint32_t way = shard.slots[at].tag & (shard.capacity - 1); way != at; way = (way + 1) & (shard.capacity - 1)) {
          FLEXKV_CHECK(shard.slots[way].number != kNone, "cannot be reached", at);
        }
      }
      FLEXKV_CHECK(here == shard.count && (here == 0) == (shard.capacity == 0), here, shard.count, shard.capacity);
      FLEXKV_CHECK(shard.count * 4 <= shard.capacity * 3, shard.count, shard.capacity);
      count += here;
    }
    FLEXKV_CHECK(count == expected, count, expected);
  }

  static void check_tiles(Tiles& tiles, std::vector<bool>& used, uint64_t expected) {
    FLEXKV_CHECK(tiles.used_ == expected, tiles.used_, expected);
    uint64_t free = 0;
    for (TileId tile = tiles.free_; tile != kNone; ++free) {
      FLEXKV_CHECK(tile < used.size() && !used[tile], "given and used", tile);
      used[tile] = true;
      std::memcpy(&tile, tiles.key(tile, 0), sizeof tile);
    }
    FLEXKV_CHECK(free + expected == tiles.next_, free, expected, tiles.next_);
  }

  static void check_ghost(Ghost& ghost) {
    uint32_t live = 0, number = ghost.next_ - uint32_t(ghost.entries_.size());
    for (const Ghost::Entry& entry : ghost.entries_) {
      const uint8_t* word = reinterpret_cast<const uint8_t*>(&entry.word);
      if (entry.group != kNone) {
        ++live;
        FLEXKV_CHECK(carries(ghost.numbers_, word, number), number);
        FLEXKV_CHECK(ghost.find(entry.word, entry.group) == number, number);
      }
      ++number;
    }
    FLEXKV_CHECK(ghost.live_ == live, ghost.live_, live);
    FLEXKV_CHECK(ghost.entries_.empty() || ghost.entries_.front().group != kNone, live);
    FLEXKV_CHECK(ghost.entries_.size() <= 2 * size_t(live) + 64, live);
    check_map(ghost.numbers_, live);
  }

  Index& index_;
  uint64_t pinned_ = 0;
  std::map<uint32_t, uint64_t> counts_;
  std::map<const Contest*, Totals> totals_;
};

}  // namespace flexkv::index
