"""Small models for the tests of models and of the compiler."""

from __future__ import annotations

import torch

from gdn_ops.models import HybridConfig, HybridLM

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_heads": 2,
    "head_k_dim": 16, "head_v_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "window": 12,
    "max_position": 90, "mamba_head_dim": 16, "mamba_state_size": 8, "mamba_groups": 2,
}  # fmt: skip
PATTERNS = ("G", "S", "GS", "MS", "DA")


def make(pattern: str = "GS", dtype: torch.dtype = torch.float64, device: str = "cpu", **overrides) -> HybridLM:
    """Two layers with weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig(**{**SIZES, "pattern": pattern, "initializer_range": 0.2, **overrides}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return model.to(device, dtype)


def tokens(*shape: int, seed: int = 1, device: str = "cpu", vocab_size: int = 40) -> torch.Tensor:
    """Random token numbers, int64."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(device)
