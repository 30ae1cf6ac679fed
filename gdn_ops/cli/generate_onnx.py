"""Text from an exported ONNX file by ONNX Runtime alone, without torch and without the rest of this package.

This file is a program of its own. ``gdn export --target onnx27 | ort | portable`` puts a copy of it beside the model,
so the folder is all that a machine needs which has numpy, onnxruntime and, for a model with a tokenizer file,
tokenizers::

    python OUT/generate.py --prompt 'def read(' --temperature 0

``gdn generate FILE.onnx`` checks its options and then hands over to this file, because importing any part of a package
imports the package, and gdn_ops imports torch.

One graph serves prefill and decode: ``input_ids [batch, T]`` and every state in, ``logits [batch, T, vocabulary]`` and
every state out. States never leave the runtime: what one call puts out is bound as the next call's input. Outputs are
bound anew for each call, since a binding that is run again writes where it wrote before, which is an input by then.
"""

from __future__ import annotations

import argparse
import codecs
import ctypes
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MODEL, MANIFEST, TEXT = "model.onnx", "manifest.json", "text.json"
TEXT_FORMAT, TEXT_VERSION = "gdn_ops.text", 1
LARGEST_SEED = 2**63 - 1
# Forms of JSON: the types of a value, or the forms of an object's fields ("*": of every one) or of a list's elements.
FILE_FORM = {"file": (str,), "size": (int,), "sha256": (str,)}
MANIFEST_FORM = {
    "format": (str,),
    "format_version": (int,),
    "target": (str,),
    "config": {"vocab_size": (int,)},
    "initial_state": (dict,),
    "programs": {"prefill": {**FILE_FORM, "states": {"*": (str,)}}},
}
TEXT_FORM = {
    "format": (str,),
    "version": (int,),
    "tokenizer": (str,),
    "vocab_size": (int,),
    "end_of_text": (int, type(None)),
}
# The values that are known here, of the fields that say how to read the others.
MANIFEST_VERSIONS = {"format": ("gdn_ops.onnx", "gdn_ops.tensorrt"), "format_version": (1,)}
TEXT_VERSIONS = {"format": (TEXT_FORMAT,), "version": (TEXT_VERSION,)}


class Refusal(Exception):
    """What was asked cannot be done as asked; the message says which argument, what was expected and what came."""


class Sampling(NamedTuple):
    """As ``gdn_ops.models.generation.Sampling``; temperature 0 takes the likeliest token."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Chances ``[vocabulary]`` of the next token, as eager draws from: tokens outside top-k and top-p have none.

    Logits as large as the k-th are kept; the fewest tokens are kept whose chances reach top-p.
    """
    logits, tiny = logits.astype(np.float32), np.finfo(np.float32).tiny  # what is less may be 0 in fp32
    with np.errstate(over="ignore"):
        logits = (logits - logits.max()) / np.float32(max(sampling.temperature, tiny))
    if sampling.top_k is not None and sampling.top_k < len(logits):
        least = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        logits[logits < least] = -np.inf
    chances = np.exp(logits)
    chances /= chances.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-chances, kind="stable")
        ordered = chances[order]
        chances[order[np.cumsum(ordered) - ordered >= max(sampling.top_p, tiny)]] = 0
    return chances


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """A token of ``logits [vocabulary]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    total = probabilities(logits, sampling).astype(np.float64).cumsum()
    drawn = np.searchsorted(total, random.random() * total[-1], side="right")
    return int(min(drawn, np.searchsorted(total, total[-1])))  # the product may round up to the whole


def bytes_decoder(before: list[int]) -> Callable[..., str]:
    """``push(token) -> text`` of bytes, whatever was ``before``: an incomplete character is held back; ``push()`` gives
    what is left."""
    pending = codecs.getincrementaldecoder("utf-8")("replace")

    def push(token: int | None = None) -> str:
        if token is None:
            return pending.decode(b"", final=True)
        return pending.decode(bytes([token]) if token < 256 else b"\xff")

    return push


def tokenizer_decoder(tokenizer: Any, before: list[int]) -> Callable[..., str]:
    """The same of a ``tokenizers.Tokenizer``, for a text that goes on from the tokens ``before``.

    A token's text may depend on those before it, and a character may take several, which some tokenizers can only
    decode together. So what is decoded begins where a character began, one piece of text before the present one.
    """
    ids, start, known = list(before), 0, len(before)

    def decode(last: int | None) -> str:
        return tokenizer.decode(ids[start:last], skip_special_tokens=True)

    def push(token: int | None = None) -> str:
        nonlocal start, known
        if token is not None:
            ids.append(token)
        had, text = decode(known), decode(None)
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(had)
        if token is not None and incomplete and len(ids) - known < 64:
            return ""  # a character may take several tokens; 64 of them are no character
        start, known = known, len(ids)
        return text[len(had) :]

    return push


def tokenizer_encode(tokenizer: Any, text: bytes, argument: str = "--prompt") -> list[int]:
    try:
        return tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exception
        raise Refusal(f"{argument}: expected text that the tokenizer has tokens for ({_line(error)})") from error


def open_tokenizer(content: str) -> Any:
    """A ``tokenizers.Tokenizer`` of every token of a text, whatever lengths its file cuts or fills texts to."""
    tokenizer = _library("tokenizers", "a tokenizer file").Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Model:
    """An exported language model in an ONNX Runtime session on the CPU.

    Args:
        path: ``model.onnx`` of an export, with ``manifest.json`` beside it.
        threads: of one operator; 0 leaves it to the runtime.

    Raises:
        Refusal: no such file, no manifest of a language model or one of another version, a file that is not the one it
            describes, or one that the runtime cannot load.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        if not path.is_file():
            raise Refusal(f"FILE: expected an exported model, got {path}, which does not exist")
        manifest = _read_manifest(path.parent)
        self.target, self.vocab_size = manifest["target"], manifest["config"]["vocab_size"]
        program = manifest["programs"]["prefill"]  # the one graph, or its part that was traced for T
        self._fills, self._outputs = manifest["initial_state"], program["states"]
        _verify(path.parent, [program, *program.get("data", [])])
        runtime = _library("onnxruntime", "an ONNX file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Threads that spin while they wait make decode of a small model 3 times slower where the cores are shared.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own kinds, of which only some are exported
            raise Refusal(f"FILE: expected a model that ONNX Runtime loads, got {path}: {_line(error)}") from error
        self._value, inputs = runtime.OrtValue, {x.name: x for x in self.session.get_inputs()}
        if inputs.keys() != {"input_ids", *self._outputs}:
            expected, got = ", ".join(["input_ids", *self._outputs]), ", ".join(inputs)
            raise Refusal(f"FILE: expected the inputs {expected} as in its manifest, got {got} in {path}")
        self._states = {name: inputs[name] for name in self._outputs}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The states before the first token, by name."""
        state = {}
        for name, x in self._states.items():
            shape = [size if isinstance(size, int) else batch for size in x.shape]
            state[name] = _filled(self._value, x.type, shape, self._fills[name])
        return state

    def run(self, input_ids: np.ndarray, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """``input_ids [batch, T]`` int64 after ``state``: logits ``[batch, T, vocabulary]`` and the new state, as
        values of the runtime. ``state`` stays as it is."""
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("input_ids", self._value.ortvalue_from_numpy(np.ascontiguousarray(input_ids)))
        for name, value in state.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *self._outputs.values()):
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        logits, *new = binding.get_outputs()
        return logits, dict(zip(self._outputs, new))


def _filled(value: Any, kind: str, shape: list[int], fill: float) -> Any:
    """A value of the runtime, every element ``fill``; ``kind`` is as in ``tensor(float)``."""
    dtypes = {"float": np.float32, "double": np.float64, "int64": np.int64, "int32": np.int32, "float16": np.float16}
    name = kind.removeprefix("tensor(").removesuffix(")")
    if name == "bfloat16":  # NumPy has none: the upper half of an fp32
        bits = np.full(shape, fill, np.float32).view(np.uint32) >> 16
        return value.ortvalue_from_numpy_with_onnx_type(bits.astype(np.uint16), 16)
    return value.ortvalue_from_numpy(np.full(shape, fill, dtypes[name]))


def array(value: Any) -> np.ndarray:
    """A view of a value of the runtime; a copy in fp32 for bfloat16, which NumPy does not have."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = value.shape()
    bits = np.frombuffer((ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr()), np.uint16)
    return (bits.reshape(shape).astype(np.uint32) << 16).view(np.float32)


class Speed:
    """Filled in while tokens are generated; seconds include the choice of each token."""

    def __init__(self) -> None:
        self.prompt = self.steps = 0
        self.prefill_seconds = self.step_seconds = 0.0

    def __str__(self) -> str:
        text = f"prompt {self.prompt} tokens at {self.prompt / max(self.prefill_seconds, 1e-9):,.0f} tokens/s"
        if self.steps:
            text += f", {self.steps} more at {self.steps / max(self.step_seconds, 1e-9):,.0f} tokens/s"
        return text


def tokens(
    model: Model, prompt: list[int], limit: int, sampling: Sampling, random: np.random.Generator, vocabulary: int,
    end: int | None, speed: Speed,
) -> Iterator[int]:  # fmt: skip
    """Up to ``limit`` tokens below ``vocabulary`` that continue ``prompt``; ``end`` stops it and is not among them."""
    clock = time.perf_counter()
    logits, state = model.run(np.array([prompt], np.int64), model.init_state(1))
    for n in range(limit):
        token, now = choose(array(logits)[0, -1, :vocabulary], sampling, random), time.perf_counter()
        if n == 0:
            speed.prompt, speed.prefill_seconds = len(prompt), now - clock
        else:
            speed.steps, speed.step_seconds = n, speed.step_seconds + now - clock
        if token == end:
            return
        yield token
        clock = time.perf_counter()
        if n + 1 < limit:
            logits, state = model.run(np.array([[token]], np.int64), state)


class Text(NamedTuple):
    """How text becomes tokens and back, from the folder's ``text.json``."""

    vocab_size: int
    end_of_text: int | None
    encode: Callable[[bytes], list[int]]
    decoder: Callable[[list[int]], Callable[..., str]]


def read_text(folder: Path) -> Text:
    """Bytes, or the tokenizer file that ``text.json`` names."""
    fields = read_text_fields(folder)
    name, size, end = fields["tokenizer"], fields["vocab_size"], fields["end_of_text"]
    if name == "bytes":
        return Text(size, end, list, bytes_decoder)
    path = folder / Path(name).name
    _library("tokenizers", "a tokenizer file")
    try:
        tokenizer = open_tokenizer(path.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise Refusal(f"FILE: expected a Hugging Face tokenizer.json, got {path} ({_line(error)})") from error
    return Text(size, end, partial(tokenizer_encode, tokenizer), partial(tokenizer_decoder, tokenizer))


def _verify(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Each file against its size and digest in the manifest."""
    for entry in entries:
        path, digest = folder / Path(entry["file"]).name, hashlib.sha256()
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise Refusal(f"FILE: expected {path.name} of {entry['size']} bytes as in its manifest, got another file")
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != entry["sha256"]:
            raise Refusal(f"FILE: expected {path.name} of sha256 {entry['sha256']}, got another file")


def _read_manifest(folder: Path) -> dict[str, Any]:
    told = f"FILE: expected {folder / MANIFEST} to describe an export of a language model"
    manifest = _read(folder / MANIFEST, told, MANIFEST_VERSIONS, MANIFEST_FORM)
    program = manifest["programs"]["prefill"]
    _check_form(told, manifest["initial_state"], dict.fromkeys(program["states"], (int, float)), "initial_state")
    _check_form(told, program.get("data", []), [FILE_FORM], "programs.prefill.data")
    return manifest


def read_text_fields(folder: Path, argument: str = "FILE") -> dict[str, Any]:
    """What the folder's ``text.json`` says."""
    told = f"{argument}: expected {folder / TEXT} to describe a tokenizer"
    fields = _read(folder / TEXT, told, TEXT_VERSIONS, TEXT_FORM)
    size, end, digest = fields["vocab_size"], fields["end_of_text"], fields.get("sha256")
    if size < 1 or not (end is None or 0 <= end < size):
        raise Refusal(f"{told}, with a vocab_size of at least 1 and end_of_text below it, got {size} and {end}")
    path = folder / Path(fields["tokenizer"]).name
    if digest is not None and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise Refusal(f"{told}, {path.name} of sha256 {digest}, got another file")
    return fields


def _read(path: Path, told: str, versions: dict[str, tuple], form: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in ``path``; a Refusal begins with ``told``."""
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise Refusal(f"{told}, got none ({error.strerror})") from None
    except ValueError as error:
        raise Refusal(f"{told}, got no JSON ({error})") from error
    _check_form(told, fields, {})
    for name, known in versions.items():  # first: another version may have another form, which says what must be there
        if fields.get(name, known[0]) not in known:
            raise Refusal(f"{told}, with {name} {' or '.join(map(str, known))}, got {fields[name]!r}")
    _check_form(told, fields, form)
    return fields


def _check_form(told: str, value: Any, form: Any, name: str = "") -> None:
    """Refuses unless what the file holds under ``name`` has ``form``; as in ``gdn_ops.export.runner``."""
    kinds = form if isinstance(form, tuple) else (type(form),)
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise Refusal(f"{told}, with {name or 'a'} {expected}, got {value!r:.80}")
    if isinstance(form, list):
        for index, item in enumerate(value):
            _check_form(told, item, form[0], f"{name}.{index}")
    elif isinstance(form, dict):
        for key, inner in (dict.fromkeys(value, form["*"]) if "*" in form else form).items():
            full = f"{name}.{key}".removeprefix(".")
            if key not in value:
                raise Refusal(f"{told}, with {full}, got none")
            _check_form(told, value[key], inner, full)


def _library(name: str, purpose: str) -> Any:
    try:
        return __import__(name)
    except ModuleNotFoundError as error:
        raise Refusal(f"{purpose} needs {error.name}: pip install {error.name}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _number(name: str, expected: str, kind: Callable[[str], Any], fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(value: str) -> Any:
        try:
            number = kind(value)
        except ValueError:
            number = math.nan  # which fits nowhere
        if not fits(number):
            raise Refusal(f"{name}: expected {expected}, got {value!r}")
        return number

    return parse


def _whole(name: str, least: int) -> Callable[[str], int]:
    return _number(name, f"an integer from {least} to 2**63 - 1", int, lambda n: least <= n <= LARGEST_SEED)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Refusal(f"{message} (see --help)")


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = _Parser(description="Continues a text with an exported ONNX file, by ONNX Runtime alone.")
    beside = Path(__file__).with_name(MODEL)
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, default=beside, help="model.onnx of an export.")
    parser.add_argument("--prompt", default="", help="The text to continue; empty: a new document.")
    count, seed, threads = _whole("--max-new-tokens", 1), _whole("--seed", 0), _whole("--threads", 0)
    parser.add_argument("--max-new-tokens", metavar="N", type=count, default=256, help="Tokens to add at most.")
    heat = _number("--temperature", "a number of at least 0", float, lambda x: 0 <= x < math.inf)
    parser.add_argument("--temperature", metavar="X", type=heat, default=0.8, help="0: always the most likely token.")
    parser.add_argument("--top-k", metavar="N", type=_whole("--top-k", 1), help="Draw from that many likeliest tokens.")
    mass = _number("--top-p", "a number above 0 and at most 1", float, lambda x: 0 < x <= 1)
    parser.add_argument("--top-p", metavar="X", type=mass, help="Draw from the fewest tokens of this total chance.")
    parser.add_argument("--seed", metavar="N", type=seed, default=0, help="Of the draws.")
    parser.add_argument("--threads", metavar="N", type=threads, default=0, help="0: as many as the runtime chooses.")
    return parser.parse_args(words)


def _write(piece: str) -> None:
    sys.stdout.buffer.write(piece.encode("utf-8", "surrogateescape"))
    sys.stdout.flush()


def _generate(options: argparse.Namespace) -> None:
    if options.temperature == 0 and (options.top_k is not None or options.top_p is not None):
        raise Refusal("--top-k, --top-p: expected none with --temperature 0 (the likeliest token is taken), got one")
    model, text = Model(options.file, options.threads), read_text(options.file.parent)
    if text.vocab_size > model.vocab_size:
        raise Refusal(f"FILE: expected a vocabulary of {text.vocab_size} as its tokenizer's, got {model.vocab_size}")
    ids = text.encode(options.prompt.encode("utf-8", "surrogateescape"))
    if not ids and text.end_of_text is None:
        raise Refusal(
            "--prompt: expected some text, as the tokenizer has no token between documents; got no token of it"
        )
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    speed, push, end = Speed(), text.decoder(ids), text.end_of_text
    random = np.random.default_rng(options.seed)
    _write(options.prompt)
    for token in tokens(model, ids or [end], options.max_new_tokens, sampling, random, text.vocab_size, end, speed):
        _write(push(token))
    _write(push() + "\n")
    print(f"{model.target} on ONNX Runtime: {speed}", file=sys.stderr)


def main(words: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    try:
        _generate(_options(words))
    except Refusal as refusal:
        print(f"gdn: {refusal}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
