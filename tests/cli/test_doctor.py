"""``gdn doctor``: its report is right where all is well, and says so where it is not."""

from __future__ import annotations

import json

import pytest

import gdn_ops
from gdn_ops.cli import doctor


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def test_report(report):
    assert report["ok"] and report["versions"]["gdn_ops"] == gdn_ops.__version__
    assert report["versions"]["torch"] == doctor.metadata.version("torch")
    expected = {f"gdn::{name}" for name in gdn_ops.ops.__all__ if name not in ("batch_invariant", "save_list")}
    assert set(report["operators"]) == expected
    assert all({"CPU", "AutocastCPU", "AutocastCUDA"} <= set(keys.split()) for keys in report["operators"].values())
    probes = {probe["name"]: probe for probe in report["probes"]}
    assert "torch.compile(fullgraph=True), cpu float32" in probes
    assert len([name for name in probes if ", cpu " in name]) == 2 * len(doctor.PROBES) + 1
    assert all(probe["error"] <= 1.5e-2 for probe in probes.values())
    assert any(probe["error"] > 0 for probe in probes.values())


def test_plain_text_and_json_say_the_same(gdn, report, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: report)
    plain, as_json = gdn("doctor"), gdn("doctor", "--json")
    assert plain.code == as_json.code == 0 and json.loads(as_json.out) == report
    for part in ("versions", "devices", "compiler", "operators"):
        assert all(name in plain.out and value in plain.out for name, value in report[part].items())
    assert plain.out.count("\n  ok ") == len(report["probes"]) and plain.out.endswith("all probes passed\n")


def test_a_wrong_operator_is_found(gdn, monkeypatch):
    """Each probe can fail, and a failure is exit code 1 with the reason in the report."""

    def off(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            return result * 1.05 if not isinstance(result, tuple) else (result[0] * 1.05, *result[1:])

        return call

    for name in gdn_ops.__all__:
        function = getattr(gdn_ops, name)
        if callable(function):
            monkeypatch.setattr(gdn_ops, name, off(function))

    def refuses(device, dtype):
        raise RuntimeError("no such\nkernel image")

    monkeypatch.setattr(doctor, "_compiled", refuses)
    result = gdn("doctor")
    probes = result.out.split("probes (error against the reference)\n")[1].splitlines()
    assert result.code == 1 and "RuntimeError: no such kernel image" in result.out
    assert all(line.split()[0] == "FAILED" for line in probes if line.startswith("  "))
    assert f"{len(probes) - 2} of {len(probes) - 2} probes failed" in result.out
