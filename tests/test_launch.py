"""What a launch asks of the driver, with one that is not there: arguments in order, and what was compiled for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pretended
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def between(x, ROWS: tl.constexpr, y, rows, factor):
    i = tl.arange(0, ROWS)
    tl.store(y + i, tl.load(x + i, mask=i < rows) * factor, mask=i < rows)


def launch(rows: int, first: int = 0, **options: Any) -> Any:
    from moekern.backends._triton.launch import Launch

    x, y = torch.zeros(64 + first), torch.zeros(64)
    arguments = {"x": x[first:], "rows": rows, "factor": 2.0, "y": y}  # not in the kernel's order
    return Launch(between, (3, 2), arguments, {"ROWS": 64}, **options)


def compilations() -> list[str]:
    """Where the names of kernels go that Triton compiles or reads from its cache."""
    found: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, **rest: found.append(src.name)
    return found


def arguments() -> None:
    from moekern.backends._triton.ahead import active

    driver, found = pretended.driver(), compilations()
    with active(driver):
        for rows, first in ((48, 0), (32, 0), (33, 0), (1, 0), (48, 1), (48, 4), (48, 0)):
            one = launch(rows, first)
            one.run()
            last = driver.launched[-1]
            x, y = one.arguments["x"], one.arguments["y"]
            assert last.kernel == "between" and last.grid == (3, 2, 1) and last.stream == pretended.STREAM
            assert last.values[0] is x and last.values[2] is y and (last.values[1], *last.values[3:]) == (64, rows, 2.0)
            aligned = {"y"} | ({"x"} if first % 4 == 0 else set()) | ({"rows"} if rows % 16 == 0 else set())
            assert last.aligned == aligned and last.compiled_in == {"ROWS"} | ({"rows"} if rows == 1 else set())
        assert len(found) == 4  # rows a multiple of 16, not one, 1, and x not aligned
        launch(48, num_warps=8).run()
        replace(launch(48), constants={"ROWS": 32}).run()
        assert len(found) == 6
        launch(48).run(stream=11)
        assert driver.launched[-1].stream == 11
        before = len(driver.launched)
        replace(launch(48), grid=(0, 2)).run()
        assert len(driver.launched) == before and len(found) == 6


def as_triton() -> None:
    """What `run` finds is what Triton would."""
    from moekern.backends._triton import launch as launches
    from moekern.backends._triton.ahead import active
    from moekern.backends._triton.targets import TARGETS

    driver, found = pretended.driver(), compilations()
    with active(driver):
        asked = []
        for rows, first in ((48, 0), (33, 0), (1, 0), (48, 1), (2**31, 0), (2**31 + 1, 1)):
            launch(rows, first).run()
            asked.append(len(found))
            launch(rows, first).by_triton()
            assert len(found) == asked[-1]
            ours, its = driver.launched[-2:]
            assert replace(ours, values=ours.values[3:]) == replace(its, values=its.values[3:])
        assert asked == [1, 2, 3, 4, 5, 6]
        hashes = {launch(rows).prepare().hash for rows in (48, 33, 1)}
    assert {launch(rows).compile(TARGETS["sm_90"]).hash for rows in (48, 33, 1)} == hashes
    with active(driver):
        for spoilt in (between.pre_run_hooks, None):
            if spoilt is not None:
                spoilt.append(lambda *arguments, **options: found.append("hook"))
            else:
                launches._kept.clear()
                launches._specialise = None
            before = len(driver.launched)
            launch(48).run()
            assert len(driver.launched) == before + 1
    assert found[-1] == "hook"


def hooks() -> None:
    from moekern.backends._triton.ahead import active

    seen: list[Any] = []
    triton.knobs.runtime.launch_enter_hook = lambda said: seen.append(said.get())
    triton.knobs.runtime.launch_exit_hook = lambda said: seen.append("left")
    with active(pretended.driver()):
        launch(48).run()
        launch(48).run()
    assert [x if x == "left" else (x["name"], x["stream"]) for x in seen] == [("between", 7), "left"] * 2


def memory() -> None:
    """For descriptors: a program's own allocator stays; a thread that has none gets torch's."""
    from concurrent.futures import ThreadPoolExecutor

    from triton.runtime._allocation import _allocator

    from moekern.backends._triton import launch as launches

    def provided() -> Any:
        launches._provide_memory()
        return _allocator.get()

    own = lambda size, alignment, stream: torch.empty(size)  # noqa: E731
    triton.set_allocator(own)
    assert provided() is own
    with ThreadPoolExecutor(1) as another:
        assert another.submit(provided).result() is launches._memory


def every_kernel() -> None:
    """Values arrive under the names that plans gave them. What is compiled is no matter, and nothing is."""
    from triton.compiler import CompiledKernel

    from moekern import models
    from moekern.backends._triton import ahead
    from moekern.backends._triton.kernels import kernels, taking
    from moekern.backends._triton.launch import Launch
    from moekern.backends._triton.targets import TARGETS
    from moekern.backends._triton.warmup import family_of
    from moekern.models.calls import calls

    class Recorder(CompiledKernel):
        module = function = packed_metadata = run = None

        def __init__(self) -> None:
            self.run = lambda *given: launched.append(given[9:])

        def launch_metadata(self, *given: Any) -> None:
            return None

    planned: list[Launch] = []
    launched: list[tuple[Any, ...]] = []
    run = Launch.run

    def kept(self: Launch, stream: int | None = None) -> None:
        if all(self.grid):
            planned.append(self)
        run(self, stream)

    Launch.run = kept  # type: ignore[method-assign]
    Launch.prepare = lambda self: Recorder()  # type: ignore[method-assign]
    found = list(kernels(family_of(TARGETS["sm_90"])))
    experts = models.Experts(4, 2, 256, 128, shared=1)
    model = models.Model("tiny", (models.Linear("q", 256, 256),), experts, (128, 128))
    with ahead.active(pretended.driver()):
        for call in calls(model, (3,)):
            taking(found, call.op, call.prepared).run(*call.prepared)
    assert len({one.kernel for one in planned}) >= 8 and len(planned) == len(launched)
    for one, got in zip(planned, launched, strict=True):
        values = {**one.arguments, **one.constants}
        assert len(values) == len(got) == len(one.kernel.arg_names)
        assert all(values[name] is x for name, x in zip(one.kernel.arg_names, got, strict=True))


@pytest.mark.parametrize("check", [arguments, as_triton, hooks, memory, every_kernel])
def test_launches(check: Any, tmp_path: Path) -> None:
    pretended.apart(tmp_path, check)
