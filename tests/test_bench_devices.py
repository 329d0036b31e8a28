"""bench/run.py beside other devices: comparisons, whole models, the page, files, and what it refuses."""

from __future__ import annotations

import csv
import html.parser
import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "matplotlib", "jinja2", "psutil", "threadpoolctl", "cpuinfo"):
    pytest.importorskip(package)

BENCH = Path(__file__).parent.parent / "bench"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def module(name: str) -> Any:
    return importlib.import_module(name)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "run.py"), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def invoke(*arguments: str) -> Any:
    """The same in this process, for what ends before anything is timed."""
    import torch
    from typer.testing import CliRunner

    threads = torch.get_num_threads()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        result = CliRunner().invoke(module("run").app, list(arguments))
    torch.set_num_threads(threads)
    return result


def said(text: str) -> str:
    """Without the frame that errors are printed in."""
    return re.sub(r"[│\s]+", " ", text)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three devices and this one on a tiny suite, with every file that a run can write."""
    folder = tmp_path_factory.mktemp("devices")
    linears = [{"name": "expert down", "n": 7168, "k": 2048}, {"name": "tiny", "n": 256, "k": 512}]
    suite = {"model": "tiny", "source": "none", "m": [1, 64], "linears": linears}
    (folder / "suite.json").write_text(json.dumps(suite))
    output = run(
        "--compare-devices", "h800,mi300x,ascend910c,this", "--suite", folder / "suite.json", "--m", "1,64,4096",
        "--threads", 1, "--html", folder / "page.html", "--json", folder / "all.json", "--csv", folder / "all.csv",
        "--plot", folder / "all.png",
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    return {"folder": folder, "stdout": output.stdout, **json.loads((folder / "all.json").read_text())}


def test_every_shape_has_every_device_with_its_evidence(compared: dict[str, Any]) -> None:
    entries = compared["entries"]
    assert Counter((e["linear"], e["m"]) for e in entries) == {
        (layer, m): 4 for layer in ("expert down", "tiny") for m in (1, 64, 4096)
    }
    h800 = next(e for e in entries if (e["device"], e["linear"], e["m"]) == ("h800", "expert down", 4096))
    assert h800["seconds"]["published"] == pytest.approx(2 * 4096 * 7168 * 2048 / 1168e12)
    assert h800["source"] == "deepgemm-2025-03" or h800["source"] == "deepgemm-2025-04"
    assert h800["of_peak"]["published"] == pytest.approx(1168 / 1978.9)
    here = [e for e in entries if e["device"] == "this"]
    assert [("measured" in e["seconds"]) for e in here] == [True, True, False] * 2  # 4096 rows would take a minute
    assert here[0]["bandwidth"] == statistics.median(row["limits"]["read"] for row in compared["results"])
    assert here[0]["peak"] == statistics.median(row["limits"]["multiply_add"] for row in compared["results"])
    assert all(e["seconds"]["predicted"] > 0 for e in entries)


def test_types_that_are_compared_are_named(compared: dict[str, Any]) -> None:
    types = {e["device"]: e["dtype"] for e in compared["entries"]}
    assert types == {"h800": "fp8", "mi300x": "fp8", "ascend910c": "int8", "this": "fp8"}
    assert "ascend910c: no FP8, so INT8 products" in " ".join(compared["stdout"].split())
    ascend = next(e for e in compared["entries"] if e["device"] == "ascend910c" and e["m"] == 4096)
    assert ascend["of_peak"]["predicted"] == pytest.approx(ascend["flops"] / ascend["seconds"]["predicted"] / 1504e12)


def test_tables_as_files(compared: dict[str, Any]) -> None:
    with (compared["folder"] / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["predicted"] == len(compared["entries"]) and kinds["measured"] == len(compared["results"]) == 4
    assert kinds["published"] == sum("published" in e["seconds"] for e in compared["entries"]) > 2
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert {row["noisy"] for row in rows if row["kind"] == "measured"} <= {"True", "False"}
    assert (compared["folder"] / "all.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- the page ----------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What is in a page: ids, elements, and text by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.count: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attrs}
        self.count[tag] += 1
        self.ids |= {named["id"]} if "id" in named else set()
        self.classes.update(named.get("class", "").split())
        self.links += [named[key] for key in ("href", "src", "xlink:href") if key in named]


PLOTS = {"roofline", "throughput", "share", "limits", "accuracy"}


def check_page(page: Page) -> None:
    assert page.ids >= PLOTS | {"machine", "ratios", "measured", "errors", "devices", "sources"}
    assert page.count["svg"] == len(PLOTS) and page.count["script"] == 0
    for drawn in ("roof-h800", "roof-this", "points-measured", "points-predicted", "points-published", "line-mi300x"):
        assert drawn in page.ids, drawn
    assert all(page.classes[kind] > 5 for kind in ("measured", "published", "predicted"))


def test_the_page_stands_alone_and_has_every_plot(compared: dict[str, Any]) -> None:
    text = (compared["folder"] / "page.html").read_text()
    page = Page(text)
    check_page(page)
    assert all(link.startswith("#") for link in page.links)  # nothing is fetched
    inks = dict(re.findall(r"--(measured|published|predicted): (#\w+);", text))
    assert len(set(inks.values())) == 3
    assert compared["machine"]["torch"] in text and compared["machine"]["moekern"] in text
    assert "a9967bc" in text or "55ab91f" in text  # where DeepGEMM's rows are from
    assert len(text) < 1_000_000


def test_the_page_in_a_browser(compared: dict[str, Any], tmp_path: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    from PIL import Image

    page = (compared["folder"] / "page.html").as_uri()
    alone = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [*alone, profile, "--window-size=1200,3200", f"--screenshot={shot}", page], capture_output=True, timeout=120
    )
    assert done.returncode == 0 and shot.is_file(), done.stderr
    dom = subprocess.run([*alone, profile, "--dump-dom", page], capture_output=True, text=True, timeout=120).stdout
    check_page(Page(dom))
    image = Image.open(shot).convert("RGB")
    assert image.size == (1200, 3200)
    seen = {colour for _, colour in image.getcolors(1 << 24)}
    inks = module("pages.figures").INK
    for kind, ink in inks.items():
        assert tuple(bytes.fromhex(ink[1:])) in seen, kind  # a mark of that ink was drawn
    drawn = sum(count for count, colour in image.getcolors(1 << 24) if colour != (255, 255, 255))
    assert drawn > 0.02 * 1200 * 3200


def test_text_of_a_run_is_no_markup(compared: dict[str, Any]) -> None:
    pages = module("pages")
    machine = {**compared["machine"], "torch": "<script>alert(1)</script>"}
    text = pages.render({"machine": machine, "notes": ["<b>loud</b>"]}, [], [], [])
    assert "<script>" not in text and "<b>loud" not in text and "&lt;b&gt;loud" in text


def test_a_run_without_rows_has_no_page(tmp_path: Path) -> None:
    outputs = module("outputs")
    targets = outputs.Targets(tmp_path / "page.html", None, None, None)
    with pytest.raises(outputs.Nothing, match="no rows to show"):
        targets.write(None, {"machine": {}, "rows": []})


# ---- whole models ------------------------------------------------------------------------------------


def test_a_whole_model_on_devices(tmp_path: Path) -> None:
    output = run(
        "--what", "deepseek-r1", "--tokens", 64, "--ep", 8, "--compare-devices", "h800,mi300x,ascend910b1",
        "--json", tmp_path / "r1.json", "--html", tmp_path / "r1.html",
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    runs = json.loads((tmp_path / "r1.json").read_text())["model"]
    assert [(r["device"], r["phase"]) for r in runs] == [
        (device, phase) for phase in ("decode", "prefill") for device in ("h800", "mi300x", "ascend910b1")
    ]
    for one in runs:
        if one["device"] == "ascend910b1":
            assert "no figure of its links" in one["reason"] and "seconds" not in one
            continue
        layer = sum(step["seconds"] for step in one["moe_layer"])
        assert 58 * layer < one["seconds"] and one["seconds_with_links_hidden"] < one["seconds"]
        assert one["tokens_per_second"] == sorted(one["tokens_per_second"])
    text = " ".join(output.stdout.split())
    assert "dispatch" in text and "weights exceed its memory" in text and "predicted" in text
    assert {"steps", "model", "accuracy"} <= Page((tmp_path / "r1.html").read_text()).ids


# ---- expert parallelism ------------------------------------------------------------------------------


def test_dispatch_and_combine_among_two_processes(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    wanted = ["ep", "--tokens", "1,9", "--hidden", "256", "--experts", "8", "--top-k", "3"]
    output = subprocess.run(
        [*command, str(BENCH / "run.py"), *wanted, "--json", str(tmp_path / "ep.json")],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    found = json.loads((tmp_path / "ep.json").read_text())
    assert found["ranks"] == 2
    assert [(row["tokens"], row["phase"]) for row in found["results"]] == [
        (tokens, phase) for tokens in (1, 9) for phase in ("dispatch", "combine")
    ]
    for row in found["results"]:
        size = 2 * 256 if row["phase"] == "combine" else 256 + 4 * 2
        assert row["bytes"] % size == 0 and row["bytes"] <= row["tokens"] * size  # once to the other rank at most
        assert set(map(str.lower, (name.split(",")[0] for name in row["predicted"]))) >= {"nvlink", "rdma", "hccs"}


def test_an_exchange_takes_two_processes() -> None:
    output = invoke("ep")
    assert output.exit_code == 2 and "torchrun --nproc-per-node 2 bench/run.py ep" in said(output.output)


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare-devices", "h800,h801"], "h801: no such device; known are a100"),
        (["--what", "gpt-7"], "not among deepseek-r1"),
        (["--what", "deepseek-r1", "--ep", "0"], "--ep"),
        (["--compare-devices", "h800", "--html", "no/such/folder/page.html"], "there is no folder"),
        (["--quick", "accuracy"], "options come behind the command"),
    ],
)
def test_what_is_refused_is_named(arguments: list[str], message: str) -> None:
    output = invoke(*arguments)
    assert output.exit_code == 2 and message in said(output.output), output.output


def test_a_suite_with_a_bad_row(tmp_path: Path) -> None:
    suite = {"model": "x", "source": "none", "m": [1], "linears": [{"name": "a", "n": 128}]}
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    output = invoke("--compare-devices", "h800", "--suite", str(tmp_path / "suite.json"))
    assert output.exit_code == 2 and "not a suite (KeyError: 'k')" in said(output.output)


def test_a_noisy_row_is_flagged() -> None:
    measure, report = module("timing.measure"), module("report")
    quiet, noisy = measure.Samples([1.0, 1.01, 0.99]), measure.Samples([1.0, 1.5, 0.6, 1.0, 1.4])
    assert not quiet.noisy and noisy.noisy and noisy.to_json()["noisy"]
    assert report.spread(noisy).plain == "noisy ±40.0%" and report.spread(quiet).plain == "±1.0%"


def test_an_absent_peer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = module("peers")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    chosen, absent = peers.choose("onnxruntime", module("peers.linear").PEERS)
    assert not chosen and set(absent.values()) == {"onnxruntime is not installed"}
