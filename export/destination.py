"""The folder of an export: it appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gdn_ops.export import manifest as manifests


def may_be_replaced(folder: Path) -> bool:
    """Whether ``folder`` holds nothing but an earlier export, if it holds anything."""
    if not any(folder.iterdir()):
        return True
    try:
        return json.loads((folder / "manifest.json").read_text()).get("format") in manifests.FORMATS
    except (OSError, ValueError, AttributeError):
        return False


def check_destination(out_dir: Path) -> None:
    """ValueError unless ``out_dir`` is new, empty, or an earlier export, itself or where it links to."""
    place = _place(out_dir)
    if place.is_dir():
        if not may_be_replaced(place):
            raise ValueError(
                f"out_dir: expected a new or empty folder or a previous export, got {out_dir} with other files"
            )
    elif os.path.lexists(place):
        raise ValueError(f"out_dir: expected a folder, got the file {out_dir}")
    parent = next(path for path in place.parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"out_dir: expected a folder that can be made, got {out_dir} below the file {parent}")


@contextlib.contextmanager
def replacing(out_dir: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``out_dir`` that takes its place at the end, or is removed after an error.

    A link is followed: it stays, and what it names is replaced or made. What :func:`check_destination` refuses at the
    end is kept, with its ValueError. A kill between the two renames of a replacement leaves the old folder beside
    ``out_dir``, under a name that begins with ``.<name>.old``.
    """
    place = _place(out_dir)
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield work
        work.chmod(0o755)
        check_destination(place)  # once more: others may have written there during the work
        _replace(work, place)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _place(out_dir: Path) -> Path:
    """Where the folder is or will be, without links; ``Path.resolve`` raises RuntimeError for a circle of them."""
    return Path(os.path.realpath(out_dir))


def _replace(work: Path, place: Path) -> None:
    if not place.exists():
        work.rename(place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    try:
        place.rename(old / "export")
        work.rename(place)
    except BaseException:
        if (old / "export").exists():
            (old / "export").rename(place)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
