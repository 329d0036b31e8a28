"""Runs mutants of our kernels (mutants.py) through the library in the emulator, and says which were noticed.

    python tests/mutation.py [--sample SECONDS] [WORD ...]     all, or those whose names have the words

Each is given the cases that its kernel has in mutation_subjects.py, with the suite's own checks, under four schedules,
until it is noticed. What survives has to be explained in surviving_mutants.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import emulated
import emulated_driver
from altered_driver import MapChange, altered
from executors import Executor
from mutants import Mutant, mutants
from ptx_text import without_others

from moekern.backends.cuda import hopper
from moekern.op import Op

EXPLAINED = Path(__file__).with_name("surviving_mutants.json")
PATIENCE = 2_000_000  # instructions without progress: a hang
ROUNDS = 2  # of the cases, each call under another schedule
PROCESSORS = 2  # which no other test has: a plan is remembered with their number


@dataclass(frozen=True)
class Problem:
    """plan: what hopper.py is to choose; it is asked once for every shape."""

    op: Op
    case: Any
    check: Callable[[Executor, Any], None]
    name: str = "sm_90.hopper"
    plan: tuple[int, ...] | None = None

    def run(self) -> None:
        [executor] = [executor for executor in emulated.executors(self.op) if executor.name == self.name]
        with (
            mock.patch.object(emulated, "_PROCESSORS", PROCESSORS),
            mock.patch.object(hopper, "tile_plan", self._planned),
            mock.patch.object(hopper, "stream_plan", self._planned),
        ):
            self.check(executor, self.case)

    def _planned(self, processors: int, *shape: int) -> tuple[int, ...]:
        assert self.plan is not None, f"no plan for {self.case}"
        return self.plan


@dataclass(frozen=True)
class Subject:
    """A kernel, its module, and what makes the library launch it. maps: tensor maps that each call takes."""

    module: str
    kernel: str
    problems: tuple[Problem, ...]
    maps: int = 0

    def text(self) -> str:
        return without_others((emulated_driver.path().parent / f"{self.module}.ptx").read_text(), self.kernel)

    def noticed(self, text: str | None = None, change: MapChange | None = None) -> str | None:
        """What was wrong with it, or None."""
        with altered({self.module: text} if text else {}, change):
            emulated_driver.configure(patience=PATIENCE)
            for _ in range(ROUNDS):
                for problem in self.problems:
                    try:
                        problem.run()
                    except Exception as error:  # a fault, or a number that is wrong
                        return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def changes_of_maps(subject: Subject) -> Iterator[MapChange]:
    for number in range(subject.maps):
        yield MapChange(number, "box", 0, -16)
        yield MapChange(number, "box", 1, -8)
        yield MapChange(number, "swizzle", 0, -1)
        yield MapChange(number, "extent", 0, -16)
        yield MapChange(number, "extent", 1, -1)
        yield MapChange(number, "stride", 0, 16)


@dataclass(frozen=True)
class Trial:
    subject: Subject
    what: Mutant | MapChange

    def __str__(self) -> str:
        return str(self.what) if isinstance(self.what, Mutant) else f"{self.subject.kernel}: {self.what}"

    def noticed(self) -> str | None:
        if isinstance(self.what, MapChange):
            return self.subject.noticed(change=self.what)
        return self.subject.noticed(self.what.apply(self.subject.text()))


def trials(subjects: tuple[Subject, ...]) -> list[Trial]:
    return [
        Trial(subject, what) for subject in subjects for what in (*mutants(subject.text()), *changes_of_maps(subject))
    ]


def explanation(trial: Trial) -> str | None:
    """Why nothing has to notice it."""
    for row in json.loads(EXPLAINED.read_text()):
        if re.fullmatch(row["mutants"], str(trial)):
            return row["because"]
    return None


def main() -> int:
    from mutation_subjects import SUBJECTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sample", type=float, help="as many, drawn at random, as take so many seconds of this process"
    )
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    every = [trial for trial in trials(SUBJECTS) if all(word in str(trial) for word in given.words)]
    if given.sample:
        random.Random(0).shuffle(every)
    started, survived, count = time.process_time(), [], 0
    for trial in every:
        if given.sample and time.process_time() - started > given.sample:
            break
        said = trial.noticed()
        count += 1
        print(f"{trial}: {said or 'SURVIVED'}", flush=True)
        survived += [] if said else [trial]
    print(f"{count} mutants, {len(survived)} survived, {time.process_time() - started:.0f} s")
    unexplained = [str(trial) for trial in survived if explanation(trial) is None]
    print("not explained:", *unexplained or ["none"], sep="\n  ")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
