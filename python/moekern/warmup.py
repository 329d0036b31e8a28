"""Compiles the GPU kernels that a model's layers launch, into Triton's cache: then no request waits for a compiler."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from moekern import models
from moekern.models import command
from moekern.models.calls import Call, calls

# Integers are compiled in where they are 1, and known where they are multiples of 16. Tiles change at powers of two.
TOKENS = (1, *(tokens for e in range(1, 14) for tokens in (2**e, 2 ** (e + 1) - 1)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser, "all powers of two up to 8192, and odd ones")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="one that is here, cuda:0; the first")
    where.add_argument("--target", help="an architecture that need not be here: sm_90, gfx942, ...")


def run(options: argparse.Namespace) -> int:
    """Prints a line for every call that brought new kernels. 2: nothing could be done; 1: something failed."""
    try:
        model = models.load(options.config)
        target = _target(options)
    except ValueError as error:
        print(f"moekern warmup: {error}", file=sys.stderr)
        return 2
    from moekern.backends._triton import warmup

    start, failed, without = time.perf_counter(), 0, dict[str, None]()
    found: list[warmup.Compiled] = []
    warm = warmup.Warmup(target)
    print(f"{model.name} for {target.name}, {target.processors} processors")
    for call in calls(model, options.tokens or TOKENS, options.activations):
        done = warm.call(call.op, call.prepared)
        found += done.compiled
        failed += done.failure is not None
        if done.kernel is None:
            without[call.op.name] = None
        elif done.compiled or done.failure:
            print(_line(call, done), flush=True)
    for name in without:
        print(f"{name}: no kernel takes some of its calls")
    fresh = sum(not compiled.cached for compiled in found)
    seconds = time.perf_counter() - start
    print(f"{fresh} compiled, {len(found) - fresh} found, {failed} calls failed, {seconds:.0f} s, in {warmup.folder()}")
    return 1 if failed else 0


def _line(call: Call, done: Any) -> str:
    ways = [f"{c.kernel} {'found' if c.cached else f'{c.seconds:.1f} s'}" for c in done.compiled]
    failure = [f"FAILED: {done.failure}"] if done.failure else []
    return f"{call.op.name:<33}{call.what:<40}{done.kernel:<20}{', '.join(ways + failure)}"


def _target(options: argparse.Namespace) -> Any:
    """The architecture to compile for. Raises ValueError in plain words."""
    command.check_triton()
    from moekern.backends._triton.targets import TARGETS

    if options.target is not None:
        if options.target not in TARGETS:
            raise ValueError(f"--target {options.target} is not known; these are: {', '.join(TARGETS)}")
        return TARGETS[options.target]
    try:
        return command.target(options.device)[1]
    except ValueError as error:
        raise ValueError(f"{error}; --target compiles for one of {', '.join(TARGETS)}") from None
