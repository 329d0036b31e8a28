"""What kernels do wrong, and that the emulator says so: where, and in words that name the cause."""

from __future__ import annotations

import emulator_ptx as ptx
import numpy as np
import pytest

pytestmark = pytest.mark.skipif("not __import__('emulator_built').here()", reason="built without the emulator")

SCHEDULES = ("round_robin", "random", "producer_greedy", "consumer_greedy")


def fails(message: str, body: str, arguments=(), parameters="", grid=1, block=32, **settings):
    from moekern.backends.cuda.emulator import Fault

    module = ptx.module(ptx.kernel(body, parameters))
    with pytest.raises(Fault, match=message) as caught:
        module.launch("k", grid, block, arguments, **settings)
    return str(caught.value)


OUT = ".param .u64 out"
MBARRIER = ".reg .b32 %s, %t; .reg .pred %p; .shared .align 8 .b8 bars[16]; mov.u32 %s, bars; mov.u32 %t, %tid.x; "
ADDRESS = ".reg .b64 %out, %x; .reg .b32 %t, %v, %s; .reg .pred %p; ld.param.u64 %out, [out]; mov.u32 %t, %tid.x;"


def test_a_fault_says_where():
    text = fails(
        "out of bounds: write of 4 bytes",
        ADDRESS + "mul.wide.u32 %x, %t, 4;\nadd.u64 %x, %x, %out;\nst.global.u32 [%x], %t;\nret;",
        [np.zeros(32 * 3 - 5, "u4")], OUT, grid=(1, 2), block=96,
    )  # fmt: skip
    assert "kernel k, CTA (0, 0, 0), warp 2, lane 27, PTX line" in text
    assert "st.global.u32 [%x], %t" in text and "0 bytes behind the end of 364 bytes" in text


def test_memory():
    array = np.zeros(64, "u4")
    fails("misaligned address", ADDRESS + "ld.global.v4.u32 {%v, %v, %v, %v}, [%out+4]; ret;", [array], OUT)
    fails("out of bounds: read", ADDRESS + "ld.global.u32 %v, [%out-4]; ret;", [array], OUT)
    fails(
        "out of bounds: read of 16 bytes", ADDRESS + "ld.global.v4.u32 {%v, %v, %v, %v}, [%out+256]; ret;", [array], OUT
    )
    array.flags.writeable = False
    fails("write to read-only memory", ADDRESS + "st.global.u32 [%out], %t; ret;", [array], OUT)


def test_shared_memory():
    shared = ".reg .b32 %s, %v; .shared .align 16 .b8 buffer[64]; mov.u32 %s, buffer; "
    fails("never written", shared + "ld.shared.u32 %v, [%s]; ret;")
    fails("out of bounds", shared + "st.shared.u32 [%s+64], 1; ret;")
    fails("misaligned", shared + "st.shared.v2.u32 [%s+4], {1, 1}; ret;")
    fails(
        "an mbarrier lies at", shared + "mbarrier.init.shared::cta.b64 [%s], 1; st.shared.u32 [%s+4], 1; ret;", block=1
    )


def test_registers():
    fails("read of %v, which has no value", ".reg .b32 %v, %w; add.u32 %w, %v, 1; ret;")
    fails("lane 1,", ".reg .b32 %v, %t; .reg .pred %p; mov.u32 %t, %tid.x; setp.eq.u32 %p, %t, 0; @%p mov.u32 %v, 1; "
          "add.u32 %v, %v, 1; ret;")  # fmt: skip


def test_what_is_not_known():
    from moekern.backends.cuda.emulator import Fault

    module = ptx.module(ptx.kernel(".reg .b32 %a; video.add.u32 %a, 1; ret;"))
    assert module.kernels()["k"].unknown == ("video.add.u32",)
    with pytest.raises(Fault, match=r"does not know the instruction video\.add\.u32"):
        module.launch("k", 1, 32)
    for text, words in (
        (".reg .b32 %a; mov.u32 %a, %b; ret;", "%b is not declared"),
        (".reg .b32 %a; bra NOWHERE; ret;", "no label NOWHERE"),
        (".reg .b32 %a; .reg .b64 %b; add.u32 %a, %b, 1; ret;", "another size"),
    ):
        with pytest.raises(Fault, match=rf"PTX line \d+: .*{words}"):
            ptx.module(ptx.kernel(text)).kernels()
    with pytest.raises(Fault, match="PTX line 5"):
        ptx.module(ptx.HEADER + ".visible .entry k()\n{ add.u32 }")


def test_a_barrier_that_not_all_reach():
    text = fails(
        "deadlock", ".reg .b32 %t; .reg .pred %p; mov.u32 %t, %tid.x; setp.ge.u32 %p, %t, 64; @%p bar.sync 1, 64; "
        "@!%p bar.sync 2, 96; ret;", block=96,
    )  # fmt: skip
    assert "barrier 1: 32 of 64 threads have come, warps 2" in text
    assert "barrier 2: 64 of 96 threads have come, warps" in text
    assert "warp 2: line" in text and "@%p bar.sync 1, 64" in text


def test_a_barrier_within_a_branch():
    fails("hung|deadlock", MBARRIER + "setp.lt.u32 %p, %t, 7; @%p bra A; L: bra L; A: bar.sync 0; ret;", patience=20000)


def test_misuse_of_barriers():
    fails("multiple of 32", "bar.sync 0, 40; ret;", block=64)
    fails("of a CTA of 64 threads", "bar.sync 0, 96; ret;", block=64)
    fails("no barrier 16", "bar.sync 16; ret;")
    fails("arrives at barrier 1 again", "bar.arrive 1, 64; bar.arrive 1, 64; ret;", block=64)


def test_misuse_of_mbarriers():
    init = MBARRIER + "setp.eq.u32 %p, %t, 0; @%p mbarrier.init.shared::cta.b64 [%s], 4; bar.warp.sync -1; "
    fails("more arrivals", init + "@%p mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%s], 16; "
          "mbarrier.arrive.shared::cta.b64 _, [%s]; ret;")  # fmt: skip
    fails("transaction overflow", init + "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%s], 1000000; ret;")
    fails("no mbarrier at", MBARRIER + "mbarrier.arrive.shared::cta.b64 _, [%s]; ret;")
    fails("already, initialised in line", init + "@%p mbarrier.init.shared::cta.b64 [%s], 4; ret;")
    fails("misaligned", MBARRIER + "mbarrier.init.shared::cta.b64 [%s+4], 1; ret;")
    text = fails("deadlock", init + "W: mbarrier.try_wait.parity.shared::cta.b64 %p, [%s], 0; @!%p bra W; ret;")
    assert "mbarrier 0x400" in text and "phase 0, waits for 4 of 4 arrivals and 0 bytes" in text


def test_a_loop_that_waits_for_nobody():
    text = fails(
        "hung: .* without any progress",
        ADDRESS + "L: ld.global.u32 %v, [%out]; setp.eq.u32 %p, %v, 0; @%p bra L; ret;",
        [np.zeros(1, "u4")], OUT, patience=20000,
    )  # fmt: skip
    assert "warp 0: line" in text


def test_ctas_wait_for_each_other():
    """A grid barrier in global memory: with room for all CTAs it passes, with too few SMs it cannot."""
    body = (
        ADDRESS
        + """
    setp.ne.u32 %p, %t, 0; @%p bra DONE; red.release.gpu.global.add.u32 [%out], 1;
    L: ld.acquire.gpu.global.u32 %v, [%out]; setp.lt.u32 %p, %v, 6; @%p bra L; DONE: ret;"""
    )
    text = ptx.kernel(".shared .align 4 .b8 room[40000];\n.reg .b32 %r; mov.u32 %r, room;" + body, OUT)
    out = np.zeros(1, "u4")
    from moekern.backends.cuda.emulator import Fault

    ptx.module(text).launch("k", 6, 32, [out], sms=2)
    assert out[0] == 6
    out[0] = 0
    with pytest.raises(Fault, match="hung"):
        ptx.module(text).launch("k", 6, 32, [out], sms=1, patience=50000)


def test_warps_that_do_not_meet():
    fails("the lane is not in the member mask", ".reg .b32 %a; shfl.sync.idx.b32 %a, 1, 0, 31, 1; ret;")
    fails("names a lane whose guard", MBARRIER + "setp.lt.u32 %p, %t, 4; @%p shfl.sync.idx.b32 %s, 1, 0, 31, -1; ret;")
    fails("wgmma needs four warps", ".reg .f32 %d<4>; .reg .b64 %a; .reg .pred %p; wgmma.fence.sync.aligned; "
          "mov.u64 %a, 0; setp.ne.u32 %p, 0, 0; wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 "
          "{%d0, %d1, %d2, %d3}, %a, %a, %p, 1, 1; ret;")  # fmt: skip


def test_the_kernel_says_so_itself():
    fails("executed trap", "trap;")


def test_refused_launches():
    from moekern.backends.cuda.emulator import Fault

    module = ptx.module(ptx.kernel("ret;"))
    for words, grid, block, settings in (
        ("at most 1024", 1, 1056, {}),
        ("no multiple of the cluster's", 3, 32, {"cluster": 2}),
        ("a CTA has at most 232448", 1, 32, {"shared_bytes": 240000}),
        ("a cluster of 32", 32, 32, {"cluster": 32}),
    ):
        with pytest.raises(Fault, match=words):
            module.launch("k", grid, block, **settings)
    with pytest.raises(Fault, match="no kernel other"):
        module.launch("other", 1, 32)
    with pytest.raises(ValueError, match="0 parameters, 1 arguments"):
        module.launch("k", 1, 32, [1])
    with pytest.raises(ValueError, match="schedule='fair'"):
        module.launch("k", 1, 32, schedule="fair")


@pytest.mark.parametrize("words, array, box, options", [
    ("multiple of 16", np.zeros((8, 40), "u1"), (8, 32), {}),
    ("allowed are 1 to 256", np.zeros((512, 64), "u1"), (512, 64), {}),
    ("the swizzle allows 64", np.zeros((8, 128), "u1"), (8, 128), {"swizzle": 64}),
    ("no multiple of 16", np.zeros((8, 64), "u1"), (8, 24), {}),
    ("needs a floating point type", np.zeros((8, 64), "u1"), (8, 64), {"fill": "nan"}),
    ("has to be contiguous", np.zeros((8, 64), "u1").T, (8, 8), {}),
    ("2 dimensions", np.zeros(64, "u1"), (1, 64), {}),
])  # fmt: skip
def test_tensor_maps_that_no_driver_makes(words, array, box, options):
    from moekern.backends.cuda.emulator import TensorMap

    with pytest.raises(ValueError, match=words):
        TensorMap(array, box, **options)


def test_a_map_that_is_none():
    text = ptx.gemm()
    from moekern.backends.cuda.emulator import Fault

    with pytest.raises(Fault, match="was not made by cuTensorMapEncodeTiled"):
        ptx.module(text).launch("gemm", 1, 160, [bytes(128), bytes(128), np.zeros((64, 64), "f4"), 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("races", [True, False])
def test_a_correct_kernel_has_no_fault(schedule, races):
    for seed in range(3):
        out, wanted, told = ptx.run_gemm(ptx.gemm(), schedule=schedule, seed=seed, races=races)
        np.testing.assert_array_equal(out, wanted)
        assert (
            told.products == 4 * 9 and told.bulk_copies == 2 * 9 and told.opcodes["wgmma.fence.sync.aligned"] == 4 * 9
        )


MUTANTS = {
    "init_sync": ("", "no mbarrier at|race"),
    "wait_full": ("", "under way|race"),
    "wait_empty": ("", "race|more arrivals|transaction"),
    "expect": ("mbarrier.arrive.shared::cta.b64 _, [%bar];", "deadlock|under way|race"),
    "fence": ("", r"without a wgmma\.fence"),
    "commit": ("", "belongs to a wgmma under way|exits while|race"),
    "wait_group": ("", r"wgmma\.wait_group has to come first|race"),
    "arrive": ("", "deadlock"),
    "init": ("mbarrier.init.shared::cta.b64 [%bars], 1; mbarrier.init.shared::cta.b64 [%bars+8], 1;"
             "mbarrier.init.shared::cta.b64 [%bars+16], 32; mbarrier.init.shared::cta.b64 [%bars+24], 32;",
             "race|more arrivals|deadlock"),
    "behind_products": ("add.f32 %d0, %d0, 0f3F800000;", "%d0 belongs to a wgmma under way"),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("part", MUTANTS)
def test_no_part_of_the_kernel_can_be_left_out(part, schedule):
    from moekern.backends.cuda.emulator import Fault

    replacement, words = MUTANTS[part]
    with pytest.raises(Fault, match=words):
        ptx.run_gemm(ptx.gemm(**{part: replacement}), schedule=schedule, seed=1)


@pytest.mark.parametrize("bytes_expected", [ptx.TILE_BYTES + 16, ptx.TILE_BYTES - 16])
def test_the_wrong_number_of_bytes(bytes_expected):
    from moekern.backends.cuda.emulator import Fault

    expect = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {bytes_expected};"
    with pytest.raises(Fault, match="deadlock") as caught:
        ptx.run_gemm(ptx.gemm(expect=expect))
    assert f"{bytes_expected - ptx.TILE_BYTES} bytes" in str(caught.value)


def test_wrong_numbers_stay_wrong():
    """What is no fault on the device is none here: another stride in a descriptor, another tile."""
    for changed in ({"stride": "32"}, {"copy_row": "8"}):
        out, wanted, _ = ptx.run_gemm(ptx.gemm(**changed))
        assert (out != wanted).mean() > 0.5
