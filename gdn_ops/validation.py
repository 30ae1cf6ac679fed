"""Checks at the door, once, for every public function. Errors name the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.kernels.cpu.chunks import check_bounds

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _tensor(x: object, name: str, dims: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of {x.layout}")
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    _expect(x.dim() == dims, name, f"{dims} dimensions", f"shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")


def _shape(x: Tensor, name: str, shape: tuple) -> None:
    same = x.dim() == len(shape) and all(a == b for a, b in zip(x.shape, shape))
    _expect(same, name, f"shape {tuple(shape)}", tuple(x.shape))


def _device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    _expect(x.device == other.device, name, f"device {other.device} (as {other_name})", x.device)


def has_values(x: Tensor) -> bool:
    """Whether numbers can be read from ``x`` at no cost: not on a GPU, where that would wait for the device, and not
    while something traces or transforms the call (``torch.compile``, ``FakeTensorMode``, ``torch.func``)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for ``x``'s device; the meta device has none, and torch an error for the question."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def check_cu_seqlens(cu_seqlens: Tensor, like: Tensor, name: str) -> None:
    _tensor(cu_seqlens, "cu_seqlens", 1, (torch.int32, torch.int64))
    _device(cu_seqlens, "cu_seqlens", like, name)
    _expect(like.shape[0] == 1, name, "batch size 1 with cu_seqlens", tuple(like.shape))
    _expect(cu_seqlens.shape[0] >= 1, "cu_seqlens", "at least one element", tuple(cu_seqlens.shape))
    if has_values(cu_seqlens):
        check_bounds(cu_seqlens, like.shape[1])


def gated_delta_rule(q, k, v, g, beta, cu_seqlens) -> None:
    """Shapes, dtypes and devices of the inputs that all forms of the rule share; ``g`` may be None."""
    gated_linear_attention(q, k, v, g, cu_seqlens)
    _gate(beta, "beta", v)


def _gate(x, name: str, v: Tensor) -> None:
    _tensor(x, name, 3)
    _shape(x, name, tuple(v.shape[:3]))
    _device(x, name, v, "q")


def gated_linear_attention(q, k, v, g, cu_seqlens) -> None:
    """The same for the rule without ``beta``; ``g`` may be None."""
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        _tensor(x, name, 4)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} (as q), got {x.dtype}")
        _device(x, name, q, "q")
    B, T, H, K = q.shape
    _shape(k, "k", (B, T, H, K))
    _expect(H >= 1 and K >= 1, "q", "at least one head and one feature", tuple(q.shape))
    _shape(v, "v", (B, T, v.shape[2], v.shape[3]))
    HV, V = v.shape[2:]
    _expect(HV >= 1 and HV % H == 0, "v", f"a number of heads divisible by q's {H}", HV)
    _expect(V >= 1, "v", "at least one feature", tuple(v.shape))
    if g is not None:
        _gate(g, "g", v)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q, "q")


def state(x: Tensor, name: str, shape: tuple, like: Tensor, like_name: str) -> None:
    """A state of exactly ``shape``, on the inputs' device."""
    _tensor(x, name, len(shape))
    _shape(x, name, shape)
    _device(x, name, like, like_name)


def pool(x: Tensor, name: str, slot: tuple, like: Tensor, like_name: str) -> None:
    """Any number of states of shape ``slot``, on the inputs' device; written, so no part of an autograd graph."""
    _tensor(x, name, len(slot) + 1)
    own = all(stride or size < 2 for size, stride in zip(x.shape, x.stride()))
    _expect(own, name, "a tensor with memory for each number, for it is written in place", f"strides {x.stride()}")
    asks = torch.is_grad_enabled() and x.requires_grad
    _expect(not asks, name, "a tensor that does not require grad, for it is written in place", "one that does")
    state(x, name, (x.shape[0], *slot), like, like_name)


def state_indices(x: Tensor, name: str, shape: tuple, like: Tensor, like_name: str) -> None:
    """Slots of a pool, one a sequence or one a token."""
    _tensor(x, name, len(shape), (torch.int32, torch.int64))
    _shape(x, name, shape)
    _device(x, name, like, like_name)


def causal_conv1d(x, weight, bias, activation, cu_seqlens) -> None:
    """Inputs of the short convolution."""
    _tensor(x, "x", 3)
    _tensor(weight, "weight", 2)
    D, W = weight.shape
    _shape(x, "x", (x.shape[0], x.shape[1], D))
    _expect(2 <= W <= 4, "weight", "a width (dim 1) of 2 to 4", W)
    _device(weight, "weight", x, "x")
    if bias is not None:
        _tensor(bias, "bias", 1)
        _shape(bias, "bias", (D,))
        _device(bias, "bias", x, "x")
    _expect(activation in (None, "silu", "swish"), "activation", "None, 'silu' or 'swish'", repr(activation))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, "x")
