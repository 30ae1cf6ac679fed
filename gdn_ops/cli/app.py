"""The commands put together, and how their errors are shown."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from gdn_ops.cli import doctor, export, generate, train
from gdn_ops.cli.errors import Failure, UserError


class Commands(TyperGroup):
    """Shows every error of use as one line; a defect of ours still shows its traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return _shown(super().make_context, "gdn", *args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        return _shown(self._invoke, "gdn", ctx)

    def _invoke(self, ctx: Any) -> Any:
        with _terminable():
            return super().invoke(ctx)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside it SIGTERM raises, so that what was begun is removed as after Ctrl-C; the exit code is 143 then, whatever
    has become of the exception on its way: torch makes others of one that passes its C++ code."""
    came = []

    def end(number: int, frame: Any) -> None:
        came.append(128 + number)
        raise SystemExit(came[0])

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        if came:
            raise SystemExit(came[0]) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _shown(call: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except (UserError, Failure) as error:
        _say(name, str(error))
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    except BrokenPipeError:  # the reader of our output has gone, as in `gdn generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError" or not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else name
        _say(command, f"{error.format_message()} (see {command} --help)")
        raise typer.Exit(2) from None


def _say(name: str, message: str) -> None:
    typer.echo(f"{name}: {message}", err=True)


app = typer.Typer(
    cls=Commands,
    help="Gated DeltaNet models: check the machine, train, generate, export.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.command)
app.command("train")(train.command)
app.command("generate")(generate.command)
app.command("export")(export.command)
