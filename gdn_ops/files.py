"""Files and folders that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``, whose file takes its place once its bytes are on the disk; not so after
    an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """``content`` as a :func:`whole` file."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def show(path: Path) -> None:
    """Gives a file that was made for its owner alone the permissions of any new one."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def beside(path: Path, kind: str = "") -> Path:
    """A hidden name that nothing has, for a folder that will take the place of ``path``: made inside the block that
    removes it after an error, it leaves a signal no moment between the two."""
    return path.with_name(f".{path.name}.{kind}{secrets.token_hex(4)}")


def sync(folder: Path) -> None:
    """Waits until every file of ``folder``, and its list of names, are on the disk."""
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Archive(io.FileIO):
    """A file for torch's archives, with its OSError where a disk is full.

    The first error of a write is raised at the end of the ``with`` block. Torch's writer would make a RuntimeError of
    it that does not say why, or try to finish the archive while it is taken down: the second error ends the process.
    """

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest and self.failed is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.failed = error
        return len(data)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self.failed is not None:
            raise self.failed
