"""Threads: many callers at once, forked children, and as many workers as torch has."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import moekern
from moekern.testing import cases
from moekern.testing.cases import Gemm

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# Streamed and packed, threaded and not, so that callers meet in different code.
MIX = (
    Gemm(1, 1500, 700),
    Gemm(2, 33, 65),
    Gemm(9, 700, 1300, a="e4m3fn"),
    Gemm(40, 300, 500),
    Gemm(130, 260, 300, a="e4m3fn"),
)


def script(body: str, timeout: float = 60) -> str:
    """What a fresh interpreter prints; a hang fails the test instead of the session."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_many_callers_at_once() -> None:
    problems = [cases.gemm_operands(case, seed) for seed, case in enumerate(MIX)]
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    with moekern.use(num_threads=3):
        expected = [moekern.fp8_gemm_nt(p.a, p.b) for p in problems]
        q, scale = moekern.per_block_cast_to_fp8(x)
        start = threading.Barrier(8)

        def caller(index: int) -> None:
            start.wait()
            for turn in range(20):
                at = (index + turn) % len(problems)
                assert torch.equal(moekern.fp8_gemm_nt(problems[at].a, problems[at].b), expected[at]), MIX[at]
                if turn % 5 == 0:
                    got, got_scale = moekern.per_block_cast_to_fp8(x)
                    assert torch.equal(got.view(torch.uint8), q.view(torch.uint8)) and torch.equal(got_scale, scale)
                    torch.mm(x, x.T)

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(caller, index) for index in range(8)]:
                future.result(timeout=60)


def test_the_gil_is_released() -> None:
    operands = cases.gemm_operands(Gemm(600, 2000, 2000))
    done = threading.Event()

    def caller() -> None:
        moekern.fp8_gemm_nt(operands.a, operands.b)
        done.set()

    thread = threading.Thread(target=caller)
    thread.start()
    ticks = 0
    while not done.is_set():
        ticks += 1
        time.sleep(0.0005)
    thread.join()
    assert ticks > 3, "no other thread ran during the call"


def _child(queue: multiprocessing.Queue, operands: cases.GemmOperands) -> None:
    """Calls only moekern: torch's own operators may hang in a forked child."""
    with moekern.use(num_threads=3):
        queue.put([moekern.fp8_gemm_nt(operands.a, operands.b).tolist() for _ in range(3)])


@posix
def test_multiprocessing_fork() -> None:
    """Children of a process that has used many threads, and their children's children."""
    operands = cases.gemm_operands(MIX[0])
    with moekern.use(num_threads=4):
        expected = moekern.fp8_gemm_nt(operands.a, operands.b).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child, args=(queue, operands)) for _ in range(3)]
    for child in children:
        child.start()
    try:
        for _ in children:
            assert queue.get(timeout=30) == [expected] * 3
        for child in children:
            child.join(timeout=30)
            assert child.exitcode == 0
    finally:
        for child in children:
            child.kill()


FORKS = """
    import os, torch, moekern
    torch.set_num_threads(4)
    with moekern.use(num_threads=1):
        w = moekern.per_block_cast_to_fp8(torch.randn(1500, 700))
    x = torch.randn(5, 700)
    def work():
        return moekern.fp8_gemm_nt(x, w)
    {before}
    with moekern.use(num_threads=1):
        expected = work()
    def nested(depth):
        pid = os.fork()
        if pid == 0:
            ok = all(torch.equal(work(), expected) for _ in range(20))
            if depth:
                ok = ok and nested(depth - 1)
            os._exit(0 if ok else 1)
        return os.waitpid(pid, 0)[1] == 0
    print(nested(1), torch.equal(work(), expected))
"""


@posix
@pytest.mark.parametrize(
    "before",
    ["work()", "torch.mm(torch.randn(600, 600), torch.randn(600, 600))", "pass"],
    ids=["after moekern's threads", "after torch's threads", "before any threads"],
)
def test_fork(before: str) -> None:
    assert script(FORKS.format(before=before)) == "True True"


@linux
def test_follows_the_number_of_torch_threads() -> None:
    """Threads appear only when torch, or `use`, asks for them."""
    printed = script("""
        import os, torch, moekern
        torch.set_num_threads(1)
        w = moekern.per_block_cast_to_fp8(torch.randn(4000, 1000))
        x = torch.randn(4, 1000)
        def threads():
            moekern.fp8_gemm_nt(x, w)
            return len(os.listdir("/proc/self/task"))
        moekern.fp8_gemm_nt(x, w)
        one = threads()
        torch.set_num_threads(3)
        three = threads()
        moekern.use(num_threads=5)
        five = threads()
        print(three - one, five - one)
    """)
    assert printed == "2 4"


@linux
def test_small_calls_wake_nobody() -> None:
    printed = script("""
        import os, torch, moekern
        torch.set_num_threads(4)
        w = moekern.per_block_cast_to_fp8(torch.randn(128, 128))
        before = len(os.listdir("/proc/self/task"))
        moekern.fp8_gemm_nt(torch.randn(1, 128), w)
        print(len(os.listdir("/proc/self/task")) - before)
    """)
    assert printed == "0"
