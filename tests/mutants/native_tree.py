"""Mutants of the tree: nodes, copies, pins, recency, holes, answers."""

from __future__ import annotations

from mutant import Mutant

FOREST, SHAPE, KEY_MAP, MATCH, RESIDENCY, RUNS = (
    f"native/index/{name}"
    for name in ("forest.cpp", "shape.cpp", "key_map.hpp", "match.cpp", "residency.cpp", "runs.hpp")
)

NODES = [
    Mutant(
        "split-top", SHAPE,
        "below.top = top > position ? top - position : 0;",
        "below.top = top > position + 1 ? top - position : 0;",
        "split: a tail whose only copy is its first loses sight of it",
    ),
    Mutant(
        "split-shared-tile", SHAPE,
        "for (uint32_t block = first; block < cut % Tiles::kBlocks; ++block) copy_block(shared",
        "for (uint32_t block = first; block + 1 < cut % Tiles::kBlocks; ++block) copy_block(shared",
        "split: the head's copy of a shared tile lacks its last block",
    ),
    Mutant(
        "split-branches", SHAPE,
        "above.branches = below.populated() ? 1 : 0;",
        "above.branches = below.held != 0 ? 1 : 0;",
        "split: copies below the tail no longer hold the head back",
    ),
    Mutant(
        "split-runs", SHAPE,
        "append_run(lower.runs, run.end == kNone ? kNone : run.end - position, run.state);",
        "append_run(lower.runs, run.end, run.state);",
        "split: the tail's ranges of recency are not shifted",
    ),
    Mutant(
        "split-pins", SHAPE,
        "if (run.start < position) upper_extra.pins.push_back({run.start, std::min(run.stop, position), run.count});",
        "if (run.stop <= position) upper_extra.pins.push_back({run.start, std::min(run.stop, position), run.count});",
        "split: the head's part of a pinned range that is cut loses its pins",
    ),
    Mutant(
        "split-hole", SHAPE,
        "below.hole -= position;",
        "below.hole -= position - 1;",
        "split: the tail's hole is one too deep",
    ),
    Mutant(
        "split-second-hole", SHAPE,
        "while (at < tail.length && held_by_any(tail, group, at)) ++at;",
        "while (at < tail.length) ++at;",
        "split: a hole in the tail is ignored where there is one in the head",
    ),
    Mutant(
        "split-orphan", SHAPE,
        "if (head.parent == space.orphans) rename_orphan(id, head_id);",
        "",
        "split: an orphan's parent is still known for its tail",
    ),
    Mutant(
        "merge-runs", SHAPE,
        "const uint32_t end = run.end == kNone || start + run.end >= stop ? stop : start + run.end;",
        "const uint32_t end = run.end == kNone || run.end >= stop ? stop : run.end;",
        "merge: the lower node's ranges of recency are not shifted",
    ),
    Mutant(
        "merge-pins", SHAPE,
        "const uint32_t start = run.start + shift, stop = run.stop + shift;",
        "const uint32_t start = run.start + shift, stop = run.stop + shift - 1;",
        "merge: the last pin of a range of the lower node is lost",
    ),
    Mutant(
        "merge-hole", SHAPE,
        "below.hole += shift;",
        "below.hole += shift - 1;",
        "merge: the lower node's hole is one too shallow",
    ),
    Mutant(
        "merge-top", SHAPE,
        "below.top = below.top != 0 ? below.top + shift : above.top;",
        "below.top = below.top != 0 ? below.top + shift : 0;",
        "merge: copies of the upper node are lost sight of where the lower has none",
    ),
    Mutant(
        "merge-shared-tile", SHAPE,
        "const uint32_t first = upper_count == 1 ? upper.offset : 0;",
        "const uint32_t first = upper_count == 1 ? upper.offset : 1;",
        "merge: the first block of a shared tile stays behind",
    ),
    Mutant(
        "merge-upper-moves", SHAPE,
        "const uint32_t to = offset + position, from = upper.offset + position;",
        "const uint32_t to = offset + position, from = position;",
        "merge: blocks that move are taken from the wrong place of the first tile",
    ),
    Mutant(
        "merge-lower-moves", SHAPE,
        "const uint32_t to = upper.offset + upper.length + position, from = lower.offset + position;",
        "const uint32_t to = upper.offset + upper.length + position, from = position;",
        "merge: as above, of the lower node",
    ),
    Mutant(
        "merge-orphan", SHAPE,
        "if (upper.parent == space.orphans) rename_orphan(parent, id);",
        "",
        "merge: an orphan's parent is no longer known",
    ),
    Mutant(
        "prune-merges-nothing", SHAPE,
        "        try_merge(id);\n        break;",
        "        break;",
        "prune: a node and its only child stay two",
    ),
    Mutant(
        "trim-last-column", SHAPE,
        "length = std::max(length, columns_of(here)[column].top);",
        "length = columns_of(here)[column].top;",
        "trim: only the last column counts",
    ),
    Mutant(
        "trim-forgets", SHAPE,
        "if (length == 0) by_first_key_.erase(key_in(here, 0), id);",
        "if (length <= 1) by_first_key_.erase(key_in(here, 0), id);",
        "trim: a node that is cut to one position is not found any more",
    ),
    Mutant(
        "key-map-gap", KEY_MAP,
        "if (((at - home) & mask) >= ((at - gap) & mask)) {",
        "if (((at - home) & mask) > ((at - gap) & mask)) {",
        "KeyMap: an erased entry's gap hides the next of its cluster",
    ),
]  # fmt: skip

COPIES = [
    Mutant(
        "pin-ignored", RESIDENCY,
        "if (column.top == 0 || column.branches != 0 || is_pinned(column, column.top - 1)) {",
        "if (column.top == 0 || column.branches != 0 || is_pinned(column, column.top)) {",
        "eviction: looks for the pin one position too deep",
    ),
    Mutant(
        "unpin-missed", RESIDENCY,
        "if (to >= column.top) refresh(id, number);",
        "if (to > column.top) refresh(id, number);",
        "pin and unpin: whether the deepest copy may go is not judged again",
    ),
    Mutant(
        "unpin-one-is-enough", RESIDENCY,
        "return all ? every : some;",
        "return some;",
        "unpin: one pin in the range is enough",
    ),
    Mutant(
        "pin-count", RUNS,
        "if (change < 0 && run.count == 1) pinned -= to - from;",
        "if (change < 0) pinned -= to - from;",
        "unpin: copies that have another pin count as not pinned",
    ),
    Mutant(
        "pin-tail", RUNS,
        "add(std::max(run.start, stop), run.stop, run.count);",
        "add(std::max(run.start, stop) + 1, run.stop, run.count);",
        "unpin: takes one pin too many of a range that goes on",
    ),
    Mutant(
        "run-end", RUNS,
        "[](uint32_t value, const Run& run) { return value < run.end; });",
        "[](uint32_t value, const Run& run) { return value <= run.end; });",
        "recency: a range holds one position too many",
    ),
    Mutant(
        "run-start", RUNS,
        "append_run(made, std::min(run.end, start), run.state);",
        "append_run(made, std::min(run.end, stop), run.state);",
        "recency: a new state does not reach into an older range",
    ),
    Mutant(
        "touch-one-more", RESIDENCY,
        "extra_of(column).runs = {{count, made}, {kNone, old}};",
        "extra_of(column).runs = {{count + 1, made}, {kNone, old}};",
        "touch: reaches one position too far",
    ),
    Mutant(
        "touch-not-in-runs", RESIDENCY,
        "append_run(made, std::min(run.end, count), policy.hit(run.state, now));",
        "append_run(made, std::min(run.end, count), at == 0 ? policy.hit(run.state, now) : run.state);",
        "touch: recency is not touched behind a node's first range",
    ),
    Mutant(
        "touch-queue", RESIDENCY,
        "if (all[number].top <= step.count && !links_[number][step.node].absent() &&",
        "if (all[number].top < step.count && !links_[number][step.node].absent() &&",
        "touch: a candidate keeps its place in the queue",
    ),
    Mutant(
        "insert-touches", RESIDENCY,
        "set_state(id, number, empty ? 0 : first, at, state);",
        "set_state(id, number, 0, at, state);",
        "insert: gives what is held before it a new recency",
    ),
    Mutant(
        "hole-in-order", RESIDENCY,
        "const bool stranded = group.stranded || group.hole < position;",
        "const bool stranded = group.stranded || group.hole + 1 < position;",
        "order: a copy right behind a hole is not stranded",
    ),
    Mutant(
        "hole-off-by-one", RESIDENCY,
        "position < state.hole &&\n",
        "position + 1 < state.hole &&\n",
        "a copy leaves: the hole right before another is ignored",
    ),
    Mutant(
        "hole-filled-too-far", RESIDENCY,
        "hole = std::max(hole, all[tier].top);",
        "hole = std::max(hole, all[tier].top + 1);",
        "insert: the hole behind what was filled is skipped",
    ),
    Mutant(
        "stranded-one-level", RESIDENCY,
        "if (!leads_to_hole(node(id), group)) waiting.push_back(id);",
        "",
        "stranded: children learn of a hole, grandchildren do not",
    ),
    Mutant(
        "stranded-new-child", FOREST,
        "groups_of(node(parent))[group].stranded || leads_to_hole(node(parent), group);\n  }\n  by_first_key_",
        "groups_of(node(parent))[group].stranded;\n  }\n  by_first_key_",
        "stranded: a new node below a hole is not",
    ),
    Mutant(
        "hole-moves-no-candidate", RESIDENCY,
        "if (columns(id)[number].top != 0 && !links_[number][id].absent()) refresh(id, number);",
        "",
        "stranded: a candidate keeps its place when a hole comes or goes",
    ),
    Mutant(
        "remove-leaves-positions", RESIDENCY,
        "slots[base + (at - from) - start] = int64_t(detach(id, number, at));\n      mark_dirty(id, waiting_);",
        "slots[base + (at - from) - start] = int64_t(detach(id, number, at));",
        "remove: positions that nothing holds stay",
    ),
    Mutant(
        "remove-subtree-pins", RESIDENCY,
        "any_pinned(extras_[column.extra].pins, first, kNone)) return false;",
        "any_pinned(extras_[column.extra].pins, first + 1, kNone)) return false;",
        "remove_subtree: the pin of its first position is ignored",
    ),
    Mutant(
        "remove-subtree-above", RESIDENCY,
        "for (uint32_t at = columns(id)[number].top; at-- > first;) {",
        "for (uint32_t at = columns(id)[number].top; at-- > (first == 0 ? 0 : first - 1);) {",
        "remove_subtree: takes the position above, too",
    ),
    Mutant(
        "drop-tier-groups", RESIDENCY,
        "number < columns_; number += shared_.tiers) {",
        "number < shared_.tiers; number += shared_.tiers) {",
        "drop_tier: only the first group's copies go",
    ),
    Mutant(
        "drop-tier-pins", RESIDENCY,
        "for (const PinRun& run : extras_[column.extra].pins) shared_.pinned -= run.stop - run.start;",
        "",
        "drop_tier: pins that went still count",
    ),
    Mutant(
        "window-too-long", MATCH,
        "std::min(rule.window, boundary)",
        "std::min(rule.window + 1, boundary)",
        "coverage: a window is one block too long",
    ),
    Mutant(
        "window-at-the-start", MATCH,
        "std::min(rule.window, boundary)",
        "rule.window",
        "coverage: prefixes shorter than a window cannot be supplied",
    ),
    Mutant(
        "state-as-all", MATCH,
        "                                                                 : 1;",
        "                                                                 : boundary;",
        "coverage: state needs every block",
    ),
    Mutant(
        "covered-base", MATCH,
        "return step.base + hole;",
        "return hole;",
        "coverage: a hole is counted from its node's start",
    ),
    Mutant(
        "covered-hole", MATCH,
        "if (hole < step.count) return",
        "if (hole + 1 < step.count) return",
        "coverage: a hole at the last position is ignored",
    ),
    Mutant(
        "match-slower-tier", MATCH,
        "if (stop <= done) continue;",
        "if (stop < done) continue;\n          done = 0;",
        "match: names the slowest tier, not the fastest",
    ),
    Mutant(
        "match-tiles", MATCH,
        "while (stop < end && Tiles::adjacent(last, tile_of(here, index + 1))) {",
        "while (stop < end) {",
        "match: reads tiles as if they lay side by side",
    ),
    Mutant(
        "slot-high-byte", MATCH,
        "  if (all == 0) return;\n",
        "  if (all < 256) return;\n",
        "match: slots beyond 2^32 lose their high byte, where only a tile's first is so large",
    ),
    Mutant(
        "residency-short", MATCH,
        "const uint32_t stop = std::min(columns(step.node)[number].top, step.count);\n    for",
        "const uint32_t stop = std::min(columns(step.node)[number].top, step.count - 1);\n    for",
        "residency: the last key of each node is left out",
    ),
]  # fmt: skip
