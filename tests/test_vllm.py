"""moekern.compat.vllm against the plain functions, and against plain loops."""

from __future__ import annotations

import pytest
import torch

import moekern
import moekern.compat.vllm as vllm_moe

T, E, TOPK, H = 37, 12, 3, 70


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def routed() -> torch.Tensor:
    return moekern.moe_gate(rand(T, E), TOPK).ids


def aligned(ids: torch.Tensor, block: int, experts: int, label: dict[int, int]) -> tuple[list[int], list[int]]:
    """Slots expert by expert, each padded to whole blocks, and the label of every block. By loops."""
    slots: list[int] = []
    labels: list[int] = []
    flat = ids.flatten().tolist()
    for expert in range(experts):
        own = [slot for slot, of in enumerate(flat) if of == expert]
        own += [len(flat)] * (-len(own) % block)
        slots += own
        labels += [label[expert]] * (len(own) // block)
    return slots, labels


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("block", [1, 4, 16, 128])
def test_align_block_size(block: int, pad: bool) -> None:
    ids = routed()
    sorted_ids, expert_ids, total = vllm_moe.moe_align_block_size(ids, block, E, pad_sorted_ids=pad)
    slots, labels = aligned(ids, block, E, {e: e for e in range(E)})
    length = ids.numel() + E * (block - 1)
    length = -(-length // block) * block if pad else length
    assert sorted_ids.tolist() == slots + [ids.numel()] * (length - len(slots))
    assert expert_ids.tolist() == labels + [-1] * (-(-length // block) - len(labels))
    assert total.tolist() == [len(slots)]
    assert sorted_ids.dtype == expert_ids.dtype == total.dtype == torch.int32


def test_the_example_of_its_documentation() -> None:
    """Tokens 2 3 4 | 1 2 4 | 1 3 4 | 1 2 3 in blocks of 4, experts counted from 1 there."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)
    sorted_ids, expert_ids, total = vllm_moe.moe_align_block_size(ids - 1, 4, 4)
    assert sorted_ids[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert expert_ids[:4].tolist() == [0, 1, 2, 3] and total.item() == 16


@pytest.mark.parametrize("ignore", [False, True])
def test_align_block_size_with_a_map(ignore: bool) -> None:
    ids = routed()
    expert_map = torch.full((E,), -1, dtype=torch.int32)
    expert_map[2::3] = torch.arange(4, dtype=torch.int32)
    sorted_ids, expert_ids, total = vllm_moe.moe_align_block_size(ids, 8, E, expert_map, ignore_invalid_experts=ignore)
    kept = torch.where(expert_map[ids.long()] < 0, -1, ids) if ignore else ids
    slots, labels = aligned(kept, 8, E, dict(enumerate(expert_map.tolist())))
    assert sorted_ids[: len(slots)].tolist() == slots and (sorted_ids[len(slots) :] == ids.numel()).all()
    assert expert_ids[: len(labels)].tolist() == labels and (expert_ids[len(labels) :] == -1).all()
    assert total.item() == len(slots)


def test_align_block_size_of_few_slots() -> None:
    """Fewer slots than experts: a block each is enough."""
    sorted_ids, expert_ids, total = vllm_moe.moe_align_block_size(torch.tensor([[7, 3]]), 16, 64)
    assert sorted_ids.shape == (32,) and expert_ids.tolist() == [3, 7] and total.item() == 32
    assert sorted_ids[0] == 1 and sorted_ids[16] == 0 and (sorted_ids == 2).sum() == 30
    empty = vllm_moe.moe_align_block_size(torch.zeros(0, 2, dtype=torch.int32), 16, 64)
    assert [x.tolist() for x in empty] == [[], [], [0]]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_permute_and_unpermute(mapped: bool, into: bool) -> None:
    ids, x = routed(), rand(T, H)
    expert_map, experts = None, -1
    if mapped:
        expert_map, experts = torch.full((E,), -1, dtype=torch.int32), 4
        expert_map[2::3] = torch.arange(4, dtype=torch.int32)
    target = torch.zeros(T * TOPK, H) if into else None
    rows, scale, offsets, inverse, permuted = vllm_moe.moe_permute(x, None, ids, E, experts, expert_map, target)
    assert scale is None and (rows is target) == into
    local = ids if expert_map is None else expert_map[ids.long()]
    count = 4 if mapped else E
    sizes = torch.bincount(local[local >= 0].flatten(), minlength=count)
    assert offsets.tolist() == [0, *sizes.cumsum(0).tolist()] and offsets.dtype == torch.int64
    used = int(offsets[-1])
    assert torch.equal(rows[:used], x[permuted[:used].long() // TOPK])
    assert (permuted[used:] == T * TOPK).all()
    assert torch.equal(inverse[permuted[:used].long()], torch.arange(used, dtype=torch.int32))
    out, weights = torch.zeros(T, H), torch.rand(T, TOPK)
    assert vllm_moe.moe_unpermute(out, rows, weights, inverse, offsets) is None
    here = (local >= 0).float()
    torch.testing.assert_close(out, x * (weights * here).sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("into", [False, True])
def test_permute_with_scales(into: bool) -> None:
    q, s = moekern.per_token_cast_to_fp8(rand(T, 300))
    target = torch.zeros(T * TOPK, 300).to(q.dtype) if into else None
    rows, scale, *_, permuted = vllm_moe.moe_permute(q, s, routed(), E, permuted_hidden_states=target)
    source = permuted.long() // TOPK
    assert torch.equal(rows.view(torch.uint8), q.view(torch.uint8)[source]) and torch.equal(scale, s[source])


def test_gates_are_moe_gate() -> None:
    x, logits, bias = rand(T, H), rand(T, E), rand(E)
    weights, ids, indices = vllm_moe.fused_topk(x, logits, TOPK, True)
    expected = moekern.moe_gate(logits, TOPK, renormalize=True)
    assert torch.equal(weights, expected.weights) and torch.equal(ids, expected.ids)
    assert indices[5].tolist() == [5, T + 5, 2 * T + 5] and indices.dtype == torch.int32
    weights, ids = vllm_moe.grouped_topk(x, logits, TOPK, True, 4, 2, "sigmoid", 2.5, bias)
    expected = moekern.moe_gate(
        logits, TOPK, scoring="sigmoid", correction_bias=bias, num_expert_group=4, topk_group=2, renormalize=True,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    assert torch.equal(weights, expected.weights) and torch.equal(ids, expected.ids)


def test_what_is_refused() -> None:
    ids = routed()
    with pytest.raises(ValueError, match="moe_align_block_size: expert_map has shape"):
        vllm_moe.moe_align_block_size(ids, 16, E, torch.zeros(E - 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="n_local_expert is 4 of 12"):
        vllm_moe.moe_permute(rand(T, H), None, ids, E, 4)
    with pytest.raises(ValueError, match="fused_topk: hidden_states has 36 rows"):
        vllm_moe.fused_topk(rand(T - 1, H), rand(T, E), TOPK, True)
    with pytest.raises(ValueError, match="moe_align_block_size: block_size is 0"):
        vllm_moe.moe_align_block_size(ids, 0, E)
