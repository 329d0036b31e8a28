"""The largest resident memory of a process that loads an FP8 checkpoint and runs one token, in bytes.

python bench/peak_memory.py FOLDER moekern         # or transformers, which makes bf16 of it without a GPU
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


def main(folder: str, route: str) -> None:
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
    status = Path("/proc/self/status").read_text()
    print(1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
