"""Positional arguments for every operator: dense, grouped, packed, strided, with and without state."""

from __future__ import annotations

import torch

from tests.oracle import cotangents, make_conv_inputs, make_inputs

GDN = torch.ops.gdn
LAYOUTS = ("dense", "grouped", "packed", "strided")


def _rule(layout, device, dtype, T=5):
    H, HV = (2, 4) if layout == "grouped" else (2, 2)
    bounds = [0, 2, 2, T] if layout == "packed" else None
    x = make_inputs(1 if bounds else 2, T, H, HV, 16, 8, dtype, device, initial_state=True, cu_seqlens=bounds)
    if layout == "strided":
        for name in ("q", "k", "v", "g", "beta"):
            x[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)
        x["initial_state"] = x["initial_state"].mT.contiguous().mT
    return x


def _conv(layout, device, dtype, T=5):
    bounds = [0, 2, 2, T] if layout == "packed" else None
    x = make_conv_inputs(1 if bounds else 2, T, 6, 4, dtype, device, initial_state=True, cu_seqlens=bounds)
    if layout == "strided":
        x["x"] = x["x"].mT.contiguous().mT
        x["weight"] = x["weight"].mT.contiguous().mT
        x["initial_state"] = x["initial_state"].mT.contiguous().mT
    return x


def _require_grad(*tensors):
    return [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]


def samples(layout, state, device="cpu", dtype=torch.float32, requires_grad=False, T=5):
    """``[(name, overload, args)]`` for one layout, with or without the optional states."""
    x, c = _rule(layout, device, dtype, T), _conv(layout, device, dtype, T)
    do, ds = cotangents(x)
    if layout == "strided":  # as a loss of the transposed state gives
        ds = ds.mT.contiguous().mT
    tensors = [x[n] for n in ("q", "k", "v", "g", "beta")]
    h0, cu_seqlens = (x["initial_state"] if state else None), x["cu_seqlens"]
    conv = [c["x"], c["weight"], c["bias"] if state else None, c["initial_state"] if state else None]
    N = x["initial_state"].shape[0]
    B, T = x["q"].shape[:2]
    pool = torch.randn(N + 2 + B * T, *x["initial_state"].shape[1:], device=device, dtype=x["initial_state"].dtype)
    conv_pool = torch.randn(N + 2, 6, 3, device=device, dtype=dtype)
    indices = torch.arange(N, device=device, dtype=torch.int32).flip(0) - 1 if state else None
    token_indices = None
    if state and layout in ("grouped", "packed"):
        token_indices = torch.arange(N, N + B * T, device=device, dtype=torch.int32).view(B, T)
        token_indices[:, 1::3] = -1
    if requires_grad:
        tensors, conv = _require_grad(*tensors), _require_grad(*conv)
        h0 = None if h0 is None else h0.requires_grad_()
    plain, plain_conv = [t.detach() for t in tensors], [None if t is None else t.detach() for t in conv]
    plain_h0 = None if h0 is None else h0.detach()
    dy, dstate = torch.randn_like(plain_conv[0]), torch.randn_like(c["initial_state"])
    all_samples = [
        (GDN.chunk_gated_delta_rule, (*tensors, h0, cu_seqlens, 0.25, state)),
        (GDN.recurrent_gated_delta_rule, (*tensors, h0, cu_seqlens, 0.25, state)),
        (GDN.chunk_gated_delta_rule_backward, (do, ds if state else None, *plain, plain_h0, cu_seqlens, 0.25)),
        (GDN.recurrent_gated_delta_rule_, (*plain, pool, indices, token_indices, cu_seqlens, 0.25)),
        (GDN.chunk_gated_linear_attention, (*tensors[:4], h0, cu_seqlens, 0.25, state)),
        (GDN.recurrent_gated_linear_attention, (*tensors[:4], h0, cu_seqlens, 0.25, state)),
        (
            GDN.chunk_gated_linear_attention_backward,
            (do, ds if state else None, *plain[:4], plain_h0, cu_seqlens, 0.25),
        ),
        (GDN.causal_conv1d, (*conv, c["cu_seqlens"], state, state)),
        (GDN.causal_conv1d_backward, (dy, dstate if state else None, *plain_conv, c["cu_seqlens"], state)),
    ]
    if layout != "packed":
        step_indices = None if indices is None else indices[: plain_conv[0].shape[0]]
        all_samples.append((GDN.causal_conv1d_update_, (*plain_conv[:3], conv_pool, step_indices, state)))
    return [(op._qualified_op_name.split("::")[1], op.default, args) for op, args in all_samples]


def named(name, layout, state, **options):
    """The one sample of operator ``name``; ``None`` where the layout does not exist for it."""
    return next(((op, args) for n, op, args in samples(layout, state, **options) if n == name), None)


NAMES = [name for name, _, _ in samples("dense", False)]
