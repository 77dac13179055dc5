// The index: all namespaces, the clock, and eviction across them. The meaning of every call is in
// flexkv_core/index/__init__.py; flexkv_core/index/reference.py is the oracle. Not locked: whoever calls does that (gate.hpp).
#pragma once
#include <array>

#include "forest.hpp"
#include "ghost.hpp"

namespace flexkv::index {

struct EvictedRows {  // arrays that the caller has made, of as many rows as are to go
  uint8_t *roots, *keys, *groups;
  int64_t* slots;
};

struct Statistics {
  uint64_t namespaces, positions, orphans, copies, pinned, visited, nodes, memory_bytes;
};

using Root = std::array<uint8_t, kKeyBytes>;
struct RootHash {
  size_t operator()(const Root& root) const { return key_word(root.data()); }
};

class Index {
 public:
  struct Tree {  // of one namespace
    Forest* forest;
    Space* space;
  };

  Index(uint32_t tiers, std::vector<Policy> policies);

  void advance(uint64_t tick) { tick_ = std::max(tick_, tick); }
  Tree tree(const Root& root) const;  // throws UnknownNamespace
  static void check_alive(const Tree& tree);  // throws UnknownNamespace
  void check_tier(uint32_t tier) const;
  void check_column(const Tree& tree, uint32_t tier, uint32_t group) const { column(tree, tier, group); }

  void add_namespace(const Root& root, std::vector<Rule> rules);
  void retire_namespace(const Root& root);
  bool has_namespace(const Root& root) const { return spaces_.count(root) != 0; }
  bool has_copies(const Root& root) const { return tree(root).space->copies != 0; }

  // A match in two steps, so that the caller can make arrays of the right size in between.
  struct Walked {
    Forest* forest;
    Space* space;
    uint32_t known;
    uint32_t groups;
  };
  Walked match(Tree tree, const uint8_t* keys, uint32_t count);
  uint32_t fill(const Walked& walked, uint8_t* tiers, int64_t* slots);

  void residency(Tree tree, const uint8_t* keys, uint32_t count, uint32_t tier, uint32_t group,
                 int64_t* slots);
  void touch(Tree tree, const uint8_t* keys, uint32_t count);
  void insert(Tree tree, const uint8_t* keys, uint32_t count, uint32_t tier, uint32_t group,
              const int64_t* slots, uint8_t* taken);
  void remove(Tree tree, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start,
              uint32_t stop, int64_t* slots);
  Forest::RemovedRows remove_subtree(Tree tree, const uint8_t* keys, uint32_t count);
  void pin(Tree tree, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start, uint32_t stop);
  void unpin(Tree tree, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start,
             uint32_t stop);
  bool evict(uint32_t tier, uint64_t count, uint32_t slot_class, const EvictedRows& rows);
  bool evict_range(uint32_t tier, uint64_t start, uint64_t stop, uint64_t count, const EvictedRows& rows);
  void recover(Tree tree, uint32_t tier, uint32_t group, uint32_t count, const uint8_t* keys,
               const uint8_t* parents, const int64_t* depths, const int64_t* slots, uint8_t* taken);
  void end_recovery();
  void drop_tier(uint32_t tier);
  uint64_t count(uint32_t tier) const;
  Forest::CopyRows copies(Tree tree, uint32_t tier, uint32_t group);
  Statistics statistics() const;

  // Whether a change broke off half-way (std::bad_alloc): nothing but destruction is defined any more.
  bool torn() const { return torn_; }

 private:
  friend class Check;  // native/tests/index_check.hpp
  class Change {  // what an exception may not leave half done
   public:
    explicit Change(Index& index) : index_(index) { index_.torn_ = true; }
    void done() { index_.torn_ = false; }

   private:
    Index& index_;
  };
  struct Step {  // of an eviction that may have to be undone
    Forest* forest;
    NodeId node;
    uint32_t column;
    uint32_t position;
    uint64_t slot;  // kEmpty: only the state was changed
    State state;    // before
    bool ghost;     // the ghost learns it
    size_t row;     // of what is returned
  };

  uint32_t column(const Tree& tree, uint32_t tier, uint32_t group) const;
  void find_held(Tree tree, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start, uint32_t stop);
  Ghost* ghost(uint32_t tier);
  void forget_if_over(const Tree& tree);
  Queue* choose(Contest& contest, uint32_t tier);
  bool second_chance(Queue& queue, NodeId node, Contest& contest);
  void undo();
  void finish(const EvictedRows& rows);

  Shared shared_;
  uint64_t tick_ = 0;
  uint64_t recovery_tick_ = 0;  // 0: nothing is being recovered
  std::vector<std::unique_ptr<Ghost>> ghosts_;              // one a tier
  std::map<std::pair<uint32_t, uint32_t>, Contest> contests_;  // by (tier, slot class)
  std::map<size_t, std::unique_ptr<Forest>> forests_;       // by number of groups
  std::unordered_map<Root, Tree, RootHash> spaces_;
  Path path_;
  std::vector<Step> steps_;
  std::vector<NodeId> dirty_;
  bool torn_ = false;
};

}  // namespace flexkv::index
