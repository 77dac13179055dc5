"""Rule one, on a real engine: with FlexKV, the same tokens as without."""

from __future__ import annotations

import os
from pathlib import Path

from engine_rig import Expected, MakeEngine, config, mixed_requests

REQUESTS = 2000 if os.environ.get("FLEXKV_SOAK") else 500


def test_shared_prefixes(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    requests = mixed_requests(REQUESTS)
    flex = make_engine(config(tmp_path))
    assert flex.tokens(requests) == expected(requests)
    print(flex.figures())
