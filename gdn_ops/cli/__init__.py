"""Floor 7: the command line, ``gdn doctor | train | generate | export``. One file a command, and each is thin.

A command checks what it was given and then calls the floors below. What the user got wrong is one line on stderr that
names the argument, what was expected and what came, and exit code 2; exit code 1 means that something was tried and
failed (a probe of ``doctor``, an artifact that is not eager's equal).
"""

from __future__ import annotations

import sys


def main() -> None:
    """The ``gdn`` command."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"gdn: needs {error.name}: pip install 'gdn-ops[train]'", file=sys.stderr)
        raise SystemExit(2) from None
    from gdn_ops.cli.app import app

    app(prog_name="gdn")
