"""bench/model: what it is fitted on, how well it predicts what it was not, and what physics forbids."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich"):
    pytest.importorskip(package)

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def module(name: str) -> Any:
    return importlib.import_module(name)


# ---- devices and what is published --------------------------------------------------------------------


def test_every_figure_has_a_source_and_none_is_sparse() -> None:
    devices = module("devices")
    for device in devices.known().values():
        for what, figure in device.figures().items():
            assert figure.source in devices.sources(), (device.name, what)
            assert figure.value > 0
        # An 8-bit unit does twice what its bf16 one does; sparse figures would be four times.
        eight, sixteen = device.peak[device.eight_bit].value, device.peak["bf16"].value
        assert 1.9 < eight / sixteen < 2.7, device.name
    assert {name for name, device in devices.known().items() if "fp8" not in device.peak} == {
        "a100", "ascend910b1", "ascend910b4", "ascend910c",
    }  # fmt: skip


def test_derived_peaks_follow_from_cores_and_clock() -> None:
    devices = module("devices").known()
    for name in ("ascend910b1", "ascend910b4"):
        device = devices[name]
        cubes = device.cores.value * device.clock.value * 2 * 16 * 16
        assert device.peak["bf16"].value == pytest.approx(16 * cubes, rel=0.01)
        assert device.peak["int8"].value == pytest.approx(32 * cubes, rel=0.01)
    whole = devices["mi300x"].peak["fp8"].value
    assert devices["mi308x"].peak["fp8"].value == pytest.approx(whole * 80 / 304, rel=1e-3)


def test_devices_are_found_by_name() -> None:
    devices = module("devices")
    assert devices.named("H800, ascend-910C,this,h800") == ["h800", "ascend910c", "this"]
    assert devices.by_title("NVIDIA H100 80GB HBM3").name == "h100"
    assert devices.by_title("AMD Instinct MI300X").name == "mi300x"
    assert devices.by_title("NVIDIA GeForce RTX 4090") is None
    with pytest.raises(ValueError, match=r"h801: no such device; known are a100, .*h800.*this"):
        devices.named("h800,h801")
    with pytest.raises(ValueError, match="no device named"):
        devices.named(" , ")


def test_published_rows_say_where_from_and_are_possible() -> None:
    devices, published = module("devices"), module("published")
    for row in published.gemms():
        device = devices.known()[row.device]
        assert row.flops / row.seconds < device.peak["fp8"].value, row
        assert devices.sources()[row.source]["how"], row.source
    last = published.nearest("h800", 4096, 7168, 16384)
    assert last.source == "deepgemm-2025-04" and last.flops / last.seconds == pytest.approx(1520e12)
    assert published.nearest("h800", 4096, 7168, 16383) is None
    assert {row.op for row in published.gemms() if row.device == "h800"} == {"dense", "contiguous", "masked"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("deepgemm-2025-02,h801,x,dense,fp8,1,64,64,64,,,,3", r"rows.csv:3: not a row .*device h801 is not known"),
        ("nobody,h800,x,dense,fp8,1,64,64,64,,,,3", "source nobody is not known"),
        ("deepgemm-2025-02,h800,x,dense,fp8,1,many,64,64,,,,3", "rows.csv:3: not a row .*many"),
        ("deepgemm-2025-02,h800,x,dense,fp8,1,64,64,64,,,,0", "rows.csv:3: not a row .*ZeroDivisionError"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    published = module("published")
    head, good, *_ = (BENCH / "data" / "gemm.csv").read_text().splitlines()
    path = tmp_path / "rows.csv"
    path.write_text(f"{head}\n{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        list(published.read(path, published._gemm))


# ---- accuracy ----------------------------------------------------------------------------------------


def held(checks: list[Any]) -> list[float]:
    return [check.error for check in checks if check.held]


def test_rows_that_were_held_out_are_predicted() -> None:
    fit = module("model.fit")
    h800 = fit.error(held(fit.checks("h800")))
    assert h800.rows == 17 and h800.mean < 0.12 and abs(h800.worst) < 0.30, h800
    for device, most in (("mi300x", 0.20), ("mi308x", 0.20), ("mi355x", 0.20)):
        error = fit.error(held(fit.checks(device)))
        assert error.rows > 40 and error.mean < most, (device, error)
    for core, rows in (("x86_64 25/17", 24), ("x86_64 25/1", 18)):
        error = fit.error(held(fit.cpu_checks(core)))
        assert error.rows == rows and error.mean < 0.15, (core, error)
    for device in fit.LINK_PRIOR:
        error = fit.error(held(fit.link_checks(device)))
        assert error.rows >= 8 and error.mean < 0.15, (device, error)


def test_ascend_reaches_what_is_published_of_it() -> None:
    known, gemm = module("devices").known(), module("model.gemm")
    product = gemm.Product((8192,), 8192, 8192)
    eight = product.flops / gemm.predict(known["ascend910c"], product).seconds
    assert 0.774 < eight / known["ascend910c"].peak["int8"].value < 0.827
    sixteen = gemm.Product((8192,), 8192, 8192, weight_bytes=2)
    rate = sixteen.flops / gemm.predict(known["ascend910b1"], sixteen, "bf16").seconds
    assert rate == pytest.approx(303e12, rel=0.04)  # torch on 24 cores, in tilelang-ascend's issue 79


def test_fused_experts_that_nothing_was_fitted_on() -> None:
    fit, predictions = module("model.fit"), module("predictions")
    for device in ("mi300x", "mi355x"):
        error = fit.error(predictions.moe_errors(device))
        assert error.rows >= 15 and error.mean < 0.20, (device, error)


def test_what_r1_serves_lies_about_between_links_in_turn_and_links_hidden() -> None:
    known, published, layers = module("devices").known(), module("published"), module("model.layers")
    for row in published.servings():
        prefill = row.phase == "prefill"
        found = layers.forward(known[row.device], row.tokens, row.context, row.ranks, prefill, layers.DEEPSEEK_R1)
        slack = 1.1 if row.device == "ascend910c" else 1.0  # whose constants are assumed
        assert row.tokens / found.seconds < slack * row.rate and row.rate < row.tokens / found.hidden, row


def test_constants_do_not_depend_on_rows_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    fit, published = module("model.fit"), module("published")
    kept = dataclasses.asdict(fit.fit(fit.fitted_rows("h800"), fit.PRIOR["h800"]))
    stored = json.loads((BENCH / "model" / "constants.json").read_text())["families"]["hopper"]
    assert kept == pytest.approx(stored, rel=0.02)  # `run.py fit` wrote what the rows say
    rows = [
        dataclasses.replace(row, seconds=3 * row.seconds) if row.shape in fit.HELD["h800"] else row
        for row in published.gemms()
    ]
    monkeypatch.setattr(published, "gemms", lambda: rows)
    assert dataclasses.asdict(fit.fit(fit.fitted_rows("h800"), fit.PRIOR["h800"])) == kept
    assert fit.error(held(fit.checks("h800"))).mean > 0.5


# ---- physics -----------------------------------------------------------------------------------------


def devices_with_a_model() -> list[str]:
    return list(json.loads((BENCH / "data" / "devices.json").read_text()))


@pytest.mark.parametrize("name", devices_with_a_model())
def test_no_product_beats_the_roofline_and_more_work_takes_longer(name: str) -> None:
    device, gemm = module("devices").known()[name], module("model.gemm")
    for n, k in ((576, 7168), (4096, 7168), (7168, 2048)):
        before = 0.0
        for m in (1, 16, 128, 1024, 8192):
            product = gemm.Product((m,), n, k)
            found = gemm.predict(device, product)
            least = max(product.flops / device.peak[device.eight_bit].value, product.bytes / device.bandwidth.value)
            assert found.seconds > least
            assert found.seconds > before * 0.9, (m, n, k)  # another tile may serve a few more rows better
            assert found.binds in ("compute", "memory", "operands", "launch")
            before = found.seconds


def test_tiles_cover_the_product_once() -> None:
    tiles = module("model.tiles")
    tile = tiles.Tile(128, 112)
    assert tiles.count(tile, (4096,), 2112) == 32 * 19
    assert tiles.count(tile, (1, 129, 128), 112) == 1 + 2 + 1
    assert tiles.count(tiles.Tile(64, 64, 128, split=4), (64,), 128) == 2 * 4
    # DeepGEMM's README of its rule: 112 columns put 128 of 132 SMs to work where 128 columns leave 20 idle.
    narrow = [tiles.Tile(128, c) for c in range(16, 129, 8)]
    chosen = tiles.fewest_waves(narrow, (256,), 7168, 132)
    assert (chosen.columns, tiles.count(chosen, (256,), 7168)) == (112, 128)


def test_faster_parts_make_faster_products() -> None:
    known, gemm, layers = module("devices").known(), module("model.gemm"), module("model.layers")
    decode, prefill = gemm.Product((16,), 4096, 7168), gemm.Product((4096,), 4096, 7168)
    assert gemm.predict(known["h200"], decode).seconds < gemm.predict(known["h100"], decode).seconds
    assert gemm.predict(known["h20"], prefill).seconds > 4 * gemm.predict(known["h100"], prefill).seconds
    slow, fast = (layers.moe_layer(known[name], 128, 8, layers.DEEPSEEK_R1.experts) for name in ("h800", "h100"))
    assert {s.name: s.seconds for s in slow}["dispatch"] > {s.name: s.seconds for s in fast}["dispatch"]


def test_a_cpu_streams_few_rows_and_packs_many() -> None:
    devices, cpu, gemm = module("devices"), module("model.cpu"), module("model.gemm")
    here = devices.measured("a CPU", "x86_64", 200e9, 30e9, 1e9, 2)
    one, many = (cpu.predict(here, gemm.Product((m,), 4096, 7168)) for m in (1, 512))
    assert (one.binds, many.binds) == ("memory", "compute")
    assert one.memory == pytest.approx(one.seconds, rel=0.1)
    assert 0.8 < 2 * 512 * 4096 * 7168 / many.seconds / 200e9 < 0.95


def test_a_cpu_is_predicted_from_the_limits_beside_each_time() -> None:
    comparison, devices, compete = module("comparison"), module("devices"), module("timing.compete")
    here = devices.measured("a CPU", "x86_64", 200e9, 30e9, 1e9, 2)

    def predicted(share: float) -> float:
        """By half a machine, say, because a neighbour had the other half while this was timed."""
        row = compete.Row(
            op="fp8_gemm_nt", linear="one", shape={"m": 16, "n": 4096, "k": 7168}, activations="fp8",
            kernel="cpu.avx2", selected=True, flops=1, bytes=1, moves="read", samples=compete.Samples([1.0]),
            limits={"multiply_add": share * 200e9, "read": share * 30e9}, binds="read", fraction=1.0,
        )  # fmt: skip
        [entry] = comparison.entries(["this"], [comparison.Linear("one", 4096, 7168)], [16], here, [row])
        return float(entry.predicted.seconds)

    assert predicted(0.5) == pytest.approx(2 * predicted(1.0), rel=0.01)


# ---- expert parallelism ------------------------------------------------------------------------------


def test_bytes_of_an_exchange() -> None:
    known, exchange = module("devices").known(), module("model.exchange")
    assert exchange.payload("dispatch", 7168, "fp8") == 7168 + 4 * 56
    assert exchange.payload("dispatch", 7168, "int8") == 7168 + 4
    assert exchange.payload("combine", 7168, "fp8") == 2 * 7168
    within = exchange.predict(known["h800"], "dispatch", 128, 8, 7168, 8)
    assert within.bytes == {"nvlink": pytest.approx(128 * 8 * 7 / 8 * 7392)}  # an eighth stays
    across = exchange.predict(known["h800"], "dispatch", 128, 32, 7168, 8)
    assert across.bytes["rdma"] == pytest.approx(128 * 8 * 24 / 32 * 7392)
    assert sum(across.bytes.values()) == pytest.approx(128 * 8 * 31 / 32 * 7392)
    assert list(exchange.predict(known["ascend910c"], "dispatch", 128, 256, 7168, 8).bytes) == ["hccs"]
    many = exchange.predict(known["h800"], "dispatch", 4096, 8, 7168, 8)
    assert many.bytes["nvlink"] < 4096 * 7 * 7392  # a token goes once to a rank, however many of its experts are there
    with pytest.raises(ValueError, match="no figure of its links"):
        exchange.predict(known["ascend910b1"], "dispatch", 128, 8, 7168, 8)
    with pytest.raises(ValueError, match="--ep is at most 8"):
        exchange.predict(known["mi300x"], "dispatch", 128, 16, 7168, 8)


def test_rows_are_spread_whole() -> None:
    layers = module("model.layers")
    for rows, hit in itertools.product((1, 7, 100), (1, 3, 256)):
        spread = layers.spread(rows, hit)
        assert sum(spread) == rows and len(spread) == min(rows, hit) and max(spread) - min(spread) <= 1
    rows = layers.rows_of_experts(1, 1, layers.DEEPSEEK_R1.experts)
    assert rows == (1,) * 8  # one token meets its eight experts
    assert len(layers.rows_of_experts(4096, 32, layers.DEEPSEEK_R1.experts)) == 8


def test_steps_of_a_layer_add_up() -> None:
    known, layers = module("devices").known(), module("model.layers")
    alone = layers.moe_layer(known["mi300x"], 64, 1, layers.DEEPSEEK_R1.experts)
    shared = layers.moe_layer(known["mi300x"], 64, 8, layers.DEEPSEEK_R1.experts)
    names = [[step.name for step in steps] for steps in (alone, shared)]
    assert {"permute", "unpermute"} <= set(names[0]) and {"dispatch", "combine"} <= set(names[1])
    assert all(math.isfinite(step.seconds) and step.seconds > 0 for step in (*alone, *shared))
    run = layers.forward(known["mi300x"], 64, 4096, 8, False, layers.DEEPSEEK_R1)
    links = 58 * sum(step.seconds for step in run.moe if step.kind == "link")
    assert run.seconds - run.hidden == pytest.approx(links)
    assert layers.weights_of(layers.DEEPSEEK_R1, 1) == pytest.approx(671e9, rel=0.02)  # the published count of weights
