"""The native index (`native/index/`): the interface of `flexkv_core.index.Index`, held to the reference step by step.

Owns what is done once a namespace or an index: options and rules, checked and handed down. All else is native.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexkv_core import _native
from flexkv_core.index import GroupRule
from flexkv_core.index.arguments import check_groups, check_policies, check_root
from flexkv_core.policies import Eviction, make_custom


class NativeIndex(_native.Index):
    """See `flexkv_core.index.Index` for the meaning of every method. `match` may be called by any thread."""

    def __init__(self, tiers: int, policies: Sequence[str | Eviction] | None = None) -> None:
        self._tiers = tiers
        given = check_policies(tiers, policies)
        super().__init__(
            tiers, [(e.policy, e.reward_ticks, e.slru_protected_threshold, make_custom(e.policy)) for e in given]
        )

    def add_namespace(self, root: bytes, groups: Sequence[GroupRule]) -> None:
        check_root(root)
        rules = check_groups(self._tiers, groups)
        self._add_namespace(
            root,
            [
                (rule.coverage.kind, rule.coverage.blocks, [rule.class_in(tier) for tier in range(self._tiers)])
                for rule in rules
            ],
        )
