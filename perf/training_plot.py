"""Tokens a second against length times batch, from the rows of ``python -m perf train``: one PNG a device, model and
setting, a line a provider, with p20 to p80 of the steps as whiskers. Where a CSV has a row more than once, the last
counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from perf.records import read_csv
from perf.training import Size


class Point(NamedTuple):
    """Tokens a second: of the slower fifth of the steps, the median, the faster fifth."""

    p20: float
    p50: float
    p80: float


class Curves(NamedTuple):
    """What one PNG shows: ``points[provider][size]``."""

    device: str
    preset: str
    precision: str
    checkpointing: str
    points: dict[str, dict[Size, Point]]

    @property
    def name(self) -> str:
        words = f"{self.device} train {self.preset} {self.precision}"
        words += "" if self.checkpointing == "none" else f" {self.checkpointing} checkpointing"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".png"

    @property
    def sizes(self) -> list[Size]:
        return sorted({size for points in self.points.values() for size in points})


def is_training(path: Path) -> bool:
    """Whether the file's rows are of training steps."""
    with path.open() as file:
        return "tokens_per_s" in file.readline().strip().split(",")


def curves(paths: Sequence[Path]) -> list[Curves]:
    """The rows of the files by picture; rows without a time are left out. ValueError if none has one."""
    found: dict[tuple, Curves] = {}
    for line in read_csv(paths):
        if line["p50_ms"]:
            key = line["device"], line["preset"], line["precision"], line["checkpointing"]
            size = Size(int(line["T"]), int(line["batch"]))
            tokens = 1e3 * size.T * size.batch
            point = Point(*(tokens / float(line[column]) for column in ("p80_ms", "p50_ms", "p20_ms")))
            found.setdefault(key, Curves(*key, {})).points.setdefault(line["provider"], {})[size] = point
    if not found:
        raise ValueError(f"csv: expected at least one row with a time, got none in {', '.join(map(str, paths))}")
    return list(found.values())


def draw(paths: Sequence[Path], out: Path, plt) -> list[Path]:
    """Writes the PNG files into ``out``, which exists, with matplotlib's ``plt``; their paths."""
    written = []
    for picture in curves(paths):
        figure, axes = plt.subplots(figsize=(7.0, 4.5), layout="constrained")
        sizes = picture.sizes
        for provider, points in picture.points.items():
            places = [(sizes.index(size), points[size]) for size in sorted(points)]
            axes.errorbar(
                [x for x, _ in places],
                [point.p50 for _, point in places],
                yerr=[[p.p50 - p.p20 for _, p in places], [p.p80 - p.p50 for _, p in places]],
                marker="o",
                capsize=2,
                label=provider,
            )
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens a second (p50; whiskers p20 to p80)")
        axes.set_xlabel("tokens a sequence x sequences")
        axes.set_title(f"training {picture.preset}, {picture.precision}, {picture.device}")
        axes.legend(fontsize="small")
        written.append(out / picture.name)
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written
