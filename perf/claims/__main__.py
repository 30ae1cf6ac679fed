"""``python -m perf.claims EXPERIMENT... | table | plot``; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from perf.claims import report, runs

OUT = Path("claims")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.claims", description="The paper's claims at a small scale.")
    what = (*runs.EXPERIMENTS, "table", "plot")
    parser.add_argument("what", nargs="+", choices=what, metavar="WHAT", help=", ".join(what))
    parser.add_argument("--size", choices=runs.SIZES, default="real", help="toy is for the CPU and shows nothing")
    parser.add_argument("--seeds", type=int, default=3, help="runs a model, from seed 0 (default 3)")
    parser.add_argument("--budget", type=float, default=30.0, help="minutes; what does not fit is left (default 30)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, in processes of their own (default 1)")
    parser.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help="a step is one graph on CUDA"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of results.csv and the plots (default {OUT})")
    a = parser.parse_args(arguments)
    if a.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {a.seeds}")
    if a.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {a.jobs}")
    if a.budget <= 0:
        parser.error(f"--budget: expected more than 0 minutes, got {a.budget:g}")
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device, and torch finds none; use --device cpu")
    chosen = [run for name in a.what if name in runs.EXPERIMENTS for run in runs.runs_of(name, a.size, a.seeds)]
    left = 0
    if chosen:
        # Across experiments too, the first seed of everything comes first.
        chosen.sort(key=lambda run: run.seed)
        try:
            left = runs.run_all(chosen, a.out, a.device, a.budget, _say, a.jobs, a.cuda_graphs)
        except KeyboardInterrupt:
            _say("interrupted; the same command goes on with the runs that were not over")
            return 130
    rows = runs.in_order(runs.read_rows(a.out))
    if "plot" in a.what:
        for path in report.draw(rows, a.out) if rows else ():
            print(path)
    if "table" in a.what or chosen:
        print(report.table(rows), end="")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
