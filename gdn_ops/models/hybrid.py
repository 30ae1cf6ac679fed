"""A language model of stacked mixers: Gated DeltaNet, DeltaNet, Mamba2, attention, or any pattern of them.

    x = embedding(input_ids)
    x = x + mixer(norm(x));  x = x + swiglu(norm(x))       every layer
    logits = lm_head(norm(x))

State is explicit, nested and batch-first, and no call writes to the one it was given::

    {"layers": {"0": {"recurrent": [B, HV, K, V], "conv": [B, D, W - 1]}, "1": {"key": ..., "value": ...}, ...},
     "position": [B] int64}
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gdn_ops.models import generation, pretrained
from gdn_ops.models.config import HybridConfig
from gdn_ops.models.mixers import MIXERS
from gdn_ops.nn import Padding, RMSNorm, SwiGLU, linear_cross_entropy
from gdn_ops.nn.loss import IGNORED, wrong_target
from gdn_ops.nn.mixer import RecurrentMixer, check_position
from gdn_ops.nn.padding import check_rows
from gdn_ops.nn.projection import only_weight, weight_of, weight_or_any
from gdn_ops.ops import save_list
from gdn_ops.validation import has_values

State = dict[str, Any]
ACTIVATION_CHECKPOINTING = ("none", "elementwise", "selective", "full")


class HybridOutput(NamedTuple):
    """``logits [B, T, vocab_size]``, unless they were not asked for; ``loss``, a scalar in fp32, with labels; ``state``
    if one was given."""

    logits: Tensor | None
    loss: Tensor | None = None
    state: State | None = None


# So that programs that return one can be saved.
_register_namedtuple(HybridOutput, serialized_type_name="gdn_ops.models.HybridOutput")


class Block(nn.Module):
    """One layer: a mixer and, if it has one, an MLP, each after a norm and added to the stream."""

    def __init__(self, config: HybridConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[mixer].build(config)
        self.mlp = None
        if config.intermediate_size is not None:
            self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        y, state = self.mixer(self.mixer_norm(x), state=state, cu_seqlens=cu_seqlens, lengths=lengths)
        x = x + y
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x)), state


class HybridLM(nn.Module):
    """A hybrid language model; see :class:`HybridConfig` for what it is made of.

    ``activation_checkpointing`` trades time for memory in training. The backward pass computes again: ``"none"``
    nothing, ``"elementwise"`` activations, norms and convolutions (layers keep what
    ``gdn_ops.ops.save_list(products=True)`` has), ``"selective"`` all but the rules (``save_list()``), ``"full"``
    whole layers. It may be set later and is no part of the configuration.

    Example::

        >>> model = HybridLM(HybridConfig.preset("tiny"))
        >>> ids = torch.randint(256, (2, 40))
        >>> model(ids, labels=ids).loss.shape, model.generate(ids, max_new_tokens=3).shape
        (torch.Size([]), torch.Size([2, 43]))
        >>> logits, state = model.prefill(ids, model.init_state(2))
        >>> logits, state = model.step(logits[:, -1].argmax(-1), state)
        >>> logits.shape
        torch.Size([2, 256])
    """

    def __init__(self, config: HybridConfig, activation_checkpointing: str | None = None) -> None:
        super().__init__()
        if not isinstance(config, HybridConfig):
            raise TypeError(f"config: expected a HybridConfig, got {type(config).__name__}")
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.layer_mixers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_projections()

    def reset_parameters(self) -> None:
        """Initialises every parameter anew, those of submodules too.

        Example::

            >>> with torch.device("meta"):
            ...     model = HybridLM(HybridConfig.preset("tiny"))
            >>> model.to_empty(device="cpu").reset_parameters()
        """
        for module in self.modules():
            if isinstance(module, (RMSNorm, RecurrentMixer)):
                module.reset_parameters()
        self.reset_projections()

    @torch.no_grad()
    def reset_projections(self) -> None:
        """Normal with ``initializer_range``; what writes into the stream is scaled by ``1 / sqrt(2 * layers)``, so
        that the stream's variance does not grow with depth."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std * (2 * len(self.layers)) ** -0.5 if writes else std)

    @property
    def activation_checkpointing(self) -> str:
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: str | None) -> None:
        value = "none" if value is None else value
        if value not in ACTIVATION_CHECKPOINTING:
            expected = ", ".join(ACTIVATION_CHECKPOINTING)
            raise ValueError(f"activation_checkpointing: expected one of {expected}, got {value!r}")
        self._activation_checkpointing = value

    def num_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimiser: matrices decay; norms, gates (``A_log``, ``dt_bias``) and convolutions do not.

        Example::

            >>> model = HybridLM(HybridConfig.preset("tiny"))
            >>> optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1), lr=4e-4)
        """
        kept = [p for n, p in self.named_parameters() if p.dim() < 2 or "conv_weight" in n]
        kept_ids = {id(p) for p in kept}
        decayed = [p for p in self.parameters() if id(p) not in kept_ids]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token, zeros; device and dtype default to the weights'."""
        if not isinstance(batch, (int, torch.SymInt)) or isinstance(batch, bool):
            raise TypeError(f"batch: expected an integer, got {type(batch).__name__}")
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        weight = weight_or_any(self.embedding, self)
        device, dtype = torch.device(device or weight.device), dtype or weight.dtype
        layers = {}
        for index, layer in enumerate(self.layers):
            state = layer.mixer.init_state(batch, device, dtype)
            layers[str(index)] = {name: x for name, x in state.items() if name != "position"}
        return {"layers": layers, "position": torch.zeros(batch, dtype=torch.int64, device=device)}

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_logits: bool = True,
        last_logits: bool = False,
    ) -> HybridOutput:
        """Logits of the next token at every position.

        Args:
            input_ids: ``[B, T]`` int64 (or int32), each in ``[0, vocab_size)``.
            labels: ``[B, T]`` int64, usually ``input_ids`` themselves: position t is scored on ``labels[:, t + 1]``.
                -100 is not scored, nor is anything across a boundary of packed sequences or at padding. The loss is
                the mean over what is scored, 0 if that is nothing.
            state: as :meth:`init_state` gives it, or an earlier call; a new one is returned. None: none is.
            cu_seqlens: ``[N + 1]`` int32 or int64 bounds of sequences packed along T; B is 1. A model with attention
                takes no state with it.
            attention_mask: ``[B, T]``, 1 for real tokens, 0 for padding on any side.
            return_logits: False, with labels, gives the loss alone, by :func:`gdn_ops.nn.linear_cross_entropy`: for
                training, where all logits at once would be the largest tensors of a step. A head that does more than
                multiply by its weight (it was replaced, or has hooks) is called, and then they are all there.
            last_logits: logits ``[B, 1, vocab_size]`` of each row's last real token only; neither with labels nor with
                packed sequences.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        self._check_ids(input_ids, "input_ids", 2)
        check_rows(input_ids, "input_ids", attention_mask, None, cu_seqlens)
        if not return_logits and labels is None:
            raise ValueError("labels: expected labels with return_logits=False, got None")
        if labels is not None:
            self._check_labels(labels, input_ids)
        for name, other in (("labels", labels), ("cu_seqlens", cu_seqlens)):
            if last_logits and other is not None:
                raise ValueError(f"last_logits: expected False together with {name}, got True")
        padding = None if attention_mask is None else Padding.of(attention_mask)
        ids = input_ids if padding is None else padding.compact(input_ids)
        x, state = self._stream(ids, state, cu_seqlens, None if padding is None else padding.lengths)
        if last_logits:
            return HybridOutput(self._logits(x[:, -1:] if padding is None else padding.last(x)), None, state)
        x = x if padding is None else padding.restore(x)
        targets = None if labels is None else _targets(labels, cu_seqlens, attention_mask, padding)
        if not return_logits and (self.lm_head is None or only_weight(self.lm_head)):
            return HybridOutput(None, linear_cross_entropy(x, self.output_weight, targets), state)
        logits = self._logits(x)
        return HybridOutput(
            logits if return_logits else None, None if targets is None else _loss(logits, targets), state
        )

    def prefill(self, input_ids: Tensor, state: State, attention_mask: Tensor | None = None) -> tuple[Tensor, State]:
        """``input_ids [B, T]`` after ``state``: ``(logits [B, T, vocab_size], new state)``."""
        output = self(input_ids, state=self._required(state), attention_mask=attention_mask)
        return output.logits, output.state

    def prefill_last(
        self, input_ids: Tensor, state: State, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As :meth:`prefill`, but logits ``[B, vocab_size]`` of each row's last real token only: at a vocabulary of
        32000, all of a long prompt's would be far larger than the rest of the computation."""
        output = self(input_ids, state=self._required(state), attention_mask=attention_mask, last_logits=True)
        return output.logits[:, 0], output.state

    def step(self, input_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """One token a row, ``input_ids [B]``, after ``state``: ``(logits [B, vocab_size], new state)``."""
        self._check_ids(input_ids, "input_ids", 1)
        output = self(input_ids[:, None], state=self._required(state))
        return output.logits[:, 0], output.state

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Continues ``input_ids [B, T]``; yields ``[B]`` int64 tokens one step at a time.

        Args:
            max_new_tokens: at most so many steps.
            temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
            top_k, top_p: draw among the k likeliest tokens and those as likely as the last of them; among the fewest
                likeliest that hold the probability p.
            eos_token_id: a row that gave it gives nothing else afterwards, and when all have, the stream ends.
            generator: source of randomness, on the model's device.
            attention_mask: of prompts of unequal length, padded on any side.

        Raises:
            ValueError, TypeError: naming the argument.

        Example::

            >>> model = HybridLM(HybridConfig.preset("tiny"))
            >>> [token.shape for token in model.stream(torch.zeros(1, 5, dtype=torch.long), max_new_tokens=2)]
            [torch.Size([1]), torch.Size([1])]
        """
        self._check_ids(input_ids, "input_ids", 2)
        check_rows(input_ids, "input_ids", attention_mask, None, None)
        sampling = generation.Sampling(temperature, top_k, top_p, generator)
        generation.check(sampling, max_new_tokens, eos_token_id, self.config.vocab_size)
        if attention_mask is not None and has_values(attention_mask):
            empty = (attention_mask == 0).all(1).nonzero()
            if empty.numel():
                raise ValueError(f"attention_mask: expected a real token in every row, got none in row {int(empty[0])}")
        return generation.stream(self, input_ids, max_new_tokens, sampling, eos_token_id, attention_mask)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The prompt and its continuation, ``[B, T + new]`` int64; arguments and errors as :meth:`stream`."""
        tokens = self.stream(
            input_ids, max_new_tokens, temperature, top_k, top_p, eos_token_id, generator, attention_mask
        )
        return torch.cat([input_ids.long(), *(token[:, None] for token in tokens)], 1)

    def save_pretrained(self, folder: str | os.PathLike, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (needs safetensors) into ``folder``; each file appears
        whole or not at all.

        Args:
            state_dict: the weights, instead of the model's own: of a model in parts (FSDP2), what
                ``torch.distributed.checkpoint.state_dict.get_model_state_dict`` gathers, written by one rank.

        Raises:
            ValueError: ``folder`` is a file; ``state_dict`` has not this model's weights, or parts of them.
        """
        pretrained.save(self, folder, state_dict)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HybridLM:
        """Reads what :meth:`save_pretrained` wrote; ``dtype`` defaults to the file's.

        Raises:
            ValueError: naming the file that is missing or damaged, or the field or weight that does not fit.
        """
        return pretrained.load(cls, folder, device, dtype)

    def _stream(self, ids, state, cu_seqlens, lengths) -> tuple[Tensor, State | None]:
        """Hidden states after the last norm, and the new state."""
        if state is not None:
            self._check_state(state, ids, cu_seqlens)
        x = self.embedding(ids)
        run = self._block_runner(state)
        layers = {}
        for index, layer in enumerate(self.layers):
            layer_state = None if state is None else self._layer_state(state, index)
            x, new = run(layer, x, layer_state, cu_seqlens, lengths)
            if state is not None:
                layers[str(index)] = {name: y for name, y in new.items() if name != "position"}
        x = self.norm(x)
        if state is None:
            return x, None
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().long()
        return x, {"layers": layers, "position": state["position"] + (ids.shape[1] if lengths is None else lengths)}

    def _layer_state(self, state: State, index: int) -> dict[str, Tensor]:
        own = state["layers"][str(index)]
        counts = "position" in self.layers[index].mixer.state_names
        return {**own, "position": state["position"]} if counts else own

    def _block_runner(self, state: State | None):
        """How a layer is called: directly, or so that its backward pass computes it again."""
        if self.activation_checkpointing == "none" or state is not None or not torch.is_grad_enabled():
            return lambda layer, *args: layer(*args)
        options = {"use_reentrant": False}
        if self.activation_checkpointing != "full":
            kept = save_list(products=self.activation_checkpointing == "elementwise")
            options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
        return partial(checkpoint, **options)

    @property
    def output_weight(self) -> Tensor:
        """``[vocab_size, hidden_size]``: what logits are made with, the embedding if it is tied."""
        name, layer = ("embedding", self.embedding) if self.lm_head is None else ("lm_head", self.lm_head)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a layer with a weight to make logits with, got {layer}")
        return weight

    def _logits(self, x: Tensor) -> Tensor:
        # Not by the weight alone: a head may have been replaced or hooked.
        return F.linear(x, self.output_weight) if self.lm_head is None else self.lm_head(x)

    def _check_ids(self, ids: Tensor, name: str, dims: int) -> None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(ids).__name__}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected dtype torch.int64 or torch.int32, got {ids.dtype}")
        if ids.dim() != dims:
            raise ValueError(f"{name}: expected {'[B, T]' if dims == 2 else '[B]'}, got shape {tuple(ids.shape)}")
        if any(size == 0 for size in ids.shape):
            raise ValueError(f"{name}: expected at least one row and one token, got shape {tuple(ids.shape)}")
        weight = weight_of(self.embedding)
        if weight is not None and ids.device != weight.device:
            raise ValueError(f"{name}: expected device {weight.device}, got {ids.device}")
        if has_values(ids):
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                got = low if low < 0 else high
                raise ValueError(f"{name}: expected tokens in [0, {self.config.vocab_size}), got {got}")

    def _check_labels(self, labels: Tensor, input_ids: Tensor) -> None:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a torch.Tensor, got {type(labels).__name__}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected dtype torch.int64, got {labels.dtype}")
        if labels.dim() != 2 or any(a != b for a, b in zip(labels.shape, input_ids.shape)):
            raise ValueError(f"labels: expected shape {tuple(input_ids.shape)}, got {tuple(labels.shape)}")
        if labels.device != input_ids.device:
            raise ValueError(f"labels: expected device {input_ids.device} (as input_ids), got {labels.device}")
        wrong = wrong_target(labels, self.config.vocab_size)
        if wrong is not None:
            raise ValueError(f"labels: expected {IGNORED} or tokens in [0, {self.config.vocab_size}), got {wrong}")

    def _check_state(self, state: State, ids: Tensor, cu_seqlens: Tensor | None) -> None:
        """The structure; each mixer checks its own tensors."""
        if not isinstance(state, dict) or state.keys() != {"layers", "position"}:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected a dict of layers, position (see init_state), got {got}")
        expected = [str(index) for index in range(len(self.layers))]
        if not isinstance(state["layers"], dict) or sorted(state["layers"]) != sorted(expected):
            got = sorted(state["layers"]) if isinstance(state["layers"], dict) else type(state["layers"]).__name__
            raise ValueError(f"state['layers']: expected a dict of {', '.join(expected)}, got {got}")
        rows = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_position(state["position"], rows, ids.device)

    def _required(self, state: State | None) -> State:
        if state is None:
            raise ValueError("state: expected a state (see init_state), got None")
        return state


def _targets(labels: Tensor, cu_seqlens: Tensor | None, attention_mask: Tensor | None, padding: Padding | None):
    """What each position is scored on: the next token's label, or -100."""
    if padding is not None:
        labels = padding.compact(labels.masked_fill(attention_mask == 0, IGNORED))
    token = torch.arange(labels.shape[1], device=labels.device)
    if cu_seqlens is None:
        last = token == labels.shape[1] - 1
    else:
        bounds = cu_seqlens.long()
        last = torch.searchsorted(bounds, token, right=True) != torch.searchsorted(bounds, token + 1, right=True)
    targets = labels.roll(-1, 1).masked_fill(last, IGNORED)
    return targets if padding is None else padding.restore(targets)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)
