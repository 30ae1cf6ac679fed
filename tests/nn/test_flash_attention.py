"""Sliding-window attention by torch's flash attention: what it is asked for and when, its gradients, checkpointing."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.models import HybridConfig, HybridLM
from gdn_ops.models.hybrid import ACTIVATION_CHECKPOINTING
from gdn_ops.nn import sliding_window_attention
from tests.nn import plain
from tests.nn.test_sliding_window_attention import make, make_input
from tests.oracle import TOLERANCE, Tolerance, assert_close, error

SIZES = [(1, 4), (5, 4), (24, 2), (65, 1)]  # window, key heads
BOUNDS = [None, [0, 9, 9, 75, 140]]


def dense(q, k, v, bounds, window_size):
    """What torch documents of ``varlen_attn``, by a dense mask: probabilities ``[H, T, T]``, and k and v with a head
    for each of q's."""
    token, G = torch.arange(len(q)), q.shape[1] // k.shape[1]
    sequence = torch.searchsorted(bounds, token, right=True)
    age = token[:, None] - token
    seen = (sequence[:, None] == sequence) & (age <= window_size[0]) & (age >= -window_size[1])
    k, v = (y.repeat_interleave(G, 1) for y in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), k, v


@pytest.fixture
def flash_on_the_cpu(monkeypatch):
    """torch's operator behind ``varlen_attn`` with kernels for the CPU, as if it had some; counts their calls."""
    calls = {"forward": 0, "backward": 0}

    def forward(q, k, v, bounds, bounds_k, T, T_k, is_causal, scale, window_size, *other):
        assert bounds.dtype == torch.int32 and torch.equal(bounds, bounds_k) and bounds.diff().max() <= T == T_k
        calls["forward"] += 1
        p, _, v = dense(q, k, v, bounds, window_size)
        lse, seed = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)
        return torch.einsum("hij,jhd->ihd", p, v).contiguous(), lse, seed

    def backward(do, q, k, v, o, lse, bounds, *other):
        calls["backward"] += 1
        heads = k.shape[1]
        p, k, v = dense(q, k, v, bounds, next(x for x in other if isinstance(x, list)))
        dp = torch.einsum("ihd,jhd->hij", do, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
        dk, dv = torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", p, do)
        dk, dv = (y.unflatten(1, (heads, -1)).sum(2) for y in (dk, dv))
        return tuple(y.contiguous() for y in (torch.einsum("hij,jhd->ihd", ds, k), dk, dv))

    monkeypatch.setattr(sliding_window_attention, "_has_flash", lambda q: True)
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        yield calls


def check(layer, bounds, backend, tolerance):
    """Values and gradients of two rows of 70 tokens, or of packed sequences, compiled if there is a backend."""
    weight = layer.o_proj.weight
    x = make_input(2, 70, dtype=weight.dtype, device=weight.device)
    x = (x if bounds is None else x.flatten(0, 1)[None]).requires_grad_()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=weight.device)
    call = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    y, _ = call(x, cu_seqlens=cu_seqlens)
    dy = make_input(*x.shape[:2], dtype=weight.dtype, device=weight.device, seed=2)
    y.backward(dy)
    weights, x_wide = plain.wide(layer), x.detach().cpu().double().requires_grad_()
    parts = x_wide.split(70 if bounds is None else torch.tensor(bounds).diff().tolist(), 1)
    want = torch.cat([plain.sliding_window_attention(layer, weights, part) for part in parts], 1)
    want.backward(dy.cpu().double())
    assert_close(y, want, tolerance.values, "y")
    if layer.window > 1:  # one token's softmax is 1 whatever its score, and some gradients are zero but for rounding
        assert_close(x.grad, x_wide.grad, tolerance.grads, "dx")
        for name, p in layer.named_parameters():
            assert_close(p.grad, weights[name].grad, tolerance.grads, "d" + name)


@pytest.mark.parametrize("window, num_kv_heads", SIZES)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_what_it_is_asked_for(backend, bounds, window, num_kv_heads, flash_on_the_cpu):
    check(make(window, num_kv_heads), bounds, backend, TOLERANCE[torch.float64])
    assert flash_on_the_cpu == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("kind", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("compiled", [False, True])
def test_under_checkpointing(compiled, kind, flash_on_the_cpu):
    """The same gradients; elementwise checkpointing keeps what it gave."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset("tiny", num_hidden_layers=1, pattern="S", window=9)).double()
    ids = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(0))
    want = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    flash_on_the_cpu.update(forward=0, backward=0)
    model.activation_checkpointing = kind
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    got = torch.autograd.grad(call(ids, labels=ids).loss, list(model.parameters()))
    assert all(error(a, b) < 1e-11 for a, b in zip(got, want))
    assert flash_on_the_cpu == {"forward": 1 if kind in ("none", "elementwise") else 2, "backward": 1}


def test_it_is_for_no_state_and_no_export(flash_on_the_cpu):
    layer, x = make(5), make_input(2, 70)
    layer(x, output_state=True)
    layer(x, state=layer.init_state(2))
    torch.export.export(layer, (x,), strict=False)
    assert not any(flash_on_the_cpu.values())


@pytest.mark.parametrize(
    "capability, hip, enabled, widest",
    [
        ((9, 0), None, True, 256),
        ((8, 0), None, True, 256),
        ((8, 9), None, True, 192),
        ((12, 0), None, True, 192),
        ((7, 5), None, True, 0),
        ((9, 0), None, False, 0),
        ((9, 4), "7.0", True, 0),
    ],
)
def test_which_cards_have_it(monkeypatch, capability, hip, enabled, widest):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: enabled)
    assert sliding_window_attention._widest_flash_head(torch.device("cuda")) == widest


@pytest.mark.gpu
@pytest.mark.parametrize("window, num_kv_heads", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend, head_dim", [(None, 16), ("inductor", 16), (None, 256)])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_values_and_gradients(bounds, backend, head_dim, dtype, window, num_kv_heads, monkeypatch):
    asked, flash = [], sliding_window_attention._flash
    monkeypatch.setattr(sliding_window_attention, "_flash", lambda *a: asked.append(a) or flash(*a))
    tolerance = Tolerance(*(3 * bound for bound in TOLERANCE[dtype]))
    check(make(window, num_kv_heads, dtype, "cuda", head_dim=head_dim), bounds, backend, tolerance)
    assert asked
