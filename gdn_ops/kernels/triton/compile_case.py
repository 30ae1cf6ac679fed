"""What a kernel looks like to the compiler: enough to build it for a chip that is not there.

A :class:`CompileCase` is one kernel with the types and constants of one launch. Every module of kernels has a function
``ahead_of_time_cases()`` that returns the cases worth building, best taken from its own launchers with
:func:`cases_of_call`, so that what is checked is what would run: the same tiles, warps, stages and specialisations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class CompileCase(NamedTuple):
    """One kernel in one configuration.

    ``signature`` maps every parameter that stays a parameter to its Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``);
    ``constexprs`` maps the others (constants, absent tensors, strides of one) to their values; ``divisible_by_16``
    names the parameters for which Triton would find that, as it does for aligned pointers and round strides.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()


def case_of_launch(
    name: str, kernel, arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> CompileCase:
    """The case that launching ``kernel`` with keyword ``arguments`` stands for, specialised as Triton would."""
    signature, constexprs, divisible = {}, {}, []
    for parameter in kernel.params:
        value = arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(parameter.name)
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(parameter.name)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            raise TypeError(
                f"parameter {parameter.name} of {name}: a tensor, number or None expected, got {type(value)}"
            )
    return CompileCase(name, kernel, signature, constexprs, num_warps, num_stages, tuple(divisible))


def cases_of_call(name: str, function: Callable, *args: Any, **kwargs: Any) -> list[CompileCase]:
    """The cases of every kernel that ``function(*args, **kwargs)`` would launch; nothing is launched.

    Give tensors on the ``meta`` device: shapes, strides and dtypes are all that is read.

    Example::

        >>> from gdn_ops.kernels.triton.causal_conv1d import forward
        >>> x = torch.empty(1, 64, 128, dtype=torch.bfloat16, device="meta")
        >>> weight = torch.empty(128, 4, dtype=torch.bfloat16, device="meta")
        >>> [case.name for case in cases_of_call("conv", forward, x, weight, None, None, None, True, False)]
        ['conv/causal_conv1d_forward_kernel']
    """
    cases: list[CompileCase] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.record

        def record(self, *values, num_warps=4, num_stages=3, **named):
            named.update(zip((parameter.name for parameter in self.kernel.params), values))
            label = f"{name}/{self.kernel.fn.__name__}"
            cases.append(case_of_launch(label, self.kernel, named, num_warps, num_stages))

    package = __name__.rpartition(".")[0]
    patched = [
        module
        for module_name, module in list(sys.modules.items())
        if module_name.startswith(package + ".") and module_name != f"{package}.launch" and hasattr(module, "launch")
    ]
    originals = [module.launch for module in patched]
    try:
        for module in patched:
            module.launch = Recorder
        function(*args, **kwargs)
    finally:
        for module, original in zip(patched, originals):
            module.launch = original
    return cases
