"""Interleaved sampling: all contenders take turns in every round, so all see the same clock, memory and neighbours."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

SHORTEST_SAMPLE = 200e-6  # shorter calls are timed several at a time: the clock and its call take 0.1 us
AWAKE = 5e-3  # a sample shorter than this starts with an untimed call, so that sleeping threads are not in it
NOISY = 0.1  # median distance from the median, relative, beyond which a row is flagged
ONCE = 1.0  # a call longer than this is sampled once


@dataclass
class Contender:
    """Something to be timed. `call(turn)` does it once, on the data that belongs to the turn."""

    name: str
    call: Callable[[int], Any]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # entered outside the timing


@dataclass
class Samples:
    """Seconds per call."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mad(self) -> float:
        """The median distance from the median: half of the samples lie closer."""
        middle = self.median
        return statistics.median(abs(s - middle) for s in self.seconds)

    @property
    def uncertainty(self) -> float:
        """The standard error of the median, relative: 1.25 sigma / sqrt(n), with sigma = 1.48 MAD."""
        return 1.25 * 1.48 * self.mad / math.sqrt(len(self.seconds)) / self.median

    @property
    def noisy(self) -> bool:
        return self.mad > NOISY * self.median

    def to_json(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "noisy": self.noisy,
            "mad": self.mad,
            "min": min(self.seconds),
            "samples": len(self.seconds),
            "uncertainty": self.uncertainty,
        }


class _Plan:
    def __init__(self, contender: Contender, budget: float, most: int) -> None:
        self.contender = contender
        self.turn = 0
        self.samples = Samples()
        with contender.around():
            self.call()  # pages, packs, tunes, compiles
            once = self.estimate = self.call()
            if once < ONCE:
                self.estimate = min(once, self.call())
        self.repeat = max(1, math.ceil(SHORTEST_SAMPLE / self.estimate))
        affordable = int(budget / (self.estimate * self.repeat))
        self.count = max(1 if once > ONCE else 3, min(affordable, most))

    def call(self) -> float:
        self.turn += 1
        start = time.perf_counter()
        self.contender.call(self.turn)
        return time.perf_counter() - start

    def sample(self) -> None:
        with self.contender.around():
            if self.estimate * self.repeat < AWAKE:
                self.call()
            call, turns = self.contender.call, range(self.turn + 1, self.turn + 1 + self.repeat)
            start = time.perf_counter()
            for turn in turns:
                call(turn)
            self.samples.seconds.append((time.perf_counter() - start) / self.repeat)
            self.turn += self.repeat


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(contenders: list[Contender], budget: float, most: int = 25) -> dict[str, Samples]:
    """Samples of every contender, by name: at most `most` each, within about `budget` seconds each.

    A slow contender with fewer samples takes part in evenly spaced rounds. The order turns by one
    from round to round, so that nobody always follows the same neighbour.
    """
    plans = [_Plan(contender, budget, most) for contender in contenders]
    rounds = max(plan.count for plan in plans)
    with _no_garbage_collection():
        for i in range(rounds):
            first = i % len(plans)
            for plan in plans[first:] + plans[:first]:
                if (i + 1) * plan.count // rounds > i * plan.count // rounds:
                    plan.sample()
    return {plan.contender.name: plan.samples for plan in plans}
