"""HybridConfig: patterns, presets and their sizes, the way to a dict and back, every bad field."""

from __future__ import annotations

import json

import pytest
import torch

from gdn_ops.models import PRESETS, HybridConfig, HybridLM


def test_patterns_as_string_or_list():
    for pattern in ("GS", ["gdn", "swa"], ("G", "swa"), ["G", "S"]):
        assert HybridConfig(pattern=pattern) == HybridConfig(pattern="GS")
    assert HybridConfig(pattern="GGS", num_hidden_layers=5).layer_mixers == ("gdn", "gdn", "swa", "gdn", "gdn")
    assert HybridConfig(pattern="G", num_hidden_layers=2).layer_mixers == ("gdn", "gdn")
    assert hash(HybridConfig(pattern=["gdn"])) == hash(HybridConfig(pattern="G"))


# arXiv 2412.06464: layers, width, MLP, heads x K/V of the mixer, heads of attention.
PAPER = {
    "gdn-0.4b": ("G", 11, 1536, 6144, (9, 128, 256), None),
    "h1-0.4b": ("GS", 12, 1536, 6144, (9, 128, 256), 12),
    "gdn-1.3b": ("G", 16, 2400, 5888, (9, 200, 400), None),
    "h1-1.3b": ("GS", 18, 2304, 6144, (9, 192, 384), 18),
}
# Of the same number of parameters: pattern, layers, width, MLP, heads of attention.
FAMILY = {
    "transformer-0.4b": ("A", 12, 1536, 6144, 12),
    "mamba2-0.4b": ("M", 32, 1536, None, None),
    "deltanet-0.4b": ("D", 11, 1536, 6144, None),
    "samba-0.4b": ("MS", 12, 1536, 6144, 12),
    "h2-0.4b": ("MGS", 12, 1536, 6144, 12),
    "transformer-1.3b": ("A", 24, 2048, 5632, 16),
    "mamba2-1.3b": ("M", 48, 2048, None, None),
    "deltanet-1.3b": ("D", 16, 2400, 5888, None),
    "samba-1.3b": ("MS", 18, 2304, 6144, 18),
    "h2-1.3b": ("MGS", 18, 2304, 6144, 18),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers(name):
    pattern, layers, width, mlp, (heads, K, V), attention_heads = PAPER[name]
    x = HybridConfig.preset(name)
    assert (x.num_hidden_layers, x.hidden_size, x.intermediate_size) == (layers, width, mlp)
    assert x.layer_mixers == HybridConfig(pattern=pattern, num_hidden_layers=layers).layer_mixers
    assert (x.num_heads, x.num_v_heads, x.head_k_dim, x.head_v_dim) == (heads, None, K, V)
    assert heads * K == 0.75 * width and heads * V == 1.5 * width
    assert (x.vocab_size, x.window, x.conv_size) == (32000, 2048, 4)
    if attention_heads:
        assert (x.num_attention_heads, x.num_key_value_heads) == (attention_heads, None)


@pytest.mark.parametrize("name", FAMILY)
def test_presets_of_the_papers_family(name):
    pattern, layers, width, mlp, attention_heads = FAMILY[name]
    x = HybridConfig.preset(name)
    assert (x.num_hidden_layers, x.hidden_size, x.intermediate_size) == (layers, width, mlp)
    assert x.layer_mixers == HybridConfig(pattern=pattern, num_hidden_layers=layers).layer_mixers
    assert (x.vocab_size, x.window, x.max_position, x.conv_size) == (32000, 2048, 4096, 4)
    assert (x.mamba_head_dim, x.mamba_state_size, x.mamba_groups, x.mamba_expand) == (64, 128, 1, 2.0)
    if "A" in pattern or "S" in pattern:
        assert x.num_attention_heads == attention_heads and x.hidden_size == 128 * attention_heads


@pytest.mark.parametrize("name", [*PAPER, *FAMILY])
def test_presets_are_as_large_as_their_names_say(name):
    """1.3B counts everything; 0.4B is what the paper's smaller models have beside their embedding, to 0.1B."""
    with torch.device("meta"):
        model = HybridLM(HybridConfig.preset(name))
    count = model.num_parameters()
    assert count == sum(x.numel() for x in model.state_dict().values())
    if name.endswith("1.3b"):
        assert 1.25e9 < count < 1.36e9
    else:
        assert 0.4e9 < count - model.embedding.weight.numel() < 0.5e9


def test_every_preset_is_listed_and_valid():
    assert {"tiny", *PAPER, *FAMILY} == set(PRESETS)
    assert HybridConfig.preset("tiny").vocab_size == 256 and HybridConfig.preset("tiny").window < 64
    with torch.device("meta"):
        assert HybridLM(HybridConfig.preset("tiny")).num_parameters() < 2e6


def test_presets_take_overrides():
    x = HybridConfig.preset("h1-0.4b", vocab_size=50304, pattern="GGS")
    assert x.vocab_size == 50304 and x.pattern == ("gdn", "gdn", "swa") and x.hidden_size == 1536
    with pytest.raises(ValueError, match=r"preset: expected one of tiny, transformer-0\.4b.*, got 'huge'"):
        HybridConfig.preset("huge")
    with pytest.raises(ValueError, match=r"widow: expected one of the fields vocab_size, .*, got 'widow'"):
        HybridConfig.preset("tiny", widow=3)


@pytest.mark.parametrize("name", PRESETS)
def test_to_dict_and_back_through_json(name):
    x = HybridConfig.preset(name, allow_neg_eigval=True, rope_theta=5e5, num_v_heads=18)
    fields = json.loads(json.dumps(x.to_dict()))
    assert HybridConfig.from_dict(fields) == x
    assert HybridConfig.from_dict({}) == HybridConfig()
    with pytest.raises(ValueError, match="depth: expected one of the fields"):
        HybridConfig.from_dict({**fields, "depth": 3})


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        HybridConfig().vocab_size = 3


INTEGERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_heads", "num_v_heads", "head_k_dim",
    "head_v_dim", "conv_size", "num_attention_heads", "num_key_value_heads", "attention_head_dim", "window",
    "max_position", "mamba_head_dim", "mamba_state_size", "mamba_groups",
)  # fmt: skip
NUMBERS = ("rope_theta", "norm_eps", "initializer_range", "mamba_expand")
FLAGS = (
    "allow_neg_eigval", "tie_word_embeddings", "use_short_conv", "use_gate", "use_decay", "use_delta", "use_qk_l2norm",
)  # fmt: skip
OPTIONAL = ("intermediate_size", "num_v_heads", "num_key_value_heads", "attention_head_dim")


def test_the_lists_of_bad_fields_are_complete():
    assert {*INTEGERS, *NUMBERS, *FLAGS, "pattern"} == set(HybridConfig().to_dict())


@pytest.mark.parametrize("name", INTEGERS)
def test_bad_integers(name):
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"^{name}: expected a positive integer, got {value}$"):
            HybridConfig(**{name: value})
    for value in (True, 2.0, "7", [1]):
        with pytest.raises(TypeError, match=f"^{name}: expected a positive integer, got "):
            HybridConfig(**{name: value})


@pytest.mark.parametrize("name", [n for n in INTEGERS if n not in OPTIONAL] + [*NUMBERS, *FLAGS])
def test_required_fields_are_not_none(name):
    with pytest.raises(TypeError, match=f"^{name}: expected .*, got None$"):
        HybridConfig(**{name: None})


@pytest.mark.parametrize("name", NUMBERS)
def test_bad_numbers(name):
    for value in (0, -1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^{name}: expected a positive number, got {value}$"):
            HybridConfig(**{name: value})
    for value in (True, "7"):
        with pytest.raises(TypeError, match=f"^{name}: expected a positive number, got "):
            HybridConfig(**{name: value})
    assert getattr(HybridConfig(**{name: 1}), name) == 1


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(name):
    for value in (0, 1, "true"):
        with pytest.raises(TypeError, match=f"^{name}: expected True or False, got "):
            HybridConfig(**{name: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"pattern": "GX"},
            r"pattern: expected mixers among G \(gdn\), D \(deltanet\), M \(mamba2\), S \(swa\), "
            r"A \(attention\), got 'X'",
        ),
        ({"pattern": ["gdn", "mamba3"]}, "pattern: expected mixers among .*, got 'mamba3'"),
        ({"pattern": ""}, "pattern: expected at least one mixer among .*, got ''"),
        ({"pattern": []}, r"pattern: expected at least one mixer among .*, got \[\]"),
        ({"num_v_heads": 10}, "num_v_heads: expected a multiple of num_heads=9, got 10"),
        ({"conv_size": 5}, "conv_size: expected 2 to 4, got 5"),
        ({"conv_size": 1}, "conv_size: expected 2 to 4, got 1"),
        ({"pattern": "M", "conv_size": 5}, "conv_size: expected 2 to 4, got 5"),
        (
            {"pattern": "M", "mamba_head_dim": 7},
            r"mamba_head_dim: expected a divisor of mamba_expand \* hidden_size=3072, got 7",
        ),
        ({"pattern": "M", "mamba_groups": 7}, "mamba_groups: expected a divisor of the 48 heads, got 7"),
        ({"num_key_value_heads": 5}, "num_attention_heads: expected a multiple of num_key_value_heads=5, got 12"),
        ({"num_attention_heads": 7}, "hidden_size: expected a multiple of num_attention_heads=7, got 1536"),
        ({"attention_head_dim": 33}, "attention_head_dim: expected an even number, got 33"),
        ({"hidden_size": 12 * 5}, "attention_head_dim: expected an even number, got 5"),
    ],
)
def test_bad_combinations(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        HybridConfig(**fields)


@pytest.mark.parametrize("pattern", [3, None, {"gdn"}])
def test_bad_pattern_types(pattern):
    with pytest.raises(TypeError, match="pattern: expected a string or a list of strings, got"):
        HybridConfig(pattern=pattern)


def test_fields_of_absent_mixers_do_not_matter():
    assert HybridConfig(pattern="G", num_attention_heads=7).num_attention_heads == 7
    assert HybridConfig(pattern="S", conv_size=9).conv_size == 9
