"""The Mamba2 layer against its plain composition and transformers'; states, padding, packed sequences, gate, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gdn_ops.nn import Mamba2
from tests.nn import plain
from tests.nn.samples import AGREEMENT, LAYOUTS, LENGTHS, mask, padded, rows
from tests.oracle import DEVICES, TOLERANCE, assert_close, error

WIDTH = 24
VARIANTS = {
    "paper": {},
    "groups": {"n_groups": 2},
    "no_conv_bias": {"use_conv_bias": False},
    "conv2": {"conv_size": 2},
    "dt_limit": {"dt_limit": (0.02, 0.5)},
}
on_devices = pytest.mark.parametrize("device", DEVICES)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield


def make(variant="paper", dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    layer = Mamba2(WIDTH, head_dim=12, state_size=8, **VARIANTS[variant]).to(device, dtype)
    with torch.no_grad():  # so that a norm weight, a skip or a step that is not used would show
        layer.o_norm.weight.uniform_(0.5, 1.5), layer.D.uniform_(0.5, 1.5)
        layer.in_proj.weight.mul_(2)
    return layer


def make_input(*shape, dtype=torch.float64, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_same_state(got, want, tol=1e-11):
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], tol, name)


@on_devices
@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(variant, dtype, device):
    """Outputs, states and the gradient of every weight and of the input, with a state going in."""
    layer = make(variant, dtype, device)
    x = make_input(2, 70, dtype=dtype, device=device).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    zeros = layer.init_state(2)
    state = {n: torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s) for n, s in zeros.items()}
    y, new_state = layer(x, state=state)
    dy = make_input(2, 70, dtype=dtype, device=device, seed=2)
    y.backward(dy)

    weights, x_wide = plain.wide(layer), x.detach().cpu().double().requires_grad_()
    y_want, want = plain.mamba2(layer, weights, x_wide, {n: s.cpu().double() for n, s in state.items()})
    y_want.backward(dy.cpu().double())
    assert_close(y, y_want, TOLERANCE[dtype].values, "y")
    assert_same_state(new_state, want, TOLERANCE[dtype].values)
    assert_close(x.grad, x_wide.grad, TOLERANCE[dtype].grads, "dx")
    for name, p in layer.named_parameters():
        assert_close(p.grad, weights[name].grad, TOLERANCE[dtype].grads, "d" + name)


@on_devices
def test_bf16(device):
    """Several roundings in a row: three times the operator's bound."""
    layer, x = make(dtype=torch.bfloat16, device=device), make_input(2, 70, dtype=torch.bfloat16, device=device)
    y, state = layer(x, output_state=True)
    want, want_state = plain.mamba2(layer, plain.wide(layer), x.cpu().double())
    assert y.dtype == state["conv"].dtype == torch.bfloat16 and state["recurrent"].dtype == torch.float32
    assert_close(y, want, 3 * TOLERANCE[torch.bfloat16].values, "y")
    assert_same_state(state, want_state, 3 * TOLERANCE[torch.bfloat16].values)


@on_devices
def test_autocast_keeps_weights_and_states_wide(device):
    layer, x = make(dtype=torch.float32, device=device), make_input(2, 70, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, state = layer(x, state=layer.init_state(2))
    assert y.dtype == torch.bfloat16 and {s.dtype for s in state.values()} == {torch.float32}
    want, _ = plain.mamba2(layer, plain.wide(layer), x.cpu().double())
    assert 1e-4 < error(y, want) < 3 * TOLERANCE[torch.bfloat16].values


@on_devices
@every_variant
def test_split_prefill_and_steps_equal_the_whole(variant, device):
    dtype, tol = AGREEMENT[device]
    layer, x = make(variant, dtype=dtype, device=device), make_input(2, 70, dtype=dtype, device=device)
    whole, whole_state = layer(x, output_state=True)
    state, parts = None, []
    for start, end in ((0, 33), (33, 34), (34, 66), (66, 67), (67, 70)):
        y, state = layer(x[:, start:end], state=state, output_state=True)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, tol, "y")
    assert_same_state(state, whole_state, tol)


@on_devices
@every_variant
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_equals_unpadded_rows(variant, layout, device):
    """With a state going in, on any side, whatever stands at the padding; a least step does not count there."""
    dtype, tol = AGREEMENT[device]
    layer, attention_mask = make(variant, dtype=dtype, device=device), mask(layout, device=device)
    x = rows(WIDTH, dtype, device)
    _, start = layer(make_input(len(LENGTHS), 6, dtype=dtype, device=device), output_state=True)
    y, state = layer(padded(x, attention_mask), attention_mask, start)
    for row, tokens in enumerate(x):
        own = {n: s[row : row + 1] for n, s in start.items()}
        want, want_state = layer(tokens, state=own)
        assert_close(y[row, attention_mask[row] == 1], want[0], tol, f"y of row {row}")
        assert_same_state({n: s[row : row + 1] for n, s in state.items()}, want_state, tol)


@on_devices
@every_variant
def test_packed_equals_separate(variant, device):
    dtype, tol = AGREEMENT[device]
    layer, x = make(variant, dtype=dtype, device=device), rows(WIDTH, dtype, device)
    bounds = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    _, start = layer(make_input(len(LENGTHS), 6, dtype=dtype, device=device), output_state=True)
    y, state = layer(torch.cat(x, 1), state=start, cu_seqlens=bounds)
    for n, tokens in enumerate(x):
        want, want_state = layer(tokens, state={name: s[n : n + 1] for name, s in start.items()})
        assert_close(y[:, bounds[n] : bounds[n + 1]], want, tol, f"y of sequence {n}")
        assert_same_state({name: s[n : n + 1] for name, s in state.items()}, want_state, tol)


def test_a_state_of_zeros_is_no_state_and_none_is_written():
    layer, x = make(), make_input(2, 5)
    y, nothing = layer(x)
    assert nothing is None
    start = layer.init_state(2)
    with_zeros, state = layer(x, state=start)
    assert torch.equal(y, with_zeros) and not any(s.any() for s in start.values())
    assert_same_state(state, layer(x, output_state=True)[1], 0.0)
    assert tuple(state) == layer.state_names == ("recurrent", "conv")


def test_initial_gate_is_mamba2s():
    """A ~ U(1, 16) and a step log-uniform in [1e-3, 1e-1], over 20000 heads; D is one."""
    torch.manual_seed(0)
    layer = Mamba2(8, num_heads=20000, head_dim=1, state_size=1)
    rate, step = layer.A_log.detach().exp(), F.softplus(layer.dt_bias.detach())
    assert rate.min() >= 0.999 and rate.max() <= 16.001 and rate.mean().item() == pytest.approx(8.5, rel=0.02)
    low, high = math.log(1e-3), math.log(1e-1)
    assert step.log().mean().item() == pytest.approx((low + high) / 2, rel=0.01)
    assert layer.D.eq(1).all() and layer.A_log._no_weight_decay and layer.dt_bias._no_weight_decay


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_transformers_layer_on_the_same_weights(groups):
    """Prefill and three steps of decode; transformers sums in fp32 whatever the weights are."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": groups}
    config = transformers.Mamba2Config(**sizes, num_hidden_layers=1, chunk_size=16, vocab_size=40)
    torch.manual_seed(0)
    model = transformers.Mamba2Model(config).double().eval()
    theirs = model.layers[0].mixer
    layer = Mamba2(**sizes).double()
    weights = {
        **{n: p for n, p in theirs.named_parameters() if n in ("A_log", "dt_bias", "D", "in_proj.weight")},
        "conv_weight": theirs.conv1d.weight[:, 0], "conv_bias": theirs.conv1d.bias,
        "o_norm.weight": theirs.norm.weight, "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    for name in ("conv_bias", "o_norm.weight", "D"):  # fresh models have zeros and ones there
        weights[name].uniform_(0.5, 1.5)
    layer.load_state_dict(weights)

    x = torch.randn(2, 73, 32, dtype=torch.float64)
    assert_close(layer(x)[0], theirs(x), 1e-6, "y")
    cache = transformers.DynamicCache(config=config)
    want = [theirs(x[:, :70], cache=cache), *(theirs(x[:, t : t + 1], cache=cache) for t in range(70, 73))]
    got, state = layer(x[:, :70], output_state=True)
    got = [got]
    for t in range(70, 73):
        y, state = layer(x[:, t : t + 1], state=state)
        got.append(y)
    assert_close(torch.cat(got, 1), torch.cat(want, 1), 1e-6, "y by steps")
    assert_close(state["recurrent"].mT, cache.get_recurrent_state(0, state_idx=0), 1e-6, "recurrent state")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_heads": 0}, "num_heads: expected a positive integer, got 0"),
        ({"head_dim": 5}, "num_heads: expected a positive integer, got 9.6"),
        ({"head_dim": 0}, "head_dim: expected at least 1, got 0"),
        ({"num_heads": 2, "expand": 2.0}, "expand: expected None together with num_heads, got 2.0"),
        ({"state_size": 0}, "state_size: expected at least 1, got 0"),
        ({"n_groups": 3}, "n_groups: expected a divisor of num_heads=4, got 3"),
        ({"conv_size": 5}, "conv_size: expected 2 to 4, got 5"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit: expected two numbers from 0, the first one less, got \(1.0, 0.5\)"),
        ({"dt_limit": (-1.0, 0.5)}, "dt_limit: expected two numbers from 0"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(**{"hidden_size": 24, "head_dim": 12, **arguments})


def test_bad_input_is_named():
    layer = make()
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \[B, T, 24\], got"):
        layer(torch.ones(2, 5, 7))
    with pytest.raises(ValueError, match=r"state\['conv'\]: expected shape \(2, 64, 3\), got \(1, 64, 3\)"):
        layer(make_input(2, 5), state={**layer.init_state(2), "conv": torch.zeros(1, 64, 3)})
    with pytest.raises(ValueError, match="state: expected a dict of recurrent, conv, got"):
        layer(make_input(2, 5), state={"recurrent": 1})


def test_a_compiled_training_step_has_products_of_even_widths():
    """Else the backward may fail at another T (``projection.py``); outside training the weight is taken as it is."""
    layer, x = make(dtype=torch.float32), make_input(2, 9, dtype=torch.float32)
    widths = []

    def record(graph, inputs):
        found = [
            n.meta["example_value"]
            for n in graph.graph.nodes
            if n.target is F.linear or n.target is torch._C._nn.linear
        ]
        widths.append(found[0].shape[-1])
        return graph.forward

    assert layer.in_proj.out_features % 8
    assert_close(torch.compile(layer, backend=record, fullgraph=True)(x)[0], layer(x)[0], 1e-6, "y")
    with torch.no_grad():
        torch.compile(layer, backend=record, fullgraph=True)(x)
    assert widths == [math.ceil(layer.in_proj.out_features / 8) * 8, layer.in_proj.out_features]
