"""Measures the tiles of a model's products on a GPU that is here, and keeps the fastest on disk for later processes.

Tiles come from a model of cost, which needs no measurement; this finds what it misjudges.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from moekern import models
from moekern.models import command
from moekern.models.calls import Values, calls

TOKENS = tuple(2**e for e in range(13))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser, "all powers of two up to 4096")
    parser.add_argument("--device", help="cuda:0, or another that is here; the first")


def run(options: argparse.Namespace) -> int:
    """Prints a line for every product. 2: nothing could be done; 1: some tiles failed or were wrong."""
    try:
        model = models.load(options.config)
        command.check_triton()
        device, target = command.target(options.device)
    except ValueError as error:
        print(f"moekern tune: {error}", file=sys.stderr)
        return 2
    from moekern.backends._triton import tuned, tuning, warmup

    start, failed, found = time.perf_counter(), 0, list[tuned.Entry]()
    tuner = tuning.Tuner(warmup.family_of(target), target)
    print(f"{model.name} on {target.product}, {target.processors} processors")
    for call in calls(model, options.tokens or TOKENS, options.activations, Values(device)):
        if call.op not in tuning.OPS:
            continue
        try:
            for outcome in tuner.call(call.op, call.prepared):
                failed += len(outcome.rejected)
                found.append(outcome.entry)
                print(line(call.op.name, call.what, outcome), flush=True)
                tuned.save(target, [outcome.entry])  # at once: a run may end early
        except Exception as error:  # the compiler's and the driver's have no common class
            failed += 1
            print(f"{call.op.name:<33}{call.what:<40}FAILED: {type(error).__name__}: {error}", flush=True)
    gains = sum(entry.time < entry.time_by_cost for entry in found)
    seconds = time.perf_counter() - start
    print(f"{len(found)} products, {gains} of them faster, {failed} calls or candidates failed, {seconds:.0f} s")
    print(f"in {tuned.path(target)}")
    return 1 if failed else 0


def line(op: str, what: str, outcome: Any) -> str:
    entry = outcome.entry
    shape, tiles = entry.shape, entry.tiles
    said = f"{tiles.rows}x{tiles.columns}, {tiles.warps} warps, {tiles.stages} stages, {tiles.splits} splits"
    times = f"{entry.time_by_cost:10.1f} -> {entry.time:.1f} us"
    rejected = "".join(f"\n  rejected {one.rows}x{one.columns}: {reason}" for one, reason in outcome.rejected)
    return f"{op:<33}{what:<40}{shape.columns} x {shape.k}: {times}, {said}, of {outcome.tried}{rejected}"
