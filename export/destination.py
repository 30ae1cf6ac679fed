"""The folder of an export: it appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import contextlib
import json
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
    """ValueError unless ``out_dir`` is new, empty, or an earlier export."""
    if out_dir.is_dir():
        if not may_be_replaced(out_dir):
            raise ValueError(
                f"out_dir: expected a new or empty folder or a previous export, got {out_dir} with other files"
            )
    elif out_dir.exists():
        raise ValueError(f"out_dir: expected a folder, got the file {out_dir}")


@contextlib.contextmanager
def replacing(out_dir: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``out_dir`` that takes its place at the end, or is removed after an error.

    A kill between the two renames of a replacement leaves the old folder beside ``out_dir``, under a name that begins
    with ``.<name>.old``.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        yield work
        work.chmod(0o755)
        _replace(work, out_dir)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _replace(work: Path, out_dir: Path) -> None:
    if not out_dir.exists():
        work.rename(out_dir)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
    out_dir.rename(old / "export")
    try:
        work.rename(out_dir)
    except BaseException:
        (old / "export").rename(out_dir)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
