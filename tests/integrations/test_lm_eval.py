"""The harness's adapter on a tiny model: likelihoods against the model's own, and a local task of the harness."""

from __future__ import annotations

import pytest
import torch

from tests.models.models import make

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: it brings 600 MB of dependencies")

from lm_eval.api.instance import Instance  # noqa: E402

from gdn_ops.integrations.lm_eval import HybridHarness, Text  # noqa: E402


def model_of_bytes():
    return make("GS", torch.float64, vocab_size=256).eval()


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def by_hand(model, text, start):
    """Log-likelihood of the bytes of ``text`` from ``start``, and whether each is the likeliest."""
    ids = torch.tensor(list(text))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1 : -1]
    wanted = ids[0, start:]
    return logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


def test_likelihoods_of_continuations_in_mixed_batches():
    model = model_of_bytes()
    pairs = [("the cat", " sat"), ("a", " b c d e f g"), ("x" * 70, "y"), ("", "no context")]
    got = HybridHarness(model, batch_size=3).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, got):
        before = context.encode() or b"\0"
        want, want_greedy = by_hand(model, before + continuation.encode(), len(before))
        assert value == pytest.approx(want, rel=1e-5) and greedy == want_greedy


def test_a_long_document_is_scored_whole():
    """In pieces that follow each other, as in one."""
    model, text = model_of_bytes(), "some text " * 20
    want, _ = by_hand(model, b"\0" + text.encode(), 1)
    for piece in (7, 64, 10_000):
        (got,) = HybridHarness(model, piece=piece).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
        assert got == pytest.approx(want, rel=1e-6)


def test_generation_stops():
    model = model_of_bytes()
    with torch.no_grad():
        model.embedding.weight[0] = 0  # the end is not the likeliest
        model.embedding.weight[128:] = 0  # and text is ASCII
    harness = HybridHarness(model)
    free = harness.generate_until(requests("generate_until", [("abc", {"until": [], "max_gen_toks": 12})]))[0]
    ids = model.generate(torch.tensor(list(b"abc"))[None], 12, eos_token_id=0)[0, 3:].tolist()
    want = Text().decode(ids[: ids.index(0)] if 0 in ids else ids)
    assert free == want and len(free) > 2
    stop = free[2]
    assert free.split(stop)[0] != free
    cut = harness.generate_until(requests("generate_until", [("abc", {"until": stop, "max_gen_toks": 12})]))[0]
    assert cut == free.split(stop)[0]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dtype: expected the name of a torch dtype, got 'float99'"):
        HybridHarness(model_of_bytes(), dtype="float99")
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        HybridHarness(model_of_bytes(), batch_size=0)


TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
metric_list:
  - metric: acc
"""


def test_a_local_task_of_the_harness(tmp_path, monkeypatch):
    """Two choices a document, of which the model's own likelier one is the target in two of three."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.tasks import TaskManager

    model, lines = model_of_bytes(), []
    for i, text in enumerate(("one two", "three", "four five")):
        choices = [" left", " right"]
        scores = [by_hand(model, (text + c).encode(), len(text)) for c in choices]
        better = int(scores[1][0] > scores[0][0])
        lines.append({"text": text, "choices": choices, "target": better if i < 2 else 1 - better})
    data = tmp_path / "data.jsonl"
    import json

    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=data))
    model.save_pretrained(tmp_path / "model")
    result = lm_eval.simple_evaluate(
        HybridHarness(tmp_path / "model"), tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert result["results"]["local_choice"]["acc,none"] == pytest.approx(2 / 3)
