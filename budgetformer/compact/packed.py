"""The compact pass in plain torch: packed tokens, and weight slices per head set.

Items of one batch lie one after another, N tokens in all, so no padding is ever multiplied. In each
layer the items are grouped by the set of heads that they keep; a group is one pass over the rows
and columns of the weights that belong to those heads. With ranked heads and one step there is one
group, and its weights are views of the first rows and columns, not copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.cost import Sizes
from budgetformer.modeling import (
    BudgetFormerForSequenceClassification,
    EncoderLayer,
    budget_step,
    exit_evidence,
)

HeadSet = tuple[int, ...]

SLICE_CACHE_BYTES = 256 * 2**20
"""Room for gathered weight slices; the least recently used go first."""


@dataclass(frozen=True)
class PackedTokens:
    """Token and segment ids of B items, one after another: [N] each, with their `lengths`."""

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def pack(
        cls, items: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None
    ) -> PackedTokens:
        """Pack the ids of some items; `segments` None means segment 0 throughout."""
        flat = [token for item in items for token in item]
        kinds = (
            [0] * len(flat) if segments is None else [kind for item in segments for kind in item]
        )
        lengths = tuple(len(item) for item in items)
        return cls(
            torch.tensor(flat, dtype=torch.long), torch.tensor(kinds, dtype=torch.long), lengths
        )

    def to(self, device: torch.device) -> PackedTokens:
        """Return the same tokens on `device`."""
        return PackedTokens(self.input_ids.to(device), self.token_type_ids.to(device), self.lengths)


@dataclass(frozen=True)
class Arrival:
    """What is known of B items before the encoder runs.

    budget: f_o's s [B]; None when the layers decide for themselves.
    exit_logits: step 0's answer [B, C]; None without a step 0.
    ranking: g_d's heads of each layer, best first [B, L, H]; None when ranked or layer-wise.
    """

    budget: Tensor | None
    exit_logits: Tensor | None
    ranking: Tensor | None


@dataclass(frozen=True)
class PassResult:
    """Logits [B, C], and for each item the heads that were computed in each layer."""

    logits: Tensor
    heads: list[list[HeadSet]]


@dataclass(frozen=True)
class _LayerWeights:
    """One layer's weights for k heads (all of them, or the slice that a head set keeps).

    Queries, keys and values are interleaved by head, [k * 3 * D/H, D], so that the first heads of a
    ranked layer are its first rows.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor

    @classmethod
    def of(cls, layer: EncoderLayer, num_heads: int) -> _LayerWeights:
        attention, net = layer.attention, layer.feed_forward
        projections = (attention.query, attention.key, attention.value)
        weight = torch.stack([p.weight.unflatten(0, (num_heads, -1)) for p in projections], dim=1)
        bias = torch.stack([p.bias.unflatten(0, (num_heads, -1)) for p in projections], dim=1)
        return cls(
            weight.flatten(0, 2),
            bias.flatten(),
            attention.output.weight,
            attention.output.bias,
            net.up.weight,
            net.up.bias,
            net.down.weight,
            net.down.bias,
        )

    def keep(
        self, head_set: HeadSet, head_size: int, neurons_per_head: int | None
    ) -> _LayerWeights:
        if head_set == tuple(range(len(head_set))):
            heads: slice | Tensor = slice(0, len(head_set) * head_size)
            fused: slice | Tensor = slice(0, len(head_set) * head_size * 3)
            neurons: slice | Tensor = slice(0, len(head_set) * (neurons_per_head or 0))
        else:
            heads = _spread(head_set, head_size)
            fused = _spread(head_set, head_size * 3)
            neurons = _spread(head_set, neurons_per_head or 0)
        if neurons_per_head is None:
            neurons = slice(None)
        return _LayerWeights(
            self.qkv_weight[fused],
            self.qkv_bias[fused],
            self.output_weight[:, heads],
            self.output_bias,
            self.up_weight[neurons],
            self.up_bias[neurons],
            self.down_weight[:, neurons],
            self.down_bias,
        )

    @property
    def bytes(self) -> int:
        return sum(cast(Tensor, getattr(self, field.name)).nbytes for field in fields(self))


def _spread(head_set: HeadSet, size: int) -> Tensor:
    return (torch.tensor(head_set).unsqueeze(1) * size + torch.arange(size)).flatten()


class PackedPass:
    """Run a BudgetFormer over packed tokens, computing the chosen heads only."""

    def __init__(self, model: BudgetFormerForSequenceClassification) -> None:
        self.model = model.eval()
        self.config = model.config
        self.encoder = model.encoder
        self.sizes = Sizes.of(self.config)
        with torch.no_grad():
            self._weights = [
                _LayerWeights.of(x, self.config.num_attention_heads)
                for x in self.encoder.encoder_layers
            ]
        self._slices: OrderedDict[tuple[int, HeadSet], _LayerWeights] = OrderedDict()
        self._slices_bytes = 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @torch.inference_mode()
    def arrive(self, tokens: PackedTokens) -> Arrival:
        """Decide budgets and heads for B items before the encoder runs.

        Pooled embeddings are all that this needs.
        """
        tokens = tokens.to(self.device)
        owner = self._owner(tokens.lengths)
        exit_logits = evidence = None
        if self.model.exit_head is not None:
            exit_logits = self._exit_logits(tokens, owner)
            evidence = exit_evidence(exit_logits, self.config.problem_type)
        decision = self.encoder.decision
        if decision is None:
            return Arrival(None, exit_logits, None)
        pooled = self._pool(self._embed(tokens), owner, tokens.lengths)
        ranking = None
        if decision.scorer is not None:
            ranking = decision.scorer(pooled).argsort(dim=-1, descending=True, stable=True)
        return Arrival(decision.budget(pooled, evidence), exit_logits, ranking)

    @torch.inference_mode()
    def run(
        self,
        tokens: PackedTokens,
        steps: Sequence[int] | None = None,
        exit_logits: Tensor | None = None,
        ranking: Tensor | None = None,
        ceilings: Sequence[int] | None = None,
    ) -> PassResult:
        """Run the encoder over B items.

        Args:
            tokens: the items.
            steps: ladder step >= 1 of each item; None lets each layer decide (scope "layer").
            exit_logits: the items' `Arrival.exit_logits` [B, C].
            ranking: the items' `Arrival.ranking` [B, L, H].
            ceilings: highest step of each item where the layers decide; None: the ladder's last.

        Raises:
            ValueError: steps are missing (scope "input") or not on the ladder.
        """
        if steps is None and self.config.budget_scope == "input":
            raise ValueError("a budget is decided before the pass: give the steps")
        if steps is not None and 0 in steps and self.config.embedding_exit:
            raise ValueError("step 0 answers on arrival, it has no pass")
        if self.config.budget_scope == self.config.head_selection == "input" and ranking is None:
            raise ValueError("heads are chosen before the pass: give the ranking")
        plans = None if steps is None else [self.config.heads_per_layer(step) for step in steps]
        tokens = tokens.to(self.device)
        owner = self._owner(tokens.lengths)
        states = self._embed(tokens)
        heads: list[list[HeadSet]] = [[] for _ in tokens.lengths]
        for index, layer in enumerate(self.encoder.encoder_layers):
            counts = None if plans is None else [plan[index] for plan in plans]
            order: list[Any] | None = None if ranking is None else ranking[:, index].tolist()
            if layer.decision is not None:
                pooled = self._pool(states, owner, tokens.lengths)
                if counts is None:
                    counts = self._own_counts(layer, index, pooled, ceilings)
                order = self._own_order(layer, pooled)
            assert counts is not None
            sets = self._head_sets(counts, order)
            for item, head_set in zip(heads, sets, strict=True):
                item.append(head_set)
            states = self._run_layer(index, layer, states, tokens.lengths, sets)
        states = self.encoder.final_norm(states)
        logits = self.model.classify(self._summary(states, owner, tokens.lengths))
        if exit_logits is not None and steps is not None:
            shares = self.config.exit_weights
            weights = logits.new_tensor([shares[step - 1] for step in steps])
            logits = logits + weights.unsqueeze(-1) * exit_logits.to(self.device)
        return PassResult(logits, heads)

    def _owner(self, lengths: Sequence[int]) -> Tensor:
        return torch.arange(len(lengths), device=self.device).repeat_interleave(
            torch.tensor(lengths, dtype=torch.long, device=self.device)
        )

    def _embed(self, tokens: PackedTokens) -> Tensor:
        longest = max(tokens.lengths, default=0)
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"{longest} tokens, but only {self.config.max_position_embeddings} positions"
            )
        positions = [torch.arange(length, device=self.device) for length in tokens.lengths]
        together = torch.cat(positions) if positions else tokens.input_ids
        return cast(
            Tensor, self.encoder.embeddings(tokens.input_ids, tokens.token_type_ids, together)
        )

    def _exit_logits(self, tokens: PackedTokens, owner: Tensor) -> Tensor:
        head = self.model.exit_head
        assert head is not None
        rows, counts = tokens.input_ids, tokens.lengths
        if head.buckets and len(rows):
            together = owner[:-1] == owner[1:]
            rows = torch.cat([rows, head.neighbours(rows)[together]])
            owner = torch.cat([owner, owner[:-1][together]])
            counts = tuple(2 * length - 1 if length else 0 for length in counts)
        total: Tensor = head.bias.new_zeros(len(counts), head.weight.embedding_dim)
        total.index_add_(0, owner, head.weight(rows))
        return cast(Tensor, head.logits(total, self._counts(counts)))

    def _counts(self, lengths: Sequence[int]) -> Tensor:
        counts = torch.tensor(lengths, dtype=self.model.dtype, device=self.device)
        return counts.clamp(min=1).unsqueeze(-1)

    def _pool(self, states: Tensor, owner: Tensor, lengths: Sequence[int]) -> Tensor:
        total = states.new_zeros(len(lengths), states.shape[-1])
        return total.index_add_(0, owner, states) / self._counts(lengths)

    def _summary(self, states: Tensor, owner: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.config.pooling == "mean":
            return self._pool(states, owner, lengths)
        first = states.new_zeros(len(lengths), states.shape[-1])
        filled = [i for i, length in enumerate(lengths) if length]
        starts = [sum(lengths[:i]) for i in filled]
        first[filled] = states[starts]
        return first

    def _own_counts(
        self, layer: EncoderLayer, index: int, pooled: Tensor, ceilings: Sequence[int] | None
    ) -> list[int]:
        """Let a layer's own f_o say how many heads each item keeps in it."""
        assert layer.decision is not None
        steps = budget_step(layer.decision.budget(pooled), self.config.num_steps)
        if ceilings is not None:
            steps = torch.minimum(steps, torch.tensor(ceilings, device=steps.device))
        return [self.config.heads_per_layer(step)[index] for step in steps.tolist()]

    def _own_order(self, layer: EncoderLayer, pooled: Tensor) -> list[HeadSet] | None:
        """Let a layer's own g_d order its heads for each item, best first."""
        assert layer.decision is not None
        if layer.decision.scorer is None:
            return None
        scores = layer.decision.scorer(pooled)[:, 0]
        order: list[HeadSet] = scores.argsort(dim=-1, descending=True, stable=True).tolist()
        return order

    def _head_sets(self, counts: list[int], order: list[HeadSet] | None) -> list[HeadSet]:
        if order is None:
            return [tuple(range(count)) for count in counts]
        return [tuple(sorted(best[:count])) for count, best in zip(counts, order, strict=True)]

    def _run_layer(
        self,
        index: int,
        layer: EncoderLayer,
        states: Tensor,
        lengths: Sequence[int],
        sets: Sequence[HeadSet],
    ) -> Tensor:
        groups: dict[HeadSet, list[int]] = {}
        for item, head_set in enumerate(sets):
            groups.setdefault(head_set, []).append(item)
        if len(groups) == 1:
            (head_set,) = groups
            return self._run_group(index, layer, states, lengths, head_set)
        parts = list(states.split(list(lengths)))
        for head_set, items in groups.items():
            group_lengths = [lengths[i] for i in items]
            packed = torch.cat([parts[i] for i in items])
            result = self._run_group(index, layer, packed, group_lengths, head_set)
            for item, part in zip(items, result.split(group_lengths), strict=True):
                parts[item] = part
        return torch.cat(parts)

    def _run_group(
        self,
        index: int,
        layer: EncoderLayer,
        states: Tensor,
        lengths: Sequence[int],
        head_set: HeadSet,
    ) -> Tensor:
        if not head_set or not states.shape[0]:
            return states
        weights = self._slice(index, layer, head_set)
        if layer.post:
            attended = self._attend(states, weights, lengths, len(head_set))
            mixed = layer.attention_norm(states + attended)
            return cast(
                Tensor, layer.feed_forward_norm(mixed + self._transform(mixed, layer, weights))
            )
        attended = self._attend(layer.attention_norm(states), weights, lengths, len(head_set))
        mixed = states + attended
        return mixed + self._transform(layer.feed_forward_norm(mixed), layer, weights)

    def _attend(
        self, states: Tensor, weights: _LayerWeights, lengths: Sequence[int], heads: int
    ) -> Tensor:
        projected = F.linear(states, weights.qkv_weight, weights.qkv_bias)
        # [N, k, 3, D/H] to one [3, k, T, D/H] per item
        per_head = projected.view(states.shape[0], heads, 3, -1).permute(2, 1, 0, 3)
        contexts = [
            F.scaled_dot_product_attention(query[None], key[None], value[None])[0].transpose(0, 1)
            for query, key, value in per_head.split(list(lengths), dim=2)
            if query.shape[1]
        ]
        return F.linear(torch.cat(contexts).flatten(1), weights.output_weight, weights.output_bias)

    def _transform(self, states: Tensor, layer: EncoderLayer, weights: _LayerWeights) -> Tensor:
        neurons = layer.feed_forward.activation(
            F.linear(states, weights.up_weight, weights.up_bias)
        )
        return F.linear(neurons, weights.down_weight, weights.down_bias)

    def _slice(self, index: int, layer: EncoderLayer, head_set: HeadSet) -> _LayerWeights:
        size, neurons = self.sizes.head_size, layer.feed_forward.neurons_per_head
        if not self.sizes.picks_heads:
            return self._weights[index].keep(head_set, size, neurons)
        key = (index, head_set)
        if key in self._slices:
            self._slices.move_to_end(key)
            return self._slices[key]
        made = self._weights[index].keep(head_set, size, neurons)
        self._slices[key] = made
        self._slices_bytes += made.bytes
        while self._slices_bytes > SLICE_CACHE_BYTES and len(self._slices) > 1:
            _, dropped = self._slices.popitem(last=False)
            self._slices_bytes -= dropped.bytes
        return made
