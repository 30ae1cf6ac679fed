"""Text to tokens and back: bytes, or any Hugging Face ``tokenizer.json``.

A folder with a model says in ``text.json`` which of the two it was trained with, so that ``gdn generate`` knows::

    {"format": "gdn_ops.text", "version": 1, "tokenizer": "bytes", "vocab_size": 256, "end_of_text": 0}

``tokenizer`` is ``bytes`` or the name of a tokenizer file beside it, whose digest is ``sha256`` then. Documents are
joined by the token ``end_of_text``, if there is one: byte 0 for bytes, which no text contains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from gdn_ops.cli.errors import UserError, at_the_door, need
from gdn_ops.cli.generate_onnx import (
    TEXT,
    TEXT_FORMAT,
    TEXT_VERSION,
    Refusal,
    bytes_decoder,
    open_tokenizer,
    read_text_fields,
    tokenizer_decoder,
    tokenizer_encode,
)
from gdn_ops.files import write_file

TOKENIZER = "tokenizer.json"
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Bytes:
    """Every byte of UTF-8 is a token."""

    vocab_size, end_of_text, identity = 256, 0, "bytes"

    def encode(self, text: bytes, argument: str = "--data") -> bytes:
        return text

    def decoder(self, before: list[int]) -> Callable[..., str]:
        """``push(token) -> text`` of what follows the tokens ``before``: it holds back an incomplete character;
        ``push()`` gives what is left."""
        return bytes_decoder(before)

    def save(self, folder: Path) -> None:
        _describe(folder, "bytes", self)


class TokenizerFile:
    """A ``tokenizer.json`` read by the ``tokenizers`` library."""

    def __init__(self, path: Path, argument: str = "--tokenizer") -> None:
        need("tokenizers", "a tokenizer file", "hf")
        if not path.is_file():
            kind = "is no file" if path.exists() else "does not exist"
            raise UserError(f"{argument}: expected a Hugging Face tokenizer.json, got {path}, which {kind}")
        with at_the_door(argument):
            self.content = path.read_bytes()
        try:
            self.tokenizer = open_tokenizer(self.content.decode())
        except Exception as error:  # the library raises bare Exception
            line = " ".join(str(error).split())
            raise UserError(f"{argument}: expected a Hugging Face tokenizer.json, got {path} ({line})") from error
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_of_text = next((n for name in END_NAMES if (n := self.tokenizer.token_to_id(name)) is not None), None)
        if self.vocab_size == 0:
            raise UserError(f"{argument}: expected a tokenizer with tokens, got {path} without any")
        self.identity = hashlib.sha256(self.content).hexdigest()

    def encode(self, text: bytes, argument: str = "--data") -> list[int]:
        """UserError, about ``argument``, for a text that the tokenizer has no tokens for."""
        try:
            return tokenizer_encode(self.tokenizer, text, argument)
        except Refusal as refusal:
            raise UserError(str(refusal)) from refusal

    def decoder(self, before: list[int]) -> Callable[..., str]:
        """As :meth:`Bytes.decoder`."""
        return tokenizer_decoder(self.tokenizer, before)

    def save(self, folder: Path) -> None:
        write_file(folder / TOKENIZER, self.content)
        _describe(folder, TOKENIZER, self)


Text = Bytes | TokenizerFile


def _describe(folder: Path, tokenizer: str, text: Text) -> None:
    fields = {"format": TEXT_FORMAT, "version": TEXT_VERSION, "tokenizer": tokenizer}
    fields |= {"vocab_size": text.vocab_size, "end_of_text": text.end_of_text}
    if isinstance(text, TokenizerFile):
        fields["sha256"] = text.identity
    write_file(folder / TEXT, json.dumps(fields, indent=2).encode() + b"\n")


def load(folder: Path, argument: str = "DIR") -> Text:
    """The text of a folder that :meth:`save` has described; a bare ``tokenizer.json`` will do."""
    if not (folder / TEXT).is_file():
        if (folder / TOKENIZER).is_file():
            return TokenizerFile(folder / TOKENIZER, argument)
        raise UserError(f"{argument}: expected {TEXT} (gdn train writes it) or {TOKENIZER} in it, got {folder}")
    try:
        tokenizer = read_text_fields(folder, argument)["tokenizer"]
    except Refusal as refusal:
        raise UserError(str(refusal)) from refusal
    return Bytes() if tokenizer == "bytes" else TokenizerFile(folder / Path(tokenizer).name, argument)
