"""The pass on a GPU: recorded once per step and size as a CUDA graph, and replayed with new texts.

Launching the kernels of a small step one by one takes longer than computing them, which a graph
avoids. A graph reads its inputs at fixed addresses, including the number of items and their
lengths. The host writes inputs to pinned memory, and they are copied while the device still
computes earlier passes, so neither side waits for the other.
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

from budgetformer.inference.backends.kernels import FusingKernels
from budgetformer.inference.backends.kernels.fused import MAX_ROWS, PROGRAMS
from budgetformer.inference.batch_offsets import BatchOffsets, StagedOffsets
from budgetformer.inference.packed import (
    DECISION,
    BudgetPrediction,
    PackedPass,
    PackedTokens,
    PassResult,
    without_gradients,
)
from budgetformer.inference.weights import Slice
from budgetformer.model.answers import fuse
from budgetformer.model.encoder import SequenceClassifier

MAX_PROGRAMS = 256
"""Recorded passes that are cached; the least recently used are dropped first."""
MIN_ROWS = 64
ROWS_PER_ITEM = 16
"""A recorded pass has one item per this many rows, unless its texts are shorter on average."""
MAX_WAVES = 2
"""Maximum rows of a pass, in waves: the rows that fill the GPU."""
DEFAULT_WAVE = PROGRAMS * MAX_ROWS
"""Wave size assumed when no GPU is present."""
MAX_UPLOADS = 4
"""Batches that may be in transfer to the device at once."""
WARM_BATCHES = (1, 8, 32, 64, 128, 256)
"""Batch sizes recorded while a model loads; they cover every kernel that has to be compiled."""
WARM_TOKENS = 64
"""Tokens per item in these batches."""

TIMING_ROUNDS = 5
"""Number of times that each variant of a pass is timed."""
MAX_FUSED_COLUMNS = 64
"""Columns of the kept heads up to which fused layers are faster. On an H200 with heads of 32
columns, they were faster with two heads at nearly all sizes, and with three heads at none."""

_recording = threading.Lock()
"""Held while recording, as CUDA records one graph at a time."""


@dataclass(frozen=True)
class Size:
    """The capacity of a recorded pass: N rows and B items of C classes."""

    rows: int
    items: int
    classes: int

    @classmethod
    def of(cls, lengths: Sequence[int], classes: int, wave: int = DEFAULT_WAVE) -> Size:
        """Return the smallest size that holds some items; few sizes exist, so passes are reused.

        Args:
            lengths: number of tokens of each item.
            classes: number of labels C.
            wave: rows that fill the GPU; a few more would take nearly twice the time.
        """
        rows, items = _round_up_rows(max(sum(lengths), MIN_ROWS), wave), len(lengths)
        default = rows // ROWS_PER_ITEM
        return cls(rows, default if items <= default else _power_of_two(items), classes)

    @property
    def parts(self) -> list[int]:
        """Counts of 32-bit values: ids, segments, positions, ends, starts, step 0's logits."""
        return [*[self.rows] * 4, self.items + 1, self.items * self.classes]

    def full_batch(self, longest: int) -> PackedTokens:
        """Return items that fill the capacity, with at most `longest` tokens each, for timing."""
        return PackedTokens.filler([min(self.rows // self.items, longest)] * self.items)

    def fill(self, buffer: Tensor, tokens: PackedTokens, exit_logits: Tensor | None) -> None:
        """Write items to a host buffer [sum(parts)] in the layout that a recorded pass reads.

        Unused items are empty. NumPy takes a third of the time that torch would.
        """
        flat, tail = buffer.numpy(), 4 * self.rows
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
        inputs: input buffer on the device, in the layout of `Size.fill`.
        results: results after `play`, [B, ...] each.
        play: runs the pass.
        slices: weights that the pass reads, which must live as long as it.
    """

    inputs: Tensor
    results: list[Tensor | None]
    play: Callable[[], None]
    slices: list[Slice]


Slices = dict[int, Slice]
"""Slices by layer index, without the layers that keep no head."""
Layers = Callable[[Slices, Tensor, BatchOffsets], Tensor]
"""A variant: runs all layers, from states to states [N, D]."""


class GraphedPass(PackedPass):
    """Run decisions, and batches at one step with ranked heads, as recorded passes.

    Other batches run as in `PackedPass`.

    In bfloat16 the states are bfloat16 too, because reading them dominates a step's time on a GPU.

    Args:
        model: network, on the device.
        precision: precision of matrix products and states, "float32" or "bfloat16".
        kernels: module `kernels.gpu`.
        timed: choose the variant of a recorded pass by timing instead of by its size. Variants
            round differently, so the last digits of an answer may change after a restart.
    """

    def __init__(
        self,
        model: SequenceClassifier,
        precision: str,
        kernels: FusingKernels,
        timed: bool = False,
    ) -> None:
        super().__init__(model, precision, kernels)
        self.kernels: FusingKernels = kernels
        self._dtype: torch.dtype = getattr(torch, precision)
        self._timed = timed
        self._classes = self.config.num_classes
        self._programs: OrderedDict[tuple[int, Size], Program] = OrderedDict()
        self._variants: dict[tuple[int, Size], list[Layers]] = {}
        self._wave = _wave(self.device)
        self._uploader = Uploader(self.device) if self.device.type == "cuda" else None
        self._memory = torch.cuda.graph_pool_handle() if self._uploader else None

    def _size(self, lengths: Sequence[int]) -> Size:
        return Size.of(lengths, self._classes, self._wave)

    @property
    def _max_rows(self) -> int:
        return super()._max_rows if self.device.type == "cpu" else MAX_WAVES * self._wave

    @without_gradients
    def warm(self, steps: Sequence[int]) -> None:
        """Pack the weights of some steps, and record passes of a few common sizes."""
        super().warm(steps)
        length = min(self._max_tokens, WARM_TOKENS)
        batches = [items for items in WARM_BATCHES if items * length <= self._max_rows]
        recorded = [] if self.sizes.picks_heads else [*steps]
        for step in recorded if self.step0 is not None else [DECISION, *recorded]:
            for items in batches:
                self._program(step, self._size([length] * items))

    @without_gradients
    def recorded(self, step: int, tokens: PackedTokens) -> Callable[[], None] | None:
        """Return a function that replays the pass of items at a step; see `PackedPass.recorded`.

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
        selected_heads = [self._first[count] for count in self._plan(steps[0])]
        return PassResult(logits, [selected_heads] * len(tokens.lengths))

    def _decide_part(self, tokens: PackedTokens) -> BudgetPrediction:
        if not len(tokens.input_ids):
            return super()._decide_part(tokens)
        return BudgetPrediction(*self._play(DECISION, tokens, None))

    def _play(
        self, step: int, tokens: PackedTokens, exit_logits: Tensor | None
    ) -> list[Tensor | None]:
        """Run a recorded pass, and return its results for these items, [B, ...] each."""
        self._offsets_of(tokens)  # raises if an item is too long
        size = self._size(tokens.lengths)
        program = self._program(step, size)
        if self._uploader is None:
            size.fill(program.inputs, tokens, exit_logits)
        else:
            self._uploader.send(program.inputs, lambda host: size.fill(host, tokens, exit_logits))
        program.play()
        used = len(tokens.lengths)
        return [None if result is None else result[:used].clone() for result in program.results]

    def _program(self, step: int, size: Size) -> Program:
        """Return the recorded pass for a step and size, recording it on first use."""
        program = self._programs.get((step, size))
        if program is None:
            with _recording:
                program = self._record(step, size)
            self._programs[step, size] = program
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end((step, size))
        return program

    def _record(self, step: int, size: Size) -> Program:
        """Record a pass in the variant for its size or, if `timed`, in the fastest variant.

        The chosen variant is cached per step and size.
        """
        plan = enumerate([] if step == DECISION else self._plan(step))
        slices = {i: self._slices.get(i, self._first[k]) for i, k in plan if k}
        programs = []
        for variant in self._variants.get((step, size)) or self._candidates(slices, size):
            with suppress(OutOfResources):  # some GPUs have too little shared memory for a variant
                programs.append((variant, self._record_variant(step, size, slices, variant)))
                if not self._timed:
                    break
        variant, program = programs[_fastest([program for _, program in programs])]
        self._variants[step, size] = [variant]
        return program

    def _candidates(self, slices: Slices, size: Size) -> list[Layers]:
        """Return the variants that can run these layers, the preferred one for this size first.

        Layers with few heads are fused, because writing and reading intermediate results would take
        longer than the products.
        """
        if not self._can_fuse(slices):
            return [self._unfused]
        fused: list[Layers] = [self._fused]
        if size.rows > self._wave:
            fused.insert(0, partial(self._fused, two_per_sm=True))
        columns = self.sizes.head_size * max(kept.num_heads for kept in slices.values())
        if self._memory is not None and columns > MAX_FUSED_COLUMNS:
            return [self._unfused, *fused]
        return [*fused, self._unfused]

    def _record_variant(self, step: int, size: Size, slices: Slices, layers: Layers) -> Program:
        host = torch.empty(sum(size.parts), dtype=torch.int32)
        size.fill(host, size.full_batch(self._max_tokens), None)
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
        # Compilation and allocation on first use must happen before the graph is recorded.
        side_stream = torch.cuda.Stream(self.device)
        side_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side_stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream(self.device).wait_stream(side_stream)
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
        """Run a step over inputs in the layout of `Size.fill`, without synchronising with the host.

        Returns:
            Logits [B, C]; for `DECISION`, the attributes of `BudgetPrediction`.
        """
        ids, kinds, places, ends, starts, exits = inputs.split(size.parts)
        offsets = StagedOffsets.from_tensors(starts, places, ends)
        if step == DECISION:
            decision = self._decide(PackedTokens(ids, kinds, ()), offsets)
            return [decision.budget, decision.exit_logits, decision.ranking]
        states = self.kernels.embed(ids, kinds, offsets, self.encoder.embeddings, self._dtype)
        logits = self._classify(layers(states, offsets), offsets)
        has_exits = self.model.exit_head is not None
        exit_logits = exits.view(torch.float32).view_as(logits) if has_exits else None
        weights = self.config.encoder_weights[step - 1], self.config.exit_weights[step - 1]
        return [fuse(logits, exit_logits, *weights)]

    def _unfused(self, slices: Slices, states: Tensor, offsets: BatchOffsets) -> Tensor:
        """Run layers with one launch per product."""
        for layer, kept in slices.items():
            states = self._run_set(layer, states, offsets, self._first[kept.num_heads])
        return states

    def _can_fuse(self, slices: Slices) -> bool:
        """Return whether the maps around every norm can be fused.

        In float32 on a GPU they are not, because products dominate the time.
        """
        float32_on_gpu = self._memory is not None and self._dtype == torch.float32
        if not slices or self._norms_last or float32_on_gpu:
            return False
        return all(
            self.kernels.can_fuse(kept.output, kept.up, kept.attention_norm)
            and self.kernels.can_fuse(kept.down, kept.qkv, kept.feed_forward_norm)
            for kept in slices.values()
        )

    def _fused(
        self, slices: Slices, states: Tensor, offsets: BatchOffsets, two_per_sm: bool = False
    ) -> Tensor:
        """Run layers with three launches each: attention, and the two maps around each norm.

        The states are changed in place.
        """
        order = list(slices.values())
        next_qkv = [*(kept.qkv for kept in order[1:]), None]
        mapped = order[0].qkv(states)
        for kept, following in zip(order, next_qkv, strict=True):
            contexts = self.kernels.attend(mapped, offsets, kept)
            neurons = self.kernels.map_norm_map(
                contexts, kept.output, states, kept.attention_norm, kept.up, offsets, two_per_sm
            )
            mapped = self.kernels.map_norm_map(
                neurons, kept.down, states, kept.feed_forward_norm, following, offsets, two_per_sm
            )
        return states


def _fastest(programs: Sequence[Program]) -> int:
    """Time programs in turns; return the index of the one with the lowest time."""
    lowest = [float("inf")] * len(programs)
    for _ in range(TIMING_ROUNDS if len(programs) > 1 else 0):
        for index, program in enumerate(programs):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            program.play()
            last.record()
            last.synchronize()
            lowest[index] = min(lowest[index], first.elapsed_time(last))
    return lowest.index(min(lowest))


class Uploader:
    """Pinned memory through which batches are copied to a GPU while it computes.

    Args:
        device: GPU to copy to.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._slots = [Slot() for _ in range(MAX_UPLOADS)]
        self._turn = 0

    def send(self, target: Tensor, write: Callable[[Tensor], None]) -> None:
        """Fill a pinned buffer with `write`; copy it to `target` before the next queued work."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % MAX_UPLOADS
        slot.uploaded.synchronize()  # waits only if the device is `MAX_UPLOADS` batches behind
        slot.fit(target)
        write(slot.host[: len(target)])
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_event(slot.read)
        with torch.cuda.stream(self._stream):
            slot.device_buffer[: len(target)].copy_(slot.host[: len(target)], non_blocking=True)
            slot.uploaded.record()
        computing.wait_event(slot.uploaded)
        target.copy_(slot.device_buffer[: len(target)])
        slot.read.record(computing)


class Slot:
    """Buffers for one batch in transfer: pinned on the host, and on the device."""

    def __init__(self) -> None:
        self.host = self.device_buffer = torch.empty(0, dtype=torch.int32)
        self.uploaded, self.read = torch.cuda.Event(), torch.cuda.Event()

    def fit(self, target: Tensor) -> None:
        """Grow the buffers to the size of `target`; growing is rare and waits for the device."""
        if len(self.host) < len(target):
            torch.cuda.synchronize(target.device)
            count = _power_of_two(len(target))
            self.host = torch.empty(count, dtype=torch.int32, pin_memory=True)
            self.device_buffer = torch.empty(count, dtype=torch.int32, device=target.device)


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _round_up_rows(value: int, wave: int) -> int:
    """Round up to the next of 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... or the next full wave."""
    grain = max(_power_of_two(value) // 8, 1)
    rounded, waves = -(-value // grain) * grain, -(-value // wave)
    return min(rounded, waves * wave) if waves <= MAX_WAVES else rounded


def _wave(device: torch.device) -> int:
    """Return the rows of a wave: one program with `MAX_ROWS` rows on each multiprocessor."""
    if device.type != "cuda":
        return DEFAULT_WAVE
    return MAX_ROWS * int(torch.cuda.get_device_properties(device).multi_processor_count)
