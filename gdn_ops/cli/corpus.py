"""Training text: which files, their tokens in one file on disk, and which of them a step reads.

All documents are joined in an order drawn from the digests of their names, which is the same on every machine and mixes
the folders, so that the tail that is held out for validation resembles the rest. A step reads windows at random
offsets, drawn from ``(seed, step)`` alone: a resumed run reads what the uninterrupted one would have.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gdn_ops.cli.errors import UserError, at_the_door
from gdn_ops.files import whole, write_file

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gdn_ops.cli.text import Text

FILE, DESCRIPTION = "tokens.bin", "tokens.json"
PIECE = 1 << 22
# Not in every distribution of Python, or tables rather than text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}


class Document(NamedTuple):
    name: str
    path: Path


def standard_library() -> list[Document]:
    """The source files of Python's standard library, its tests and tables left out (about 10 MB)."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [Document(name, path) for name, path in _below(root) if path.suffix == ".py"]
    kept = [x for x in found if not LEFT_OUT & set(Path(x.name).parts) and not x.name.startswith("_sysconfigdata")]
    if not kept:
        raise UserError(f"--data: expected the standard library's source text in {root}, got no .py files: give --data")
    return kept


def documents(paths: list[Path], out: Path) -> list[Document]:
    """Each file as it is, and of each folder every file that holds text (UTF-8 without NUL), hidden ones left out.

    So are those in ``out``, the run's own folder.
    """
    found, real = [], os.path.realpath(out)
    for path in paths:
        if _in(real, path):
            raise UserError(f"--data: expected text outside of --out {out}, got {path}")
        if path.is_dir():
            inside = [Document(name, file) for name, file in _below(path) if not _in(real, file) and _is_text(file)]
            if not inside:
                raise UserError(f"--data: expected text files in the folder {path} (outside of --out), got none")
            found += inside
        elif path.is_file():
            found.append(Document(path.name, path))
        else:
            kind = "is neither" if path.exists() else "does not exist"
            raise UserError(f"--data: expected a file or folder, got {path}, which {kind}")
    return found


def _in(folder: str, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(folder)


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix(), path


def _is_text(path: Path) -> bool:
    """Reads all of it: ``tokens.bin`` of another run, for one, is text up to the end of its first document."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with at_the_door("--data"), open(path, "rb") as file:
        try:
            while block := file.read(PIECE):
                if "\0" in decoder.decode(block):
                    return False
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def in_order(found: list[Document]) -> list[Document]:
    """By the digest of the name; files of one name by their place among ``found``."""
    return sorted(found, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in parts of some megabytes that end where a line does."""
    rest = b""
    with at_the_door("--data"), open(path, "rb") as file:
        while block := file.read(PIECE):
            whole, newline, tail = block.rpartition(b"\n")
            if newline:
                yield rest + whole + newline
                rest = tail
            else:
                rest += tail
    if rest:
        yield rest


def digest(found: list[Document], text: Text) -> str:
    """What identifies the tokens: the files' names and contents in order, and the tokenizer."""
    total = hashlib.sha256(text.identity.encode())
    for document in in_order(found):
        inner = hashlib.sha256()
        for piece in _pieces(document.path):
            inner.update(piece)
        total.update(os.fsencode(document.name) + b"\0" + inner.digest())
    return total.hexdigest()


class Tokens(NamedTuple):
    """Training tokens and the held-out tail, on disk."""

    train: np.ndarray
    held_out: np.ndarray

    def batch(self, seed: int, step: int, size: int, length: int) -> torch.Tensor:
        """Windows ``[size, length]`` int64 of the training tokens, a function of ``(seed, step)``."""
        import numpy as np

        last = len(self.train) - length
        starts = np.random.default_rng([seed, step]).integers(0, last, size=size, endpoint=True)
        return _windows(self.train, starts, length)

    def validation(self, batches: int, size: int, length: int) -> list[torch.Tensor]:
        """Up to ``batches`` batches of windows spread evenly over the held-out tokens, always the same."""
        import numpy as np

        count = min(batches * size, len(self.held_out) // length)
        if count < 1:
            return []
        starts = np.linspace(0, len(self.held_out) - length, count).astype(np.int64)
        return [_windows(self.held_out, starts[i : i + size], length) for i in range(0, count, size)]


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([tokens[i : i + length] for i in starts]).astype(np.int64))


def tokenize(
    found: list[Document], identity: str, text: Text, folder: Path, report: Callable[[str], None]
) -> np.ndarray:
    """The tokens of all documents as an array on disk in ``folder``; made once, and again when ``identity`` changes."""
    import numpy as np

    path, description = folder / FILE, folder / DESCRIPTION
    try:
        known = json.loads(description.read_text())
        size = known["count"] * np.dtype(known["dtype"]).itemsize
        whole = known["digest"] == identity and path.stat().st_size == size
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        known = _write(found, identity, text, path)
        write_file(description, json.dumps(known).encode() + b"\n")
        report(f"data: {known['documents']} documents, {known['count']:,} tokens")
    if known["count"] == 0:
        raise UserError("--data: expected some text, got 0 tokens")
    return np.memmap(path, dtype=known["dtype"], mode="r")


def _write(found: list[Document], identity: str, text: Text, path: Path) -> dict:
    import numpy as np

    dtype = np.uint8 if text.vocab_size <= 1 << 8 else np.uint16 if text.vocab_size <= 1 << 16 else np.uint32
    count = 0
    with whole(path) as temporary, open(temporary, "wb") as file:
        for document in in_order(found):
            before = count
            for piece in _pieces(document.path):
                ids = text.encode(piece)
                if ids:
                    file.write(ids if isinstance(ids, bytes) else np.asarray(ids, dtype=dtype).tobytes())
                    count += len(ids)
            if text.end_of_text is not None and count > before:
                file.write(np.asarray([text.end_of_text], dtype=dtype).tobytes())
                count += 1
    return {"digest": identity, "dtype": np.dtype(dtype).name, "count": count, "documents": len(found)}


def split(tokens: np.ndarray, held_out: float, length: int) -> Tokens:
    """The last ``held_out`` of the tokens (at least one window, unless 0) apart from the rest."""
    tail = 0 if held_out == 0 else max(length, int(len(tokens) * held_out))
    if len(tokens) - tail < length:
        least = length if held_out == 0 else 2 * length
        raise UserError(
            f"--data: expected at least {least} tokens for --seq-len {length}, got {len(tokens)}: "
            "give more text or a smaller --seq-len"
        )
    return Tokens(tokens[: len(tokens) - tail], tokens[len(tokens) - tail :])
