"""TensorRT's own Python sources of ``tensorrt.plugin`` over a stand-in for its native half.

The package ``tensorrt_cu13_bindings`` has both, but its native half needs the libraries, which NVIDIA gives. The
plugin module is Python: it checks signatures, asks descriptors for shapes and dtypes, and collects a kernel, its grid
and its arguments. Here that code runs unchanged; symbolic sizes are plain integers in a box.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path


def plugin_sources() -> Path | None:
    """The folder of ``tensorrt.plugin``, if the bindings are installed."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "plugin"
    return folder if folder is not None and folder.is_dir() else None


class DataType(Enum):
    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT32 = "int32"
    INT64 = "int64"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


class DimensionOperation(Enum):
    SUM = 0
    PROD = 1
    MAX = 2
    MIN = 3
    SUB = 4
    EQUAL = 5
    LESS = 6
    FLOOR_DIV = 7
    CEIL_DIV = 8


class IDimensionExpr:
    """``constant`` is whether the builder knows the value; the test always does."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant, "asked for the value of a size that the builder does not know"
        return self.value


class IExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value, True)

    def operation(self, op: DimensionOperation, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        calls = {
            DimensionOperation.SUM: lambda x, y: x + y, DimensionOperation.PROD: lambda x, y: x * y,
            DimensionOperation.CEIL_DIV: lambda x, y: -(-x // y), DimensionOperation.FLOOR_DIV: lambda x, y: x // y,
            DimensionOperation.SUB: lambda x, y: x - y,
        }  # fmt: skip
        return IDimensionExpr(calls[op](a.value, b.value), a.constant and b.constant)


class _Named:
    """A base class of which nothing but the name matters."""

    def __init__(self, *args, **kwargs) -> None:
        pass


class _Logger(_Named):
    WARNING = 1

    def log(self, severity: int, message: str) -> None:
        pass


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], object] = {}

    def register_creator(self, creator, namespace: str = "") -> bool:
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = ""):
        return self.creators[namespace, name]


class DimsExprs(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Dims(tuple):
    MAX_DIMS = 8


class _Tensorrt(types.ModuleType):
    """Names that this file does not give are empty classes."""

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "plugin":
            raise AttributeError(name)
        made = type(name, (_Named,), {})
        setattr(self, name, made)
        return made


def _native() -> types.ModuleType:
    trt = _Tensorrt("tensorrt")
    trt.DataType, trt.DimensionOperation, trt.IDimensionExpr = DataType, DimensionOperation, IDimensionExpr
    trt.DimsExprs, trt.Dims, trt.Logger = DimsExprs, Dims, _Logger
    trt.float32, trt.float16, trt.bfloat16 = DataType.FLOAT, DataType.HALF, DataType.BF16
    trt.int32, trt.int64, trt.int8 = DataType.INT32, DataType.INT64, DataType.INT8
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    kinds = ("UNKNOWN", "CHAR", "INT8", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT32", "FLOAT64")
    trt.PluginFieldType = Enum("PluginFieldType", kinds)
    trt.PluginArgType, trt.PluginArgDataType = Enum("PluginArgType", "INT"), Enum("A", "INT8 INT16 INT32")
    trt.QuickPluginCreationRequest = Enum("Q", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT")
    trt.PluginField = lambda name, data, kind=None: types.SimpleNamespace(name=name, data=data, type=kind)
    trt.PluginFieldCollection = list
    trt.TensorRTPhase = Enum("TensorRTPhase", "BUILD RUNTIME")
    trt.TensorFormat = Enum("TensorFormat", "LINEAR")
    return trt


@contextlib.contextmanager
def installed() -> Iterator[types.ModuleType]:
    """Inside, ``import tensorrt.plugin`` gives TensorRT's own sources over the stand-in; yields ``tensorrt``."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    trt, folder = _native(), plugin_sources()
    trt.__path__ = [str(folder.parent)]
    trt.__version__ = "stand-in"
    sys.modules["tensorrt"] = trt
    try:
        yield trt
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)
