"""Linear layers that meet the same input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn_ops.nn.tracing import is_exporting


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What each of the ``layers``, which have no bias, makes of ``x``.

    Where a graph for training is compiled they are one product, with rows of zeros under their weights up to a
    multiple of 8; everywhere else, and where a layer was replaced or has hooks, each is called. On CUDA products of
    other widths are slow in both directions. And Inductor may widen them itself: AOTAutograd then takes the strides of
    what it saves of them for those of the first T (pytorch/pytorch#191885), and another T is an error in the backward.
    """
    widths = [layer.out_features for layer in layers]
    missing = -sum(widths) % 8
    training = torch.compiler.is_compiling() and not is_exporting() and torch.is_grad_enabled()
    if not training or (len(layers) == 1 and not missing) or not all(map(_is_plain, layers)):
        return tuple(layer(x) for layer in layers)
    weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
    # Split with what is missing, so that the gradient is one concatenation.
    return F.linear(x, F.pad(weight, (0, 0, 0, missing))).split([*widths, missing], dim=-1)[:-1]


def _is_plain(layer: nn.Module) -> bool:
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is nn.Linear and not any(hooks)
