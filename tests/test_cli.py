"""The replay's loop, report, plot and models. The cache here is this test's stand-in (see `StandIn`), so that
these tests hold whatever the real one does; replays of the real one are in the tests of the whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from rich.console import Console

from flexkv_core.cli.main import main
from flexkv_core.cli.plot import PlotError, check_plot, draw
from flexkv_core.cli.replay import parse_size, replay
from flexkv_core.cli.report import TIER_FIELDS, Recorder, make_report, make_timeline, print_report
from flexkv_core.cli.runners import (
    START_ATTEMPTS,
    BytesRunner,
    DevicePages,
    Keys,
    Served,
    SimulatedRunner,
    await_tiers,
)
from flexkv_core.cli.trace import TraceRequest
from flexkv_core.errors import HostMemoryError, LayoutError, StateError
from flexkv_core.models import geometry_from_config, known_models, resolve_model, synthetic_geometry

BLOCK_SIZE = 256
GEOMETRY = synthetic_geometry(16384, BLOCK_SIZE)
ROOT = bytes(range(32))


def block_keys(tokens: npt.NDArray[np.int32], block_size: int, root: bytes) -> Keys:
    """Chained keys in plain Python, as the design defines them."""
    assert len(tokens) % block_size == 0, "only complete blocks are asked for"
    keys, previous = [], root
    for start in range(0, len(tokens), block_size):
        previous = hashlib.sha256(tokens[start : start + block_size].tobytes() + previous).digest()
        keys.append(np.frombuffer(previous, np.uint8))
    return np.stack(keys)


class StandIn:
    """The test's stand-in for a manager: a dict of bytes, unbounded, on the device's own tensors.

    `damage` names what it does wrong.
    """

    def __init__(self, pages: DevicePages, damage: str = "") -> None:
        self.tensors = pages.tensors
        self.damage = damage
        self.held: dict[bytes, list[npt.NDArray[Any]]] = {}
        self.released = self.drains = self.open_fetches = 0

    def lookup(self, namespace: Any, keys: Keys) -> SimpleNamespace:
        missing = [i for i, key in enumerate(keys) if key.tobytes() not in self.held]
        return SimpleNamespace(blocks=missing[0] if missing else len(keys))

    def fetch(self, namespace: Any, keys: Keys, deadline_s: float) -> SimpleNamespace:
        ready = self.lookup(namespace, keys).blocks
        if self.damage == "half":
            ready //= 2
        self.open_fetches += 1

        def release() -> None:
            self.open_fetches -= 1

        return SimpleNamespace(
            keys=keys, ready=ready, sources={"cpu": ready}, wait=lambda timeout_s: True, release=release
        )

    def load(self, fetch: Any, device_blocks: npt.NDArray[np.int64]) -> SimpleNamespace:
        assert len(device_blocks) == fetch.ready
        places = device_blocks.tolist()
        if self.damage == "swap" and len(places) > 1:
            places[0], places[1] = places[1], places[0]
        for key, page in zip(fetch.keys, places, strict=False):
            if self.damage != "nothing":
                for tensor, block in zip(self.tensors, self.held[key.tobytes()], strict=True):
                    tensor[:, page] = block
        if self.damage == "bit" and places:
            self.tensors[-1][1, places[-1], -1, -1, -1] ^= 1
        return SimpleNamespace(blocks=len(places), error="no device" if self.damage == "error" else None)

    def store(self, namespace: Any, keys: Keys, device_blocks: npt.NDArray[np.int64]) -> SimpleNamespace:
        stored = 0
        for key, page in zip(keys, device_blocks.tolist(), strict=True):
            if key.tobytes() not in self.held:
                self.held[key.tobytes()] = [tensor[:, page].copy() for tensor in self.tensors]
                stored += 1
        return SimpleNamespace(blocks=stored, error=None)

    def wait(self, transfer: Any, timeout_s: float) -> bool:
        return self.damage != "hang"

    def drain(self, timeout_s: float) -> bool:
        self.drains += 1
        return self.damage != "slow"

    def stats(self) -> dict[str, Any]:
        return {"tiers": {"cpu": {"state": "ready", "stored_blocks": len(self.held), "restarts": 0}}}


def requests() -> list[TraceRequest]:
    """60 requests in conversations of growing length: prefixes come back, tails are new."""
    made = []
    for number in range(60):
        turns = number // 10 + 1
        ids = [number % 10 * 100 + turn for turn in range(turns)]
        made.append(TraceRequest(number * 5000.0, turns * 512 - 37 * (number % 3), 9, np.array(ids, np.int64)))
    return [*made, TraceRequest(3e5, BLOCK_SIZE - 1, 1, np.array([5], np.int64))]


def run(damage: str = "") -> tuple[Recorder, StandIn, BytesRunner]:
    pages = DevicePages.allocate(GEOMETRY, BLOCK_SIZE, 12)
    cache = StandIn(pages, damage)
    runner = BytesRunner(cache, SimpleNamespace(root=ROOT), pages, fetch_deadline_s=1.0)
    return replay(requests(), runner, block_keys, BLOCK_SIZE), cache, runner


def report_of(recorder: Recorder, runner: Any) -> dict[str, Any]:
    report = make_report(recorder, runner.stats(), 2.5, simulated=False, verify=True, notes=runner.notes).to_json()
    assert json.loads(json.dumps(report)) == report
    return report


def expected_hits() -> tuple[int, int]:
    """Blocks and hits of an unbounded cache, counted from the trace's ids alone."""
    seen: set[tuple[int, ...]] = set()
    blocks = hits = 0
    for request in requests():
        for block in range(request.input_length // BLOCK_SIZE):
            end = (block + 1) * BLOCK_SIZE
            name = (end, *request.hash_ids[: -(-end // 512)].tolist())
            blocks += 1
            hits += name in seen
            seen.add(name)
    return blocks, hits


def test_a_right_cache_has_the_hits_of_the_trace_and_no_wrong_block() -> None:
    recorder, cache, runner = run()
    blocks, hits = expected_hits()
    report = report_of(recorder, runner)
    assert (report["requests"], report["blocks"], report["hit_blocks"]) == (61, blocks, hits)
    assert report["hit_rate"] == hits / blocks
    assert 0 < hits < blocks
    assert report["wrong_blocks"] == 0
    assert report["tiers"]["cpu"]["hit_blocks"] == hits
    assert set(report["tiers"]["cpu"]) == {"hit_blocks", *TIER_FIELDS}
    assert report["tiers"]["cpu"]["stored_blocks"] == blocks - hits
    assert sum(served.store_bytes for served in recorder.served) == (blocks - hits) * 16384
    assert all(report[rate] > 0 for rate in ("load_gb_s", "store_gb_s", "memcpy_gb_s"))
    assert report["lookup_us"]["p50"] <= report["lookup_us"]["p99"]
    assert cache.open_fetches == 0, "every fetch was released"
    assert cache.drains == 60, "drained after each request that has blocks"


@pytest.mark.parametrize("damage", ["nothing", "swap", "bit"])
def test_wrong_bytes_are_counted_and_the_replay_goes_on(damage: str) -> None:
    recorder, _, runner = run(damage)
    loads = [served.hit_blocks for served in recorder.served if served.hit_blocks]
    wrong = {"nothing": sum(loads), "bit": len(loads), "swap": sum(2 for n in loads if n > 1)}
    assert report_of(recorder, runner)["wrong_blocks"] == wrong[damage]
    assert len(recorder.served) == 61


def test_a_load_that_does_nothing_is_seen_on_pages_that_still_hold_the_block() -> None:
    pages = DevicePages.allocate(GEOMETRY, BLOCK_SIZE, 4)
    runner = BytesRunner(StandIn(pages, "nothing"), SimpleNamespace(root=ROOT), pages, fetch_deadline_s=1.0)
    same = TraceRequest(0.0, 4 * BLOCK_SIZE, 1, np.array([1, 2], np.int64))
    recorder = replay([same, same], runner, block_keys, BLOCK_SIZE)
    assert [served.wrong_blocks for served in recorder.served] == [0, 4]


def test_blocks_that_were_found_but_not_fetched_are_misses() -> None:
    recorder, _, runner = run("half")
    blocks, hits = expected_hits()
    report = report_of(recorder, runner)
    assert report["blocks"] == blocks
    assert 0 < report["hit_blocks"] < hits
    assert report["wrong_blocks"] == 0


@pytest.mark.parametrize(("damage", "text"), [("hang", "did not complete"), ("error", "failed: no device")])
def test_a_transfer_that_fails_ends_the_replay(damage: str, text: str) -> None:
    with pytest.raises(StateError, match=text):
        run(damage)


def test_draining_is_given_up_once_and_noted() -> None:
    recorder, cache, runner = run("slow")
    assert cache.drains == 1
    assert len(runner.notes) == 1
    assert "did not take all writes" in report_of(recorder, runner)["notes"][0]


def test_a_tier_that_does_not_open_is_noted() -> None:
    s3 = {"state": "starting", "restarts": 0, "last_error": None}
    manager = SimpleNamespace(stats=lambda: {"tiers": {"cpu": {"state": "ready"}, "s3": s3}})
    (note,) = await_tiers(manager, timeout_s=0.05)
    assert note == "tier s3 does not open and is a miss: its backend has not answered yet"
    s3.update(state="backoff", restarts=START_ATTEMPTS, last_error="no such bucket")
    asked = iter([{"tiers": {"cpu": {"state": "ready"}, "s3": s3}}])  # once only: it is not waited for
    (note,) = await_tiers(SimpleNamespace(stats=lambda: next(asked)), timeout_s=3600.0)
    assert note == "tier s3 does not open and is a miss: no such bucket"
    assert await_tiers(StandIn(DevicePages.allocate(GEOMETRY, BLOCK_SIZE, 1))) == []


def test_pages_are_scattered_and_differ() -> None:
    pages = DevicePages.allocate(GEOMETRY, BLOCK_SIZE, 50)
    first, second = pages.take(20), pages.take(40)
    assert len(set(first.tolist())) == 20
    assert len(set(second.tolist())) == 40
    assert first.tolist() != sorted(first.tolist())
    with pytest.raises(HostMemoryError, match="--limit"):
        DevicePages.allocate(GEOMETRY, BLOCK_SIZE, 1 << 40)


def test_simulated_runner_reports_what_the_cache_says() -> None:
    outcome = SimpleNamespace(blocks=3, hit_blocks=2, hits_by_tier={"ssd": 2}, lookup_seconds=1e-5)
    cache = SimpleNamespace(request=lambda root, keys, at_s: outcome, stats=lambda: {"tiers": {"cpu": {}, "ssd": {}}})
    runner = SimulatedRunner(cache, SimpleNamespace(root=ROOT))
    recorder = replay(requests()[:4], runner, block_keys, BLOCK_SIZE)
    report = make_report(recorder, runner.stats(), 1.0, simulated=True, verify=True).to_json()
    assert report["hit_blocks"] == report["tiers"]["ssd"]["hit_blocks"] == 8
    assert report["load_gb_s"] is report["memcpy_gb_s"] is None
    assert report["lookup_us"] == pytest.approx({"p50": 10.0, "p99": 10.0})


def test_table_and_plot_show_tiers_and_misses(tmp_path: Path) -> None:
    recorder, _, runner = run()
    report = make_report(recorder, runner.stats(), 2.5, simulated=False, verify=False, notes=["a note"])
    console = Console(width=120, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    print_report(report, console)
    text = console.export_text()
    for part in ["cpu", "misses", f"{report.hit_blocks:,}", "GB/s", "verification was off", "a note"]:
        assert part in text

    timeline = make_timeline(recorder, ["cpu"], bins=10)
    width = timeline.minutes[1] - timeline.minutes[0]
    assert timeline.blocks["cpu"].sum() * width == pytest.approx(report.hit_blocks)
    assert timeline.blocks["miss"].sum() * width == pytest.approx(report.blocks - report.hit_blocks)
    assert timeline.minutes[0] == pytest.approx(0.25)
    path = tmp_path / "plot.png"
    draw(timeline, "title", path)
    header = path.read_bytes()[:24]
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1200, 700)
    with pytest.raises(PlotError, match="not a directory"):
        check_plot(tmp_path / "none" / "plot.png")


def test_one_request_has_a_timeline() -> None:
    recorder = Recorder()
    recorder.add(0.0, Served(4, 1, {"cpu": 1}, 1e-6))
    timeline = make_timeline(recorder, ["cpu"])
    assert timeline.blocks["miss"].argmax() == 0
    assert np.isfinite(timeline.minutes).all()


def test_synthetic_blocks_have_exactly_the_bytes() -> None:
    for block_bytes, block_size in [(65536, 512), (65536, 16), (1 << 21, 16), (4096, 512), (12288, 16)]:
        geometry = synthetic_geometry(block_bytes, block_size)
        spec = geometry.model_spec(block_size)
        assert spec.groups[0].block_bytes == geometry.block_bytes(block_size) == block_bytes
        tensor = np.zeros(geometry.tensor_shape(3, block_size), geometry.storage_dtype)
        assert geometry.layers * tensor[:, 0].nbytes == block_bytes
    with pytest.raises(LayoutError, match=r"block bytes 65537.*multiple of 4096, such as 65536"):
        synthetic_geometry(65537, 512)


def test_known_models_weigh_what_they_are_known_to() -> None:
    assert resolve_model("llama-3.1-8b").block_bytes(1) == 128 << 10
    assert resolve_model("Llama-3.1-70B").block_bytes(1) == 320 << 10
    assert resolve_model("qwen3-8b").block_bytes(16) == 36 * 2 * 16 * 8 * 128 * 2
    with pytest.raises(LayoutError, match="mistral-7b"):
        resolve_model("llama-9")
    assert "mistral-7b" in known_models()


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


def config_file(tmp_path: Path, **changes: Any) -> Path:
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def test_config_files_are_read(tmp_path: Path) -> None:
    geometry = geometry_from_config(config_file(tmp_path))
    assert (geometry.layers, geometry.kv_heads, geometry.head_dim) == (32, 8, 128)
    assert resolve_model(str(tmp_path)) == geometry
    other = config_file(tmp_path, head_dim=64, num_key_value_heads=None, torch_dtype="absent", dtype="float16")
    geometry = geometry_from_config(other)
    assert (geometry.kv_heads, geometry.head_dim, geometry.dtype) == (32, 64, "float16")
    unused = config_file(tmp_path, model_type="qwen2", sliding_window=4096, use_sliding_window=False)
    assert geometry_from_config(unused).layers == 32


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sliding_window": 4096}, "sliding_window 4096: sliding windows are not supported by replay"),
        ({"kv_lora_rank": 512}, "kv_lora_rank 512: multi-head latent attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "not supported by replay"),
        ({"model_type": "jamba"}, "model_type 'jamba': this type of model is not supported"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers '32': must be a positive integer"),
        ({"num_attention_heads": "absent"}, "num_attention_heads None"),
        ({"hidden_size": 4097}, "hidden_size 4097"),
        ({"torch_dtype": "absent"}, "torch_dtype None: must be one of"),
    ],
)
def test_config_errors_name_file_field_and_value(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    path = config_file(tmp_path, **changes)
    with pytest.raises(LayoutError) as caught:
        geometry_from_config(path)
    assert str(path) in str(caught.value)
    assert text in str(caught.value)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("65536", "64KiB", "1.5 MiB", "2gib")] == [
        65536,
        65536,
        3 << 19,
        2 << 30,
    ]
    for text in ("", "0", "-1", "64KB", "1.3", "many"):
        with pytest.raises(Exception, match="whole number of bytes"):
            parse_size(text)


def test_flexkv_errors_end_in_one_line_and_code_2(tmp_path: Path) -> None:
    arguments = ["replay", "trace", "--stack", "stack", "--json", str(tmp_path / "none" / "x.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "not a directory" in result.output
    both = CliRunner().invoke(main, [*arguments, "--model", "qwen3-8b", "--block-bytes", "64KiB"])
    assert both.exit_code == 2
    assert "give one" in both.output
