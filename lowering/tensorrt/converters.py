"""Converters for torch-tensorrt (2.11 and later): ``gdn::`` nodes become the plugins.

``torch_tensorrt.dynamo.compile`` and ``torch.compile(backend="tensorrt")`` look nodes up in one registry.
:func:`register` puts the three operators there, with what the plugins cannot carry left to torch: packed sequences, a
state that is not fp32, fp64. An absent state or bias becomes zeros. torch-tensorrt's own generated plugins are not
used: they give every output the first input's dtype, refuse optional tensors, and drop keyword arguments.

Example::

    >>> from gdn_ops.lowering.tensorrt import converters
    >>> converters.register()  # doctest: +SKIP
    >>> compiled = torch.compile(model, backend="tensorrt")  # doctest: +SKIP
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from gdn_ops.lowering.tensorrt import plugins
from gdn_ops.lowering.tensorrt.declaration import ACTIVATIONS

OLDEST = (2, 11)
_NARROW = tuple(getattr(torch, name) for name in ACTIVATIONS)


@functools.cache
def register() -> None:
    """Registers the converters once a process.

    Raises:
        ModuleNotFoundError: torch-tensorrt is not installed.
        ValueError: it is older than 2.11.
    """
    try:
        import torch_tensorrt
        from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter
    except ModuleNotFoundError as error:
        message = f"converters need {error.name}: pip install 'gdn-ops[tensorrt]' where NVIDIA's index is configured"
        raise ModuleNotFoundError(message, name=error.name) from error
    version = tuple(int(part) for part in torch_tensorrt.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        raise ValueError(f"torch_tensorrt: expected 2.11 or later, got {torch_tensorrt.__version__}")
    rule = dict(priority=ConverterPriority.HIGH, supports_dynamic_shapes=True)
    for op in (torch.ops.gdn.chunk_gated_delta_rule.default, torch.ops.gdn.recurrent_gated_delta_rule.default):
        dynamo_tensorrt_converter(op, capability_validator=takes_rule, **rule)(convert_rule)
    conv = torch.ops.gdn.causal_conv1d.default
    dynamo_tensorrt_converter(conv, capability_validator=takes_conv, **rule)(convert_conv)


def _tensor(argument: Any) -> torch.Tensor | None:
    """The fake tensor of a node's argument."""
    return argument.meta.get("val") if isinstance(argument, torch.fx.Node) else None


def _fixed(x: torch.Tensor, *axes: int) -> bool:
    return all(isinstance(x.shape[axis], int) for axis in axes)


def _state_is_used(node: torch.fx.Node) -> bool:
    return any(user.users for user in node.users if len(user.args) == 2 and user.args[1] == 1)


def takes_rule(node: torch.fx.Node, settings: Any = None) -> bool:
    """Whether the plugins can carry a node of the rule."""
    q, k, v, g, beta, state, cu_seqlens, _, output_final_state = node.args
    tensors = [_tensor(x) for x in (q, k, v, g, beta)]
    if cu_seqlens is not None or any(x is None or x.dtype not in _NARROW for x in tensors):
        return False
    if not output_final_state and _state_is_used(node):
        return False  # it has no rows then, and the plugin's has
    wide = [tensors[0], tensors[2]]
    if not all(_fixed(x, 2, 3) for x in wide):
        return False
    if state is None:
        return _fixed(tensors[0], 0)  # zeros are a constant of the network
    return _tensor(state) is not None and _tensor(state).dtype == torch.float32


def takes_conv(node: torch.fx.Node, settings: Any = None) -> bool:
    """Whether the plugin can carry a node of the convolution."""
    x, weight, bias, state, cu_seqlens, _, output_final_state = node.args
    tensors = [_tensor(a) for a in (x, weight, bias, state) if a is not None]
    if cu_seqlens is not None or any(a is None or a.dtype not in _NARROW for a in tensors):
        return False
    if not output_final_state and _state_is_used(node):
        return False
    return _fixed(tensors[0], 2) and (state is not None or _fixed(tensors[0], 0))


def _given(ctx: Any, value: Any, name: str) -> Any:
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    return get_trt_tensor(ctx, value, name)


def _dtype_name(tensor: Any) -> str:
    import tensorrt

    return plugins.dtype_names(tensorrt)[tensor.dtype]


def convert_rule(ctx: Any, target: Any, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[Any, ...]:
    """The recurrent kernel for one token, the chunkwise one otherwise; returns ``(o, final_state)``."""
    *tensors, state, _, scale, _ = args
    inputs = [_given(ctx, x, f"{name}_{i}") for i, x in enumerate(tensors)]
    (B, T, _, K), (HV, V) = tuple(inputs[0].shape), tuple(inputs[2].shape)[2:]
    state = torch.zeros(B, HV, K, V) if state is None else state
    plugin = "recurrent_gated_delta_rule" if T == 1 else "chunk_gated_delta_rule"
    inputs.append(_given(ctx, state, f"{name}_state"))
    return tuple(plugins.add_plugin(ctx.net, plugin, inputs, {"scale": scale}))


def convert_conv(ctx: Any, target: Any, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[Any, ...]:
    """Returns ``(y, final_state)``."""
    x, weight, bias, state, _, silu, _ = args
    x, weight = _given(ctx, x, f"{name}_x"), _given(ctx, weight, f"{name}_weight")
    (B, _, D), W = tuple(x.shape), tuple(weight.shape)[1]
    dtype = getattr(torch, _dtype_name(x))
    bias = torch.zeros(D, dtype=dtype) if bias is None else bias
    state = torch.zeros(B, D, W - 1, dtype=dtype) if state is None else state
    inputs = [x, weight, _given(ctx, bias, f"{name}_bias"), _given(ctx, state, f"{name}_state")]
    return tuple(plugins.add_plugin(ctx.net, "causal_conv1d", inputs, {"silu": silu}))
