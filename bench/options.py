"""What the commands of run.py have in common: lists of words and numbers, the console."""

from __future__ import annotations

import torch
import typer
from rich.console import Console

WIDTH = 118  # of the tables where the output is no terminal


def words(option: str, text: str, allowed: list[str]) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in found if word not in allowed]:
        raise typer.BadParameter(f"{', '.join(wrong)}: not among {', '.join(allowed)}", param_hint=option)
    return found


def numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text}: not a list of numbers", param_hint=option) from None
    if min(found) < 1:
        raise typer.BadParameter(f"{text}: every number is at least 1", param_hint=option)
    return found


def console() -> Console:
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def settle(threads: int | None) -> None:
    """torch as every measurement has it."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads or torch.get_num_threads())
