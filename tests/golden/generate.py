"""Makes cute_layouts.json anew from the CuTe headers of NVIDIA's wheels.

    python tests/golden/generate.py            writes the file
    python tests/golden/generate.py --check    says whether it is what the headers give

Downloads about 15 MB and compiles for a minute; needs a C++17 compiler and no GPU. Nothing of the headers is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CUTLASS = "nvidia-cutlass==4.2.0.0"
CUDA = ("nvidia-cuda-runtime>=13,<14", "nvidia-cuda-crt>=13,<14", "nvidia-cuda-cccl>=13,<14")
SOURCE = Path(__file__).with_name("cute_layouts.cpp")
DATA = Path(__file__).with_name("cute_layouts.json")


def generate() -> str:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, CUTLASS, *CUDA], check=True
        )
        cutlass = Path(folder, "cutlass_library", "source", "include")
        cuda = Path(folder, "nvidia", "cu13", "include")
        program = Path(folder, "cute_layouts")
        compiler = os.environ.get("CXX", "g++")
        defines = [
            "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",
            "-DCUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED=1",
            "-D__CUDACC_VER_MAJOR__=13",
        ]
        includes = [f"-isystem{path}" for path in (cutlass, cuda, cuda / "cccl")]
        subprocess.run([compiler, "-std=c++17", *defines, *includes, "-o", program, SOURCE], check=True)
        text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    json.loads(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = generate()
    if check:
        same = DATA.read_text() == text
        print(f"{DATA.name} is {'' if same else 'not '}what the headers of {CUTLASS} give")
        return 0 if same else 1
    DATA.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
