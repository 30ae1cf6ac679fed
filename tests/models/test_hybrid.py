"""HybridLM: logits and gradients against a plain model, losses by hand, prefill and steps, padding, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdn_ops.models import HybridConfig, HybridLM, HybridOutput
from gdn_ops.ops import save_list
from tests.models.models import PATTERNS, make, tokens
from tests.nn import plain
from tests.nn.samples import AGREEMENT, LAYOUTS, LENGTHS, mask
from tests.oracle import DEVICES, TOLERANCE, assert_close, error

on_devices = pytest.mark.parametrize("device", DEVICES)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def by_hand(logits, labels):
    """Negative log likelihood of the next label at each position, ``[B, T - 1]``."""
    return -logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None])[..., 0]


def assert_same_state(got, want, tol=1e-11):
    """Nested alike and close, rings where they are filled."""
    assert got.keys() == want.keys() and got["layers"].keys() == want["layers"].keys()
    assert torch.equal(got["position"], want["position"])
    for index, layer in want["layers"].items():
        assert got["layers"][index].keys() == layer.keys()
        for name, x in layer.items():
            y = got["layers"][index][name]
            if name in ("key", "value"):
                filled = torch.arange(x.shape[1], device=x.device) < want["position"][:, None]
                x, y = x[filled], y[filled]
            assert_close(y, x, tol, f"{index}.{name}")


def rows_of(state, rows):
    """The state of some rows of a batch."""
    layers = {i: {n: x[rows] for n, x in layer.items()} for i, layer in state["layers"].items()}
    return {"layers": layers, "position": state["position"][rows]}


@on_devices
@every_pattern
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_loss_and_gradients(pattern, dtype, tied, device):
    model = make(pattern, dtype, device, tie_word_embeddings=tied)
    ids = tokens(2, 70, device=device)
    output = model(ids, labels=ids)
    output.loss.backward()
    weights = plain.wide(model)
    want = plain.hybrid_lm(model, weights, ids.cpu())
    loss = by_hand(want, ids.cpu()).mean()
    loss.backward()
    assert output.state is None and output.logits.dtype == dtype and output.loss.dtype == torch.float32
    assert_close(output.logits, want, 3 * TOLERANCE[dtype].values, "logits")
    assert_close(output.loss, loss, 1e-5, "loss")
    for name, p in model.named_parameters():  # the loss is computed in fp32 whatever the model's dtype
        assert_close(p.grad, weights[name].grad, 2 * TOLERANCE[torch.float32].grads, "d" + name)


def test_layers_without_mlp():
    model, ids = make("M", intermediate_size=None), tokens(2, 70)
    assert not any("mlp" in name for name, _ in model.named_parameters())
    want = plain.hybrid_lm(model, plain.wide(model), ids)
    assert_close(model(ids).logits, want, 3e-12, "logits")


@on_devices
def test_bf16_autocast(device):
    model, ids = make(dtype=torch.float32, device=device), tokens(2, 70, device=device)
    with torch.autocast(device, torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    want = model(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert error(output.logits, want.logits) < 0.03
    assert output.loss.item() == pytest.approx(want.loss.item(), rel=1e-2)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_int32_tokens_are_the_same():
    model, ids = make(), tokens(2, 9)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


@on_devices
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("given", ["labels", "bounds", "mask"])
def test_the_loss_alone(given, tied, device):
    """Without logits the loss and the gradients are the same, of packed and padded rows and of a vocabulary that is
    taken in parts."""
    model = make("GS", torch.float32, device, tie_word_embeddings=tied, vocab_size=300)
    ids = tokens(1 if given == "bounds" else 2, 70, device=device, vocab_size=300)
    labels = ids.clone()
    labels[:, 20:23] = -100
    options = {"labels": labels}
    if given == "bounds":
        options["cu_seqlens"] = torch.tensor([0, 9, 9, 70], device=device)
    if given == "mask":
        options["attention_mask"] = torch.ones(2, 70, device=device)
        options["attention_mask"][0, :30] = options["attention_mask"][1, 60:] = 0
    want = model(ids, **options).loss
    want.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    output = model(ids, **options, return_logits=False)
    output.loss.backward()
    assert output.logits is None and output.state is None
    assert_close(output.loss, want, 1e-6, "loss")
    for name, p in model.named_parameters():
        assert_close(p.grad, gradients[name], 5e-5, "d" + name)
    with torch.no_grad():
        assert_close(model(ids, **options, return_logits=False).loss, want, 1e-6, "loss without gradients")


def test_an_exported_model_is_saved_and_loaded(tmp_path):
    """Its result is a HybridOutput."""
    model, ids = make("GS", torch.float32).eval(), tokens(2, 9)
    torch.export.save(torch.export.export(model, (ids,)), tmp_path / "model.pt2")
    output = torch.export.load(tmp_path / "model.pt2").module()(ids)
    assert isinstance(output, HybridOutput) and output.loss is None
    assert_close(output.logits, model(ids).logits, 1e-6, "logits")


def test_ignored_labels():
    model, ids = make(), tokens(2, 9)
    labels = ids.clone()
    labels[0, 3:6] = labels[1, 0] = labels[1, 8] = -100
    output = model(ids, labels=labels)
    losses = by_hand(output.logits, ids)
    scored = labels[:, 1:] != -100
    assert_close(output.loss, losses[scored].mean(), 1e-5, "loss")
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing.item() == 0 and nothing.isfinite()
    assert model(ids[:, :1], labels=ids[:, :1]).loss.item() == 0


@on_devices
@every_pattern
def test_packed_equals_separate(pattern, device):
    """Logits, and a loss that scores nothing across a boundary; an empty sequence between."""
    dtype, tol = AGREEMENT[device]
    model, texts = make(pattern, dtype, device), [tokens(1, n, seed=n, device=device) for n in LENGTHS]
    packed = torch.cat(texts, 1)
    bounds = torch.tensor([0, 9, 9, 79, 80, 113], dtype=torch.int32, device=device)
    output = model(packed, labels=packed, cu_seqlens=bounds)
    separate = [model(ids).logits for ids in texts]
    assert_close(output.logits, torch.cat(separate, 1), tol, "logits")
    losses = torch.cat([by_hand(logits, ids)[0] for logits, ids in zip(separate, texts)])
    assert losses.numel() == sum(LENGTHS) - len(LENGTHS)
    assert_close(output.loss, losses.mean(), 1e-5, "loss")


def test_packed_states_of_a_model_without_attention():
    model = make("G")
    texts = [tokens(1, n, seed=n) for n in (4, 1, 9)]
    bounds = torch.tensor([0, 4, 5, 14])
    start = model.prefill(tokens(3, 6), model.init_state(3))[1]
    output = model(torch.cat(texts, 1), state=start, cu_seqlens=bounds)
    assert output.state["position"].tolist() == [10, 7, 15]
    for n, ids in enumerate(texts):
        logits, state = model.prefill(ids, rows_of(start, slice(n, n + 1)))
        assert_close(output.logits[:, bounds[n] : bounds[n + 1]], logits, 1e-11, "logits")
        assert_same_state(rows_of(output.state, slice(n, n + 1)), state)


@on_devices
@every_pattern
@every_layout
def test_padding_equals_unpadded_rows(pattern, layout, device):
    """Logits, states and the loss, with a state going in; whatever token stands at the padding."""
    dtype, tol = AGREEMENT[device]
    model, attention_mask = make(pattern, dtype, device), mask(layout, device=device)
    texts = [tokens(1, n, seed=n, device=device) for n in LENGTHS]
    ids = tokens(*attention_mask.shape, seed=9, device=device)
    for row, text in enumerate(texts):
        ids[row, attention_mask[row] == 1] = text[0]
    start = model.prefill(tokens(len(LENGTHS), 6, device=device), model.init_state(len(LENGTHS)))[1]
    output = model(ids, labels=ids, state=start, attention_mask=attention_mask)
    last, last_state = model.prefill_last(ids, start, attention_mask)
    losses = []
    for row, text in enumerate(texts):
        here = slice(row, row + 1)
        logits, state = model.prefill(text, rows_of(start, here))
        assert_close(output.logits[row, attention_mask[row] == 1], logits[0], tol, f"logits of row {row}")
        assert_close(last[here], logits[:, -1], tol, f"last logits of row {row}")
        for got in (output.state, last_state):
            assert_same_state(rows_of(got, here), state, tol)
        losses.append(by_hand(logits, text)[0])
    assert_close(output.loss, torch.cat(losses).mean(), 1e-5, "loss")


@on_devices
@every_pattern
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole(pattern, device):
    dtype, tol = AGREEMENT[device]
    model, ids = make(pattern, dtype, device), tokens(2, 40, device=device)
    whole = model(ids).logits
    logits, state = model.prefill(ids[:, :19], model.init_state(2))
    assert_close(logits, whole[:, :19], tol, "first part")
    logits, state = model.prefill(ids[:, 19:30], state)
    assert_close(logits, whole[:, 19:30], tol, "second part")
    for t in range(30, 40):
        logits, state = model.step(ids[:, t], state)
        assert_close(logits, whole[:, t], tol, f"step at {t}")
    assert state["position"].tolist() == [40, 40]
    assert_same_state(state, model.prefill(ids, model.init_state(2))[1], tol)


@every_pattern
@torch.no_grad()
def test_prefill_last_is_prefills_last(pattern):
    model, ids = make(pattern), tokens(2, 21)
    logits, state = model.prefill(ids, model.init_state(2))
    last, last_state = model.prefill_last(ids, model.init_state(2))
    assert_close(last, logits[:, -1], 1e-12, "logits")
    assert_same_state(last_state, state, 0.0)


@torch.no_grad()
def test_a_state_is_not_written():
    model = make()
    _, state = model.prefill(tokens(2, 15), model.init_state(2))
    before = {n: x.clone() for layer in state["layers"].values() for n, x in layer.items()}
    position = state["position"].clone()
    model.step(tokens(2), state), model.prefill(tokens(2, 15, seed=3), state)
    after = {n: x for layer in state["layers"].values() for n, x in layer.items()}
    assert all(torch.equal(after[n], before[n]) for n in before) and torch.equal(state["position"], position)


def test_init_state():
    state = make().init_state(3, dtype=torch.bfloat16)
    assert {i: sorted(layer) for i, layer in state["layers"].items()} == {
        "0": ["conv", "recurrent"],
        "1": ["key", "value"],
    }
    assert state["position"].tolist() == [0, 0, 0] and state["layers"]["1"]["key"].shape == (3, 12, 2, 8)
    assert state["layers"]["0"]["conv"].dtype == torch.bfloat16
    assert state["layers"]["0"]["recurrent"].dtype == torch.float32
    assert make().init_state(1, device="meta")["position"].device.type == "meta"
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        make().init_state(0)
    with pytest.raises(TypeError, match="batch: expected an integer, got float"):
        make().init_state(1.0)


class RuleCalls(TorchDispatchMode):
    """Counts what an operator that selective checkpointing keeps is run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in save_list()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, calls", [("none", 2), ("elementwise", 2), ("selective", 2), ("full", 4)])
def test_activation_checkpointing(kind, calls):
    """The same gradients; the rule runs twice under full checkpointing alone."""
    model, ids = make("G"), tokens(2, 70)
    model(ids, labels=ids).loss.backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing = kind
    with RuleCalls() as mode:
        model(ids, labels=ids).loss.backward()
    assert mode.count == calls
    for name, p in model.named_parameters():
        assert_close(p.grad, want[name], 1e-12, "d" + name)


def test_activation_checkpointing_is_checked():
    model = HybridLM(make().config, activation_checkpointing="full")
    assert model.activation_checkpointing == "full" and make().activation_checkpointing == "none"
    with pytest.raises(
        ValueError, match="activation_checkpointing: expected one of none, elementwise, selective, full, got 'all'"
    ):
        model.activation_checkpointing = "all"


def test_parameter_groups():
    """Each parameter once; what has one dimension, and the convolution, does not decay."""
    model = make(tie_word_embeddings=False)
    decayed, kept = model.parameter_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed["params"] + kept["params"]) == sorted(names.values())
    kept = {names[id(p)].removeprefix("layers.").lstrip("01.") for p in kept["params"]}
    assert kept == {
        "mixer_norm.weight", "mlp_norm.weight", "mixer.A_log", "mixer.dt_bias", "mixer.conv_weight",
        "mixer.o_norm.weight", "norm.weight",
    }  # fmt: skip


def test_initial_weights():
    """Normal with the configured deviation; what writes into the stream shrinks with depth; gates are left alone."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset("tiny", initializer_range=0.05, tie_word_embeddings=False))
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert p.std().item() == pytest.approx(0.05 / 8**0.5, rel=0.05), name
        elif p.dim() == 2 and not name.endswith("conv_weight"):
            assert p.std().item() == pytest.approx(0.05, rel=0.15), name
    assert (model.layers[0].mixer.A_log <= 2.7726).all() and model.layers[0].mixer.conv_weight.abs().max() <= 0.5


@pytest.mark.parametrize("pattern", ["GS", "MD"])
def test_a_model_made_without_numbers_is_initialised(pattern):
    with torch.device("meta"):
        model = make(pattern, torch.float32, "meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.reset_parameters()
    new = HybridLM(model.config)
    for (name, p), q in zip(model.named_parameters(), new.parameters()):
        if name.endswith(("norm.weight", ".D")):
            assert torch.equal(p, q), name
        elif name.endswith("A_log"):
            assert (p.exp() <= 16).all() and p.unique().numel() == p.numel()
        elif name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(p)
            assert (step >= 0.99e-3).all() and (step <= 0.101).all() and p.unique().numel() == p.numel()
        else:
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.3), name


def test_a_step_of_training_lowers_the_loss():
    model, ids = make(dtype=torch.float32, initializer_range=0.02), tokens(2, 40)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def state_with(**changes):
    return {**make().init_state(2), **changes}


IDS = tokens(2, 5)
BAD_CALLS = {
    "ids type": (TypeError, {"input_ids": [[1]]}, r"input_ids: expected a torch\.Tensor, got list"),
    "ids dtype": (
        TypeError,
        {"input_ids": IDS.float()},
        r"input_ids: expected dtype torch\.int64 or .* torch\.float32",
    ),
    "ids shape": (ValueError, {"input_ids": IDS[0]}, r"input_ids: expected \[B, T\], got shape \(5,\)"),
    "no ids": (ValueError, {"input_ids": IDS[:, :0]}, r"input_ids: expected at least one row and one token, got"),
    "ids device": (ValueError, {"input_ids": IDS.to("meta")}, "input_ids: expected device cpu, got meta"),
    "large id": (ValueError, {"input_ids": IDS * 0 + 40}, r"input_ids: expected tokens in \[0, 40\), got 40"),
    "negative id": (ValueError, {"input_ids": IDS * 0 - 1}, r"input_ids: expected tokens in \[0, 40\), got -1"),
    "no labels": (ValueError, {"return_logits": False}, "labels: expected labels with return_logits=False, got None"),
    "last logits": (
        ValueError,
        {"labels": IDS, "last_logits": True},
        "last_logits: expected False together with labels, got True",
    ),
    "last logits of packed sequences": (
        ValueError,
        {"input_ids": IDS[:1], "cu_seqlens": torch.tensor([0, 5]), "last_logits": True},
        "last_logits: expected False together with cu_seqlens, got True",
    ),
    "labels type": (TypeError, {"labels": 3}, r"labels: expected a torch\.Tensor, got int"),
    "labels dtype": (TypeError, {"labels": IDS.int()}, r"labels: expected dtype torch\.int64, got torch\.int32"),
    "labels shape": (ValueError, {"labels": IDS[:, :4]}, r"labels: expected shape \(2, 5\), got \(2, 4\)"),
    "labels device": (
        ValueError,
        {"labels": IDS.to("meta")},
        r"labels: expected device cpu \(as input_ids\), got meta",
    ),
    "label": (ValueError, {"labels": IDS * 0 + 41}, r"labels: expected -100 or tokens in \[0, 40\), got 41"),
    "mask": (ValueError, {"attention_mask": IDS[0]}, r"attention_mask: expected shape \(2, 5\), got \(5,\)"),
    "bounds": (
        ValueError,
        {"input_ids": IDS[:1], "cu_seqlens": torch.tensor([0, 4])},
        r"cu_seqlens: expected a non-decreasing list from 0 to T=5, got \[0, 4\]",
    ),
    "packed batch": (ValueError, {"cu_seqlens": torch.tensor([0, 5])}, "input_ids: expected batch size 1"),
    "mask and bounds": (
        ValueError,
        {"attention_mask": IDS, "cu_seqlens": torch.tensor([0, 5])},
        "attention_mask: expected None together with cu_seqlens, got both",
    ),
    "state type": (ValueError, {"state": 3}, r"state: expected a dict of layers, position \(see init_state\), got int"),
    "layers": (ValueError, {"state": state_with(layers={"0": {}})}, r"state\['layers'\]: expected a dict of 0, 1, got"),
    "position": (ValueError, {"state": state_with(position=torch.ones(3).long())}, r"state\['position'\]: expected"),
    "batch of the state": (ValueError, {"state": make().init_state(3)}, r"state\['position'\]: expected shape \(2,\)"),
    "one layer's state": (
        ValueError,
        {"state": state_with(layers={**make().init_state(2)["layers"], "1": {"key": torch.ones(1)}})},
        "state: expected a dict of key, value, position, got",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    kind, arguments, message = BAD_CALLS[case]
    with pytest.raises(kind, match=message):
        make()(**{"input_ids": IDS, **arguments})


def test_prefill_and_step_need_a_state():
    model = make()
    for call in (
        lambda: model.prefill(IDS, None),
        lambda: model.prefill_last(IDS, None),
        lambda: model.step(IDS[:, 0], None),
    ):
        with pytest.raises(ValueError, match=r"state: expected a state \(see init_state\), got None"):
            call()
    with pytest.raises(ValueError, match=r"input_ids: expected \[B\], got shape \(2, 5\)"):
        model.step(IDS, model.init_state(2))
    with pytest.raises(ValueError, match=r"input_ids: expected \[B, T\], got shape \(5,\)"):
        model.prefill_last(IDS[0], model.init_state(2))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 5\)"):
        model.prefill_last(IDS, model.init_state(2), IDS[:1])


def test_a_configuration_is_required():
    with pytest.raises(TypeError, match="config: expected a HybridConfig, got dict"):
        HybridLM({"vocab_size": 3})
