"""The largest resident memory of a process that loads a model and runs one token, in bytes.

python bench/subjects/peak_memory.py FOLDER moekern         # or transformers, which makes bf16 of it without a GPU
python bench/subjects/peak_memory.py FILE onnxruntime K     # a file of ONNX whose input has K columns
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def of(folder: Path, route: str) -> str:
    """In words, from a process of its own: transformers can't turn every FP8 checkpoint into bf16."""
    done = subprocess.run([sys.executable, __file__, str(folder), route], capture_output=True, text=True)
    if done.returncode != 0:
        return f"{route} none, as it cannot load the checkpoint"
    return f"{route} {int(done.stdout.split()[-1]) / 1e9:.2f} GB"


def of_file(path: Path, *sizes: int) -> int:
    """Of a process with onnxruntime and nothing else. sizes: columns of x; slots and experts of a routing, if any."""
    command = [sys.executable, __file__, str(path), "onnxruntime", *map(str, sizes)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def own() -> int:
    """Bytes of this process that are of no file."""
    return _status("RssAnon")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main(path: str, route: str, *sizes: str) -> None:
    if route == "onnxruntime":
        _run_onnx(path, *map(int, sizes))
    else:
        _run_transformers(path, route)
    print(_status("VmHWM"))


def _run_onnx(path: str, columns: int, slots: int = 0, experts: int = 0) -> None:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    feeds = [draw.standard_normal((1, columns), dtype=np.float32)]
    if slots:
        feeds += [draw.permutation(experts)[None, :slots], np.full((1, slots), 1 / slots, np.float32)]
    for _ in range(2):
        session.run(None, {slot.name: x for slot, x in zip(session.get_inputs(), feeds, strict=True)})


def _run_transformers(folder: str, route: str) -> None:
    import torch
    from transformers import AutoModel

    options = {}
    if route == "moekern":
        import moekern.integrations.transformers as integration

        integration.install()
        options["experts_implementation"] = "moekern"
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64))
    # not getrusage: its maximum begins with that of the process which started this one


if __name__ == "__main__":
    main(*sys.argv[1:])
