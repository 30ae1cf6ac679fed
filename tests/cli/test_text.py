"""Tokenizers: streamed text is the whole text, whatever the tokens are."""

from __future__ import annotations

import json

import pytest

from gdn_ops.cli.errors import UserError
from gdn_ops.cli.generate_onnx import Refusal, read_text
from gdn_ops.cli.text import Bytes, TokenizerFile, load

WORDS = "naïve café — 状態 🚀 state  gate\n\tdone"


def streamed(text, ids) -> tuple[str, list[str]]:
    push = text.decoder([])
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
        (described(vocab_size=0), "with a vocab_size of at least 1 and end_of_text below it, got 0 and 0"),
        (described(end_of_text=256), "with a vocab_size of at least 1 and end_of_text below it, got 256 and 256"),
    ],
)
def test_a_folder_without_a_usable_description(tmp_path, content, told):
    if content is not None:
        (tmp_path / "text.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told):
        load(tmp_path)


JAPANESE = "日本語のテキストです。世界こんにちは\n"
ENGLISH = "hello world how are you naive lower lowest hello world "


def _byte_fallback(tokenizers):
    """The kind of Llama's: what has no token is bytes, which only a run of them decodes."""
    words = ["h", "e", "l", "o", "w", "r", "d", "he", "ll", "▁"]
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    for word in words:
        vocabulary[word] = len(vocabulary)
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=[("h", "e"), ("l", "l")], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer, decoders = tokenizers.Tokenizer(model), tokenizers.decoders
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, JAPANESE * 3 + ENGLISH


def _word_piece(tokenizers):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.Whitespace(), tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=50, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([ENGLISH] * 5, trainer)
    return tokenizer, ENGLISH * 12


def _unigram(tokenizers):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=40, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([ENGLISH] * 5, trainer)
    return tokenizer, ENGLISH * 12


@pytest.mark.parametrize("make", [_byte_fallback, _word_piece, _unigram])
def test_what_follows_a_prompt_is_the_rest_of_the_whole_text(make, tmp_path):
    """Cut at any place where the first part is text: spaces and long characters come out right."""
    tokenizer, written = make(pytest.importorskip("tokenizers"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TokenizerFile(tmp_path / "tokenizer.json")
    ids = text.encode(written.encode())
    whole = tokenizer.decode(ids)
    assert len(ids) > 100 and len(whole) > 100
    for cut in range(0, 60):
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\N{REPLACEMENT CHARACTER}"):
            push = text.decoder(ids[:cut])
            assert before + "".join(push(i) for i in ids[cut:]) + push() == whole, cut


def test_lengths_kept_in_a_tokenizer_file_do_not_count(tokenizer_file, tmp_path):
    """Published files cut or fill texts for the models that they were made for."""
    tokenizers = pytest.importorskip("tokenizers")
    want = TokenizerFile(tokenizer_file).encode(WORDS.encode())
    for name, change in (("cut", lambda x: x.enable_truncation(4)), ("filled", lambda x: x.enable_padding(length=99))):
        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        change(tokenizer)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        text = TokenizerFile(tmp_path / name / "tokenizer.json")
        assert text.encode(WORDS.encode()) == want
        text.save(tmp_path / name)
        assert read_text(tmp_path / name).encode(WORDS.encode()) == want


def test_another_tokenizer_in_the_place_of_the_models_own(tokenizer_file, tmp_path):
    TokenizerFile(tokenizer_file).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"DIR: expected .*, tokenizer\.json of sha256 [0-9a-f]{64}, got another file"):
        load(tmp_path)
    with pytest.raises(Refusal, match=r"FILE: expected .*, tokenizer\.json of sha256 [0-9a-f]{64}, got another file"):
        read_text(tmp_path)


def test_text_without_tokens_is_named(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})).save(str(path))
    with pytest.raises(UserError, match="--prompt: expected text that the tokenizer has tokens for"):
        TokenizerFile(path).encode(b"zzz", "--prompt")
    TokenizerFile(path).save(tmp_path)
    with pytest.raises(Refusal, match=r"--prompt: expected text that .* has tokens for"):
        read_text(tmp_path).encode(b"zzz")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({})).save(str(path))
    with pytest.raises(UserError, match=r"--tokenizer: expected a tokenizer with tokens, got .* without any"):
        TokenizerFile(path)
    with pytest.raises(
        UserError, match=r"--tokenizer: expected a Hugging Face tokenizer\.json, got .*, which is no file"
    ):
        TokenizerFile(tmp_path)
