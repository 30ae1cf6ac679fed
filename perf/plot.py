"""Pictures of CSV files, drawn from nothing else: one PNG a device, direction and dtype; those of training steps are
``perf/training_plot.py``.

A group of bars a shape, a bar a provider: p50 as its height, p20 to p80 as the whisker, and the floor as a black line
across the group. The suite ``long`` has a picture of its own: time and memory against the length. Where a CSV has a row
more than once, the last counts. Needs matplotlib, which the ``train`` extra installs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from perf import training_plot
from perf.clocks import WallClock
from perf.records import read_csv
from perf.shapes import SUITES, Shape

COLUMNS = (
    "direction", "H", "HV", "N", "T", "K", "V", "dtype", "provider", "method", "p20_ms", "p50_ms", "p80_ms", "floor_ms",
    "peak_mib",
)  # fmt: skip


class Bar(NamedTuple):
    """Milliseconds a call, and MiB where they were measured."""

    p20: float
    p50: float
    p80: float
    peak: float | None = None


class Picture(NamedTuple):
    """What one PNG shows: ``bars[shape][provider]`` and the floor of each shape, in the CSV's order. ``direction`` is
    ``long`` for the rows of that suite."""

    device: str
    direction: str
    dtype: str
    bars: dict[Shape, dict[str, Bar]]
    floors: dict[Shape, float]

    @property
    def name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.device} {self.direction} {self.dtype}".lower())
        return words.strip("-") + ".png"

    @property
    def providers(self) -> list[str]:
        return list(dict.fromkeys(provider for bars in self.bars.values() for provider in bars))


def _direction(shape: Shape, line: dict[str, str]) -> str:
    """The suite ``long`` is CUDA's alone: the same shapes on the CPU are of another suite."""
    is_long = (shape, line["direction"]) in SUITES["long"] and line["method"] != WallClock.method
    return "long" if is_long else line["direction"]


def pictures(paths: Sequence[Path]) -> list[Picture]:
    """The rows of the files by picture; rows without a time are left out.

    Raises ValueError for a file that lacks a column, naming it, and when no row has a time.
    """
    found: dict[tuple[str, str, str], Picture] = {}
    for path in paths:
        for line in read_csv([path]):
            missing = [column for column in (*COLUMNS, "device") if line.get(column) is None]
            if missing:
                raise ValueError(f"{path}: expected the columns of python -m perf, got none named {', '.join(missing)}")
            if not line["p50_ms"]:
                continue
            shape = Shape(*(int(line[field]) for field in Shape._fields))
            key = line["device"], _direction(shape, line), line["dtype"]
            picture = found.setdefault(key, Picture(*key, {}, {}))
            peak = float(line["peak_mib"]) if line["peak_mib"] else None
            bar = Bar(*(float(line[column]) for column in ("p20_ms", "p50_ms", "p80_ms")), peak)
            picture.bars.setdefault(shape, {})[line["provider"]] = bar
            picture.floors[shape] = float(line["floor_ms"])
    if not found:
        raise ValueError(f"csv: expected at least one row with a time, got none in {', '.join(map(str, paths))}")
    return list(found.values())


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("python -m perf plot needs matplotlib: pip install 'gdn-ops[train]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _bars(picture: Picture, plt):
    width = 0.8 / len(picture.providers)
    figure, axes = plt.subplots(figsize=(max(6.0, 1.6 * len(picture.bars) + 2), 4.5), layout="constrained")
    for i, provider in enumerate(picture.providers):
        places = [(x, bars[provider]) for x, bars in enumerate(picture.bars.values()) if provider in bars]
        axes.bar(
            [x + (i + 0.5) * width - 0.4 for x, _ in places],
            [bar.p50 for _, bar in places],
            width,
            yerr=[[bar.p50 - bar.p20 for _, bar in places], [bar.p80 - bar.p50 for _, bar in places]],
            label=provider,
            capsize=2,
        )
    for x, floor in enumerate(picture.floors.values()):
        axes.plot([x - 0.42, x + 0.42], [floor, floor], "k-", linewidth=1.2, label="floor" if x == 0 else None)
    axes.set_xticks(range(len(picture.bars)), [str(shape) for shape in picture.bars])
    axes.set_yscale("log")
    axes.set_ylabel("ms a call (p50; whiskers p20 to p80)")
    axes.set_xlabel("H/HV, sequences x tokens")
    axes.set_title(f"{picture.direction}, {picture.dtype}, {picture.device}")
    axes.legend(fontsize="small")
    return figure


def _lengths(picture: Picture, plt):
    """Time and memory against T; dotted, through the point of the longest sequence, what grows as T does."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    shapes = sorted(picture.bars, key=lambda shape: shape.T)
    lengths = [shape.T for shape in shapes]
    for axes, field in zip(panels, ("p50", "peak")):
        longest = (0, 0.0)
        for provider in picture.providers:
            bars = [(shape.T, picture.bars[shape][provider]) for shape in shapes if provider in picture.bars[shape]]
            points = [(T, getattr(bar, field)) for T, bar in bars if getattr(bar, field) is not None]
            axes.plot([T for T, _ in points], [y for _, y in points], "o-", label=provider)
            longest = max(longest, *points[-1:], key=lambda point: point[0])
        if longest[0]:
            proportional = [T * longest[1] / longest[0] for T in lengths]
            axes.plot(lengths, proportional, "k:", zorder=3, label="proportional to T")
        if field == "p50":
            axes.plot(lengths, [picture.floors[shape] for shape in shapes], "k-", linewidth=1.2, label="floor")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{T:,}" for T in lengths], fontsize="small")
        axes.set_xlabel("T, tokens of one sequence")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("ms a call (p50)")
    panels[1].set_ylabel("MiB beyond the inputs, output included")
    figure.suptitle(f"forward, H/HV {shapes[0].H}/{shapes[0].HV}, {picture.dtype}, {picture.device}")
    return figure


def draw(paths: Sequence[Path], out: Path) -> list[Path]:
    """Writes the PNG files into the directory ``out`` and returns their paths.

    Raises ValueError as :func:`pictures` does, and ImportError where matplotlib is missing.

    >>> draw([Path("perf/results/cpu.csv")], Path("/tmp/plots"))  # doctest: +SKIP
    """
    steps = [path for path in paths if training_plot.is_training(path)]
    calls = [path for path in paths if path not in steps]
    todo, plt = pictures(calls) if calls else [], _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    written = training_plot.draw(steps, out, plt) if steps else []
    for picture in todo:
        figure = (_lengths if picture.direction == "long" else _bars)(picture, plt)
        written.append(out / picture.name)
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written
