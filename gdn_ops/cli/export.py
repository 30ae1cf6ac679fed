"""``gdn export``: a trained model as an artifact, checked against eager and measured beside it."""

from __future__ import annotations

import contextlib
import enum
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdn_ops.cli import generate_onnx
from gdn_ops.cli.errors import Failure, UserError, at_the_door, need

if TYPE_CHECKING:
    from torch import nn

    from gdn_ops.cli.measure import Row

PROGRAM = "generate.py"


class Target(str, enum.Enum):
    """What an export becomes; each has its entry in TARGETS."""

    aoti = "aoti"
    onnx27 = "onnx27"
    ort = "ort"
    portable = "portable"

    @property
    def onnx(self) -> bool:
        return self is not Target.aoti


class Dtype(str, enum.Enum):
    """Of the exported weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model's folder.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="OUT", help="Folder for the export; an earlier export in it is replaced.")
    ],
    target: Annotated[Target, typer.Option("--target", help="What the model becomes.")] = Target.aoti,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda or cuda:N: where the artifact will run.")
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of weights and arithmetic.")] = Dtype.float32,
) -> None:
    """Makes an artifact, checked against eager and measured."""
    import torch
    from rich.console import Console

    from gdn_ops.cli import loading, measure
    from gdn_ops.cli import text as texts
    from gdn_ops.cli.device import pick
    from gdn_ops.cli.folders import sync, write_file
    from gdn_ops.export.destination import replacing

    if target.onnx and device not in ("auto", "cpu"):
        raise UserError(
            f"--device: expected auto or cpu with --target {target.value} (the file is checked and measured by ONNX "
            f"Runtime on the CPU; it may run elsewhere), got {device!r}"
        )
    chosen = pick("cpu" if target.onnx else device)
    if loading.is_export(directory):
        raise UserError(f"DIR: expected a trained model's folder, got the export {directory}")
    if not directory.is_dir():
        raise UserError(f"DIR: expected a trained model's folder, got {directory}, which does not exist")
    _check_destination(out)
    model, text = loading.load_model(directory, chosen, getattr(torch, dtype.value)), texts.load(directory)
    with replacing(out.absolute()) as work:
        with _waiting(f"exporting {model.num_parameters():,} parameters for {target.value} on {chosen.type}"):
            finish = TARGETS[target](model, work)
        text.save(work)
        with _waiting("measuring"):
            rows = finish(directory)
        write_file(work / "measured.json", json.dumps([row._asdict() for row in rows], indent=2).encode() + b"\n")
        sync(work)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    threads = f" (threads: {torch.get_num_threads()})" if chosen.type == "cpu" else ""
    console.print(measure.table(rows, f"{out}: {chosen.type}{threads}, {dtype.value}"), markup=False)
    calls = f"a prefill of {measure.LENGTH} tokens, then {measure.STEPS} steps"
    console.print(f"tokens/s: one sequence, {calls}; medians of {measure.ROUNDS} rounds at most", markup=False)


def _aoti(model: nn.Module, out: Path) -> Callable[[Path], list[Row]]:
    """Writes the packages; gives the function that measures them beside eager."""
    need("setuptools", "gdn export --target aoti", "export")  # torch's list of C++ include folders comes with it
    from gdn_ops.export import export_aoti, load_package

    try:
        with _checked(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own serialisation
            result = export_aoti(model, out)
    except RuntimeError as error:
        if "needs a C++ compiler" not in str(error):
            raise
        raise UserError(str(error)) from error
    files = {name: (path.name, path.stat().st_size) for name, path in result.files.items()}
    return lambda directory: _rows(model, directory, "aoti", load_package(out), files, result.parity)


def _onnx(target: str) -> Callable[[nn.Module, Path], Callable[[Path], list[Row]]]:
    """The same for an ONNX file, with the program beside it that generates from it alone."""

    def write(model: nn.Module, out: Path) -> Callable[[Path], list[Row]]:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            need(library, f"gdn export --target {target}", "onnx")
        import torch

        from gdn_ops.cli.measure import OnnxRunner
        from gdn_ops.export import export_onnx

        with _checked():
            result = export_onnx(model, out, target=target)
        shutil.copyfile(generate_onnx.__file__, out / PROGRAM)
        size = sum(path.stat().st_size for path in out.iterdir() if path.name.startswith(generate_onnx.MODEL))
        files = {name: (generate_onnx.MODEL, size) for name in ("prefill", "step")}
        threads = torch.get_num_threads()

        def finish(directory: Path) -> list[Row]:
            runner = OnnxRunner(generate_onnx.Model(out / generate_onnx.MODEL, threads))
            return _rows(model, directory, target, runner, files, result.report)

        return finish

    return write


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """Inside it, what an exporter refuses is the user's to mend, and an artifact with other numbers is a failure."""
    from gdn_ops.export import ParityError

    try:
        with at_the_door():
            yield
    except ParityError as error:
        raise Failure(f"the artifact does not give eager's numbers; nothing was written: {error}") from error


def _rows(
    model: nn.Module, directory: Path, target: str, runner: Any, files: dict[str, tuple[str, int]], parity: dict
) -> list[Row]:
    """What was measured of each program, eager's first; ``files`` has a program's file and its size."""
    from gdn_ops.cli import measure

    device = next(model.parameters()).device
    speeds = measure.speeds({"eager": model, target: runner}, device, model.config.vocab_size)
    parities, weights = measure.parities(parity["cases"]), directory / "model.safetensors"
    rows = [
        measure.Row("eager", name, weights.name, weights.stat().st_size, None, speeds["eager"][name]) for name in files
    ]
    return rows + [
        measure.Row(target, name, file, size, parities[name], speeds[target][name])
        for name, (file, size) in files.items()
    ]


TARGETS: dict[Target, Callable[[Any, Path], Callable[[Path], list]]] = {
    target: _onnx(target.value) if target.onnx else _aoti for target in Target
}


def _check_destination(out: Path) -> None:
    """Before the work rather than after it."""
    from gdn_ops.export.destination import may_be_replaced

    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, got the file {out}")
    if out.is_dir() and not may_be_replaced(out):
        raise UserError(f"--out: expected a new or empty folder or an earlier export, got {out} with other files")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise UserError(f"--out: expected a folder that can be made, got {out} below the file {parent}")


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal, a line elsewhere; always the time that it took."""
    from rich.console import Console

    console, start = Console(stderr=True, highlight=False), time.perf_counter()
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(what, markup=False, soft_wrap=True)
        yield
    console.print(f"{what}: {time.perf_counter() - start:.0f} s", markup=False, soft_wrap=True)
