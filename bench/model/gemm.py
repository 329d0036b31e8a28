"""Dense and grouped products in 8 bits with block scales, result in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from devices import Device

from model import constants
from model.constants import Constants
from model.tiles import BEST, KERNELS, Kernels, Tile, ceil_div, count, fewest_waves

BLOCK = 128


@dataclass(frozen=True)
class Product:
    """D[g] = A[g] B[g]^T. rows: of each group that has any."""

    rows: tuple[int, ...]
    n: int
    k: int
    contiguous: bool = False  # groups one behind another, aligned, as in a prefill
    weight_bytes: float = 1.0  # and the activations'; 2 for bf16
    out_bytes: float = 2.0

    @property
    def flops(self) -> float:
        return 2.0 * sum(self.rows) * self.n * self.k

    @property
    def bytes(self) -> float:
        """Every operand once: activations and result by their rows, the weights of groups that have rows."""
        rows = sum(self.rows)
        return self.weight_bytes * (rows * self.k + len(self.rows) * self.n * self.k) + self.out_bytes * rows * self.n


@dataclass(frozen=True)
class Prediction:
    """Seconds, and the terms that they come from."""

    seconds: float
    compute: float
    memory: float
    operands: float
    launch: float
    tile: Tile | None = None

    @property
    def binds(self) -> str:
        terms = {"compute": self.compute, "memory": self.memory, "operands": self.operands, "launch": self.launch}
        return max(terms, key=lambda name: terms[name])


def overlapped(exponent: float, *terms: float) -> float:
    """Between their sum (1) and the longest of them (infinity)."""
    longest = max(terms)
    return longest * sum((term / longest) ** exponent for term in terms) ** (1 / exponent) if longest > 0 else 0.0


def on_tile(
    device: Device, constant: Constants, kernels: Kernels, product: Product, tile: Tile, dtype: str
) -> Prediction:
    cores = int(device.cores.value)
    tiles = count(tile, product.rows, product.n)
    area = tile.rows * tile.columns
    matrix = 2 * area * BLOCK * cores / (device.peak[dtype].value * constant.rate)
    if tile.columns % 32 and max(product.rows, default=0) > BLOCK:
        matrix *= constant.ragged
    steps = product.k / tile.split / BLOCK
    step = max(matrix, constant.step) if kernels.hides_step else matrix + constant.step
    one = steps * step + constant.tile + constant.store * area / BLOCK**2
    waves = ceil_div(tiles, cores) if kernels.persistent else 1 + constant.queue * max(0.0, tiles / cores - 1)
    # Partial sums in f32 are added into memory and then turned into the result.
    partial = 4 * sum(product.rows) * product.n * tile.split if tile.split > 1 else 0
    moved = (product.bytes + partial) / (device.bandwidth.value * constant.memory)
    fed = (
        tiles * (tile.rows + tile.columns) * product.k / tile.split * product.weight_bytes / (constant.operands * cores)
    )
    launch = constant.launch + (constant.split if tile.split > 1 else 0)
    compute = waves * one if tiles else 0.0
    seconds = launch + overlapped(constant.overlap, compute, moved, fed)
    return Prediction(seconds, compute, moved, fed, launch, tile)


def predict(
    device: Device,
    product: Product,
    dtype: str | None = None,
    kernel: str | None = None,
    tile: Tile | None = None,
    constant: Constants | None = None,
) -> Prediction:
    """Time of a product by a library's kernel, by default the family's best, on the tile that it takes."""
    constant = constant or constants.of_family(device.family)
    kernels = KERNELS[kernel or BEST[device.family]]
    dtype = dtype or device.eight_bit

    def seconds(tile: Tile) -> Prediction:
        return on_tile(device, constant, kernels, product, tile, dtype)

    if tile is not None:
        return seconds(tile)
    most = max(product.rows, default=0)
    candidates = kernels.candidates(most, product.contiguous)
    if kernels.by_waves:
        return seconds(fewest_waves(candidates, product.rows, product.n, int(device.cores.value)))
    return _fastest(candidates, seconds)


def _fastest(candidates: list[Tile], seconds: Callable[[Tile], Prediction]) -> Prediction:
    return min(map(seconds, candidates), key=lambda prediction: prediction.seconds)
