"""A declared kernel as PTX with exactly the declared parameters, for a chip that need not be there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gdn_ops.lowering.tensorrt.declaration import PluginKernel

_TRITON = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}
_PTX = {"int32": ".u32"}
# Bytes that a block may have unless the launch asks for more, which TensorRT is not known to do.
SHARED_MEMORY = 48 * 1024


class Compiled(NamedTuple):
    """``threads`` a block and bytes of ``shared_memory`` a block are what a launch needs beside the grid."""

    name: str
    ptx: str
    threads: int
    shared_memory: int
    constants: dict[str, Any]


def compile_kernel(
    kernel: PluginKernel, sizes: Mapping[str, int], dtypes: Mapping[str, str], attributes: Mapping[str, Any], arch: int
) -> Compiled:
    """Compiles for compute capability ``arch`` (90 for 9.0). ``sizes`` are the static ones, ``dtypes`` by letter.

    Raises RuntimeError if the kernel would have other parameters than it declares, or take more than SHARED_MEMORY.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants = kernel.triton(), kernel.constants(sizes, dtypes, attributes)
    names = [parameter.name for parameter in function.params]
    declared = kernel.parameters(dtypes)
    if names != [name for name, _ in declared] + list(constants):
        raise RuntimeError(f"{kernel.name}: expected parameters {[x for x, _ in declared]} and constants, got {names}")
    signature = dict.fromkeys(constants, "constexpr")
    for name, kind in declared:
        signature[name] = f"*{_TRITON[kind[1:]]}" if kind.startswith("*") else _TRITON[kind]
    # TensorRT's own tensors lie on 256-byte boundaries, and it asks the same of those that it is given.
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(declared) if kind.startswith("*")}
    source = ASTSource(function, {name: signature[name] for name in names}, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernel.launch(sizes, dtypes))
    if built.metadata.shared > SHARED_MEMORY:
        raise RuntimeError(
            f"{kernel.name}: expected {SHARED_MEMORY} bytes of shared memory at most, got {built.metadata.shared}"
        )
    ptx = exact_parameters(built.asm["ptx"], built.metadata.name, declared)
    return Compiled(built.metadata.name, ptx, 32 * built.metadata.num_warps, built.metadata.shared, constants)


def entry_parameters(ptx: str, name: str) -> list[tuple[str, str]]:
    """Names and types (``.u64``, ``.u32``) of the parameters of entry ``name``."""
    text = _header(ptx, name)[1]
    return [(match[2], match[1]) for match in re.finditer(r"\.param\s+(\.[usbf]\d+)[^,]*?(\w+)\s*(?:,|$)", text)]


def _header(ptx: str, name: str) -> re.Match:
    found = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if found is None:
        raise RuntimeError(f"{name}: expected an entry of that name in the PTX")
    return found


def exact_parameters(ptx: str, name: str, declared: list[tuple[str, str]]) -> str:
    """``ptx`` without the scratch pointers that Triton puts behind a kernel's own parameters.

    A plugin has no slot for them: the launch would read past the end of its list of arguments. They may go as long as
    nothing in the kernel reads them.
    """
    found = _header(ptx, name)
    parameters = entry_parameters(ptx, name)
    wanted = [_PTX.get(kind, ".u64") for _, kind in declared]
    if [kind for _, kind in parameters[: len(wanted)]] != wanted:
        raise RuntimeError(f"{name}: expected parameters {wanted}, got {[kind for _, kind in parameters]}")
    body = ptx[found.end() :]
    for extra, _ in parameters[len(wanted) :]:
        if re.search(rf"\b{extra}\b", body):
            raise RuntimeError(f"{name}: expected a kernel without scratch memory, but it reads {extra}")
    lines = [part.strip() for part in found[1].split(",")][: len(wanted)]
    return ptx[: found.start(1)] + "\n\t" + ",\n\t".join(lines) + "\n" + ptx[found.end(1) :]
