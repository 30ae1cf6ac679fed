"""Generation: greedy against the full forward, the distribution of samples, ends, streams, padding, bad arguments."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.models import generation
from gdn_ops.models.generation import Sampling
from tests.models.models import PATTERNS, make, tokens
from tests.nn.samples import AGREEMENT
from tests.oracle import DEVICES, assert_close

PROMPT = tokens(2, 9)


def greedy(model, ids, count):
    """By whole forward passes, without a state."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_is_the_full_forwards_argmax(pattern, device):
    model, ids = make(pattern, AGREEMENT[device][0], device), PROMPT.to(device)
    with torch.no_grad():
        want = greedy(model, ids, 20)
    got = model.generate(ids, max_new_tokens=20)
    assert torch.equal(got, want) and got.dtype == torch.int64 and not got.requires_grad
    assert want[:, 9:].unique().numel() > 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_go_on_as_if_alone(side):
    model = make()
    texts = [tokens(1, n, seed=n) for n in (3, 9)]
    pad = torch.zeros(1, 6, dtype=torch.int64)
    pair = [pad, texts[0]] if side == "left" else [texts[0], pad]
    ids, attention_mask = torch.cat([torch.cat(pair, 1), texts[1]]), torch.ones(2, 9)
    attention_mask[0, slice(0, 6) if side == "left" else slice(3, 9)] = 0
    got = model.generate(ids, 12, attention_mask=attention_mask)
    assert torch.equal(got[:, :9], ids)
    for row, text in enumerate(texts):
        assert torch.equal(got[row, 9:], model.generate(text, 12)[0, text.shape[1] :])


def test_stream_yields_what_generate_returns_one_by_one():
    model = make()
    stream = model.stream(PROMPT, max_new_tokens=5)
    first = next(stream)
    assert first.shape == (2,) and torch.equal(torch.stack([first, *stream], 1), model.generate(PROMPT, 5)[:, 9:])


def test_no_step_is_made_after_the_last_token(monkeypatch):
    model, calls = make(), []
    step = model.step
    monkeypatch.setattr(model, "step", lambda *args: calls.append(1) or step(*args))
    model.generate(PROMPT, 4)
    assert len(calls) == 3


def test_no_tokens():
    assert torch.equal(make().generate(PROMPT.int(), 0), PROMPT)


def test_a_row_stops_at_its_end_and_the_stream_when_all_have():
    model = make()
    free = model.generate(PROMPT, 20)[:, 9:]
    end = free[0, 4].item()
    first = [row.tolist().index(end) if end in row.tolist() else 20 for row in free]
    got = model.generate(PROMPT, 20, eos_token_id=end)[:, 9:]
    assert got.shape[1] == min(20, max(first) + 1)
    for row in range(2):
        assert torch.equal(got[row, : first[row] + 1], free[row, : first[row] + 1][: got.shape[1]])
        assert got[row, first[row] :].eq(end).all()
    assert first[0] <= 4


def test_the_stream_ends_early_when_every_row_has_ended():
    model, ids = make(), PROMPT[:1]
    free = model.generate(ids, 20)[0, 9:].tolist()
    got = model.generate(ids, 20, eos_token_id=free[6])[0, 9:].tolist()
    assert got == free[: free.index(free[6]) + 1] and len(got) < 20


def test_samples_repeat_with_a_generator_and_differ_between_seeds():
    def sample(seed):
        return make().generate(PROMPT, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


@pytest.mark.gpu
def test_samples_on_cuda():
    model, ids = make(dtype=torch.bfloat16, device="cuda"), PROMPT.cuda()

    def sample(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return model.generate(ids, 20, temperature=1.0, top_k=10, top_p=0.9, generator=generator)

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    assert sample(0).min() >= 0 and sample(0).max() < 40


def frequencies(logits, count=40000, **options):
    sampling = Sampling(generator=torch.Generator().manual_seed(0), **options)
    return generation.choose(logits.expand(count, -1), sampling).bincount(minlength=logits.shape[-1]) / count


LOGITS = torch.tensor([[2.0, -1.0, 1.0, 0.0, 1.5]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_temperature(temperature):
    got = frequencies(LOGITS, temperature=temperature)
    assert (got - (LOGITS[0] / temperature).softmax(-1)).abs().max() < 0.01


def test_top_k_draws_among_the_k_likeliest():
    kept = torch.tensor([2.0, -torch.inf, 1.0, -torch.inf, 1.5]).softmax(-1)
    assert (frequencies(LOGITS, temperature=1.0, top_k=3) - kept).abs().max() < 0.01
    assert (frequencies(LOGITS, temperature=1.0, top_k=99) - LOGITS[0].softmax(-1)).abs().max() < 0.01
    assert frequencies(LOGITS, temperature=1.0, top_k=1).tolist() == [1, 0, 0, 0, 0]


def test_top_p_draws_among_the_fewest_that_hold_p():
    """Probabilities are 0.46, 0.02, 0.17, 0.06, 0.28: 0.7 needs the first two, 0.75 three."""
    probability = LOGITS[0].softmax(-1)
    for p, kept in ((0.3, [0]), (0.7, [0, 4]), (0.75, [0, 4, 2]), (1.0, [0, 1, 2, 3, 4])):
        want = torch.zeros(5).index_add(0, torch.tensor(kept), probability[kept])
        assert (frequencies(LOGITS, temperature=1.0, top_p=p) - want / want.sum()).abs().max() < 0.01


def test_top_p_counts_among_the_top_k():
    """Of the three likeliest, the first holds 0.5 of what is left, so that 0.45 needs it alone."""
    assert frequencies(LOGITS, temperature=1.0, top_k=3, top_p=0.45).tolist() == [1, 0, 0, 0, 0]


def test_extreme_temperatures_and_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 9.9e3]])
    assert frequencies(logits, temperature=1e-8, count=50).tolist() == [1, 0, 0]
    assert (frequencies(logits, temperature=1e9) - 1 / 3).abs().max() < 0.01
    assert frequencies(torch.tensor([[-torch.inf, 0.0]]), temperature=1.0, count=50).tolist() == [0, 1]


def test_each_row_is_drawn_from_its_own_logits():
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    assert generation.choose(logits, Sampling(1.0, top_k=2, top_p=0.9)).tolist() == [0, 2]
    assert_close(generation.choose(logits, Sampling()), torch.tensor([0, 2]), 0.0, "greedy")


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (ValueError, {"max_new_tokens": -1}, "max_new_tokens: expected at least 0, got -1"),
        (TypeError, {"max_new_tokens": 2.0}, r"max_new_tokens: expected an integer, got 2\.0"),
        (ValueError, {"max_new_tokens": None}, "max_new_tokens: expected at least 0, got None"),
        (ValueError, {"temperature": -0.5}, r"temperature: expected at least 0, got -0\.5"),
        (ValueError, {"temperature": float("nan")}, "temperature: expected at least 0, got nan"),
        (ValueError, {"temperature": float("inf")}, "temperature: expected at least 0, got inf"),
        (TypeError, {"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        (ValueError, {"temperature": 1.0, "top_k": 0}, "top_k: expected at least 1, got 0"),
        (TypeError, {"temperature": 1.0, "top_k": 1.5}, r"top_k: expected an integer, got 1\.5"),
        (ValueError, {"temperature": 1.0, "top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0\.0"),
        (ValueError, {"temperature": 1.0, "top_p": 1.1}, r"top_p: expected a number in \(0, 1\], got 1\.1"),
        (TypeError, {"temperature": 1.0, "top_p": True}, "top_p: expected a number, got True"),
        (ValueError, {"top_k": 3}, "top_k, top_p: expected None with temperature=0"),
        (ValueError, {"eos_token_id": 40}, r"eos_token_id: expected a token in \[0, 40\), got 40"),
        (ValueError, {"eos_token_id": -1}, r"eos_token_id: expected a token in \[0, 40\), got -1"),
        (TypeError, {"generator": 3}, r"generator: expected a torch\.Generator, got int"),
        (ValueError, {"input_ids": PROMPT[0]}, r"input_ids: expected \[B, T\], got shape \(9,\)"),
        (ValueError, {"attention_mask": PROMPT[:, 1:]}, r"attention_mask: expected shape \(2, 9\), got \(2, 8\)"),
        (
            ValueError,
            {"attention_mask": torch.tensor([[1], [0]]).expand(2, 9)},
            "attention_mask: expected a real token in every row, got none in row 1",
        ),
    ],
)
def test_bad_arguments_are_named_before_the_first_token(kind, arguments, message):
    with pytest.raises(kind, match=message):
        make().stream(**{"input_ids": PROMPT, "max_new_tokens": 2, **arguments})
