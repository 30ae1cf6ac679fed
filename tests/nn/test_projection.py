"""Layers that meet the same input: one product where a graph for training is compiled, else as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from gdn_ops.nn.projection import only_weight, project
from tests.oracle import assert_close

WIDTHS = {"odd": (9, 9), "even": (4, 12), "one": (9,), "aligned": (8,)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield


def make(widths, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(24, width, bias=False, dtype=dtype) for width in widths]
    return layers, torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)


def products(layers, x, training=True):
    """The widths of the products that a compiler is given."""
    found = []

    def record(graph, inputs):
        calls = [n for n in graph.graph.nodes if n.target in (F.linear, torch._C._nn.linear)]
        found.extend(n.meta["example_value"].shape[-1] for n in calls)
        return graph.forward

    with torch.set_grad_enabled(training):
        torch.compile(lambda x: project(x, *layers), backend=record, fullgraph=True)(x)
    return found


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_values_and_gradients(widths, backend):
    layers, x = make(widths)
    compiled = torch.compile(lambda x: project(x, *layers), backend=backend, fullgraph=True)
    got, want = compiled(x), [layer(x) for layer in layers]
    leaves, dy = [x, *(layer.weight for layer in layers)], [torch.randn_like(y) for y in want]
    for name, ours, theirs in zip(
        ("dx", "first", "second"), torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy)
    ):
        assert_close(ours, theirs, 1e-12, name)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, 1e-12, "y")


def test_where_it_is_one_product():
    layers, x = make((9, 9))
    assert products(layers, x) == [24]
    assert products(layers, x, training=False) == [9, 9]
    assert products(layers[:1], x) == [16]
    assert products(make((4, 12))[0], x) == [16]
    assert products(make((8,))[0], x) == [8]
    program = torch.export.export(_Layers(layers), (x,))
    assert sum("linear" in str(n.target) for n in program.graph.nodes) == 2


def test_replaced_and_hooked_layers_are_called():
    layers, x = make((9, 9))
    layers[0].register_forward_hook(lambda layer, args, y: 2 * y)
    got, want = torch.compile(lambda x: project(x, *layers), backend="eager")(x), [layer(x) for layer in layers]
    assert torch.equal(got[0], want[0]) and torch.equal(want[0], 2 * F.linear(x, layers[0].weight))
    layers, x = make((9, 9))
    layers[1] = _Doubled(layers[1])
    got = torch.compile(lambda x: project(x, *layers), backend="eager", fullgraph=True)(x)
    assert torch.equal(got[1], 2 * F.linear(x, layers[1].weight))


@pytest.mark.parametrize("given", ["a bias", "a forward", "no width"])
def test_layers_that_do_more_than_multiply_are_called(given):
    layers, x = make((9, 9))
    if given == "a bias":
        layers[0] = nn.Linear(24, 9, dtype=torch.float64)
    elif given == "a forward":
        own = layers[0].forward
        layers[0].forward = lambda x: own(x) + 3
    else:
        layers[0] = nn.Sequential(layers[0], nn.Tanh())
    compiled = torch.compile(lambda x: project(x, *layers), backend="aot_eager", fullgraph=True)
    for got, layer in zip(compiled(x), layers):
        assert_close(got, layer(x), 1e-12, given)
    sum(y.sum() for y in compiled(x)).backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())


def test_hooks_of_all_modules_are_called():
    layers, x = make((9, 9))
    hook = register_module_forward_hook(lambda layer, args, y: 2 * y)
    try:
        got = torch.compile(lambda x: project(x, *layers), backend="eager", fullgraph=True)(x)
    finally:
        hook.remove()
    for y, layer in zip(got, layers):
        assert_close(y, 2 * layer(x), 1e-12, "hooked")


def test_a_forward_of_its_own_is_seen_by_what_was_compiled_before():
    layers, x = make((9, 9))
    compiled = torch.compile(lambda x: project(x, *layers), backend="aot_eager", fullgraph=True)
    compiled(x)
    own = layers[0].forward
    layers[0].forward = lambda x: own(x) + 3
    assert_close(compiled(x)[0], layers[0](x), 1e-12, "patched")


def test_a_weight_of_another_kind_is_the_layers_own_matter():
    layers, _ = make((9,))
    assert only_weight(layers[0])
    layers[0].weight = nn.Parameter(layers[0].weight.detach().as_subclass(_Kind))
    assert not only_weight(layers[0])


class _Kind(torch.Tensor):
    """As quantised training has it."""


class _Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return project(x, *self.layers)


class _Doubled(nn.Module):
    """What an adapter is: a layer with the weight of another."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.out_features = layer.weight, layer.out_features

    def forward(self, x):
        return 2 * F.linear(x, self.weight)
