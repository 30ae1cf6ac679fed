"""EleutherAI's lm-evaluation-harness on models of this package: the model type ``gdn_ops``.

    pip install lm_eval
    python -m gdn_ops.integrations.lm_eval --model gdn_ops --model_args pretrained=run,batch_size=16 \\
        --tasks lambada_openai,piqa,hellaswag,arc_easy,arc_challenge,winogrande,social_iqa,boolq,wikitext

are the harness's own arguments; ``run`` is a folder that ``HybridLM.save_pretrained`` or ``gdn train`` wrote. Text is
bytes unless the folder has a tokenizer file, or one is given as ``tokenizer=``.

A document of any length is scored whole: its pieces follow each other with the model's state, so that no token loses
context to a window (a hybrid's attention still sees its own).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gdn_ops.cli import text as texts
from gdn_ops.cli.errors import UserError
from gdn_ops.models import HybridLM

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError(
        "gdn_ops.integrations.lm_eval needs lm_eval: pip install lm_eval", name="lm_eval"
    ) from error


class Text:
    """Tokens of text as ``gdn train`` has them: bytes and 0 as the end, or a ``tokenizer.json`` and its end of text."""

    def __init__(self, tokens: texts.Text | None = None) -> None:
        self.tokens = texts.Bytes() if tokens is None else tokens
        self.end = self.tokens.end_of_text
        if self.end is None:
            raise ValueError(f"tokenizer: expected one of the tokens {', '.join(texts.END_NAMES)}, got none of them")

    @classmethod
    def of(cls, folder: Path | None, tokenizer: str | Path | None) -> Text:
        """Of the file ``tokenizer``, else what the folder says; bytes if it says nothing."""
        try:
            if tokenizer is not None:
                return cls(texts.TokenizerFile(Path(tokenizer), "tokenizer"))
            if folder is not None and any((folder / name).is_file() for name in (texts.TEXT, texts.TOKENIZER)):
                return cls(texts.load(folder, "pretrained"))
        except UserError as error:
            raise ValueError(str(error)) from error
        return cls()

    def encode(self, text: str) -> list[int]:
        return list(self.tokens.encode(text.encode()))

    def decode(self, ids: Sequence[int]) -> str:
        push = self.tokens.decoder([])
        return "".join(map(push, ids)) + push()


@register_model("gdn_ops")
class HybridHarness(TemplateLM):
    """A :class:`gdn_ops.models.HybridLM` as the harness calls it.

    Args:
        pretrained: the model, or its folder.
        tokenizer: a ``tokenizer.json``; default what the folder says.
        device, dtype: default CUDA if there is one, and the weights' own.
        batch_size: rows scored at once.
        piece: tokens of a long document at once.
        max_gen_toks: length of generated text where a task does not say.

    Raises:
        ValueError, TypeError: naming the argument.

    Example::

        >>> model = HybridLM(HybridConfig.preset("tiny"))
        >>> results = lm_eval.simple_evaluate(HybridHarness(model), tasks=["wikitext"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str | Path | HybridLM,
        tokenizer: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        piece: int = 4096,
        max_gen_toks: int = 256,
        **unused: Any,
    ) -> None:
        super().__init__()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = None if dtype is None else getattr(torch, dtype, None)
        if dtype is not None and not isinstance(kind, torch.dtype):
            raise ValueError(f"dtype: expected the name of a torch dtype, got {dtype!r}")
        if isinstance(pretrained, HybridLM):
            self.model, folder = pretrained.to(device, kind), None
        else:
            self.model, folder = HybridLM.from_pretrained(pretrained, device, kind), Path(pretrained)
        self.text = Text.of(folder, tokenizer)
        self.model.eval()
        self._device = torch.device(device)
        self.batch_size, self.piece = _count("batch_size", batch_size), _count("piece", piece)
        self.max_gen_toks = _count("max_gen_toks", max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return self.text.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.text.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Rows of like length together, padded on the right and masked; answers in the order of ``requests``."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            rows = [torch.tensor(requests[i][1] + requests[i][2][:-1]) for i in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            logits = self.model(ids.to(self._device), attention_mask=mask.to(self._device)).logits
            for row, i in enumerate(chosen):
                wanted = torch.tensor(requests[i][2], device=self._device)
                answers[i] = _score(logits[row, lengths[row] - len(wanted) : lengths[row]], wanted)
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    @torch.no_grad()
    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        results = []
        for (string,) in (request.args for request in requests):
            ids = torch.tensor([self.eot_token_id, *self.tok_encode(string)], device=self._device)[None]
            total, state = 0.0, self.model.init_state(1)
            for start in range(0, ids.shape[1] - 1, self.piece):
                wanted = ids[:, start + 1 : start + 1 + self.piece]
                logits, state = self.model.prefill(ids[:, start : start + wanted.shape[1]], state)
                total += _score(logits[0], wanted[0])[0]
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return results

    @torch.no_grad()
    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        results = []
        for context, options in (request.args for request in requests):
            text = self._generate(context, dict(options))
            results.append(text)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return results

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        ids = torch.tensor(self.tok_encode(context) or [self.eot_token_id], device=self._device)[None]
        steps = int(options.get("max_gen_toks", self.max_gen_toks))
        written: list[int] = []
        for token in self.model.stream(ids, steps, temperature, eos_token_id=self.eot_token_id):
            if int(token) == self.eot_token_id:
                break
            written.append(int(token))
            text = self.text.decode(written)
            if any(stop in text for stop in until):
                return _before(text, until)
        return _before(self.text.decode(written), until)


def _count(name: str, value: int | str) -> int:
    """Arguments of the harness's command line may be strings."""
    try:
        count = int(value)
    except (ValueError, TypeError):
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return count


def _score(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[float, bool]:
    """Log-likelihood of ``wanted [T]`` under ``logits [T, vocabulary]``, and whether each was the likeliest."""
    nats = F.cross_entropy(logits.float(), wanted, reduction="none").double().sum()
    return -nats.item(), bool((logits.argmax(-1) == wanted).all())


def _before(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    # Under ``python -m`` this file is another module than the one that others import; either registers the model.
    cli_evaluate()
