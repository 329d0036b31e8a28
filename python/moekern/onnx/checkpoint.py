"""A folder of transformers' as a model that can be exported: `python -m moekern export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from moekern.onnx.export import ACTIVATIONS, export
from moekern.onnx.forms import FORMS
from moekern.onnx.report import ExportReport
from moekern.onnx.targets import TARGETS
from moekern.onnx.weights import MODES

_MOST = 2**16  # of batch and sequence, where they are dynamic


class Logits(torch.nn.Module):
    """ids [batch, sequence] -> logits [batch, sequence, vocabulary], without a cache: what exporters want."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def load(folder: str | Path, dtype: torch.dtype) -> Logits:
    """A causal language model with its FP8 weights as they are, and the rest in `dtype`.

    Its calls of moekern are those of moekern.integrations.transformers, which has to be installed meanwhile.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="moekern"
    )
    return Logits(model.eval())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder with config.json and .safetensors files")
    parser.add_argument("path", type=Path, help="the file to write; weights go beside it, into PATH.data")
    parser.add_argument("--target", choices=TARGETS, help="the runtime that it is for; chooses what follows")
    parser.add_argument("--mode", choices=MODES, help="how weights are held")
    parser.add_argument("--moe", choices=FORMS, help="how tokens come to their experts")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="float")
    parser.add_argument("--opset", type=int)
    parser.add_argument("--static", action="store_true", help="only for --batch and --sequence, which vary otherwise")
    parser.add_argument("--batch", type=int, default=2, help="of the example")
    parser.add_argument("--sequence", type=int, default=16, help="of the example")
    parser.add_argument("--no-verify", action="store_true", help="do not run the file")


def run(options: argparse.Namespace) -> ExportReport:
    import moekern.integrations.transformers as integration

    target = TARGETS.get(options.target)
    mode = options.mode or (target.mode if target else "fp8-qdq")
    shapes = None
    if not (options.static or (target is not None and target.static)):
        dims = {i: torch.export.Dim(name, min=1 + i, max=_MOST) for i, name in enumerate(("batch", "sequence"))}
        shapes = (dims,)
    if not (options.checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{options.checkpoint} has no config.json; it must be a folder of transformers'")
    with integration.install():
        model = load(options.checkpoint, torch.float16 if mode == "fp16" else torch.float32)
        vocabulary = model.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (options.batch, options.sequence), generator=torch.Generator().manual_seed(0))
        return export(
            model,
            (ids,),
            options.path,
            target=options.target,
            mode=options.mode,
            moe=options.moe,
            activations=options.activations,
            opset=options.opset,
            dynamic_shapes=shapes,
            verify=not options.no_verify,
        )
