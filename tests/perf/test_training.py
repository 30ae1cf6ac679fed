"""Steps of training: what they cost by hand, what a run writes, peers with our weights, what fails, the picture."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from gdn_ops.models import HybridConfig, HybridLM
from perf import training, training_plot
from perf.__main__ import main
from perf.measure import Ceilings
from perf.plot import draw
from perf.providers import OURS, Unavailable
from perf.records import Environment, read_csv
from perf.shapes import Shape, cost
from perf.training import Setting, Size, Step, TrainRow
from perf.training_models import TRAIN_PROVIDERS, TrainProvider, flash_attention
from tests.oracle import assert_close

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "pattern": "G", "intermediate_size": 96,
    "num_heads": 2, "head_k_dim": 16, "head_v_dim": 24, "num_attention_heads": 4, "window": 32,
}  # fmt: skip
CPU = Setting("cpu", "fp32")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Measuring them takes seconds on a busy machine; test_measure.py does it."""
    monkeypatch.setattr(training, "measure_ceilings", lambda device, dtype: Ceilings(1e10, 1e11))


@pytest.fixture
def small(monkeypatch):
    """Presets ``small`` and ``hybrid``, fit for a test."""
    exact, patterns = HybridConfig.preset, {"small": "G", "hybrid": "GS"}

    def preset(name, **overrides):
        return HybridConfig(**{**SIZES, "pattern": patterns[name]}) if name in patterns else exact(name, **overrides)

    monkeypatch.setattr(HybridConfig, "preset", preset)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_by_hand(tied):
    """Products with weights 6 a token; the rule's forward three times; of 100 tokens, 32 see fewer than a window."""
    model = HybridLM(HybridConfig(**{**SIZES, "pattern": "GS", "tie_word_embeddings": tied}))
    weights = model.num_parameters() - (0 if tied else 300 * 64)
    rule = cost(Shape(2, 2, 3, 100, 16, 24), "forward", torch.bfloat16).flops
    pairs = sum(min(t + 1, 32) for t in range(100))
    attention = 3 * 4 * pairs * 2 * 2 * 16
    assert training.model_flops(model, Size(100, 3)) == 6 * weights * 300 + 3 * (rule + attention)


def test_flops_of_the_other_mixers():
    """Mamba2's products are fewer than the delta rule's of its sizes; a window beyond T counts as T."""
    shape = {"mamba_head_dim": 16, "mamba_state_size": 8}
    mamba = HybridLM(HybridConfig(**{**SIZES, **shape, "pattern": "M", "num_hidden_layers": 1}))
    weights = 6 * mamba.num_parameters() * 50
    rule = cost(Shape(1, 8, 1, 50, 8, 16), "forward", torch.bfloat16).flops
    assert weights < training.model_flops(mamba, Size(50, 1)) < weights + 3 * rule
    full = HybridLM(HybridConfig(**{**SIZES, "pattern": "A", "num_hidden_layers": 1}))
    assert training.model_flops(full, Size(50, 1)) == 6 * full.num_parameters() * 50 + 3 * 4 * 50 * 51 // 2 * 64


@pytest.mark.parametrize(
    "device, tflops",
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.4), ("x", None)],
)
def test_nominal_peak(device, tflops):
    assert training.nominal_peak(device) == (None if tflops is None else tflops * 1e12)


def test_a_step_trains():
    """Forward, backward, clipping and AdamW by hand; conv weights, norms and gates do not decay."""
    torch.manual_seed(0)
    config, ids = HybridConfig(**SIZES), torch.randint(300, (2, 2, 40))
    models = [training.make_model(config, CPU) for _ in range(2)]
    step = Step(models[0], lambda x: models[0](x, labels=x).loss, ids, CPU)
    optimizer = torch.optim.AdamW(models[1].parameter_groups(0.1), lr=4e-4, betas=(0.9, 0.95))
    losses = []
    for batch in (ids[0], ids[1], ids[0]):
        step()
        losses.append(models[1](batch, labels=batch).loss)
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    assert step.first.item() == losses[0].item()
    for (name, got), want in zip(models[0].named_parameters(), models[1].parameters()):
        assert_close(got, want, 1e-5, name)


@pytest.mark.parametrize("precision", ["autocast", "bf16", "fp32"])
def test_precision(precision):
    """What the weights and the products are in."""
    model = training.make_model(HybridConfig(**SIZES), Setting("cpu", precision))
    seen = []

    def loss_of(ids):
        output = model(ids, labels=ids)
        seen.append(output.logits.dtype)
        return output.loss

    Step(model, loss_of, torch.randint(300, (2, 1, 8)), Setting("cpu", precision))()
    assert model.embedding.weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert seen == [torch.float32 if precision == "fp32" else torch.bfloat16]


def test_hugging_faces_model_is_ours():
    """The same weights give the same loss and gradients."""
    pytest.importorskip("transformers", minversion="5.20")
    torch.manual_seed(0)
    ours, ids = HybridLM(HybridConfig(**{**SIZES, "num_v_heads": 4, "initializer_range": 0.1})), torch.arange(70)[None]
    model, loss_of, note = TRAIN_PROVIDERS["Hugging Face"].build(ours, "none")
    got, want = loss_of(ids), ours(ids, labels=ids).loss
    got.backward(), want.backward()
    assert note and sum(p.numel() for p in model.parameters()) == ours.num_parameters()
    assert_close(got, want, 1e-5, "loss")
    theirs = {name: p.grad for name, p in model.named_parameters()}
    block = ours.layers[1]
    assert_close(theirs["model.embed_tokens.weight"], ours.embedding.weight.grad, 5e-5, "dembedding")
    assert_close(
        theirs["model.layers.1.linear_attn.k_proj.weight"], block.mixer.qkv_proj.weight.grad[32:64], 5e-5, "dk"
    )
    assert_close(theirs["model.layers.1.mlp.up_proj.weight"], block.mlp.gate_up_proj.weight.grad[96:], 5e-5, "dup")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_torchs_flash_attention_stands_in_for_flash_attn(window):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 4, 64, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    t = torch.arange(40, device="cuda")
    behind = t[:, None] - t
    seen = (behind >= 0) & (behind < (window or 40))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen).transpose(1, 2)
    got = flash_attention(q, k, v, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))
    assert_close(got, want, 1e-2, "o")
    dy = torch.randn_like(want)
    for name, a, b in zip("qkv", torch.autograd.grad(got, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy)):
        assert_close(a, b, 2e-2, f"d{name}")


def test_what_a_peer_has_not_is_left_out():
    build = TRAIN_PROVIDERS["Hugging Face"].build
    for change, message in (
        ({"pattern": "GS"}, "OLMo-Hybrid has no such layer: swa"),
        ({"use_gate": False}, "OLMo-Hybrid has no use_gate=False"),
        ({"intermediate_size": None}, "OLMo-Hybrid has no such layer: a mixer without an MLP"),
    ):
        with pytest.raises(Unavailable, match=message):
            build(HybridLM(HybridConfig(**{**SIZES, **change})), "none")


def run(tmp_path, who, presets=("small",), sizes=((32, 2),), budget=60.0, setting=CPU):
    return training.run(presets, [Size(*size) for size in sizes], who, setting, tmp_path / "train.csv", budget)


@pytest.mark.slow
def test_a_run_end_to_end(small, tmp_path, capsys):
    """Ours compiled and eager; checkpointing computes again and changes nothing."""
    who = [TRAIN_PROVIDERS[OURS], TRAIN_PROVIDERS["gdn_ops eager"]]
    rows = run(tmp_path, who, ("small", "hybrid"), budget=600.0)
    rows += run(tmp_path, who[1:], setting=CPU._replace(checkpointing="full"))
    lines = read_csv([tmp_path / "train.csv"])
    assert list(lines[0]) == [f.name for f in (*dataclasses.fields(TrainRow), *dataclasses.fields(Environment))]
    assert [(r.preset, r.T, r.batch, r.provider) for r in rows] == [
        ("small", 32, 2, OURS), ("small", 32, 2, "gdn_ops eager"), ("hybrid", 32, 2, OURS),
        ("hybrid", 32, 2, "gdn_ops eager"), ("small", 32, 2, "gdn_ops eager"),
    ]  # fmt: skip
    assert len(lines) == 5 and [line["checkpointing"] for line in lines] == ["none"] * 4 + ["full"]
    for row in rows:
        assert row.least_ms <= row.p20_ms <= row.p50_ms <= row.p80_ms and row.samples > 0 and row.first_s > 0
        assert row.tokens_per_s == pytest.approx(64e3 / row.p50_ms, rel=1e-3) and row.note == ""
        assert row.mfu == pytest.approx(row.tflop * 1e12 / (row.p50_ms * 1e-3) / 1e11, rel=1e-3)
        assert row.loss == pytest.approx(5.7, abs=0.3) and row.peak_gib is None and row.mfu_nominal is None
    assert rows[1].loss_error < 1e-5 and rows[3].loss_error < 1e-5 and rows[4].loss == rows[1].loss
    printed = capsys.readouterr().out
    assert "to ours" in printed and "4 rows in" in printed and "hybrid  32x2" in printed


def test_failures_stay_in_their_rows(small, tmp_path, capsys):
    def broken(ours, checkpointing):
        raise RuntimeError("refuses this chip\nat length")

    def wrong(ours, checkpointing):
        trained = TRAIN_PROVIDERS["gdn_ops eager"].build(ours, checkpointing)
        return trained._replace(loss_of=lambda ids: 2 * trained.loss_of(ids), note="doubled")

    def without(ours, checkpointing):
        raise Unavailable("no such layer")

    who = [
        TrainProvider("broken", broken),
        TrainProvider("without", without),
        TrainProvider("nowhere", without, ("no_such_module", "no-such-module")),
        TrainProvider(OURS, TRAIN_PROVIDERS["gdn_ops eager"].build),
        TrainProvider("wrong", wrong),
    ]
    rows = {row.provider: row for row in run(tmp_path, who)}
    assert set(rows) == {"broken", OURS, "wrong"}
    assert rows["broken"].p50_ms is None and rows["broken"].note == "RuntimeError: refuses this chip"
    assert rows["wrong"].loss_error == pytest.approx(1.0, rel=1e-3) and rows["wrong"].note == "doubled"
    printed = capsys.readouterr().out
    assert "left out: without: no such layer" in printed
    assert "absent: nowhere: no-such-module is not installed: pip install no-such-module" in printed


def test_spent_budget_names_what_it_left_out(small, tmp_path, capsys):
    assert run(tmp_path, [TRAIN_PROVIDERS[OURS]], budget=0.0) == []
    assert "not measured, the budget of 0 s was spent: small 32x2" in capsys.readouterr().out


def test_a_size_that_takes_long_keeps_what_it_has(small, tmp_path, capsys, monkeypatch):
    """The budget ends in the first provider's first step."""
    entered, now = training.enter, time.perf_counter

    def slow(*args):
        entry = entered(*args)
        monkeypatch.setattr(training.time, "perf_counter", lambda: now() + 1000)
        return entry

    monkeypatch.setattr(training, "enter", slow)
    who = [TRAIN_PROVIDERS[name] for name in ("gdn_ops eager", OURS)]
    rows = run(tmp_path, who, budget=500.0)
    assert [row.provider for row in rows] == ["gdn_ops eager"] and rows[0].p50_ms is not None
    assert f"not measured, the budget is spent: small 32x2 {OURS}" in capsys.readouterr().out


def test_the_command(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.csv")]
    main(["train", "--device", "cpu", "--preset", "tiny", "--shape", "128x2", "--provider", "gdn_ops eager", *out])
    (line,) = read_csv([tmp_path / "x.csv"])
    assert (line["preset"], line["T"], line["batch"], line["precision"]) == ("tiny", "128", "2", "fp32")
    for arguments, message in ((["--shape", "128"], "expected TxBATCH"), (["--preset", "huge"], "invalid choice")):
        with pytest.raises(SystemExit):
            main(["train", *arguments])
        assert message in capsys.readouterr().err


def test_the_picture_comes_from_the_csv_alone(small, tmp_path):
    who = [TRAIN_PROVIDERS["gdn_ops eager"]]
    rows = run(tmp_path, who, sizes=((64, 1), (32, 2)))
    (picture,) = training_plot.curves([tmp_path / "train.csv"])
    assert picture.sizes == [Size(32, 2), Size(64, 1)] and list(picture.points) == ["gdn_ops eager"]
    point = picture.points["gdn_ops eager"][Size(32, 2)]
    assert point.p20 <= point.p50 <= point.p80
    assert point.p50 == pytest.approx(rows[1].tokens_per_s, rel=1e-3)
    pytest.importorskip("matplotlib")
    (path,) = draw([tmp_path / "train.csv"], tmp_path / "plots")
    assert path.name == picture.name and "train-small-fp32" in path.name
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.csv").write_text((tmp_path / "train.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="expected at least one row with a time"):
        training_plot.curves([tmp_path / "empty.csv"])
