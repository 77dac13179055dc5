#include "index.hpp"

namespace flexkv::index {

namespace {

std::string short_name(const uint8_t* root) {
  static const char kDigits[] = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < 8; ++i) {
    text += kDigits[root[i] >> 4];
    text += kDigits[root[i] & 15];
  }
  return text + "...";
}

Root root_of(const Space& space) {
  Root root;
  std::memcpy(root.data(), space.root, kKeyBytes);
  return root;
}

}  // namespace

Index::Index(uint32_t tiers, std::vector<Policy> policies) {
  shared_.tiers = tiers;
  shared_.policies = std::move(policies);
  shared_.counts.assign(tiers, 0);
  for (const Policy& policy : shared_.policies) {
    ghosts_.push_back(policy.kind == Policy::Kind::kS3Fifo ? std::make_unique<Ghost>() : nullptr);
  }
}

// ---------------------------------------------------------------- namespaces

Index::Tree Index::tree(const Root& root) const {
  const auto found = spaces_.find(root);
  if (found == spaces_.end()) {
    throw UnknownNamespace("namespace " + short_name(root.data()) + " is not in the index: add it first");
  }
  return found->second;
}

void Index::check_alive(const Tree& tree) {
  if (!tree.space->retired) return;
  throw UnknownNamespace("namespace " + short_name(tree.space->root) + " was reset: nothing can be added to it");
}

void Index::add_namespace(const Root& root, std::vector<Rule> rules) {
  const auto found = spaces_.find(root);
  if (found != spaces_.end()) {
    check_alive(found->second);
    if (found->second.space->rules == rules) return;
    throw LayoutMismatch("namespace " + short_name(root.data()) + " was added with other groups: use another namespace");
  }
  Change change(*this);
  std::unique_ptr<Forest>& forest = forests_[rules.size()];
  if (!forest) forest = std::make_unique<Forest>(shared_, uint32_t(rules.size()));
  std::vector<Contest*> contests;
  for (const Rule& rule : rules) {
    for (uint32_t tier = 0; tier < shared_.tiers; ++tier) contests.push_back(&contests_[{tier, rule.slot_classes[tier]}]);
  }
  Space& space = forest->add_space(root.data(), std::move(rules), std::move(contests));
  spaces_.emplace(root, Tree{forest.get(), &space});
  change.done();
}

void Index::retire_namespace(const Root& root) {
  const Tree found = tree(root);
  Change change(*this);
  if (!found.space->retired) found.forest->retire(*found.space);
  forget_if_over(found);
  change.done();
}

void Index::forget_if_over(const Tree& over) {
  if (!over.space->retired || over.space->copies != 0) return;
  const Root root = root_of(*over.space);
  over.forest->free_space(*over.space);
  spaces_.erase(root);
}

uint32_t Index::column(const Tree& found, uint32_t tier, uint32_t group) const {
  check_tier(tier);
  if (group >= found.space->rules.size()) {
    throw ArgumentError("group " + std::to_string(group) + ": this namespace has groups 0 to " +
                        std::to_string(found.space->rules.size() - 1));
  }
  return group * shared_.tiers + tier;
}

void Index::check_tier(uint32_t tier) const {
  if (tier >= shared_.tiers) {
    throw ArgumentError("tier " + std::to_string(tier) + ": this index has tiers 0 to " +
                        std::to_string(shared_.tiers - 1));
  }
}

Ghost* Index::ghost(uint32_t tier) { return ghosts_[tier].get(); }

// ---------------------------------------------------------------- reading

Index::Walked Index::match(Tree found, const uint8_t* keys, uint32_t count) {
  const uint32_t groups = uint32_t(found.space->rules.size());
  const uint32_t known = found.space->retired ? 0 : found.forest->walk(*found.space, keys, count, path_);
  return {found.forest, found.space, known, groups};
}

uint32_t Index::fill(const Walked& walked, uint8_t* tiers, int64_t* slots) {
  if (walked.known == 0) return 0;
  walked.forest->fill_match(*walked.space, path_, walked.known, tiers, slots);
  return walked.forest->covered(*walked.space, path_, walked.known, tiers);
}

void Index::residency(Tree found, const uint8_t* keys, uint32_t count, uint32_t tier, uint32_t group,
                      int64_t* slots) {
  const uint32_t number = column(found, tier, group);
  found.forest->walk(*found.space, keys, count, path_);
  found.forest->fill_residency(path_, number, count, slots);
}

uint64_t Index::count(uint32_t tier) const {
  check_tier(tier);
  return shared_.counts[tier];
}

Forest::CopyRows Index::copies(Tree found, uint32_t tier, uint32_t group) {
  Forest::CopyRows rows;
  found.forest->copies(*found.space, column(found, tier, group), rows);
  return rows;
}

Statistics Index::statistics() const {
  Statistics all{};
  all.namespaces = spaces_.size();
  for (const auto& [root, found] : spaces_) {
    all.positions += found.space->positions;
    all.orphans += found.space->orphan_count;
  }
  for (uint64_t copies : shared_.counts) all.copies += copies;
  all.pinned = shared_.pinned;
  all.visited = shared_.visited;
  for (const auto& [groups, forest] : forests_) {
    all.nodes += forest->nodes();
    all.memory_bytes += forest->memory_bytes();
  }
  all.nodes -= 2 * spaces_.size();  // the tops of each namespace's trees
  for (const auto& ghost : ghosts_) all.memory_bytes += ghost ? ghost->memory_bytes() : 0;
  return all;
}

// ---------------------------------------------------------------- changing

void Index::touch(Tree found, const uint8_t* keys, uint32_t count) {
  ++tick_;
  found.forest->walk(*found.space, keys, count, path_);
  Change change(*this);
  found.forest->touch(*found.space, path_, tick_);
  change.done();
}

void Index::insert(Tree found, const uint8_t* keys, uint32_t count, uint32_t tier, uint32_t group,
                   const int64_t* slots, uint8_t* taken) {
  const uint32_t number = column(found, tier, group);
  for (uint32_t i = 0; i < count; ++i) {
    if (slots[i] < kNoSlot || slots[i] > kMaxSlot) {
      throw ArgumentError("slots[" + std::to_string(i) + "] = " + std::to_string(slots[i]) + ": must be 0 to " +
                          std::to_string(kMaxSlot) + ", or -1 for none");
    }
  }
  ++tick_;
  while (count != 0 && slots[count - 1] == kNoSlot) --count;
  if (count == 0) return;
  Change change(*this);
  found.forest->insert(*found.space, keys, count, number, slots, taken, tick_, ghost(tier));
  change.done();
}

void Index::remove(Tree found, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start,
                   uint32_t stop, int64_t* slots) {
  const uint32_t number = column(found, tier, group);
  std::fill(slots, slots + (stop - start), kNoSlot);
  found.forest->walk(*found.space, keys, stop, path_);
  if (found.forest->pinned(path_, number, start, stop, false)) {
    throw ArgumentError("a copy in [" + std::to_string(start) + ", " + std::to_string(stop) + ") of tier " +
                        std::to_string(tier) + " is pinned: unpin it first");
  }
  Change change(*this);
  found.forest->remove(*found.space, path_, number, start, stop, slots);
  forget_if_over(found);
  change.done();
}

Forest::RemovedRows Index::remove_subtree(Tree found, const uint8_t* keys, uint32_t count) {
  Forest::RemovedRows rows;
  Change change(*this);
  const bool done = found.forest->remove_subtree(*found.space, keys, count, rows);
  if (done) forget_if_over(found);
  change.done();
  if (!done) throw ArgumentError("a copy in the subtree is pinned: unpin it first");
  return rows;
}

void Index::find_held(Tree found, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start, uint32_t stop) {
  found.forest->walk(*found.space, keys, stop, path_);
  if (found.forest->holds(path_, column(found, tier, group), start, stop)) return;
  throw ArgumentError("positions [" + std::to_string(start) + ", " + std::to_string(stop) +
                      ") are not all held by tier " + std::to_string(tier) + ", group " + std::to_string(group));
}

void Index::pin(Tree found, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start, uint32_t stop) {
  find_held(found, keys, tier, group, start, stop);
  Change change(*this);
  found.forest->pin(path_, column(found, tier, group), start, stop, 1);
  change.done();
}

void Index::unpin(Tree found, const uint8_t* keys, uint32_t tier, uint32_t group, uint32_t start, uint32_t stop) {
  find_held(found, keys, tier, group, start, stop);
  if (!found.forest->pinned(path_, column(found, tier, group), start, stop, true)) {
    throw ArgumentError("a copy in [" + std::to_string(start) + ", " + std::to_string(stop) + ") of tier " +
                        std::to_string(tier) + " has no pin to take back");
  }
  Change change(*this);
  found.forest->pin(path_, column(found, tier, group), start, stop, -1);
  change.done();
}

void Index::recover(Tree found, uint32_t tier, uint32_t group, uint32_t count, const uint8_t* keys,
                    const uint8_t* parents, const int64_t* depths, const int64_t* slots, uint8_t* taken) {
  const uint32_t number = column(found, tier, group);
  for (uint32_t i = 0; i < count; ++i) {
    if (slots[i] < 0 || slots[i] > kMaxSlot) {
      throw ArgumentError("slots[" + std::to_string(i) + "] = " + std::to_string(slots[i]) + ": must be 0 to " +
                          std::to_string(kMaxSlot));
    }
    if (depths[i] < 0 || depths[i] >= int64_t(GroupState::kNoHole)) {
      throw ArgumentError("depths[" + std::to_string(i) + "] = " + std::to_string(depths[i]) + ": must be 0 to " +
                          std::to_string(GroupState::kNoHole - 1));
    }
  }
  if (recovery_tick_ == 0) recovery_tick_ = ++tick_;
  Change change(*this);
  found.forest->recover(*found.space, number, count, keys, parents, depths, slots, taken, recovery_tick_, ghost(tier));
  change.done();
}

void Index::end_recovery() {
  recovery_tick_ = 0;
  Change change(*this);
  for (auto& [groups, forest] : forests_) forest->end_recovery();
  change.done();
}

void Index::drop_tier(uint32_t tier) {
  check_tier(tier);
  Change change(*this);
  for (auto& [groups, forest] : forests_) forest->drop_tier(tier);
  std::vector<Tree> all;
  for (const auto& [root, found] : spaces_) all.push_back(found);
  for (const Tree& found : all) forget_if_over(found);
  change.done();
}

// ---------------------------------------------------------------- eviction

Queue* Index::choose(Contest& contest, uint32_t tier) {
  if (!contest.retired.empty()) return contest.retired.top();
  Queue* first = contest.live[0].top();
  if (shared_.policies[tier].kind != Policy::Kind::kS3Fifo) return first;
  Queue* second = contest.live[1].top();
  if (first == nullptr || second == nullptr) return first != nullptr ? first : second;
  if (is_stranded(first->top_order())) return first;
  return contest.small * 10 >= contest.copies ? first : second;
}

// S3-FIFO: whether the candidate was spared, to be judged again later.
bool Index::second_chance(Queue& queue, NodeId node, Contest& contest) {
  Forest& forest = queue.owner;
  const uint32_t position = forest.candidate_position(node, queue.column);
  const State old = forest.state_at(node, queue.column, position);
  const uint32_t uses = old.aux & Policy::kUses;
  const bool main = (old.aux & Policy::kMain) != 0;
  if (main ? uses == 0 : uses <= 1) return false;
  const State made{++tick_, main ? (old.aux - 1) : Policy::kMain};
  if (!main) --contest.small;
  steps_.push_back({&forest, node, queue.column, position, kEmpty, old, false, 0});
  forest.set_state(node, queue.column, position, position + 1, made);
  forest.refresh(node, queue.column);
  return true;
}

void Index::undo() {
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    Forest& forest = *step->forest;
    if (step->slot != kEmpty) {
      forest.attach(step->node, step->column, step->position, step->slot);
    } else {
      forest.count_state(step->node, step->column,
                         forest.state_at(step->node, step->column, step->position), -1);
    }
    forest.set_state(step->node, step->column, step->position, step->position + 1, step->state);
    forest.count_state(step->node, step->column, step->state, 1);
    forest.refresh(step->node, step->column);
  }
}

bool Index::evict(uint32_t tier, uint64_t count, uint32_t slot_class, const EvictedRows& rows) {
  check_tier(tier);
  const auto found = contests_.find({tier, slot_class});
  if (count == 0) return true;
  if (found == contests_.end() || found->second.copies < count) return false;
  Change change(*this);
  Contest& contest = found->second;
  const uint64_t tick = tick_, copies = shared_.counts[tier];
  const bool s3fifo = shared_.policies[tier].kind == Policy::Kind::kS3Fifo;
  steps_.clear();
  uint64_t gone = 0;
  while (gone < count) {
    Queue* queue = choose(contest, tier);
    if (queue == nullptr) break;
    ++shared_.visited;
    Forest& forest = queue->owner;
    const NodeId node = queue->top();
    const uint32_t number = queue->column;
    queue->prefetch_next(node);
    const bool judged = s3fifo && contest.retired.empty() && !is_stranded(queue->top_order());
    if (judged && second_chance(*queue, node, contest)) continue;
    const uint32_t position = forest.candidate_position(node, number);
    const State state = forest.state_at(node, number, position);
    const uint64_t slot = forest.detach(node, number, position);
    steps_.push_back({&forest, node, number, position, slot, state, judged && (state.aux & Policy::kMain) == 0, 0});
    ++gone;
  }
  if (gone < count) {
    undo();
    tick_ = tick;
    change.done();
    return false;
  }
  finish(rows);
  if (ghosts_[tier]) {
    for (const Step& step : steps_) {
      if (step.ghost) ghosts_[tier]->add(key_word(rows.keys + step.row * kKeyBytes), step.column / shared_.tiers);
    }
    ghosts_[tier]->shrink(copies);
  }
  change.done();
  return true;
}

bool Index::evict_range(uint32_t tier, uint64_t start, uint64_t stop, uint64_t count, const EvictedRows& rows) {
  check_tier(tier);
  steps_.clear();
  std::vector<std::pair<Forest*, Forest::Held>> found;
  for (auto& [groups, forest] : forests_) {
    std::vector<Forest::Held> held;
    if (!forest->find_range(tier, start, stop, held)) return false;
    for (const Forest::Held& each : held) found.emplace_back(forest.get(), each);
  }
  if (found.size() != count) return false;
  Change change(*this);
  for (const auto& [forest, each] : found) {
    const uint64_t slot = forest->detach(each.node, each.column, each.position);
    steps_.push_back({forest, each.node, each.column, each.position, slot, State{}, false, 0});
  }
  finish(rows);
  change.done();
  return true;
}

// Says what has gone, and takes positions and namespaces that nothing holds any more away.
void Index::finish(const EvictedRows& rows) {
  size_t row = 0;
  for (Step& step : steps_) {
    if (step.slot == kEmpty) continue;
    const uint8_t* name = step.forest->key(step.node, step.position);
    std::memcpy(rows.roots + row * kKeyBytes, step.forest->space_of(step.node).root, kKeyBytes);
    std::memcpy(rows.keys + row * kKeyBytes, name, kKeyBytes);
    rows.groups[row] = uint8_t(step.column / shared_.tiers);
    rows.slots[row] = int64_t(step.slot);
    step.row = row++;
  }
  std::vector<Root> over;
  for (auto& [groups, forest] : forests_) {
    for (const Step& step : steps_) {
      if (step.forest != forest.get()) continue;
      forest->prefetch_pruning(step.node);
      forest->mark_dirty(step.node, dirty_);
    }
    for (NodeId id : dirty_) {
      const Space& space = forest->space_of(id);
      if (space.retired && space.copies == 0) over.push_back(root_of(space));
    }
    forest->prune(dirty_);
  }
  for (const Root& root : over) {
    if (has_namespace(root)) forget_if_over(tree(root));
  }
}

}  // namespace flexkv::index
