"""The paper's family at one number of parameters and one size of recurrent state, and Gated DeltaNet without its parts.

Heads are of one size in all models, ``D``; the state of a layer has ``hidden_size * D`` numbers whatever the rule: a
delta net has ``hidden_size / D`` heads of ``D x D``, Mamba2 twice as many of ``D / 2 x D``. The MLPs take up what a
mixer has fewer of, so that every model has the parameters of the first one, to a few per cent. Attention's window is
beside that: the hybrids' lead is theirs to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn_ops.models import HybridConfig, HybridLM

FAMILY = {"transformer": "A", "mamba2": "M", "deltanet": "D", "gdn": "G", "h1": "GS", "h2": "MGS"}
# Of Gated DeltaNet; what is replaced, given the sizes.
ABLATIONS: dict[str, dict[str, Any]] = {
    "gdn": {},
    "no decay": {"use_decay": False},
    "no delta": {"use_delta": False},
    "no short convolution": {"use_short_conv": False},
    "no output gate": {"use_gate": False},
    "no l2 norm": {"use_qk_l2norm": False},
    "half heads": {"head_scale": 0.5},
    "double heads": {"head_scale": 2.0},
    "negative eigenvalues": {"allow_neg_eigval": True},
}


@dataclass(frozen=True)
class Scale:
    """``intermediate_size`` is that of the model whose parameters the others get, Gated DeltaNet."""

    hidden_size: int
    layers: int
    head: int
    intermediate_size: int
    window: int


SCALES = {
    "toy": Scale(hidden_size=32, layers=3, head=16, intermediate_size=64, window=16),
    "real": Scale(hidden_size=128, layers=3, head=64, intermediate_size=256, window=64),
    "text": Scale(hidden_size=384, layers=6, head=64, intermediate_size=1024, window=256),
}


def count(config: HybridConfig) -> int:
    with torch.device("meta"):
        return HybridLM(config).num_parameters()


def state_size(config: HybridConfig) -> int:
    """Numbers in the recurrent states of all layers."""
    with torch.device("meta"):
        layers = HybridLM(config).init_state(1, "meta")["layers"].values()
    return sum(layer["recurrent"].numel() for layer in layers if "recurrent" in layer)


def configure(name: str, scale: Scale, vocab_size: int, max_position: int, **changes: Any) -> HybridConfig:
    """The configuration of model ``name`` of ``FAMILY`` or ``ABLATIONS``, with as many parameters as ``gdn``."""
    if name not in FAMILY and name not in ABLATIONS:
        raise ValueError(f"model: expected one of {', '.join({**FAMILY, **ABLATIONS})}, got {name!r}")
    changes = {**ABLATIONS.get(name, {}), **changes}
    head = int(scale.head * changes.pop("head_scale", 1.0))
    fields = {
        "vocab_size": vocab_size, "hidden_size": scale.hidden_size, "num_hidden_layers": scale.layers,
        "intermediate_size": scale.intermediate_size, "window": scale.window, "max_position": max_position,
        "num_heads": scale.hidden_size // head, "head_k_dim": head, "head_v_dim": head,
        "mamba_head_dim": scale.head, "mamba_state_size": scale.head // 2,
        "num_attention_heads": scale.hidden_size // scale.head,
    }  # fmt: skip
    pattern = FAMILY.get(name, "G")
    wanted = count(HybridConfig(**fields, pattern="G"))
    here = HybridConfig(**{**fields, **changes}, pattern=pattern)
    width = here.intermediate_size + (wanted - count(here)) / (3 * scale.hidden_size * scale.layers)
    return HybridConfig.from_dict({**here.to_dict(), "intermediate_size": max(8, 8 * round(width / 8))})
