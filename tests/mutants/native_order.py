"""Mutants of what is first and last: policies, queues, eviction, recovery, arguments."""

from __future__ import annotations

from mutant import Mutant

BINDINGS = "native/index_bindings.cpp"
SHAPE = "native/index/shape.cpp"
ARRAYS = "native/arrays.hpp"
CANDIDATES, GHOST, INDEX, POLICY, RECOVER, RESIDENCY, FOREST = (
    f"native/index/{name}"
    for name in (
        "candidates.hpp", "ghost.hpp", "index.cpp", "policy.hpp", "recover.cpp", "residency.cpp", "forest.cpp",
    )
)  # fmt: skip

POLICIES = [
    Mutant(
        "lru-reward", POLICY,
        "std::min(std::max(state.tick, now) + reward, kLatest)",
        "std::min(state.tick + reward, kLatest)",
        "lru: a reward does not start from now",
    ),
    Mutant(
        "lfu-hit", POLICY,
        "if (kind == Kind::kLfu) return state.aux;",
        "if (kind == Kind::kLfu) return std::min(state.aux, 2u);",
        "lfu: counts up to two",
    ),
    Mutant(
        "lfu-tie", POLICY,
        "        state.aux = std::min(state.aux + 1, kMostUses);\n        state.tick = now;",
        "        state.aux = std::min(state.aux + 1, kMostUses);",
        "lfu and slru: of equals the latest hit does not count",
    ),
    Mutant("slru-threshold", POLICY, "state.aux >= threshold", "state.aux > threshold", "slru: one hit too many"),
    Mutant(
        "fifo-hit", POLICY,
        "      case Kind::kFifo:\n",
        "      case Kind::kFifo: state.tick = now; break;\n",
        "fifo: a hit counts",
    ),
    Mutant(
        "mru-hit", POLICY,
        "case Kind::kMru: state.tick = now; break;",
        "case Kind::kMru: break;",
        "mru: a hit is nothing",
    ),
    Mutant(
        "filo-order", POLICY,
        "if (kind == Kind::kMru || kind == Kind::kFilo) return ~state.tick;",
        "if (kind == Kind::kMru) return ~state.tick;",
        "filo: the oldest goes first",
    ),
    Mutant(
        "custom-sign", POLICY,
        " ^ (uint64_t(1) << 63);",
        ";",
        "third parties: negative orders come last",
    ),
    Mutant(
        "s3fifo-uses", POLICY,
        "std::min((state.aux & kUses) + 1, kUses)",
        "(((state.aux & kUses) + 1) & kUses)",
        "s3fifo: the fourth use begins anew",
    ),
    Mutant(
        "s3fifo-promotion", INDEX,
        "if (main ? uses == 0 : uses <= 1) return false;",
        "if (main ? uses == 0 : uses == 0) return false;",
        "s3fifo: one hit leads to the main queue",
    ),
    Mutant(
        "s3fifo-tenth", INDEX,
        "contest.small * 10 >= contest.copies",
        "contest.small * 10 > contest.copies",
        "s3fifo: a tenth is not enough",
    ),
    Mutant(
        "s3fifo-small", INDEX,
        "if (!main) --contest.small;",
        "",
        "s3fifo: what moved to main still counts as small",
    ),
    Mutant(
        "s3fifo-ghost-of-main", INDEX,
        "judged && (state.aux & Policy::kMain) == 0",
        "judged",
        "s3fifo: the ghost learns what leaves the main queue",
    ),
    Mutant(
        "s3fifo-ghost-size", INDEX,
        "ghosts_[tier]->shrink(copies);",
        "ghosts_[tier]->shrink(shared_.counts[tier]);",
        "s3fifo: the ghost is as small as the tier came to be",
    ),
    Mutant(
        "s3fifo-ghost-compacted", GHOST,
        "    next_ = number;\n",
        "    next_ = number + 1;\n",
        "s3fifo: a ghost that was compacted knows the wrong blocks",
    ),
    Mutant(
        "s3fifo-ghost-group", GHOST,
        "found.word == word && found.group == group",
        "found.word == word",
        "s3fifo: the ghost knows no groups",
    ),
    Mutant(
        "s3fifo-stranded", RESIDENCY,
        "policy.kind == Policy::Kind::kS3Fifo && !is_stranded(now) &&",
        "policy.kind == Policy::Kind::kS3Fifo &&",
        "s3fifo: stranded copies of the main queue do not go first",
    ),
]  # fmt: skip

QUEUES = [
    Mutant(
        "append-equal", CANDIDATES,
        "      if (order > back_order_) {",
        "      if (order >= back_order_) {",
        "list: of equals the later one is last, whatever its depth and key",
    ),
    Mutant(
        "prepend-equal", CANDIDATES,
        "if (front_known_ && order < front_order_) {",
        "if (front_known_ && order <= front_order_) {",
        "list: of equals the later one is first",
    ),
    Mutant(
        "back-stays", CANDIDATES,
        "if (node == back_ && order >= back_order_) {",
        "if (node == back_) {",
        "list: its last stays last, whatever comes",
    ),
    Mutant(
        "unlink-front", CANDIDATES,
        "      front_ = link.next;\n      front_known_ = false;",
        "      front_ = link.next;",
        "list: the order of the first is still that of one that left",
    ),
    Mutant(
        "unlink-mark", CANDIDATES,
        "owner.link(link.next, column).previous = previous | mark_;",
        "owner.link(link.next, column).previous = previous;",
        "list: the follower of one that left is thought to be in the other queue",
    ),
    Mutant(
        "rename-back", CANDIDATES,
        "      back_ = to;\n",
        "",
        "list: its last is still a node that was merged away",
    ),
    Mutant(
        "heap-parent", CANDIDATES,
        "const uint32_t parent = (place - 1) / kWays;",
        "const uint32_t parent = (place - 1) / kWays / 2;",
        "heap: entries rise past their parents",
    ),
    Mutant(
        "heap-sink", CANDIDATES,
        "return up != place ? up : sink(place, entry);",
        "return up;",
        "heap: what became later does not sink",
    ),
    Mutant(
        "heap-equal", CANDIDATES,
        "if (now == least && before_equal(entries_[child], entries_[best])) best = child;",
        "",
        "heap: of equals the first found sinks last, whatever its depth and key",
    ),
    Mutant(
        "equal-depth", CANDIDATES,
        "    if (a.node == b.node) return false;\n"
        "    const uint32_t above = owner.depth(a.node, column), below = owner.depth(b.node, column);\n"
        "    if (above != below) return above > below;",
        "    if (a.node == b.node) return false;\n"
        "    const uint32_t above = owner.depth(a.node, column), below = owner.depth(b.node, column);\n"
        "    if (above != below) return above < below;",
        "order: of equals the shallower one goes first",
    ),
    Mutant(
        "tournament-group", CANDIDATES,
        "return a->group < b->group;",
        "return a->group > b->group;",
        "tournament: of equals the last group goes first",
    ),
    Mutant(
        "tournament-sibling", CANDIDATES,
        "if (child + 1 < queues_.size() && before(queues_[child + 1], queues_[child])) ++child;",
        "",
        "tournament: only one of two queues is compared",
    ),
    Mutant(
        "tournament-leave", CANDIDATES,
        "    seat(last, at);\n    settle(at);",
        "    seat(last, at);",
        "tournament: the last queue takes the seat of one that left, whatever its candidate",
    ),
]  # fmt: skip

EVICTION = [
    Mutant(
        "retire-last", INDEX,
        "if (!contest.retired.empty()) return contest.retired.top();",
        "if (contest.live[0].empty() && !contest.retired.empty()) return contest.retired.top();",
        "evict: retired namespaces go last",
    ),
    Mutant(
        "forget-after-evict", INDEX,
        "if (space.retired && space.copies == 0) over.push_back(root_of(space));",
        "if (space.retired && space.copies == 1) over.push_back(root_of(space));",
        "evict: a retired namespace is not forgotten with its last copy",
    ),
    Mutant(
        "forget-after-drop", INDEX,
        "for (const Tree& found : all) forget_if_over(found);",
        "",
        "drop_tier: a retired namespace is not forgotten with its last copy",
    ),
    Mutant(
        "match-retired", INDEX,
        "found.space->retired ? 0 : found.forest->walk",
        "found.space->copies == 0 ? 0 : found.forest->walk",
        "match: a retired namespace still matches",
    ),
    Mutant(
        "undo-state", INDEX,
        "    forest.set_state(step->node, step->column,",
        "    if (step->slot == kEmpty) forest.set_state(step->node, step->column,",
        "an eviction that fails: copies come back without their recency",
    ),
    Mutant(
        "undo-chances", INDEX,
        "    forest.set_state(step->node, step->column,",
        "    if (step->slot != kEmpty) forest.set_state(step->node, step->column,",
        "an eviction that fails: second chances are not taken back",
    ),
    Mutant(
        "undo-tick", INDEX,
        "    tick_ = tick;\n",
        "",
        "an eviction that fails: time goes on",
    ),
    Mutant(
        "undo-hole", RESIDENCY,
        "  if (!was_populated) populated(id, number);\n  advance_hole(id, number / shared_.tiers);\n}",
        "  if (!was_populated) populated(id, number);\n}",
        "an eviction that fails: holes stay",
    ),
    Mutant(
        "undo-branches", RESIDENCY,
        "count_copies(space_of(id), number, 1);\n  if (!was_populated) populated(id, number);",
        "count_copies(space_of(id), number, 1);",
        "an eviction that fails: copies that came back do not hold their ancestors back",
    ),
]  # fmt: skip

RECOVERY = [
    Mutant(
        "join-stranded", RECOVER,
        "for (uint32_t group = 0; group < groups_; ++group) spread_stranded(id, group);",
        "",
        "orphans that join stay stranded",
    ),
    Mutant(
        "join-branches", RECOVER,
        "    hang(id, orphan);\n    for (uint32_t number = 0; number < columns_; ++number) {\n"
        "      if (columns(orphan)[number].populated()) populated(orphan, number);\n    }",
        "    hang(id, orphan);",
        "orphans that join do not hold their ancestors back",
    ),
    Mutant(
        "join-depth", RECOVER,
        "there.space == space.number && there.start == depth &&",
        "there.space == space.number &&",
        "orphans join whatever their depth",
    ),
    Mutant(
        "join-one", RECOVER,
        "      joining.push_back(orphan);\n    }\n    return false;",
        "      joining.push_back(orphan);\n    }\n    return !joining.empty();",
        "only one of the orphans that wait for a position joins",
    ),
    Mutant(
        "join-in-insert", RESIDENCY,
        "while (last + 1 < some && !awaited(rest + size_t(last) * kKeyBytes)) ++last;",
        "while (last + 1 < some && !awaited(rest + size_t(last) * kKeyBytes)) last = std::min(last + 2, some - 1);",
        "insert: orphans that wait for every other new position are missed",
    ),
    Mutant(
        "recover-by-depth", RECOVER,
        "for (uint32_t row = 0; row < count; ++row) order[starts[size_t(depths[row])]++] = row;",
        "std::iota(order.begin(), order.end(), 0);",
        "recover: records are taken as they come, not by depth",
    ),
    Mutant(
        "recover-by-great-depth", RECOVER,
        "return depths[a] < depths[b]; });",
        "return a < b; });",
        "recover: as above, where a depth is great",
    ),
    Mutant(
        "recover-root", RECOVER,
        "if ((depth == 0) != same_key(parent, space.root)) return;",
        "",
        "recover: a first block may have any parent",
    ),
    Mutant(
        "recover-depth", RECOVER,
        "if (node(above.node).start + above.position + 1 != depth) return;",
        "",
        "recover: a record may have any depth below its parent",
    ),
    Mutant(
        "recover-split", SHAPE,
        "  if (recovering_) {\n    note_tiles(head_id, 0);",
        "  if (recovering_) {",
        "recover: keys of a head that was split off are not found",
    ),
    Mutant(
        "recover-merge", SHAPE,
        "const uint32_t moved = recovering_ ? shift + lower.length : 0;",
        "const uint32_t moved = recovering_ ? shift : 0;",
        "recover: keys that a merge moved are not found",
    ),
    Mutant(
        "recovery-ticks", INDEX,
        "if (recovery_tick_ == 0) recovery_tick_ = ++tick_;",
        "recovery_tick_ = ++tick_;",
        "recover: each piece has a tick of its own",
    ),
    Mutant(
        "recovery-merges-nothing", RECOVER,
        "if (child == kNone || node(child).next != kNone || !try_merge(id)) break;",
        "break;",
        "end_recovery: what joined piece by piece stays many nodes",
    ),
]  # fmt: skip

ARGUMENTS = [
    Mutant(
        "range-below-zero", BINDINGS,
        "if (0 <= start && start <= stop && stop <= keys) return;",
        "if (start <= stop && stop <= keys) return;",
        "a range may begin before 0",
    ),
    Mutant(
        "integers-of-any-type", ARRAYS,
        "return view_.itemsize == 8 && (holds('l') || holds('q'));",
        "return view_.itemsize == 8;",
        "slots and depths may be of any type of 8 bytes",
    ),
    Mutant(
        "strided-arrays", ARRAYS,
        "(aligned && PyBuffer_IsContiguous(&view_, 'C') != 0)) return;",
        "(aligned && view_.ndim != 0)) return;",
        "arrays are read as if their elements lay side by side",
    ),
    Mutant(
        "keys-of-any-width", BINDINGS,
        "if (view_.dimensions() != 2 || view_.size(1) != Py_ssize_t(kKeyBytes)) {",
        "if (view_.dimensions() != 2) {",
        "keys may have any width",
    ),
    Mutant(
        "insert-retired", BINDINGS,
        "    const Index::Tree tree = live(root);\n    Keys view(*this, keys, \"keys\");",
        "    const Index::Tree tree = known(root);\n    Keys view(*this, keys, \"keys\");",
        "insert: a retired namespace is as good as any",
    ),
    Mutant(
        "slot-too-large", INDEX,
        "if (slots[i] < kNoSlot || slots[i] > kMaxSlot) {",
        "if (slots[i] < kNoSlot) {",
        "insert: slots may have more than 40 bits",
    ),
    Mutant(
        "evict-negative", BINDINGS,
        "if (count < 0) throw",
        "if (count < -1) throw",
        "evict: -1 is a count",
    ),
]  # fmt: skip
