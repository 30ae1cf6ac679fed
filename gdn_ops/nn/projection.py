"""Linear layers that meet the same input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn_ops.nn.tracing import is_exporting


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What each of the ``layers`` makes of ``x``.

    Where a graph for training is compiled they are one product, with rows of zeros under their weights up to a
    multiple of 8; everywhere else, and where one is not :func:`only_weight`, each is called. On CUDA products of
    other widths are slow in both directions. And Inductor may widen them itself: AOTAutograd then takes the strides of
    what it saves of them for those of the first T (pytorch/pytorch#191885), and another T is an error in the backward.
    """
    training = torch.compiler.is_compiling() and not is_exporting() and torch.is_grad_enabled()
    if not training or not all(map(only_weight, layers)):
        return tuple(layer(x) for layer in layers)
    widths = [layer.out_features for layer in layers]
    missing = -sum(widths) % 8
    if len(layers) == 1 and not missing:
        return (layers[0](x),)
    weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
    # Split with what is missing, so that the gradient is one concatenation.
    return F.linear(x, F.pad(weight, (0, 0, 0, missing))).split([*widths, missing], dim=-1)[:-1]


def only_weight(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` is ``F.linear(x, layer.weight)`` and no more: an ``nn.Linear`` without a bias, hooks
    or a ``forward`` of its own, not what adapters or quantisation put in its place."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    plain = type(layer) is nn.Linear and "forward" not in layer.__dict__
    return plain and layer.bias is None and not any(hooks)


def weight_of(layer: nn.Module) -> Tensor | None:
    """What ``layer`` multiplies by, if that says which dtype and device it takes: a layer in the place of an
    ``nn.Linear`` may have none, packed numbers, or a method of that name."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None
