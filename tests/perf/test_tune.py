"""The tuner: what it tries, how it puts a setting in place, and that what fails never reaches the clock."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from gdn_ops.kernels.triton import linear_attention, linear_attention_backward
from gdn_ops.kernels.triton.chip import CHIPS, as_if_on
from gdn_ops.kernels.triton.chunk_backward import chunk_backward
from gdn_ops.kernels.triton.chunk_forward import chunk_forward
from gdn_ops.kernels.triton.compile_case import cases_of_call
from gdn_ops.kernels.triton.recurrent import recurrent_forward, recurrent_update_
from perf.__main__ import main
from perf.shapes import Shape
from perf.tune import KERNELS, chosen, parse_settings, settings_of, sound, text_of

SHAPE = Shape(2, 4, 1, 8192)


def launches(kernel):
    """What an H200 would be asked to launch for ``SHAPE``, in the direction of ``kernel``, by kernel."""
    H, HV, _, T, K, V = SHAPE
    q, v, gates = (torch.empty(1, T, *size, device="meta") for size in ((H, K), (HV, V), (HV,)))
    q, v = q.bfloat16(), v.bfloat16()
    forward, backward, gates = chunk_forward, chunk_backward, (gates, gates)
    if kernel.linear:
        forward, backward, gates = linear_attention.chunk_forward, linear_attention_backward.chunk_backward, gates[:1]
    tokens = [x[:, :1] for x in (q, q, v, *gates)]
    with as_if_on(CHIPS["sm_90"]):
        if kernel.direction == "decode":
            cases = cases_of_call("", recurrent_forward, *tokens, None, None, 0.1, True)
        elif kernel.direction == "decode, bf16 state":
            pool = torch.empty(1, HV, K, V, dtype=torch.bfloat16, device="meta")
            cases = cases_of_call("", recurrent_update_, *tokens, pool, None, None, None, 0.1)
        elif kernel.direction == "forward":
            cases = cases_of_call("", forward, q, q, v, *gates, None, None, 0.1, False)
        else:
            cases = cases_of_call("", backward, v, None, q, q, v, *gates, None, None, 0.1)
    return {case.name.split("/")[1]: case for case in cases}


@pytest.mark.parametrize("name", KERNELS)
def test_a_setting_is_what_is_launched_and_only_inside(name):
    kernel = KERNELS[name]
    usual = launches(kernel)
    settings = {option: values[0] for option, values in kernel.choices.items()} | {"num_warps": 8}
    with chosen(kernel, settings):
        changed = launches(kernel)
    different = [found for found in usual if changed[found] != usual[found]]
    assert f"{name}_kernel" in different
    case = changed[f"{name}_kernel"]
    tiles = {option: value for option, value in settings.items() if option in ("BK", "BV")}
    assert {option: case.constexprs[option] for option in tiles} == tiles
    assert (case.num_warps, case.num_stages) == (8, settings.get("num_stages", case.num_stages))
    assert launches(kernel) == usual


def test_an_error_inside_puts_the_function_back():
    module = importlib.import_module("gdn_ops.kernels.triton.chunk_backward")
    usual = module.key_gradient_configuration
    with pytest.raises(KeyError), chosen(KERNELS["key_gradient"], {"BV": 16}):
        assert module.key_gradient_configuration is not usual
        raise KeyError
    assert module.key_gradient_configuration is usual


@pytest.mark.parametrize("name", KERNELS)
def test_settings_are_all_combinations_that_fit_the_heads(name):
    kernel = KERNELS[name]
    wide = settings_of(kernel, SHAPE)
    assert len({text_of(s) for s in wide}) == len(wide)
    assert all(set(s) == set(kernel.choices) and s.get("num_stages", 2) >= 2 for s in wide)
    narrow = settings_of(kernel, SHAPE._replace(K=32, V=32))
    assert narrow == [s for s in wide if s.get("BK", 0) <= 32 and s.get("BV", 0) <= 32] and narrow


def test_settings_as_text():
    settings = {"BK": 64, "num_warps": 4}
    assert text_of(settings) == "BK=64,num_warps=4" and parse_settings(text_of(settings)) == settings


def test_only_settings_that_end_well_are_sound(capsys):
    python = [sys.executable, "-c"]
    jobs = [
        ({"BV": 16}, [*python, "pass"]),
        ({"BV": 32}, [*python, "import sys; sys.exit('differs by 3.0e-01')"]),
        ({"BV": 64}, [*python, "import os; os.abort()"]),
        ({"BV": 128}, [*python, "pass"]),
    ]
    assert sound(jobs) == [{"BV": 16}, {"BV": 128}]
    said = capsys.readouterr().out
    assert "left out: BV=32: differs by 3.0e-01" in said and "left out: BV=64: " in said


def test_what_takes_too_long_is_left_out(capsys):
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert sound([({"BV": 16}, waits)], seconds=1.0) == []
    assert "left out: BV=16: not done after 1 s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--kernel", "score"])
    assert "expected a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_wrong_setting_is_found_and_a_right_one_measured(tmp_path, monkeypatch, capsys):
    tuning = importlib.import_module("perf.tune")
    monkeypatch.setattr(tuning, "SECONDS_TO_CHECK", 200.0)  # beside other tests a compilation takes its time
    monkeypatch.setitem(tuning.KERNELS, "value_gradient", KERNELS["value_gradient"]._replace(choices={"BV": (32, 64)}))
    tuning.tune("value_gradient", Shape(1, 2, 1, 512, 64, 64), None, "bf16", tmp_path / "tune.csv", 300.0)
    said = capsys.readouterr().out
    assert "present" in said and "value_gradient BV=32" in said and (tmp_path / "tune.csv").exists()


def test_a_setting_that_says_much_is_sound():
    command = [sys.executable, "-c", "import sys; sys.stderr.write('x' * 300_000)"]
    assert sound([({"BV": 16}, command)], 60.0) == [{"BV": 16}]
