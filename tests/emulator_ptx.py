"""Small kernels in PTX for tests of the emulator: one instruction on arrays, and a warp-specialised GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"
_LOAD = {0: "pred", 1: "u8", 2: "b16", 4: "b32", 8: "b64"}
_REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, parameters: str = "", name: str = "k", variables: str = "") -> str:
    return f"{HEADER}{variables}.visible .entry {name}({parameters})\n{{\n{body}\n}}\n"


def module(text: str) -> Any:
    from moekern.backends.cuda.emulator import Module

    return Module(text)


def elementwise(instruction: str, inputs: Sequence[np.ndarray], result: Any, *, before: str = "") -> np.ndarray:
    """d = instruction(a, b, c), element by element; `instruction` names %d, %a, %b and %c."""
    names = "abc"[: len(inputs)]
    count = inputs[0].size
    out = np.zeros(count, result)
    lines = [".reg .b64 %address, %out, %thread;", ".reg .b32 %t, %n, %c0, %size;", ".reg .pred %p, %q;"]
    lines += [f".reg .{_REGISTER[x.itemsize]} %{n};" for n, x in zip(names, inputs, strict=True)]
    lines += [f".reg .{_REGISTER[out.itemsize]} %d;"]
    lines += ["mov.u32 %t, %tid.x;", "mov.u32 %c0, %ctaid.x;", "mov.u32 %n, %ntid.x;", "mad.lo.u32 %t, %c0, %n, %t;"]
    lines += ["ld.param.u32 %size, [size];", "setp.ge.u32 %p, %t, %size;", "@%p bra DONE;"]
    for n, x in zip(names, inputs, strict=True):
        lines += [f"ld.param.u64 %address, [{n}];", f"mul.wide.u32 %thread, %t, {x.itemsize};"]
        lines += ["add.u64 %address, %address, %thread;", f"ld.global.{_LOAD[x.itemsize]} %{n}, [%address];"]
    lines += [before, instruction, "ld.param.u64 %out, [d];", f"mul.wide.u32 %thread, %t, {out.itemsize};"]
    lines += ["add.u64 %out, %out, %thread;", f"st.global.{_LOAD[out.itemsize]} [%out], %d;", "DONE: ret;"]
    parameters = ", ".join([f".param .u64 {n}" for n in names] + [".param .u64 d", ".param .u32 size"])
    module(kernel("\n".join(lines), parameters)).launch("k", -(-count // 64), 64, [*inputs, out, count])
    return out


M, N, STAGES = 64, 64, 2
COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
TILE_BYTES = 128 * (M + N)


def gemm(**changed: str) -> str:
    """out[64, 64] = a @ b.T, e4m3, in steps of 128 of k: a warp of copies, four of products, a ring of two stages.

    What matters for correctness has a name, by which a test can leave it out or replace it.
    """
    parts = {
        "init": "mbarrier.init.shared::cta.b64 [%bars], 1; mbarrier.init.shared::cta.b64 [%bars+8], 1;"
        "mbarrier.init.shared::cta.b64 [%bars+16], 128; mbarrier.init.shared::cta.b64 [%bars+24], 128;",
        "init_sync": "bar.sync 0;",
        "wait_full": "WF: mbarrier.try_wait.parity.shared::cta.b64 %q, [%bar], %phase; @!%q bra WF;",
        "wait_empty": "WE: mbarrier.try_wait.parity.shared::cta.b64 %q, [%bar+16], %phase; @!%q bra WE;",
        "expect": f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {TILE_BYTES};",
        "fence": "wgmma.fence.sync.aligned;",
        "commit": "wgmma.commit_group.sync.aligned;",
        "wait_group": "wgmma.wait_group.sync.aligned 0;",
        "arrive": "mbarrier.arrive.shared::cta.b64 _, [%bar+16];",
        "stride": "64",  # bytes / 16 from eight rows to the next
        "copy_row": "0",
        "behind_products": "",
    } | changed
    d = [f"%d{i}" for i in range(N // 2)]
    wgmma = "\n".join(
        f"wgmma.mma_async.sync.aligned.m64n{N}k32.f32.e4m3.e4m3 {{{', '.join(d)}}}, %da, %db, %scale, 1, 1;\n"
        "add.u64 %da, %da, 2; add.u64 %db, %db, 2; setp.eq.u32 %scale, 0, 0;"
        for _ in range(4)
    )
    descriptor = (
        "cvt.u64.u32 {0}, {1}; shr.u64 {0}, {0}, 4; or.b64 {0}, {0}, 4611686018427453440; "  # 128-byte swizzle, LBO 1
        f"or.b64 {{0}}, {{0}}, {int(parts['stride']) << 32};"
    )
    stores = "\n".join(
        f"st.global.v2.f32 [%row{h}+{32 * j}], {{{d[4 * j + 2 * h]}, {d[4 * j + 2 * h + 1]}}};"
        for j in range(N // 8)
        for h in range(2)
    )
    body = f"""
.reg .b32 %t, %tiles, %bars, %bar, %steps, %k, %stage, %phase, %a, %b, %x, %r, %c;
.reg .b64 %da, %db, %ma, %mb, %out, %row0, %row1, %o;
.reg .f32 %d<{N // 2}>;
.reg .pred %p, %q, %scale;
.shared .align 1024 .b8 tiles[{STAGES * TILE_BYTES}];
.shared .align 8 .b8 bars[32];
mov.u32 %t, %tid.x; mov.u32 %tiles, tiles; mov.u32 %bars, bars; ld.param.u32 %steps, [steps];
setp.ne.u32 %p, %t, 0;
@%p bra READY;
{parts["init"]}
fence.mbarrier_init.release.cluster;
READY:
{parts["init_sync"]}
mov.u32 %k, 0;
setp.ge.u32 %p, %t, 128;
@%p bra COPIES;
PRODUCTS:
setp.ge.u32 %p, %k, %steps; @%p bra STORE;
and.b32 %stage, %k, 1; shr.u32 %phase, %k, 1; and.b32 %phase, %phase, 1; mad.lo.u32 %bar, %stage, 8, %bars;
{parts["wait_full"]}
mad.lo.u32 %a, %stage, {TILE_BYTES}, %tiles; add.u32 %b, %a, {128 * M};
{descriptor.format("%da", "%a")}
{descriptor.format("%db", "%b")}
setp.ne.u32 %scale, %k, 0;
{parts["fence"]}
{wgmma}
{parts["behind_products"]}
{parts["commit"]}
{parts["wait_group"]}
{parts["arrive"]}
add.u32 %k, %k, 1; bra PRODUCTS;
STORE:
ld.param.u64 %out, [out];
shr.u32 %r, %t, 5; shl.b32 %r, %r, 4; and.b32 %x, %t, 31; shr.u32 %c, %x, 2; add.u32 %r, %r, %c;
and.b32 %c, %t, 3; shl.b32 %c, %c, 3; mad.lo.u32 %r, %r, {4 * N}, %c;
cvt.u64.u32 %o, %r; add.u64 %row0, %out, %o; add.u64 %row1, %row0, {8 * 4 * N};
{stores}
ret;
COPIES:
setp.ne.u32 %p, %t, 128; @%p bra DONE;
mov.b64 %ma, ma; mov.b64 %mb, mb;
cvta.param.u64 %ma, %ma; cvta.param.u64 %mb, %mb;
NEXT:
setp.ge.u32 %p, %k, %steps; @%p bra DONE;
and.b32 %stage, %k, 1; shr.u32 %phase, %k, 1; and.b32 %phase, %phase, 1; xor.b32 %phase, %phase, 1;
mad.lo.u32 %bar, %stage, 8, %bars;
{parts["wait_empty"]}
{parts["expect"]}
mad.lo.u32 %a, %stage, {TILE_BYTES}, %tiles; add.u32 %b, %a, {128 * M}; shl.b32 %x, %k, 7;
{COPY} [%a], [%ma, {{%x, {parts["copy_row"]}}}], [%bar];
{COPY} [%b], [%mb, {{%x, 0}}], [%bar];
add.u32 %k, %k, 1; bra NEXT;
DONE: ret;
"""
    return kernel(
        body, ".param .align 64 .b8 ma[128], .param .align 64 .b8 mb[128], .param .u64 out, .param .u32 steps", "gemm"
    )


def run_gemm(text: str, steps: int = 9, **settings: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """What the kernel gives, what it should, and the launch's statistics."""
    import ml_dtypes

    from moekern.backends.cuda.emulator import TensorMap

    rng = np.random.default_rng(7)
    a, b = (rng.integers(-4, 5, (rows, 128 * steps)).astype(ml_dtypes.float8_e4m3fn) for rows in (M, N))
    out = np.full((M, N), np.nan, np.float32)
    maps = [TensorMap(x.view(np.uint8), (x.shape[0], 128), swizzle=128) for x in (a, b)]
    told = module(text).launch("gemm", 1, 160, [*maps, out, steps], **settings)
    return out, a.astype(np.float32) @ b.astype(np.float32).T, told
