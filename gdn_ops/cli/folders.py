"""Files and folders that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes under a temporary name and renames, after the bytes are on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Waits until every file of ``folder``, and its list of names, are on the disk."""
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the place of ``target`` when the block ends without an error.

    A kill between the two renames of a replacement leaves the old folder beside ``target``, under a name that begins
    with ``.<name>.old``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.new.", dir=target.parent) as scratch:
        work = Path(scratch) / "new"
        yield work
        sync(work)
        if not target.exists():
            work.rename(target)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.rename(old / "was")
        try:
            work.rename(target)
        except BaseException:
            (old / "was").rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
