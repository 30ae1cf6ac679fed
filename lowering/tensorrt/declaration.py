"""What each plugin kernel takes, in which order, on which grid: the one place that says so.

The registration with TensorRT, the launches from torch, and the test that starts the compiled kernels through the CUDA
driver are all made from these declarations, so that the test proves what the plugin declares. Nothing here needs
TensorRT; a kernel is imported when it is asked for.

Sizes have the names of the operators' layouts. ``B`` and ``T`` may be dynamic: expressions of sizes are written with
``+``, ``*`` and the ``cdiv`` that they are given (with a size on the left), and so hold for integers and for TensorRT's
symbolic expressions alike.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE, KERNELS = "gdn", "gdn_ops.lowering.tensorrt.kernels"
ACTIVATIONS = ("float32", "float16", "bfloat16")
CHUNK = 32


def next_power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


@dataclass(frozen=True)
class Argument:
    """A contiguous tensor. ``dtype`` is a dtype, or a letter that stands for one of ACTIVATIONS."""

    name: str
    shape: tuple[str, ...]
    dtype: str

    @property
    def free(self) -> bool:
        """Whether its dtype is the caller's choice."""
        return len(self.dtype) == 1


@dataclass(frozen=True)
class PluginKernel:
    """One plugin, which is one kernel: ``kernel(*inputs, *extras, *outputs, **constants)``.

    Args:
        name: of the plugin in the namespace NAMESPACE.
        kernel: the name of the Triton kernel in KERNELS.
        inputs, outputs: in the kernel's order; an output's letter is bound by an input.
        attributes: of the plugin, by name, with their types.
        grid: number of programs, from sizes by name, the constants and a ``cdiv``.
        constants: the kernel's constants, from the static sizes, dtypes by letter and attributes.
        launch: ``num_warps`` and ``num_stages``, from the same.
        extras: int32 parameters between inputs and outputs: dynamic sizes.
        aliases: outputs that are an input's buffer.
    """

    name: str
    kernel: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    attributes: Mapping[str, type]
    grid: Callable[[Mapping[str, Any], Mapping[str, Any], Callable], Any]
    constants: Callable[[Mapping[str, int], Mapping[str, str], Mapping[str, Any]], dict[str, Any]]
    launch: Callable[[Mapping[str, int], Mapping[str, str]], dict[str, int]]
    extras: tuple[str, ...] = ("B", "T")
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    def triton(self) -> Any:
        """The Triton kernel."""
        return getattr(importlib.import_module(KERNELS), self.kernel)

    def bind_sizes(self, shapes: list[Any]) -> dict[str, Any]:
        """Sizes by name from the inputs' shapes; ValueError if two integers that must agree do not."""
        sizes: dict[str, Any] = {}
        for argument, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(argument.shape):
                raise ValueError(f"{argument.name}: expected shape {argument.shape}, got {len(shape)} dimensions")
            for name, size in zip(argument.shape, shape):
                known = sizes.setdefault(name, size)
                if isinstance(size, int) and isinstance(known, int) and size != known:
                    raise ValueError(f"{argument.name}: expected {name} = {known} as before, got {size}")
        return sizes

    def bind_dtypes(self, dtypes: list[str]) -> dict[str, str]:
        """Dtypes by letter; TypeError for a dtype that the kernel does not take."""
        bound: dict[str, str] = {}
        for argument, dtype in zip(self.inputs, dtypes, strict=True):
            expected = (argument.dtype,)
            if argument.free:
                expected = (bound[argument.dtype],) if argument.dtype in bound else ACTIVATIONS
            if dtype not in expected:
                raise TypeError(f"{argument.name}: expected {' or '.join(expected)}, got {dtype}")
            if argument.free:
                bound[argument.dtype] = dtype
        return bound

    def dtype_of(self, argument: Argument, dtypes: Mapping[str, str]) -> str:
        return dtypes[argument.dtype] if argument.free else argument.dtype

    def parameters(self, dtypes: Mapping[str, str]) -> list[tuple[str, str]]:
        """Names of the kernel's parameters in order, with ``"*dtype"`` for pointers and ``"int32"``."""
        tensors = [[(x.name, f"*{self.dtype_of(x, dtypes)}") for x in group] for group in (self.inputs, self.outputs)]
        return [*tensors[0], *((name, "int32") for name in self.extras), *tensors[1]]


_Q, _K = (Argument(name, ("B", "T", "H", "K"), "q") for name in "qk")
_V, _O = (Argument(name, ("B", "T", "HV", "V"), "q") for name in "vo")
_G, _BETA = (Argument(name, ("B", "T", "HV"), name[0]) for name in ("g", "beta"))
_BEFORE, _AFTER = (Argument(name, ("B", "HV", "K", "V"), "float32") for name in ("initial_state", "final_state"))
_RULE = {"inputs": (_Q, _K, _V, _G, _BETA, _BEFORE), "outputs": (_O, _AFTER), "attributes": {"scale": float}}


def _rule_grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], cdiv_: Callable) -> Any:
    return sizes["B"] * (constants["HV"] * cdiv(constants["V"], constants["BV"]))


def _heads(sizes: Mapping[str, int]) -> dict[str, int]:
    if sizes["HV"] % sizes["H"]:
        raise ValueError(f"v: expected a multiple of the {sizes['H']} heads of q, got {sizes['HV']}")
    return {name: sizes[name] for name in ("H", "HV", "K", "V")}


def _launch_table(module: str) -> Any:
    """The package's module of kernels, for the tiles and warps that its own launchers choose."""
    return importlib.import_module(f"gdn_ops.kernels.triton.{module}")


def _tiles(configuration: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in configuration.items() if name != "num_warps"}


def _recurrent_configuration(sizes: Mapping[str, int]) -> dict[str, int]:
    choose = _launch_table("recurrent").recurrent_configuration
    return choose(sizes["K"], sizes["V"], torch.float32, one_token=True)


def _recurrent_constants(sizes: Mapping[str, int], dtypes: Mapping[str, str], attributes: Mapping[str, Any]) -> dict:
    return {**_heads(sizes), **_tiles(_recurrent_configuration(sizes)), "SCALE": float(attributes["scale"])}


def _recurrent_launch(sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> dict[str, int]:
    return {"num_warps": _recurrent_configuration(sizes)["num_warps"], "num_stages": 3}


def _is_large(sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> bool:
    """fp32 keys wider than 128: 32 tokens in two stages would take 88 KB of shared memory; 16 in one take 34."""
    return dtypes["q"] == "float32" and sizes["K"] > 128


def _chunk_constants(sizes: Mapping[str, int], dtypes: Mapping[str, str], attributes: Mapping[str, Any]) -> dict:
    wide = dtypes["q"] == "float32"
    BK = max(16, next_power_of_2(sizes["K"]))
    BV = max(16, min(32 if BK <= 128 and not wide else 16, next_power_of_2(sizes["V"])))
    C = CHUNK // 2 if _is_large(sizes, dtypes) else CHUNK
    return {
        **_heads(sizes), "BK": BK, "BV": BV, "C": C, "LEVELS": C.bit_length() - 1,
        # fp32 in means fp32 accuracy; with 16-bit operands it is the inverse's.
        "PRECISION": "ieee" if wide else "tf32x3", "SCALE": float(attributes["scale"]),
    }  # fmt: skip


def _chunk_launch(sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> dict[str, int]:
    return {"num_warps": 4 if dtypes["q"] == "float32" else 2, "num_stages": 1 if _is_large(sizes, dtypes) else 2}


def _conv_grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], cdiv_: Callable) -> Any:
    """A program a tile of outputs, and one a (row, tile of channels) for the final state."""
    rows = sizes["B"] * (cdiv_(sizes["T"], constants["BT"]) + 1)
    return rows * cdiv(constants["D"], constants["BD"])


def _conv_configuration(sizes: Mapping[str, int]) -> dict[str, int]:
    return _launch_table("causal_conv1d").conv_forward_configuration(sizes["D"])


def _conv_constants(sizes: Mapping[str, int], dtypes: Mapping[str, str], attributes: Mapping[str, Any]) -> dict:
    if sizes["S"] != sizes["W"] - 1:
        raise ValueError(f"initial_state: expected {sizes['W'] - 1} inputs a channel, got {sizes['S']}")
    silu = bool(attributes["silu"])
    return {"D": sizes["D"], "W": sizes["W"], "SILU": silu, **_tiles(_conv_configuration(sizes))}


def _conv_launch(sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> dict[str, int]:
    return {"num_warps": _conv_configuration(sizes)["num_warps"], "num_stages": 3}


RECURRENT = PluginKernel(
    "recurrent_gated_delta_rule", "recurrent_plugin_kernel", grid=_rule_grid, constants=_recurrent_constants,
    launch=_recurrent_launch, **_RULE,
)  # fmt: skip
RECURRENT_IN_PLACE = PluginKernel(
    "recurrent_gated_delta_rule_in_place", "recurrent_plugin_kernel", grid=_rule_grid, constants=_recurrent_constants,
    launch=_recurrent_launch, aliases={"final_state": "initial_state"}, **_RULE,
)  # fmt: skip
CHUNK_RULE = PluginKernel(
    "chunk_gated_delta_rule", "chunk_plugin_kernel", grid=_rule_grid, constants=_chunk_constants,
    launch=_chunk_launch, **_RULE,
)  # fmt: skip
CONV = PluginKernel(
    "causal_conv1d", "conv_plugin_kernel",
    inputs=(
        Argument("x", ("B", "T", "D"), "x"), Argument("weight", ("D", "W"), "w"), Argument("bias", ("D",), "b"),
        Argument("initial_state", ("B", "D", "S"), "s"),
    ),
    outputs=(Argument("y", ("B", "T", "D"), "x"), Argument("final_state", ("B", "D", "S"), "x")),
    attributes={"silu": int}, grid=_conv_grid, constants=_conv_constants, launch=_conv_launch,
)  # fmt: skip
PLUGINS = {kernel.name: kernel for kernel in (RECURRENT, RECURRENT_IN_PLACE, CHUNK_RULE, CONV)}
