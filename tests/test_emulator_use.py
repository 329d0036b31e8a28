"""The emulator as its users see it: the documentation's example, the command, numbers as arguments, its speed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import emulator_ptx as ptx
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
built = pytest.mark.skipif("not __import__('emulator_built').here()", reason="built without the emulator")


@built
def test_the_documented_example(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "emulator.md").read_text(), re.DOTALL)
    exec(compile(code, "docs/emulator.md", "exec"), {})
    told = capsys.readouterr().out
    assert "out of bounds: read of 4 bytes" in told and "0 bytes behind the end of 256 bytes" in told
    assert "in kernel scale, CTA (0, 0, 0), warp 2, lane 0, PTX line" in told and "ld.global.f32 %v, [%x]" in told


def test_importing_it_opens_nothing():
    code = "import moekern.backends.cuda.emulator.driver as d; assert d.library.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_a_missing_library_is_a_clear_error(monkeypatch, tmp_path):
    from moekern.backends.cuda.emulator import driver

    monkeypatch.setenv("MOEKERN_CUDA_DRIVER", str(tmp_path / "nothing.so"))
    with pytest.raises(RuntimeError, match=r"there is no .*nothing\.so: this build of moekern has no emulator"):
        driver.library.__wrapped__()


@built
def test_the_command(tmp_path, capsys):
    from moekern.__main__ import main

    def command(*arguments: str) -> tuple[int, str]:
        code = main(["emulate", *arguments])
        return code, capsys.readouterr().out

    file = tmp_path / "gemm.ptx"
    file.write_text(ptx.gemm())
    code, told = command(str(file))
    assert code == 0 and told.startswith("gemm: ") and "bytes of static shared" in told and ".b8      128" in told
    run = [str(file), "--kernel", "gemm", "--block", "160", "--schedule", "random", "--save", str(tmp_path / "out")]
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.full((64, 256), 0x38, np.uint8))  # ones
        run += ["--argument", f"map:{tmp_path / name}.npy,box=64x128,swizzle=128"]
    code, told = command(*run, "--argument", "float32[64,64]", "--argument", "2")
    assert code == 0 and "gemm: no fault." in told and "8 wgmma, 4 bulk copies of 32768 bytes" in told
    assert (np.load(tmp_path / "out" / "argument2.npy") == 256).all()
    code, told = command(*run, "--argument", "float32[64,60]", "--argument", "2")
    assert code == 1 and "out of bounds: write of 8 bytes" in told
    code, told = command(str(file), "--kernel", "other")
    assert code == 1 and "has no kernel other; it has gemm" in told


@built
def test_numbers_as_arguments():
    body = """
.reg .b64 %out, %l; .reg .b32 %i; .reg .f32 %f; .reg .f64 %d; .reg .b16 %s;
ld.param.u64 %out, [out]; ld.param.u32 %i, [i]; ld.param.f32 %f, [f]; ld.param.b64 %l, [l]; ld.param.u16 %s, [s];
st.global.u32 [%out], %i; st.global.f32 [%out+4], %f; st.global.b64 [%out+8], %l; st.global.u16 [%out+16], %s; ret;"""
    parameters = ".param .u64 out, .param .u32 i, .param .f32 f, .param .b64 l, .param .u16 s"
    module = ptx.module(ptx.kernel(body, parameters))
    out = np.zeros(24, "u1")
    module.launch("k", 1, 1, [out, -2, 1, 2.5, 65535])
    assert out[:4].view("i4")[0] == -2 and out[4:8].view("f4")[0] == 1
    assert out[8:16].view("f8")[0] == 2.5 and out[16:18].view("u2")[0] == 65535
    for wrong, words in ((1 << 33, "does not fit"), (b"12345", "5 were given")):
        with pytest.raises(ValueError, match=words):
            module.launch("k", 1, 1, [out, wrong, 1, 2.5, 0])
    with pytest.raises(ValueError, match="an integer was expected"):
        module.launch("k", 1, 1, [out, 1, 1, 2.5, 0.5])


@built
def test_tensors_of_torch():
    import torch

    from moekern.backends.cuda.emulator import TensorMap

    a = torch.ones(64, 256).to(torch.float8_e4m3fn)
    out = torch.zeros(64, 64)
    maps = [TensorMap(a, (64, 128), swizzle=128) for _ in range(2)]
    ptx.module(ptx.gemm()).launch("gemm", 1, 160, [*maps, out, 2])
    assert (out == 256).all()


@built
def test_a_cta_takes_less_than_a_tenth_of_a_second():
    """500 instructions and K = 1152 with nine steps of wgmma: the suite launches some 1500 kernels of this size."""
    best = min(ptx.run_gemm(ptx.gemm(), races=False)[2].seconds for _ in range(5))
    assert best < 0.1
