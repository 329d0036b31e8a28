"""Writes a random checkpoint: `python bench/make_checkpoint.py FOLDER --config deepseek-v3 --layers 1`.

DeepSeek's names, one safetensors file for each layer, written as it is made: memory stays small, whatever the
size. Weights are Gaussian values quantised to e4m3fn, with 128x128 scales in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moekern.checkpoint import INDEX
from moekern.scaled import BLOCK
from moekern.testing.moe_models import LAYERS, WEIGHT_SIGMA, Codes, MoeLayer

FORMATS = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}
Item = tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]  # name, shape, dtype, values


def tensors(layer: MoeLayer, index: int, codes: Codes) -> Iterator[Item]:
    """What the file of a layer holds. Wide elements first: those that follow FP8 would not be aligned."""
    block = f"model.layers.{index}.mlp"
    matrices: list[tuple[str, int, int]] = []
    for prefix, size in [
        *((f"{block}.experts.{e}", layer.intermediate) for e in range(layer.experts)),
        *([(f"{block}.shared_experts", layer.shared * layer.intermediate)] if layer.shared else []),
    ]:
        matrices += [(f"{prefix}.{name}_proj", size, layer.hidden) for name in ("gate", "up")]
        matrices.append((f"{prefix}.down_proj", layer.hidden, size))
    if layer.correction_bias:
        bias = f"{block}.gate.e_score_correction_bias"
        yield bias, (layer.experts,), torch.float32, lambda: torch.randn(layer.experts) * 0.1
    for name, rows, columns in matrices:
        grid = (-(-rows // BLOCK), -(-columns // BLOCK))
        yield f"{name}.weight_scale_inv", grid, torch.float32, lambda grid=grid: codes.scales(*grid)
    gate = (layer.experts, layer.hidden)
    yield f"{block}.gate.weight", gate, torch.bfloat16, lambda: (torch.randn(gate) * WEIGHT_SIGMA).bfloat16()
    for name, *shape in matrices:
        yield (
            f"{name}.weight", tuple(shape), torch.float8_e4m3fn,
            lambda shape=shape: codes.fill(torch.empty(shape, dtype=torch.float8_e4m3fn)),
        )  # fmt: skip


def write(path: Path, items: list[Item]) -> int:
    """One safetensors file: the length of its header, the header, and the tensors one after another."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape, dtype, _ in items:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": FORMATS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begin at a cache line
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, values in items:
            file.write(values().contiguous().view(torch.uint8).numpy().data)
    return end


def make(folder: Path, layer: MoeLayer, layers: int, first: int = 0) -> int:
    """Layers `first` and on, all of one size. Returns the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = Codes(torch.Generator().manual_seed(0))
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(layers):
        items = list(tensors(layer, first + i, codes))
        file = f"model-{i + 1:05}-of-{layers:05}.safetensors"
        total += write(folder / file, items)
        weight_map |= dict.fromkeys((name for name, *_ in items), file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return total


def main(
    folder: Annotated[Path, typer.Argument(help="where to; made if it is not there")],
    config: Annotated[str, typer.Option(help=", ".join(LAYERS))] = "deepseek-v3",
    layers: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    first: Annotated[int, typer.Option(min=0, help="number of the first one")] = 0,
    experts: Annotated[int | None, typer.Option(min=1, help="of a layer, instead of the model's")] = None,
    divisor: Annotated[int, typer.Option(min=1, help="of the model's sizes")] = 1,
) -> None:
    """Writes the experts and routers of some layers."""
    if config not in LAYERS or LAYERS[config].interleaved:
        allowed = ", ".join(name for name, layer in LAYERS.items() if not layer.interleaved)
        raise typer.BadParameter(f"{config}: not among {allowed}", param_hint="--config")
    torch.manual_seed(0)
    layer = LAYERS[config]
    size = make(folder, layer.scaled_down(divisor, experts or layer.experts), layers, first)
    print(f"{folder}: {layers} layers, {size / 1e9:.1f} GB")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
