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

from gdn_ops.cli import export_tensorrt
from gdn_ops.cli.errors import Failure, UserError, at_the_door, need
from gdn_ops.cli.export_tensorrt import EngineOptions
from gdn_ops.cli.options import whole

if TYPE_CHECKING:
    from torch import nn

    from gdn_ops.cli.measure import Row

PROGRAM = "generate.py"
Tell = Callable[[str, int, int], None]


class Target(str, enum.Enum):
    """What an export becomes; each has its entry in TARGETS."""

    aoti = "aoti"
    onnx27 = "onnx27"
    ort = "ort"
    portable = "portable"
    tensorrt = "tensorrt"

    @property
    def onnx(self) -> bool:
        """Made and checked as an ONNX file, on the CPU."""
        return self is not Target.aoti


class Runtime(str, enum.Enum):
    """What builds an engine."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class Hardware(str, enum.Enum):
    """Which other GPUs an engine of full TensorRT runs on."""

    ampere_plus = "ampere_plus"
    same_compute_capability = "same_compute_capability"


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
    runtime: Annotated[
        Runtime | None, typer.Option("--runtime", help="Engine: which TensorRT, not the first that can build.")
    ] = None,
    compute_capabilities: Annotated[
        list[str] | None,
        typer.Option("--compute-capabilities", metavar="SM", help="Engine, TensorRT-RTX: such as sm_89; repeatable."),
    ] = None,
    max_batch: Annotated[int | None, whole("--max-batch", 1, "Engine: rows at most, 8 if not given.")] = None,
    max_length: Annotated[
        int | None, whole("--max-length", 2, "Engine: tokens of a prompt at most, 4096 if not given.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="FILE", help="Engine, full TensorRT: is read if there, and written."),
    ] = None,
    hardware_compatible: Annotated[
        Hardware | None,
        typer.Option("--hardware-compatible", help="Engine, full TensorRT: which other GPUs it is for."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engine, full TensorRT: for later versions too.")
    ] = False,
) -> None:
    """Makes an artifact, checked against eager and measured."""
    import torch
    from rich.console import Console

    from gdn_ops.cli import loading, measure
    from gdn_ops.cli import text as texts
    from gdn_ops.cli.device import pick
    from gdn_ops.export.destination import check_destination, replacing
    from gdn_ops.files import sync, write_file

    engine = EngineOptions(
        runtime.value if runtime else None, compute_capabilities, max_batch, max_length, timing_cache,
        hardware_compatible.value if hardware_compatible else None, version_compatible,
    )  # fmt: skip
    engine.refuse_unless(target.value)
    if target.onnx and device not in ("auto", "cpu"):
        raise UserError(
            f"--device: expected auto or cpu with --target {target.value} (the file is checked and measured by ONNX "
            f"Runtime on the CPU; it may run elsewhere), got {device!r}"
        )
    chosen = pick("cpu" if target.onnx else device)
    if loading.is_export(directory):
        raise UserError(f"DIR: expected a trained model's folder, got the export {directory}")
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"DIR: expected a trained model's folder, got {directory}, which {kind}")
    with at_the_door("--out"):
        check_destination(out)
    model, text = loading.load_model(directory, chosen, getattr(torch, dtype.value)), texts.load(directory)
    with contextlib.ExitStack() as stack:
        with at_the_door("--out"):
            work = stack.enter_context(replacing(out))
        with _waiting(f"exporting {model.num_parameters():,} parameters for {target.value} on {chosen.type}") as tell:
            finish = TARGETS[target](model, work, engine, tell)
        with _waiting("measuring"):
            rows = finish(directory)
        measured = json.dumps([row._asdict() for row in rows], indent=2).encode() + b"\n"
        with at_the_door("--out"):
            text.save(work)
            write_file(work / "measured.json", measured)
            sync(work)
            stack.close()  # only here does the work take its place
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    threads = f" (threads: {torch.get_num_threads()})" if chosen.type == "cpu" else ""
    console.print(measure.table(rows, f"{out}: {chosen.type}{threads}, {dtype.value}"), markup=False)
    calls = f"a prefill of {measure.LENGTH} tokens, then {measure.STEPS} steps"
    console.print(f"tokens/s: one sequence, {calls}; medians of {measure.ROUNDS} rounds at most", markup=False)


def _aoti(model: nn.Module, out: Path, engine: EngineOptions, tell: Tell) -> Callable[[Path], list[Row]]:
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


def _onnx(target: str) -> Callable[[nn.Module, Path, EngineOptions, Tell], Callable[[Path], list[Row]]]:
    """The same for an ONNX file, with the program beside it that generates from it alone."""

    def write(model: nn.Module, out: Path, engine: EngineOptions, tell: Tell) -> Callable[[Path], list[Row]]:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            need(library, f"gdn export --target {target}", "onnx")
        import torch

        from gdn_ops.cli import generate_onnx
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
        yield
    except ParityError as error:
        raise Failure(f"the artifact does not give eager's numbers; nothing was written: {error}") from error
    except Exception as error:
        with at_the_door("--out" if isinstance(error, OSError) else None):  # what an exporter writes is all in OUT
            raise


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


def _tensorrt(model: nn.Module, out: Path, engine: EngineOptions, tell: Tell) -> Callable[[Path], list[Row]]:
    with _checked():
        return export_tensorrt.write(model, out, engine, tell)


TARGETS: dict[Target, Callable[[Any, Path, EngineOptions, Tell], Callable[[Path], list]]] = {
    Target.aoti: _aoti,
    Target.tensorrt: _tensorrt,
    **{target: _onnx(target.value) for target in (Target.onnx27, Target.ort, Target.portable)},
}


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[Tell]:
    """A spinner on a terminal, a line elsewhere; always the time that it took.

    Gives a function that shows a phase of the work, its steps done and its steps: beside the spinner as they come, or
    each phase once as a line.
    """
    from rich.console import Console

    console, start = Console(stderr=True, highlight=False), time.perf_counter()
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda phase, done, steps: status.update(f"{what}: {phase} {done}/{steps}")
    else:
        console.print(what, markup=False, soft_wrap=True)
        shown: set[str] = set()

        def tell(phase: str, done: int, steps: int) -> None:
            if phase not in shown:
                shown.add(phase)
                console.print(f"{phase}: {time.perf_counter() - start:.0f} s", markup=False, soft_wrap=True)

        yield tell
    console.print(f"{what}: {time.perf_counter() - start:.0f} s", markup=False, soft_wrap=True)
