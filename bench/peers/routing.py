"""The gate, the permutation and back, by torch operators."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from peers import Named

FRESH = 8  # routings of a case, which its calls take in turn: no branch is predicted by heart


class RoutingPeer(Named):
    """The same op: on what a case of subjects/routing.py holds, to an output that is there already."""

    op: str

    def __init__(self, case: Any) -> None:
        self.case = case

    @abstractmethod
    def call(self, turn: int) -> Any: ...


class TorchGate(RoutingPeer):
    name, op = "torch-gate", "moe_gate"
    says = "eager operators: scores, groups by topk and scatter_, topk, gather"

    def call(self, turn: int) -> Any:
        layer, logits = self.case.layer, self.case.logits[turn % FRESH]
        scores = logits.sigmoid() if layer.scoring == "sigmoid" else logits.softmax(1)
        selection = scores if self.case.bias is None else scores + self.case.bias
        if layer.kept_groups < layer.groups:
            grouped = selection.view(len(logits), layer.groups, -1)
            best = grouped.amax(2) if self.case.bias is None else grouped.topk(2, dim=2).values.sum(2)
            kept = best.topk(layer.kept_groups, dim=1, sorted=False).indices
            left_out = torch.ones(len(logits), layer.groups, dtype=torch.bool).scatter_(1, kept, False)
            selection = grouped.masked_fill(left_out.unsqueeze(2), -torch.inf).flatten(1)
        ids = selection.topk(layer.top_k, dim=1, sorted=False).indices
        weights = scores.gather(1, ids)
        if layer.renormalise:
            weights = weights / weights.sum(1, keepdim=True)
        return weights * layer.scaling, ids


class TorchIndexSelect(RoutingPeer):
    name, op, says = "torch-index_select", "moe_permute", "argsort of the ids and index_select(out=)"

    def call(self, turn: int) -> Any:
        order = self.case.ids[turn % FRESH].flatten().argsort(stable=True)
        return torch.index_select(self.case.x, 0, order // self.case.layer.top_k, out=self.case.moved)


class TorchIndexAdd(RoutingPeer):
    name, op, says = "torch-index_add", "moe_unpermute", "a multiplication of all rows and index_add_"

    def __init__(self, case: Any) -> None:
        super().__init__(case)
        self.order = [inverse.flatten().argsort() for inverse in case.inverse]
        self.tokens = [order // case.layer.top_k for order in self.order]

    def call(self, turn: int) -> Any:
        weights = self.case.weights[turn % FRESH].flatten()[self.order[turn % FRESH]]
        terms = self.case.y * weights.to(self.case.y.dtype).unsqueeze(1)
        return self.case.out.zero_().index_add_(0, self.tokens[turn % FRESH], terms)


ROUTING_PEERS: tuple[type[RoutingPeer], ...] = (TorchGate, TorchIndexSelect, TorchIndexAdd)
