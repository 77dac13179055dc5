"""kill -9 of clients, workers, tier processes and the server, at seeded random times, while four engines work.

No wrong byte, no call that outlasts its deadline by more than 0.2 s, and nothing left behind. 50 kills in CI, 1,000 in
`make soak`; the seed and what happened are printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from server_rig import PATIENCE_S, ServerProcess, Wire, WorkerProcess, figures_of, hello, until

from flexkv_core.server import messages as m
from flexkv_core.server.reattach import holders, label_of

pytestmark = pytest.mark.usefixtures("leak_check")

ENGINES, PAGES, BLOCK_BYTES = 4, 512, 5000
CLIENT = Path(__file__).with_name("kill_client.py")
VICTIMS = ("client", "worker", "tier", "server")
QUIET_S = (0.05, 0.5)
"""Between two kills, at least and at most; a victim is started again in between."""


class Engine:
    """A client and its worker."""

    def __init__(self, folder: Path, path: Path, name: str, seed: int) -> None:
        self._folder, self._path, self._name, self._seed = folder, path, name, seed
        self.report = folder / f"report-{name}"
        self.worker = self._worker()
        self.client = self._client()

    def _worker(self) -> WorkerProcess:
        return WorkerProcess(self._folder, self._path, engine=self._name, pages=PAGES, size=BLOCK_BYTES)

    def _client(self) -> subprocess.Popen[bytes]:
        self._seed += 1
        tensor = self._folder / f"device-{self._name}-0"
        arguments = [self._path, self._name, tensor, PAGES, BLOCK_BYTES, self._seed, self.report]
        return subprocess.Popen([sys.executable, str(CLIENT), *map(str, arguments)])

    def kill(self, what: str) -> None:
        if what == "client":
            self.client.kill()
            self.client.wait()
            self.client = self._client()
        else:
            self.worker.kill()
            self.worker = self._worker()

    def stop(self) -> None:
        self.client.terminate()
        self.client.wait(PATIENCE_S)
        self.worker.__exit__()

    def seen(self) -> list[dict[str, Any]]:
        lines = self.report.read_text().splitlines() if self.report.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a killed client's last may be cut


def observed(path: Path) -> dict[str, Any]:
    with Wire(path) as wire:
        assert isinstance(wire.ask(hello("observer")), m.Welcome)
        return figures_of(wire)


def run_kills(tmp_path: Path, kills: int, seed: int) -> Counter[str]:
    rng, path = random.Random(seed), tmp_path / "s"
    stack = {
        "tiers": [
            {"backend": "cpu", "capacity": "1MiB", "prefault": False},  # of which little stays: tiers are used
            {"backend": "directory", "root": str(tmp_path / "blocks"), "capacity": "4MiB"},
        ]
    }
    server = ServerProcess(path, stack)
    server.start()
    engines = [Engine(tmp_path, path, f"engine{number}", seed + 1000 * number) for number in range(ENGINES)]
    done: Counter[str] = Counter()
    order: list[str] = []  # each in its turn, so that few kills meet all
    try:
        time.sleep(1.0)
        while done.total() < kills:
            time.sleep(rng.uniform(*QUIET_S))
            order = order or rng.sample(VICTIMS, len(VICTIMS))
            what = order.pop()
            if what in ("client", "worker"):
                rng.choice(engines).kill(what)
            elif what == "tier":
                pid = observed(path)["tiers"]["directory"]["pid"]
                if pid is None:
                    continue
                os.kill(pid, signal.SIGKILL)
            else:
                server.kill()
                time.sleep(rng.uniform(0, 0.3))
                server.start()
            done[what] += 1
        time.sleep(1.0)
    finally:
        for engine in engines:
            engine.stop()
    seen = [line for engine in engines for line in engine.seen()]
    totals = Counter[str]()
    late = [entry for line in seen for entry in line["late"]]
    for line in seen:
        totals.update({name: line[name] for name in ("wrong", "loaded", "stored", "calls")})
    print(f"seed {seed}: {dict(done)}; {dict(totals)}; late: {late}")
    assert totals["wrong"] == 0
    assert not late
    assert totals["loaded"] > kills
    until(lambda: not observed(path)["server"]["agents"])
    until(lambda: idle(observed(path)))
    assert server.stop() == 0
    until(lambda: not holders(label_of(path)))
    return done


def idle(figures: dict[str, Any]) -> bool:
    """Nothing is pinned, under way or queued."""
    names = ("fetches", "pinned_fetches", "pinned_bytes", "pending_stores")
    return not any(figures[name] for name in names) and not any(figures["tiers"]["directory"]["queued_blocks"].values())


@pytest.mark.soak
@pytest.mark.parametrize("half", [0, 1])
def test_kills_in_two_halves(tmp_path: Path, half: int) -> None:
    kills = 500 if os.environ.get("FLEXKV_SOAK") else 25
    done = run_kills(tmp_path, kills, half + int(os.environ.get("FLEXKV_SEED", random.randrange(1 << 31))))
    assert set(done) == set(VICTIMS)
