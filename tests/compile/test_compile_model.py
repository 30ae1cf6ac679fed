"""Models under ``torch.compile``: training in one graph, any T without recompiling, checkpointing, CUDA graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import run_and_get_code

from gdn_ops.models import HybridConfig, HybridLM
from gdn_ops.models.hybrid import ACTIVATION_CHECKPOINTING
from gdn_ops.ops import save_list
from tests.memory import with_memory
from tests.models.models import make, tokens
from tests.oracle import TOLERANCE, assert_close

LENGTHS = (70, 5, 64, 130)
# On CUDA, Inductor asks of its own matrix products whether padding and fusing would pay, and takes the answer to hold
# for a range of sizes; these lengths are inside one.
CUDA_LENGTHS = (200, 70, 129, 330)
on_patterns = pytest.mark.parametrize("pattern", ["G", "GS", "MA"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def ids_of(length, dynamic=True, B=2, seed=1, device="cpu"):
    """Tokens ``[B, length]``, and the same ones as labels; T is marked dynamic."""
    ids = tokens(B, length, seed=seed, device=device)
    labels = ids.clone()
    if dynamic:
        for x in (ids, labels):
            torch._dynamo.mark_dynamic(x, 1)
    return ids, labels


def loss_and_gradients(function, model, *args, **kwargs):
    """``function(*args).loss`` and the gradients of ``model`` by name; the model's own are cleared."""
    loss = function(*args, **kwargs).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(got, want, tol=5e-5):
    assert_close(got[0], want[0], tol, "loss")
    for name, gradient in want[1].items():
        assert_close(got[1][name], gradient, tol, "d" + name)


def train(model, step, optimizer_step, optimizer, device="cpu", lengths=LENGTHS, dynamic=True, rounds=1):
    """Losses of AdamW over batches of the given lengths; a compilation after the first is an error."""
    losses = []
    for i, length in enumerate(lengths * rounds):
        ids, labels = ids_of(length, dynamic, seed=i, device=device)
        with torch._dynamo.config.patch(error_on_recompile=dynamic and i > 0):
            loss = step(ids, labels=labels).loss
            loss.backward()
        optimizer_step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    return torch.stack(losses)


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(model.parameter_groups(0.1), lr=lr, foreach=True)


@pytest.mark.slow
@on_patterns
def test_training_gives_eagers_losses(pattern):
    """The default backend: forward, backward and the optimiser's step, compiled once each, over many lengths."""
    model, compiled_model = (make(pattern, torch.float32, initializer_range=0.05) for _ in range(2))
    optimizer = adamw(model)
    want = train(model, model, optimizer.step, optimizer)
    optimizer = adamw(compiled_model)
    compiled = torch.compile(compiled_model, fullgraph=True)
    got = train(compiled_model, compiled, torch.compile(optimizer.step), optimizer)
    assert_close(got, want, 1e-4, "losses")
    assert want.std() > 1e-3
    start = make(pattern, torch.float32, initializer_range=0.05)
    for (name, p), q, before in zip(model.named_parameters(), compiled_model.parameters(), start.parameters()):
        assert_close(q - before, p - before, 0.05, name)


@on_patterns
def test_there_is_no_graph_break(pattern):
    model = make(pattern, torch.float32)
    ids, labels = ids_of(70)
    explained = torch._dynamo.explain(model)(ids, labels=labels)
    assert explained.graph_count == 1 and explained.graph_break_count == 0 and not explained.break_reasons


@on_patterns
def test_one_graph_for_every_length(pattern):
    model = make(pattern, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, length in enumerate(LENGTHS):
        ids, labels = ids_of(length, seed=i)
        want = loss_and_gradients(model, model, ids, labels=labels)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = loss_and_gradients(compiled, model, ids, labels=labels)
        assert_same(got, want)
    assert counter.frame_count == 1


def test_the_loss_alone_is_one_graph():
    """A vocabulary in 16 parts: one graph for every length of two rows a part."""
    model = make("GS", torch.float32, vocab_size=1024)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, length in enumerate((70, 16, 64, 130)):
        ids, labels = ids_of(length, seed=i)
        want = loss_and_gradients(model, model, ids, labels=labels)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = loss_and_gradients(compiled, model, ids, labels=labels, return_logits=False)
        assert_same(got, want)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_loss_alone_has_no_logits():
    """No tensor of the graphs, cut as Inductor cuts them, is as large as the logits; with logits, some are. Products
    with the vocabulary are all in the forward graph."""
    model, largest = make("G", torch.float32, vocab_size=1024), {}
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    for return_logits in (True, False):
        torch._dynamo.reset()
        forward, backward, _ = graphs_of(model, dynamic=False, return_logits=return_logits)
        values = [node.meta["val"] for graph in (forward, backward) for node in graph.graph.nodes if "val" in node.meta]
        largest[return_logits] = max(x.numel() for x in values if torch.is_tensor(x))
        vocabulary = [
            node for node in backward.graph.nodes if node.target in products and 1024 in node.meta["val"].shape
        ]
        assert bool(vocabulary) == return_logits
    assert largest[True] == 140 * 1024 and largest[False] == 1024 * 32  # the weight's gradient


def test_packed_sequences_are_one_graph():
    """Lengths and the number of sequences vary."""
    model = make("GS", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, bounds in enumerate(([0, 9, 9, 70], [0, 3, 5], [0, 1, 30, 64, 64, 130])):
        ids, labels = ids_of(bounds[-1], B=1, seed=i)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        want = loss_and_gradients(model, model, ids, labels=labels, cu_seqlens=cu_seqlens)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = loss_and_gradients(compiled, model, ids, labels=labels, cu_seqlens=cu_seqlens)
        assert_same(got, want)
    assert counter.frame_count == 1


def test_padded_batches_are_one_graph():
    model = make("GS", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, length in enumerate(LENGTHS):
        ids, labels = ids_of(length, seed=i)
        attention_mask = torch.ones(2, length)
        attention_mask[0, : length // 2] = attention_mask[1, length - 2 :] = 0
        torch._dynamo.mark_dynamic(attention_mask, 1)
        want = loss_and_gradients(model, model, ids, labels=labels, attention_mask=attention_mask)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = loss_and_gradients(compiled, model, ids, labels=labels, attention_mask=attention_mask)
        assert_same(got, want)
    assert counter.frame_count == 1


def test_autocast_is_one_graph():
    """fp32 weights, bf16 products: the layers accept the wider stream under the compiler too."""
    model, (ids, labels) = make("GS", torch.float32), ids_of(70)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(ids, labels=labels), model(ids, labels=labels)
    assert got.logits.dtype == torch.bfloat16
    assert_close(got.logits, want.logits, TOLERANCE[torch.bfloat16].values, "logits")
    assert_close(got.loss, want.loss, 1e-4, "loss")


@torch.no_grad()
def test_prefill_and_steps_compile_once_each():
    """Any prompt length; steps past the ring's wrap-around."""
    model = make("GS", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    prefill, step = (torch.compile(f, backend=counter, fullgraph=True) for f in (model.prefill, model.step))
    for i, length in enumerate(LENGTHS):
        ids, _ = ids_of(length, seed=i)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            logits, state = prefill(ids, model.init_state(2))
        want, want_state = model.prefill(ids, model.init_state(2))
        assert_close(logits, want, 5e-5, "prefill")
        for t in range(15):
            token = tokens(2, seed=t)
            with torch._dynamo.config.patch(error_on_recompile=i > 0 or t > 0):
                logits, state = step(token, state)
            want, want_state = model.step(token, want_state)
            assert_close(logits, want, 5e-5, "step")
    assert counter.frame_count == 2


def graphs_of(model, dynamic=True, **kwargs):
    """The forward and backward graphs that a backend is given, cut as Inductor cuts them."""
    graphs = {}

    def keep(name):
        def compiler(graph, inputs):
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    ids, labels = ids_of(70, dynamic)
    got = loss_and_gradients(torch.compile(model, backend=backend, fullgraph=True), model, ids, labels=labels, **kwargs)
    return graphs["forward"], graphs["backward"], got


def rules_in(graph):
    return sum(node.target in save_list() for node in graph.graph.nodes)


def saved_by(graph):
    """How many numbers the forward graph hands to the backward graph, parameters aside."""
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    made = [node for node in outputs if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
    return sum(int(x.numel()) for node in made if torch.is_tensor(x := node.meta["val"]))


@pytest.mark.slow
def test_activation_checkpointing():
    """The same gradients; the rule is in the backward graph, and least is saved, under full checkpointing alone."""
    model, saved = make("GS", torch.float32), {}
    ids, labels = ids_of(70)
    want = loss_and_gradients(model, model, ids, labels=labels)
    for kind, again in (("none", 0), ("elementwise", 0), ("selective", 0), ("full", 1)):
        torch._dynamo.reset()
        model.activation_checkpointing = kind
        forward, backward, got = graphs_of(model)
        assert_same(got, want)
        assert rules_in(forward) == 1 and rules_in(backward) == again, kind
        saved[kind] = saved_by(forward)
    assert saved["full"] < saved["selective"] < saved["none"] / 2
    assert saved["selective"] < saved["elementwise"] < 0.7 * saved["none"]


@pytest.mark.parametrize("kind", ACTIVATION_CHECKPOINTING[1:])
def test_checkpointing_compiles_once_for_every_length(kind):
    model = make("GS", torch.float32)
    model.activation_checkpointing = kind
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, length in enumerate(LENGTHS[:2]):
        ids, labels = ids_of(length, seed=i)
        want = loss_and_gradients(model, model, ids, labels=labels)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = loss_and_gradients(compiled, model, ids, labels=labels)
        assert_same(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("bad", ["input_ids", "labels", "attention_mask"])
def test_bad_shapes_are_refused_by_the_compiled_model_too(bad):
    model, ids = make("GS", torch.float32), tokens(2, 9)
    wrong = {"input_ids": ids[0], "labels": ids[:, 1:], "attention_mask": ids[0]}
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=f"{bad}: expected"):
        compiled(**{"input_ids": ids, bad: wrong[bad]})


# At 1e-2, AdamW turns bf16's rounding into losses that differ by 2% after eight steps, compiled or not.
BF16_RATE = 1e-3


def on_cuda(pattern="GS", dtype=torch.float32, **overrides):
    """The tiny preset cut to one layer a mixer: heads as large as the kernels like them."""
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 2, "pattern": pattern, "vocab_size": 40, **overrides}
    return HybridLM(HybridConfig.preset("tiny", **fields)).to("cuda", dtype)


def autocast(function):
    def run(*args, **kwargs):
        with torch.autocast("cuda", torch.bfloat16):
            return function(*args, **kwargs)

    return run


@pytest.mark.gpu
@on_patterns
def test_training_on_cuda(pattern):
    """bf16 autocast over many lengths without recompiling; eager's losses to bf16's rounding."""
    model, compiled_model = on_cuda(pattern), on_cuda(pattern)
    optimizer = adamw(model, BF16_RATE)
    want = train(model, autocast(model), optimizer.step, optimizer, "cuda", CUDA_LENGTHS, rounds=2)
    optimizer = adamw(compiled_model, BF16_RATE)
    compiled = autocast(torch.compile(compiled_model, fullgraph=True))
    got = train(compiled_model, compiled, torch.compile(optimizer.step), optimizer, "cuda", CUDA_LENGTHS, rounds=2)
    assert got.isfinite().all() and want.std() > 1e-3
    assert_close(got, want, 2e-3, "losses")


@pytest.mark.gpu
@on_patterns
@pytest.mark.parametrize("kind", ACTIVATION_CHECKPOINTING)
def test_fp32_gradients_on_cuda(pattern, kind):
    """Inductor's kernels around ours, with the parts that are computed again."""
    model = on_cuda(pattern)
    ids, labels = ids_of(130, device="cuda")
    want = loss_and_gradients(model, model, ids, labels=labels)
    model.activation_checkpointing = kind
    got = loss_and_gradients(torch.compile(model, fullgraph=True), model, ids, labels=labels)
    assert_same(got, want, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "compiled, pattern, layers", [(False, "G", 6), (False, "GS", 6), (False, "MA", 6), (True, "GS", 3)]
)
def test_checkpointing_saves_memory_on_cuda(compiled, pattern, layers):
    """bf16 autocast, where attention is torch's flash attention: the same gradients, in less memory."""
    model = on_cuda(pattern, num_hidden_layers=layers)
    ids, peaks = tokens(4, 4096, device="cuda"), []
    call = autocast(partial(model, labels=ids, return_logits=False))
    want = loss_and_gradients(call, model, ids)
    for kind in ACTIVATION_CHECKPOINTING:
        torch._dynamo.reset()
        model.activation_checkpointing = kind
        run = torch.compile(call, fullgraph=True) if compiled else call
        assert_same(loss_and_gradients(run, model, ids), want, 5e-2)
        peaks.append(with_memory(partial(loss_and_gradients, run, model, ids))[1])
    none, elementwise, *least = peaks
    assert max(least) < elementwise < 0.8 * none, peaks


@pytest.mark.gpu
def test_the_loss_alone_on_cuda():
    """bf16 autocast, a vocabulary in 16 parts: eager's gradients, and less memory than the logits take."""
    model = on_cuda("S", num_hidden_layers=1, vocab_size=8192)
    compiled = autocast(torch.compile(model, fullgraph=True))
    ids = tokens(8, 2048, device="cuda", vocab_size=8192)
    want, logits = loss_and_gradients(autocast(model), model, ids, labels=ids), ids.numel() * 8192 * 2
    for function in (autocast(model), compiled, compiled):
        output, peak = with_memory(partial(function, ids, labels=ids, return_logits=False))
        loss = output.loss
        loss.backward()
        assert_same((loss.detach(), {n: p.grad for n, p in model.named_parameters()}), want, 5e-2)
        model.zero_grad()
    assert peak < logits, (peak, logits)


@pytest.mark.gpu
@on_patterns
def test_cuda_graphs(pattern):
    """``mode="reduce-overhead"`` records and replays training steps: eager's losses, step by step."""
    model, compiled_model = on_cuda(pattern), on_cuda(pattern)
    optimizer = adamw(model, BF16_RATE)
    want = train(model, autocast(model), optimizer.step, optimizer, "cuda", (130,), dynamic=False, rounds=6)
    optimizer = adamw(compiled_model, BF16_RATE)
    compiled = autocast(torch.compile(compiled_model, fullgraph=True, mode="reduce-overhead"))

    def step(*args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    got = train(compiled_model, step, optimizer.step, optimizer, "cuda", (130,), dynamic=False, rounds=6)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert want.unique().numel() == 6
    assert_close(got, want, 2e-3, "losses")


@pytest.mark.gpu
def test_cuda_graphs_of_packed_sequences():
    """Other bounds in the same graph: nothing about them is read on the host."""
    model = on_cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for i, bounds in enumerate(([0, 9, 9, 130], [0, 64, 128, 130], [0, 0, 129, 130], [0, 1, 2, 130])):
        ids, labels = ids_of(130, dynamic=False, B=1, seed=i, device="cuda")
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        want = loss_and_gradients(model, model, ids, labels=labels, cu_seqlens=cu_seqlens)
        torch.compiler.cudagraph_mark_step_begin()
        got = loss_and_gradients(compiled, model, ids, labels=labels, cu_seqlens=cu_seqlens)
        assert_same(got, want, 1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_inductor_sees_the_triton_kernels():
    """On CUDA no call to an operator is left in the generated code of the model, forward or backward."""
    model = on_cuda(dtype=torch.bfloat16)
    ids, labels = ids_of(130, device="cuda")

    def run():
        torch.compile(model, fullgraph=True)(ids, labels=labels).loss.backward()

    _, codes = run_and_get_code(run)
    code = "\n".join(codes)
    assert "torch.ops.gdn" not in code and "gdn::" not in code
    for module in ("chunk_forward", "chunk_backward", "causal_conv1d"):
        assert f"gdn_ops/kernels/triton/{module}.py" in code, module


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_steps_generate_what_eager_does():
    """Decode inside CUDA graphs, the state going round."""
    model = on_cuda(initializer_range=0.2)
    step = torch.compile(model.step, fullgraph=True, mode="reduce-overhead")
    ids = tokens(2, 21, device="cuda")
    want = model.generate(ids, 40)[:, 21:]
    logits, state = model.prefill_last(ids, model.init_state(2))
    got = []
    for _ in range(40):
        token = logits.argmax(-1)
        got.append(token)
        torch.compiler.cudagraph_mark_step_begin()
        logits, state = step(token, state)
        logits, state = torch.utils._pytree.tree_map(torch.clone, (logits, state))
    assert torch.equal(torch.stack(got, 1), want)
    assert counters["inductor"]["cudagraph_skips"] == 0
