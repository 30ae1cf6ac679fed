"""What a hybrid model is made of, and the sizes of the paper's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gdn_ops.models.mixers import MIXERS

_LETTERS = {mixer.letter: name for name, mixer in MIXERS.items()}
_OPTIONAL = ("intermediate_size", "num_v_heads", "num_key_value_heads", "attention_head_dim")


@dataclass(frozen=True)
class HybridConfig:
    """Sizes of a :class:`gdn_ops.models.HybridLM`.

    Args:
        vocab_size, hidden_size, num_hidden_layers, intermediate_size: of the embedding, the stream, the stack, the MLP;
            without an ``intermediate_size`` a layer is its mixer alone, as in Mamba2.
        pattern: mixers of the layers, repeated until there are enough: letters (``"GS"`` is the paper's H1) or names
            (``["gdn", "swa"]``). G, gdn: :class:`gdn_ops.nn.GatedDeltaNet`; D, deltanet: the same without decay. M,
            mamba2: :class:`gdn_ops.nn.Mamba2`. S, swa: :class:`gdn_ops.nn.SlidingWindowAttention`; A, attention: the
            same over ``max_position`` tokens. Kept as a tuple of names.
        num_heads, num_v_heads, head_k_dim, head_v_dim, conv_size, allow_neg_eigval: of the delta rule.
        use_short_conv, use_gate, use_decay, use_delta, use_qk_l2norm: what a gated delta net may do without.
        mamba_head_dim, mamba_state_size, mamba_groups, mamba_expand: of Mamba2, which has the same ``conv_size``.
        num_attention_heads, num_key_value_heads, attention_head_dim, window, max_position, rope_theta: of attention.
        norm_eps: of every norm.
        tie_word_embeddings: the output projection is the embedding.
        initializer_range: standard deviation of initial weights.

    Raises:
        ValueError, TypeError: naming the field.

    Example::

        >>> config = HybridConfig.preset("h1-0.4b", vocab_size=50304)
        >>> config.hidden_size, config.layer_mixers[:3]
        (1536, ('gdn', 'swa', 'gdn'))
        >>> HybridConfig.from_dict(config.to_dict()) == config
        True
    """

    vocab_size: int = 32000
    hidden_size: int = 1536
    num_hidden_layers: int = 12
    pattern: str | Sequence[str] = "GS"
    intermediate_size: int | None = 6144
    num_heads: int = 9
    num_v_heads: int | None = None
    head_k_dim: int = 128
    head_v_dim: int = 256
    conv_size: int = 4
    allow_neg_eigval: bool = False
    use_short_conv: bool = True
    use_gate: bool = True
    use_decay: bool = True
    use_delta: bool = True
    use_qk_l2norm: bool = True
    mamba_head_dim: int = 64
    mamba_state_size: int = 128
    mamba_groups: int = 1
    mamba_expand: float = 2.0
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    attention_head_dim: int | None = None
    window: int = 2048
    max_position: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "pattern":
                _check(field, getattr(self, field.name))
        object.__setattr__(self, "pattern", _mixer_names(self.pattern))
        for name in dict.fromkeys(self.layer_mixers):
            MIXERS[name].check(self)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer's name of every layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_hidden_layers))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> HybridConfig:
        """A configuration by name (see ``PRESETS``), with fields replaced by ``overrides``."""
        if name not in _PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
        return cls.from_dict({**_PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> HybridConfig:
        """The inverse of :meth:`to_dict`; absent fields have their defaults, unknown ones are a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]}: expected one of the fields {', '.join(known)}, got {unknown[0]!r}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, fit for JSON."""
        return {**dataclasses.asdict(self), "pattern": list(self.pattern)}


def _check(field: dataclasses.Field, value: Any) -> None:
    kind = type(field.default) if field.default is not None else int
    expected = {int: "a positive integer", float: "a positive number", bool: "True or False"}[kind]
    if value is None and field.name in _OPTIONAL:
        return
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool)
    if not fits:
        raise TypeError(f"{field.name}: expected {expected}, got {value!r}")
    if kind is not bool and not 0 < value < float("inf"):
        raise ValueError(f"{field.name}: expected {expected}, got {value!r}")


def _mixer_names(pattern: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(pattern, (str, list, tuple)):
        raise TypeError(f"pattern: expected a string or a list of strings, got {type(pattern).__name__}")
    for item in pattern:
        if not isinstance(item, str):
            raise TypeError(f"pattern: expected a string or a list of strings, got {item!r} in it")
    names = [_LETTERS.get(item, item) for item in pattern]
    known = ", ".join(f"{letter} ({name})" for letter, name in _LETTERS.items())
    for given, name in zip(pattern, names):
        if name not in MIXERS:
            raise ValueError(f"pattern: expected mixers among {known}, got {given!r}")
    if not names:
        raise ValueError(f"pattern: expected at least one mixer among {known}, got {pattern!r}")
    return tuple(names)


# Of Gated DeltaNet and H1 the paper's own code gives the sizes (arXiv 2412.06464). The other models of its tables are
# sized here to the same number of parameters: DeltaNet as Gated DeltaNet, Samba and H2 as H1, Transformer++ and Mamba2
# (layers without an MLP) in the shapes that they usually have.
_PAPER_04B = {
    "hidden_size": 1536, "intermediate_size": 6144, "num_heads": 9, "head_k_dim": 128, "head_v_dim": 256,
    "num_attention_heads": 12,
}  # fmt: skip
_PAPER_13B = {
    "hidden_size": 2304, "intermediate_size": 6144, "num_heads": 9, "head_k_dim": 192, "head_v_dim": 384,
    "num_attention_heads": 18,
}  # fmt: skip
_DELTA_13B = {
    "hidden_size": 2400, "intermediate_size": 5888, "num_heads": 9, "head_k_dim": 200, "head_v_dim": 400,
    "num_hidden_layers": 16,
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    # Bytes; learns the look of source text in minutes on two cores. Windows of 32 wrap within a chunk of 64.
    "tiny": {
        "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "pattern": "GS", "intermediate_size": 384,
        "num_heads": 3, "head_k_dim": 32, "head_v_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "window": 32,
    },
    "transformer-0.4b": {**_PAPER_04B, "num_hidden_layers": 12, "pattern": "A"},
    "mamba2-0.4b": {**_PAPER_04B, "num_hidden_layers": 32, "pattern": "M", "intermediate_size": None},
    "deltanet-0.4b": {**_PAPER_04B, "num_hidden_layers": 11, "pattern": "D"},
    "gdn-0.4b": {**_PAPER_04B, "num_hidden_layers": 11, "pattern": "G"},
    "samba-0.4b": {**_PAPER_04B, "num_hidden_layers": 12, "pattern": "MS"},
    "h1-0.4b": {**_PAPER_04B, "num_hidden_layers": 12, "pattern": "GS"},
    "h2-0.4b": {**_PAPER_04B, "num_hidden_layers": 12, "pattern": "MGS"},
    "transformer-1.3b": {
        "hidden_size": 2048, "num_hidden_layers": 24, "pattern": "A", "intermediate_size": 5632,
        "num_attention_heads": 16,
    },
    "mamba2-1.3b": {"hidden_size": 2048, "num_hidden_layers": 48, "pattern": "M", "intermediate_size": None},
    "deltanet-1.3b": {**_DELTA_13B, "pattern": "D"},
    "gdn-1.3b": {**_DELTA_13B, "pattern": "G"},
    "samba-1.3b": {**_PAPER_13B, "num_hidden_layers": 18, "pattern": "MS"},
    "h1-1.3b": {**_PAPER_13B, "num_hidden_layers": 18, "pattern": "GS"},
    "h2-1.3b": {**_PAPER_13B, "num_hidden_layers": 18, "pattern": "MGS"},
}  # fmt: skip
PRESETS = tuple(_PRESETS)
