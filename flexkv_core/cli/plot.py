"""The picture of a replay: hits by tier and misses over the trace's time. Loads matplotlib when used."""

from __future__ import annotations

from pathlib import Path

from flexkv_core.cli.report import Timeline
from flexkv_core.errors import FlexKVError

_HIT_COLOURS = ("#1b7837", "#5aae61", "#a6dba0", "#c7e9c0")
_MISS_COLOUR = "#d9d9d9"


class PlotError(FlexKVError, ImportError):
    """A plot that cannot be drawn or written."""


def check_plot(path: Path) -> None:
    """Raise PlotError now, before a long replay, if the plot could not be written after it."""
    try:
        import matplotlib  # noqa: F401, PLC0415 - optional and slow to import
    except ImportError as error:
        raise PlotError(f"--plot {path}: needs matplotlib: pip install 'flexkv-core[plot]'") from error
    if not path.resolve().parent.is_dir():
        raise PlotError(f"--plot {path}: {path.resolve().parent} is not a directory: make it first")


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Write a 1200x700 PNG: a stacked area, fastest tier at the bottom, misses on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    total = sum(float(values.sum()) for values in timeline.blocks.values())
    labels = []
    colours = []
    for number, (name, values) in enumerate(timeline.blocks.items()):
        share = 100 * float(values.sum()) / total if total else 0.0
        labels.append(f"{'recomputed (miss)' if name == 'miss' else f'hit in {name}'}: {share:.1f}%")
        colours.append(_MISS_COLOUR if name == "miss" else _HIT_COLOURS[number % len(_HIT_COLOURS)])
    axes.stackplot(timeline.minutes, *timeline.blocks.values(), labels=labels, colors=colours)
    axes.set_title(title, fontsize=15)
    axes.set_xlabel("trace time [minutes]", fontsize=13)
    axes.set_ylabel("blocks per minute", fontsize=13)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(labelsize=11)
    axes.set_xlim(float(timeline.minutes[0]), float(timeline.minutes[-1]))
    axes.set_ylim(0, 1.25 * axes.dataLim.ymax or 1)  # room for the legend above the area
    axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="upper left", fontsize=12, framealpha=0.9)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise PlotError(f"--plot {path}: cannot be written: {error.strerror}") from error
