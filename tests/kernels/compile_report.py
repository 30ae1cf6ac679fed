"""Builds every Triton kernel for chips that are not there, and says what each build takes of its chip.

    python -m tests.kernels.compile_report [--targets sm_90 gfx942] [--groups 'bf16 128/128'] [--out FILE]

prints one line a build and writes them as CSV: shared memory against the chip's limit, registers a thread, and bytes a
thread that were spilled to memory (ptxas: stores + loads; AMD: spilled vector registers). No GPU is needed. A group is
a module's ``ahead_of_time_cases()`` (under its name), or the chunk kernels at one dtype and head size; all are taken as
if on the target, with the tiles, warps and stages that the launchers choose there.

Rows already in FILE stay if the kernel's source, its configuration and Triton's version are what they were, so an
interrupted report goes on where it stopped, and after a change only what changed is built. Everything for five chips
takes over an hour of one core: fp32 on sm_90 and sm_100, where products are exact, is most of it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import multiprocessing
import os
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gdn_ops.kernels.triton as package
from gdn_ops.kernels.triton.chip import CHIPS, as_if_on
from gdn_ops.kernels.triton.chunk_backward import chunk_backward
from gdn_ops.kernels.triton.chunk_forward import chunk_forward
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call

TARGETS = tuple(CHIPS)
RECORD = Path(__file__).parents[2] / "perf" / "results" / "compile.csv"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = ((64, 64), (128, 128), (256, 256), (192, 384), (256, 512))  # K, V
# Sequences: few are cut into segments, many fill any chip with wider tiles. Both numbers are odd multiples of two, so
# that a kernel which looks at neither is built once.
BATCHES = {"few": 2, "many": 66}


class Build(NamedTuple):
    """One kernel in one configuration for one chip; ``error`` is empty where it compiled.

    ``K`` and ``V`` are the kernel's own (empty where it has none), ``tile`` its block sizes; ``key`` stands for the
    kernel's source and configuration.
    """

    target: str
    kernel: str
    case: str
    dtype: str
    K: str
    V: str
    tile: str
    num_warps: int
    num_stages: int
    shared_bytes: int
    shared_limit: int
    registers: int
    spill_bytes: int
    triton: str
    key: str
    error: str


def modules() -> dict[str, object]:
    """Every module of kernels by its short name."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def jit_functions() -> list[triton.JITFunction]:
    """Everything of the package that ``@triton.jit`` decorates: kernels, and functions that they call."""
    return [
        x
        for module in modules().values()
        for x in vars(module).values()
        if isinstance(x, triton.JITFunction) and x.fn.__module__ == module.__name__
    ]


def called_by(kernel: triton.JITFunction) -> list[triton.JITFunction]:
    """The package's own functions that a kernel calls, directly or not."""
    found: dict[str, triton.JITFunction] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        for name in sorted(set(re.findall(r"\w+", function.src))):
            callee = function.fn.__globals__.get(name)
            ours = isinstance(callee, triton.JITFunction) and callee.fn.__module__.startswith(package.__name__)
            if ours and callee is not function and name not in found:
                found[name] = callee
                waiting.append(callee)
    return [found[name] for name in sorted(found)]


def _rule_cases(dtype: str, K: int, V: int) -> list[CompileCase]:
    """Forward and backward of the chunkwise rule, grouped values, dense, with states, at both sizes of batch."""
    cases = []
    for size, B in BATCHES.items():
        T, H, HV = 2048, 2, 4
        q = torch.empty(B, T, H, K, dtype=DTYPES[dtype], device="meta")
        v = torch.empty(B, T, HV, V, dtype=DTYPES[dtype], device="meta")
        gates = torch.empty(B, T, HV, device="meta")
        state = torch.empty(B, HV, K, V, device="meta")
        inputs = (q, q, v, gates, gates, state, None, 0.1)
        label = f"{dtype} {K}/{V} {size}"
        cases += cases_of_call(f"forward {label}", chunk_forward, *inputs, True)
        cases += cases_of_call(f"backward {label}", chunk_backward, v, state, *inputs)
    return cases


@cache
def groups() -> dict[str, Callable[[], list[CompileCase]]]:
    """Where cases come from, by name."""
    found = {name: m.ahead_of_time_cases for name, m in modules().items() if hasattr(m, "ahead_of_time_cases")}
    for dtype in DTYPES:
        found.update({f"{dtype} {K}/{V}": partial(_rule_cases, dtype, K, V) for K, V in HEADS})
    return found


def key_of(case: CompileCase, target: str) -> str:
    sources = [case.kernel.src, *(function.src for function in called_by(case.kernel))]
    known = "\n".join([*sources, target, str(case[2:]), triton.__version__])
    return hashlib.sha256(known.encode()).hexdigest()[:12]


@cache
def cases_of(target: str, names: tuple[str, ...]) -> dict[str, CompileCase]:
    """The cases of some groups as if on ``target``, by key: each configuration once, under its first name."""
    found: dict[str, CompileCase] = {}
    with as_if_on(CHIPS[target]):
        for name in names:
            for case in groups()[name]():
                found.setdefault(key_of(case, target), case)
    return found


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


def build(case: CompileCase, target: str) -> Build:
    """Compiles one case; a failure is a row too."""
    limit, constants = CHIPS[target].shared_memory, case.constexprs
    try:
        kernel, said = compile_case(case, target)
        taken, error = (kernel.metadata.shared, limit, *_registers_and_spills(kernel, said)), ""
    except Exception as e:
        taken, error = (0, limit, 0, 0), f"{type(e).__name__}: {e.__cause__ or e}"
    tile = " ".join(f"{name}={constants[name]}" for name in ("BT", "BK", "BV", "BD", "BN", "BR") if name in constants)
    dtype = re.search(r"bf16|fp16|fp32", case.name)
    return Build(
        target, case.kernel.fn.__name__, case.name.split("/" + case.kernel.fn.__name__)[0], dtype[0] if dtype else "",
        str(constants.get("K", "")), str(constants.get("V", "")), tile, case.num_warps, case.num_stages, *taken,
        triton.__version__, key_of(case, target), error,
    )  # fmt: skip


def _build_of(target: str, key: str, names: tuple[str, ...]) -> Build:
    """For a process pool: a kernel cannot be pickled, what makes it can."""
    return build(cases_of(target, names)[key], target)


def read(path: Path) -> dict[str, Build]:
    """The rows of a report by key; none if there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [Build(**row) for row in csv.DictReader(file)]
    numbers = ("num_warps", "num_stages", "shared_bytes", "shared_limit", "registers", "spill_bytes")
    return {row.key: row._replace(**{name: int(getattr(row, name)) for name in numbers}) for row in rows}


def write(path: Path, rows: Iterable[Build]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Build._fields)
        writer.writerows(rows)


def line(x: Build) -> str:
    taken = f"{x.shared_bytes:>7} of {x.shared_limit}  {x.registers:>3} registers  {x.spill_bytes:>5} spilled"
    where = f"{x.kernel} ({x.case}; {x.tile})"
    return f"{x.target:7} {where:80} {x.num_warps} warps {x.num_stages} stages  {x.error[:60] or taken}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--groups", nargs="+", choices=tuple(groups()), default=tuple(groups()))
    parser.add_argument("--out", type=Path, help="CSV to bring up to date (without it, builds are only printed)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    known = read(options.out) if options.out else {}
    names = tuple(options.groups)
    wanted = {target: cases_of(target, names) for target in options.targets}
    if set(names) == set(groups()):
        current = {key for cases in wanted.values() for key in cases}
        known = {key: row for key, row in known.items() if key in current or row.target not in wanted}
    # Chip by chip within a group, so that what an interrupted report has, it has for all chips.
    ordered = sorted((i, target, key) for target, cases in wanted.items() for i, key in enumerate(cases))
    jobs = [(target, key) for _, target, key in ordered if key not in known]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        for row in pool.map(partial(_build_of, names=names), *zip(*jobs)) if jobs else ():
            known[row.key] = row
            print(line(row), flush=True)
            if options.out:
                write(options.out, sorted(known.values(), key=lambda x: (TARGETS.index(x.target), x.kernel, x.case)))


if __name__ == "__main__":
    main()
