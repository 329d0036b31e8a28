"""bench/accelerator.py on a device that is pretended: events on a clock that calls move, in CPU memory."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekern
from moekern import fp8_gemm_nt

for package in ("typer", "rich", "matplotlib", "psutil", "threadpoolctl", "cpuinfo"):
    pytest.importorskip(package)

BENCH = Path(__file__).parent.parent / "bench"
LINEAR = {"name": "ragged", "n": 130, "k": 256}


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def module(name: str) -> Any:
    return importlib.import_module(name)


class Pretended:
    """A runtime whose time passes only in calls that `takes` is around. Events know nothing before a synchronize."""

    def __init__(self) -> None:
        self.now, self.done, self.log = 0.0, 0.0, []

    def takes(self, seconds: float, name: str = "call") -> Callable[..., None]:
        def call(*_: Any, **__: Any) -> None:
            self.now += seconds
            self.log.append(name)

        return call

    def synchronize(self) -> None:
        self.done = self.now

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        runtime = self

        class Event:
            def record(self) -> None:
                self.at = runtime.now
                runtime.log.append("event")

            def elapsed_time(self, end: Any) -> float:
                assert end.at <= runtime.done, "read before the device was waited for"
                return (end.at - self.at) * 1e3  # milliseconds, as drivers give it

        return Event()


def test_caches_are_filled_before_and_outside_every_sample() -> None:
    accelerator, measure = module("timing.accelerator"), module("timing.measure")
    device = Pretended()
    clock = accelerator.Clock(device, device.takes(1.0, "flush"))
    contenders = [measure.Contender(name, device.takes(seconds, name)) for name, seconds in (("a", 1e-3), ("b", 2e-3))]
    samples = clock.interleave(contenders, budget=1.0, most=5)
    assert samples["a"].seconds == pytest.approx([1e-3] * 5) and samples["b"].seconds == pytest.approx([2e-3] * 5)
    for name in ("a", "b"):
        places = [i for i, what in enumerate(device.log) if what == name]
        assert all(device.log[i - 2 : i + 2] == ["flush", "event", name, "event"] for i in places)
    turns = [what for what in device.log if what in "ab"][4:]  # behind two untimed calls each
    assert turns == ["a", "b", "b", "a"] * 2 + ["a", "b"]  # and the order turns


def test_a_slow_contender_has_fewer_samples() -> None:
    accelerator, measure = module("timing.accelerator"), module("timing.measure")
    device = Pretended()
    contenders = [measure.Contender(name, device.takes(s)) for name, s in (("slow", 0.1), ("fast", 1e-4))]
    samples = accelerator.Clock(device, device.takes(0)).interleave(contenders, budget=0.5, most=20)
    assert (len(samples["slow"].seconds), len(samples["fast"].seconds)) == (5, 20)


def test_the_flush_is_larger_than_the_cache() -> None:
    accelerator = module("timing.accelerator")
    clock = accelerator.clock(torch.device("cpu"), Pretended(), cache=300 << 20)
    buffer = clock.flush.__self__
    assert buffer.numel() == 2 * 300 << 20
    assert accelerator.clock(torch.device("cpu"), Pretended(), cache=0).flush.__self__.numel() >= 512 << 20


def test_limits_of_a_device_are_its_copy_and_its_fastest_product() -> None:
    accelerator, measure = module("timing.accelerator"), module("timing.measure")
    peaks = accelerator.Peaks(torch.device("cpu"), copied=1 << 16, square=64)
    samples = {c.name: measure.Samples([1e-6]) for c in peaks.contenders}
    for contender in peaks.contenders:
        contender.call(0)  # each runs
    assert {"limit copy", "limit bf16"} <= set(samples)
    samples["limit bf16"] = measure.Samples([4e-6])
    found = peaks.of(samples)
    assert found["copy"] == found["read"] == pytest.approx(2 * (1 << 16) / 1e-6)
    fastest = 1e-6 if "limit fp8" in samples else 4e-6
    assert found["multiply_add"] == pytest.approx(2 * 64**3 / fastest)


def rows_on(device: Pretended) -> tuple[list[Any], list[str]]:
    accelerator, compete, suites = module("timing.accelerator"), module("timing.compete"), module("suites")
    where = torch.device("cpu")
    peaks = accelerator.Peaks(where, copied=1 << 16, square=64)
    for contender in peaks.contenders:
        contender.call = device.takes(1e-6)
    clock = accelerator.Clock(device, device.takes(0))
    linears = [suites.Linear(**LINEAR)]
    return accelerator.run(where, moekern.devices()[0], linears, (1, 5), compete.Effort(1.0, 3), clock, peaks)


def test_rows_of_a_device_beside_its_own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended()
    monkeypatch.setattr(moekern, "fp8_gemm_nt", device.takes(3e-6))
    rows, notes = rows_on(device)
    assert not notes and [row.shape["m"] for row in rows] == [1, 5]
    for row in rows:
        assert row.kernel.startswith("cpu.") and row.samples.seconds == pytest.approx([3e-6] * 3)
        least = max(row.flops / row.limits["multiply_add"], row.bytes / row.limits["read"])
        assert row.fraction == pytest.approx(least / 3e-6)
        assert row.to_json()["limits"] == row.limits and row.flops == 2 * row.shape["m"] * 130 * 256


class Broken:
    """The op, but one column of its results is of another product."""

    def __getattr__(self, name: str) -> Any:
        return getattr(fp8_gemm_nt, name)

    def __call__(self, *arguments: Any, out: torch.Tensor) -> torch.Tensor:
        fp8_gemm_nt(*arguments, out=out)
        out[:, -1] += 1
        return out


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("timing.accelerator"), "fp8_gemm_nt", Broken())
    rows, notes = rows_on(Pretended())
    assert not rows and len(notes) == 2 and all("WRONG RESULT" in note and "ragged" in note for note in notes)


def test_a_known_device_that_is_here_is_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, commands, suites = module("timing.accelerator"), module("commands"), module("suites")
    monkeypatch.setattr(moekern, "fp8_gemm_nt", (device := Pretended()).takes(3e-6))
    rows, _ = rows_on(device)
    here = moekern.Device("cuda", "sm_90", frozenset(), name="NVIDIA H800")
    monkeypatch.setattr(accelerator, "found", lambda: [(torch.device("cuda"), here)])
    monkeypatch.setattr(accelerator, "run", lambda *_: (rows, ["a note"]))
    this, measured, notes = commands._measure_this(None, suites.load("square"), (1,), True)
    assert (this.name, this.family, this.title) == ("this", "hopper", "NVIDIA H800, this machine")
    published = module("devices").known()["h800"]  # whose figures its constants are shares of
    assert (this.bandwidth, this.peak) == (published.bandwidth, published.peak)
    assert measured is rows and notes == ["a note"]
    from rich.console import Console

    # Named by its model, it has what was measured here too.
    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps({"model": "x", "source": "x", "m": [1], "linears": [LINEAR]}))
    result: dict[str, Any] = {"notes": []}
    commands.compare(Console(file=io.StringIO()), result, "h800,mi300x", str(suite), (1, 5), True)
    assert [bool(entry.measured) for entry in result["entries"]] == [True, False] * 2


def test_a_launch_up_to_a_driver_that_does_nothing() -> None:
    if "cuda" not in moekern._C.native:
        pytest.skip("_C is built without kernels for CUDA (MOEKERN_CUDA)")
    found = module("subjects.overheads").native_launch_overhead()
    assert len(found) == 2 and all(samples.seconds for samples in found.values())
