"""The command line itself: help, errors of use, and what it costs to ask."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest


def test_help_lists_the_commands(gdn):
    result = gdn("--help")
    assert result.code == 0 and not result.err
    assert {"doctor", "train", "generate", "export"} <= set(result.out.split())
    for command in ("doctor", "train", "generate", "export"):
        assert gdn(command, "--help").out.startswith(f"Usage: gdn {command}")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["fly"], "No such command 'fly'"),
        (["--fly"], "No such option"),
        (["train", "--out", "x"], "Missing option '--steps'"),
        (["train", "--out", "x", "--steps", "many"], "--steps: expected an integer of at least 1, got 'many'"),
        (["train", "--out", "x", "--steps", "0"], "--steps: expected an integer of at least 1, got '0'"),
        (["generate", "x", "--seed", 2**64], "--seed: expected an integer of at most 2**63 - 1"),
        (["train", "--out", "x", "--steps", "1", "--lr", "0"], "--lr: expected a number above 0, got '0'"),
        (
            ["train", "--out", "x", "--steps", "1", "--clip", "nan"],
            "--clip: expected a number of at least 0, got 'nan'",
        ),
        (["generate", "x", "--top-p", "1.5"], "--top-p: expected a number above 0 and at most 1, got '1.5'"),
        (["export", "x", "--out", "y", "--target", "wasm"], "'wasm' is not one of 'aoti'"),
        (["generate"], "Missing argument 'DIR'"),
    ],
)
def test_errors_of_use_are_one_line(gdn, args, told):
    result = gdn(*args)
    assert result.code == 2 and not result.out
    assert told in result.err and result.err.startswith("gdn") and result.err.count("\n") == 1


def test_a_defect_keeps_its_traceback(gdn, monkeypatch):
    from gdn_ops.cli import doctor

    monkeypatch.setattr(doctor, "examine", lambda: {}["absent"])
    with pytest.raises(KeyError, match="absent"):
        gdn("doctor")


def test_sigterm_ends_a_command_whatever_becomes_of_the_exception(gdn, monkeypatch):
    """torch's C++ makes a TypeError of it, which would be a defect's traceback, or a line of an export's."""
    from gdn_ops.cli import doctor

    def ended():
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit as end:
            raise TypeError(f"argument 'stride' failed to unpack: {end}") from None

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(doctor, "examine", ended)
    result = gdn("doctor")
    assert (result.code, result.out, result.err) == (143, "", "") and signal.getsignal(signal.SIGTERM) is before


def test_the_commands_are_there_without_numpy():
    """So that ``gdn doctor`` can say that it is missing."""
    code = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "from gdn_ops.cli import doctor, main\n"
        "doctor.examine = lambda: {'ok': True}\n"
        "sys.argv = ['gdn', 'doctor', '--json']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout) == {"ok": True}, done.stderr


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from gdn_ops.cli import main\n"
        "sys.argv = ['gdn', 'train', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = ('matplotlib', 'tokenizers', 'safetensors', 'torch._dynamo', 'torch._inductor', 'gdn_ops.models')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "args", "told"),
    [
        ("safetensors", ["generate", "{trained}"], "a model's folder needs safetensors: pip install 'gdn-ops[hf]'"),
        ("safetensors", ["train", "--steps", 1, "--out", "{out}"], "needs safetensors: pip install 'gdn-ops[hf]'"),
        ("matplotlib", ["train", "--steps", 1, "--out", "{out}"], "needs matplotlib: pip install 'gdn-ops[train]'"),
        ("setuptools", ["export", "{trained}", "--out", "{out}"], "needs setuptools: pip install 'gdn-ops[export]'"),
    ],
)
def test_names_the_extra_that_is_missing(gdn, trained, tmp_path, monkeypatch, module, args, told):
    monkeypatch.setitem(sys.modules, module, None)
    fill = {"{trained}": trained, "{out}": tmp_path / "out"}
    result = gdn(*(fill.get(word, word) for word in args))
    assert result.code == 2 and told in result.err and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_says_what_to_install_where_typer_is_missing():
    code = "import sys\nsys.modules['typer'] = None\nfrom gdn_ops.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr == "gdn: needs typer: pip install 'gdn-ops[train]'\n"
