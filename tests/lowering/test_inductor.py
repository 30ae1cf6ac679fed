"""How packages are configured: the archive, its cache, and what is refused."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from gdn_ops.lowering import inductor
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import gdn_ops
from tests.oracle import make_inputs


def test_archive_is_built_once(monkeypatch):
    first = inductor.cpu_archive()
    monkeypatch.setattr(inductor.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert inductor.cpu_archive() == first and first.stat().st_size > 0


def test_compiler_errors_are_shown(monkeypatch, tmp_path):
    (tmp_path / "cpu_kernels.h").write_text("")
    (tmp_path / "cpu_shims.cpp").write_text("")
    (tmp_path / "cpu_kernels.cpp").write_text("no C++ at all")
    monkeypatch.setattr(inductor, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match=r"did not compile[\s\S]*no C"):
        inductor.cpu_archive()


@pytest.mark.parametrize(
    ("cxx", "told"), [(None, "CXX$"), ("nonexist", "CXX to another than 'nonexist', which does not")]
)
def test_a_compiler_that_is_not_there_is_named(monkeypatch, cxx, told):
    def absent():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    monkeypatch.delenv("CXX", raising=False) if cxx is None else monkeypatch.setenv("CXX", cxx)
    with pytest.raises(RuntimeError, match=rf"needs a C\+\+ compiler: .* set the environment variable {told}"):
        inductor.compiler()


def test_packaging_restores_the_environment(monkeypatch):
    monkeypatch.setenv("LIBRARY_PATH", "somewhere")
    with inductor.packaging(torch.device("cpu")) as configs:
        assert os.environ["LIBRARY_PATH"].endswith(":somewhere")
        assert torch.ops.gdn.chunk_gated_delta_rule.default in configs["aot_inductor.custom_ops_to_c_shims"]
    assert os.environ["LIBRARY_PATH"] == "somewhere"
    with inductor.packaging(torch.device("cuda")) as configs:
        assert configs.keys() <= {"cpp.cxx"}


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU linker")
def test_a_compiler_that_copies_the_standard_library(tmp_path):
    """Packages that it links would not load."""
    cxx = inductor.compiler()
    if not inductor.copies_standard_library(cxx):
        script = tmp_path / "g++"
        script.write_text(
            f'#!/bin/sh\ncase " $* " in *" -shared "*) exec {cxx} "$@" -static-libstdc++;; esac\nexec {cxx} "$@"\n'
        )
        script.chmod(0o755)
        cxx = str(script)
        if not inductor.copies_standard_library(cxx):
            pytest.skip("this compiler has no static libstdc++")

    class Model(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta)[0]

    x = make_inputs(1, 70, 1, 2, 16, 16, torch.float32, "cpu")
    inputs = tuple(x[name] for name in ("q", "k", "v", "g", "beta"))
    program = torch.export.export(Model(), inputs)
    with torch._inductor.config.patch({"cpp.cxx": (None, cxx)}), inductor.packaging(torch.device("cpu")) as configs:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"), inductor_configs=configs
        )
    o = torch._inductor.aoti_load_package(path)(*inputs)
    torch.testing.assert_close(o, Model()(*inputs))


def test_shim_declarations_follow_the_schemas():
    kinds = {"Tensor": "AtenTensorHandle ", "Optional[Tensor]": "AtenTensorHandle* ", "float": "double ",
             "bool": "int32_t "}  # fmt: skip
    for name, declared in inductor.CPU_SHIMS.items():
        schema = getattr(torch.ops.gdn, name).default._schema
        arguments = [kinds[str(a.type)] + a.name for a in schema.arguments]
        assert declared.split(", ")[: len(arguments)] == arguments
        assert declared.split(", ")[len(arguments) :] and declared.count("* ") >= len(schema.returns)


def test_what_cannot_be_packed_is_named():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    used = ["aten::mul.Tensor", "gdn::causal_conv1d", "gdn::recurrent_gated_delta_rule_"]
    assert list(inductor.unsupported_operators(used, cpu, {torch.float32})) == ["gdn::recurrent_gated_delta_rule_"]
    assert inductor.unsupported_operators(used, cuda, {torch.bfloat16}) == {}
    assert "float64" in inductor.unsupported_operators(used, cuda, {torch.float64})["gdn::causal_conv1d"]
