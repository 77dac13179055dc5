"""`flexkv replay`: runs a trace through a tier stack, simulated or with every byte checked.

Owns the loop over requests and the command's options. Does not own serving a request (`runners.py`), the
figures (`report.py`), or anything of the cache.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexkv_core.cli.output import OutputError, make_console, write_json
from flexkv_core.cli.report import Recorder, format_bytes, make_report, make_timeline, print_report
from flexkv_core.cli.runners import (
    BytesRunner,
    DevicePages,
    Keys,
    Runner,
    Served,
    SimulatedRunner,
    await_tiers,
)
from flexkv_core.cli.trace import TraceRequest, read_trace, request_tokens
from flexkv_core.models import KVGeometry, known_models, resolve_model, synthetic_geometry

if TYPE_CHECKING:
    from flexkv_core.config import StackConfig

BlockKeys = Callable[[npt.NDArray[np.int32], int, bytes], Keys]
"""`flexkv_core.blocks.block_keys`: (tokens, block_size, root) -> (n, 32) uint8."""

DEFAULT_BLOCK_BYTES = "64KiB"
DEFAULT_BLOCK_SIZE = 512
"""Tokens a block where the stack names none: those of a hash id of the trace."""
_MEMCPY_EVERY = 16
_MEMCPY_BYTES = 64 << 20
_UNITS = {"": 1, "b": 1, **{f"{prefix}ib": 1 << 10 * n for n, prefix in enumerate("kmgt", 1)}}


def replay(
    requests: Sequence[TraceRequest],
    runner: Runner,
    block_keys: BlockKeys,
    block_size: int,
    on_request: Callable[[], object] = lambda: None,
) -> Recorder:
    """Serve the requests in order, as fast as they can be; `on_request` is called after each.

    Requests shorter than one block are counted and ask nothing of the cache.
    """
    recorder = Recorder()
    memcpy = _Memcpy(recorder)
    for request in requests:
        blocks = request.input_length // block_size
        if blocks:
            tokens = request_tokens(request)[: blocks * block_size]
            served = runner.serve(block_keys(tokens, block_size, runner.root), request.timestamp_ms / 1000)
            memcpy.after(served)
        else:
            served = Served(0, 0, {}, 0.0)
        recorder.add(request.timestamp_ms, served)
        on_request()
    return recorder


class _Memcpy:
    """Copies as much as a request moved, now and then: what this machine's memory gives at that moment."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._moves = 0
        self._buffers: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None = None
        self._start = 0

    def after(self, served: Served) -> None:
        nbytes = min(served.load_bytes + served.store_bytes, _MEMCPY_BYTES)
        if not nbytes:
            return
        self._moves += 1
        if self._moves % _MEMCPY_EVERY != 1:
            return
        if self._buffers is None:
            self._buffers = (np.ones(_MEMCPY_BYTES, np.uint8), np.ones(_MEMCPY_BYTES, np.uint8))
        if self._start + nbytes > _MEMCPY_BYTES:
            self._start = 0
        part = slice(self._start, self._start + nbytes)  # moves on, so that the bytes are not in the cache
        self._start += nbytes
        source, target = self._buffers
        started = time.perf_counter()
        target[part] = source[part]
        self._recorder.add_memcpy(nbytes, time.perf_counter() - started)


@click.command("replay", short_help="Run a trace through a tier stack.")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--stack", "stack_file", type=click.Path(path_type=Path), required=True, help="Stack file (YAML).")
@click.option("--model", help=f"config.json of a dense model, or one of: {', '.join(known_models())}.")
@click.option(
    "--block-bytes",
    help=f"Size of a block of a synthetic model, such as 64KiB or 2MiB.  [default: {DEFAULT_BLOCK_BYTES}]",
)
@click.option("--simulate", is_flag=True, help="Move no bytes: index and policies only.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Check seals on the way up; with --no-verify wrong blocks do not fail the run.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N requests.")
@click.option(
    "--fetch-deadline",
    type=click.FloatRange(min=0.001),
    default=10.0,
    show_default=True,
    help="Seconds a fetch from lower tiers may take.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw hits over time (PNG).")
def replay_command(
    trace: Path,
    stack_file: Path,
    model: str | None,
    block_bytes: str | None,
    simulate: bool,
    verify: bool,
    limit: int | None,
    fetch_deadline: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Run TRACE (Mooncake format, JSON lines, plain or gzipped) through the stack of a YAML file.

    Each request looks up its prompt's blocks, loads what some tier holds, compares every byte with what the
    block's key demands, and stores the rest. Exit code 1 if any byte was wrong and verification is on.
    """
    if model is not None and block_bytes is not None:
        raise click.UsageError("--model and --block-bytes: give one, a model decides its blocks' bytes")
    if plot_file is not None:
        from flexkv_core.cli.plot import check_plot  # noqa: PLC0415 - only for --plot

        check_plot(plot_file)
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise OutputError(f"--json {json_file}: {json_file.resolve().parent} is not a directory: make it first")

    # what takes long to import, after what can be refused at once
    from flexkv_core.blocks import block_keys  # noqa: PLC0415
    from flexkv_core.config import load_stack  # noqa: PLC0415

    stack = load_stack(stack_file)
    if model is not None:
        geometry = resolve_model(model)
    else:
        geometry = synthetic_geometry(parse_size(block_bytes or DEFAULT_BLOCK_BYTES), _block_size(stack))
    requests = read_trace(trace, limit)
    console = make_console()
    with ExitStack() as resources:
        progress = resources.enter_context(_progress(console))
        if simulate:
            runner = _simulated(stack, geometry)
        else:
            runner = _with_bytes(resources, stack, geometry, requests, verify, fetch_deadline, progress)
        task = progress.add_task("requests", total=len(requests))
        started = time.perf_counter()
        recorder = replay(requests, runner, block_keys, _block_size(stack), lambda: progress.advance(task))
        seconds = time.perf_counter() - started
        report = make_report(recorder, runner.stats(), seconds, simulated=simulate, verify=verify, notes=runner.notes)
    print_report(report, console)
    write_json(json_file, report.to_json())
    if plot_file is not None:
        from flexkv_core.cli.plot import draw  # noqa: PLC0415

        title = f"{trace.name}: {100 * report.hit_rate:.1f}% of {report.blocks:,} blocks hit"
        draw(make_timeline(recorder, list(report.tiers)), title, plot_file)
        click.echo(str(plot_file))
    if report.wrong_blocks and verify:
        sys.exit(1)


def parse_size(text: str) -> int:
    """Parse a number of bytes: "65536", "64KiB", "1.5 MiB". Raises click.BadParameter."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if size < 1 or size != int(size):
        raise click.BadParameter(
            f"{text!r}: must be a whole number of bytes, such as 65536, 64KiB or 2MiB",
            param_hint="--block-bytes",
        )
    return int(size)


def _simulated(stack: StackConfig, geometry: KVGeometry) -> Runner:
    from flexkv_core.simulate import SimulatedCache  # noqa: PLC0415

    cache = SimulatedCache(stack)
    return SimulatedRunner(cache, cache.register(geometry.model_spec(_block_size(stack))))


def _with_bytes(
    resources: ExitStack,
    stack: StackConfig,
    geometry: KVGeometry,
    requests: Sequence[TraceRequest],
    verify: bool,
    fetch_deadline_s: float,
    progress: Progress,
) -> Runner:
    from flexkv_core.device.cpu import CpuDevice  # noqa: PLC0415
    from flexkv_core.manager import KVCacheManager  # noqa: PLC0415

    longest = max(request.input_length // _block_size(stack) for request in requests)
    pages = DevicePages.allocate(geometry, _block_size(stack), max(1, longest))
    task = progress.add_task("host memory", total=None)

    def prefaulted(done_bytes: int, total_bytes: int) -> None:
        size = f"host memory, {format_bytes(total_bytes)}"
        progress.update(task, completed=done_bytes >> 20, total=total_bytes >> 20, description=size)

    manager = resources.enter_context(KVCacheManager.open(stack, verify=verify, progress=prefaulted))
    progress.update(task, visible=False)
    device = CpuDevice([pages.tensors], block_axis=1)
    namespace = manager.register(geometry.model_spec(_block_size(stack)), device=device)
    runner = BytesRunner(manager, namespace, pages, fetch_deadline_s)
    runner.notes.extend(await_tiers(manager))
    return runner


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Bars on a terminal, nothing elsewhere; gone when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _block_size(stack: StackConfig) -> int:
    return stack.block_size or DEFAULT_BLOCK_SIZE
