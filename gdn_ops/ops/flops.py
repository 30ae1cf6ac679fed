"""FLOP formulas, handed to ``torch.utils.flop_counter`` when somebody imports it.

That module imports triton, which costs a tenth of a second and which ``import gdn_ops`` has no use for; so the formulas
wait for it behind a finder that steps aside once it has done its work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[torch._ops.OpOverloadPacket, Callable]] = []


class _Finder:
    """Has the ordinary finders find ``_COUNTER``, and registers what waits for it once it is loaded."""

    asking = False

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER or self.asking:
            return None
        self.asking = True  # find_spec comes here, too
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            for packet, formula in _waiting:
                module.register_flop_formula(packet)(formula)

        spec.loader.exec_module = exec_module
        return spec


def register_flops(packet: torch._ops.OpOverloadPacket, formula: Callable) -> None:
    """``formula`` takes the operator's arguments, tensors as shapes, and returns a count (see ``FlopCounterMode``)."""
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        counter.register_flop_formula(packet)(formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting.append((packet, formula))
