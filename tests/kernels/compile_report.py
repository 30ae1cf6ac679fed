"""Builds every Triton kernel for chips that are not there, and says what each build takes of its chip.

    python -m tests.kernels.compile_report [--targets sm_90 gfx942] [--modules chunk_forward] [--out FILE]

prints one line a build and writes them all as CSV: shared memory against the chip's limit, registers a thread, and
bytes a thread that were spilled to memory (ptxas: stores + loads; AMD: spilled vector registers). No GPU is needed. The
cases are those of each module's ``ahead_of_time_cases()``, taken as if on the target, with the tiles that the launchers
choose there. The committed CSV is what ``test_triton_compile.py`` holds the kernels to.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import multiprocessing
import os
import pkgutil
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gdn_ops.kernels.triton as package
from gdn_ops.kernels.triton.chip import CHIPS, as_if_on
from gdn_ops.kernels.triton.compile_case import CompileCase

TARGETS = tuple(CHIPS)
RECORD = Path(__file__).parents[2] / "perf" / "results" / "kernel_resources.csv"


class Build(NamedTuple):
    """One kernel in one configuration for one chip; ``error`` is empty where it compiled."""

    target: str
    case: str
    num_warps: int
    num_stages: int
    shared_bytes: int
    shared_limit: int
    registers: int
    spill_bytes: int
    triton: str
    error: str


def kernels_of(module) -> dict[str, triton.JITFunction]:
    """The kernels that ``module`` itself defines."""
    found = {n: x for n, x in vars(module).items() if n.endswith("_kernel") and isinstance(x, triton.JITFunction)}
    return {n: x for n, x in found.items() if x.fn.__module__ == module.__name__}


@cache
def modules() -> dict[str, object]:
    """The modules that have cases, by their short names."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    found = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    return {name: module for name, module in found.items() if hasattr(module, "ahead_of_time_cases")}


def cases_of(target: str, module: str) -> list[CompileCase]:
    """The cases of one module on one chip, each configuration once."""
    with as_if_on(CHIPS[target]):
        cases = modules()[module].ahead_of_time_cases()
    return list({(case.kernel.fn.__name__, str(case[2:])): case for case in reversed(cases)}.values())[::-1]


def compile_case(case: CompileCase, target: str) -> tuple[triton.compiler.CompiledKernel, str]:
    """The kernel compiled for ``target``, and what ptxas said of it (nothing for AMD)."""
    chip = CHIPS[target]
    names = [parameter.name for parameter in case.kernel.params]
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    warp_size = 64 if chip.backend == "hip" else 32
    said = io.StringIO()
    # A cached kernel has no ptxas log.
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(said),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, warp_size), options=options)
    return kernel, said.getvalue()


def _registers_and_spills(kernel, said: str) -> tuple[int, int]:
    if "amdgcn" in kernel.asm:
        vector, spilled = (
            int(re.search(rf"\.{key}:\s*(\d+)", kernel.asm["amdgcn"])[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return vector, 4 * spilled
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return max(map(int, re.findall(r"Used (\d+) registers", said))), sum(map(int, spills))


_built: dict[tuple, Build] = {}


def build(case: CompileCase, target: str) -> Build:
    """Compiles one case; modules share kernels, and a process builds each configuration once."""
    key = (target, case.kernel.fn.__name__, str(case[2:]))
    if key not in _built:
        limit = CHIPS[target].shared_memory
        try:
            kernel, said = compile_case(case, target)
            taken = (kernel.metadata.shared, limit, *_registers_and_spills(kernel, said))
            error = ""
        except Exception as e:
            taken, error = (0, limit, 0, 0), f"{type(e).__name__}: {e.__cause__ or e}"
        _built[key] = Build(target, "", case.num_warps, case.num_stages, *taken, triton.__version__, error)
    return _built[key]._replace(case=case.name)


def builds(target: str, module: str) -> list[Build]:
    return [build(case, target) for case in cases_of(target, module)]


def _line(x: Build) -> str:
    taken = f"{x.shared_bytes:>7} of {x.shared_limit}  {x.registers:>3} registers  {x.spill_bytes:>5} spilled"
    return f"{x.target:7} {x.case:52} {x.num_warps} warps {x.num_stages} stages  {x.error[:60] or taken}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--modules", nargs="+", choices=tuple(modules()), default=tuple(modules()))
    parser.add_argument("--out", type=Path, help=f"CSV to write (default for a full report: {RECORD.name})")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    everything = set(options.targets) == set(TARGETS) and set(options.modules) == set(modules())
    out = options.out or (RECORD if everything else None)
    jobs = [(target, module) for target in options.targets for module in options.modules]
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        for group in pool.map(builds, *zip(*jobs)):
            rows += group
            print("\n".join(map(_line, group)), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Build._fields)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
