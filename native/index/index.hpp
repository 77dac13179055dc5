// The index: all namespaces, the clock, and eviction across them. The meaning of every call is in
// flexkv_core/index/__init__.py; flexkv_core/index/reference.py is the oracle. Not locked: the bindings do that.
#pragma once
#include "forest.hpp"
#include "ghost.hpp"

namespace flexkv::index {

struct EvictedRows {
  std::vector<uint8_t> roots, keys, groups;
  std::vector<int64_t> slots;
};

struct Statistics {
  uint64_t namespaces, positions, orphans, copies, pinned, visited, nodes, memory_bytes;
};

class Index {
 public:
  Index(uint32_t tiers, std::vector<Policy> policies);

  void advance(uint64_t tick) { tick_ = std::max(tick_, tick); }
  void add_namespace(const std::string& root, std::vector<Rule> rules);
  void retire_namespace(const std::string& root);
  bool has_namespace(const std::string& root) const { return spaces_.count(root) != 0; }

  void check_namespace(const std::string& root, bool alive) const;  // throws UnknownNamespace
  void check_column(const std::string& root, uint32_t tier, uint32_t group) const { column(tree(root), tier, group); }

  // A match in two steps, so that the caller can make arrays of the right size in between.
  struct Walked {
    Forest* forest;
    Space* space;
    uint32_t known;
    uint32_t groups;
  };
  Walked match(const std::string& root, const uint8_t* keys, uint32_t count);
  uint32_t fill(const Walked& walked, uint8_t* tiers, int64_t* slots);

  void residency(const std::string& root, const uint8_t* keys, uint32_t count, uint32_t tier, uint32_t group,
                 int64_t* slots);
  void touch(const std::string& root, const uint8_t* keys, uint32_t count);
  void insert(const std::string& root, const uint8_t* keys, uint32_t count, uint32_t tier, uint32_t group,
              const int64_t* slots, uint8_t* taken);
  void remove(const std::string& root, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start,
              uint32_t stop, int64_t* slots);
  Forest::RemovedRows remove_subtree(const std::string& root, const uint8_t* keys, uint32_t count);
  void pin(const std::string& root, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start, uint32_t stop);
  void unpin(const std::string& root, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start,
             uint32_t stop);
  bool evict(uint32_t tier, uint64_t count, uint32_t slot_class, EvictedRows& rows);
  void recover(const std::string& root, uint32_t tier, uint32_t group, uint32_t count, const uint8_t* keys,
               const uint8_t* parents, const int64_t* depths, const int64_t* slots, uint8_t* taken);
  void end_recovery();
  void drop_tier(uint32_t tier);
  uint64_t count(uint32_t tier) const;
  Forest::CopyRows copies(const std::string& root, uint32_t tier, uint32_t group);
  Statistics statistics() const;

 private:
  struct Tree {
    Forest* forest;
    Space* space;
  };
  struct Step {  // of an eviction that may have to be undone
    Forest* forest;
    NodeId node;
    uint32_t column;
    uint32_t position;
    uint64_t slot;  // kEmpty: only the state was changed
    State state;    // before
    bool ghost;     // the ghost learns it
  };

  const Tree& tree(const std::string& root) const;
  uint32_t column(const Tree& tree, uint32_t tier, uint32_t group) const;
  void check_tier(uint32_t tier) const;
  Ghost* ghost(uint32_t tier);
  void forget_if_over(const Tree& tree);
  CandidateHeap* choose(Contest& contest, uint32_t tier);
  bool second_chance(CandidateHeap& heap, Contest& contest);
  void undo();

  Shared shared_;
  uint64_t tick_ = 0;
  uint64_t recovery_tick_ = 0;  // 0: nothing is being recovered
  std::vector<std::unique_ptr<Ghost>> ghosts_;              // one a tier
  std::map<std::pair<uint32_t, uint32_t>, Contest> contests_;  // by (tier, slot class)
  std::map<size_t, std::unique_ptr<Forest>> forests_;       // by number of groups
  std::unordered_map<std::string, Tree> spaces_;
  Path path_;
  std::vector<Step> steps_;
  std::vector<NodeId> dirty_;
};

}  // namespace flexkv::index
