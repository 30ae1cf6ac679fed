"""Tables and pictures of ``results.csv``, made from nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

# What the columns of a table and the x axis of a plot are.
READ_AT = {"recall": "by number of keys", "needle": "by length", "parity": "by length", "text": "up to position"}

Cells = dict[tuple[str, str, str], dict[str, dict[int, list[float]]]]


def cells_of(rows: Sequence[dict[str, str]]) -> Cells:
    """``[experiment, size, task][model][setting]``: a value a seed. Where a seed has several rows, the last counts."""
    last = {(*(row[c] for c in ("experiment", "size", "task", "model", "seed", "setting")),): row for row in rows}
    found: Cells = {}
    for row in last.values():
        model = found.setdefault((row["experiment"], row["size"], row["task"]), {}).setdefault(row["model"], {})
        model.setdefault(int(row["setting"]), []).append(float(row["value"]))
    return found


def _kind(task: str) -> str:
    return task.split("-")[0]


def _title(experiment: str, task: str) -> str:
    return task if task.startswith(experiment) else f"{experiment}: {task}"


def _number(x: float) -> str:
    """Three decimals; of what is large, four digits."""
    return f"{x:.3f}" if abs(x) < 10 or not math.isfinite(x) else f"{x:.4g}"


def _finite(values: list[float]) -> list[float]:
    return [x for x in values if math.isfinite(x)]


def _shown(values: list[float] | None) -> str:
    """Mean ± standard deviation of the seeds that gave a number, and how many did not: their training diverged, or the
    perplexity is beyond a float."""
    if not values:
        return "-"
    finite = _finite(values)
    if not finite:
        return _number(values[0])
    spread = f" ± {_number(stdev(finite))}" if len(finite) > 1 else ""
    lost = f" ({len(values) - len(finite)} diverged)" if len(finite) < len(values) else ""
    return _number(fmean(finite)) + spread + lost


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: a table an experiment and task, a line a model; mean ± standard deviation over the seeds, a column a
    setting."""
    parts = []
    for (experiment, size, task), models in cells_of(rows).items():
        own = [row for row in rows if (row["experiment"], row["size"], row["task"]) == (experiment, size, task)]
        settings = sorted({setting for x in models.values() for setting in x})
        sizes = {row["model"]: (int(row["parameters"]), int(row["state"])) for row in own}
        head = ["model", "parameters", "state", "seeds", *map(str, settings)]
        devices = ", ".join(dict.fromkeys(row["device"] for row in own))
        lines = [f"{_title(experiment, task)}, {own[0]['metric']} {READ_AT[_kind(task)]} ({size}; {devices})", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for model, values in models.items():
            seeds = max(len(x) for x in values.values())
            cells = [model, *(f"{n:,}" for n in sizes[model]), str(seeds), *(_shown(values.get(s)) for s in settings)]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else "no results\n"


def draw(rows: Sequence[dict[str, str]], folder: Path) -> list[Path]:
    """A PNG an experiment and size, a panel a task: the metric against the setting, a line a model through the means, a
    band from the least to the greatest of the seeds."""
    from matplotlib.figure import Figure

    cells, written = cells_of(rows), []
    for experiment, size in dict.fromkeys(key[:2] for key in cells):
        panels = {key[2]: models for key, models in cells.items() if key[:2] == (experiment, size)}
        names = list(dict.fromkeys(model for models in panels.values() for model in models))
        figure = Figure(figsize=(2 + 4.2 * len(panels), 4.2), layout="constrained")
        for axes, (task, models) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            _panel(axes, task, {name: models.get(name, {}) for name in names})
            axes.set_title(f"{_title(experiment, task)} ({size})")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        written.append(folder / f"{experiment}-{size}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _panel(axes, task: str, models: dict[str, dict[int, list[float]]]) -> None:
    """One that lacks a model still has its place, so that colours are the same in all panels."""
    everything, best = [], []
    for i, (model, values) in enumerate(models.items()):
        seeds = {s: _finite(values[s]) for s in sorted(values) if _finite(values[s])}
        least, means, greatest = ([f(x) for x in seeds.values()] for f in (min, fmean, max))
        axes.plot(list(seeds), means, color=f"C{i}", marker="os^vD"[i % 5], markersize=4, label=model)
        axes.fill_between(list(seeds), least, greatest, color=f"C{i}", alpha=0.15)
        everything += least + greatest
        best += [min(means)] if means else []
    settings = sorted({s for values in models.values() for s in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings, map(str, settings))
    axes.set(xlabel=READ_AT[_kind(task)].removeprefix("by "))
    if task != "text":
        axes.set(ylabel="accuracy", ylim=(-0.03, 1.03))
    elif everything:
        # Attention beyond its training length is off by orders of magnitude; the table has what leaves the picture. Of
        # every model the best is in it.
        low, high = min(everything), max(everything)
        axes.set(ylabel="perplexity of a byte", ylim=(0.97 * low, min(1.03 * high, 1.5 * max(best))))
    axes.grid(alpha=0.3)
