"""A run end to end on the CPU: ours measured, absent and broken peers noted, the budget kept, pictures drawn."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import gdn_ops
from perf import providers, runs
from perf.__main__ import main
from perf.cpu_providers import CPU_PROVIDERS
from perf.linear_providers import LINEAR_PROVIDERS
from perf.linear_providers import cost as linear_cost
from perf.measure import Ceilings
from perf.plot import draw, pictures
from perf.providers import OURS, PROVIDERS, Provider, Unavailable, absent, bind_all
from perf.records import read_csv
from perf.shapes import Shape, cost, make_inputs
from tests.export.onnx_exports import needs_the_operators
from tests.oracle import assert_close

SMALL = Shape(1, 2, 1, 64, 16, 16)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch, request):
    """Measuring them takes seconds on a busy machine, which a small budget cannot spare; test_measure.py does it."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(runs, "measure_ceilings", lambda device, dtype: Ceilings(1e10, 1e11))


@pytest.mark.parametrize("provider", [PROVIDERS[OURS], CPU_PROVIDERS[OURS]], ids=["operators", "functions"])
def test_our_calls_are_the_operators(provider):
    """What is timed is what is meant: the output, or dq, of the same inputs by the public function."""
    import gdn_ops

    x = make_inputs(SMALL, torch.float32, "cpu")
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.g, x.beta)]
    o, _ = gdn_ops.chunk_gated_delta_rule(*leaves, scale=x.scale)
    dq = torch.autograd.grad(o, leaves, x.do)[0]
    assert_close(providers.first_result(provider.bind(x, "forward")), o.detach(), 1e-6, "forward")
    assert_close(providers.first_result(provider.bind(x, "forward+backward")), dq, 1e-6, "forward+backward")


def test_gated_linear_attention_is_timed_on_its_own_operators():
    import gdn_ops

    x, ours = make_inputs(SMALL, torch.float32, "cpu"), LINEAR_PROVIDERS[OURS]
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.g)]
    o, _ = gdn_ops.chunk_gated_linear_attention(*leaves, scale=x.scale)
    dq = torch.autograd.grad(o, leaves, x.do)[0]
    for direction, want in (("forward", o.detach()), ("backward", dq), ("forward+backward", dq)):
        assert_close(providers.first_result(ours.bind(x, direction)), want, 1e-6, direction)
    y = make_inputs(Shape(1, 2, 3, 1, 16, 16), torch.float32, "cpu")
    want, _ = gdn_ops.recurrent_gated_linear_attention(y.q, y.k, y.v, y.g, y.scale, y.state)
    assert_close(providers.first_result(ours.bind(y, "decode")), want, 1e-6, "decode")
    for direction in ("forward", "backward", "forward+backward", "decode"):
        least, delta = linear_cost(SMALL, direction, torch.bfloat16), cost(SMALL, direction, torch.bfloat16)
        assert least.bytes == delta.bytes and 0 < least.flops < delta.flops


def test_a_run_of_gated_linear_attention(monkeypatch, tmp_path, capsys):
    """Figures from elsewhere are the delta rule's, and are not held against it."""
    line = {"ms": "1", "provider": "another", "version": "1", "gpu": "a card", "source": "published"}
    monkeypatch.setattr("perf.report.published", lambda *args: [line])
    arguments = ["--device", "cpu", "--shape", "1,2,1,64,16,16", "--budget", "5", "--provider", OURS]
    main(["linear", *arguments, "--out", str(tmp_path)])
    rows = read_csv([tmp_path / "linear.csv"])
    assert [row["direction"] for row in rows] == ["forward", "backward"] and all(
        float(row["p50_ms"]) > 0 for row in rows
    )
    assert "another" not in capsys.readouterr().out


def test_decode_goes_on_from_the_state():
    x = make_inputs(Shape(1, 2, 3, 1, 16, 16), torch.float32, "cpu")
    calls = [PROVIDERS["gdn_ops in place"].bind(x, "decode"), CPU_PROVIDERS["gdn_ops chunk"].bind(x, "decode")]
    want = providers.first_result(PROVIDERS[OURS].bind(x, "decode"))
    for call in calls:
        assert_close(providers.first_result(call), want, 1e-6, "decode")


@pytest.fixture
def fla(monkeypatch):
    """A stand-in of FLA's step, which keeps the dtypes of the states it gets and gives the state in fp32."""
    got = []

    def step(q, k, v, g, beta, scale, initial_state, output_final_state):
        got.append(initial_state.dtype)
        state = initial_state.float()
        return gdn_ops.recurrent_gated_delta_rule(q, k, v, g, beta, scale, state, output_final_state)

    module = ModuleType("fla.ops.gated_delta_rule")
    module.fused_recurrent_gated_delta_rule = step
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    return got


def test_decode_with_the_state_in_bf16(fla):
    """Ours is the pool's step, on a bf16 copy of the same state; who has no such step says so."""
    x, direction = make_inputs(Shape(1, 2, 3, 1, 16, 16), torch.float32, "cpu"), "decode, bf16 state"
    state = x.state.bfloat16().float()
    want, _ = gdn_ops.recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, x.scale, state)
    before = x.state.clone()
    call = PROVIDERS[OURS].bind(x, direction)
    assert_close(providers.first_result(call), want, 1e-6, "o")
    assert torch.equal(x.state, before)
    second = providers.first_result(call)  # from the state that the first one left, rounded to bf16
    _, state = gdn_ops.recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, x.scale, state, True)
    want, _ = gdn_ops.recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, x.scale, state.bfloat16().float())
    assert_close(second, want, 5e-4, "o of the second call")  # 1.7e-3 had it not been rounded
    PROVIDERS["FLA"].bind(x, direction)(), PROVIDERS["FLA"].bind(x, "decode")()
    assert fla == [torch.bfloat16, torch.float32]
    for name in ("gdn_ops in place", "gdn_ops portable", "FlashInfer"):
        with pytest.raises(Unavailable):
            PROVIDERS[name].bind(x, direction)


def test_rows_of_decode_with_the_state_in_bf16(fla, tmp_path, capsys):
    """Both are compared on the same bits, against a floor of two bytes a number, and have a picture of their own."""
    csv, small = tmp_path / "x.csv", "1,2,3,1,16,16"
    arguments = ["op", "--device", "cpu", "--shape", small, "--provider", OURS, "--provider", "FLA", "--budget", "2"]
    main([*arguments, "--direction", "decode", "--direction", "decode, bf16 state", "--out", str(csv)])
    lines = {(line["direction"], line["provider"]): line for line in read_csv([csv])}
    assert len(lines) == 4
    for (direction, provider), line in lines.items():
        floor = cost(Shape(1, 2, 3, 1, 16, 16), direction, torch.float32).bytes / 1e10 * 1e3
        assert float(line["floor_bytes_ms"]) == pytest.approx(floor, rel=1e-3)
        assert provider == OURS or float(line["error"]) < 1e-6
    printed = capsys.readouterr().out
    fla_line = next(line for line in printed.splitlines() if "decode, bf16 state  FLA " in line)
    ours, peer = (float(lines["decode, bf16 state", name]["p50_ms"]) for name in (OURS, "FLA"))
    assert float(fla_line.split()[-2]) == pytest.approx(peer / ours, abs=0.01)
    assert [picture.name.split("threads-")[1] for picture in pictures([csv])] == [
        "decode-fp32.png", "decode-bf16-state-fp32.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "gdn_ops portable ONNX",
        *(pytest.param(name, marks=needs_the_operators) for name in CPU_PROVIDERS if name.startswith("ORT")),
    ],
)
@pytest.mark.parametrize(
    ("shape", "direction"), [(Shape(2, 4, 2, 70, 16, 8), "forward"), (Shape(2, 4, 3, 1, 16, 8), "decode")]
)
def test_onnx_models_of_one_node_compute_the_same(name, shape, direction):
    pytest.importorskip("onnx", minversion="1.23")
    x = make_inputs(shape, torch.float32, "cpu")
    want = providers.first_result(CPU_PROVIDERS[OURS].bind(x, direction))
    assert_close(providers.first_result(CPU_PROVIDERS[name].bind(x, direction)), want, 1e-6, name)
    with pytest.raises(Unavailable, match="inference only"):
        CPU_PROVIDERS[name].bind(x, "forward+backward")


def test_op_on_the_cpu_end_to_end(tmp_path, capsys):
    main(
        [
            "op",
            "--device",
            "cpu",
            "--shape",
            "1,2,1,64,16,16",
            "--provider",
            OURS,
            "--budget",
            "3",
            "--out",
            str(tmp_path),
        ]
    )
    lines = read_csv([tmp_path / "op.csv"])
    assert [line["direction"] for line in lines] == ["forward", "backward"]
    for line in lines:
        times = [float(line[n]) for n in ("least_ms", "p20_ms", "p50_ms", "p80_ms")]
        assert times == sorted(times) and times[0] > 0 and int(line["samples"]) > 1
        assert line["provider"] == OURS and line["method"] == "wall clock" and line["dtype"] == "fp32"
        assert float(line["ratio"]) == pytest.approx(times[2] / float(line["floor_ms"]), rel=1e-3)
    printed = capsys.readouterr().out
    assert "1/2 1x64 K=16 V=16" in printed and "2 rows in" in printed


def test_absent_library_is_named_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)  # as if it were not installed
    who = [PROVIDERS[OURS], PROVIDERS["FLA"]]
    assert absent(who) == {"FLA": "flash-linear-attention is not installed: pip install flash-linear-attention"}
    rows = runs.run([(SMALL, "forward")], "fp32", "cpu", who, tmp_path / "x.csv", budget=1.0)
    assert [row.provider for row in rows] == [OURS]
    assert "absent: FLA: flash-linear-attention is not installed" in capsys.readouterr().out


def test_broken_and_wrong_peers_stay_in_their_rows(tmp_path):
    def broken(x, direction):
        raise RuntimeError("refuses this chip\nat length")

    def late(x, direction):
        return lambda: broken(x, direction)

    def wrong(x, direction):
        return lambda: 2 * x.v if direction == "forward" else x.q

    def without(x, direction):
        raise Unavailable("forward only")

    who = [
        Provider("broken", broken),
        Provider("late", late),
        PROVIDERS[OURS],
        Provider("wrong", wrong),
        Provider("no", without),
    ]
    rows = {r.provider: r for r in runs.run([(SMALL, "backward")], "fp32", "cpu", who, tmp_path / "x.csv", budget=1.0)}
    assert set(rows) == {"broken", "late", OURS, "wrong"}
    assert rows["broken"].p50_ms is None and rows["broken"].note == "RuntimeError: refuses this chip"
    assert rows["late"].p50_ms is None and "refuses this chip" in rows["late"].note
    assert rows[OURS].p50_ms > 0 and rows[OURS].error is None
    assert rows["wrong"].error > 0.5


def test_spent_budget_names_what_it_left_out(tmp_path, capsys):
    tasks = [(SMALL, "forward"), (SMALL._replace(T=128), "forward")]
    rows = runs.run(tasks, "fp32", "cpu", [PROVIDERS[OURS]], tmp_path / "x.csv", budget=0.0)
    assert rows == []
    assert "not measured, the budget of 0 s was spent: 1/2 1x128 K=16 V=16 forward" in capsys.readouterr().out


def test_a_task_that_fails_does_not_lose_the_next(tmp_path, capsys, monkeypatch):
    exact = runs.make_inputs

    def too_large(shape, *arguments):
        if shape.T == 128:
            raise MemoryError("no room")
        return exact(shape, *arguments)

    monkeypatch.setattr(runs, "make_inputs", too_large)
    tasks = [(SMALL._replace(T=128), "forward"), (SMALL, "forward")]
    rows = runs.run(tasks, "fp32", "cpu", [PROVIDERS[OURS]], tmp_path / "x.csv", budget=1.0)
    assert [row.shape for row in rows] == [SMALL] and rows[0].p50_ms > 0
    assert "not measured: 1/2 1x128 K=16 V=16 forward: MemoryError: no room" in capsys.readouterr().out


def test_distinct_keeps_the_shortest_of_what_compiles_alike():
    long, short, odd, one = (SMALL._replace(T=T) for T in (8192, 1024, 1000, 1))
    tasks = [(long, "forward"), (short, "forward"), (odd, "forward"), (one, "decode"), (long, "backward")]
    assert runs.distinct(tasks) == [(short, "forward"), (odd, "forward"), (one, "decode"), (long, "backward")]
    assert runs.parse_task("1,2,1,64,16,16:forward+backward") == (SMALL, "forward+backward")


def test_warm_up_starts_with_ours_and_shares_a_peers_autotuning():
    long, short = SMALL._replace(T=8192), SMALL._replace(T=1024)
    jobs = runs.warm_up_jobs([(long, "forward"), (short, "forward")], [PROVIDERS[OURS], PROVIDERS["FLA"]])
    words = [(job[1].split(",")[3], job[3], job[5:]) for job in jobs]
    assert words[0] == ("1024", "0,1", [OURS]) and words[-1] == ("8192", "0,1", [OURS])
    assert words[1:-1] == [("1024", f"{i},{runs.PARTS}", ["FLA"]) for i in range(runs.PARTS)]


def test_shared_autotuning_covers_every_configuration(monkeypatch):
    triton = pytest.importorskip("triton")

    def kernel(x, N, BLOCK: triton.language.constexpr):
        pass

    seen = []
    for i in range(3):
        configs = [triton.Config({"BLOCK": 2**n}) for n in range(5)]
        tuned = triton.heuristics({"N": lambda a: 1})(triton.autotune(configs, ["N"])(triton.jit(kernel)))
        module = ModuleType("fla.ops.invented")
        module.kernel, module.again, module.torch = tuned, tuned, torch
        monkeypatch.setitem(sys.modules, "fla.ops.invented", module)
        providers.share_autotuning(0, 1)
        assert len(tuned.fn.configs) == 5
        providers.share_autotuning(i, 3)
        seen.append([config.kwargs["BLOCK"] for config in tuned.fn.configs])
        assert not tuned.fn.cache_results
    assert seen == [[1, 8], [2, 16], [4]]


def test_bind_all_leaves_out_what_a_provider_has_not():
    x = make_inputs(SMALL, torch.float32, "cpu")
    others = [PROVIDERS["gdn_ops in place"], PROVIDERS["gdn_ops portable"]]
    candidates, failed = bind_all([PROVIDERS[OURS], *others], [x, x], "forward")
    assert [(c.provider, len(c.calls)) for c in candidates] == [(OURS, 2)] and failed == []


def test_pictures_come_from_the_csv_alone(tmp_path):
    csv = tmp_path / "x.csv"
    other = Provider("other", PROVIDERS[OURS].bind)
    tasks = [(SMALL, "forward"), (SMALL._replace(T=128), "forward"), (SMALL, "backward")]
    rows = runs.run(tasks, "fp32", "cpu", [PROVIDERS[OURS], other], csv, budget=1.5)
    forward, backward = pictures([csv])
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert list(forward.bars) == [SMALL, SMALL._replace(T=128)] and forward.providers == [OURS, "other"]
    assert forward.bars[SMALL]["other"].p50 == next(r.p50_ms for r in rows if r.provider == "other")
    pytest.importorskip("matplotlib")
    paths = draw([csv], tmp_path / "plots")
    assert [path.name for path in paths] == [forward.name, backward.name]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_plot_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad.csv"
    bad.write_text("direction,H\nforward,1\n")
    for argument, message in ((bad, "got none named HV"), (tmp_path / "none.csv", "No such file")):
        with pytest.raises(SystemExit):
            main(["plot", str(argument), "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
    csv = tmp_path / "x.csv"
    runs.run([(SMALL, "forward")], "fp32", "cpu", [PROVIDERS[OURS]], csv, budget=0.5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'gdn-ops\[train\]'"):
        draw([csv], tmp_path)


def test_bad_arguments(capsys):
    for arguments, message in (
        (["op", "--device", "cpu"], "expected at least one of them, got neither"),
        (["op", "--shape", "2,3,1,64,8,8"], "expected HV divisible by H"),
        (["op", "--suite", "sideways"], "invalid choice"),
        (["op", "--suite", "long", "--device", "cpu"], "expected forward, backward or decode on the CPU, got long"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["gpu"])
        assert "expected a CUDA device" in capsys.readouterr().err


def test_flashinfer_gets_packed_sequences_and_the_gate_itself(monkeypatch):
    """What it is called with is checked by a stand-in that computes the rule from it."""

    def rule(q, k, v, g, beta, *, scale, cu_seqlens):
        batched = (t.unflatten(0, (-1, int(cu_seqlens[1]))) for t in (q, k, v, g.log(), beta))
        assert cu_seqlens.tolist() == [0, 40, 80] and g.dtype == beta.dtype == torch.float32
        return gdn_ops.chunk_gated_delta_rule(*batched, scale=scale)[0].flatten(0, 1)

    module = ModuleType("flashinfer.gdn_prefill")
    module.chunk_gated_delta_rule = rule
    monkeypatch.setitem(sys.modules, "flashinfer.gdn_prefill", module)
    x = make_inputs(Shape(1, 2, 2, 40, 16, 16), torch.float32, "cpu")
    want = providers.first_result(PROVIDERS[OURS].bind(x, "forward"))
    assert_close(PROVIDERS["FlashInfer"].bind(x, "forward")(), want, 1e-6, "o")
    with pytest.raises(Unavailable, match="FlashInfer: expected forward, got backward"):
        PROVIDERS["FlashInfer"].bind(x, "backward")


@pytest.mark.gpu
def test_graph_replay_on_cuda(tmp_path):
    """Forward, backward and decode are captured, over inputs that rotate, and the picture of it is drawn."""
    small = Shape(2, 4, 1, 256, 64, 64)
    one = small._replace(T=1)
    tasks = [(small, "forward"), (small, "backward"), (one, "decode"), (one, "decode, bf16 state")]
    runs.compile_once(tasks, "bf16", [PROVIDERS[OURS]])
    rows = runs.run(tasks, "bf16", "cuda", [PROVIDERS[OURS]], tmp_path / "x.csv", budget=12.0, warm=False)
    assert [row.method for row in rows] == ["cuda graph"] * 4, [row.note for row in rows]
    assert all(row.note == "" and 0 < row.p50_ms < 5 for row in rows)
    assert rows[1].peak_mib > rows[0].peak_mib >= 256 * 4 * 64 * 2 / 2**20  # the output, at least
    assert rows[2].peak_mib is None


@needs_the_operators
def test_what_bounds_the_portable_rule(monkeypatch):
    """Each node that the rule needs is timed, for a token and for chunks, and the rule's own nodes are counted."""
    from perf import nodes

    monkeypatch.setattr(nodes, "REPEATS", 1)
    for T, needed in ((1, nodes.token_nodes), (70, nodes.chunk_nodes)):
        shape = Shape(1, 2, 1, T, 16, 16)
        text = nodes.report(shape, 0.05)
        for node in needed(shape):
            assert f"{node.what}: {node.kind} x {node.times}" in text
        assert nodes.FUSED in text and "MatMul x" in text
    assert "all of them, 3 chunks" in text
    found = nodes.profile(make_inputs(Shape(1, 2, 1, 1, 16, 16), torch.float32, "cpu"))
    assert found["MatMul"][0] == 2 and "Scan" not in found
