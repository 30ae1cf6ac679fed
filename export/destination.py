"""The folder of an export: it appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gdn_ops.export import manifest as manifests

from gdn_ops.files import beside, write_file

MANIFEST = "manifest.json"


def _others(folder: Path) -> list[str]:
    """What ``folder`` holds besides an earlier export, which lists its files in its manifest. Without one, only what is
    directly in it: it may be the root of a disk."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        own = {MANIFEST, *manifest["files"]} if manifest["format"] in manifests.FORMATS else set()
    except (OSError, ValueError, TypeError, KeyError):
        own = set()
    return sorted(_entries(folder) - own if own else (path.name for path in folder.iterdir()))


def _entries(folder: Path) -> set[str]:
    """Everything below ``folder`` but folders that hold something themselves."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not _holds_some(path))
    return {path.relative_to(folder).as_posix() for path in found}


def _holds_some(folder: Path) -> bool:
    """Not of a folder that cannot be read: it stands for what it holds."""
    try:
        return any(folder.iterdir())
    except PermissionError:
        return False


def _list_files(folder: Path) -> None:
    """Puts the names of what ``folder`` holds into its manifest, so that what others add is known from it."""
    path = folder / MANIFEST
    if path.exists():
        manifest = json.loads(path.read_text()) | {"files": sorted(_entries(folder) - {MANIFEST})}
        write_file(path, json.dumps(manifest, indent=2).encode() + b"\n")


def check_destination(out_dir: str | os.PathLike) -> Path:
    """``out_dir`` as a whole path. ValueError unless it is new, empty, or an earlier export, itself or where it links
    to; TypeError if it is no path."""
    if not isinstance(out_dir, (str, os.PathLike)):
        raise TypeError(f"out_dir: expected a path, got {type(out_dir).__name__}")
    try:
        out_dir = Path(out_dir).absolute()
        place = _place(out_dir)
        place.exists()
    except ValueError as error:
        raise ValueError(f"out_dir: expected a path, got {out_dir!r} ({error})") from error
    if place.is_dir():
        if others := _others(place):
            named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            raise ValueError(
                f"out_dir: expected a new or empty folder or a previous export, got {out_dir} with other files: {named}"
            )
    elif os.path.lexists(place):
        raise ValueError(f"out_dir: expected a folder, got the file {out_dir}")
    parent = next(path for path in place.parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"out_dir: expected a folder that can be made, got {out_dir} below the file {parent}")
    return out_dir


@contextlib.contextmanager
def replacing(out_dir: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``out_dir`` that takes its place at the end, or is removed after an error.

    Its manifest, if it has one, lists its files then, which is how a later export knows what is not its own. A link is
    followed: it stays, and what it names is replaced or made. What :func:`check_destination` refuses at the end is
    kept, with its ValueError. A kill between the two renames of a replacement leaves the old folder beside ``out_dir``,
    under a name that begins with ``.<name>.old``.
    """
    place = _place(out_dir)
    place.parent.mkdir(parents=True, exist_ok=True)
    work = beside(place)
    try:
        work.mkdir()
        yield work
        _list_files(work)
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
    work.chmod(place.stat().st_mode & 0o7777)
    old = beside(place, "old.")
    try:
        old.mkdir()
        place.rename(old / "export")
        work.rename(place)
    except BaseException:
        if (old / "export").exists():
            (old / "export").rename(place)
        if old.exists():
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
