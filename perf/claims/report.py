"""Tables and pictures of ``results.csv``, made from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

Cells = dict[tuple[str, str, str], dict[str, dict[int, list[float]]]]


def cells_of(rows: Sequence[dict[str, str]]) -> Cells:
    """``[experiment, size, task][model][setting]``: a value a seed. Where a seed has several rows, the last counts."""
    last = {(*(row[c] for c in ("experiment", "size", "task", "model", "seed", "setting")),): row for row in rows}
    found: Cells = {}
    for row in last.values():
        model = found.setdefault((row["experiment"], row["size"], row["task"]), {}).setdefault(row["model"], {})
        model.setdefault(int(row["setting"]), []).append(float(row["value"]))
    return found


def _shown(values: list[float] | None) -> str:
    if not values:
        return "-"
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.3g}{spread}"


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: a table an experiment and task, a line a model; mean ± standard deviation over the seeds."""
    parts = []
    for (experiment, size, task), models in cells_of(rows).items():
        own = [row for row in rows if (row["experiment"], row["size"], row["task"]) == (experiment, size, task)]
        settings = sorted({setting for x in models.values() for setting in x})
        sizes = {row["model"]: (int(row["parameters"]), int(row["state"])) for row in own}
        head = ["model", "parameters", "state", "seeds", *map(str, settings)]
        lines = [f"{experiment}: {task}, {own[0]['metric']} ({size}; {own[0]['device']})", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for model, values in models.items():
            seeds = max(len(x) for x in values.values())
            cells = [model, *(f"{n:,}" for n in sizes[model]), str(seeds), *(_shown(values.get(s)) for s in settings)]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else "no results\n"


def draw(rows: Sequence[dict[str, str]], folder: Path) -> list[Path]:
    """A PNG an experiment, size and task: the metric against the setting, a line a model, seeds as a band."""
    from matplotlib.figure import Figure

    written = []
    for (experiment, size, task), models in cells_of(rows).items():
        metric = next(row["metric"] for row in rows if (row["experiment"], row["task"]) == (experiment, task))
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for model, values in models.items():
            settings = sorted(values)
            axes.plot(settings, [mean(values[s]) for s in settings], marker="o", markersize=4, label=model)
            low, high = ([f(values[s]) for s in settings] for f in (min, max))
            axes.fill_between(settings, low, high, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="keys" if task == "recall" else "position or length", ylabel=metric, title=f"{task} ({size})")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        path = folder / f"{experiment}-{task}-{size}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
