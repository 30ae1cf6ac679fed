"""Derivatives under ``torch.func``, forward mode, autocast, compiled autograd; calls without numbers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jvp

import gdn_ops
from gdn_ops import reference
from gdn_ops.models import HybridConfig, HybridLM
from tests.oracle import assert_close, make_inputs

X = make_inputs(1, 10, 2, 2, 8, 8)
RULES = {
    "chunk": (gdn_ops.chunk_gated_delta_rule, reference.gated_delta_rule),
    "recurrent": (gdn_ops.recurrent_gated_delta_rule, reference.gated_delta_rule),
    "chunk linear": (gdn_ops.chunk_gated_linear_attention, reference.gated_linear_attention),
    "recurrent linear": (gdn_ops.recurrent_gated_linear_attention, reference.gated_linear_attention),
}


def energy(rule, **changed):
    x = X | changed
    gates = (x["g"],) if "linear" in rule.__name__ else (x["g"], x["beta"])
    return rule(x["q"], x["k"], x["v"], *gates)[0].square().sum()


@pytest.mark.parametrize("name", RULES)
def test_a_level_around_another_gets_its_gradient(name):
    """That of q, of a loss whose gradient to v was taken inside; of W, outside of all transforms."""
    function, oracle = RULES[name]

    def outer(rule):
        return grad(lambda q: grad_and_value(lambda v: energy(rule, q=q, v=v))(X["v"])[1])(X["q"])

    def outside(rule):
        W = torch.eye(8, requires_grad=True)
        _, value = grad_and_value(lambda v: energy(rule, q=X["q"] @ W, v=v))(X["v"])
        return torch.autograd.grad(value, W)[0]

    for gradient in (outer, outside):
        assert gradient(oracle).norm() > 0.1
        assert_close(gradient(function), gradient(oracle), 1e-5, "gradient")


@pytest.mark.parametrize("name", RULES)
def test_second_and_forward_derivatives_are_refused(name):
    function, v = RULES[name][0], X["v"]
    with pytest.raises(NotImplementedError, match=r"backward has no gradient: gdn_ops\.reference is differentiable"):
        grad(lambda v: grad(lambda v: energy(function, v=v))(v).square().sum())(v)
    with pytest.raises(NotImplementedError, match=r"has no forward-mode gradient: gdn_ops\.reference has"):
        jvp(lambda v: energy(function, v=v), (v,), (v,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="has no forward-mode gradient"):
            energy(function, v=forward_ad.make_dual(v, v))
        assert torch.equal(energy(function), energy(function, v=v))  # what has no tangent passes


@pytest.mark.parametrize("pattern", ["G", "D", "M"])
def test_a_backward_pass_under_autocast_is_that_outside(pattern):
    model, ids = HybridLM(HybridConfig.preset("tiny", pattern=pattern, num_hidden_layers=1)), torch.randint(256, (2, 9))

    def gradients(inside):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
            if inside:
                return torch.autograd.grad(loss, list(model.parameters()))
        return torch.autograd.grad(loss, list(model.parameters()))

    for got, want in zip(gradients(True), gradients(False)):
        assert torch.equal(got, want)


def test_compiled_autograd():
    q = X["q"].clone().requires_grad_()
    (want,) = torch.autograd.grad(energy(gdn_ops.chunk_gated_delta_rule, q=q), q)
    loss = energy(gdn_ops.chunk_gated_delta_rule, q=q)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend="eager")()
    assert torch.equal(q.grad, want)


@pytest.mark.parametrize("return_logits", [True, False])
def test_per_sample_gradients_of_a_model(return_logits):
    model, ids = HybridLM(HybridConfig.preset("tiny")), torch.randint(256, (3, 9))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, row):
        arguments = {"labels": row[None], "return_logits": return_logits}
        return functional_call(model, weights, (row[None],), arguments).loss

    got = torch.vmap(grad(loss), (None, 0))(weights, ids)
    for i, row in enumerate(ids):
        want = torch.autograd.grad(model(row[None], labels=row[None]).loss, list(model.parameters()))
        for name, w in zip(got, want):
            assert_close(got[name][i], w, 1e-5, name)


def test_shapes_without_numbers():
    """What cannot be read is not checked: ids, bounds of packed sequences."""
    with FakeTensorMode():
        ids, bounds = torch.zeros(1, 20, dtype=torch.long), torch.tensor([0, 4, 20])
        assert HybridLM(HybridConfig.preset("tiny"))(ids, labels=ids, cu_seqlens=bounds).logits.shape == (1, 20, 256)


def test_a_pool_is_no_part_of_a_graph():
    pool, x = torch.zeros(1, 2, 8, 8, requires_grad=True), torch.zeros(1, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="state: expected a tensor that does not require grad"):
        gdn_ops.recurrent_gated_delta_rule_(*(X[n][:, :1] for n in ("q", "k", "v", "g", "beta")), pool * 2)
    with pytest.raises(ValueError, match="state: expected a tensor that does not require grad"):
        gdn_ops.causal_conv1d_update_(torch.zeros(1, 1, 4), x, torch.ones(4, 4))
    with torch.no_grad():
        gdn_ops.recurrent_gated_delta_rule_(*(X[n][:, :1] for n in ("q", "k", "v", "g", "beta")), pool)
    assert pool.any()


@pytest.mark.parametrize("scale", ["a", [1.0], torch.ones(2)], ids=str)
def test_a_scale_is_a_number(scale):
    with pytest.raises(TypeError, match="scale: expected a number or None, got"):
        gdn_ops.chunk_gated_delta_rule(**X, scale=scale)
