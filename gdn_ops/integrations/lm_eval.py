"""EleutherAI's lm-evaluation-harness on models of this package: the model type ``gdn_ops``.

    pip install lm_eval
    python -m gdn_ops.integrations.lm_eval --model gdn_ops --model_args pretrained=run,batch_size=16 \\
        --tasks lambada_openai,piqa,hellaswag,arc_easy,arc_challenge,winogrande,social_iqa,boolq,wikitext

are the harness's own arguments; ``run`` is a folder that ``HybridLM.save_pretrained`` or ``gdn train`` wrote. Text is
bytes unless the folder's ``text.json`` names a tokenizer file, or one is given as ``tokenizer=``.

A document of any length is scored whole: its pieces follow each other with the model's state, so that no token loses
context to a window (a hybrid's attention still sees its own).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

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
    """Tokens of text: bytes with 0 as the end, or a ``tokenizer.json`` and the end that is given."""

    def __init__(self, tokenizer: Path | None = None, end: int | None = None) -> None:
        self.tokenizer, self.end = None, 0 if end is None else end
        if tokenizer is not None:
            import tokenizers

            self.tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer))
            if end is None:
                names = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
                ends = [i for i in map(self.tokenizer.token_to_id, names) if i is not None]
                if not ends:
                    raise ValueError(f"tokenizer: expected one of the tokens {', '.join(names)} in {tokenizer}")
                self.end = ends[0]

    @classmethod
    def beside(cls, folder: Path) -> Text:
        """What the folder's ``text.json`` says; bytes without one."""
        path = folder / "text.json"
        if not path.is_file():
            return cls()
        known = json.loads(path.read_text())
        return cls() if known["tokenizer"] == "bytes" else cls(folder / known["tokenizer"], known["end_of_text"])

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return list(text.encode())
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return bytes(ids).decode("utf-8", "replace")
        return self.tokenizer.decode(list(ids))


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
            self.model, self.text = pretrained.to(device, kind), Text()
        else:
            self.model, self.text = HybridLM.from_pretrained(pretrained, device, kind), Text.beside(Path(pretrained))
        if tokenizer is not None:
            self.text = Text(Path(tokenizer))
        self.model.eval()
        self._device = torch.device(device)
        self.batch_size, self.piece, self.max_gen_toks = int(batch_size), int(piece), int(max_gen_toks)
        for name, value in (("batch_size", self.batch_size), ("piece", self.piece)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

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
        until = [until] if isinstance(until, str) else list(until)
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


def _score(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[float, bool]:
    """Log-likelihood of ``wanted [T]`` under ``logits [T, vocabulary]``, and whether each was the likeliest."""
    nats = F.cross_entropy(logits.float(), wanted, reduction="none").double().sum()
    return -nats.item(), bool((logits.argmax(-1) == wanted).all())


def _before(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    # Under ``python -m`` this file is another module than the one that others import; either registers the model.
    cli_evaluate()
