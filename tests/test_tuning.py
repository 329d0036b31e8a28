"""`python -m moekern tune`: what is measured and believed, and what is done with a file of it. No device, no time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import interpreted
import pytest
import torch

import moekern
from moekern import models
from moekern.backends._triton import tuned, tuning
from moekern.backends._triton.kernels import Family, kernels
from moekern.backends._triton.targets import TARGETS
from moekern.backends._triton.tiles import Shape, Tiles, shared_bytes
from moekern.backends.cuda import tiles as cuda
from moekern.models.calls import Values, calls

TARGET = replace(TARGETS["sm_90"], processors=3, product="Some GPU (80GB)")
FAMILY = Family("cpu", "sm_90", lambda where: TARGET, cuda.choose, cuda.choose_for_few_rows)
SHAPE = Shape(4096, 7168, 2048, native=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path))
    tuned.load.cache_clear()
    yield tmp_path
    tuned.load.cache_clear()


def entry(tiles: Tiles, shape: Shape = SHAPE) -> tuned.Entry:
    return tuned.Entry(False, shape, tiles, 80.0, 100.0)


def test_what_was_measured_is_taken() -> None:
    by_cost = cuda.choose(TARGET, SHAPE)
    faster = replace(by_cost, stages=by_cost.stages + 1)
    choose = tuned.preferred(cuda.choose, False)
    assert choose(TARGET, SHAPE) == by_cost
    path = tuned.save(TARGET, [entry(faster)])
    assert "Some-GPU-80GB-sm_90-3" in path.name
    for rows in (2049, 3000, 4096):  # one class of shapes
        assert choose(TARGET, replace(SHAPE, rows=rows)) == faster
    for other in (replace(SHAPE, rows=2048), replace(SHAPE, k=1024), replace(SHAPE, described=True)):
        assert choose(TARGET, other) == cuda.choose(TARGET, other)
    assert tuned.preferred(cuda.choose, True)(TARGET, SHAPE) == by_cost
    assert choose(replace(TARGET, product="Another"), SHAPE) == by_cost
    assert choose(replace(TARGET, product=""), SHAPE) == by_cost
    tuned.save(TARGET, [entry(by_cost, replace(SHAPE, rows=64))])
    assert len(tuned.load(TARGET)) == 2


def test_other_sources_are_another_file() -> None:
    before = tuned.path(TARGET)
    tuned.checksum.cache_clear()
    with mock.patch("moekern.backends._triton.kernels.version", lambda: "9.9"):
        assert tuned.path(TARGET) != before
    tuned.checksum.cache_clear()


@pytest.mark.parametrize(
    "change",
    [{"depth": 64}, {"swap": True}, {"descriptors": True}, {"splits": 2}, {"stages": 100}],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_bits_or_does_not_fit_is_not_taken(change: dict[str, Any]) -> None:
    by_cost = cuda.choose(TARGET, SHAPE)
    tuned.save(TARGET, [entry(replace(by_cost, **change))])
    assert tuned.preferred(cuda.choose, False)(TARGET, SHAPE) == by_cost


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: "{",
        lambda rows: json.dumps({}),
        lambda rows: json.dumps({"entries": [{**rows[0], "tiles": {"rows": 64}}]}),
        lambda rows: json.dumps({"entries": [{**rows[0], "shape": {**rows[0]["shape"], "more": 1}}]}),
        lambda rows: json.dumps({"entries": [{**rows[0], "tiles": {**rows[0]["tiles"], "rows": "64"}}]}),
    ],
)
def test_a_damaged_file_is_said_and_not_used(damage: Callable[[Any], str]) -> None:
    by_cost = cuda.choose(TARGET, SHAPE)
    path = tuned.save(TARGET, [entry(replace(by_cost, stages=by_cost.stages + 1))])
    path.write_text(damage(json.loads(path.read_text())["entries"]))
    tuned.load.cache_clear()
    with pytest.warns(UserWarning, match="are not used"):
        assert tuned.preferred(cuda.choose, False)(TARGET, SHAPE) == by_cost


@pytest.mark.parametrize("name", TARGETS)
def test_candidates_fit_and_keep_bits(name: str) -> None:
    target = TARGETS[name]
    backend = tuning.kernels and __import__(
        f"moekern.backends.{'cuda' if target.backend == 'cuda' else 'rocm'}.tiles", fromlist=["choose"]
    )
    for shape in (SHAPE, replace(SHAPE, groups=64), replace(SHAPE, paired=True), replace(SHAPE, bits_a=16)):
        shape = replace(shape, native=shape.bits_a == 8 and bool(target.native))
        for choose in (backend.choose, backend.choose_for_few_rows):
            tiles = choose(target, replace(shape, rows=16))
            found = tuning.around(target, shape, tiles)
            assert tiles not in found and len(set(found)) == len(found) > 0
            for one in found:
                assert shared_bytes(one, shape) <= target.shared_memory
                assert (one.depth, one.swap, one.descriptors) == (tiles.depth, tiles.swap, tiles.descriptors)


def outcomes(time: tuning.Time, rows: int = 40) -> list[tuning.Outcome]:
    values = Values(torch.device("cpu"))
    a, b = values.scaled((rows, 300), (1, 128)), values.scaled((200, 300), (128, 128))
    prepared = moekern.fp8_gemm_nt.prepare(a, b)
    tuner = tuning.Tuner(FAMILY, TARGET, time)
    with interpreted.interpreter():
        found = list(tuner.call(moekern.fp8_gemm_nt, prepared))
        assert list(tuner.call(moekern.fp8_gemm_nt, prepared)) == []  # known by then
    return found


@pytest.mark.skipif(interpreted.absent() is not None, reason=str(interpreted.absent()))
@pytest.mark.parametrize("rows", [40, 5])
def test_the_fastest_that_is_right_is_kept(rows: int) -> None:
    times = iter([10.0, 9.9, *[12.0] * 3, 5.0, *[7.0] * 99])
    (found,) = outcomes(lambda call: next(times), rows)
    assert found.entry.few == (rows <= 32) and found.rejected == []
    assert (found.entry.time, found.entry.time_by_cost) == (5.0, 10.0)
    assert found.entry.shape.rows == (64 if rows == 40 else 8)


@pytest.mark.skipif(interpreted.absent() is not None, reason=str(interpreted.absent()))
def test_what_is_hardly_faster_is_noise() -> None:
    times = iter([10.0, *[9.8] * 99])
    (found,) = outcomes(lambda call: next(times))
    assert found.entry.time == 10.0


@pytest.mark.skipif(interpreted.absent() is not None, reason=str(interpreted.absent()))
@pytest.mark.parametrize("rows", [40, 5])
def test_a_wrong_candidate_is_never_the_fastest(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leaves out the last columns of k, by the plan of its launch."""
    from moekern.backends._triton import gemm

    plan, default = gemm._product, Tiles(0, 0, 0, 0)

    def wrong(target: Any, operands: Any, tiles: Tiles, *rest: Any) -> Any:
        nonlocal default
        launch = plan(target, operands, tiles, *rest)
        default = tiles if default.rows == 0 else default
        if tiles.stages != default.stages:
            launch.arguments["k"] -= 100
        return launch

    monkeypatch.setattr(gemm, "_product", wrong)
    times = iter([10.0, *[5.0] * 99])
    (found,) = outcomes(lambda call: next(times), rows)
    assert found.rejected and found.entry.tiles.stages == default.stages
    assert all(tiles.stages != default.stages for tiles, _ in found.rejected)


@pytest.mark.skipif(interpreted.absent() is not None, reason=str(interpreted.absent()))
def test_a_model() -> None:
    """Of every product that a layer of experts asks for, on random operands as the command has them."""
    experts = models.Experts(2, 1, 128, 128, shared=1)
    model = models.Model("tiny", (models.Linear("q", 128, 128),), experts, (128, 128))
    tuner = tuning.Tuner(FAMILY, TARGET, lambda call: 1.0)
    seen: dict[str, int] = {}
    with mock.patch.object(tuning, "_MOST", 1), interpreted.interpreter():
        for call in calls(model, (20,), ("fp8",), Values(torch.device("cpu"))):
            if call.op in tuning.OPS:
                found = list(tuner.call(call.op, call.prepared))
                assert [outcome.rejected for outcome in found] == [[]] * len(found), call
                seen[call.op.name] = seen.get(call.op.name, 0) + len(found)
    assert set(seen) == {op.name for op in tuning.OPS} and seen["fused_experts"] >= 2


def test_operands_have_a_layers_values() -> None:
    values = Values(torch.device("cpu"))
    x = values.scaled((64, 256), (1, 128))
    assert x.data.float().unique().tolist() == list(range(-4, 5))
    assert len(x.scale.unique()) == 2 and x.scale.log2().frac().eq(0).all()
    ids = values.ids((50, 3), 7, torch.int32)
    assert ids.min() >= 0 and ids.max() < 7 and all(len(set(row.tolist())) == 3 for row in ids)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--config", "mixtral-8x7b"), "no GPU is here"),
        (("--config", "nonsense"), "deepseek-v3"),
        (("--config", "mixtral-8x7b", "--device", "cuda:3"), "--device cuda:3 is not here"),
    ],
)
def test_the_command_says_why_not(arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-m", "moekern", "tune", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_kernels_ask_for_what_was_measured() -> None:
    """Through the list that backends register."""
    asked: list[Tiles] = []

    def plan(target: Any, choose: Any, *call: Any) -> list[Any]:
        asked.append(choose(TARGET, SHAPE))
        return []

    by_cost = cuda.choose(TARGET, SHAPE)
    tuned.save(TARGET, [entry(replace(by_cost, stages=by_cost.stages + 1))])
    prepared = moekern.fp8_gemm_nt.prepare(torch.randn(2, 128), moekern.per_block_cast_to_fp8(torch.randn(3, 128)))
    with mock.patch("moekern.backends._triton.kernels._function", lambda module, name: plan):
        _, kernel = next(pair for pair in kernels(FAMILY) if pair[1].name == "sm_90.triton")
        kernel.run(*prepared)
    assert asked == [replace(by_cost, stages=by_cost.stages + 1)]
