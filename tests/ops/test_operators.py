"""What every operator owes the dispatcher: opcheck, exact fakes, autocast, vmap, FLOP counts, a save list."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import gdn_ops
from tests.ops.samples import LAYOUTS, NAMES, named
from tests.oracle import DEVICES, assert_close, make_conv_inputs, make_inputs, make_inputs_of

on_devices = pytest.mark.parametrize("device", DEVICES)
every_operator = pytest.mark.parametrize("name", NAMES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
with_and_without_state = pytest.mark.parametrize("state", [False, True], ids=["stateless", "state"])


def sample(name, layout, state, **options):
    found = named(name, layout, state, **options)
    if found is None:
        pytest.skip(f"{name} takes no cu_seqlens")
    return found


def test_every_operator_of_the_namespace_is_covered():
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("gdn::")}
    assert registered == set(NAMES) == set(gdn_ops.ops.__all__) - {"batch_invariant", "save_list"}


@on_devices
@every_operator
@every_layout
@with_and_without_state
def test_opcheck(name, layout, state, device):
    op, args = sample(name, layout, state, device=device, requires_grad=True)
    torch.library.opcheck(op, args)


@on_devices
@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_dtypes(name, device, dtype):
    op, args = sample(name, "grouped", True, device=device, dtype=dtype, requires_grad=True)
    torch.library.opcheck(op, args)


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


@on_devices
@every_operator
@every_layout
@with_and_without_state
@pytest.mark.parametrize("T", [1, 5, 64])
def test_fakes_are_exact(name, layout, state, device, T):
    """Shape, stride, offset, dtype and device of the real results; each result in memory of its own."""
    T = max(T, 2) if layout == "packed" else T
    op, args = sample(name, layout, state, device=device, T=T)
    real = outputs_of(op(*args))
    with FakeTensorMode() as mode:
        fake = outputs_of(op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)))
    assert len(real) == len(fake)
    for r, f in zip(real, fake):
        assert (r.shape, r.stride(), r.storage_offset()) == (f.shape, f.stride(), f.storage_offset())
        assert (r.dtype, r.device) == (f.dtype, f.device)
    storages = [t.untyped_storage().data_ptr() for t in (*real, *args) if isinstance(t, torch.Tensor) and t.numel()]
    inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and t.numel()}
    fresh = [t.untyped_storage().data_ptr() for t in real if t.numel()]
    assert len(set(fresh)) == len(fresh) and not inputs & set(fresh), storages


@every_operator
@pytest.mark.parametrize("layout", ["grouped", "packed"])
def test_fakes_under_symbolic_sizes(name, layout):
    """B, T and N stay symbols: no guard, no host sync, no data-dependent size."""
    op, args = sample(name, layout, True, T=7)
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env) as mode:
        fakes = []
        for a in args:
            if isinstance(a, torch.Tensor):
                from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

                context = StatelessSymbolicContext(
                    [DimDynamic.DYNAMIC if i < 2 and size > 1 else DimDynamic.STATIC for i, size in enumerate(a.shape)]
                )
                a = mode.from_tensor(a, symbolic_context=context)
            fakes.append(a)
        results = outputs_of(op(*fakes))
    real = outputs_of(op(*args))
    for r, f in zip(real, results):
        assert tuple(int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in f.shape) == tuple(r.shape)
    assert any(isinstance(s, torch.SymInt) for f in results for s in f.shape)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("backward")])
@on_devices
def test_autocast_casts_tokens_not_gates_nor_states(name, device):
    """q, k, v (x, weight, bias) take the autocast dtype; g, beta and recurrent states keep theirs."""
    op, args = sample(name, "dense", True, device=device)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op:
                seen.append([a.dtype if isinstance(a, torch.Tensor) else a for a in args])
            return func(*args, **(kwargs or {}))

    with torch.autocast(device, dtype=torch.bfloat16), Spy():
        results = outputs_of(op(*args))
    (dtypes,) = seen
    cast = {"causal_conv1d": 4, "causal_conv1d_update_": 3}.get(name, 3)
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor):
            assert dtypes[i] == (torch.bfloat16 if i < cast else a.dtype), f"argument {i}"
    assert results[0].dtype == torch.bfloat16
    if "gated" in name and len(results) > 1:
        assert results[1].dtype == torch.float32


@on_devices
def test_autocast_leaves_fp64_alone_and_gradients_in_the_inputs_dtype(device):
    x = make_inputs(1, 5, 1, 1, 8, 8, torch.float64, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert gdn_ops.chunk_gated_delta_rule(**x)[0].dtype == torch.float64
    y = make_inputs(1, 5, 1, 1, 16, 16, torch.float32, device)
    q = y["q"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        o, _ = gdn_ops.chunk_gated_delta_rule(**y)
    o.float().sum().backward()
    assert o.dtype == torch.bfloat16 and q.grad.dtype == torch.float32


@on_devices
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name, device):
    """Batched at different dims, one tensor shared by all slices; in-place operators write the batched pool."""
    shared = 4 if "gated" in name else 1
    slices = [sample(name, "grouped", True, device=device)[1] for _ in range(3)]
    op = sample(name, "grouped", True, device=device)[0]
    for n, args in enumerate(slices):
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor) and a.is_floating_point() and i != shared:
                a.mul_(1 - 0.2 * n)
    in_dims, batched = [], []
    for i, column in enumerate(zip(*slices)):
        if isinstance(column[0], torch.Tensor) and i != shared:
            dim = i % 2
            in_dims.append(dim)
            batched.append(torch.stack(column, dim=dim))
        else:
            in_dims.append(None)
            batched.append(column[0])
    scalars = {i: a for i, a in enumerate(batched) if not isinstance(a, torch.Tensor)}
    tensors = [i for i in range(len(batched)) if i not in scalars]

    def call(*given):
        args = dict(zip(tensors, given))
        return op(*(args.get(i, scalars.get(i)) for i in range(len(batched))))

    got = outputs_of(torch.vmap(call, tuple(in_dims[i] for i in tensors))(*(batched[i] for i in tensors)))
    want = [outputs_of(op(*(slices[0][i] if i == shared else a for i, a in enumerate(args)))) for args in slices]
    for g, *w in zip(got, *want):
        assert torch.equal(g, torch.stack(w))
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None:
            assert torch.equal(batched[i], torch.stack([args[i] for args in slices], dim=in_dims[i]))


def test_vmap_refuses_to_write_one_pool_from_many_slices():
    x = make_inputs(1, 1, 1, 1, 4, 4)
    pool = torch.zeros(1, 1, 4, 4)

    def step(v):
        return gdn_ops.recurrent_gated_delta_rule_(x["q"], x["k"], v, x["g"], x["beta"], pool)

    with pytest.raises(ValueError, match="state: expected a batch dimension"):
        torch.vmap(step)(x["v"].expand(3, *x["v"].shape))


@on_devices
@pytest.mark.parametrize(
    "function",
    [
        gdn_ops.chunk_gated_delta_rule,
        gdn_ops.recurrent_gated_delta_rule,
        gdn_ops.chunk_gated_linear_attention,
        gdn_ops.recurrent_gated_linear_attention,
    ],
)
def test_vmap_of_grad(function, device):
    """Per-sample gradients: ``vmap(grad(f))`` is a loop of ``grad(f)``."""
    x = make_inputs_of(function, 3, 5, 1, 2, 16, 8, device=device)

    def loss(*tokens):
        o, state = function(*(t[None] for t in tokens), output_final_state=True)
        return o.square().sum() + state.square().sum()

    tensors = [x[n] for n in ("q", "k", "v", "g", "beta") if n in x]
    got = torch.vmap(torch.func.grad(loss, argnums=tuple(range(len(tensors)))))(*tensors)
    for b in range(3):
        leaves = [t[b].clone().requires_grad_() for t in tensors]
        for g, w in zip(got, torch.autograd.grad(loss(*leaves), leaves)):
            assert_close(g[b], w, 1e-6, "gradient")


@on_devices
def test_vmap_of_grad_of_the_convolution(device):
    x = make_conv_inputs(3, 5, 4, 4, device=device)

    def loss(row, weight):
        return gdn_ops.causal_conv1d(row[None], weight, activation="silu")[0].square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x["x"], x["weight"])
    for b in range(3):
        leaves = [t.clone().requires_grad_() for t in (x["x"][b], x["weight"])]
        for g, w in zip(got, torch.autograd.grad(loss(*leaves), leaves)):
            assert_close(g[b], w, 1e-6, "gradient")


def test_flops():
    """Linear in T and HV, about the chunkwise products, three times as many backward; every operator counts."""

    def count(T, HV):
        x = make_inputs(1, T, 2, HV, 64, 64)
        x["q"].requires_grad_()
        with FlopCounterMode(display=False) as forward:
            o, _ = gdn_ops.chunk_gated_delta_rule(**x)
        with FlopCounterMode(display=False) as backward:
            o.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = count(128, 2)
    assert count(256, 2)[0] == count(128, 4)[0] == 2 * forward
    assert backward == 3 * forward
    C, K, V = 64, 64, 64
    products = 2 * C * C * K + C * C * (K + V) + C * C * V + 3 * C * K * V
    assert 2 * 2 * 2 * products <= forward <= 1.25 * 2 * 2 * 2 * products
    for name in NAMES:
        op, args = sample(name, "dense", True)
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() > 0, name


@on_devices
def test_save_list_keeps_the_operator_from_running_twice(device):
    x = make_inputs(1, 5, 1, 1, 16, 16, device=device)
    q = x["q"].requires_grad_()
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    def block(q):
        return gdn_ops.chunk_gated_delta_rule(**{**x, "q": q * 2})[0].sin()

    def contexts():
        return create_selective_checkpoint_contexts(gdn_ops.ops.save_list())

    with Count():
        checkpoint(block, q, use_reentrant=False, context_fn=contexts).sum().backward()
    got, want = q.grad, torch.autograd.grad(block(q).sum(), q)[0]
    assert calls.count(torch.ops.gdn.chunk_gated_delta_rule.default) == 1
    assert calls.count(torch.ops.gdn.chunk_gated_delta_rule_backward.default) == 1
    assert_close(got, want, 1e-6, "dq")


def test_flops_token_by_token():
    """The products of a token with the state: what it holds under the key, the write, the read; no chunk."""
    x = make_inputs(2, 3, 2, 4, 16, 8)
    with FlopCounterMode(display=False) as counter:
        gdn_ops.recurrent_gated_delta_rule(**x)
    assert counter.get_total_flops() == 2 * (2 * 3 * 4) * 3 * 16 * 8
    with FlopCounterMode(display=False) as counter:
        gdn_ops.recurrent_gated_linear_attention(*(x[name] for name in "qkvg"))
    assert counter.get_total_flops() == 2 * (2 * 3 * 4) * 2 * 16 * 8


def test_flops_are_counted_whoever_asked_for_the_counter_before():
    """In a process of its own, where nothing has imported the counter: looking for it is not importing it."""
    script = """
import importlib.util, torch, gdn_ops
assert importlib.util.find_spec("torch.utils.flop_counter") and importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import flop_registry
assert torch.ops.gdn.chunk_gated_delta_rule in flop_registry
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@on_devices
def test_vmap_over_nothing(device):
    x = make_inputs(2, 5, 2, 4, 16, 8, device=device)
    tensors = [x[name][None] for name in ("q", "k", "v", "g", "beta")]
    for function in (gdn_ops.chunk_gated_delta_rule, gdn_ops.recurrent_gated_delta_rule):
        mapped = torch.vmap(lambda *args: function(*args, output_final_state=True))  # noqa: B023
        for some, none in zip(mapped(*tensors), mapped(*(y[:0] for y in tensors))):
            assert none.shape == (0, *some.shape[1:]) and none.dtype == some.dtype
