"""Suites: a model's linear layers and the numbers of rows to run them with. One small table each, in suites/."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Linear:
    name: str
    n: int  # output features: rows of the weight
    k: int  # input features: columns of the weight

    @property
    def expert(self) -> bool:
        """Whether there is one for every expert."""
        return self.name.startswith("expert")


@dataclass(frozen=True)
class Suite:
    model: str
    source: str  # where the shapes are published
    m: tuple[int, ...]  # rows of activations: tokens in one call
    quick_m: tuple[int, ...]
    linears: tuple[Linear, ...]


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Suite:
    """A suite by name, or from a JSON file of the same form as those in suites/."""
    path = FOLDER / f"{name}.json" if name in names() else Path(name)
    if not path.is_file():
        raise ValueError(f"--suite {name}: no such suite ({', '.join(names())}) and no such file")
    try:
        table = json.loads(path.read_text())
        linears = tuple(Linear(str(row["name"]), int(row["n"]), int(row["k"])) for row in table["linears"])
        m = tuple(int(rows) for rows in table["m"])
        quick_m = tuple(int(rows) for rows in table.get("quick_m", m))
        suite = Suite(str(table["model"]), str(table["source"]), m, quick_m, linears)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--suite {path}: not a suite ({type(error).__name__}: {error}); see {FOLDER}") from None
    if not linears or min([*m, *quick_m, *(x for row in linears for x in (row.n, row.k))], default=0) < 1:
        raise ValueError(f"--suite {path}: needs at least one linear, and every n, k and m at least 1")
    return suite
