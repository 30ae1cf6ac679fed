"""Options that hold numbers, with a refusal that names the option, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import typer

from gdn_ops.cli.errors import UserError

LARGEST = 2**63 - 1  # the largest seed that torch takes


def whole(name: str, least: int, help: str) -> Any:
    """An option for an integer from ``least`` to LARGEST."""

    def parse(value: Any) -> int:
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or number < least:
            raise UserError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if number > LARGEST:
            raise UserError(f"{name}: expected an integer of at most 2**63 - 1, got {value!r}")
        return number

    return typer.Option(name, parser=parse, metavar="N", help=help)


def real(name: str, least: float, help: str, most: float = math.inf, above: bool = False) -> Any:
    """An option for a number from ``least`` to ``most``; with ``above``, ``least`` itself is out."""
    bounds = f"above {least:g}" if above else f"of at least {least:g}"
    bounds += "" if most == math.inf else f" and at most {most:g}"

    def parse(value: Any) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (least < number if above else least <= number) or number > most or math.isinf(number):
            raise UserError(f"{name}: expected a number {bounds}, got {value!r}")
        return number

    return typer.Option(name, parser=parse, metavar="X", help=help)
