"""What some parts of the benchmark need and others do not."""

from __future__ import annotations

import importlib.util


class Missing(Exception):
    """Packages are not here; the text says which, and how to get them."""


def missing(option: str, packages: tuple[str, ...], install: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{option} needs {', '.join(absent)}, not installed here: {install}" if absent else None
