"""Small PTX programs that put operands where they are told to and write down what an instruction made of them.

Each entry takes pointers and, where it copies by TMA, a tensor map first. A block has one warpgroup, or one warp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_HEAD = ".version 8.4\n.target sm_90a\n.address_size 64\n"
SHARED_BYTES = 64 * 1024  # of the tile, given at launch
ALIGNMENT = 1024  # of the tile in shared memory


def _entry(body: str, pointers: int = 2, tensor_map: bool = False, threads: int = 128) -> str:
    maps = [".param .align 64 .b8 map[128]"] if tensor_map else []
    parameters = ",\n  ".join([*maps, *(f".param .u64 p{i}" for i in range(pointers))])
    loads = "\n".join(f"  ld.param.u64 %p{i}, [p{i}];\n  cvta.to.global.u64 %p{i}, %p{i};" for i in range(pointers))
    return f"""{_HEAD}
.extern .shared .align {ALIGNMENT} .b8 tile[];
.visible .entry program(
  {parameters}
)
.reqntid {threads}, 1, 1
{{
  .reg .pred %q<4>;
  .reg .b16 %h<4>;
  .reg .b32 %r<64>;
  .reg .b32 %a<64>;
  .reg .b32 %b<64>;
  .reg .f32 %f<256>;
  .reg .b64 %d<64>;
  .reg .b64 %p<4>;
  .shared .align 8 .b64 barrier;
{loads}
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, tile;
{body}
  ret;
}}
"""


def _copy(count: int, threads: int, into_shared: bool) -> str:
    """count bytes, 4 a thread and round, between p0's memory and the tile, or from the tile to p1's."""
    pointer, label = ("%p0", "IN") if into_shared else ("%p1", "OUT")
    move = (
        "ld.global.b32 %r4, [%d1];\n  st.shared.b32 [%r3], %r4;"
        if into_shared
        else "ld.shared.b32 %r4, [%r3];\n  st.global.b32 [%d1], %r4;"
    )
    return f"""
  shl.b32 %r2, %r0, 2;
{label}:
  cvt.u64.u32 %d0, %r2;
  add.s64 %d1, {pointer}, %d0;
  add.u32 %r3, %r1, %r2;
  {move}
  add.u32 %r2, %r2, {4 * threads};
  setp.lt.u32 %q0, %r2, {count};
  @%q0 bra {label};
"""


def _registers(names: Iterable[str], threads: int, kind: str = "f32") -> str:
    """Stores a thread's registers side by side to p1's memory."""
    names = list(names)
    stores = "\n".join(f"  st.global.{kind} [%d1+{4 * i}], {name};" for i, name in enumerate(names))
    return f"  mul.wide.u32 %d0, %r0, {4 * len(names)};\n  add.s64 %d1, %p1, %d0;\n{stores}"


def _vector(names: Iterable[str]) -> str:
    return "{" + ", ".join(names) + "}"


def wgmma(
    kind: str,
    k: int,
    n: int,
    a: Sequence[int] | None,
    b: Sequence[int],
    base: int,
    mn_major: tuple[bool, bool] = (False, False),
) -> str:
    """A product of one instruction for each of b's descriptors. The tile is p0's memory. a: descriptors, or None for
    operands in registers, which are p0's first words, 4 of every thread of a step."""
    accumulators = [f"%f{i}" for i in range(n // 2)]
    in_tile = 0 if a else 4 * 128 * 4 * len(b)
    lines = [
        f"  add.s64 %p2, %p0, {in_tile};",
        _copy(SHARED_BYTES, 128, True).replace("%p0", "%p2"),
        "  fence.proxy.async;\n  bar.sync 0;",
        f"  sub.u32 %r5, %r1, {base};\n  shr.u32 %r5, %r5, 4;\n  cvt.u64.u32 %d2, %r5;",
        *(f"  mov.f32 {name}, 0f7FC00000;" for name in accumulators),
        "  setp.ne.u32 %q1, 0, 0;\n  setp.eq.u32 %q2, 0, 0;",
    ]
    if not a:
        for step in range(len(b)):
            lines.append("  mul.wide.u32 %d0, %r0, 16;\n  add.s64 %d1, %p0, %d0;")
            words = _vector(f"%a{4 * step + i}" for i in range(4))
            lines.append(f"  ld.global.v4.b32 {words}, [%d1+{step * 128 * 16}];")
    lines.append("  wgmma.fence.sync.aligned;")
    transposed = (
        "" if kind == "e4m3" else f", {int(mn_major[1])}" if not a else f", {int(mn_major[0])}, {int(mn_major[1])}"
    )
    for step, descriptor in enumerate(b):
        lines.append(f"  mov.u64 %d4, {descriptor};\n  add.s64 %d4, %d4, %d2;")
        left = _vector(f"%a{4 * step + i}" for i in range(4))
        if a:
            lines.append(f"  mov.u64 %d3, {a[step]};\n  add.s64 %d3, %d3, %d2;")
            left = "%d3"
        lines.append(
            f"  wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {_vector(accumulators)}, {left}, %d4, "
            f"{'%q2' if step else '%q1'}, 1, 1{transposed};"
        )
    lines.append("  wgmma.commit_group.sync.aligned;\n  wgmma.wait_group.sync.aligned 0;")
    lines.append(_registers(accumulators, 128))
    return _entry("\n".join(lines))


def load_boxes(boxes: Sequence[tuple[int, int]], box_bytes: int) -> str:
    """Boxes at these coordinates, one behind the other into the tile, which then goes to p1's memory."""
    total = len(boxes) * box_bytes
    copies = "\n".join(
        f"""  add.u32 %r6, %r1, {i * box_bytes};
  mov.u32 %r7, {x};
  mov.u32 %r8, {y};
  @%q1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
    [%r6], [%d5, {{%r7, %r8}}], [%r5];"""
        for i, (x, y) in enumerate(boxes)
    )
    body = f"""
  mov.u32 %r5, barrier;
  mov.u64 %d5, map;
  cvta.param.u64 %d5, %d5;
  setp.eq.u32 %q1, %r0, 0;
  @%q1 mbarrier.init.shared::cta.b64 [%r5], 1;
  @%q1 fence.mbarrier_init.release.cluster;
  bar.sync 0;
  @%q1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {total};
{copies}
WAIT:
  mbarrier.try_wait.parity.shared::cta.b64 %q0, [%r5], 0;
  @!%q0 bra WAIT;
{_copy(total, 32, False)}"""
    return _entry(body, tensor_map=True, threads=32)


def store_boxes(boxes: Sequence[tuple[int, int]], box_bytes: int) -> str:
    """The tile, which is p0's memory, to boxes at these coordinates."""
    copies = "\n".join(
        f"""  add.u32 %r6, %r1, {i * box_bytes};
  mov.u32 %r7, {x};
  mov.u32 %r8, {y};
  @%q1 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d5, {{%r7, %r8}}], [%r6];"""
        for i, (x, y) in enumerate(boxes)
    )
    body = f"""
  mov.u64 %d5, map;
  cvta.param.u64 %d5, %d5;
  setp.eq.u32 %q1, %r0, 0;
{_copy(len(boxes) * box_bytes, 32, True)}
  fence.proxy.async.shared::cta;
  bar.sync 0;
{copies}
  @%q1 cp.async.bulk.commit_group;
  @%q1 cp.async.bulk.wait_group 0;
"""
    return _entry(body, tensor_map=True, threads=32)


def _count(variant: str) -> int:
    return int(variant[1])


def _row_address(variant: str) -> str:
    """p0's second word of a lane says at which 16 bytes of the tile its row is."""
    return """
  mul.wide.u32 %d0, %r0, 4;
  add.s64 %d1, %p2, %d0;
  ld.global.b32 %r6, [%d1];
  shl.b32 %r6, %r6, 4;
  add.u32 %r6, %r1, %r6;
"""


def ldmatrix(variant: str) -> str:
    """p0: 512 bytes of the tile, then which row is each lane's."""
    trans = ".trans" if variant.endswith("trans") else ""
    registers = [f"%a{i}" for i in range(_count(variant))]
    body = f"""
  add.s64 %p2, %p0, 512;
{_copy(512, 32, True)}
  bar.sync 0;
{_row_address(variant)}
  ldmatrix.sync.aligned.m8n8.x{_count(variant)}{trans}.shared.b16 {_vector(registers)}, [%r6];
{_registers(registers, 32, "b32")}"""
    return _entry(body, threads=32)


def stmatrix(variant: str) -> str:
    """p0: the registers of each lane, then which row is each lane's."""
    trans = ".trans" if variant.endswith("trans") else ""
    count = _count(variant)
    registers = [f"%a{i}" for i in range(count)]
    loads = "\n".join(f"  ld.global.b32 %a{i}, [%d1+{4 * i}];" for i in range(count))
    body = f"""
  add.s64 %p2, %p0, {32 * 4 * count};
  mul.wide.u32 %d0, %r0, {4 * count};
  add.s64 %d1, %p0, %d0;
{loads}
{_row_address(variant)}
  stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r6], {_vector(registers)};
  bar.sync 0;
{_copy(128 * count, 32, False)}"""
    return _entry(body, threads=32)


def mma(kind: str, k: int) -> str:
    """p0: of each lane four words of A, two of B, four of C."""
    a, b = [f"%a{i}" for i in range(4)], [f"%b{i}" for i in range(2)]
    c, d = [f"%f{i}" for i in range(4)], [f"%f{i}" for i in range(4, 8)]
    loads = "\n".join(f"  ld.global.b32 {name}, [%d1+{4 * i}];" for i, name in enumerate(a + b + c))
    body = f"""
  mul.wide.u32 %d0, %r0, 40;
  add.s64 %d1, %p0, %d0;
{loads}
  mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {_vector(d)}, {_vector(a)}, {_vector(b)}, {_vector(c)};
{_registers(d, 32)}"""
    return _entry(body, threads=32)
