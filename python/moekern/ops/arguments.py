"""Checks of arguments that are no tensors. Errors name the op, the argument, what it has, and what is allowed."""

from __future__ import annotations

from typing import Any

import torch


def check_integer(op: str, name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} is {value!r}; it must be an integer")
    if not least <= value <= most:
        raise ValueError(f"{op}: {name} is {value}; it must be in {least} .. {most}")


def check_number(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {value!r}; it must be a number")


def check_bool(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}; it is True or False")


def check_choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} is {value!r}; it is one of {', '.join(allowed)}")
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}; it is one of {', '.join(allowed)}")
