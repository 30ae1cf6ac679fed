"""Modules as a user would write them on the public functions; what the export tests export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

import gdn_ops

HEADS, WIDTH = 2, 16


class Mixer(nn.Module):
    """Short convolution, gated delta rule with a state, a projection."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        channels = 3 * HEADS * WIDTH
        self.weight = nn.Parameter((torch.randn(channels, 4, generator=generator) * 0.5).to(dtype))
        self.bias = nn.Parameter((torch.randn(channels, generator=generator) * 0.1).to(dtype))
        self.out = nn.Parameter((torch.randn(HEADS * WIDTH, 8, generator=generator) * 0.2).to(dtype))

    def forward(self, x: Tensor, gates: dict[str, Tensor], state: Tensor) -> dict[str, Tensor]:
        x, conv = gdn_ops.causal_conv1d(x, self.weight, self.bias, activation="silu", output_final_state=True)
        q, k, v = (y.unflatten(-1, (HEADS, WIDTH)) for y in x.chunk(3, -1))
        o, state = gdn_ops.chunk_gated_delta_rule(
            q, k, v, gates["g"], gates["beta"], initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return {"y": o.flatten(-2) @ self.out, "state": state, "conv": conv}


def mixer_inputs(B: int, T: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, 3 * HEADS * WIDTH, generator=generator).to(device, dtype)
    g, beta = -torch.rand(B, T, HEADS, generator=generator), torch.rand(B, T, HEADS, generator=generator)
    state = torch.randn(B, HEADS, WIDTH, WIDTH, generator=generator)
    return x, {"g": g.to(device), "beta": beta.to(device)}, state.to(device)


def mixer_shapes() -> tuple:
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    return {0: batch, 1: length}, {"g": {0: batch, 1: length}, "beta": {0: batch, 1: length}}, {0: batch}


class Packed(nn.Module):
    """The recurrent form over packed sequences, in any number."""

    def forward(self, qkv: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.unbind(2)
        return gdn_ops.recurrent_gated_delta_rule(
            q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens
        )


def packed_inputs(bounds: list[int], seed: int = 0) -> dict[str, Tensor]:
    generator, T = torch.Generator().manual_seed(seed), bounds[-1]
    return {
        "qkv": torch.randn(1, T, 3, HEADS, WIDTH, generator=generator),
        "g": -torch.rand(1, T, HEADS, generator=generator),
        "beta": torch.rand(1, T, HEADS, generator=generator),
        "cu_seqlens": torch.tensor(bounds),
    }


def packed_shapes() -> dict[str, dict]:
    length, count = Dim("length", min=1), Dim("bounds", min=2)
    return {"qkv": {1: length}, "g": {1: length}, "beta": {1: length}, "cu_seqlens": {0: count}}


class InPlace(nn.Module):
    """Writes a pool of states: it has no C++ kernel."""

    def forward(self, q: Tensor, g: Tensor, state: Tensor) -> Tensor:
        return gdn_ops.recurrent_gated_delta_rule_(q, q, q, g, g.exp(), state)


class Constants(nn.Module):
    """Returns numbers beside a tensor."""

    def forward(self, x: Tensor) -> dict[str, Tensor | int | float]:
        return {"rows": x.shape[0], "y": 2 * x, "half": 0.5}


class Rule(nn.Module):
    """The rule alone, by names."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


class Scaled(nn.Module):
    """A tensor by a number and, if there is one, a mask; what comes after them is a tensor, too."""

    def forward(self, x: Tensor, scale: float, mask: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * scale if mask is None else x * scale * mask, y * 2


class Counting(nn.Module):
    """Writes its input ``state`` and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        self.calls.add_(1)
        state.split(1)[0].copy_(x.sum(0, keepdim=True))
        return x.to(torch.float64).mul_(2).float() + self.calls[0]


def rule_inputs(B: int, T: int, seed: int = 0) -> dict[str, Tensor]:
    """Fewer heads of keys than of values, so that no two inputs can be taken for one another."""
    x, gates, _ = mixer_inputs(B, T, seed=seed)
    q, k, v = (y.unflatten(-1, (HEADS, WIDTH)) for y in x.chunk(3, -1))
    return {"q": q[:, :, :1], "k": k[:, :, :1], "v": v, **gates}
