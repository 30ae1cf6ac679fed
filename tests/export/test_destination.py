"""The folder of an export: whole or not at all, and in the place of nothing but an earlier export."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from gdn_ops.export import manifest
from gdn_ops.export.destination import check_destination, replacing

OTHERS = "out_dir: expected a new or empty folder or a previous export, got .* with other files"


def export(folder, content):
    """An export as far as its folder is concerned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT, "files": ["file"]}))
    (folder / "file").write_text(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with replacing(out) as work:
            export(work, content)
            assert not out.exists() or (out / "file").read_text() == "first"
        assert (out / "file").read_text() == content
    with pytest.raises(KeyError), replacing(out) as work:
        raise KeyError("stop")
    assert (out / "file").read_text() == "second" and names(tmp_path) == ["out"]


def test_what_comes_into_the_folder_during_the_work_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=OTHERS), replacing(out) as work:
        export(work, "new")
        out.mkdir()
        (out / "notes").write_text("precious")
    assert names(tmp_path) == ["out"] and names(out) == ["notes"] and (out / "notes").read_text() == "precious"


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="out_dir: expected a folder, got the file"), replacing(out):
        out.write_text("precious")
    assert names(tmp_path) == ["out"] and out.read_text() == "precious"


@pytest.mark.parametrize(
    ("add", "told"),
    [
        (lambda out: (out / "notes").write_text("precious"), "notes"),
        (lambda out: (out / "kept").mkdir(), "kept"),
        (lambda out: (out / "folder" / "part").write_text("precious"), "folder/part"),
        (lambda out: (out / "link").symlink_to("nowhere"), "link"),
        (lambda out: [(out / f"{i}").write_text("precious") for i in range(5)], "0, 1, 2 and 2 more"),
    ],
)
def test_what_was_added_to_an_earlier_export_is_kept(tmp_path, add, told):
    out = tmp_path / "out"
    with replacing(out) as work:
        export(work, "first")
        (work / "folder").mkdir()
        (work / "folder" / "weights").write_text("weights")
    assert json.loads((out / "manifest.json").read_text())["files"] == ["file", "folder/weights"]
    check_destination(out)
    add(out)
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match=f"{OTHERS}: {told}$"):
        check_destination(out)
    with pytest.raises(ValueError, match=OTHERS), replacing(out) as work:
        export(work, "second")
    assert sorted(out.rglob("*")) == before and (out / "file").read_text() == "first" and names(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_read_is_no_part_of_an_export(tmp_path, monkeypatch):
    out, look = tmp_path / "out", Path.iterdir
    export(out, "first")
    (out / "secret").mkdir()
    (out / "secret" / "part").write_text("precious")

    def refuses(self):
        if self.name == "secret":
            raise PermissionError("no")
        return look(self)

    monkeypatch.setattr(Path, "iterdir", refuses)
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: [*look(self)])  # as it does where it cannot look
    with pytest.raises(ValueError, match=f"{OTHERS}: secret$"):
        check_destination(out)


def test_a_folder_without_an_export_is_not_walked(tmp_path, monkeypatch):
    """As the root of a disk is not, where much cannot be read and a walk takes minutes."""
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "manifest.json").write_text('{"name": "another project", "files": []}')
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: pytest.fail("walked"))
    with pytest.raises(ValueError, match=f"{OTHERS}: a, manifest.json$"):
        check_destination(tmp_path)
    with pytest.raises(ValueError, match=f"{OTHERS}: .* and [0-9]+ more$"):
        check_destination(Path("/"))


@pytest.mark.parametrize("files", [None, 1, [1, []], "file"])
def test_a_manifest_that_does_not_list_its_files_covers_none(tmp_path, files):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT, "files": files}))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match=OTHERS):
        check_destination(tmp_path)


@pytest.mark.parametrize("refused", ["old", "new"])
def test_an_earlier_export_stays_when_a_rename_is_refused(tmp_path, monkeypatch, refused):
    out, rename = tmp_path / "out", Path.rename
    export(out, "first")

    def fails(self, target):
        if (self == out) == (refused == "old") and self.name != "export":
            raise PermissionError("no")
        return rename(self, target)

    with pytest.raises(PermissionError, match="no"), replacing(out) as work:
        export(work, "second")
        monkeypatch.setattr(Path, "rename", fails)
    assert names(tmp_path) == ["out"] and (out / "file").read_text() == "first"


def test_an_earlier_export_outlives_a_folder_made_between_the_renames(tmp_path, monkeypatch):
    """It cannot go back, so it stays beside."""
    out, rename = tmp_path / "out", Path.rename
    export(out, "first")

    def interfere(self, target):
        rename(self, target)
        if self == out:
            out.mkdir()
            (out / "notes").write_text("precious")

    with pytest.raises(OSError, match="not empty"), replacing(out) as work:
        export(work, "second")
        monkeypatch.setattr(Path, "rename", interfere)
    (old,) = tmp_path.glob(".out.old.*")
    assert (old / "export" / "file").read_text() == "first" and names(out) == ["notes"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_link_stays_and_what_it_names_is_replaced_or_made(tmp_path, earlier):
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to("disk/real")
    if earlier:
        export(real, "first")
    check_destination(link)
    with replacing(link) as work:
        export(work, "second")
    assert link.is_symlink() and not real.is_symlink() and (real / "file").read_text() == "second"
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["real"]


def test_links_that_lead_to_no_folder_are_refused(tmp_path):
    for name, target in (("circle", "circle"), ("to_file", "file"), ("below", "file/out")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "file").write_text("mine")
    for name in ("circle", "to_file"):
        with pytest.raises(ValueError, match=f"out_dir: expected a folder, got the file {tmp_path / name}"):
            check_destination(tmp_path / name)
    with pytest.raises(ValueError, match=f"can be made, got {tmp_path}/below below the file {tmp_path}/file"):
        check_destination(tmp_path / "below")


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_permissions_are_those_of_any_new_folder_and_stay(tmp_path, mask):
    out, before = tmp_path / "out", os.umask(mask)
    try:
        for mode in (0o777 & ~mask, 0o750):
            with replacing(out) as work:
                export(work, "text")
            assert out.stat().st_mode & 0o777 == mode
            out.chmod(0o750)
    finally:
        os.umask(before)


@pytest.mark.parametrize("out", [None, 5, "a\0b"])
def test_what_is_no_path_is_named(out):
    with pytest.raises((TypeError, ValueError), match="out_dir: expected a path, got "):
        check_destination(out)
