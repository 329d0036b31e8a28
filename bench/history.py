"""Records of releases: shares of limits and ratios to peers, on a class of machines (history/*.json).

No time is kept: a time is of one machine on one day. Shares and ratios are of things that took turns in one run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "history"
ISAS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "bf16", "neon")  # the best first
KEPT = ("op", "linear", "m", "n", "k", "experts", "groups", "activations", "kernel", "selected", "binds", "fraction")


def machine_class(identity: dict[str, Any]) -> str:
    """What makes shares of limits comparable: the instruction sets and the number of threads."""
    features = set(identity["features"])
    isa = next((isa for isa in ISAS if isa in features), "scalar")
    return f"{identity['arch']} {isa}, {identity['threads']} threads"


def record(result: dict[str, Any], release: str) -> dict[str, Any]:
    """What is kept of a result of run.py."""
    rows = []
    for row in result["results"]:
        kept = {key: row[key] for key in KEPT if key in row}
        kept["time"] = {key: row["time"][key] for key in ("uncertainty", "noisy") if key in row["time"]}
        kept["peers"] = {name: {"ratio": peer["ratio"]} for name, peer in row["peers"].items()}
        rows.append(kept)
    machine = result["machine"]
    return {
        "release": release,
        "class": machine_class(machine["identity"]),
        "machine": {key: machine[key] for key in ("identity", "load", "torch", "moekern") if key in machine},
        "results": rows,
    }


def write(result: dict[str, Any], release: str) -> Path:
    """Raises ValueError where the run was no good as a record."""
    kept = record(result, release)
    if not kept["results"]:
        raise ValueError("the result has no rows to keep")
    noisy = [row for row in kept["results"] if row["time"].get("noisy")]
    if len(noisy) > len(kept["results"]) // 4:
        raise ValueError(f"{len(noisy)} of {len(kept['results'])} rows are noisy: measure again on a quiet machine")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{release}-{kept['class'].replace(', ', '-').replace(' ', '-')}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def records() -> list[dict[str, Any]]:
    """Of all releases, by the names of their files."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def latest(identity: dict[str, Any]) -> dict[str, Any] | None:
    """The last release's record on this class of machines."""
    mine = [one for one in records() if one["class"] == machine_class(identity)]
    return mine[-1] if mine else None
