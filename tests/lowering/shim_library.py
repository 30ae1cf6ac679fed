"""The C functions that an AOTInductor package calls on CPU, called from Python through ctypes: no model to compile."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from gdn_ops.lowering import inductor
from torch.utils.cpp_extension import library_paths

POINTER = ctypes.c_void_p


class ShimLibrary:
    """The functions of one archive; each takes the operator's own arguments and returns its two results."""

    def __init__(self, folder: Path, sets: list[inductor.InstructionSet]) -> None:
        archive, library = inductor.cpu_archive(sets), folder / f"shims_{sets[-1].name}.so"
        torch_libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        subprocess.run(
            [inductor.compiler(), "-shared", "-fopenmp", "-o", str(library), "-Wl,--whole-archive", str(archive),
             "-Wl,--no-whole-archive", *torch_libraries, "-ltorch_cpu", "-ltorch"],
            check=True,
        )  # fmt: skip
        self._library = ctypes.CDLL(str(library))

    def __call__(self, name: str, *args) -> tuple[torch.Tensor, torch.Tensor]:
        schema = getattr(torch.ops.gdn, name).default._schema
        assert len(args) == len(schema.arguments)
        handles = iter(torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([a for a in args if torch.is_tensor(a)]))
        passed, kept = [], []
        for value, argument in zip(args, schema.arguments):
            kind = str(argument.type)
            if kind in ("Tensor", "Optional[Tensor]"):
                handle = POINTER(_address(next(handles))) if value is not None else None
                kept.append(handle)
                passed.append(handle if kind == "Tensor" else handle and ctypes.byref(handle))
            elif kind == "float":
                passed.append(ctypes.c_double(value))
            else:
                passed.append(ctypes.c_int32(value))
        results = POINTER(), POINTER()
        function = getattr(self._library, f"aoti_torch_cpu_{name}")
        assert function(*passed, *(ctypes.byref(result) for result in results)) == 0
        capsules = [_capsule(result) for result in results]
        return tuple(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules))


def _address(capsule) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = POINTER, [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, None)


def _capsule(pointer: ctypes.c_void_p):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [POINTER, ctypes.c_char_p, POINTER]
    return new(pointer, None, None)
