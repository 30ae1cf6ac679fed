"""Training text: which files, in which order, and which windows a step reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gdn_ops.cli import corpus as corpora
from gdn_ops.cli.errors import UserError
from gdn_ops.cli.text import Bytes


def tokens_of(found, folder, report=lambda line: None):
    return corpora.tokenize(found, corpora.digest(found, Bytes()), Bytes(), folder, report)


def test_documents_are_all_there_once_and_in_one_order(corpus, tmp_path):
    found = corpora.documents([corpus], tmp_path)
    assert sorted(x.name for x in found) == ["0.txt", "2.txt", "4.txt", "inner/1.txt", "inner/3.txt", "inner/5.txt"]
    tokens = bytes(tokens_of(found, tmp_path))
    documents = tokens.split(b"\0")
    assert documents.pop() == b""
    assert sorted(documents) == sorted(x.path.read_bytes() for x in found)
    assert [x.name for x in corpora.in_order(found)] == [x.name for x in corpora.in_order(found[::-1])]
    assert [x.name for x in corpora.in_order(found)] != sorted(x.name for x in found)


def test_a_large_file_comes_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_bytes(b"a line\nanother, longer line\n" * 40 + b"x" * 100 + b"\nno newline at the end")
    monkeypatch.setattr(corpora, "PIECE", 64)
    pieces = list(corpora._pieces(path))
    assert len(pieces) > 10 and b"".join(pieces) == path.read_bytes()
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])


def test_tokens_are_made_once_and_again_when_the_text_changes(corpus, tmp_path):
    text, folder, told = tmp_path / "text", tmp_path / "run", []
    shutil.copytree(corpus, text)
    folder.mkdir()
    first = np.array(tokens_of(corpora.documents([text], folder), folder, told.append))
    again = np.array(tokens_of(corpora.documents([text], folder), folder, told.append))
    assert np.array_equal(first, again) and len(told) == 1
    (text / "0.txt").write_text("another text")
    assert len(tokens_of(corpora.documents([text], folder), folder, told.append)) < len(first) and len(told) == 2
    description = json.loads((folder / "tokens.json").read_text())
    with open(folder / "tokens.bin", "ab") as file:
        file.write(b"torn")
    found = corpora.documents([text], folder)
    assert len(tokens_of(found, folder, told.append)) == description["count"] and len(told) == 3
    del description["count"]
    for damaged in ("[]", "null", "{", json.dumps(description)):
        (folder / "tokens.json").write_text(damaged)
        told.clear()
        assert len(tokens_of(found, folder, told.append)) == (folder / "tokens.bin").stat().st_size and len(told) == 1


def test_windows_depend_on_seed_and_step_alone():
    tokens = corpora.split(np.arange(1000, dtype=np.uint16), 0.1, 20)
    assert np.array_equal(tokens.train, np.arange(900)) and np.array_equal(tokens.held_out, np.arange(900, 1000))
    batch = tokens.batch(3, 7, 4, 20)
    assert torch.equal(batch, tokens.batch(3, 7, 4, 20)) and batch.dtype == torch.int64
    assert not torch.equal(batch, tokens.batch(3, 8, 4, 20)) and not torch.equal(batch, tokens.batch(4, 7, 4, 20))
    assert torch.equal(batch - batch[:, :1], torch.arange(20).expand(4, 20))
    starts = torch.cat([tokens.batch(0, step, 64, 20)[:, 0] for step in range(200)])
    assert starts.min() == 0 and starts.max() == 880
    held_out = torch.cat(tokens.validation(3, 2, 20))
    assert len(held_out) == 5 and held_out.min() == 900 and held_out.max() == 999
    assert corpora.split(np.arange(40), 0, 40).validation(1, 1, 40) == []


def test_the_standard_library_is_source_text():
    found = corpora.standard_library()
    names = {x.name for x in found}
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert all(name.endswith(".py") and "test" not in name.split("/") for name in names)
    assert not any("site-packages" in name for name in names)


@pytest.mark.parametrize(("count", "held_out"), [(139, 0.01), (69, 0)])
def test_too_little_text(count, held_out):
    with pytest.raises(UserError, match=rf"expected at least {count + 1} tokens for --seq-len 70, got {count}"):
        corpora.split(np.zeros(count, dtype=np.uint8), held_out, 70)
    corpora.split(np.zeros(count + 1, dtype=np.uint8), held_out, 70)


def test_paths_that_hold_no_text(tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "empty" / "run"
    out.mkdir()
    (out / "train.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected text files in the folder .*empty \(outside of --out\), got none"):
        corpora.documents([tmp_path / "empty"], out)
    for path in (out, out / "train.json"):
        with pytest.raises(UserError, match=rf"--data: expected text outside of --out {out}, got {path}"):
            corpora.documents([path], out)
    with pytest.raises(UserError, match="gone, which does not exist"):
        corpora.documents([tmp_path / "gone"], out)
    (tmp_path / "nothing.txt").write_text("")
    with pytest.raises(UserError, match="got 0 tokens"):
        tokens_of(corpora.documents([tmp_path / "nothing.txt"], out), tmp_path)


def test_files_of_the_run_are_no_text(corpus, tmp_path, monkeypatch):
    """Not those in OUT, however it is written, nor links to them; a folder whose name begins as OUT's is another."""
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    before = corpora.documents([text], text / "run")
    (text / "run" / "inner").mkdir(parents=True)
    for name in ("train.json", "inner/text.json"):
        (text / "run" / name).write_text("{}")
    (text / "link.json").symlink_to(text / "run" / "train.json")
    (tmp_path / "linked").symlink_to(text)
    monkeypatch.chdir(text)
    for out in (text / "run", Path("run"), Path("../text/run"), tmp_path / "linked" / "run"):
        assert corpora.documents([text], out) == before
    assert [x.name for x in corpora.documents([tmp_path / "linked"], Path("run"))] == [x.name for x in before]
    assert len(corpora.documents([text], text / "ru")) == len(before) + 3


@pytest.mark.parametrize("end", [b"\0", b"\xff", "é".encode()[:1]])
def test_text_is_text_to_its_end(tmp_path, monkeypatch, end):
    monkeypatch.setattr(corpora, "PIECE", 63)
    start = "é".encode() * 5000  # a block of 63 bytes ends within a character
    for name, content in (("text", start), ("other", start + end)):
        (tmp_path / name).write_bytes(content)
    assert [x.name for x in corpora.documents([tmp_path], tmp_path / "run")] == ["text"]
