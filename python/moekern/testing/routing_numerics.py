"""What a gate and an unpermute may differ from their float64 references by. AssertionErrors name what is wrong."""

from __future__ import annotations

from typing import Any

import torch

from moekern.ops import Routing, moe_gate, moe_unpermute
from moekern.ops.gate import SMALLEST_SUM
from moekern.testing.numerics import half_ulp

_U = 2.0**-24  # half a unit in the last place of f32, relative
_EXP = 8 * _U  # exp and a sigmoid are within 4 ulp
_TINY = 2.0**-125  # scores below f32's normal numbers may be 0


class _GateOracle:
    """Scores and selection values in float64, each with how far f32 arithmetic may be from it."""

    def __init__(
        self,
        logits: torch.Tensor,
        scoring: str = "softmax",
        correction_bias: torch.Tensor | None = None,
        num_expert_group: int = 1,
        topk_group: int = 1,
        mask_value: float = -torch.inf,
        **_: Any,
    ) -> None:
        x = logits.double()
        self.logits = x
        self.bias = torch.zeros(x.shape[1]).double() if correction_bias is None else correction_bias.double()
        if scoring == "softmax":
            # e^d rounds d to f32 first; the sum of E of them, in 16 chains and 4 more steps, inherits their errors.
            self.scores = x.softmax(1)
            distance = (x - x.amax(1, keepdim=True)).abs().nan_to_num(posinf=0.0)
            own = distance * _U + _EXP
            shared = (self.scores * own).sum(1, keepdim=True).nan_to_num() + (x.shape[1] / 16 + 6) * _U
            self.error = self.scores * (own + shared + _U) + _TINY
        else:
            self.scores = x.sigmoid()
            self.error = self.scores * _EXP + _TINY
        self.selection = self.scores + self.bias
        self.selection_error = self.error + self.selection.abs() * _U
        self.masked = torch.zeros_like(self.scores, dtype=torch.bool)
        self.groups_decided = torch.ones(len(x), dtype=torch.bool)
        if topk_group < num_expert_group:
            self._mask(num_expert_group, topk_group, correction_bias is not None)
        self.selection = self.selection.masked_fill(self.masked, mask_value)
        self.selection_error = self.selection_error.masked_fill(self.masked, 0.0)

    def _mask(self, groups: int, kept: int, two: bool) -> None:
        tokens, experts = self.scores.shape
        best = self.selection.reshape(tokens, groups, experts // groups).sort(dim=2, descending=True).values
        value = best[:, :, 0] + best[:, :, 1] if two else best[:, :, 0]
        errors = self.selection_error.reshape(tokens, groups, experts // groups).nan_to_num(posinf=0.0)
        error = errors.amax(2) * (2 if two else 1) + value.abs().nan_to_num(posinf=0.0) * _U
        order = value.sort(dim=1, descending=True, stable=True).indices
        last, first_out = order[:, kept - 1 : kept], order[:, kept : kept + 1]
        gap = value.gather(1, last) - value.gather(1, first_out)
        slack = error.gather(1, last) + error.gather(1, first_out)
        # Where the last one kept ties, the order decides if all that is as good is so by the same logit: a sigmoid of
        # 1 may be one of many.
        top = self.logits.reshape(tokens, groups, experts // groups).amax(2)
        close = (value - value.gather(1, last)).abs() <= error + error.gather(1, last)
        alike = (~close | (top == top.gather(1, last))).all(1, keepdim=True)
        self.groups_decided = ((gap > slack) | (alike & (not two)) | gap.isnan()).squeeze(1)
        out = torch.ones(tokens, groups, dtype=torch.bool)
        out[torch.arange(tokens).unsqueeze(1), order[:, :kept]] = False
        self.masked = out.repeat_interleave(experts // groups, 1)

    def decided(self, topk: int) -> torch.Tensor:
        """The rows whose ids no rounding can change: neighbours in the order are apart, or alike in all respects."""
        order = self.selection.sort(dim=1, descending=True, stable=True).indices[:, : topk + 1]
        value, error = self.selection.gather(1, order), self.selection_error.gather(1, order)
        gap = value[:, :-1] - value[:, 1:]
        apart = (gap > error[:, :-1] + error[:, 1:]) | gap.isnan()
        alike = torch.ones_like(apart)
        for what in (self.logits, self.bias.expand_as(self.logits)):
            chosen = what.gather(1, order)
            alike &= (chosen[:, :-1] == chosen[:, 1:]) | (chosen[:, :-1].isnan() & chosen[:, 1:].isnan())
        hidden = self.masked.gather(1, order)
        alike = (alike & ~hidden[:, :-1] & ~hidden[:, 1:]) | (hidden[:, :-1] & hidden[:, 1:])
        alike |= value[:, :-1].isinf() & (value[:, :-1] == value[:, 1:])
        return (apart | alike).all(1) & self.groups_decided


def check_gate(got: Routing, logits: torch.Tensor, topk: int, exact: bool = False, **options: Any) -> float:
    """The share of rows whose ids no rounding could have changed. Those must be the reference's.

    exact: all rows are such, because their selection values are exact in f32.
    Of the others, the selection values must be the reference's within the error of f32. Weights must be the scores of
    the ids within that error.
    """
    oracle = _GateOracle(logits, **options)
    reference = moe_gate.reference(logits, topk, **options)
    ids = got.ids.long()
    assert got.weights.dtype == torch.float32 and got.ids.dtype == torch.int32
    assert ids.shape == got.weights.shape == reference.ids.shape, f"shape {list(ids.shape)}"
    tokens, experts = logits.shape
    assert ((ids >= 0) & (ids < experts)).all(), "an id is no expert"
    again = torch.zeros(tokens, experts).scatter_add(1, ids, torch.ones(ids.shape))
    assert (again <= 1).all(), f"row {int((again > 1).any(1).int().argmax())} has an expert twice"
    decided = torch.ones(tokens, dtype=torch.bool) if exact else oracle.decided(topk)
    wrong = (ids != reference.ids) & decided.unsqueeze(1)
    if wrong.any():
        row = int(wrong.any(1).int().argmax())
        raise AssertionError(
            f"ids[{row}] are {ids[row].tolist()}, the reference {reference.ids[row].tolist()}, of selection values "
            f"{oracle.selection[row].gather(0, reference.ids[row].long()).tolist()}; {int(wrong.any(1).sum())} rows of "
            f"{tokens} are wrong"
        )
    near = oracle.groups_decided & ~decided
    value = [oracle.selection.gather(1, i.long()) for i in (ids, reference.ids)]
    slack = sum(oracle.selection_error.gather(1, i.long()) for i in (ids, reference.ids))
    far = ((value[0] - value[1]).abs() > slack) & near.unsqueeze(1)
    assert not far.any(), (
        f"ids of row {int(far.any(1).int().argmax())} have other selection values than the reference's"
    )
    _check_weights(got, oracle, options.get("renormalize", False), options.get("routed_scaling_factor", 1.0))
    return decided.double().mean().item() if tokens else 1.0


def _check_weights(got: Routing, oracle: _GateOracle, renormalize: bool, factor: float) -> None:
    ids = got.ids.long()
    expected, error = oracle.scores.gather(1, ids), oracle.error.gather(1, ids)
    if renormalize:
        total = expected.sum(1, keepdim=True) + SMALLEST_SUM
        slack = error.sum(1, keepdim=True) + total * (ids.shape[1] + 1) * _U
        # Where the sum may be as small as its own error nothing is known of the quotients.
        low = (total - slack).clamp(min=SMALLEST_SUM)
        error = (error + expected * slack / total) / low + expected / total * 2 * _U
        expected = expected / total
    expected, error = expected * factor, (error * abs(factor) + expected.abs() * abs(factor) * 2 * _U)
    weights = got.weights.double()
    assert torch.equal(weights.isnan(), expected.isnan()), "a weight is NaN or is not, against the reference"
    wrong = (weights - expected).abs() > error
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"weights{list(at)} is {weights[at].item()!r}, the reference {expected[at].item()!r}, allowed error "
            f"{error[at].item():.3g} ({int(wrong.sum())} of {wrong.numel()} are wrong)"
        )


def sum_in_order(y: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """moe_unpermute's sums in f32, as it promises to round them: [T, H] before the cast."""
    rows = inverse.long()
    kept = rows >= 0
    gathered = torch.cat([y.float(), torch.zeros(1, y.shape[1])])[rows]  # -1 takes the last
    sums = torch.full((len(rows), y.shape[1]), -0.0)
    for slot in range(rows.shape[1]):
        term = gathered[:, slot] if weights is None else weights[:, slot : slot + 1].float() * gathered[:, slot]
        sums = torch.where(kept[:, slot : slot + 1], sums + term, sums)
    return torch.where(kept.any(1, keepdim=True), sums, torch.zeros(()))


def check_unpermute(
    got: torch.Tensor, y: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None = None
) -> None:
    """|out - reference| <= (k + 1) u sum |w y| + half an ulp of out, elementwise; NaN and infinity where due."""
    reference = moe_unpermute.reference(y, inverse, weights)
    magnitude = moe_unpermute.reference(
        y.double().abs().nan_to_num(), inverse, None if weights is None else weights.double().abs()
    )
    error = magnitude * (inverse.shape[1] + 1) * _U + 2.0**-148
    result, finite = got.double(), torch.finfo(got.dtype)
    overflows = reference.abs() + error >= finite.max * (1 + finite.eps / 4)
    infinite = result.isinf() & (result.sign() == reference.sign()) & (reference.isinf() | overflows)
    undecided = overflows & ~reference.isinf()  # inf - inf of partial sums beyond f32
    assert torch.equal(result.isnan() & ~undecided, reference.isnan() & ~undecided), (
        "NaN, or not, against the reference"
    )
    allowed = error + half_ulp(reference.abs() + error, got.dtype)
    wrong = ((result - reference).abs().nan_to_num(nan=0.0) > allowed) & ~infinite & ~reference.isnan()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"out{list(at)} is {result[at].item()!r}, the reference {reference[at].item()!r}, allowed error "
            f"{allowed[at].item():.3g} ({int(wrong.sum())} of {wrong.numel()} are wrong)"
        )
