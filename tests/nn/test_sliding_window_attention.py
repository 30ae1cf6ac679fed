"""Sliding-window attention against dense masked softmax; ring state, padding, packed sequences, memory, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdn_ops.nn import SlidingWindowAttention
from tests.memory import with_memory
from tests.nn import plain
from tests.nn.samples import AGREEMENT, LAYOUTS, LENGTHS, mask, padded, rows
from tests.oracle import DEVICES, TOLERANCE, assert_close, error

WIDTH = 16
on_devices = pytest.mark.parametrize("device", DEVICES)
# From one token to more than the 70 of a sequence. Blocks are as long as the window, but 128 at most without gradients.
every_window = pytest.mark.parametrize("window", [1, 5, 24, 200])


def make(window=5, num_kv_heads=2, dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(0)
    return SlidingWindowAttention(WIDTH, 4, num_kv_heads, window=window, **options).to(device, dtype)


def make_input(*shape, dtype=torch.float64, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_same_state(got, want, tol=1e-11):
    """The rings where they are filled, and the positions."""
    assert got.keys() == want.keys() and torch.equal(got["position"], want["position"])
    window = want["key"].shape[1]
    filled = torch.arange(window, device=want["position"].device) < want["position"][:, None]
    for name in ("key", "value"):
        assert_close(got[name][filled], want[name][filled], tol, name)


@on_devices
@every_window
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(window, num_kv_heads, dtype, device):
    layer = make(window, num_kv_heads, dtype, device)
    x = make_input(2, 70, dtype=dtype, device=device).requires_grad_()
    y, nothing = layer(x)
    dy = make_input(2, 70, dtype=dtype, device=device, seed=2)
    y.backward(dy)
    weights, x_wide = plain.wide(layer), x.detach().cpu().double().requires_grad_()
    want = plain.sliding_window_attention(layer, weights, x_wide)
    want.backward(dy.cpu().double())
    assert nothing is None
    assert_close(y, want, TOLERANCE[dtype].values, "y")
    if window > 1:  # one token's softmax is 1 whatever its score, and some gradients are zero but for rounding
        assert_close(x.grad, x_wide.grad, TOLERANCE[dtype].grads, "dx")
        for name, p in layer.named_parameters():
            assert_close(p.grad, weights[name].grad, TOLERANCE[dtype].grads, "d" + name)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("T", [1, 127, 128, 129, 300, 1100])
@pytest.mark.parametrize("window", [100, 128, 129, 300, 600])
def test_block_boundaries(window, T, gradients):
    """Lengths and windows around the sizes of blocks, which differ with and without gradients; whole and in two."""
    layer, x = make(window), make_input(1, T)
    with torch.set_grad_enabled(gradients):
        want = plain.sliding_window_attention(layer, plain.wide(layer), x)
        y, state = layer(x, output_state=True)
        assert_close(y, want, 1e-11, "y")
        first, halfway = layer(x[:, : T // 3 + 1], output_state=True)
        last, state_of_two = layer(x[:, T // 3 + 1 :], state=halfway) if T > 1 else (x[:, 1:], halfway)
    assert_close(torch.cat([first, last], 1), want, 1e-11, "y in two")
    assert_same_state(state_of_two, state)


def test_other_head_dim_and_theta():
    layer, x = make(7, head_dim=10, rope_theta=123.0), make_input(2, 20)
    assert layer.qkv_proj.weight.shape == (4 * 10 + 2 * 2 * 10, WIDTH)
    assert_close(layer(x)[0], plain.sliding_window_attention(layer, plain.wide(layer), x), 1e-11, "y")


@on_devices
def test_bf16(device):
    layer, x = make(24, 2, torch.bfloat16, device), make_input(2, 70, dtype=torch.bfloat16, device=device)
    y, state = layer(x, output_state=True)
    assert y.dtype == state["key"].dtype == torch.bfloat16 and state["position"].dtype == torch.int64
    want = plain.sliding_window_attention(layer, plain.wide(layer), x.cpu().double())
    assert_close(y, want, 3 * TOLERANCE[torch.bfloat16].values, "y")


@on_devices
def test_autocast_keeps_the_ring_as_it_is(device):
    layer, x = make(24, 2, torch.float32, device), make_input(2, 70, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, state = layer(x, state=layer.init_state(2))
        _, state = layer(x[:, :1], state=state)
    assert y.dtype == torch.bfloat16 and state["key"].dtype == torch.float32
    want = plain.sliding_window_attention(layer, plain.wide(layer), x.cpu().double())
    assert 1e-4 < error(y, want) < 3 * TOLERANCE[torch.bfloat16].values


@on_devices
@every_window
@torch.no_grad()
def test_split_prefill_and_steps_equal_the_whole(window, device):
    """The ring wraps around: in the middle of a prefill, in steps, and several times at once."""
    dtype, tol = AGREEMENT[device]
    layer, x = make(window, dtype=dtype, device=device), make_input(2, 70, dtype=dtype, device=device)
    whole, whole_state = layer(x, output_state=True)
    state, parts = None, []
    for start, end in ((0, 3), (3, 4), (4, 31), (31, 32), (32, 33), (33, 35), (35, 70)):
        y, state = layer(x[:, start:end], state=state, output_state=True)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, tol, "y")
    assert_same_state(state, whole_state, tol)


@torch.no_grad()
def test_many_steps_past_wrap_around():
    layer, x = make(5), make_input(2, 23)
    want = plain.sliding_window_attention(layer, plain.wide(layer), x)
    state = layer.init_state(2)
    for t in range(23):
        y, state = layer(x[:, t : t + 1], state=state)
        assert_close(y[:, 0], want[:, t], 1e-11, f"y at {t}")
        assert state["position"].tolist() == [t + 1] * 2 and state["key"].shape == (2, 5, 2, 4)


@torch.no_grad()
def test_rows_at_different_positions_step_together():
    layer = make(5)
    _, ahead = layer(make_input(1, 9), output_state=True)
    _, behind = layer(make_input(1, 2, seed=4), output_state=True)
    both = {n: torch.cat([ahead[n], behind[n]]) for n in ahead}
    for T in (1, 3):
        x = make_input(2, T, seed=5)
        y, state = layer(x, state=both)
        for row, own in enumerate((ahead, behind)):
            want, want_state = layer(x[row : row + 1], state=own)
            assert_close(y[row : row + 1], want, 1e-11, "y")
            assert_same_state({n: s[row : row + 1] for n, s in state.items()}, want_state)


@pytest.mark.parametrize("T", [1, 4, 12])
def test_a_state_is_not_written(T):
    layer = make(5)
    _, state = layer(make_input(2, 7), output_state=True)
    before = {n: s.clone() for n, s in state.items()}
    layer(make_input(2, T), state=state)
    layer(make_input(2, T), state=state, attention_mask=torch.ones(2, T))
    assert all(torch.equal(state[n], before[n]) for n in before)


def test_a_state_of_zeros_is_no_state():
    layer, x = make(5), make_input(2, 9)
    assert_close(layer(x, state=layer.init_state(2))[0], layer(x)[0], 1e-12, "y")
    assert tuple(layer.init_state(1)) == layer.state_names
    state = layer.init_state(3, dtype=torch.bfloat16)
    assert state["value"].shape == (3, 5, 2, 4) and state["value"].dtype == torch.bfloat16


def test_gradients_pass_through_the_ring():
    layer, x = make(5), make_input(2, 12).requires_grad_()
    whole, _ = layer(x)
    want = torch.autograd.grad(whole[:, 6:].square().sum(), x)[0]
    _, state = layer(x[:, :6], output_state=True)
    late, state = layer(x[:, 6:11], state=state)
    last, _ = layer(x[:, 11:], state=state)
    got = torch.autograd.grad(torch.cat([late, last], 1).square().sum(), x)[0]
    assert_close(got, want, 1e-11, "dx")


@on_devices
@every_window
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_equals_unpadded_rows(window, layout, device):
    """With a ring going in, on any side, whatever stands at the padding."""
    dtype, tol = AGREEMENT[device]
    layer, attention_mask = make(window, dtype=dtype, device=device), mask(layout, device=device)
    x = rows(WIDTH, dtype, device)
    _, start = layer(make_input(len(LENGTHS), 6, dtype=dtype, device=device), output_state=True)
    y, state = layer(padded(x, attention_mask), attention_mask, start)
    for row, tokens in enumerate(x):
        own = {n: s[row : row + 1] for n, s in start.items()}
        want, want_state = layer(tokens, state=own)
        assert_close(y[row, attention_mask[row] == 1], want[0], tol, f"y of row {row}")
        assert_same_state({n: s[row : row + 1] for n, s in state.items()}, want_state, tol)


def test_one_padded_token_is_no_step():
    """T=1 with a row of padding: that row's ring must stay."""
    layer = make(5)
    _, start = layer(make_input(2, 6), output_state=True)
    _, state = layer(make_input(2, 1), torch.tensor([[0], [1]]), start)
    assert state["position"].tolist() == [6, 7]
    assert torch.equal(state["key"][0], start["key"][0]) and not torch.equal(state["key"][1], start["key"][1])


@on_devices
@every_window
def test_packed_equals_separate(window, device):
    dtype, tol = AGREEMENT[device]
    layer, x = make(window, dtype=dtype, device=device), rows(WIDTH, dtype, device)
    bounds = torch.tensor([0, 0, *LENGTHS], device=device).cumsum(0).int()
    y, _ = layer(torch.cat(x, 1), cu_seqlens=bounds)
    want = torch.cat([layer(tokens)[0] for tokens in x], 1)
    assert_close(y, want, tol, "y")


class LargestResult(TorchDispatchMode):
    """The size of the largest tensor that any operator returns while it is on."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(results) if torch.is_tensor(x))])
        return results


@pytest.mark.parametrize("grouped", [False, True])
def test_memory_grows_with_length_times_window(grouped):
    """Forward, backward and the state: no tensor of T x T numbers, and twice the length gives twice the largest."""
    largest = {}
    for T in (1024, 2048):
        layer, x = make(16, 1 if grouped else 4), make_input(1, T).requires_grad_()
        with LargestResult() as mode:
            y, _ = layer(x, state=layer.init_state(1))
            y.sum().backward()
        largest[T] = mode.numel
    assert largest[2048] <= 4 * 2 * (2048 + 32) * (16 + 16) < 2048 * 2048 / 4
    assert largest[2048] < 2.1 * largest[1024]


@pytest.mark.gpu
@torch.no_grad()
def test_memory_on_cuda():
    """The paper's window over 32768 tokens, where a dense mask and scores alone would take 8 GiB."""
    layer = SlidingWindowAttention(256, 4, 2, window=2048).to("cuda", torch.bfloat16)
    x = torch.randn(1, 32768, 256, device="cuda", dtype=torch.bfloat16)
    _, peak = with_memory(lambda: layer(x))
    assert peak < 4 * 2**30


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads=4, got 3"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected a divisor of num_heads=4, got 0"),
        ({"hidden_size": 18}, "num_heads: expected a divisor of hidden_size=18, got 4"),
        ({"head_dim": 3}, "head_dim: expected a positive even number, got 3"),
        ({"hidden_size": 12}, "head_dim: expected a positive even number, got 3"),
        ({"window": 0}, "window: expected at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(**{"hidden_size": 16, "num_heads": 4, **arguments})


def state_with(**changes):
    return {**make().init_state(2), **changes}


PACKED = {"hidden_states": make_input(1, 5), "cu_seqlens": torch.tensor([0, 5])}
BAD_CALLS = {
    "not a tensor": (TypeError, {"hidden_states": None}, r"hidden_states: expected a torch\.Tensor, got NoneType"),
    "width": (ValueError, {"hidden_states": torch.ones(2, 5, 7)}, r"hidden_states: expected shape \[B, T, 16\], got"),
    "dtype": (TypeError, {"hidden_states": make_input(2, 5).float()}, r"hidden_states: expected dtype torch\.float64"),
    "mask": (ValueError, {"attention_mask": torch.ones(5)}, r"attention_mask: expected shape \(2, 5\), got \(5,\)"),
    "bounds": (ValueError, {**PACKED, "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: expected a non-decreasing"),
    "packed state": (ValueError, {**PACKED, "output_state": True}, "cu_seqlens: expected None with state"),
    "state keys": (ValueError, {"state": {}}, r"state: expected a dict of key, value, position, got \[\]"),
    "ring": (
        ValueError,
        {"state": state_with(key=torch.zeros(2, 6, 2, 4))},
        r"state\['key'\]: expected shape \(2, 5, 2, 4\), got \(2, 6, 2, 4\)",
    ),
    "position type": (TypeError, {"state": state_with(position=3)}, r"state\['position'\]: expected a torch\.Tensor"),
    "position dtype": (
        TypeError,
        {"state": state_with(position=torch.zeros(2))},
        r"state\['position'\]: expected dtype torch\.int64, got torch\.float32",
    ),
    "position shape": (
        ValueError,
        {"state": state_with(position=torch.zeros(3).long())},
        r"state\['position'\]: expected shape \(2,\), got \(3,\)",
    ),
    "position device": (
        ValueError,
        {"state": state_with(position=torch.zeros(2, device="meta").long())},
        r"state\['position'\]: expected device cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    kind, arguments, message = BAD_CALLS[case]
    with pytest.raises(kind, match=message):
        make()(**{"hidden_states": make_input(2, 5), **arguments})


@pytest.mark.parametrize("T", [0, 1, 5, 20])
def test_no_row(T):
    layer, x = SlidingWindowAttention(16, 2, window=4), torch.ones(0, T, 16)
    for options in ({}, {"output_state": True}, {"lengths": torch.ones(0, dtype=torch.long)}):
        assert layer(x, **options)[0].shape == (0, T, 16)
