"""The layers and the model written out in plain torch over ``gdn_ops.reference``: what their values must be.

Each function takes a module and ``weights``, its parameters by name in the dtype to compute in (see :func:`wide`), so
that one backward pass gives the expected gradients too. Nothing of ``gdn_ops.nn`` is used but sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdn_ops import reference


def wide(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters as fresh fp64 leaves on the CPU."""
    return {n: p.detach().cpu().double().requires_grad_() for n, p in module.named_parameters()}


def part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of a submodule."""
    return {n.removeprefix(name + "."): w for n, w in weights.items() if n.startswith(name + ".")}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).pow(0.5)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).pow(0.5)


def gated_delta_net(layer, weights: dict[str, Tensor], x: Tensor, state=None) -> tuple[Tensor, dict[str, Tensor]]:
    """``x [B, T, hidden_size]``; returns the output and the state."""
    state, new_state = state or {}, {}
    qkv = x @ weights["qkv_proj.weight"].T
    if "conv_weight" in weights:
        qkv, new_state["conv"] = reference.causal_conv1d(qkv, weights["conv_weight"], None, state.get("conv"), "silu")
    else:
        qkv = silu(qkv)
    H, K, HV, V = layer.num_heads, layer.head_k_dim, layer.num_v_heads, layer.head_v_dim
    q, k, v = qkv[..., : H * K], qkv[..., H * K : 2 * H * K], qkv[..., 2 * H * K :]
    beta = (2 if layer.allow_neg_eigval else 1) / (1 + torch.exp(-(x @ weights["b_proj.weight"].T)))
    g = torch.zeros_like(beta)
    if "A_log" in weights:
        step = torch.log1p(torch.exp(x @ weights["a_proj.weight"].T + weights["dt_bias"]))
        g = -torch.exp(weights["A_log"]) * step
    q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
    if layer.use_qk_l2norm:
        q, k = unit(q), unit(k)
    start = state.get("recurrent")
    if layer.use_delta:
        o, new_state["recurrent"] = reference.gated_delta_rule(q, k, v, g, beta, initial_state=start)
    else:
        o, new_state["recurrent"] = reference.gated_linear_attention(q, k, v * beta[..., None], g, initial_state=start)
    o = rms_norm(o, weights["o_norm.weight"], layer.o_norm.eps)
    if "z_proj.weight" in weights:
        o = o * silu(x @ weights["z_proj.weight"].T).unflatten(-1, (HV, V))
    return o.flatten(-2) @ weights["o_proj.weight"].T, new_state


def mamba2(layer, weights: dict[str, Tensor], x: Tensor, state=None) -> tuple[Tensor, dict[str, Tensor]]:
    """``x [B, T, hidden_size]``; returns the output and the state."""
    state, new_state = state or {}, {}
    HV, V, G, K = layer.num_heads, layer.head_dim, layer.n_groups, layer.state_size
    z, u, dt = (x @ weights["in_proj.weight"].T).split([HV * V, HV * V + 2 * G * K, HV], -1)
    u, new_state["conv"] = reference.causal_conv1d(
        u, weights["conv_weight"], weights.get("conv_bias"), state.get("conv"), "silu"
    )
    v, k, q = u[..., : HV * V], u[..., HV * V : HV * V + G * K], u[..., HV * V + G * K :]
    low, high = layer.dt_limit
    dt = torch.log1p(torch.exp(dt + weights["dt_bias"])).clamp(low, high)
    v = v.unflatten(-1, (HV, V))
    o, new_state["recurrent"] = reference.gated_linear_attention(
        q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v * dt[..., None], -torch.exp(weights["A_log"]) * dt, 1.0,
        state.get("recurrent"),
    )  # fmt: skip
    o = ((o + v * weights["D"][:, None]).flatten(-2) * silu(z)).unflatten(-1, (G, -1))
    o = rms_norm(o, weights["o_norm.weight"].unflatten(0, (G, -1)), layer.o_norm.eps)
    return o.flatten(-2) @ weights["o_proj.weight"].T, new_state


def rotated(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding as a product of complex numbers; ``x [B, T, H, D]``, ``position [T]``."""
    D = x.shape[-1]
    frequency = theta ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones(()).double(), position[:, None, None].double() * frequency)
    y = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
    return torch.cat([y.real, y.imag], -1)


def sliding_window_attention(layer, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Softmax over a dense ``[T, T]`` mask; ``x [B, T, hidden_size]`` fp64 from position 0."""
    H, KVH, D, T = layer.num_heads, layer.num_kv_heads, layer.head_dim, x.shape[1]
    q, k, v = (x @ weights["qkv_proj.weight"].T).unflatten(-1, (-1, D)).split([H, KVH, KVH], 2)
    token = torch.arange(T)
    q, k = rotated(q, token, layer.rope_theta), rotated(k, token, layer.rope_theta)
    k, v = (y.repeat_interleave(H // KVH, 2) for y in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
    age = token[:, None] - token
    weight = scores.masked_fill((age < 0) | (age >= layer.window), -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2) @ weights["o_proj.weight"].T


def hybrid_lm(model, weights: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """Logits ``[B, T, vocab_size]``."""
    eps = model.config.norm_eps
    x = weights["embedding.weight"][input_ids]
    for i, layer in enumerate(model.layers):
        own = part(weights, f"layers.{i}")
        y, mixer = rms_norm(x, own["mixer_norm.weight"], eps), part(own, "mixer")
        if "in_proj.weight" in mixer:
            x = x + mamba2(layer.mixer, mixer, y)[0]
        elif "b_proj.weight" in mixer:
            x = x + gated_delta_net(layer.mixer, mixer, y)[0]
        else:
            x = x + sliding_window_attention(layer.mixer, mixer, y)
        if layer.mlp is None:
            continue
        gate, up = (rms_norm(x, own["mlp_norm.weight"], eps) @ own["mlp.gate_up_proj.weight"].T).chunk(2, -1)
        x = x + (silu(gate) * up) @ own["mlp.down_proj.weight"].T
    x = rms_norm(x, weights["norm.weight"], eps)
    return x @ weights.get("lm_head.weight", weights["embedding.weight"]).T
