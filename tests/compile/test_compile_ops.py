"""The functions under ``torch.compile``: one graph, any T without recompiling, right numbers, visible kernels."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import gdn_ops
from tests.oracle import (
    DEVICES,
    TOLERANCE,
    assert_all_close,
    assert_close,
    cotangents,
    expected,
    leaves,
    make_conv_inputs,
    make_inputs,
    make_inputs_of,
    on_hopper,
    run_with_gradients,
    suited,
)

FUNCTIONS = {
    "chunk": gdn_ops.chunk_gated_delta_rule,
    "recurrent": gdn_ops.recurrent_gated_delta_rule,
    "chunk_linear": gdn_ops.chunk_gated_linear_attention,
    "recurrent_linear": gdn_ops.recurrent_gated_linear_attention,
}
TOKENS = ("q", "k", "v", "g", "beta")
LENGTHS = (5, 64, 65, 130)
on_devices = pytest.mark.parametrize("device", DEVICES)
both_forms = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mark_length(inputs, dim=1):
    for name in (*TOKENS, "x"):
        if inputs.get(name) is not None:
            torch._dynamo.mark_dynamic(inputs[name], dim)
    return inputs


@both_forms
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_one_graph_for_every_length(function, packed):
    """Forward and backward at many T: one compilation, no graph break, the numbers of the specification."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    flags = suited(function, {"use_qk_l2norm_in_kernel": True})
    for i, T in enumerate(LENGTHS):
        bounds = [0, 2, 2, T] if packed else None
        x = make_inputs_of(function, 1 if packed else 2, T, 2, 4, 16, 24, initial_state=True, cu_seqlens=bounds)
        do, ds = cotangents(x)
        y = mark_length(leaves(x))
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            o, state = compiled(**y, output_final_state=True, **flags)
        names = [n for n in y if y[n] is not None and n != "cu_seqlens"]
        grads = torch.autograd.grad([o, state], [y[n] for n in names], [do, ds])
        got = {"o": o, "final_state": state, **{"d" + n: grad for n, grad in zip(names, grads)}}
        want = run_with_gradients(function, x, do, ds, **flags)
        assert_all_close(got, want, torch.float32)
    assert counter.frame_count == 1


def test_the_convolution_is_one_graph_for_every_length():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gdn_ops.causal_conv1d, backend=counter, fullgraph=True)
    for i, T in enumerate(LENGTHS):
        x = make_conv_inputs(2, T, 6, 4, initial_state=True)
        y = mark_length({n: t.clone() if t is not None else t for n, t in x.items()})
        x["weight"], y["weight"] = x["weight"].requires_grad_(), y["weight"].requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got, got_state = compiled(**y, activation="silu", output_final_state=True)
        want, want_state = gdn_ops.causal_conv1d(**x, activation="silu", output_final_state=True)
        (got.square().sum() + got_state.sum()).backward(), (want.square().sum() + want_state.sum()).backward()
        assert_close(got, want, 1e-6, "y")
        assert_close(got_state, want_state, 1e-6, "state")
        assert_close(y["weight"].grad, x["weight"].grad, 1e-6, "dweight")
    assert counter.frame_count == 1


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_trains(device, dtype):
    """The default backend: a layer-like function, forward and backward, at two lengths."""

    def layer(q, k, v, g, beta, weight):
        q, _ = gdn_ops.causal_conv1d(q.flatten(2), weight, activation="silu")
        o, _ = gdn_ops.chunk_gated_delta_rule(
            q.unflatten(2, k.shape[2:]), k, v, g, beta, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True
        )
        return o * o.sigmoid()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    weight = torch.randn(32, 4, device=device, dtype=dtype)
    for T in (70, 130):
        x = make_inputs(2, T, 2, 4, 16, 24, dtype, device)
        tensors = [x[n].requires_grad_() for n in TOKENS]
        want, got = layer(*tensors, weight), compiled(*tensors, weight)
        assert_close(got, want, 2 * TOLERANCE[dtype].values, "o")
        do = torch.randn_like(want)
        pairs = zip(torch.autograd.grad(got, tensors, do), torch.autograd.grad(want, tensors, do))
        for n, (g, w) in zip(TOKENS, pairs):
            assert_close(g, w, 2 * (TOLERANCE[dtype].gates if n in ("g", "beta") else TOLERANCE[dtype].grads), "d" + n)


@on_devices
def test_decode_in_place(device):
    """The in-place operators are functionalised and written back: the pool advances as in eager."""

    def step(q, k, v, g, beta, pool, conv_pool, weight, slots):
        x = gdn_ops.causal_conv1d_update_(v.flatten(2), conv_pool, weight, None, "silu", slots)
        return gdn_ops.recurrent_gated_delta_rule_(q, k, x.view_as(v), g, beta, pool, slots)

    compiled = torch.compile(step, fullgraph=True)
    x = make_inputs(3, 1, 2, 4, 16, 8, device=device)
    pools = [torch.randn(5, 4, 16, 8, device=device), torch.randn(5, 32, 3, device=device)]
    eager_pools = [p.clone() for p in pools]
    weight = torch.randn(32, 4, device=device)
    slots = torch.tensor([4, -1, 2], dtype=torch.int32, device=device)
    for _ in range(3):
        got = compiled(*(x[n] for n in TOKENS), *pools, weight, slots)
        want = step(*(x[n] for n in TOKENS), *eager_pools, weight, slots)
        assert_close(got, want, 1e-5, "o")
    for got, want in zip(pools, eager_pools):
        assert_close(got, want, 1e-5, "pool")


@on_devices
def test_states_of_tokens_in_place(device):
    """Drafts and then the step after the accepted ones, on one pool in one graph."""

    def verify(q, k, v, g, beta, pool, slots, drafts, accepted):
        tokens = [x.flatten(0, 1)[None] for x in (q, k, v, g, beta)]
        bounds = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
        o = gdn_ops.recurrent_gated_delta_rule_(
            *tokens, pool, slots, cu_seqlens=bounds, token_state_indices=drafts.flatten()[None]
        )
        slots = drafts.gather(1, accepted[:, None])[:, 0]
        return o, gdn_ops.recurrent_gated_delta_rule_(q, k, v, g, beta, pool, slots)

    x, pool = make_inputs(2, 3, 2, 4, 16, 8, device=device), torch.randn(8, 4, 16, 8, device=device)
    slots, accepted = torch.tensor([1, 0], device=device), torch.tensor([2, 1], device=device)
    drafts = torch.tensor([[2, -1, 3], [4, 5, 6]], device=device)
    eager_pool, before = pool.clone(), pool.clone()
    tokens = [x[n] for n in TOKENS]
    got = torch.compile(verify, fullgraph=True)(*tokens, pool, slots, drafts, accepted)
    for g, w in zip(got, verify(*tokens, eager_pool, slots, drafts, accepted)):
        assert_close(g, w, 1e-5, "o")
    assert_close(pool, eager_pool, 1e-5, "pool")
    assert (pool != before).flatten(1).any(1).tolist() == [False, False, True, True, True, True, True, False]


@on_devices
def test_activation_checkpointing_with_the_save_list(device):
    """Selective checkpointing under the compiler: the operator runs once forward, and gradients stay right."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    x = make_inputs(1, 70, 1, 2, 16, 24, device=device)
    do, _ = cotangents(x)

    def contexts():
        return create_selective_checkpoint_contexts(gdn_ops.ops.save_list())

    def block(q, k, v, g, beta):
        return gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]

    def checkpointed(*tensors):
        return checkpoint(block, *tensors, use_reentrant=False, context_fn=contexts)

    tensors = [x[n].requires_grad_() for n in TOKENS]
    compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*tensors), tensors, do)
    want = torch.autograd.grad(block(*tensors), tensors, do)
    for n, g, w in zip(TOKENS, got, want):
        assert_close(g, w, 5e-5, "d" + n)


@both_forms
def test_export_keeps_one_node_an_operator(function):
    """Non-strict export with dynamic T; the program runs at other lengths."""
    x = make_inputs_of(function, 2, 70, 2, 4, 16, 24, initial_state=True)

    class Module(torch.nn.Module):
        def forward(self, tokens, initial_state):
            return function(*tokens, initial_state=initial_state, output_final_state=True)

    names = [n for n in TOKENS if n in x]
    T = torch.export.Dim("T", min=2)
    shapes = [{1: T} for n in names], None
    with torch.no_grad():
        program = torch.export.export(Module(), ([x[n] for n in names], x["initial_state"]), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if str(node.target).startswith("gdn.")]
    assert targets == [getattr(torch.ops.gdn, function.__name__).default]
    for length in (2, 64, 131):
        y = make_inputs_of(function, 2, length, 2, 4, 16, 24, initial_state=True, seed=4)
        o, state = program.module()([y[n] for n in names], y["initial_state"])
        want = expected(y)
        assert_close(o, want["o"], 1e-5, "o")
        assert_close(state, want["final_state"], 1e-5, "final_state")


MODULES = {
    "chunk_gated_delta_rule": ("chunk_forward", "chunk_backward", "causal_conv1d"),
    "chunk_gated_linear_attention": ("linear_attention", "linear_attention_backward", "causal_conv1d"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("width", [64, 128])
def test_inductor_sees_the_triton_kernels(name, width):
    """On CUDA no call to an operator is left in the generated code, forward or backward, if it is not large."""
    function = getattr(gdn_ops, name)
    x = make_inputs(1, 130, 2, 4, width, width, torch.bfloat16, "cuda")
    conv = make_conv_inputs(1, 130, 2 * width, 4, torch.bfloat16, "cuda")
    q, weight = x["q"].requires_grad_(), conv["weight"].requires_grad_()

    def run():
        compiled = torch.compile(
            lambda q, weight: function(
                gdn_ops.causal_conv1d(q.flatten(2), weight, activation="silu")[0].view_as(q), *rest
            )[0],
            fullgraph=True,
        )
        compiled(q, weight).float().square().sum().backward()

    rest = [x[n] for n in TOKENS[1:] if n in suited(function, x)]
    _, codes = run_and_get_code(run)
    code = "\n".join(codes)
    assert "torch.ops.gdn" not in code and "gdn::" not in code
    for module in MODULES[name]:
        assert f"gdn_ops/kernels/triton/{module}.py" in code, module


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("V", [128, 256, 200])
def test_large_calls_on_hopper_stay_whole(mode, V):
    """Inductor does not take their kernels. A graph for any length, traced at a large one, serves small ones as well.
    Where values are no multiple of 128 wide, all that goes for the forward alone."""
    compiled = torch.compile(gdn_ops.chunk_gated_delta_rule, mode=mode, fullgraph=True)

    def run(rule, T):
        x = make_inputs(2, T, 8, 8, 128, V, torch.bfloat16, "cuda", seed=T)
        y = leaves(x) if rule is gdn_ops.chunk_gated_delta_rule or mode else mark_length(leaves(x))
        o = rule(**y)[0]
        names = [n for n in TOKENS if n in y]
        return o.clone(), *(x.clone() for x in torch.autograd.grad(o, [y[n] for n in names], torch.ones_like(o)))

    got, codes = run_and_get_code(run, compiled, 4096)
    code = "\n".join(codes)
    assert "gdn.chunk_gated_delta_rule.default" in code
    assert ("gdn.chunk_gated_delta_rule_backward.default" in code) == (V % 128 == 0)
    for T, results in ((4096, got), (4100, run(compiled, 4100)), (100, run(compiled, 100))):
        same = T > 100 or mode is None
        for i, (result, want) in enumerate(zip(results, run(gdn_ops.chunk_gated_delta_rule, T))):
            if same and (i == 0 or V % 128 == 0):
                assert torch.equal(result, want), (T, i)
            else:
                assert_close(result, want, TOLERANCE[torch.bfloat16].gates, f"T={T}, {i}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
def test_cuda_graphs(name):
    """``mode="reduce-overhead"`` records and replays: other inputs give other, right results, varlen too."""
    function = getattr(gdn_ops, name)
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for seed, bounds in enumerate(([0, 3, 130], [0, 64, 130], [0, 0, 130], [0, 129, 130])):
        x = make_inputs_of(function, 1, 130, 2, 4, 64, 64, torch.bfloat16, "cuda", seed=seed, cu_seqlens=bounds)
        o, state = compiled(**x, output_final_state=True)
        want = expected(x)
        assert_close(o, want["o"], TOLERANCE[torch.bfloat16].values, "o")
        assert_close(state, want["final_state"], TOLERANCE[torch.bfloat16].values, "final_state")


def test_bounds_are_checked_in_compiled_code():
    """On the CPU, whatever does the calling: what no sequence holds would be left as it was in memory."""
    x = make_inputs(1, 9, 2, 2, 16, 8)
    run = torch.compile(lambda bounds: gdn_ops.chunk_gated_delta_rule(**{**x, "cu_seqlens": bounds})[0], fullgraph=True)
    assert run(torch.tensor([0, 4, 9])).isfinite().all()
    for bounds in ([0, 4, 8], [0, 10, 9], [1, 4, 9]):
        with pytest.raises(ValueError, match=r"cu_seqlens: expected a non-decreasing list from 0 to T=9, got \["):
            run(torch.tensor(bounds))


def test_the_gradient_of_a_transposed_state():
    """Inductor takes the operator's word for where the gradient of the initial state lies."""
    x = make_inputs(2, 5, 2, 2, 16, 8, initial_state=True)
    state = x.pop("initial_state").mT.contiguous()

    def loss(state):
        o, final = gdn_ops.chunk_gated_delta_rule(**x, initial_state=state, output_final_state=True, state_v_first=True)
        return o.sum() + final.square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        start = state.clone().requires_grad_()
        function(start).backward()
        found.append(start.grad)
    assert_close(found[1], found[0], 1e-6, "dh0")
