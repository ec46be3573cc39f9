"""The pass on a GPU: recorded once per step and size, and played again with other texts.

A small step computes for less time than its launches take one by one, so they are recorded as a
CUDA graph. The graph's inputs lie at fixed places; how many items there are and how long each is,
it reads on the device. The host writes them to pinned memory, and they travel while the device
still computes what came before: nothing in a pass waits for the other side.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from triton import OutOfResources

from budgetformer.inference.backends.kernels import JoiningKernels
from budgetformer.inference.backends.kernels.fused import MAX_ROWS, PROGRAMS
from budgetformer.inference.batch_offsets import BatchOffsets, StagedOffsets
from budgetformer.inference.packed import (
    DECISION,
    Decision,
    PackedPass,
    PackedTokens,
    PassResult,
    inferring,
)
from budgetformer.inference.weights import Slice
from budgetformer.model.answers import fuse
from budgetformer.model.encoder import SequenceClassifier

MAX_PROGRAMS = 256
"""Recorded passes that are kept; the least recently used go first."""
MIN_ROWS = 64
ROWS_PER_ITEM = 16
"""There is room for so many items, if the texts are not shorter than that."""
WAVES = 2
"""A pass takes no more rows than so many times what fills a card."""
USUAL_WAVE = PROGRAMS * MAX_ROWS
"""Rows that fill a card, where there is none."""
RING = 4
"""Batches that may be on their way to the device."""
WARM_BATCHES = (1, 8, 32, 64, 128, 256)
"""Numbers of items that loading a model records, up to what is passed together; among them all that
kernels are compiled for.
"""
WARM_TOKENS = 64

TIMED = 5
"""Times that each variant of a pass is timed."""
MAX_FUSED_COLUMNS = 64
"""Columns of the kept heads up to which fused layers are the faster ones; on an H200, with heads of
32 columns, they were with two heads at nearly all sizes and with three heads at none."""

_recording = threading.Lock()
"""CUDA records one graph at a time."""


@dataclass(frozen=True)
class Size:
    """What a recorded pass has room for: N rows and B items of C classes."""

    rows: int
    items: int
    classes: int

    @classmethod
    def of(cls, lengths: Sequence[int], classes: int, wave: int = USUAL_WAVE) -> Size:
        """Return the least size for some items; there are few sizes, so that passes are reused.

        Args:
            lengths: tokens of each item.
            classes: C.
            wave: rows that fill the card: a few more would take nearly twice the time.
        """
        rows, items = _room(max(sum(lengths), MIN_ROWS), wave), len(lengths)
        usual = rows // ROWS_PER_ITEM
        return cls(rows, usual if items <= usual else _power_of_two(items), classes)

    @property
    def parts(self) -> list[int]:
        """Numbers of 32 bits: ids, segments, positions, ends, starts, and step 0's logits."""
        return [*[self.rows] * 4, self.items + 1, self.items * self.classes]

    def full(self, longest: int) -> PackedTokens:
        """Return items that take all the room, none longer than so, to time a pass with."""
        return PackedTokens.filler([min(self.rows // self.items, longest)] * self.items)

    def fill(self, room: Tensor, tokens: PackedTokens, exit_logits: Tensor | None) -> None:
        """Write items to `room` on the host [sum(parts)] as a recorded pass reads them.

        Those that miss are empty. NumPy writes in a third of the time that torch takes.
        """
        flat, tail = room.numpy(), 4 * self.rows
        by_row = flat[:tail].reshape(4, self.rows)
        starts, exits = flat[tail : tail + self.items + 1], flat[tail + self.items + 1 :]
        count, used = len(tokens.input_ids), len(tokens.lengths)
        lengths = np.array(tokens.lengths, dtype=np.int32)
        starts[0] = 0
        lengths.cumsum(out=starts[1 : used + 1])
        starts[used + 1 :] = count
        ids, kinds, places, ends = by_row[:, :count]
        ids[:], kinds[:] = tokens.input_ids.numpy(), tokens.token_type_ids.numpy()
        np.subtract(np.arange(count), starts[:used].repeat(lengths), out=places, casting="unsafe")
        ends[:] = starts[1 : used + 1].repeat(lengths)
        by_row[:3, count:], by_row[3, count:] = 0, count
        if exit_logits is None:
            exits.fill(0)
        else:
            rows = exits.view(np.float32).reshape(self.items, self.classes)
            rows[:used] = exit_logits.cpu().numpy()


@dataclass(frozen=True)
class Program:
    """A recorded pass.

    Attributes:
        inputs: where it reads, as `Size.fill` writes; on the device.
        results: where its answers lie after `play`, [B, ...] each.
        play: runs it.
        slices: the weights that it reads, kept while it lives.
    """

    inputs: Tensor
    results: list[Tensor | None]
    play: Callable[[], None]
    slices: list[Slice]


Slices = dict[int, Slice]
"""By layer, for those that run at all."""
Layers = Callable[[Slices, Tensor, BatchOffsets], Tensor]
"""Runs layers: from states to states [N, D]."""


class GraphedPass(PackedPass):
    """Run arrivals and batches of one step and of ranked heads as recorded passes.

    Other batches run as in `PackedPass`.

    In bfloat16 the states are bfloat16 too: on a GPU a step's time is that of reading them.

    Args:
        model: the network, on the device.
        precision: of matrix products and states, "float32" or "bfloat16".
        kernels: `kernels.gpu`.
        timed: choose the variant of a recorded pass by timing, not by its size. Variants round
            differently, so the same text may get other last digits after a restart.
    """

    def __init__(
        self,
        model: SequenceClassifier,
        precision: str,
        kernels: JoiningKernels,
        timed: bool = False,
    ) -> None:
        super().__init__(model, precision, kernels)
        self.kernels: JoiningKernels = kernels
        self._dtype: torch.dtype = getattr(torch, precision)
        self._timed = timed
        self._classes = self.config.num_classes
        self._programs: OrderedDict[tuple[int, Size], Program] = OrderedDict()
        self._ways: dict[tuple[int, Size], list[Layers]] = {}
        self._wave = _wave(self.device)
        self._outbox = Outbox(self.device) if self.device.type == "cuda" else None
        self._memory = torch.cuda.graph_pool_handle() if self._outbox else None

    def _size(self, lengths: Sequence[int]) -> Size:
        return Size.of(lengths, self._classes, self._wave)

    @property
    def _most_rows(self) -> int:
        return super()._most_rows if self.device.type == "cpu" else WAVES * self._wave

    @inferring
    def warm(self, steps: Sequence[int]) -> None:
        """Lay out the weights of some steps, and record passes of a few common sizes."""
        super().warm(steps)
        length = min(self._most_tokens, WARM_TOKENS)
        batches = [items for items in WARM_BATCHES if items * length <= self._most_rows]
        recorded = [] if self.sizes.picks_heads else [*steps]
        for step in recorded if self.step0 is not None else [DECISION, *recorded]:
            for items in batches:
                self._program(step, self._size([length] * items))

    @inferring
    def recorded(self, step: int, tokens: PackedTokens) -> Callable[[], None] | None:
        """Return what runs items at a step once more; see `PackedPass.recorded`.

        Raises:
            ValueError: an item is too long.
        """
        launched = self.sizes.picks_heads if step != DECISION else self.step0 is not None
        if not len(tokens.input_ids) or launched:
            return None
        self._play(step, tokens, None)
        return self._program(step, self._size(tokens.lengths)).play

    def _run(
        self,
        tokens: PackedTokens,
        steps: Sequence[int] | None,
        exit_logits: Tensor | None,
        ranking: Tensor | None,
        ceilings: Sequence[int] | None,
        fused: bool,
    ) -> PassResult:
        one_step = fused and steps is not None and len(set(steps)) == 1
        if not one_step or self.sizes.picks_heads or not len(tokens.input_ids):
            return super()._run(tokens, steps, exit_logits, ranking, ceilings, fused)
        assert steps is not None
        (logits,) = self._play(steps[0], tokens, exit_logits)
        assert logits is not None
        heads = [self._first[count] for count in self._plan(steps[0])]
        return PassResult(logits, [heads] * len(tokens.lengths))

    def _decide_part(self, tokens: PackedTokens) -> Decision:
        if not len(tokens.input_ids):
            return super()._decide_part(tokens)
        return Decision(*self._play(DECISION, tokens, None))

    def _play(
        self, step: int, tokens: PackedTokens, exit_logits: Tensor | None
    ) -> list[Tensor | None]:
        """Run a recorded pass, and return its results for these items, [B, ...] each."""
        self._offsets_of(tokens)  # refuses what is too long
        size = self._size(tokens.lengths)
        program = self._program(step, size)
        if self._outbox is None:
            size.fill(program.inputs, tokens, exit_logits)
        else:
            self._outbox.send(program.inputs, lambda room: size.fill(room, tokens, exit_logits))
        program.play()
        used = len(tokens.lengths)
        return [None if result is None else result[:used].clone() for result in program.results]

    def _program(self, step: int, size: Size) -> Program:
        """Return the recorded pass for a step and size; record it when it is first asked for."""
        found = self._programs.get((step, size))
        if found is None:
            with _recording:
                found = self._record(step, size)
            self._programs[step, size] = found
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end((step, size))
        return found

    def _record(self, step: int, size: Size) -> Program:
        """Record a pass in the variant for its size, or in all variants to keep the fastest.

        The fastest one is cached per step and size.
        """
        plan = enumerate([] if step == DECISION else self._plan(step))
        slices = {i: self._slices.get(i, self._first[heads]) for i, heads in plan if heads}
        programs = []
        for way in self._ways.get((step, size)) or self._all_ways(slices, size):
            with suppress(OutOfResources):  # of shared memory some cards have less
                programs.append((way, self._record_way(step, size, slices, way)))
                if not self._timed:
                    break
        way, program = programs[_fastest([program for _, program in programs])]
        self._ways[step, size] = [way]
        return program

    def _all_ways(self, slices: Slices, size: Size) -> list[Layers]:
        """Return the variants that can run some layers, the one for this size first.

        Layers of few heads are fused: their products take less time than to write and read what
        lies between them. Where that does not fit the card, the next variant is taken.
        """
        if not self._can_join(slices):
            return [self._unfused]
        fused: list[Layers] = [self._fused]
        if size.rows > self._wave:
            fused.insert(0, partial(self._fused, two_per_sm=True))
        columns = self.sizes.head_size * max(kept.heads for kept in slices.values())
        if self._memory is not None and columns > MAX_FUSED_COLUMNS:
            return [self._unfused, *fused]
        return [*fused, self._unfused]

    def _record_way(self, step: int, size: Size, slices: Slices, layers: Layers) -> Program:
        host = torch.empty(sum(size.parts), dtype=torch.int32)
        size.fill(host, size.full(self._most_tokens), None)
        inputs = host.to(self.device)

        def compute() -> list[Tensor | None]:
            return self._compute(step, inputs, size, lambda *given: layers(slices, *given))

        if self._memory is None:
            results = compute()

            def play() -> None:
                for kept, result in zip(results, compute(), strict=True):
                    if kept is not None and result is not None:
                        kept.copy_(result)

            return Program(inputs, results, play, list(slices.values()))
        # What is compiled or allocated at first use must not be while a graph is recorded.
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(2):
                compute()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            results = compute()
        return Program(inputs, results, graph.replay, list(slices.values()))

    def _compute(
        self,
        step: int,
        inputs: Tensor,
        size: Size,
        layers: Callable[[Tensor, BatchOffsets], Tensor],
    ) -> list[Tensor | None]:
        """Run a step over items as `Size.fill` writes them, without asking the host.

        Returns:
            Logits [B, C]; on arrival what `Decision` holds.
        """
        ids, kinds, places, ends, starts, exits = inputs.split(size.parts)
        offsets = StagedOffsets.of(starts, places, ends)
        if step == DECISION:
            decision = self._decide(PackedTokens(ids, kinds, ()), offsets)
            return [decision.budget, decision.exit_logits, decision.ranking]
        states = self.kernels.embed(ids, kinds, offsets, self.encoder.embeddings, self._dtype)
        logits = self._classify(layers(states, offsets), offsets)
        has_exits = self.model.exit_head is not None
        exit_logits = exits.view(torch.float32).view_as(logits) if has_exits else None
        own, share = self.config.encoder_weights[step - 1], self.config.exit_weights[step - 1]
        return [fuse(logits, exit_logits, own, share)]

    def _unfused(self, slices: Slices, states: Tensor, offsets: BatchOffsets) -> Tensor:
        """Run layers product by product."""
        for layer, kept in slices.items():
            states = self._run_set(layer, states, offsets, self._first[kept.heads])
        return states

    def _can_join(self, slices: Slices) -> bool:
        """Say whether the maps on both sides of every norm can be fused.

        In float32 a card takes its time for the products, and nothing is to be gained.
        """
        exact = self._memory is not None and self._dtype == torch.float32
        if not slices or self._norms_last or exact:
            return False
        return all(
            self.kernels.can_fuse(kept.output, kept.up, kept.attention_norm)
            and self.kernels.can_fuse(kept.down, kept.qkv, kept.feed_forward_norm)
            for kept in slices.values()
        )

    def _fused(
        self, slices: Slices, states: Tensor, offsets: BatchOffsets, two_per_sm: bool = False
    ) -> Tensor:
        """Run layers of three launches each: attention, and the maps on both sides of each norm.

        A product of few heads takes less time than to write and read what lies between it and the
        next. The states are changed in place.
        """
        order = list(slices.values())
        following = [*(kept.qkv for kept in order[1:]), None]
        mapped = order[0].qkv(states)
        for kept, then in zip(order, following, strict=True):
            contexts = self.kernels.attend(mapped, offsets, kept)
            neurons = self.kernels.map_norm_map(
                contexts, kept.output, states, kept.attention_norm, kept.up, offsets, two_per_sm
            )
            mapped = self.kernels.map_norm_map(
                neurons, kept.down, states, kept.feed_forward_norm, then, offsets, two_per_sm
            )
        return states


def _fastest(programs: Sequence[Program]) -> int:
    """Return which program runs a full batch in the least time; several are played by turns."""
    least = [float("inf")] * len(programs)
    for _ in range(TIMED if len(programs) > 1 else 0):
        for place, program in enumerate(programs):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            program.play()
            last.record()
            last.synchronize()
            least[place] = min(least[place], first.elapsed_time(last))
    return least.index(min(least))


class Outbox:
    """Pinned memory through which batches travel to a GPU while it computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._slots = [Slot() for _ in range(RING)]
        self._turn = 0

    def send(self, target: Tensor, write: Callable[[Tensor], None]) -> None:
        """Let `write` fill pinned memory like `target`, which has it before what is queued next."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % RING
        slot.arrived.synchronize()  # long ago, unless the device is `RING` batches behind
        slot.fit(target)
        write(slot.host[: len(target)])
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_event(slot.read)
        with torch.cuda.stream(self._stream):
            slot.landing[: len(target)].copy_(slot.host[: len(target)], non_blocking=True)
            slot.arrived.record()
        computing.wait_event(slot.arrived)
        target.copy_(slot.landing[: len(target)])
        slot.read.record(computing)


class Slot:
    """Room for one batch on its way: pinned on the host, and where it lands on the device."""

    def __init__(self) -> None:
        self.host = self.landing = torch.empty(0, dtype=torch.int32)
        self.arrived, self.read = torch.cuda.Event(), torch.cuda.Event()

    def fit(self, target: Tensor) -> None:
        """Make room for `target`; growing waits for the device, and seldom happens."""
        if len(self.host) < len(target):
            torch.cuda.synchronize(target.device)
            count = _power_of_two(len(target))
            self.host = torch.empty(count, dtype=torch.int32, pin_memory=True)
            self.landing = torch.empty(count, dtype=torch.int32, device=target.device)


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _room(value: int, wave: int) -> int:
    """Return the least number that holds `value`, of 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...

    Whole waves count too.
    """
    grain = max(_power_of_two(value) // 8, 1)
    room, waves = -(-value // grain) * grain, -(-value // wave)
    return min(room, waves * wave) if waves <= WAVES else room


def _wave(device: torch.device) -> int:
    """Return how many rows a card takes, if each multiprocessor runs one program of most rows."""
    if device.type != "cuda":
        return USUAL_WAVE
    return MAX_ROWS * int(torch.cuda.get_device_properties(device).multi_processor_count)
