"""The Gated DeltaNet layer against its plain composition; states, padding, packed sequences, initial gate, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gdn_ops.nn import GatedDeltaNet
from tests.nn import plain
from tests.nn.samples import AGREEMENT, LAYOUTS, LENGTHS, mask, padded, rows
from tests.oracle import DEVICES, TOLERANCE, assert_close, error

WIDTH = 24
VARIANTS = {
    "paper": {},
    "grouped": {"num_v_heads": 6},
    "neg_eigval": {"allow_neg_eigval": True},
    "no_conv": {"use_short_conv": False},
    "no_gate": {"use_gate": False},
    "conv2": {"conv_size": 2},
    "deltanet": {"use_decay": False},
    "no_delta": {"use_delta": False, "num_v_heads": 4},
    "no_l2norm": {"use_qk_l2norm": False},
}
on_devices = pytest.mark.parametrize("device", DEVICES)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield


def make(variant="paper", dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    layer = GatedDeltaNet(WIDTH, num_heads=2, head_k_dim=8, head_v_dim=12, **VARIANTS[variant]).to(device, dtype)
    with torch.no_grad():  # so that a norm weight or a gate that is not used would show
        layer.o_norm.weight.uniform_(0.5, 1.5)
        for projection in (layer.a_proj, layer.b_proj):
            if projection is not None:
                projection.weight.mul_(3)
        if not layer.use_qk_l2norm:  # keys as long as ones that are normalised, or the rule diverges
            layer.qkv_proj.weight.mul_(0.5)
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
    y_want, want = plain.gated_delta_net(layer, weights, x_wide, {n: s.cpu().double() for n, s in state.items()})
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
    want, want_state = plain.gated_delta_net(layer, plain.wide(layer), x.cpu().double())
    assert y.dtype == state["conv"].dtype == torch.bfloat16 and state["recurrent"].dtype == torch.float32
    assert_close(y, want, 3 * TOLERANCE[torch.bfloat16].values, "y")
    assert_same_state(state, want_state, 3 * TOLERANCE[torch.bfloat16].values)


@on_devices
def test_autocast_keeps_weights_and_states_wide(device):
    layer, x = make(dtype=torch.float32, device=device), make_input(2, 70, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, state = layer(x, state=layer.init_state(2))
    assert y.dtype == torch.bfloat16 and {s.dtype for s in state.values()} == {torch.float32}
    want, _ = plain.gated_delta_net(layer, plain.wide(layer), x.cpu().double())
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


def test_a_state_of_zeros_is_no_state():
    layer, x = make(), make_input(2, 5)
    y, nothing = layer(x)
    assert nothing is None
    with_zeros, state = layer(x, state=layer.init_state(2))
    assert torch.equal(y, with_zeros)
    assert_same_state(state, layer(x, output_state=True)[1], 0.0)
    assert tuple(state) == layer.state_names


@pytest.mark.parametrize("T", [1, 5, 70])
def test_a_state_is_not_written(T):
    layer = make()
    _, state = layer(make_input(2, 7), output_state=True)
    before = {n: s.clone() for n, s in state.items()}
    layer(make_input(2, T), state=state)
    layer(make_input(2, T), state=state, attention_mask=torch.ones(2, T))
    assert all(torch.equal(state[n], before[n]) for n in before)


@on_devices
@every_variant
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_equals_unpadded_rows(variant, layout, device):
    """With a state going in, on any side, whatever stands at the padding."""
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


def test_lengths_are_a_mask_on_the_right():
    layer, attention_mask = make(), mask("right")
    x = padded(rows(WIDTH), attention_mask)
    y, state = layer(x, attention_mask, output_state=True)
    y_lengths, state_lengths = layer(x, lengths=torch.tensor(LENGTHS), output_state=True)
    assert_close(y_lengths * attention_mask[..., None], y * attention_mask[..., None], 1e-12, "y")
    assert_same_state(state_lengths, state, 1e-12)


def test_a_row_of_padding_alone_changes_nothing():
    layer, start = make(), None
    _, start = layer(make_input(2, 6), output_state=True)
    _, state = layer(make_input(2, 5), torch.tensor([[0] * 5, [1] * 5]), start)
    assert all(torch.equal(state[n][0], start[n][0]) for n in state)
    assert not torch.equal(state["recurrent"][1], start["recurrent"][1])


def test_no_gradient_comes_from_padding():
    layer, attention_mask = make(), mask("middle")
    x = padded(rows(WIDTH), attention_mask).requires_grad_()
    y, state = layer(x, attention_mask, output_state=True)
    (y * attention_mask[..., None]).square().sum().add(state["recurrent"].sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    assert x.grad[attention_mask == 0].eq(0).all() and x.grad[attention_mask == 1].ne(0).any(-1).all()


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


@pytest.mark.parametrize("variant", ["paper", "neg_eigval", "deltanet"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_compiled_training_is_eagers(variant, padding):
    """There decay and writing strength come out of one product, of more columns than they have."""
    layer, x = make(variant), make_input(2, 70).requires_grad_()
    attention_mask = torch.ones(2, 70).long()
    attention_mask[1, :7] = 0
    arguments = (attention_mask,) if padding else ()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (want, _), (got, _) = layer(x, *arguments), compiled(x, *arguments)
    real = attention_mask[..., None] if padding else 1
    dy = make_input(2, 70, seed=2) * real
    leaves = {"x": x, **dict(layer.named_parameters())}
    assert_close(got * real, want * real, 1e-12, "y")
    grads = zip(leaves, *(torch.autograd.grad(y, leaves.values(), dy) for y in (got, want)))
    for name, ours, theirs in grads:
        assert_close(ours, theirs, 1e-11, "d" + name)


def test_compiled_training_under_autocast():
    layer, x = make(dtype=torch.float32), make_input(2, 70, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = layer(x)[0], compiled(x)[0]
    assert got.dtype == torch.bfloat16
    assert_close(got, want, TOLERANCE[torch.bfloat16].values, "y")
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in (layer.a_proj.weight, layer.b_proj.weight))


def test_names_of_parameters():
    names = "conv_weight A_log dt_bias qkv_proj.weight a_proj.weight b_proj.weight z_proj.weight o_norm.weight"
    assert list(make().state_dict()) == [*names.split(), "o_proj.weight"]


def test_initial_gate_is_the_papers():
    """A ~ U(0, 16) and a step log-uniform in [1e-3, 1e-1], over 20000 heads; neither is decayed by an optimiser."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(8, num_heads=1, num_v_heads=20000, head_k_dim=1, head_v_dim=1)
    rate, step = layer.A_log.detach().exp(), F.softplus(layer.dt_bias.detach())
    assert rate.min() >= 0 and rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8, rel=0.02) and rate.std().item() == pytest.approx(
        16 / 12**0.5, rel=0.02
    )
    low, high = math.log(1e-3), math.log(1e-1)
    assert step.log().min() >= low - 1e-3 and step.log().max() <= high + 1e-3
    assert step.log().mean().item() == pytest.approx((low + high) / 2, rel=0.01)
    assert step.log().std().item() == pytest.approx((high - low) / 12**0.5, rel=0.02)
    assert layer.A_log._no_weight_decay and layer.dt_bias._no_weight_decay


def test_default_sizes_are_the_papers():
    layer = GatedDeltaNet(1536, num_heads=9, head_k_dim=128, expand_v=2)
    assert (layer.head_k_dim, layer.head_v_dim, layer.conv_size) == (128, 256, 4)
    layer = GatedDeltaNet(64, num_heads=2)
    assert (layer.head_k_dim, layer.head_v_dim, layer.num_v_heads) == (24, 48, 2)


def test_init_state():
    layer = make("grouped", torch.float32)
    assert {n: (tuple(s.shape), s.dtype) for n, s in layer.init_state(3, dtype=torch.bfloat16).items()} == {
        "recurrent": ((3, 6, 8, 12), torch.float32),
        "conv": ((3, 2 * 16 + 72, 3), torch.bfloat16),
    }
    assert layer.init_state(1, device="meta")["conv"].device.type == "meta"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"num_v_heads": 3}, "num_v_heads: expected a multiple of num_heads=2, got 3"),
        ({"num_v_heads": 0}, "num_v_heads: expected a multiple of num_heads=2, got 0"),
        ({"head_k_dim": 0}, "head_k_dim: expected a positive integer, got 0"),
        ({"hidden_size": 25}, "head_k_dim: expected a positive integer, got 9.375"),
        ({"head_v_dim": -1}, "head_v_dim: expected a positive integer, got -1"),
        ({"head_v_dim": 8, "expand_v": 2.0}, "expand_v: expected None together with head_v_dim, got 2.0"),
        ({"conv_size": 5}, "conv_size: expected 2 to 4, got 5"),
        ({"conv_size": 1}, "conv_size: expected 2 to 4, got 1"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet(**{"hidden_size": 24, "num_heads": 2, **arguments})


def state_with(**changes):
    return {**make().init_state(2), **changes}


BAD_CALLS = {
    "not a tensor": (TypeError, {"hidden_states": [1.0]}, r"hidden_states: expected a torch\.Tensor, got list"),
    "dimensions": (ValueError, {"hidden_states": make_input(5)}, r"hidden_states: expected shape \[B, T, 24\], got"),
    "width": (ValueError, {"hidden_states": torch.ones(2, 5, 7)}, r"hidden_states: expected .* got \(2, 5, 7\)"),
    "dtype": (TypeError, {"hidden_states": make_input(2, 5).float()}, r"hidden_states: expected dtype torch\.float64"),
    "device": (ValueError, {"hidden_states": make_input(2, 5).to("meta")}, "hidden_states: expected device cpu"),
    "mask type": (TypeError, {"attention_mask": [[1]]}, r"attention_mask: expected a torch\.Tensor, got list"),
    "mask shape": (ValueError, {"attention_mask": torch.ones(2, 4)}, r"attention_mask: expected shape \(2, 5\)"),
    "mask device": (ValueError, {"attention_mask": torch.ones(2, 5, device="meta")}, "attention_mask: expected device"),
    "lengths shape": (ValueError, {"lengths": torch.ones(3).long()}, r"lengths: expected shape \(2,\), got \(3,\)"),
    "lengths dtype": (TypeError, {"lengths": torch.ones(2)}, "lengths: expected an integer dtype, got torch.float32"),
    "lengths long": (ValueError, {"lengths": torch.tensor([1, 6])}, r"lengths: expected .* in \[0, 5\], got 6"),
    "lengths negative": (ValueError, {"lengths": torch.tensor([-1, 5])}, r"lengths: expected .* in \[0, 5\], got -1"),
    "two at once": (
        ValueError,
        {"attention_mask": torch.ones(2, 5), "lengths": torch.ones(2).long()},
        "attention_mask: expected None together with lengths, got both",
    ),
    "cu_seqlens type": (TypeError, {"cu_seqlens": [0, 5]}, r"cu_seqlens: expected a torch\.Tensor, got list"),
    "cu_seqlens batch": (ValueError, {"cu_seqlens": torch.tensor([0, 5])}, "hidden_states: expected batch size 1"),
    "state type": (ValueError, {"state": make_input(2, 5)}, "state: expected a dict of recurrent, conv, got Tensor"),
    "state keys": (ValueError, {"state": {"conv": 1}}, r"state: expected a dict of recurrent, conv, got \['conv'\]"),
    "state shape": (
        ValueError,
        {"state": state_with(conv=torch.zeros(1, 56, 3))},
        r"state\['conv'\]: expected shape \(2, 56, 3\), got \(1, 56, 3\)",
    ),
    "state dtype": (
        TypeError,
        {"state": state_with(recurrent=torch.zeros(2, 2, 8, 12).long())},
        r"state\['recurrent'\]: expected dtype",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    kind, arguments, message = BAD_CALLS[case]
    with pytest.raises(kind, match=message):
        make()(**{"hidden_states": make_input(2, 5), **arguments})
