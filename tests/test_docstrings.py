"""Every example in a docstring of the packages runs and shows what it says."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import gdn_ops
from tests.test_house import MODULES

OPTIONAL = ("lm_eval", "triton", "torch_tensorrt", "tensorrt")  # of other extras than the tests need


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    torch.manual_seed(0)
    results = doctest.testmod(module, extraglobs={"torch": torch, "gdn_ops": gdn_ops})
    assert results.failed == 0


def test_modules_have_examples():
    """So that the test above cannot pass for want of any."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("gdn_ops.functional", "gdn_ops.reference", "gdn_ops.nn.norm", "gdn_ops.models.hybrid"):
        assert any(x.examples for x in finder.find(importlib.import_module(name))), name
