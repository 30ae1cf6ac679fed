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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "expected text.json"),
        ("[]", "to describe a tokenizer"),
        ("{", "to describe a tokenizer"),
        (json.dumps({"format": "gdn_ops.text", "version": 9, "tokenizer": "bytes"}), "got gdn_ops.text 9"),
        (json.dumps({"format": "gdn_ops.text", "version": 1, "tokenizer": "gone.json"}), "gone.json"),
    ],
)
def test_a_folder_without_a_usable_description(tmp_path, content, told):
    if content is not None:
        (tmp_path / "text.json").write_text(content)
    with pytest.raises(UserError, match=told):
        load(tmp_path)
