"""How every operator of this package reaches the dispatcher: one function, so that all have the same parts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from gdn_ops.ops.flops import register_flops

LIBRARY = torch.library.Library("gdn", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable,
    triton: str,
    fake: Callable,
    whole: str | None = None,
    backward: tuple[Callable, Callable] | None = None,
    autocast: Sequence[int] = (),
    flops: Callable | None = None,
) -> torch._ops.OpOverload:
    """Defines ``gdn::<schema>`` and returns its overload.

    ``cpu`` is plain torch and serves fp64 on CUDA as well. ``triton`` is ``"module:function"`` in
    ``gdn_ops.kernels.triton``, imported at the first CUDA call. While ``torch.compile`` or AOTInductor traces CUDA
    tensors, the call is replaced by that function's kernels, so that Inductor sees them; ``torch.export`` keeps the
    operator as one node. So does ``torch.compile`` where ``whole``, named like ``triton`` and called with the same
    arguments, says that there are kernels that no graph can hold and that are worth it.
    ``backward`` is ``(backward, setup_context)``; without it, a backward pass through the operator raises
    ``NotImplementedError``. ``autocast`` gives the positions cast to the autocast dtype: gates
    and states stay as they are, which is why torch's own all-tensors rule is not used. What an operator does inside is
    never cast, in backward passes neither.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    run, trace = _cuda_rules(triton, cpu, whole)
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"gdn::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.gdn, name).default
    torch.library.register_torch_dispatch(f"gdn::{name}", FunctionalTensorMode, trace, lib=LIBRARY)
    LIBRARY.impl(name, _autograd_rule(op, *(backward or (None, None))), "Autograd", with_keyset=True)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, _autocast_rule(op, device, autocast), key)
    if flops is not None:
        register_flops(getattr(torch.ops.gdn, name), flops)
    torch.library.register_vmap(f"gdn::{name}", _vmap_by_loop(op), lib=LIBRARY)
    return op


def _cuda_rules(triton: str, plain: Callable, whole: str | None) -> tuple[Callable, Callable]:
    """How CUDA tensors are served when the call runs, and when a compiler traces it."""

    def found(name: str) -> Callable:
        module, function = name.split(":")
        return getattr(importlib.import_module(f"gdn_ops.kernels.triton.{module}"), function)

    def implementation(args) -> Callable:
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args[:3]):
            return plain
        try:
            return found(triton)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ModuleNotFoundError("CUDA tensors need triton: pip install triton", name="triton") from error

    def run(*args):
        with torch.cuda.device(args[0].device):
            return implementation(args)(*args)

    def stays_whole(mode, args, kwargs) -> bool:
        if _is_exporting(mode) or args[0].device.type != "cuda" or implementation(args) is plain:
            return True
        return whole is not None and not _is_packaging() and found(whole)(*args, **kwargs)

    def trace(mode, op, types, args, kwargs):
        if stays_whole(mode, args, kwargs):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        from gdn_ops.kernels.triton.launch import traced

        with mode, traced():
            return implementation(args)(*args, **kwargs)

    return run, trace


def _is_exporting(mode: FunctionalTensorMode) -> bool:
    """Whether the graph being traced is a program, not the code that AOTInductor makes of one (an "export" as well)."""
    return mode.export and not _is_packaging()


def _is_packaging() -> bool:
    from torch._inductor.virtualized import V

    return V.aot_compilation


def _autograd_rule(op: torch._ops.OpOverload, backward: Callable | None, setup_context: Callable | None) -> Callable:
    """An autograd rule that, unlike ``torch.library.register_autograd``'s, works under ``torch.func`` transforms too.

    The dispatcher has already separated the levels of transforms when it comes here, so the function is of one level;
    an ``autograd.Function`` would start over from the outermost.
    """

    def compute(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Rule(_SingleLevelFunction):
        _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

        @staticmethod
        def forward(ctx, keyset, *args):
            with torch.enable_grad():  # functions run without, but levels further out may want theirs
                result = compute(keyset, args)
            if setup_context is not None:
                setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx, *grads):
            if backward is None:
                raise NotImplementedError(
                    f"{op.name()} has no gradient: gdn_ops.reference is differentiable to any order"
                )
            return (None, *backward(ctx, *grads))

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(f"{op.name()} has no forward-mode gradient: gdn_ops.reference has")

    def rule(keyset, *args):
        graded = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        if graded or (forward_ad._current_level >= 0 and any(map(_has_tangent, args))):
            with enable_single_level_autograd_function():
                return Rule.apply(keyset, *args)
        return compute(keyset, args)

    Rule.__name__ = Rule.__qualname__ = f"{op._opname}_autograd"
    return rule


def _has_tangent(x: object) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _autocast_rule(op: torch._ops.OpOverload, device: str, positions: Sequence[int]) -> Callable:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)

    def rule(*args):
        dtype = torch.get_autocast_dtype(device)
        args = list(args)
        for i in positions:
            if args[i] is not None and args[i].is_floating_point() and args[i].dtype != torch.float64:
                args[i] = args[i].to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*args)

    return rule


def _vmap_by_loop(op: torch._ops.OpOverload) -> Callable:
    """A vmap rule for any of the operators: one call a slice, results stacked on dim 0. Without a slice, one call on
    zeros says what the results are like."""
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def rule(info, in_dims, *args):
        for i in written:
            if in_dims[i] is None:
                name = op._schema.arguments[i].name
                raise ValueError(
                    f"{name}: expected a batch dimension, because vmap would write it once a slice; got None"
                )

        def pick(i):
            return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims)]

        def stack(slices):
            return torch.stack(slices)[: info.batch_size]

        if info.batch_size == 0:
            args = [
                a if d is None else a.new_zeros([1 if i == d else s for i, s in enumerate(a.shape)])
                for a, d in zip(args, in_dims)
            ]
        results = [op(*pick(i)) for i in range(max(1, info.batch_size))]
        if isinstance(results[0], torch.Tensor):
            return stack(results), 0
        return tuple(stack(column) for column in zip(*results)), (0,) * len(results[0])

    return rule


def fresh(like: torch.Tensor, *shape, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor on ``like``'s device."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
