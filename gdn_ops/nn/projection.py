"""Linear layers that meet the same input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

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
    """Whether a call of ``layer`` is the product by ``layer.weight`` and no more: an ``nn.Linear`` without a bias,
    hooks or a ``forward`` of its own, whose weight is no tensor of another kind, as quantisation brings."""
    if type(layer) is not nn.Linear or layer.bias is not None or type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    # The first question is answered for a forward that is no method, the second is one that a compiler asks again.
    plain = "forward" not in layer.__dict__ and layer.forward.__func__ is nn.Linear.forward
    return plain and not any(hooks) and not _has_any_global_hook()


def weight_of(layer: nn.Module) -> Tensor | None:
    """The weight of ``layer``, if it is one that says which dtype and device the layer takes. A layer in the place of
    a plain one may have none, packed numbers or a method of that name, or compute it anew at each look."""
    weight = layer._parameters.get("weight")
    return weight if weight is not None and weight.is_floating_point() else None


def weight_or_any(layer: nn.Module, module: nn.Module) -> Tensor:
    """:func:`weight_of` ``layer``, or else the first floating parameter of ``module``, which it is part of; if there is
    none, an empty tensor."""
    weight = weight_of(layer)
    if weight is not None:
        return weight
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
