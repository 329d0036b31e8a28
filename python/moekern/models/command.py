"""What commands about a model's layers have in common: their arguments, and the GPU that is meant."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from moekern import models
from moekern.models.calls import ACTIVATIONS

_KINDS = ("cuda", "rocm")


def add_arguments(parser: argparse.ArgumentParser, tokens: str) -> None:
    """tokens: what is taken without --tokens, for people."""
    parser.add_argument(
        "--config", required=True, help=f"a config.json of transformers', or one of {', '.join(models.names())}"
    )
    parser.add_argument("--tokens", type=_counts, help=f"numbers of tokens, 1,16,4096; {tokens}")
    parser.add_argument(
        "--activations", type=_kinds, default=ACTIVATIONS, help="of products: fp8 (W8A8), bf16 (W8A16); both"
    )


def check_triton() -> None:
    """Raises ValueError, in plain words, where it cannot compile."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set, and with it Triton compiles nothing")
    if (reason := importlib.import_module("moekern.backends._triton.kernels").why_not()) is not None:
        raise ValueError(reason)


def target(name: str | None) -> tuple[torch.device, Any]:
    """The GPU of that name, or the first, and what Triton compiles for it. Raises ValueError where there is none."""
    devices = dict(_devices())
    if name is None:
        if not devices:
            reasons = "; ".join(f"{kind}: {_backend(kind).probe()}" for kind in _KINDS)
            raise ValueError(f"no GPU is here ({reasons})")
        name = next(iter(devices))
    if name not in devices:
        raise ValueError(f"--device {name} is not here; these are: {', '.join(devices) or 'none'}")
    where = torch.device(name)
    return where, devices[name].target_of(where)


def _devices() -> Iterator[tuple[str, Any]]:
    for kind in _KINDS:
        backend = _backend(kind)
        found = backend.probe()
        if not isinstance(found, str):
            yield from ((name, backend) for one in found for name in backend.torch_devices(one))


def _backend(kind: str) -> Any:
    return importlib.import_module(f"moekern.backends.{kind}")


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers of tokens: 1,16,4096")
    return tuple(map(int, parts))


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if not set(kinds) <= set(ACTIVATIONS):
        raise argparse.ArgumentTypeError(f"{text} is not of {', '.join(ACTIVATIONS)}")
    return kinds
