"""fused_experts: every kernel in every form against the float64 reference, and what has to hold between calls."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import executors
import pytest
import torch
from test_determinism import flushing_denormals, rounding_up, same

import moekern
from moekern import ExpertWeights, GroupedLayout, ScaledTensor, batched_experts, fused_experts, fused_experts_workspace
from moekern.testing import cases, expert_cases
from moekern.testing.expert_cases import Experts
from moekern.testing.expert_numerics import experts_oracle
from moekern.testing.numerics import GemmOracle, check_bound, check_exact, check_rms


@functools.lru_cache(maxsize=2)  # a case and its exact twin, for all kernels in turn
def problem(case: Experts) -> tuple[expert_cases.Operands, GemmOracle]:
    p = expert_cases.operands(case)
    return p, experts_oracle(*p.arguments, **p.options)


def run(executor: executors.Executor, case: Experts) -> tuple[torch.Tensor, GemmOracle]:
    """The result of one kernel on one case, and what it should be."""
    p, oracle = problem(case)
    out = expert_cases.output(case)
    executor(*p.arguments, **p.options, out=out)
    assert cases.only_written(out), "wrote outside of out"
    return out, oracle


@executors.of(fused_experts)
@pytest.mark.parametrize("case", expert_cases.EXPERTS, ids=str)
def test_experts(executor: executors.Executor, case: Experts) -> None:
    if (exact := expert_cases.exact(case)) is not None:
        check_exact(*run(executor, exact))
    result, oracle = run(executor, case)
    check_bound(result, oracle)
    if case.x == "f32" and not case.quantize:  # elsewhere rms is a matter of which values of h crossed a boundary
        check_rms(result, oracle)


@pytest.mark.parametrize("executor", executors.this_machine(fused_experts), ids=str)
def test_more_tokens_than_fit_memory_at_once(executor: executors.Executor) -> None:
    """Kernels take tokens in chunks: here hidden states alone are more than 64 MiB."""
    p, reference = large()
    assert torch.equal(executor(*p.arguments, **p.options).double(), reference)


@functools.cache
def large() -> tuple[expert_cases.Operands, torch.Tensor]:
    case = Experts(1100, 12, 4100, 4, 4, x="f32", routing="skips", shared=1, values="integers")
    p = expert_cases.operands(case)
    return p, fused_experts.reference(*p.arguments, **p.options)


# ---- the reference -----------------------------------------------------------------------------------


def test_the_reference_is_what_models_compute() -> None:
    """Token by token, in the words of gpt-oss: torch/model.py's swiglu on interleaved rows, and its sum."""
    case = Experts(5, 60, 40, 4, 2, x="f32", bias="f32", form="interleaved", alpha=1.702, beta=1.0, limit=1.5)
    p = expert_cases.operands(case)
    expected = torch.zeros(5, 60, dtype=torch.float64)
    matrices = p.experts.projections()
    for t in range(5):
        for e, w in zip(p.ids[t].tolist(), p.weights[t].tolist(), strict=True):
            (gate, gate_bias), (up, up_bias), (down, down_bias) = matrices[e]
            x = p.x[t].double()
            x_glu = gate.to_float64() @ x + gate_bias.double()
            x_linear = up.to_float64() @ x + up_bias.double()
            x_glu, x_linear = x_glu.clamp(max=1.5), x_linear.clamp(-1.5, 1.5)
            h = (x_glu * torch.sigmoid(1.702 * x_glu) * (x_linear + 1)).float().double()
            expected[t] += w * (down.to_float64() @ h + down_bias.double())
    reference = fused_experts.reference(*p.arguments, **p.options)
    torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("activation", "function"), [("silu", "silu"), ("gelu", "none"), ("gelu_tanh", "tanh")])
def test_activations_are_torchs(activation: str, function: str) -> None:
    p = expert_cases.operands(Experts(4, 60, 40, 2, 1, x="f32"))
    one = (
        torch.nn.functional.silu
        if function == "silu"
        else functools.partial(torch.nn.functional.gelu, approximate=function)
    )
    expected = torch.zeros(4, 60, dtype=torch.float64)
    for t, e in enumerate(p.ids[:, 0].tolist()):
        w = p.experts.expert(e)
        h = one(w.gate @ p.x[t].double()) * (w.up @ p.x[t].double())
        expected[t] = w.down @ h.float().double() * p.weights[t, 0].double()
    reference = fused_experts.reference(*p.arguments, activation="swiglu" if activation == "silu" else activation)
    torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-12)
    got = fused_experts(*p.arguments, activation=activation)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


# ---- between calls -----------------------------------------------------------------------------------

ANY_ROWS = [e for e in executors.executors(fused_experts) if not e.name.endswith("_stream")]


def part(p: expert_cases.Operands, rows: slice | torch.Tensor) -> tuple[Any, ...]:
    """The operands of some tokens."""
    if isinstance(p.x, ScaledTensor):
        data = p.x.data.view(torch.uint8)[rows].view(p.x.data.dtype)
        return ScaledTensor(data, p.x.scale[rows], p.x.block), p.experts, p.ids[rows], p.weights[rows]
    return p.x[rows], p.experts, p.ids[rows], p.weights[rows]


@pytest.mark.parametrize("executor", ANY_ROWS, ids=str)
@pytest.mark.parametrize("x", ["bf16", "e4m3fn"])
def test_a_token_does_not_depend_on_the_others(executor: executors.Executor, x: str) -> None:
    """Every token alone, and tokens among others, have the bits they have together."""
    p = expert_cases.operands(Experts(61, 300, 200, 5, 2, x=x, routing="skewed", out="f32"))
    together = executor(*p.arguments, out_dtype=torch.float32)
    for rows in (*(slice(t, t + 1) for t in range(0, 61, 6)), slice(7, 24), slice(0, 60, 2)):
        assert same(executor(*part(p, rows), out_dtype=torch.float32), together[rows]), f"tokens {rows} have other bits"


@pytest.mark.parametrize("x", ["bf16", "f32", "e4m3fn"])
def test_batch_invariant(x: str) -> None:
    p = expert_cases.operands(Experts(70, 300, 200, 5, 2, x=x, shared=1))
    with moekern.use(batch_invariant=True):
        together = fused_experts(*p.arguments, **p.options)
        for tokens in (1, 2, 5, 16, 33, 64):
            assert same(fused_experts(*part(p, slice(tokens)), **p.options), together[:tokens]), tokens


@executors.of(fused_experts)
def test_the_order_of_experts_does_not_matter(executor: executors.Executor) -> None:
    """Renumbered experts give each slot the same bits; their sum may be added up in another order."""
    case = Experts(23, 200, 130, 6, 3, form="list", reduce=False)
    p = expert_cases.operands(case)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    gate_up, down = ([p.experts.projections()[e][which][0] for e in order.tolist()] for which in (0, 2))
    renumbered = ExpertWeights(gate_up, down)
    ids = order.argsort()[p.ids]
    assert same(executor(p.x, renumbered, ids, p.weights, reduce=False), executor(*p.arguments, reduce=False))
    check_bound(executor(p.x, renumbered, ids, p.weights), experts_oracle(*p.arguments))


@executors.of(fused_experts)
def test_forms_give_the_same_bits(executor: executors.Executor) -> None:
    """gate and up as halves of a matrix, as matrices of their own, and row by row in turns; of equal scales."""
    g = torch.Generator().manual_seed(0)
    codes = [moekern.per_block_cast_to_fp8(torch.randn(256, 140, generator=g)).data for _ in range(3)]
    scales = [torch.rand(1, 2, generator=g) for _ in range(3)]
    w2 = [moekern.per_block_cast_to_fp8(torch.randn(140, 128, generator=g)) for _ in range(3)]
    turns = [torch.stack(c.view(torch.uint8).chunk(2), 1).flatten(0, 1).view(c.dtype) for c in codes]

    def blocks(matrices: list[torch.Tensor], rows: int) -> list[ScaledTensor]:
        return [ScaledTensor(data, scale, (rows, 128)) for data, scale in zip(matrices, scales, strict=True)]

    stack = torch.stack([c.view(torch.uint8) for c in codes]).view(torch.float8_e4m3fn)
    forms = [
        ExpertWeights(blocks(codes, 256), w2),
        ExpertWeights(ScaledTensor(stack, torch.stack(scales), (256, 128)), w2),
        ExpertWeights((stack, torch.stack(scales).expand(-1, 2, -1)), w2, split_scales=True),
        ExpertWeights([(c, s.expand(2, -1)) for c, s in zip(codes, scales, strict=True)], w2),
        ExpertWeights.separate(blocks([c[:128] for c in codes], 128), blocks([c[128:] for c in codes], 128), w2),
        ExpertWeights(blocks(turns, 256), w2, interleaved=True),
    ]
    x = torch.randn(19, 140, generator=g).bfloat16()
    ids, weights = torch.randint(0, 3, (19, 2), generator=g), torch.rand(19, 2, generator=g)
    first, *others = (executor(x, experts, ids, weights) for experts in forms)
    for i, other in enumerate(others, 1):
        assert same(other, first), f"form {i} gives other bits"


@executors.of(fused_experts)
@pytest.mark.parametrize(
    "case", [Experts(tokens, 420, 260, 7, 3, routing="skewed", shared=1, quantize=True) for tokens in (3, 50)], ids=str
)
def test_any_number_of_threads(executor: executors.Executor, case: Experts) -> None:
    p = expert_cases.operands(case)
    results = []
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            results.append(executor(*p.arguments, **p.options))
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("mode", [flushing_denormals, rounding_up])
@executors.of(fused_experts)
def test_in_any_float_mode(executor: executors.Executor, mode: Any) -> None:
    for case in (Experts(9, 150, 80, 4, 2, values="codes", x="f32"), Experts(9, 150, 80, 4, 2, quantize=True)):
        p = expert_cases.operands(case)
        expected = executor(*p.arguments, **p.options)
        with mode():
            got = executor(*p.arguments, **p.options)
        assert same(got, expected)


# ---- hostile operands --------------------------------------------------------------------------------


@executors.of(fused_experts)
@pytest.mark.parametrize("quantize", [False, True])
def test_nan_stays_in_its_token(executor: executors.Executor, quantize: bool) -> None:
    p = expert_cases.operands(Experts(8, 150, 80, 4, 2))
    clean = executor(*p.arguments, quantize_activations=quantize)
    x, weights = p.x.clone(), p.weights.clone()
    x[2, 149] = torch.nan
    weights[5, 1] = torch.nan
    got = executor(x, p.experts, p.ids, weights, quantize_activations=quantize)
    assert got[[2, 5]].isnan().all()
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    assert same(got[others], clean[others])


@executors.of(fused_experts)
def test_a_skipped_slot_is_not_read(executor: executors.Executor) -> None:
    p = expert_cases.operands(Experts(8, 150, 80, 4, 2))
    x, ids, weights = p.x.clone(), p.ids.clone(), p.weights.clone()
    x[3], ids[3] = torch.nan, -1
    ids[6, 0], weights[6, 0] = -1, torch.nan
    got = executor(x, p.experts, ids, weights)
    assert same(got[3], torch.zeros_like(got[3])) and got.isfinite().all()
    check_bound(got[6:7], experts_oracle(p.x[6:7], p.experts, ids[6:7, 1:], weights[6:7, 1:]))


@executors.of(fused_experts)
@pytest.mark.parametrize("broken", ["data", "scale"])
def test_a_broken_expert_spoils_its_tokens_only(executor: executors.Executor, broken: str) -> None:
    case = Experts(24, 150, 80, 4, 1, form="separate")
    p = expert_cases.operands(case)
    clean = executor(*p.arguments)
    (gate, _), *_ = p.experts.projections()[1]
    if broken == "data":
        gate.data.view(torch.uint8)[17, 40] = 0x7F
    else:
        gate.scale.view(torch.float32)[0, 1] = torch.nan
    got = executor(*p.arguments)
    spoilt = p.ids[:, 0] == 1
    assert spoilt.any() and got[spoilt].isnan().all()
    assert same(got[~spoilt], clean[~spoilt])


@executors.of(fused_experts)
def test_an_expert_twice_in_a_row_counts_twice(executor: executors.Executor) -> None:
    p = expert_cases.operands(Experts(8, 150, 80, 4, 2, x="f32"))
    ids, weights = p.ids[:, :1].expand(-1, 2), torch.tensor([0.25, 0.5]).expand(8, 2)
    once = executor(p.x, p.experts, ids[:, :1], torch.full((8, 1), 0.75))
    torch.testing.assert_close(executor(p.x, p.experts, ids, weights), once, rtol=1e-5, atol=1e-5)


# ---- the caller's memory -----------------------------------------------------------------------------


@executors.of(fused_experts)
@pytest.mark.parametrize(("tokens", "x", "options"), [
    (1, "bf16", {}),
    (37, "f32", {"shared": True}),
    (37, "e4m3fn", {"reduce": False}),
    (9, "bf16", {"quantize_activations": True, "shared": True}),
])  # fmt: skip
def test_workspace(executor: executors.Executor, tokens: int, x: str, options: dict[str, Any]) -> None:
    p = expert_cases.operands(Experts(tokens, 150, 80, 4, 2, x=x, shared=1))
    options = {**options, "shared": p.options["shared"] if options.get("shared") else None}
    if reason := executor.absent or executor.why_not(*p.arguments, **options):
        pytest.skip(f"{executor.name} {reason}")
    if ":" in executor.name:
        pytest.skip("the sizes are of kernels of this machine")
    with moekern.use(kernel={"fused_experts": executor.name}):
        dtype = p.x.data.dtype if isinstance(p.x, ScaledTensor) else p.x.dtype
        size = fused_experts_workspace(tokens, 2, p.experts, dtype=dtype, **options)
        memory = torch.full((size + 96,), 0xFF, dtype=torch.uint8)
        for offset in (0, 1, 63):  # aligned or not
            workspace = memory[offset : offset + size]
            got = fused_experts(*p.arguments, **options, workspace=workspace)
            assert same(got, fused_experts(*p.arguments, **options))
            assert (memory[offset + size :] == 0xFF).all() and (memory[:offset] == 0xFF).all()
            memory.fill_(0xFF)
        if size:
            with pytest.raises(ValueError, match=rf"workspace has {size - 1} bytes; {executor.name} needs {size}"):
                fused_experts(*p.arguments, **options, workspace=memory[: size - 1])


def test_workspace_holds_for_any_routing() -> None:
    for tokens in (1, 16, 200):
        p = expert_cases.operands(Experts(tokens, 150, 80, 6, 3))
        size = fused_experts_workspace(tokens, 3, p.experts)
        workspace = torch.zeros(size, dtype=torch.uint8)
        for ids in (p.ids, torch.zeros_like(p.ids), torch.full_like(p.ids, -1), torch.full_like(p.ids, 5)):
            fused_experts(p.x, p.experts, ids, p.weights, workspace=workspace)


def test_weights_are_used_where_they_lie() -> None:
    data, scale = torch.zeros(3, 256, 140).to(torch.float8_e4m3fn), torch.ones(3, 2, 2)
    down = [(torch.zeros(140, 128).to(torch.float8_e4m3fn), torch.ones(2, 1)) for _ in range(3)]
    experts = ExpertWeights((data, scale), down)
    for e, ((gate, _), (up, _), (third, _)) in enumerate(experts.projections()):
        assert gate.data.data_ptr() == data[e].data_ptr() and gate.scale.data_ptr() == scale[e].data_ptr()
        assert up is gate and experts.up_first == 128
        assert third.data.data_ptr() == down[e][0].data_ptr()
    interleaved = ExpertWeights((data, scale), down, interleaved=True)
    (gate, _), (up, _), _ = interleaved.projections()[1]
    assert gate.data.data_ptr() == data[1].data_ptr() and up.data.data_ptr() == data[1, 1].data_ptr()


def test_weights_outlive_their_owner() -> None:
    """A parameter that is given other memory, or deleted, leaves the experts what they were made of."""
    p = expert_cases.operands(Experts(4, 140, 128, 3, 2))
    x, ids, weights = p.x, p.ids, p.weights
    w13, w2 = (moekern.per_block_cast_to_fp8(torch.randn(256, 140)) for _ in range(2))
    gate_up = torch.nn.Parameter(w13.data.clone(), requires_grad=False)
    down = moekern.per_block_cast_to_fp8(torch.randn(140, 128))
    experts = ExpertWeights([(gate_up, w13.scale)] * 3, [down] * 3)
    before = fused_experts(x, experts, ids, weights)
    gate_up.data = w2.data.clone()
    del w13, down
    gc.collect()
    torch.zeros(1 << 20)
    assert same(fused_experts(x, experts, ids, weights), before)
    gone = weakref.ref(experts)
    del experts
    assert gone() is None, "a cycle keeps the weights"


def test_tensors_and_layout_say_everything() -> None:
    for form in expert_cases.FORMS:
        p = expert_cases.operands(Experts(6, 150, 192, 4, 2, form=form, bias="bf16"))
        again = ExpertWeights.from_tensors(p.experts.tensors, p.experts.layout)
        assert again.layout == p.experts.layout
        expected = fused_experts(*p.arguments)
        assert same(fused_experts(p.x, again, p.ids, p.weights), expected), form


# ---- experts with rows of their own ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_batched(dtype: torch.dtype) -> None:
    p = expert_cases.operands(Experts(1, 150, 80, 4, 1, x="f32"))
    g = torch.Generator().manual_seed(0)
    x = torch.full((4, 5, 150), torch.nan)
    counts = torch.tensor([3, 0, 5, 1], dtype=dtype)
    for e, n in enumerate(counts.tolist()):
        x[e, :n] = torch.randn(n, 150, generator=g)
    got = batched_experts(x, p.experts, counts)
    out = torch.full_like(x, torch.nan)
    assert batched_experts(x, p.experts, GroupedLayout.from_masked(counts, 5), out=out) is out
    assert same(out, got)
    for e, n in enumerate(counts.tolist()):
        assert not got[e, n:].any()
        if n:
            check_bound(got[e, :n], experts_oracle(x[e, :n], p.experts, torch.full((n, 1), e)))


def test_batched_from_a_larger_buffer() -> None:
    p = expert_cases.operands(Experts(1, 150, 80, 4, 1, x="f32"))
    buffer = torch.randn(4, 9, 150)
    counts = torch.tensor([2, 5, 0, 4])
    assert same(
        batched_experts(buffer[:, :5], p.experts, counts), batched_experts(buffer[:, :5].clone(), p.experts, counts)
    )


def test_where_the_routers_weights_go() -> None:
    """On the input they pass through the activation; without the sum they are left out."""
    p = expert_cases.operands(Experts(6, 150, 80, 4, 2, x="f32"))
    slots = fused_experts(*p.arguments, reduce=False).view(6, 2, 150)
    torch.testing.assert_close(
        (slots * p.weights.unsqueeze(2)).sum(1), fused_experts(*p.arguments), rtol=1e-5, atol=1e-5
    )
    scaled = [p.x * p.weights[:, j, None] for j in range(2)]
    parts = [fused_experts(x, p.experts, p.ids[:, j, None]) for j, x in enumerate(scaled)]
    torch.testing.assert_close(
        parts[0] + parts[1], fused_experts(*p.arguments, apply_router_weight_on_input=True), rtol=1e-4, atol=1e-4
    )


def test_experts_that_live_elsewhere() -> None:
    """Two halves of the experts, each with its map: their results add up to the whole."""
    p = expert_cases.operands(Experts(21, 150, 80, 6, 3, x="f32", form="list"))
    matrices = p.experts.projections()
    total = torch.zeros(21, 150)
    for here in ((0, 2, 4), (1, 3, 5)):
        local = ExpertWeights([matrices[e][0][0] for e in here], [matrices[e][2][0] for e in here])
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[list(here)] = torch.arange(3, dtype=torch.int32)
        total += fused_experts(p.x, local, p.ids, p.weights, expert_map=expert_map)
    torch.testing.assert_close(total, fused_experts(*p.arguments), rtol=1e-5, atol=1e-5)
