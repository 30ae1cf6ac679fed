"""Local functions of an ONNX file, written in ONNX's own text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import FunctionProto

OPSET, DOMAIN, CONTRIB = 18, "gdn_ops", "com.microsoft"


def function(signature: str, body: str, domain: str = DOMAIN, imports: tuple[str, ...] = ()) -> FunctionProto:
    """``signature`` is ``Name <attributes> (inputs) => (outputs)``; ``imports`` are domains beside the standard's."""
    import onnx.parser

    opsets = ", ".join([f'"" : {OPSET}', *(f'"{name}" : 1' for name in imports)])
    return onnx.parser.parse_function(f'<opset_import: [{opsets}], domain: "{domain}">\n{signature}\n{{{body}}}')
