"""``gdn export``: a trained model as an artifact, checked against eager and measured beside it."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdn_ops.cli.errors import Failure, UserError, at_the_door, need

if TYPE_CHECKING:
    from torch import nn

    from gdn_ops.cli.measure import Row


class Target(str, enum.Enum):
    """What an export becomes; each has its entry in TARGETS."""

    aoti = "aoti"


class Dtype(str, enum.Enum):
    """Of the exported weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model's folder.")],
    out: Annotated[
        Path, typer.Option(metavar="OUT", help="Folder for the export; an earlier export in it is replaced.")
    ],
    target: Annotated[Target, typer.Option(help="What the model becomes.")] = Target.aoti,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: where the artifact will run.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of weights and arithmetic.")] = Dtype.float32,
) -> None:
    """Makes an artifact, checked against eager and measured."""
    import torch
    from rich.console import Console

    from gdn_ops.cli import loading, measure
    from gdn_ops.cli import text as texts
    from gdn_ops.cli.device import pick
    from gdn_ops.cli.folders import replacing, write_file

    chosen = pick(device)
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
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    threads = f" (threads: {torch.get_num_threads()})" if chosen.type == "cpu" else ""
    console.print(measure.table(rows, f"{out}: {chosen.type}{threads}, {dtype.value}"), markup=False)
    calls = f"a prefill of {measure.LENGTH} tokens, then {measure.STEPS} steps"
    console.print(f"tokens/s: one sequence, {calls}; medians of {measure.ROUNDS} rounds at most", markup=False)


def _aoti(model: nn.Module, out: Path) -> Callable[[Path], list[Row]]:
    """Writes the packages; gives the function that measures them beside eager."""
    need("setuptools", "gdn export --target aoti", "export")  # torch's list of C++ include folders comes with it
    from gdn_ops.cli import measure
    from gdn_ops.export import ParityError, export_aoti, load_package

    try:
        with at_the_door(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own serialisation
            result = export_aoti(model, out)
    except ParityError as error:
        raise Failure(f"the artifact does not give eager's numbers; nothing was written: {error}") from error
    except RuntimeError as error:
        if "needs a C++ compiler" not in str(error):
            raise
        raise UserError(str(error)) from error

    def finish(directory: Path) -> list[Row]:
        package = load_package(out)
        speeds = measure.speeds({"eager": model, "aoti": package}, package.device, model.config.vocab_size)
        parities = measure.parities(result.parity["cases"])
        weights = directory / "model.safetensors"
        rows = [
            measure.Row("eager", name, weights.name, weights.stat().st_size, None, speeds["eager"][name])
            for name in result.files
        ]
        return rows + [
            measure.Row("aoti", name, path.name, path.stat().st_size, parities[name], speeds["aoti"][name])
            for name, path in result.files.items()
        ]

    return finish


TARGETS: dict[Target, Callable[[Any, Path], Callable[[Path], list]]] = {Target.aoti: _aoti}


def _check_destination(out: Path) -> None:
    """Before the work rather than after it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, got the file {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
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
