"""Tokenizers: streamed text is the whole text, whatever the tokens are."""

from __future__ import annotations

import json

import pytest

from gdn_ops.cli.errors import UserError
from gdn_ops.cli.text import Bytes, TokenizerFile, load

WORDS = "naïve café — 状態 🚀 state  gate\n\tdone"


def streamed(text, ids) -> tuple[str, list[str]]:
    push = text.decoder()
    parts = [push(i) for i in ids]
    return "".join(parts) + push(), parts


def test_bytes_stream_whole_characters():
    whole, parts = streamed(Bytes(), WORDS.encode())
    assert whole == WORDS
    assert all("\N{REPLACEMENT CHARACTER}" not in part for part in parts)
    broken, _ = streamed(Bytes(), b"ok \xf0\x9f end \xe7")
    assert broken == "ok \N{REPLACEMENT CHARACTER} end \N{REPLACEMENT CHARACTER}"
    assert streamed(Bytes(), [65, 300, 66])[0] == "A\N{REPLACEMENT CHARACTER}B"


def test_a_tokenizer_file_streams_whole_characters(tokenizer_file):
    text = TokenizerFile(tokenizer_file)
    long = WORDS * 12
    ids = text.encode(long.encode())
    assert len(ids) > 200 and text.vocab_size <= 280
    whole, parts = streamed(text, ids)
    assert whole == long and all("\N{REPLACEMENT CHARACTER}" not in part for part in parts)
    assert text.end_of_text == text.tokenizer.token_to_id("<|endoftext|>") is not None


def test_saved_text_is_found_again(tokenizer_file, tmp_path):
    for text in (Bytes(), TokenizerFile(tokenizer_file)):
        folder = tmp_path / type(text).__name__
        folder.mkdir()
        text.save(folder)
        again = load(folder)
        assert (again.identity, again.vocab_size, again.end_of_text) == (
            text.identity, text.vocab_size, text.end_of_text,
        )  # fmt: skip
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    (tmp_path / "TokenizerFile" / "text.json").unlink()
    assert load(tmp_path / "TokenizerFile").identity == text.identity


def described(**changes: object) -> str:
    fields = {"format": "gdn_ops.text", "version": 1, "tokenizer": "bytes", "vocab_size": 256, "end_of_text": 0}
    return json.dumps({**fields, **changes})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "expected text.json"),
        ("[]", r"text\.json to describe a tokenizer, with a dict, got \[\]"),
        ("{", r"text\.json to describe a tokenizer, got no JSON"),
        (b"\xff", r"text\.json to describe a tokenizer, got no JSON"),
        (described(version=9), "with version 1, got 9"),
        (described(format="another"), "with format gdn_ops.text, got 'another'"),
        (described(tokenizer=5), "with tokenizer str, got 5"),
        (described(vocab_size="256"), "with vocab_size int, got '256'"),
        ('{"format": "gdn_ops.text"}', "with version, got none"),
        (described(tokenizer="gone.json"), "gone.json"),
    ],
)
def test_a_folder_without_a_usable_description(tmp_path, content, told):
    if content is not None:
        (tmp_path / "text.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told):
        load(tmp_path)
