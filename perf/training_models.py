"""Whose training steps are timed: gdn_ops' models, FLA's Gated DeltaNet and Hugging Face's OLMo-Hybrid.

A peer's model is built from the same configuration and gets the same weights, under its own names: its first loss must
be ours. What of a configuration it has not is refused by :class:`Unavailable` or by the library itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdn_ops.models import HybridConfig, HybridLM
from perf.providers import OURS, Unavailable, import_library
from perf.records import version_of

Loss = Callable[[Tensor], Tensor]


class Trained(NamedTuple):
    """A model and its loss of ``ids [B, T]``; ``note`` says what else took part."""

    model: nn.Module
    loss_of: Loss
    note: str = ""


class TrainProvider(NamedTuple):
    """``build(ours, checkpointing)`` gives a model with the weights of ``ours``, on its device and in its dtype, or
    raises :class:`Unavailable`; ``library`` is the module that it needs and the distribution that has it."""

    name: str
    build: Callable[[HybridLM, str], Trained]
    library: tuple[str, str] | None = None


# Ours by parts -> a peer's name; {i} is the layer.
_FLA = {
    "embedding": "model.embeddings.weight", "norm": "model.norm.weight", "head": "lm_head.weight",
    "mixer_norm": "model.layers.{i}.attn_norm.weight", "mlp_norm": "model.layers.{i}.mlp_norm.weight",
    **{x: f"model.layers.{{i}}.attn.{x}_proj.weight" for x in ("q", "k", "v", "a", "b", "o")},
    **{f"conv_{x}": f"model.layers.{{i}}.attn.{x}_conv1d.weight" for x in ("q", "k", "v")},
    **{x: f"model.layers.{{i}}.attn.{x}" for x in ("A_log", "dt_bias")},
    "z": "model.layers.{i}.attn.g_proj.weight", "o_norm": "model.layers.{i}.attn.o_norm.weight",
    **{x: f"model.layers.{{i}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}  # fmt: skip
_OLMO = {
    "embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight",
    "mixer_norm": "model.layers.{i}.input_layernorm.weight",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    **{x: f"model.layers.{{i}}.linear_attn.{x}_proj.weight" for x in ("q", "k", "v", "a", "b", "o")},
    **{x: f"model.layers.{{i}}.linear_attn.{x}" for x in ("A_log", "dt_bias")},
    "conv": "model.layers.{i}.linear_attn.conv1d.weight", "z": "model.layers.{i}.linear_attn.g_proj.weight",
    "o_norm": "model.layers.{i}.linear_attn.o_norm.weight",
    **{x: f"model.layers.{{i}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}  # fmt: skip


def _parts(block: nn.Module) -> dict[str, Tensor]:
    """The weights of one of our layers, what is one product here cut into the peers' several."""
    weights = {name: p.detach() for name, p in block.named_parameters()}
    mixer, parts = block.mixer, {}
    if "mixer.conv_weight" in weights:
        sizes = [mixer.key_dim, mixer.key_dim, mixer.value_dim]
        parts["conv"] = weights["mixer.conv_weight"][:, None]
        parts |= dict(zip(("conv_q", "conv_k", "conv_v"), parts["conv"].split(sizes)))
    else:
        sizes = [mixer.num_heads * mixer.head_dim, *[mixer.num_kv_heads * mixer.head_dim] * 2]
    parts |= dict(zip("qkv", weights["mixer.qkv_proj.weight"].split(sizes)))
    parts |= dict(zip(("gate", "up"), weights["mlp.gate_up_proj.weight"].chunk(2)))
    plain = {
        "mixer_norm": "mixer_norm.weight", "mlp_norm": "mlp_norm.weight", "down": "mlp.down_proj.weight",
        "A_log": "mixer.A_log", "dt_bias": "mixer.dt_bias", "o_norm": "mixer.o_norm.weight",
        **{x: f"mixer.{x}_proj.weight" for x in ("a", "b", "z", "o")},
    }  # fmt: skip
    return parts | {part: weights[name] for part, name in plain.items() if name in weights}


def copy_weights(ours: HybridLM, peer: nn.Module, names: dict[str, str]) -> None:
    """Into ``peer``, by its ``names``; ValueError if they do not all find a place of their shape there."""
    state = {
        names["embedding"]: ours.embedding.weight, names["norm"]: ours.norm.weight, names["head"]: ours.output_weight,
    }  # fmt: skip
    for i, block in enumerate(ours.layers):
        state |= {names[part].format(i=i): w for part, w in _parts(block).items() if part in names}
    wrong = peer.load_state_dict({name: w.detach() for name, w in state.items()}, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        got = [*wrong.missing_keys, *wrong.unexpected_keys][0]
        raise ValueError(f"weights: expected the same in both models, got {got} in one of them")


def _check(config: HybridConfig, mixers: tuple[str, ...], who: str) -> None:
    other = [name for name in config.layer_mixers if name not in mixers]
    if other or config.intermediate_size is None:
        raise Unavailable(f"{who} has no such layer: {other[0] if other else 'a mixer without an MLP'}")
    fixed = ("use_short_conv", "use_gate", "use_decay", "use_delta", "use_qk_l2norm")
    for name in fixed:
        if not getattr(config, name):
            raise Unavailable(f"{who} has no {name}=False")


def _finish(ours: HybridLM, model: nn.Module, names: dict[str, str], checkpointing: str) -> nn.Module:
    weight = ours.embedding.weight
    model = model.to(weight.device, weight.dtype).train()
    copy_weights(ours, model, names)
    if checkpointing not in ("none", "full"):
        raise Unavailable(f"peers have no {checkpointing} checkpointing")
    if checkpointing == "full":
        model.gradient_checkpointing_enable()
    return model


def _causal_loss(model: nn.Module) -> Loss:
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def _gdn_ops(compiled: bool) -> Callable[[HybridLM, str], Trained]:
    def build(ours: HybridLM, checkpointing: str) -> Trained:
        ours.activation_checkpointing = checkpointing

        def loss_of(ids: Tensor) -> Tensor:
            return ours(ids, labels=ids, return_logits=False).loss

        return Trained(ours, torch.compile(loss_of, fullgraph=True) if compiled else loss_of)

    return build


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """flash-attn's ``flash_attn_func`` by torch's own build of the same kernels, ``[B, T, heads, D]``, on CUDA."""
    T, (left, right) = q.shape[1], window_size
    window = {"window_size_left": left, "window_size_right": right}
    return torch.ops.aten._flash_attention_forward(q, k, v, None, None, T, T, 0.0, causal, False, **window)[0]


def _attention_for_fla() -> str:
    """FLA's attention layers call flash-attn: where that is not installed, torch's. Gives what there is to note."""
    layers = importlib.import_module("fla.layers.attn")
    if layers.flash_attn_func is None:
        layers.flash_attn_func = flash_attention
    return "attention by torch's FlashAttention-2" if layers.flash_attn_func is flash_attention else ""


def _fla(compiled: bool, linear_cross_entropy: bool) -> Callable[[HybridLM, str], Trained]:
    """With its fused norms, SwiGLU and cross-entropy; ``linear_cross_entropy`` fuses the head's product into the loss,
    which saves memory."""

    def build(ours: HybridLM, checkpointing: str) -> Trained:
        config = ours.config
        _check(config, ("gdn", "swa", "attention"), "FLA's GatedDeltaNet")
        attention = [i for i, name in enumerate(config.layer_mixers) if name != "gdn"]
        if len({config.layer_mixers[i] for i in attention}) > 1:
            raise Unavailable("FLA's GatedDeltaNet with two kinds of attention is not set up here")
        window = config.window if attention and config.layer_mixers[attention[0]] == "swa" else None
        library = importlib.import_module("fla.models")
        notes = [_attention_for_fla()] if attention else []
        attn = {
            "layers": attention, "num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads,
            "window_size": window, "rope_theta": config.rope_theta,
        }  # fmt: skip
        model = library.GatedDeltaNetForCausalLM(
            library.GatedDeltaNetConfig(
                hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
                intermediate_size=config.intermediate_size, num_heads=config.num_heads,
                num_v_heads=config.num_v_heads, head_dim=config.head_k_dim,
                expand_v=config.head_v_dim / config.head_k_dim, conv_size=config.conv_size,
                allow_neg_eigval=config.allow_neg_eigval, norm_eps=config.norm_eps, vocab_size=config.vocab_size,
                tie_word_embeddings=config.tie_word_embeddings, attn=attn if attention else None,
                max_position_embeddings=config.max_position, use_cache=False,
                fuse_cross_entropy=not linear_cross_entropy, fuse_linear_cross_entropy=linear_cross_entropy,
            )
        )  # fmt: skip
        model = _finish(ours, model, _FLA, checkpointing)
        tilelang = version_of("tilelang")  # FLA takes its backward from there, where its Triton one is refused
        notes += [f"with tilelang {tilelang}"] if tilelang else []
        loss_of = _causal_loss(model)
        return Trained(model, torch.compile(loss_of) if compiled else loss_of, ", ".join(filter(None, notes)))

    return build


def _hugging_face(ours: HybridLM, checkpointing: str) -> Trained:
    """OLMo-Hybrid's linear layers alone, which are Gated DeltaNet's. It takes FLA's kernels where FLA is installed, and
    plain torch, far slower, elsewhere."""
    config = ours.config
    _check(config, ("gdn",), "OLMo-Hybrid")
    library = importlib.import_module("transformers")
    if not hasattr(library, "OlmoHybridConfig"):
        raise Unavailable("this version of transformers has no OLMo-Hybrid")
    kinds = ["linear_attention"] * config.num_hidden_layers
    theirs = library.OlmoHybridConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        layer_types=[*kinds[1:], "full_attention"], linear_num_key_heads=config.num_heads,
        linear_num_value_heads=config.num_v_heads or config.num_heads, linear_key_head_dim=config.head_k_dim,
        linear_value_head_dim=config.head_v_dim, linear_conv_kernel_dim=config.conv_size,
        linear_allow_neg_eigval=config.allow_neg_eigval, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings, pad_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    theirs.layer_types = kinds  # the configuration demands a layer of attention, the model does not
    model = _finish(ours, library.OlmoHybridForCausalLM(theirs), _OLMO, checkpointing)
    kernels = importlib.util.find_spec("fla") is not None
    return Trained(model, _causal_loss(model), "FLA's kernels" if kernels else "plain torch")


_LIBRARY = ("fla.models", "flash-linear-attention")
TRAIN_PROVIDERS = {
    p.name: p
    for p in (
        TrainProvider(OURS, _gdn_ops(compiled=True)),
        TrainProvider("gdn_ops eager", _gdn_ops(compiled=False)),
        TrainProvider("FLA", _fla(compiled=False, linear_cross_entropy=False), _LIBRARY),
        TrainProvider("FLA compiled", _fla(compiled=True, linear_cross_entropy=False), _LIBRARY),
        TrainProvider("FLA fused head", _fla(compiled=False, linear_cross_entropy=True), _LIBRARY),
        TrainProvider("Hugging Face", _hugging_face, ("transformers", "transformers")),
    )
}


def missing(provider: TrainProvider) -> str | None:
    """Why ``provider`` cannot be imported, if so."""
    try:
        if provider.library is not None:
            import_library(*provider.library)
    except Unavailable as error:
        return str(error)
    return None
