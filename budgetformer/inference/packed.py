"""The compact pass: packed tokens, and only the kept heads of each layer.

The items of a batch are concatenated, N tokens in all, so no padding is ever multiplied. With
ranked heads, items at the same step keep the same heads, and a layer multiplies only the rows and
columns of its weights that belong to them. If items keep different heads, a few head sets run one
after the other, and more are routed (`budgetformer.inference.routed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgetformer.cost.macs import MacCounts, Sizes
from budgetformer.inference.backends.kernels import Kernels, plain
from budgetformer.inference.backends.linear import (
    PackLinear,
    RangeCheck,
    linear_packer,
    padded_rows,
)
from budgetformer.inference.backends.private import without_overrides
from budgetformer.inference.batch_offsets import BatchOffsets
from budgetformer.inference.routed import PlainSums, RoutedBackend, RoutedWeights, Routing
from budgetformer.inference.shared import SharedTensors
from budgetformer.inference.texts import TokenColumns
from budgetformer.inference.weights import HeadSet, SliceCache
from budgetformer.model.answers import fuse
from budgetformer.model.budget import budget_step
from budgetformer.model.encoder import SequenceClassifier
from budgetformer.model.layer import EncoderLayer, LayerWeights, run_layer
from budgetformer.model.step0 import ExitHead
from budgetformer.model.tfidf import StepZero

MAX_SETS = 2
"""Head sets of a layer up to which they run one after the other; more are routed."""

CPU_ROWS, CPU_ROUTED_ROWS = 512, 2048
"""Tokens per pass on a CPU, with the same heads and with routed heads.

Larger batches fall out of the caches. Routing splits the tokens by head, so it needs more of them
to make each matrix product large enough.
"""
GPU_ROWS = 16384
"""Tokens per pass on a GPU, which is fully used with far fewer."""

DECISION = 0
"""Stands for the decision where recorded passes and benchmarks list steps; step 0 has no pass."""


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of B items, one item after another.

    Attributes:
        input_ids: token ids [N].
        token_type_ids: segment ids [N].
        lengths: number of tokens of each item.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: tuple[int, ...]

    def part(self, items: slice) -> PackedTokens:
        """Return the items from `items.start` to before `items.stop`."""
        if items.stop - items.start == len(self.lengths):
            return self
        ends = [0, *accumulate(self.lengths)]
        rows = slice(ends[items.start], ends[items.stop])
        return PackedTokens(self.input_ids[rows], self.token_type_ids[rows], self.lengths[items])

    @classmethod
    def pack(
        cls, items: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None
    ) -> PackedTokens:
        """Pack the token ids of items; `segments` None means all 0."""
        return cls.of(TokenColumns.of(items, segments))

    @classmethod
    def of(cls, columns: TokenColumns) -> PackedTokens:
        """Pack columns of token ids."""
        ids = torch.from_numpy(columns.ids.astype(np.int64))
        kinds = columns.types
        types = torch.zeros_like(ids) if kinds is None else torch.from_numpy(kinds.astype(np.int64))
        return cls(ids, types, tuple(columns.counts))

    @classmethod
    def filler(cls, lengths: Sequence[int]) -> PackedTokens:
        """Return items of these lengths with arbitrary content, to time or warm up a pass."""
        ids = torch.zeros(sum(lengths), dtype=torch.long)
        return cls(ids, ids, tuple(lengths))

    def to(self, device: torch.device) -> PackedTokens:
        """Return the same tokens on `device`."""
        if self.input_ids.device == device:
            return self
        return PackedTokens(self.input_ids.to(device), self.token_type_ids.to(device), self.lengths)


@dataclass(frozen=True)
class BudgetPrediction:
    """What step 0, f_o and g_d predict for B items before the encoder runs.

    Attributes:
        budget: share of the heads that f_o, the budget controller, predicts, [B]; None if the
            layers decide (scope "layer").
        exit_logits: step 0's logits [B, C]; None without a step 0.
        ranking: heads of each layer in the order of g_d, the relevance scorer, best first,
            [B, L, H]; None if the order is the same for all inputs (head_selection "ranked"), or
            the layers decide.
    """

    budget: Tensor | None
    exit_logits: Tensor | None
    ranking: Tensor | None

    @classmethod
    def join(cls, parts: Sequence[BudgetPrediction]) -> BudgetPrediction:
        """Concatenate the predictions for several batches."""

        def concatenate(values: list[Tensor | None]) -> Tensor | None:
            present = [value for value in values if value is not None]
            return torch.cat(present) if present else None

        if len(parts) == 1:
            return parts[0]
        return cls(
            concatenate([part.budget for part in parts]),
            concatenate([part.exit_logits for part in parts]),
            concatenate([part.ranking for part in parts]),
        )


@dataclass(frozen=True)
class PassResult:
    """The result of a pass over B items.

    Attributes:
        logits: logits [B, C].
        selected_heads: heads that each item computed in each layer, [B][L].
    """

    logits: Tensor
    selected_heads: list[list[HeadSet]]

    @classmethod
    def join(cls, parts: Sequence[PassResult]) -> PassResult:
        """Concatenate the results of several passes."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.logits for part in parts]),
            [item for part in parts for item in part.selected_heads],
        )


P = ParamSpec("P")
R = TypeVar("R")


def without_gradients(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method without gradients and without torch's checks for `__torch_function__`.

    With these checks, packed weights raise and catch an exception at every product, and parameters
    look up a missing attribute. For a short text, that takes as long as the product.
    """

    @wraps(method)
    def run(*given: P.args, **named: P.kwargs) -> R:
        with torch.inference_mode(), without_overrides():
            return method(*given, **named)

    return run


class PackedPass:
    """Run a BudgetFormer over packed tokens, computing only the chosen heads.

    Args:
        model: network; in float32 its weights are shared, not copied.
        precision: precision of the matrix products, one of `PRECISIONS`.
        kernels: implementation of all operations except matrix products.
        packers: functions that pack the linear maps of each layer; empty: chosen by precision.
        range_check: counts int8 states outside their calibrated ranges.
    """

    def __init__(
        self,
        model: SequenceClassifier,
        precision: str = "float32",
        kernels: Kernels = plain,
        packers: Sequence[PackLinear] = (),
        range_check: RangeCheck | None = None,
    ) -> None:
        self.range_check = range_check or RangeCheck()
        self.model = model.eval()
        self.config = model.config
        self.encoder = model.encoder
        self.precision = precision
        self.precision_reason = "as configured"
        # Copied, because reading an attribute of a Transformers configuration takes microseconds.
        self.sizes = Sizes.of(self.config)
        self._layers = self.encoder.encoder_layers
        self._norms_last = self.config.norm_position == "pre"
        self._mean = self.config.pooling == "mean"
        self._max_tokens = self.config.max_position_embeddings
        self.kernels = kernels
        self._first: list[HeadSet] = [tuple(range(k)) for k in range(self.sizes.heads + 1)]
        self.num_steps = self.config.num_steps
        steps = range(1, self.num_steps + 1)
        self._plans = [[0] * self.sizes.layers, *map(self.config.heads_per_layer, steps)]
        self.macs = MacCounts(self.sizes, self._plans)
        self.step0 = model.step0_with_numpy()
        self._shared: SharedTensors | None = None
        with torch.no_grad():
            packers = packers or [linear_packer(precision)] * len(self._layers)
            distances = self.encoder.embedded_distances()
            self._slices = SliceCache(self._layers, self.sizes, precision, packers, distances)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def nbytes(self) -> int:
        """Memory of the weights and of the slices packed so far, in bytes."""
        tensors = (*self.model.parameters(), *self.model.buffers(), *self._slices.weights)
        storages = [tensor.untyped_storage() for tensor in tensors]
        by_address = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(by_address.values()) + self._slices.nbytes

    def free_model_weights(self) -> None:
        """Free the model's layer matrices, of which the pass has copies or views.

        Only the pass can run the network afterwards.
        """
        for layer in self._layers:
            for module in (*layer.attention.modules(), *layer.feed_forward.modules()):
                if isinstance(module, nn.Linear):
                    empty = module.weight.new_empty(0)
                    module.weight = nn.Parameter(empty, requires_grad=False)

    def forget(self) -> None:
        """Drop all packed slices; they are packed again on demand."""
        self._slices.forget()

    def share(self, link: Path) -> None:
        """Share the weights' memory with all processes that use the same link.

        Args:
            link: see `SharedFile`.

        Raises:
            OSError: the weights cannot be shared, and are unchanged.
        """
        self._shared = SharedTensors(link)
        tables = [p for p in self.model.parameters() if p.dim() == 2 and p.is_contiguous()]
        held = (*tables, *self.model.buffers(), *self._slices.weights)
        self._shared.hold([tensor for tensor in held if tensor.numel()])
        self.step0 = self.model.step0_with_numpy()
        self.forget()

    def stop_sharing(self) -> None:
        """Unlink the shared memory of the weights; processes that mapped it keep it."""
        if self._shared is not None:
            self._shared.forget()

    @without_gradients
    def warm(self, steps: Sequence[int]) -> None:
        """Pack the weights of some ladder steps, and compile the products that need it.

        In bfloat16 on a CPU, oneDNN compiles each matrix product on first use for each padded
        number of rows (see `padded_rows`); this compiles all numbers up to `CPU_ROWS`.
        """
        for step in steps:
            self.run_at(step, PackedTokens.filler([min(self._max_tokens, 32)]))
        if self.precision == "bfloat16" and self.device.type == "cpu":
            sizes = sorted({padded_rows(rows) for rows in range(CPU_ROWS + 1)})
            kept = {k: i for s in steps for i, k in enumerate(self._plan(s)) if k}
            for num_heads, index in kept.items():
                self._slices.get(index, self._first[num_heads]).warm(sizes, self.sizes)
        self.range_check.take()  # discards the counts of the warm-up

    @without_gradients
    def decide(
        self, tokens: PackedTokens, full_text: PackedTokens | None = None
    ) -> BudgetPrediction:
        """Decide budgets and heads for B items from step 0 and the pooled embeddings.

        Args:
            tokens: items, truncated to the maximum length of the encoder.
            full_text: full texts of the items, which a TF-IDF step 0 reads; None: the same tokens.
        """
        if self.sizes.one_budget:
            return BudgetPrediction(torch.ones(len(tokens.lengths)), None, None)
        step0, full_text = self.step0, full_text or tokens
        return BudgetPrediction.join(
            [
                self._decide_part(tokens.part(part))
                if step0 is None
                else self._decide_with_numpy(step0, tokens.part(part), full_text.part(part))
                for part in self._parts(tokens.lengths)
            ]
        )

    def _decide_part(self, tokens: PackedTokens) -> BudgetPrediction:
        return self._decide(tokens.to(self.device), self._offsets_of(tokens))

    def _decide_with_numpy(
        self, step0: StepZero, tokens: PackedTokens, full_text: PackedTokens
    ) -> BudgetPrediction:
        """Decide on the host, where the tokens are; only g_d's ranking needs the embeddings."""
        ids, segments = (t.numpy() for t in (full_text.input_ids, full_text.token_type_ids))
        exit_logits, s = step0.decide(ids, segments, full_text.lengths)
        ranking = self._rank(tokens) if self.sizes.picks_heads else None
        return BudgetPrediction(torch.from_numpy(s), torch.from_numpy(exit_logits), ranking)

    @without_gradients
    def rank(self, tokens: PackedTokens) -> Tensor:
        """Return the heads of each layer ordered by g_d, best first, for B items: [B, L, H]."""
        parts = self._parts(tokens.lengths)
        return torch.cat([self._rank(tokens.part(part)) for part in parts])

    def _rank(self, tokens: PackedTokens) -> Tensor:
        decision, offsets = self.encoder.decision, self._offsets_of(tokens)
        assert decision is not None
        assert decision.scorer is not None
        pooled = self.kernels.mean(self._embed(tokens.to(self.device), offsets), offsets)
        scores: Tensor = decision.scorer(pooled)
        return scores.argsort(dim=-1, descending=True, stable=True)

    def _decide(self, tokens: PackedTokens, offsets: BatchOffsets) -> BudgetPrediction:
        exit_logits = evidence = None
        if isinstance(self.model.exit_head, ExitHead):
            bag = self.kernels.bag(tokens.input_ids, offsets, self.model.exit_head)
            exit_logits = self.model.exit_head.logits(bag)
            evidence = self.kernels.exit_evidence(exit_logits, self.config.problem_type)
        decision = self.encoder.decision
        if decision is None:
            return BudgetPrediction(None, exit_logits, None)
        pooled = self.kernels.mean(self._embed(tokens, offsets), offsets)
        ranking = None
        if decision.scorer is not None:
            ranking = decision.scorer(pooled).argsort(dim=-1, descending=True, stable=True)
        return BudgetPrediction(decision.budget(pooled, evidence), exit_logits, ranking)

    @without_gradients
    def run(
        self,
        tokens: PackedTokens,
        steps: Sequence[int] | None = None,
        exit_logits: Tensor | None = None,
        ranking: Tensor | None = None,
        ceilings: Sequence[int] | None = None,
        fused: bool = True,
    ) -> PassResult:
        """Run the encoder over B items.

        Args:
            tokens: tokens of the items.
            steps: ladder step >= 1 of each item; None lets each layer decide (scope "layer").
            exit_logits: `BudgetPrediction.exit_logits` of the items, [B, C].
            ranking: `BudgetPrediction.ranking` of the items, [B, L, H].
            ceilings: highest step of each item if the layers decide; None: the ladder's last.
            fused: combine the encoder's logits with step 0's, weighted as configured; False: return
                the encoder's logits only, on which calibration fits those weights.

        Raises:
            ValueError: steps are missing (scope "input") or not on the ladder.
        """
        if steps is None and not self.sizes.layerwise:
            raise ValueError("this network's budgets are decided before the pass: pass `steps`")
        if steps is not None and 0 in steps and self.model.exit_head is not None:
            raise ValueError("step 0 has no pass: `decide` returns its answer")
        if not self.sizes.layerwise and self.sizes.picks_heads and ranking is None:
            raise ValueError("this network's heads are chosen before the pass: pass `ranking`")

        def run_part(part: slice) -> PassResult:
            return self._run(
                tokens.part(part),
                None if steps is None else steps[part],
                None if exit_logits is None else exit_logits[part],
                None if ranking is None else ranking[part],
                None if ceilings is None else ceilings[part],
                fused,
            )

        return PassResult.join([run_part(part) for part in self._parts(tokens.lengths)])

    def run_at(self, step: int, tokens: PackedTokens) -> PassResult:
        """Run all items at one step, with the heads that g_d ranks first and without step 0."""
        ranks = self.sizes.picks_heads and not self.sizes.layerwise
        ranking = self.rank(tokens) if ranks else None
        return self.run(tokens, [step] * len(tokens.lengths), ranking=ranking)

    def recorded(
        self,
        step: int,  # noqa: ARG002
        tokens: PackedTokens,  # noqa: ARG002
    ) -> Callable[[], None] | None:
        """Return a function that replays the pass of items as a CUDA graph, to time it.

        The function does not transfer the items to the device. None: there is no such graph.
        """
        return None

    @property
    def _max_rows(self) -> int:
        """Maximum tokens per pass."""
        if self.device.type != "cpu":
            return GPU_ROWS
        return CPU_ROUTED_ROWS if self.sizes.picks_heads else CPU_ROWS

    def _parts(self, lengths: Sequence[int]) -> list[slice]:
        """Split a batch into parts of at most `_max_rows` tokens; a longer item is its own part."""
        max_rows = self._max_rows
        if sum(lengths) <= max_rows:
            return [slice(0, len(lengths))]
        parts, start, rows = [], 0, 0
        for item, length in enumerate(lengths):
            if item > start and rows + length > max_rows:
                parts.append(slice(start, item))
                start, rows = item, 0
            rows += length
        return [*parts, slice(start, len(lengths))]

    def _run(
        self,
        tokens: PackedTokens,
        steps: Sequence[int] | None,
        exit_logits: Tensor | None,
        ranking: Tensor | None,
        ceilings: Sequence[int] | None,
        fused: bool,
    ) -> PassResult:
        tokens = tokens.to(self.device)
        offsets = self._offsets_of(tokens)
        states = self._embed(tokens, offsets)
        if self.precision == "bfloat16":
            spare = padded_rows(len(states)) - len(states)
            states = F.pad(states, (0, 0, 0, spare))
        heads_by_item = self.sizes.picks_heads or self.sizes.layerwise
        same_step = steps is not None and steps.count(steps[0]) == len(steps)
        if same_step and not heads_by_item and steps is not None:
            steps = steps[:1]
            plan = [self._first[count] for count in self._plan(steps[0])]
            selected_heads = [plan] * len(tokens.lengths)
            for index, head_set in enumerate(plan):
                states = self._run_set(index, states, offsets, head_set)
        else:
            states, selected_heads = self._run_mixed(states, offsets, steps, ranking, ceilings)
        logits = self._classify(states, offsets)
        if fused and steps is not None:
            if exit_logits is not None:
                exit_logits = exit_logits.to(self.device)
            by_step = list(zip(self.config.encoder_weights, self.config.exit_weights, strict=True))
            weights = logits.new_tensor([by_step[step - 1] for step in steps])
            logits = fuse(logits, exit_logits, weights[:, :1], weights[:, 1:])
        return PassResult(logits, selected_heads)

    def _run_mixed(
        self,
        states: Tensor,
        offsets: BatchOffsets,
        steps: Sequence[int] | None,
        ranking: Tensor | None,
        ceilings: Sequence[int] | None,
    ) -> tuple[Tensor, list[list[HeadSet]]]:
        """Run items that may keep different heads; return their states and each item's heads."""
        plans = None if steps is None else [self._plan(step) for step in steps]
        order: list[list[HeadSet]] | None = None if ranking is None else ranking.tolist()
        selected_heads: list[list[HeadSet]] = [[] for _ in offsets.lengths]
        for index, layer in enumerate(self._layers):
            counts = None if plans is None else [plan[index] for plan in plans]
            best = None if order is None else [of_item[index] for of_item in order]
            if layer.decision is not None:
                pooled = self.kernels.mean(states, offsets)
                if counts is None:
                    counts = self._layer_counts(layer, index, pooled, ceilings)
                best = self._layer_order(layer, pooled)
            assert counts is not None
            sets = self._head_sets(counts, best)
            for item, head_set in zip(selected_heads, sets, strict=True):
                item.append(head_set)
            states = self._run_layer(index, states, offsets, sets)
        return states, selected_heads

    def _plan(self, step: int) -> list[int]:
        if 0 < step <= self.num_steps:
            return self._plans[step]
        return self.config.heads_per_layer(step)  # raises ValueError

    def _offsets_of(self, tokens: PackedTokens) -> BatchOffsets:
        offsets = BatchOffsets(tokens.lengths, self.device)
        if offsets.longest > self._max_tokens:
            raise ValueError(
                f"a text has {offsets.longest} tokens, but the network has only "
                f"{self._max_tokens} positions"
            )
        return offsets

    def _embed(self, tokens: PackedTokens, offsets: BatchOffsets) -> Tensor:
        ids, kinds, by = tokens.input_ids, tokens.token_type_ids, self.encoder.embeddings
        return self.kernels.embed(ids, kinds, offsets, by, torch.float32)

    def _classify(self, states: Tensor, offsets: BatchOffsets) -> Tensor:
        if self._norms_last:
            states = self.encoder.final_norm(states.float())
        if self._mean and self.model.head is None:
            return self.kernels.classify(states, offsets, self.model.classifier)
        if self._mean:
            return self.model.classify(self.kernels.mean(states, offsets))
        if not len(states):
            states = states.new_zeros(1, self.sizes.width)
        first = states[offsets.starts[:-1].clamp(max=len(states) - 1)]
        return self.model.classify(torch.where(offsets.empty, 0, first.float()))

    def _layer_counts(
        self, layer: EncoderLayer, index: int, pooled: Tensor, ceilings: Sequence[int] | None
    ) -> list[int]:
        """Return how many heads each item keeps in a layer, by the layer's f_o."""
        assert layer.decision is not None
        steps = budget_step(layer.decision.budget(pooled), self.config.num_steps)
        if ceilings is not None:
            steps = torch.minimum(steps, torch.tensor(ceilings, device=steps.device))
        return [self._plan(step)[index] for step in steps.tolist()]

    def _layer_order(self, layer: EncoderLayer, pooled: Tensor) -> list[HeadSet] | None:
        """Return a layer's heads for each item, ordered by the layer's g_d, best first."""
        assert layer.decision is not None
        if layer.decision.scorer is None:
            return None
        scores = layer.decision.scorer(pooled)[:, 0]
        order: list[HeadSet] = scores.argsort(dim=-1, descending=True, stable=True).tolist()
        return order

    def _head_sets(self, counts: list[int], order: list[HeadSet] | None) -> list[HeadSet]:
        if order is None:
            return [self._first[count] for count in counts]
        return [tuple(sorted(best[:count])) for count, best in zip(counts, order, strict=True)]

    def _run_layer(
        self,
        index: int,
        states: Tensor,
        offsets: BatchOffsets,
        sets: Sequence[HeadSet],
    ) -> Tensor:
        if not offsets.num_tokens:
            return states
        groups: dict[HeadSet, list[int]] = {}
        for item, head_set in enumerate(sets):
            groups.setdefault(head_set, []).append(item)
        if len(groups) == 1:
            (head_set,) = groups
            return self._run_set(index, states, offsets, head_set)
        spare_rows = len(states) - offsets.num_tokens
        if len(groups) > MAX_SETS:
            positions = self._slices.layers[index].positions
            interchangeable = positions is None or not positions.tables
            routing = Routing.of(sets, offsets, self.sizes.heads, spare_rows, interchangeable)
            return self._run_routed(index, states, routing)
        *parts, spare = states.split([*offsets.lengths, spare_rows])
        for head_set, items in groups.items():
            group = offsets.select(items)
            packed = torch.cat([parts[i] for i in items])
            result = self._run_set(index, packed, group, head_set)
            for item, part in zip(items, result.split(list(group.lengths)), strict=True):
                parts[item] = part
        return torch.cat([*parts, spare])

    def _run_set(
        self, index: int, states: Tensor, offsets: BatchOffsets, head_set: HeadSet
    ) -> Tensor:
        """Run one layer for items that all keep the same heads."""
        if not head_set or not offsets.num_tokens:
            return states  # a layer without heads is skipped, including its feed-forward net
        kept = self._slices.get(index, head_set)
        return run_layer(states, kept, PackedBackend(self.kernels, offsets))

    def _run_routed(self, index: int, states: Tensor, routing: Routing) -> Tensor:
        """Run one layer for items that keep many different head sets."""
        weights = RoutedWeights(self._slices, index, routing)
        result = run_layer(states, weights, RoutedBackend(self.kernels, routing)).to(states.dtype)
        # Items that have no heads in this layer keep their states.
        return result if routing.used is None else torch.where(routing.used, result, states)


@dataclass(frozen=True)
class PackedBackend(PlainSums):
    """The `Backend` for packed items that keep the same heads."""

    kernels: Kernels
    offsets: BatchOffsets

    def attend(self, projected: Tensor, weights: LayerWeights) -> Tensor:
        """Attend within each item."""
        return self.kernels.attend(projected, self.offsets, weights)

    def add_norm(self, states: Tensor, change: Tensor, layer_norm: nn.Module) -> Tensor:
        """Normalise the sum of states and a change."""
        return self.kernels.add_norm(states, change, layer_norm)
