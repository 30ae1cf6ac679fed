"""How the operators reach an AOTInductor package that needs no Python.

On CUDA nothing is needed: Inductor sees the Triton kernels behind each operator and packs their cubins. On CPU an
operator stays one node, and the generated code calls a C function in its place. Those functions (``cpu_shims.cpp`` on
top of ``cpu_kernels.cpp``) are compiled once, kept in a cache, and linked statically into the package's shared object,
so that the package depends on nothing but libtorch. The kernels are compiled for several instruction sets; the best
that the running processor has is picked at run time. (Inductor compiles its own loops for the machine that exports.)

Other routes were tried and are wrong or unusable with a dynamic length: a chunk loop written with ``while_loop`` gives
NaN inside a package, ``scan`` does not compile there, and a Python custom operator needs Python.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gdn_ops.files import whole

SOURCES = Path(__file__).parent
_RULE = (
    "AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle g, AtenTensorHandle beta, "
    "AtenTensorHandle* initial_state, AtenTensorHandle* cu_seqlens, double scale, int32_t output_final_state, "
    "AtenTensorHandle* o, AtenTensorHandle* final_state"
)
_LINEAR = _RULE.replace("AtenTensorHandle beta, ", "")
_CONV = (
    "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* initial_state, "
    "AtenTensorHandle* cu_seqlens, int32_t silu, int32_t output_final_state, AtenTensorHandle* y, "
    "AtenTensorHandle* final_state"
)
CPU_SHIMS = {
    "chunk_gated_delta_rule": _RULE,
    "recurrent_gated_delta_rule": _RULE,
    "chunk_gated_linear_attention": _LINEAR,
    "recurrent_gated_linear_attention": _LINEAR,
    "causal_conv1d": _CONV,
}


class InstructionSet(NamedTuple):
    name: str
    vector_bytes: int
    flags: tuple[str, ...]


def instruction_sets() -> list[InstructionSet]:
    """What the kernels are compiled for on this architecture; ``baseline`` is always there."""
    sets = [InstructionSet("baseline", 16, ())]
    if platform.machine() in ("x86_64", "AMD64"):
        sets.append(InstructionSet("avx2", 32, ("-mavx2", "-mfma", "-mf16c")))
        wide = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
        sets.append(InstructionSet("avx512", 64, wide))
    return sets


def compiler() -> str:
    """The C++ compiler that Inductor uses. Raises RuntimeError when there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        named = os.environ.get("CXX")
        other = "" if named is None else f" to another than {named!r}, which does not run"
        raise RuntimeError(
            f"exporting to AOTInductor needs a C++ compiler: install g++ or set the environment variable CXX{other}"
        ) from error


@functools.cache
def copies_standard_library(cxx: str) -> bool:
    """Whether every library that ``cxx`` links gets a copy of libstdc++ of its own. torch has another one in the same
    process; a package whose copy is visible takes some functions from each, and does not load."""
    if sys.platform != "linux":
        return False
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch) / "text.cpp", Path(scratch) / "text.so"
        source.write_text("#include <string>\nstd::string text(int n) { return std::to_string(n); }\n")
        done = subprocess.run([cxx, "-shared", "-fPIC", str(source), "-o", str(library)], capture_output=True)
        if done.returncode:
            return False  # whoever compiles next will say why
        linked = library.read_bytes()
        return not any(name in linked for name in (b"libstdc++.so", b"libc++.so"))


def _hiding(cxx: str) -> Path:
    """``cxx`` by its own name, which Inductor goes by, in Inductor's cache: what it links hides its copies."""
    command = shlex.quote(cxx)
    script = f"""#!/bin/sh
case " $* " in *" -shared "*) exec {command} "$@" -Wl,--exclude-libs,ALL;; esac
exec {command} "$@"
"""
    path = _cache() / hashlib.sha256(script.encode()).hexdigest()[:16] / Path(cxx).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(script)
        temporary.chmod(0o755)
    return path


def _cache() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "gdn_ops"


def _commands(cxx: str, build: Path, sets: Sequence[InstructionSet]) -> list[list[str]]:
    from torch.utils.cpp_extension import include_paths

    base = [cxx, "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-O3"]
    commands = []
    for isa in sets:
        defines = [f"-DGDN_KERNELS=kernels_{isa.name}", f"-DGDN_VECTOR_BYTES={isa.vector_bytes}"]
        output = str(build / f"kernels_{isa.name}.o")
        commands.append([*base, *isa.flags, *defines, "-c", str(SOURCES / "cpu_kernels.cpp"), "-o", output])
    has = [f"-DGDN_HAS_{isa.name.upper()}" for isa in sets]
    includes = [f"-I{path}" for path in include_paths()]
    commands.append([*base, *has, *includes, "-c", str(SOURCES / "cpu_shims.cpp"), "-o", str(build / "shims.o")])
    return commands


def cpu_archive(sets: Sequence[InstructionSet] | None = None) -> Path:
    """The static archive of the CPU kernels, built at the first call (some seconds) and kept in Inductor's cache.

    ``sets`` are the instruction sets to compile for, the baseline among them (default :func:`instruction_sets`). The
    name holds a hash of the sources, the commands and torch's version. Raises RuntimeError with the compiler's message
    when it cannot be built.
    """
    cxx, sets = compiler(), instruction_sets() if sets is None else sets
    digest = hashlib.sha256(repr((torch.__version__, _commands(cxx, Path(), sets))).encode())
    for source in ("cpu_kernels.h", "cpu_kernels.cpp", "cpu_shims.cpp"):
        digest.update((SOURCES / source).read_bytes())
    folder = _cache()
    archive = folder / f"libgdn_ops_{digest.hexdigest()[:16]}.a"
    if archive.exists():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        build = Path(scratch)
        commands = _commands(cxx, build, sets)
        objects = [command[-1] for command in commands]
        for command in [*commands, ["ar", "rcs", str(build / archive.name), *objects]]:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the CPU kernels did not compile: {' '.join(command)}\n{done.stderr}")
        os.replace(build / archive.name, archive)
    return archive


def unsupported_operators(operators: list[str], device: torch.device, dtypes: set[torch.dtype]) -> dict[str, str]:
    """The ``gdn::`` operators among ``operators`` that cannot go into a package for ``device``, and why."""
    reasons = {}
    for name in operators:
        short = name.removeprefix("gdn::").removesuffix(".default")
        if not name.startswith("gdn::"):
            continue
        if device.type == "cpu" and short not in CPU_SHIMS:
            reasons[name] = f"it has no C++ kernel for CPU (those that have: {', '.join(CPU_SHIMS)})"
        elif device.type == "cuda" and torch.float64 in dtypes:
            reasons[name] = "float64 has no Triton kernel on CUDA: export in float32, or on CPU"
    return reasons


@contextlib.contextmanager
def packaging(device: torch.device) -> Iterator[dict[str, Any]]:
    """Inside it, AOTInductor can lower the operators for ``device``; gives the ``inductor_configs`` to compile with.

    Example::

        >>> with packaging(torch.device("cpu")) as configs:  # doctest: +SKIP
        ...     torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=configs)
    """
    cxx = compiler()
    configs: dict[str, Any] = {"cpp.cxx": (str(_hiding(cxx)),)} if copies_standard_library(cxx) else {}
    if device.type != "cpu":
        yield configs
        return
    archive = cpu_archive()
    shims = {
        getattr(torch.ops.gdn, name).default: [f"AOTITorchError aoti_torch_cpu_{name}({arguments})"]
        for name, arguments in CPU_SHIMS.items()
    }
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(archive.parent), before]))
    try:
        yield configs | {
            "aot_inductor.custom_ops_to_c_shims": shims,
            "aot_inductor.custom_op_libs": [archive.stem.removeprefix("lib")],
        }
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before
