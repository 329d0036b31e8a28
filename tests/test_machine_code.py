"""Reading machine code, what is asked of it, and all kernels compiled for all targets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import compiled
import gates
import machine_code
import pytest
from gates import Expectation, problems
from machine_code import MachineCode, from_amdgcn, from_sass, parse_sass

# An outer loop, a K loop that waits for a barrier in a loop of its own, and a call.
SASS = """
	.target	sm_90a
gemm_kernel:
.text.gemm_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL.64 [R1+0x8], R2 ;
.L_x_9:
        /*0020*/                   MOV R24, RZ ;
        /*0030*/               @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5 ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   WARPGROUP.ARRIVE ;
        /*0070*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT ;
        /*0080*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*00a0*/              @!PT LDS RZ, [RZ] ;
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00c0*/                   FFMA R23, R46, R148.reuse, R23 ;
        /*00d0*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_3:
        /*00e0*/                   LDL.64 R2, [R1+0x8] ;
        /*00f0*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT ;
        /*0100*/                   BRA `(.L_x_9) ;
.L_x_14:
        /*0110*/                   BRA `(.L_x_14);
        /*0120*/                   NOP;
"""
RESOURCES = " Function gemm_kernel:\n  REG:168 STACK:64 SHARED:1040 LOCAL:0 CONSTANT[0]:664 TEXTURE:0"
AMDGCN = """
	.text
gemm_kernel:
.Lfunc_begin0:
	s_load_dwordx2 s[8:9], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_4
.LBB0_2:                                ; =>This Loop Header: Depth=1
	v_mov_b32_e32 v1, 0
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
	buffer_load_dwordx4 v[2:5], v1, s[8:11], 0 offen
	s_waitcnt vmcnt(0)
	ds_write_b128 v6, v[2:5]
	s_barrier
	v_mfma_f32_32x32x16_fp8_fp8 v[8:23], v[2:3], v[4:5], 0
	v_mfma_f32_32x32x16_fp8_fp8 v[8:23], v[2:3], v[4:5], v[8:23]
	v_cvt_f32_u32_e32 v7, v7
	v_pk_fma_f32 v[30:31], v[8:9], v[40:41], v[30:31]
	v_readlane_b32 s30, v50, 3
	scratch_load_dword v60, off, s33 offset:4
	s_cbranch_scc0 .LBB0_3
; %bb.4:
	s_branch .LBB0_2
.LBB0_4:
	s_endpgm
    .group_segment_fixed_size: 1024
    .private_segment_fixed_size: 708
    .sgpr_count:     106
    .sgpr_spill_count: 70
    .vgpr_count:     256
    .vgpr_spill_count: 3
"""


def nvidia() -> MachineCode:
    return from_sass("sm_90", SASS, RESOURCES, 8, 98304)


def test_sass() -> None:
    code = nvidia()
    assert (code.registers, code.spills, code.local_bytes) == (168, 1, 64)
    assert code.shared_bytes == 98304 + 16  # what sm_90 reserves is no part of the limit
    assert code.matrix == ["QGMMA.64x128x32.F32.E4M3.E4M3"]
    assert code.mnemonics["QGMMA.64x128x32.F32.E4M3.E4M3"] == 3


def test_the_main_loop_has_the_loops_that_wait() -> None:
    code = nvidia()
    assert code.loop == {
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1, "BRA": 1, "WARPGROUP.ARRIVE": 1, "QGMMA.64x128x32.F32.E4M3.E4M3": 2,
        "CALL.REL.NOINC": 1, "LDS": 1, "WARPGROUP.DEPBAR.LE": 1, "FFMA": 1, "BRA.U": 1,
    }  # fmt: skip
    assert code.mix() == {"synchronisation": 3, "matrix": 2, "shared": 1, "float": 1, "other": 3}
    assert code.loops == (code.loop,)


def test_branches() -> None:
    code = {x.mnemonic: x for x in parse_sass(SASS)}
    assert not code["BRA"].next
    assert code["BRA.U"].next  # its predicate is an operand
    assert code["BRA.U"].target == [x.mnemonic for x in parse_sass(SASS)].index("SYNCS.PHASECHK.TRANS64.TRYWAIT")
    assert code["CALL.REL.NOINC"].target is None
    assert parse_sass("/*0000*/ @P6 EXIT ;\n/*0010*/ EXIT ;")[0].next


def test_the_loop_with_the_most_matrix_instructions() -> None:
    loop = "{0}:\n/*0000*/ HMMA.16816.F32 R0, R1, R2, R0 ;\n{1}/*0010*/ @P0 BRA `({0}) ;\n"
    sass = loop.format(".L_1", "") + loop.format(".L_2", "/*0008*/ HMMA.16816.F32 R0, R1, R2, R0 ;\n")
    code = from_sass("sm_80", sass, RESOURCES, 4)
    assert [counts["HMMA.16816.F32"] for counts in code.loops] == [1, 2]
    assert code.loop["HMMA.16816.F32"] == 2
    assert code.shared_bytes == 1040


def test_without_a_loop() -> None:
    code = from_sass("sm_90", "/*0000*/ FADD R0, R1, R2 ;\n/*0010*/ EXIT ;", RESOURCES, 4)
    assert code.loop == {}
    assert machine_code.share(code) is None


def amd() -> MachineCode:
    return from_amdgcn("gfx942", AMDGCN, 4, 512)


def test_amdgcn() -> None:
    code = amd()
    assert (code.registers, code.scalar_registers, code.spills, code.scalar_spills) == (256, 106, 3, 70)
    assert (code.local_bytes, code.shared_bytes) == (708, 1536)
    assert code.matrix == ["v_mfma_f32_32x32x16_fp8_fp8"]
    assert code.mix() == {
        "global": 1, "synchronisation": 2, "shared": 1, "matrix": 2, "conversion": 1, "float": 1, "local": 1,
        "other": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mnemonic", "kind"),
    [
        ("QMMA.16832.F32.E4M3.E4M3", "matrix"),
        ("UTCQMMA.2CTA", "matrix"),
        ("HGMMA.64x128x16.F32", "matrix"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("UTMALDG.2D", "global"),
        ("LDSM.16.M88.4", "shared"),
        ("LDTM.x64", "shared"),
        ("STL.64", "local"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"),
        ("HADD2.F32", "conversion"),
        ("FFMA2", "float"),
        ("HMUL2", "float"),
        ("PRMT", "other"),
        ("LDGDEPBAR", "synchronisation"),
        ("v_mfma_f32_32x32x64_f8f6f4", "matrix"),
        ("global_load_lds_dwordx4", "global"),
        ("ds_read_b128", "shared"),
        ("scratch_store_dword", "local"),
        ("v_cvt_pk_bf16_f32", "conversion"),
        ("v_pk_mul_f32", "float"),
        ("v_mul_lo_u32", "other"),
        ("s_waitcnt", "synchronisation"),
    ],
)
def test_classes(mnemonic: str, kind: str) -> None:
    assert machine_code.class_of(mnemonic) == kind


@pytest.mark.parametrize(
    ("mnemonic", "count"),
    [
        ("QMMA.16832.F32.E4M3.E4M3", 16 * 8 * 32),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", 64 * 256 * 32 // 4),
        ("v_mfma_f32_32x32x64_f8f6f4", 32 * 32 * 64),
        ("v_mfma_f32_16x16x32_fp8_bf8", 16 * 16 * 32),
    ],
)
def test_multiply_adds(mnemonic: str, count: int) -> None:
    assert machine_code.multiply_adds(mnemonic) == count


def test_share() -> None:
    code = nvidia()
    share = machine_code.share(code)
    assert share is not None
    # two QGMMA of two warpgroups at 4096 a cycle; eight others of eight warps on four schedulers
    assert (share.matrix_cycles, share.other_cycles) == (2 * 2 * 64 * 128 * 32 / 4096, 8 * 8 / 4)
    assert (share.overlapped, share.alone) == (1, 256 / 272)
    slower = replace(code, loop=code.loop + Counter({"MOV": 248}))
    assert machine_code.share(slower).overlapped == 0.5
    # a wave keeps its SIMD for four cycles with each of its three vector instructions
    assert machine_code.share(amd()).other_cycles == 3 * 4
    # float32 has half as many lanes there
    sums = MachineCode("sm_80", 4, 32, 0, 0, 0, 0, 0, 0, Counter(), Counter({"HMMA.16816.F32": 1, "FFMA": 10}))
    assert machine_code.share(sums).other_cycles == 20


def test_share_where_the_shape_is_in_a_descriptor() -> None:
    code = MachineCode("sm_100", 4, 64, 0, 0, 0, 0, 0, 128, Counter(), Counter({"UTCQMMA": 4, "FFMA2": 32}))
    assert machine_code.share(code) is None
    assert machine_code.share(code, 128 * 128 * 128).matrix_cycles == 256


def test_share_of_specialised_warps() -> None:
    code = nvidia()
    loops = (code.loop, code.loop)
    code = replace(code, warps=12, loops=loops, mnemonics=Counter({"USETMAXREG.TRY_ALLOC.CTAPOOL": 1}))
    assert machine_code.share(code) is None
    share = machine_code.share(code, warps=4)
    assert (share.matrix_cycles, share.other_cycles) == (256, 16)


def test_json() -> None:
    for code in (nvidia(), amd()):
        assert MachineCode.from_json(json.loads(json.dumps(code.to_json()))) == code


GOOD = Counter({"QGMMA.64x128x32.F32.E4M3.E4M3": 4, "FFMA": 64})
CODE = MachineCode("sm_90", 8, 168, 0, 0, 0, 0, 100_000, 0, GOOD, GOOD, (GOOD,))
EXPECTED = Expectation(100_000, gates.FP8["sm_90"], required=("FFMA",), forbidden=("CALL",))


def test_good_code_has_no_problem() -> None:
    assert problems(CODE, EXPECTED) == []
    assert problems(CODE, replace(EXPECTED, tile=128 * 128 * 128)) == []
    assert problems(CODE, replace(EXPECTED, tile=128 * 128 * 64)) == []  # unrolled


@pytest.mark.parametrize(
    ("code", "expected", "problem"),
    [
        ({"mnemonics": Counter(FFMA=1), "loop": Counter(FFMA=1)}, {}, "has no matrix instruction QGMMA"),
        ({"loop": Counter(FFMA=1)}, {}, "has no loop around"),
        ({}, {"matrix": "UTCQMMA", "elsewhere": "QGMMA"}, "which is not UTCQMMA"),
        (
            {"mnemonics": GOOD + Counter({"HMMA.16816.F32": 1})},
            {"elsewhere": "QMMA"},
            "has HMMA.16816.F32, which is not QMMA",
        ),
        ({"mnemonics": GOOD + Counter({"HGMMA.64x128x16.F32": 1})}, {}, "has HGMMA.64x128x16.F32, which is not QGMMA"),
        ({}, {"matrix": ""}, "was to have no matrix instruction"),
        ({}, {"required": ("UTMALDG",)}, "has no UTMALDG"),
        ({"mnemonics": GOOD + Counter({"CALL.REL.NOINC": 1})}, {}, "has CALL.REL.NOINC"),
        ({}, {"tile": 3 * 128 * 128 * 64}, "multiplies 0.666667 tiles"),
        ({}, {"tile": 4 * 128 * 128 * 64}, "multiplies 0.5 tiles"),
        ({"spills": 1}, {}, "spills 1 registers"),
        ({"local_bytes": 8}, {}, "has 8 bytes of local memory"),
        ({"loop": GOOD + Counter({"LDL": 2})}, {}, "has 2 accesses to local memory"),
        ({"loop": GOOD + Counter({"v_readlane_b32": 2})}, {}, "has 2 moves of spilled scalar registers"),
        ({}, {"shared_memory": 99_999}, "has 100000 bytes of shared memory"),
    ],
)
def test_every_rule_can_fail(code: dict[str, object], expected: dict[str, object], problem: str) -> None:
    (found,) = problems(replace(CODE, **code), replace(EXPECTED, **expected))
    assert problem in found


@pytest.mark.parametrize(
    ("target", "mnemonic"),
    [
        ("sm_89", "HMMA.16816.F32"),
        ("gfx942", "v_mfma_f32_32x32x8_f16"),
        ("gfx950", "v_mfma_f32_32x32x16_bf16"),
        ("gfx950", "v_mfma_f32_32x32x16_fp8_fp8"),
    ],
)
def test_decoded_fp8_is_no_fp8(target: str, mnemonic: str) -> None:
    counts = Counter({mnemonic: 1})
    code = MachineCode(target, 4, 64, 0, 0, 0, 0, 0, 0, counts, counts, (counts,))
    assert len(problems(code, Expectation(0, gates.FP8[target], gates.SLOW_FP8.get(target, "")))) == 1


def test_table(tmp_path: Path) -> None:
    result = compiled.Result("gemm sm_90", CODE, [], machine_code.share(CODE), 1.0)
    failed = compiled.Result("gemm sm_80", None, ["does not compile"], None, 0.0)
    assert compiled.Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    path = tmp_path / "kernels.md"
    compiled.write([result, failed], path)
    text = path.read_text()
    path.write_text(text + "\nBy hand.\n")
    compiled.write([result, failed], path)
    assert path.read_text() == text + "\nBy hand.\n"
    rows = [line for line in text.splitlines() if line.startswith(("| kernel", "| ---", "| gemm"))]
    assert len({line.count("|") for line in rows[:2] + rows[-2:]}) <= 2
    assert "| 168 |" in text


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels(target: str) -> None:
    """Every kernel for this target has what its list expects."""
    script = Path(compiled.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "--json", "--processes", "1", "--target", target],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [compiled.Result.from_json(values) for values in json.loads(done.stdout.splitlines()[-1])]
    assert results
    assert [f"{result.name}: {problem}" for result in results for problem in result.problems] == []
