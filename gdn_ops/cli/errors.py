"""How a command refuses: one line, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType


class UserError(Exception):
    """What was asked cannot be done as asked; the message says which argument, what was expected and what came."""


class Failure(Exception):
    """What was asked was tried and did not work out; exit code 1."""


@contextlib.contextmanager
def at_the_door(argument: str | None = None) -> Iterator[None]:
    """Inside it, what the floors below refuse becomes a :class:`UserError`, under the name of ``argument`` if given."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{argument}: {line}" if argument else line) from error


def need(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Imports an optional library, or says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"{purpose} needs {error.name}: pip install 'gdn-ops[{extra}]'") from error
