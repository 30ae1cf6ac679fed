"""``python -m perf op | gpu | linear | train | kernels | cpu | nodes | tune | plot``; see the package's docstring."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from gdn_ops.models import PRESETS
from gdn_ops.models.hybrid import ACTIVATION_CHECKPOINTING
from perf import kernels as kernel_times
from perf import runs, training
from perf import tune as tuning
from perf.cpu_providers import CPU_PROVIDERS
from perf.linear_providers import LINEAR_PROVIDERS
from perf.linear_providers import TASKS as LINEAR_TASKS
from perf.linear_providers import cost as linear_cost
from perf.linear_providers import forward_and_backward as linear_both
from perf.providers import OURS, PROVIDERS, Unavailable
from perf.records import ROOT
from perf.shapes import DIRECTIONS, DTYPES, SUITES, Shape, parse_shape
from perf.training_models import TRAIN_PROVIDERS

RESULTS = ROOT / "perf" / "results"


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size(text: str) -> training.Size:
    try:
        return training.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _csv(out: Path | None, name: str) -> Path:
    """A directory gets ``name`` inside it; a file is taken as it is."""
    out = RESULTS if out is None else out
    return out if out.suffix == ".csv" else out / name


def _chosen(names: Sequence[str] | None, table: dict) -> list:
    return list(table.values()) if names is None else [table[name] for name in names]


def _need_cuda(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    if getattr(a, "device", "cuda") == "cuda" and not torch.cuda.is_available():
        other = "; use --device cpu" if hasattr(a, "device") else ""
        parser.error(f"device: expected a CUDA device, and torch finds none{other}")


def op(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    _need_cuda(parser, a)
    if a.device == "cpu" and "long" in (a.suite or []):
        parser.error("suite: expected forward, backward or decode on the CPU, got long; name lengths with --shape")
    tasks = [task for suite in a.suite or [] for task in SUITES[suite]]
    tasks += [(shape, direction) for shape in a.shape or [] for direction in a.direction or ["forward", "backward"]]
    if not tasks:
        parser.error("suite, shape: expected at least one of them, got neither")
    dtype = a.dtype or ("bf16" if a.device == "cuda" else "fp32")
    runs.run(tasks, dtype, a.device, _chosen(a.provider, PROVIDERS), _csv(a.out, "op.csv"), a.budget)


def gpu(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    _need_cuda(parser, a)
    # The suites in turns, so that a short budget still says something about each.
    rounds = zip_longest(*(SUITES[suite] for suite in ("forward", "backward", "decode")))
    tasks = [task for row in rounds for task in row if task is not None]
    runs.run(tasks, a.dtype, "cuda", _chosen(a.provider, PROVIDERS), _csv(a.out, "gpu.csv"), a.budget)


def linear(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    _need_cuda(parser, a)
    tasks = [(shape, d) for shape in a.shape for d in ("forward", "backward")] if a.shape else LINEAR_TASKS
    dtype = a.dtype or ("bf16" if a.device == "cuda" else "fp32")
    who, out = _chosen(a.provider, LINEAR_PROVIDERS), _csv(a.out, "linear.csv")
    costs = runs.Costs(linear_cost, linear_both)
    runs.run(tasks, dtype, a.device, who, out, a.budget, warm=False, costs=costs)


def train(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    _need_cuda(parser, a)
    precision = a.precision or ("autocast" if a.device == "cuda" else "fp32")
    who = _chosen(a.provider, TRAIN_PROVIDERS)
    setting = training.Setting(a.device, precision, a.checkpointing)
    presets, sizes = a.preset or training.PRESETS, a.shape or training.SIZES
    training.run(presets, sizes, who, setting, _csv(a.out, "train.csv"), a.budget)


def kernels(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    _need_cuda(parser, a)
    if not a.shape and a.preset is None:
        parser.error("shape, preset: expected at least one of them, got neither")
    tasks = [(shape, direction) for shape in a.shape or [] for direction in a.direction or ["forward", "backward"]]
    names = a.provider or [OURS]
    operators, trainers = ([t[name] for name in names if name in t] for t in (PROVIDERS, TRAIN_PROVIDERS))
    dtype = a.dtype or ("bf16" if a.device == "cuda" else "fp32")
    try:
        kernel_times.run(
            tasks, dtype, operators, a.preset, a.size, a.layers, trainers, a.device, _csv(a.out, "kernels.csv"), a.most
        )
    except ValueError as error:
        parser.error(str(error))


def cpu(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    shapes = [Shape(16, 32, 1, tokens) for tokens in a.tokens]
    # Decode first: it is over in no time.
    tasks = [(shape, "decode") for shape in shapes if shape.T == 1]
    tasks += [(shape, d) for shape in shapes if shape.T > 1 for d in ("forward", "forward+backward")]
    runs.run(tasks, "fp32", "cpu", _chosen(a.provider, CPU_PROVIDERS), _csv(a.out, "cpu.csv"), a.budget)


def nodes(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    from perf.nodes import report

    torch.set_num_threads(a.threads)
    try:
        for tokens in a.tokens:
            print(report(Shape(16, 32, 1, tokens), a.seconds), flush=True)
    except Unavailable as error:
        parser.error(str(error))


def warm(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    i, n = map(int, a.part.split(","))
    runs.compile_once([runs.parse_task(text) for text in a.task], a.dtype, _chosen(a.provider, PROVIDERS), (i, n))


def tune(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    _need_cuda(parser, a)
    if a.check:
        tuning.run_check(a)
    else:
        tuning.tune(a.kernel, a.shape, a.direction, a.dtype, _csv(a.out, "tune.csv"), a.budget)


def plot(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    from perf.plot import draw

    try:
        written = draw(a.csv, a.out)
    except OSError as error:
        parser.error(f"csv, out: expected files to read and a folder to write, got {error}")
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    for path in written:
        print(path)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf", description="How fast the operators are.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=help_text, description=help_text)
        sub.set_defaults(run=function, parser=sub)
        return sub

    def measured(sub: argparse.ArgumentParser, table: dict, budget: float) -> None:
        sub.add_argument("--provider", action="append", choices=list(table), help="default: all that are installed")
        sub.add_argument("--budget", type=float, default=budget, metavar="SECONDS", help="wall time (%(default)s)")
        sub.add_argument("--out", type=Path, help="directory or .csv file (default perf/results)")

    sub = command(op, "Times operators at suites of shapes or at single ones.")
    sub.add_argument("--suite", action="append", choices=list(SUITES), help="long: up to a million tokens, on CUDA")
    sub.add_argument("--shape", action="append", type=_shape, metavar="H,HV,N,T,K,V")
    sub.add_argument("--direction", action="append", choices=DIRECTIONS, help="of --shape; default forward, backward")
    sub.add_argument("--dtype", choices=list(DTYPES), help="default bf16 on CUDA, fp32 on the CPU")
    sub.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    measured(sub, PROVIDERS, 120.0)

    sub = command(gpu, "Forward, backward and decode on the CUDA device in one go (long is op's alone).")
    sub.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    measured(sub, PROVIDERS, 150.0)

    sub = command(linear, "Gated linear attention, Mamba2's rule, on CUDA or on the CPU.")
    sub.add_argument("--shape", action="append", type=_shape, metavar="H,HV,N,T,K,V", help="default: Mamba2's sizes")
    sub.add_argument("--dtype", choices=list(DTYPES), help="default bf16 on CUDA, fp32 on the CPU")
    sub.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    measured(sub, LINEAR_PROVIDERS, 150.0)

    sub = command(train, "Whole training steps of models, next to FLA's and Hugging Face's.")
    sub.add_argument("--preset", action="append", choices=PRESETS, help="default: gdn-0.4b and h1-0.4b")
    sub.add_argument("--shape", action="append", type=_size, metavar="TxBATCH", help="default: 4096x8 and so on")
    sub.add_argument("--precision", choices=training.PRECISIONS, help="default autocast on CUDA, fp32 on the CPU")
    sub.add_argument("--checkpointing", choices=ACTIVATION_CHECKPOINTING, default="none", help="of activations")
    sub.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    measured(sub, TRAIN_PROVIDERS, 500.0)

    sub = command(kernels, "What calls and training steps are made of, kernel by kernel (torch's profiler).")
    sub.add_argument("--shape", action="append", type=_shape, metavar="H,HV,N,T,K,V", help="of operators")
    sub.add_argument("--direction", action="append", choices=DIRECTIONS, help="default forward, backward")
    sub.add_argument("--preset", choices=PRESETS, help="of a model, whose training step is taken")
    sub.add_argument(
        "--size", type=_size, default=training.SIZES[0], metavar="TxBATCH", help="of its batch (%(default)s)"
    )
    sub.add_argument("--layers", type=int, help="fewer than the preset has compile faster")
    sub.add_argument("--dtype", choices=list(DTYPES), help="of operators; default bf16 on CUDA, fp32 on the CPU")
    sub.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    sub.add_argument(
        "--provider", action="append", choices=sorted({*PROVIDERS, *TRAIN_PROVIDERS}), help="default: ours"
    )
    sub.add_argument("--most", type=int, default=30, metavar="KERNELS", help="to print of a call (%(default)s)")
    sub.add_argument("--out", type=Path, help="directory or .csv file (default perf/results)")

    sub = command(cpu, "H16/HV32, D=128, fp32 next to transformers and ONNX Runtime.")
    sub.add_argument("--threads", type=int, default=2)
    sub.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 1])
    measured(sub, CPU_PROVIDERS, 90.0)

    sub = command(nodes, "What bounds the portable rule in ONNX Runtime on the CPU, node by node.")
    sub.add_argument("--threads", type=int, default=2)
    sub.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 1024])
    sub.add_argument("--seconds", type=float, default=10.0, help="for each length (%(default)s)")

    sub = command(warm, "Compiles what tasks need (started by the other commands).")
    sub.add_argument("--task", action="append", required=True, metavar="H,HV,N,T,K,V:DIRECTION")
    sub.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    sub.add_argument("--provider", action="append", choices=list(PROVIDERS))
    sub.add_argument("--part", default="0,1", metavar="I,N", help="every N-th configuration of a peer's autotuner")

    sub = command(tune, "Tries other tiles, warps and stages of one kernel.")
    sub.add_argument("--kernel", required=True, choices=list(tuning.KERNELS))
    sub.add_argument("--shape", type=_shape, metavar="H,HV,N,T,K,V", help="default: the kernel's")
    sub.add_argument("--direction", choices=DIRECTIONS, help="default: the one that shows the kernel")
    sub.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    sub.add_argument("--budget", type=float, default=120.0, metavar="SECONDS", help="wall time (%(default)s)")
    sub.add_argument("--out", type=Path, help="directory or .csv file (default perf/results)")
    sub.add_argument("--check", metavar="SETTINGS", help="only check one setting (started by the command itself)")

    sub = command(plot, "Draws PNG files from CSV files.")
    sub.add_argument("csv", type=Path, nargs="+")
    sub.add_argument("--out", type=Path, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments().parse_args(argv)
    a.run(a.parser, a)


if __name__ == "__main__":
    main()
