"""The checker of races: programs that it has to accuse whatever the schedule, and the same without their fault."""

from __future__ import annotations

import emulator_ptx as ptx
import numpy as np
import pytest

pytestmark = pytest.mark.skipif("not __import__('emulator_built').here()", reason="built without the emulator")

SCHEDULES = ("round_robin", "random", "producer_greedy", "consumer_greedy")

MEET = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
START = """
.reg .b32 %t, %s, %v, %w, %far, %bars; .reg .b64 %out, %x, %map; .reg .pred %p, %q;
.shared .align 1024 .b8 buffer[1024]; .shared .align 8 .b8 bars[16];
mov.u32 %t, %tid.x; mov.u32 %s, buffer; mov.u32 %bars, bars; ld.param.u64 %out, [out];
"""

# name: (the program, {place: (what belongs there, what the fault says without it)}, settings)
PROGRAMS = {
    "a store read by another warp": (
        "setp.ge.u32 %p, %t, 32; @%p bra READ; mad.lo.u32 %v, %t, 4, %s; st.shared.u32 [%v], %t; READ: {sync} "
        "xor.b32 %v, %t, 63; and.b32 %v, %v, 31; mad.lo.u32 %v, %v, 4, %s; {guard} ld.shared.u32 %w, [%v]; ret;",
        {"sync": ("bar.sync 0;", "never written|race: reads"), "guard": ("", None)}, {},
    ),
    "a buffer that is used again": (
        "mad.lo.u32 %v, %t, 4, %s; st.shared.u32 [%v], %t; bar.sync 0; xor.b32 %w, %t, 32; mad.lo.u32 %w, %w, 4, %s; "
        "ld.shared.u32 %w, [%w]; {sync} add.u32 %t, %t, 7; st.shared.u32 [%v], %t; ret;",
        {"sync": ("bar.sync 0;", "race: writes .* behind the read of|race: reads .* behind the write of")}, {},
    ),
    "named barriers of some warps": (
        "setp.ge.u32 %p, %t, 32; @%p bra READ; mad.lo.u32 %v, %t, 4, %s; st.shared.u32 [%v], %t; {arrive} ret; "
        "READ: {wait} sub.u32 %v, %t, 32; mad.lo.u32 %v, %v, 4, %s; ld.shared.u32 %w, [%v]; ret;",
        {"arrive": ("bar.arrive 3, 64;", "deadlock"), "wait": ("bar.sync 3, 64;", "never written|race|deadlock")}, {},
    ),
    "a bulk store of what was stored": (
        "mad.lo.u32 %v, %t, 4, %s; st.shared.u32 [%v], %t; {fence} {sync} setp.ne.u32 %p, %t, 0; @%p bra DONE; "
        "cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 256; cp.async.bulk.commit_group; "
        "cp.async.bulk.wait_group.read 0; DONE: ret;",
        {"fence": ("fence.proxy.async.shared::cta;", r"no fence\.proxy\.async lies behind the ordinary write"),
         "sync": ("bar.sync 0;", "race|never written")}, {},
    ),
    "a fence behind the barrier": (
        "mad.lo.u32 %v, %t, 4, %s; st.shared.u32 [%v], %t; bar.sync 0; {fence} setp.ne.u32 %p, %t, 0; @%p bra DONE; "
        "cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 256; cp.async.bulk.commit_group; "
        "cp.async.bulk.wait_group.read 0; DONE: ret;",
        {"fence": ("fence.proxy.async.shared::cta;", r"no fence\.proxy\.async lies behind the ordinary write")}, {},
    ),
    "a source that is overwritten": (
        "setp.ne.u32 %p, %t, 0; @%p bra DONE; st.shared.v4.u32 [%s], {{1, 2, 3, 4}}; fence.proxy.async.shared::cta; "
        "cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 16; {commit} {wait} "
        "st.shared.u32 [%s], 5; DONE: ret;",
        {"commit": ("cp.async.bulk.commit_group;", "race: writes .* behind the read of"),
         "wait": ("cp.async.bulk.wait_group.read 0;", "race: writes .* behind the read of")}, {},
    ),
    "a source that is left": (
        "setp.ne.u32 %p, %t, 0; @%p bra DONE; st.shared.v4.u32 [%s], {{1, 2, 3, 4}}; fence.proxy.async.shared::cta; "
        "cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 16; {commit} {wait} DONE: ret;",
        {"commit": ("cp.async.bulk.commit_group;", "exits while its bulk copies"),
         "wait": ("cp.async.bulk.wait_group.read 0;", "exits while its bulk copies")}, {},
    ),
    "cp.async": (
        "mad.lo.u32 %v, %t, 4, %s; mul.wide.u32 %x, %t, 4; add.u64 %x, %x, %out; "
        "cp.async.ca.shared.global [%v], [%x], 4; {commit} {wait} bar.sync 0; xor.b32 %v, %t, 32; "
        "mad.lo.u32 %v, %v, 4, %s; ld.shared.u32 %w, [%v]; ret;",
        {"commit": ("cp.async.commit_group;", "under way|race"),
         "wait": ("cp.async.wait_group 0;", "under way|race")}, {},
    ),
    "a neighbour's shared memory": (
        "mov.u32 %v, %cluster_ctarank; xor.b32 %v, %v, 1; mapa.shared::cluster.u32 %far, %s, %v; "
        "setp.eq.u32 %p, %t, 0; @%p st.shared.u32 [%s], %v; {first} @%p ld.shared::cluster.u32 %w, [%far]; {last} ret;",
        {"first": (MEET, "never written|race|has exited"),
         "last": (MEET, "exits, and nothing orders|has exited")},
        {"grid": 2, "cluster": 2},
    ),
    "an mbarrier in another CTA": (
        "setp.ne.u32 %p, %t, 0; @%p bra READY; mbarrier.init.shared::cta.b64 [%bars], 1; {fence} READY: "
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; "
        "mov.u32 %v, %cluster_ctarank; xor.b32 %v, %v, 1; mapa.shared::cluster.u32 %far, %bars, %v; "
        "setp.eq.u32 %p, %t, 32; @%p mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%far]; "
        "W: mbarrier.try_wait.parity.shared::cta.b64 %q, [%bars], 0; @!%q bra W; "
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret;",
        {"fence": ("fence.mbarrier_init.release.cluster;", "nothing orders that before its use")},
        {"grid": 2, "cluster": 2},
    ),
}  # fmt: skip

CASES = [(name, place) for name, (_, places, _) in PROGRAMS.items() for place, (_, words) in places.items() if words]


def run(name: str, missing: str | None, **settings) -> None:
    program, places, more = PROGRAMS[name]
    body = program.format(**{place: "" if place == missing else part for place, (part, _) in places.items()})
    settings = {"grid": 1, "block": 64, **more, **settings}
    text = ptx.kernel(START + body, ".param .u64 out")
    ptx.module(text).launch("k", settings.pop("grid"), settings.pop("block"), [np.zeros(256, "u4")], **settings)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_right_programs_pass(name, schedule):
    for seed in range(4):
        run(name, None, schedule=schedule, seed=seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name, place", CASES)
def test_wrong_programs_do_not(name, place, schedule):
    from moekern.backends.cuda.emulator import Fault

    with pytest.raises(Fault, match=PROGRAMS[name][1][place][1]):
        run(name, place, schedule=schedule, seed=1)


def test_a_race_names_both_instructions():
    from moekern.backends.cuda.emulator import Fault

    with pytest.raises(Fault) as caught:
        run("a buffer that is used again", "sync")
    text = str(caught.value)
    assert "nothing orders that behind the " in text and "of warp" in text
    assert "ld.shared.u32 %w, [%w]" in text and "st.shared.u32 [%v], %t" in text


def test_the_checker_can_be_switched_off():
    run("a bulk store of what was stored", "fence", races=False)


def test_equal_stores_are_no_race():
    body = START + "st.shared.u32 [%s], 5; bar.sync 0; ld.shared.u32 %v, [%s]; ret;"
    ptx.module(ptx.kernel(body, ".param .u64 out")).launch("k", 1, 96, [np.zeros(1, "u4")])


def test_atomics_are_no_race():
    body = START + "setp.eq.u32 %p, %t, 0; @%p st.shared.u32 [%s], 0; bar.sync 0; atom.shared.add.u32 %v, [%s], 1; ret;"
    ptx.module(ptx.kernel(body, ".param .u64 out")).launch("k", 1, 96, [np.zeros(1, "u4")])


def test_a_try_wait_that_gives_up():
    """It may return false at any time: code that takes it for a wait is found by the random schedule."""
    from moekern.backends.cuda.emulator import Fault

    once = ptx.gemm(wait_full="mbarrier.try_wait.parity.shared::cta.b64 %q, [%bar], %phase;")
    with pytest.raises(Fault, match=r"under way|race"):
        for seed in range(8):
            ptx.run_gemm(once, schedule="random", seed=seed)
