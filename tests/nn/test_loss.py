"""linear_cross_entropy: values and gradients in parts, dtypes, autocast, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gdn_ops.nn import linear_cross_entropy, loss
from tests.oracle import DEVICES, TOLERANCE, assert_close

on_devices = pytest.mark.parametrize("device", DEVICES)
V, D = 300, 32


def samples(*rows, dtype=torch.float32, device="cpu"):
    """``x [*rows, D]``, a weight that makes the softmax uneven, and targets of which some are not scored."""
    torch.manual_seed(0)
    x, weight = torch.randn(*rows, D), torch.randn(V, D) * 0.3
    targets = torch.randint(V, rows)
    targets.view(-1)[::5] = -100
    x, weight = (y.to(device, dtype).requires_grad_() for y in (x, weight))
    return x, weight, targets.to(device)


def by_torch(x, weight, targets):
    """Loss and gradients in fp64, on the CPU."""
    x, weight = (y.detach().double().cpu().requires_grad_() for y in (x, weight))
    value = F.cross_entropy((x @ weight.T).flatten(0, -2), targets.flatten().cpu())
    return value, *torch.autograd.grad(value, (x, weight))


@on_devices
@pytest.mark.parametrize("chunks", [None, 1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype, chunks, device):
    """111 rows: parts of unequal length."""
    x, weight, targets = samples(3, 37, dtype=dtype, device=device)
    value = linear_cross_entropy(x, weight, targets, chunks)
    dx, dweight = torch.autograd.grad(value, (x, weight))
    want, want_dx, want_dweight = by_torch(x, weight, targets)
    tol = max(TOLERANCE[dtype].grads, 1e-6)  # the softmax is in fp32, whatever the inputs are in
    assert value.dtype == torch.float32 and dx.dtype == dweight.dtype == dtype
    assert_close(value, want, max(TOLERANCE[dtype].values, 1e-6), "loss")
    assert_close(dx, want_dx, tol, "dx")
    assert_close(dweight, want_dweight, tol, "dweight")
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, targets, chunks), value)


@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (2, 4)], ids=str)
def test_fewer_rows_than_parts(rows):
    x, weight, targets = samples(*rows)
    targets = targets.clamp(min=0)
    value = linear_cross_entropy(x, weight, targets, 4)
    got = value, *torch.autograd.grad(value, (x, weight))
    want = by_torch(x, weight, targets) if x.numel() else (torch.tensor(0.0), x.detach(), torch.zeros_like(weight))
    for name, y, z in zip(("loss", "dx", "dweight"), got, want):
        assert_close(y, z, 1e-5, name)


def test_nothing_to_score():
    x, weight, targets = samples(9)
    value = linear_cross_entropy(x, weight, torch.full_like(targets, -100), 4)
    value.backward()
    assert value.item() == 0 and not x.grad.any() and not weight.grad.any()


@on_devices
def test_autocast(device):
    """Products in bf16 on fp32 weights, whose gradients are fp32; the loss is scaled after rounding, not before."""
    x, weight, targets = samples(2, 50, device=device)
    with torch.autocast(device, torch.bfloat16):
        value = linear_cross_entropy(x, weight, targets, 4)
    dx, dweight = torch.autograd.grad(value * 1e-30, (x, weight))
    low = [y.detach().bfloat16() for y in (x, weight)]
    want, want_dx, want_dweight = by_torch(*low, targets)
    bound = TOLERANCE[torch.bfloat16]
    assert dx.dtype == dweight.dtype == torch.float32
    assert_close(value, want, bound.values, "loss")
    assert_close(dx * 1e30, want_dx, bound.grads, "dx")
    assert_close(dweight * 1e30, want_dweight, bound.grads, "dweight")


def test_fp16_keeps_small_gradients():
    """Divided by the number of targets first, most of fp16's gradients of the logits would be 0."""
    x, weight, targets = samples(20000, dtype=torch.float16)
    value = linear_cross_entropy(x, weight, targets, 8)
    (dx,) = torch.autograd.grad(value * 2.0**14, (x,))
    want = by_torch(x, weight, targets)[1] * 2.0**14
    assert_close(dx, want, TOLERANCE[torch.float16].grads, "dx")


@on_devices
@pytest.mark.parametrize("autocast", [False, True], ids=["fp16", "autocast"])
def test_fp16_sums_over_tokens_do_not_overflow(autocast, device):
    """20000 tokens of 16 come to 320000 before they are divided; fp16 ends at 65504."""
    dtype = torch.float32 if autocast else torch.float16
    x = (torch.ones(20000, D) * 16).to(device, dtype).requires_grad_()
    weight, targets = (
        torch.zeros(4, D, dtype=dtype, device=device, requires_grad=True),
        torch.zeros(20000, device=device),
    )
    with torch.autocast(device, torch.float16, enabled=autocast):
        value = linear_cross_entropy(x, weight, targets.long(), 8)
    (value * 100).backward()
    assert_close(weight.grad[:, 0], torch.tensor([-1200.0, 400.0, 400.0, 400.0]), 2e-3, "dweight")
    assert weight.grad.dtype == x.grad.dtype == dtype and not x.grad.any()


def test_fp16_part_of_the_loss():
    """A power of two; 1 wherever sums have room, without tokens and with zeros, too."""
    x = torch.ones(1000, 3, dtype=torch.float16)
    for scale, want in ((0, 1), (32, 1), (33, 1 / 2), (1000, 1 / 32)):
        assert loss._part_for_fp16(x * scale) == want
    assert loss._part_for_fp16(x[:0]) == 1


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_gradient_alone(frozen):
    x, weight, targets = samples(30)
    want = by_torch(x, weight, targets)
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    linear_cross_entropy(x, weight, targets, 4).backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")
    assert_close(weight.grad if frozen == "x" else x.grad, want[2 if frozen == "x" else 1], 1e-5, "gradient")


def test_twice_the_same_bits_checkpointed_too():
    x, weight, targets = samples(2, 77)

    def run(function):
        value = function(x, weight, targets, 4)
        return value, *torch.autograd.grad(value, (x, weight), retain_graph=True), *torch.autograd.grad(value, x)

    first, again = run(linear_cross_entropy), run(linear_cross_entropy)
    checkpointed = run(lambda *args: checkpoint(linear_cross_entropy, *args, use_reentrant=False, early_stop=False))
    for a, b, c in zip(first, again, checkpointed):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(first[1], first[3])


def test_second_derivatives_are_refused():
    x, weight, targets = samples(9)
    for value in (linear_cross_entropy(x, weight, targets), linear_cross_entropy(x, weight, targets).square()):
        with pytest.raises(RuntimeError, match="expected to be differentiated once, got create_graph=True"):
            torch.autograd.grad(value, x, create_graph=True)


def test_transforms_of_torch_func():
    """Per-sample gradients and a Hessian: as of the cross-entropy of all logits."""
    x, weight, targets = (y.detach() for y in samples(4, 6))

    def plain(x, weight, targets):
        return F.cross_entropy(x @ weight.T, targets)

    def per_sample(f):
        return torch.vmap(torch.func.grad(f, (0, 1)), (0, None, 0))(x, weight, targets)

    def hessian(f):
        return torch.func.hessian(f)(x[0], weight, targets[0])

    def scaled(x, weight, targets):
        return linear_cross_entropy(x * 1.0, weight * 1.0, targets)

    for transform in (per_sample, hessian):
        for got, want in zip(transform(linear_cross_entropy), transform(plain)):
            assert_close(got, want, 1e-5, "derivative")
        torch._dynamo.reset()
        compiled = torch.compile(lambda transform=transform: transform(scaled), backend="aot_eager", fullgraph=True)
        for got, want in zip(compiled(), transform(plain)):
            assert_close(got, want, 1e-5, "compiled derivative")


def test_one_row_without_other_dimensions():
    x, weight, targets = samples(3)
    got = linear_cross_entropy(x[1], weight, targets[1])
    got.backward()
    assert_close(got, F.cross_entropy(x[1] @ weight.T, targets[1]), 1e-6, "loss")
    assert x.grad[1].any() and not x.grad[0].any()


def test_shapes_without_numbers():
    with torch.device("meta"):
        value = linear_cross_entropy(torch.randn(3, 8), torch.randn(20, 8), torch.zeros(3, dtype=torch.int64))
    assert value.shape == () and value.dtype == torch.float32


def test_the_loss_is_fp32_whatever_the_default_dtype():
    x, weight, targets = samples(9)
    try:
        torch.set_default_dtype(torch.float64)
        assert linear_cross_entropy(x, weight, targets).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


class Largest(TorchDispatchMode):
    """The largest number of elements that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("chunks, parts", [(None, 4), (1, 1), (8, 8)])
def test_nothing_is_as_large_as_the_logits(chunks, parts):
    """The default: 300 / 64 is 4 parts, rounded down to a power of two."""
    x, weight, targets = samples(640)
    with Largest() as mode:
        linear_cross_entropy(x, weight, targets, chunks).backward()
    assert mode.elements == 640 * V // parts


X, WEIGHT, TARGETS = (t.detach() for t in samples(2, 3))
REFUSED = {
    "x": (TypeError, (3, WEIGHT, TARGETS), r"x: expected a torch\.Tensor, got int"),
    "weight": (
        ValueError,
        (X, WEIGHT[:, :5], TARGETS),
        r"weight: expected \[V, D\] for x \[\.\.\., D\], got \(300, 5\)",
    ),
    "no features": (
        ValueError,
        (X[..., :0], WEIGHT[:, :0], TARGETS),
        r"x: expected \[\.\.\., D\] with D of at least 1",
    ),
    "weight device": (ValueError, (X, WEIGHT.to("meta"), TARGETS), r"weight: expected device cpu \(as x\), got meta"),
    "targets device": (ValueError, (X, WEIGHT, TARGETS.to("meta")), r"targets: expected device cpu \(as x\), got meta"),
    "targets shape": (ValueError, (X, WEIGHT, TARGETS[:1]), r"targets: expected shape \(2, 3\), got \(1, 3\)"),
    "targets dtype": (TypeError, (X, WEIGHT, TARGETS.int()), r"targets: expected dtype torch\.int64, got torch\.int32"),
    "targets range": (ValueError, (X, WEIGHT, TARGETS + V), r"targets: expected -100 or numbers in \[0, 300\), got 3"),
    "dtypes": (
        TypeError,
        (X, WEIGHT.double(), TARGETS),
        r"weight: expected dtype torch\.float32 \(as x\)",
    ),
    "integers": (TypeError, (X.long(), WEIGHT, TARGETS), r"x, weight: expected floating dtypes, got torch\.int64"),
    "chunks": (ValueError, (X, WEIGHT, TARGETS, 0), "chunks: expected at least 1, got 0"),
    "chunks type": (TypeError, (X, WEIGHT, TARGETS, 2.0), "chunks: expected an integer, got 2.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_the_argument(case):
    kind, arguments, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        linear_cross_entropy(*arguments)


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_gradient_that_nobody_asked_for(frozen, dtype):
    """As with adapters on a frozen head: neither computed nor kept until the backward pass."""
    x, weight = torch.randn(64, 16, dtype=dtype), torch.randn(1000, 16, dtype=dtype)
    targets, other = torch.randint(1000, (64,)), {"x": weight, "weight": x}[frozen]
    x.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(x, weight, targets).backward()
    want, other.grad = other.grad, None
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(tuple(y.shape)) or y, lambda y: y):
        loss = linear_cross_entropy(x, weight, targets)
    assert tuple(other.shape) in kept and {"x": (64, 16), "weight": (1000, 16)}[frozen] not in kept
    loss.backward()
    assert torch.equal(other.grad, want)
