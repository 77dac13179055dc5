// Copies: coming and going, recency, pins, holes, and who may be evicted. See forest.hpp.
#include "forest.hpp"
#include "ghost.hpp"

namespace flexkv::index {

// ---------------------------------------------------------------- states and pins of ranges

Extra& Forest::extra_of(Column& column) {
  if (column.extra == kNone) {
    if (free_extras_.empty()) {
      column.extra = uint32_t(extras_.size());
      extras_.emplace_back();
    } else {
      column.extra = free_extras_.back();
      free_extras_.pop_back();
    }
  }
  return extras_[column.extra];
}

void Forest::drop_extra(Column& column) {
  if (column.extra == kNone) return;
  extras_[column.extra] = Extra{};
  free_extras_.push_back(column.extra);
  column.extra = kNone;
}

// Runs that say what one state can say go; so does an extra that says nothing.
void Forest::tidy_extra(Column& column) {
  if (column.extra == kNone) return;
  Extra& extra = extras_[column.extra];
  if (extra.runs.size() == 1) {
    column.set_state(extra.runs[0].state);
    extra.runs = Runs{};
  }
  if (extra.empty()) drop_extra(column);
}

State Forest::state_at(NodeId id, uint32_t number, uint32_t position) {
  const Column& column = columns(id)[number];
  if (column.extra == kNone || extras_[column.extra].runs.empty()) return column.state();
  return state_in(extras_[column.extra].runs, position);
}

void Forest::set_state(NodeId id, uint32_t number, uint32_t start, uint32_t stop, const State& state) {
  Column& column = columns(id)[number];
  if (stop >= column.top) stop = kNone;  // nothing is held beyond
  if (start == 0 && stop == kNone) {
    column.set_state(state);
    if (column.extra == kNone) return;
    extras_[column.extra].runs = Runs{};
    tidy_extra(column);
    return;
  }
  if (column.extra == kNone && column.state() == state) return;
  Extra& extra = extra_of(column);
  if (extra.runs.empty()) extra.runs.push_back({kNone, column.state()});
  set_run(extra.runs, start, stop, state);
  tidy_extra(column);
}

void Forest::touch_column(NodeId id, uint32_t number, uint32_t count, uint64_t now) {
  Column& column = columns(id)[number];
  const Policy& policy = shared_.policies[number % shared_.tiers];
  if (count >= column.top) count = kNone;
  if (column.extra == kNone || extras_[column.extra].runs.empty()) {
    const State old = column.state(), made = policy.hit(old, now);
    if (made == old) return;
    if (count == kNone) {
      column.set_state(made);
    } else {
      extra_of(column).runs = {{count, made}, {kNone, old}};
    }
    return;
  }
  Runs made;
  uint32_t at = 0;
  for (const Run& run : extras_[column.extra].runs) {
    if (at < count) append_run(made, std::min(run.end, count), policy.hit(run.state, now));
    if (run.end > count) append_run(made, run.end, run.state);
    at = run.end;
  }
  extras_[column.extra].runs.swap(made);
  tidy_extra(column);
}

bool Forest::is_pinned(const Column& column, uint32_t position) const {
  return column.extra != kNone && any_pinned(extras_[column.extra].pins, position, position + 1);
}

bool Forest::holds(const Path& path, uint32_t number, uint32_t start, uint32_t stop) {
  uint32_t found = 0;
  each_part(path, start, stop, [&](NodeId id, uint32_t from, uint32_t to, uint32_t) {
    const Column& column = columns(id)[number];
    if (column.prefix()) {
      found += std::min(to, std::max(column.top, from)) - from;
      return;
    }
    for (uint32_t at = from; at < to; ++at) found += slot_in(node(id), at, number) != kEmpty;
  });
  return found == stop - start;
}

bool Forest::pinned(const Path& path, uint32_t number, uint32_t start, uint32_t stop, bool all) {
  bool every = true, some = false;
  each_part(path, start, stop, [&](NodeId id, uint32_t from, uint32_t to, uint32_t) {
    const Column& column = columns(id)[number];
    static const std::vector<PinRun> kNoPins;
    const std::vector<PinRun>& pins = column.extra == kNone ? kNoPins : extras_[column.extra].pins;
    every = every && all_pinned(pins, from, to);
    some = some || any_pinned(pins, from, to);
  });
  return all ? every : some;
}

void Forest::pin(const Path& path, uint32_t number, uint32_t start, uint32_t stop, int32_t change) {
  each_part(path, start, stop, [&](NodeId id, uint32_t from, uint32_t to, uint32_t) {
    Column& column = columns(id)[number];
    shared_.pinned += uint64_t(change_pins(extra_of(column).pins, from, to, change));
    tidy_extra(column);
    if (to >= column.top) refresh(id, number);
  });
}

// ---------------------------------------------------------------- candidates

bool Forest::leads_to_hole(Node& here, uint32_t group) { return groups_of(here)[group].hole != GroupState::kNoHole; }

void Forest::fix(Space& space, uint32_t number, bool second) {
  Contest& contest = *space.contests[number];
  (space.retired ? contest.retired : contest.live[second ? 1 : 0]).fix(&queue_of(space, number, second));
}

void Forest::leave_queue(NodeId id, uint32_t number) {
  const Link link = links_[number][id];
  if (link.absent()) return;
  Space& space = space_of(id);
  if (queue_of(space, number, link.second()).remove(id)) fix(space, number, link.second());
}

// The place of the node's candidate of a column among all.
Order Forest::order(NodeId id, uint32_t number) {
  Node& here = node(id);
  const Policy& policy = shared_.policies[number % shared_.tiers];
  const uint32_t position = columns_of(here)[number].top - 1;
  const State state = state_at(id, number, position);
  const GroupState& group = groups_of(here)[number / shared_.tiers];
  const bool stranded = group.stranded || group.hole < position;
  return order_of((stranded ? 0 : kLive) | policy.primary(state), policy.secondary(state));
}

// Enters, moves or takes out the node's candidate of a column, as things now stand.
void Forest::refresh(NodeId id, uint32_t number) {
  Node& here = node(id);
  Column& column = columns_of(here)[number];
  if (column.top == 0 || column.branches != 0 || is_pinned(column, column.top - 1)) {
    leave_queue(id, number);
    return;
  }
  Space& space = *spaces_[here.space];
  const Order now = order(id, number);
  const Policy& policy = shared_.policies[number % shared_.tiers];
  const bool second = policy.kind == Policy::Kind::kS3Fifo && !is_stranded(now) &&
                      policy.in_main(state_at(id, number, column.top - 1));
  Queue& queue = queue_of(space, number, second);
  const Link& link = links_[number][id];
  bool changed;
  if (!link.absent() && link.second() == second) {
    changed = queue.update(id, now);
  } else {
    leave_queue(id, number);
    changed = queue.push(id, now);
  }
  if (changed) fix(space, number, second);
}

// The node's subtree has come to have its first copy in a column: its ancestors are no longer last.
void Forest::populated(NodeId id, uint32_t number) {
  for (NodeId at = node(id).parent; at != kNone; at = node(at).parent) {
    Column& column = columns(at)[number];
    const bool was = column.populated();
    ++column.branches;
    leave_queue(at, number);
    if (was) return;
  }
}

void Forest::unpopulated(NodeId id, uint32_t number) {
  for (NodeId at = node(id).parent; at != kNone; at = node(at).parent) {
    Column& column = columns(at)[number];
    --column.branches;
    if (!column.populated()) continue;
    if (column.branches == 0) refresh(at, number);
    return;
  }
}

// ---------------------------------------------------------------- holes

bool Forest::held_by_any(const Node& here, uint32_t group, uint32_t position) {
  const Column* all = columns_of(const_cast<Node&>(here)) + group * shared_.tiers;
  for (uint32_t tier = 0; tier < shared_.tiers; ++tier) {
    if (position >= all[tier].top) continue;
    if (all[tier].prefix() || slot_in(here, position, group * shared_.tiers + tier) != kEmpty) return true;
  }
  return false;
}

// Copies have come: the first hole may be filled.
void Forest::advance_hole(NodeId id, uint32_t group) {
  Node& here = node(id);
  uint32_t hole = groups_of(here)[group].hole;
  if (hole == GroupState::kNoHole) return;
  const uint32_t old_hole = hole;
  const Column* all = columns_of(here) + group * shared_.tiers;
  while (hole < here.length && held_by_any(here, group, hole)) {
    ++hole;
    for (uint32_t tier = 0; tier < shared_.tiers; ++tier) {
      if (all[tier].prefix()) hole = std::max(hole, all[tier].top);
    }
  }
  if (hole != old_hole) set_hole(id, group, hole < here.length ? hole : GroupState::kNoHole);
}

void Forest::set_hole(NodeId id, uint32_t group, uint32_t hole) {
  GroupState& state = groups_of(node(id))[group];
  const bool led = state.hole != GroupState::kNoHole, leads = hole != GroupState::kNoHole;
  state.hole = hole;
  for (uint32_t tier = 0; tier < shared_.tiers; ++tier) {
    const uint32_t number = group * shared_.tiers + tier;
    if (columns(id)[number].top != 0 && !links_[number][id].absent()) refresh(id, number);
  }
  if (led != leads && !state.stranded) spread_stranded(id, group);
}

// Tells the nodes below whether a hole lies above them.
void Forest::spread_stranded(NodeId top, uint32_t group) {
  if (node(top).first_child == kNone) return;
  std::vector<NodeId> waiting{top};
  while (!waiting.empty()) {
    const NodeId parent = waiting.back();
    waiting.pop_back();
    const bool stranded = groups_of(node(parent))[group].stranded || leads_to_hole(node(parent), group);
    for (NodeId id = node(parent).first_child; id != kNone; id = node(id).next) {
      GroupState& state = groups_of(node(id))[group];
      if (bool(state.stranded) == stranded) continue;
      state.stranded = stranded;
      for (uint32_t tier = 0; tier < shared_.tiers; ++tier) {
        const uint32_t number = group * shared_.tiers + tier;
        if (!links_[number][id].absent()) refresh(id, number);
      }
      if (!leads_to_hole(node(id), group)) waiting.push_back(id);
    }
  }
}

// ---------------------------------------------------------------- coming and going

void Forest::count_copies(Space& space, uint32_t number, int64_t change) {
  space.copies += uint64_t(change);
  shared_.counts[number % shared_.tiers] += uint64_t(change);
  space.contests[number]->copies += uint64_t(change);
}

void Forest::count_state(NodeId id, uint32_t number, const State& state, int64_t change) {
  const Policy& policy = shared_.policies[number % shared_.tiers];
  if (policy.kind != Policy::Kind::kS3Fifo || policy.in_main(state)) return;
  space_of(id).contests[number]->small += uint64_t(change);
}

// Commits copies at [start, start + count) of a node where there are none. `slots` and `taken` begin at `start`.
void Forest::place(NodeId id, uint32_t number, uint32_t start, uint32_t count, const int64_t* slots, uint8_t* taken,
                   uint64_t now, Ghost* ghost) {
  Node& here = node(id);
  Column& column = columns_of(here)[number];
  const Policy& policy = shared_.policies[number % shared_.tiers];
  const bool was_populated = column.populated();
  const uint32_t old_top = column.top;
  uint32_t placed = 0;
  for (uint32_t at = start; at < start + count;) {
    if (slots[at - start] == kNoSlot || (at < column.top && slot_in(here, at, number) != kEmpty)) {
      ++at;
      continue;
    }
    const bool known = ghost != nullptr && ghost->take(key_in(here, at), number / shared_.tiers);
    const State state = policy.inserted(now, known);
    const uint32_t first = at;
    do {  // a run of equal states
      put_slot(here, at, number, uint64_t(slots[at - start]));
      taken[at - start] = 1;
      ++at;
    } while (ghost == nullptr && at < start + count && slots[at - start] != kNoSlot &&
             (at >= old_top || slot_in(here, at, number) == kEmpty));
    const bool empty = column.held == 0;
    column.held += at - first;
    column.top = std::max(column.top, at);
    placed += at - first;
    set_state(id, number, empty ? 0 : first, at, state);
    count_state(id, number, state, int64_t(at - first));
  }
  if (placed == 0) return;
  count_copies(*spaces_[here.space], number, placed);
  if (!was_populated) populated(id, number);
  advance_hole(id, number / shared_.tiers);
  if (column.top != old_top) refresh(id, number);
}

// Takes one copy out; its position stays. Returns its slot.
uint64_t Forest::detach(NodeId id, uint32_t number, uint32_t position) {
  Node& here = node(id);
  Column& column = columns_of(here)[number];
  const uint64_t slot = slot_in(here, position, number);
  count_state(id, number, state_at(id, number, position), -1);
  const bool dense = column.prefix();
  put_slot(here, position, number, kEmpty);
  --column.held;
  if (position + 1 == column.top) {
    --column.top;
    if (!dense) {
      while (column.top != 0 && slot_in(here, column.top - 1, number) == kEmpty) --column.top;
    }
    if (column.extra != kNone) {
      Runs& runs = extras_[column.extra].runs;
      while (runs.size() > 1 && runs[runs.size() - 2].end >= column.top) runs.pop_back();
      if (!runs.empty()) runs.back().end = kNone;
      tidy_extra(column);
    }
    refresh(id, number);
  }
  count_copies(*spaces_[here.space], number, -1);
  if (!column.populated()) unpopulated(id, number);
  const uint32_t group = number / shared_.tiers;
  const GroupState& state = groups_of(here)[group];
  if (spaces_[here.space]->rules[group].coverage == Coverage::kAll && position < state.hole &&
      !held_by_any(here, group, position)) {
    set_hole(id, group, position);
  }
  return slot;
}

// Puts a copy back that was just detached; its state is given by the caller.
void Forest::attach(NodeId id, uint32_t number, uint32_t position, uint64_t slot) {
  Column& column = columns(id)[number];
  const bool was_populated = column.populated();
  put_slot(node(id), position, number, slot);
  ++column.held;
  column.top = std::max(column.top, position + 1);
  count_copies(space_of(id), number, 1);
  if (!was_populated) populated(id, number);
  advance_hole(id, number / shared_.tiers);
}

void Forest::insert(Space& space, const uint8_t* keys, uint32_t count, uint32_t number, const int64_t* slots,
                    uint8_t* taken, uint64_t now, Ghost* ghost) {
  uint32_t known = walk(space, keys, count, scratch_);
  for (const Step& step : scratch_) {
    place(step.node, number, 0, step.count, slots + step.base, taken + step.base, now, ghost);
  }
  while (known < count) {
    const uint8_t* rest = keys + size_t(known) * kKeyBytes;
    uint32_t some = count - known;
    if (space.orphan_count != 0) {  // up to the first of the new positions that an orphan may wait for
      uint32_t last = 0;
      while (last + 1 < some && !awaited(rest + size_t(last) * kKeyBytes)) ++last;
      some = last + 1;
    }
    NodeId at = scratch_.empty() ? space.top : scratch_.back().node;
    uint32_t start = 0;
    if (!scratch_.empty() && scratch_.back().count < node(at).length) {
      at = split(at, scratch_.back().count);
      scratch_.back().node = at;
    }
    if (!sentinel(node(at)) && node(at).first_child == kNone) {
      start = node(at).length;
      extend(at, rest, some);
    } else {
      at = new_child(space, at, known, rest, some);
    }
    place(at, number, start, some, slots + known, taken + known, now, ghost);
    known += some;
    if (space.orphan_count == 0) return;
    join_orphans(space, at, start + some - 1);
    const uint32_t before = known;
    known = walk(space, keys, count, scratch_);
    each_part(scratch_, before, known, [&](NodeId id, uint32_t first, uint32_t last, uint32_t base) {
      place(id, number, first, last - first, slots + base, taken + base, now, ghost);
    });
  }
}

void Forest::touch(Space&, const Path& path, uint64_t now) {
  for (const Step& step : path) {
    Column* all = columns(step.node);
    for (uint32_t number = 0; number < columns_; ++number) {
      if (all[number].held == 0) continue;
      touch_column(step.node, number, step.count, now);
      if (all[number].top <= step.count && !links_[number][step.node].absent() &&
          shared_.policies[number % shared_.tiers].moves_on_hit()) {
        refresh(step.node, number);
      }
    }
  }
}

void Forest::remove(Space&, const Path& path, uint32_t number, uint32_t start, uint32_t stop, int64_t* slots) {
  each_part(path, start, stop, [&](NodeId id, uint32_t from, uint32_t to, uint32_t base) {
    for (uint32_t at = to; at-- > from;) {
      if (slot_in(node(id), at, number) == kEmpty) continue;
      slots[base + (at - from) - start] = int64_t(detach(id, number, at));
      mark_dirty(id, waiting_);
    }
  });
  prune(waiting_);
}

bool Forest::remove_subtree(Space& space, const uint8_t* keys, uint32_t count, RemovedRows& rows) {
  std::vector<std::pair<NodeId, uint32_t>> parts;  // nodes, and from which position on
  auto collect = [&](NodeId top, uint32_t first) {
    each_below(top, [&](NodeId id) {
      if (!sentinel(node(id))) parts.emplace_back(id, id == top ? first : 0);
    });
  };
  if (count == 0) {
    collect(space.top, 0);
    collect(space.orphans, 0);
  } else {
    Path path;
    if (walk(space, keys, count, path) < count) return true;
    collect(path.back().node, path.back().count - 1);
  }
  for (const auto& [id, first] : parts) {
    for (uint32_t number = 0; number < columns_; ++number) {
      const Column& column = columns(id)[number];
      if (column.extra != kNone && any_pinned(extras_[column.extra].pins, first, kNone)) return false;
    }
  }
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    const auto [id, first] = *part;
    mark_dirty(id, waiting_);
    for (uint32_t number = 0; number < columns_; ++number) {
      for (uint32_t at = columns(id)[number].top; at-- > first;) {
        if (slot_in(node(id), at, number) == kEmpty) continue;
        rows.tiers.push_back(uint8_t(number % shared_.tiers));
        rows.groups.push_back(uint8_t(number / shared_.tiers));
        const uint8_t* name = key(id, at);
        rows.keys.insert(rows.keys.end(), name, name + kKeyBytes);
        rows.slots.push_back(int64_t(detach(id, number, at)));
      }
    }
  }
  prune(waiting_);
  return true;
}

void Forest::drop_tier(uint32_t tier) {
  for (const auto& space : spaces_) {
    if (!space) continue;
    std::vector<NodeId> all;
    for (NodeId top : {space->top, space->orphans}) {
      each_below(top, [&](NodeId id) {
        if (!sentinel(node(id))) all.push_back(id);
      });
    }
    for (auto id = all.rbegin(); id != all.rend(); ++id) {  // the deepest first
      mark_dirty(*id, waiting_);
      for (uint32_t number = tier; number < columns_; number += shared_.tiers) {
        Column& column = columns(*id)[number];
        if (column.extra != kNone) {
          for (const PinRun& run : extras_[column.extra].pins) shared_.pinned -= run.stop - run.start;
          extras_[column.extra].pins.clear();
          tidy_extra(column);
        }
        for (uint32_t at = column.top; at-- > 0;) {
          if (slot_in(node(*id), at, number) != kEmpty) detach(*id, number, at);
        }
      }
    }
    prune(waiting_);
  }
}

}  // namespace flexkv::index
