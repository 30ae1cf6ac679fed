"""The specification and the oracle themselves: they must be right before anything is compared with them."""

from __future__ import annotations

import pytest
import torch

from gdn_ops import reference
from tests.oracle import TOLERANCE, assert_close, error, expected, make_conv_inputs, make_inputs, tolerance_of


def _paper_form(q, k, v, g, beta, scale, initial_state, cu_seqlens):
    """Equation 10 as printed, with explicit matrices, one head and one token at a time."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    o, final = torch.zeros_like(v), torch.zeros(B, HV, K, V, dtype=v.dtype)
    for b in range(B):
        for h in range(HV):
            S = torch.zeros(K, V, dtype=v.dtype) if initial_state is None else initial_state[b, h]
            for t in range(T):
                k_t, v_t = k[b, t, h // (HV // H)], v[b, t, h]
                erase = torch.eye(K, dtype=v.dtype) - beta[b, t, h] * torch.outer(k_t, k_t)
                S = g[b, t, h].exp() * (erase @ S) + beta[b, t, h] * torch.outer(k_t, v_t)
                o[b, t, h] = scale * (S.T @ q[b, t, h // (HV // H)])
            final[b, h] = S
    return o, final


@pytest.mark.parametrize("initial_state", [False, True])
def test_gated_delta_rule_is_the_papers_equation(initial_state):
    x = make_inputs(2, 9, 2, 4, 5, 3, torch.float64, initial_state=initial_state)
    o, state = reference.gated_delta_rule(**x, scale=0.7)
    o_paper, state_paper = _paper_form(**x, scale=0.7)
    assert_close(o, o_paper, 1e-14, "o")
    assert_close(state, state_paper, 1e-14, "final_state")


@pytest.mark.parametrize("initial_state", [False, True])
def test_gated_linear_attention_is_mamba2s_equation(initial_state):
    """``h_t = a_t h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t`` (arXiv 2405.21060, eq. 1, scalar A), head by head."""
    x = make_inputs(2, 9, 2, 4, 5, 3, torch.float64, initial_state=initial_state)
    o, state = reference.gated_linear_attention(**{n: t for n, t in x.items() if n != "beta"}, scale=1.0)
    C, B, v, a = x["q"], x["k"], x["v"], x["g"].exp()
    for b in range(2):
        for head in range(4):
            h = torch.zeros(3, 5, dtype=torch.float64) if not initial_state else x["initial_state"][b, head].T
            for t in range(9):
                h = a[b, t, head] * h + torch.outer(v[b, t, head], B[b, t, head // 2])
                assert_close(o[b, t, head], h @ C[b, t, head // 2], 1e-14, "o")
            assert_close(state[b, head], h.T, 1e-14, "final_state")


def test_without_delta_a_key_written_twice_adds_up():
    key = torch.eye(2, dtype=torch.float64)[:1].expand(1, 2, 1, 2)
    v = torch.tensor([[[[1.0]], [[10.0]]]], dtype=torch.float64)
    gate = torch.zeros(1, 2, 1, dtype=torch.float64)
    added, _ = reference.gated_linear_attention(key, key, v, gate, scale=1.0)
    replaced, _ = reference.gated_delta_rule(key, key, v, gate, gate + 1, scale=1.0)
    assert added.flatten().tolist() == [1.0, 11.0] and replaced.flatten().tolist() == [1.0, 10.0]


def test_orthogonal_keys_are_recalled_exactly():
    """With beta = 1, no decay and orthonormal keys, querying with a key gives back the value written at it."""
    keys = torch.eye(6, dtype=torch.float64)[None, :, None]
    v = torch.randn(1, 6, 1, 4, dtype=torch.float64)
    gate = torch.zeros(1, 6, 1, dtype=torch.float64)
    _, state = reference.gated_delta_rule(keys, keys, v, gate, gate + 1)
    recalled, _ = reference.gated_delta_rule(keys, keys, v, gate, gate, scale=1.0, initial_state=state)
    assert torch.equal(recalled, v)


def test_default_scale():
    x = make_inputs(1, 5, 1, 1, 16, 4, torch.float64)
    assert torch.equal(reference.gated_delta_rule(**x)[0], reference.gated_delta_rule(**x, scale=0.25)[0])


def test_packed_is_separate():
    x = make_inputs(1, 12, 1, 2, 4, 3, torch.float64, initial_state=True, cu_seqlens=[0, 5, 5, 12])
    o, state = reference.gated_delta_rule(**x)
    for n, tokens in enumerate((slice(0, 5), slice(5, 5), slice(5, 12))):
        part = {name: x[name][:, tokens] for name in ("q", "k", "v", "g", "beta")}
        o_n, state_n = reference.gated_delta_rule(**part, initial_state=x["initial_state"][n : n + 1])
        assert torch.equal(o[:, tokens], o_n) and torch.equal(state[n : n + 1], state_n)
    assert torch.equal(state[1], x["initial_state"][1])


def test_gradients_by_finite_differences():
    x = make_inputs(1, 4, 1, 2, 3, 2, torch.float64, initial_state=True)
    names = [n for n in x if x[n] is not None]
    tensors = [x[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(lambda *t: reference.gated_delta_rule(**dict(zip(names, t))), tensors)


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_is_a_depthwise_convolution(W, activation):
    x = make_conv_inputs(2, 9, 5, W, torch.float64, initial_state=True)
    y, state = reference.causal_conv1d(**x, activation=activation)
    window = torch.cat([x["initial_state"], x["x"].mT], dim=2)
    want = torch.nn.functional.conv1d(window, x["weight"][:, None], x["bias"], groups=5).mT
    want = want if activation is None else torch.nn.functional.silu(want)
    assert_close(y, want, 1e-14, "y")
    assert torch.equal(state, window[:, :, 9:])


def test_causal_conv1d_state_of_a_short_sequence_keeps_older_inputs():
    x = make_conv_inputs(1, 1, 2, 4, torch.float64, initial_state=True)
    _, state = reference.causal_conv1d(**x)
    assert torch.equal(state, torch.cat([x["initial_state"][:, :, 1:], x["x"].mT], dim=2))


def test_error_metric():
    ref = torch.tensor([3.0, 4.0])
    assert error(ref, ref) == 0.0
    assert error(ref * 1.01, ref) == pytest.approx(0.01, rel=1e-5)
    assert error(torch.tensor([3.0, float("nan")]), ref) == float("inf")
    assert error(torch.tensor([1e-30]), torch.zeros(1)) == float("inf")
    assert error(torch.zeros(1), torch.zeros(1)) == 0.0
    with pytest.raises(AssertionError, match="expected shape"):
        error(ref, ref[None])
    with pytest.raises(AssertionError, match=r"y: relative RMS error 1\.0\d+e-02 exceeds 1\.0e-05"):
        assert_close(ref * 1.01, ref, 1e-5, "y")


def test_tolerance_table_is_the_designs():
    table = {
        "float64": (1e-12, 1e-11, 1e-11), "float32": (1e-5, 5e-5, 5e-5),
        "float16": (2e-3, 4e-3, 1e-2), "bfloat16": (5e-3, 8e-3, 1.5e-2),
    }  # fmt: skip
    assert {str(dtype)[6:]: tuple(row) for dtype, row in TOLERANCE.items()} == table
    bf16 = [tolerance_of(n, torch.bfloat16) for n in ("o", "final_state", "dq", "dinitial_state", "dg", "dbeta")]
    assert bf16 == [5e-3, 5e-3, 8e-3, 8e-3, 1.5e-2, 1.5e-2]


def test_inputs_are_the_same_numbers_in_every_dtype():
    wide, narrow = (make_inputs(1, 3, 1, 2, 4, 5, dtype, initial_state=True) for dtype in (torch.float64, torch.half))
    assert torch.equal(wide["q"].half(), narrow["q"]) and torch.equal(wide["g"].float(), narrow["g"])
    assert narrow["initial_state"].dtype == torch.float32 and (wide["g"] <= 0).all()


def test_oracle_gradients_are_those_of_the_specification():
    x = make_inputs(1, 6, 1, 2, 4, 3, torch.float64)
    do, ds = torch.ones_like(x["v"]), torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    want = expected(x, do=do, ds=ds)
    v = x["v"].clone()
    v[0, 2, 1, 0] += 1e-3
    moved = reference.gated_delta_rule(**{**x, "v": v})[0].sum() - want["o"].sum()
    assert moved.item() / 1e-3 == pytest.approx(want["dv"][0, 2, 1, 0].item(), rel=1e-8)


def test_no_packed_sequence_has_no_state():
    x = make_inputs(1, 0, 2, 4, 16, 8)
    tensors = [x[name] for name in ("q", "k", "v", "g", "beta")]
    o, state = reference.gated_delta_rule(*tensors, cu_seqlens=torch.tensor([0]))
    assert o.shape == (1, 0, 4, 8) and state.shape == (0, 4, 16, 8)
