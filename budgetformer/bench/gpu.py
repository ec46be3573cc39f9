"""Check correctness, speed and memory of all passes on a GPU, in one run of a few minutes.

It also runs on a CPU, in plain torch, to test the program itself.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budgetformer.bench.agreement import Agreement, compare_labels
from budgetformer.bench.dense_twin import bfloat16_twin, padded
from budgetformer.bench.passes import small_step
from budgetformer.bench.timing import TokenIds, token_ids
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.inference.packed import DECISION, BudgetPrediction, PackedPass, PackedTokens
from budgetformer.inference.precision_choice import make_pass
from budgetformer.model.modeling import BudgetFormerForSequenceClassification, load_model
from budgetformer.training.pages import markdown_table

TOKENS = (64, 512, 2048, 8192, 16384)
"""Approximate tokens of the timed batches."""
ROTATED = 8
"""Number of batches that take turns, so that no batch is in the caches already."""
CHECKED_TEXTS = 512
RANDOM_TEXTS = 4096
DENSE = "dense, Transformers sdpa bfloat16"


@dataclass(frozen=True)
class StepError:
    """The errors of a pass at one step, compared with the float32 reference network.

    At step 0 (the decision), step 0's logits, s and g_d's ranking are compared with the plain pass.

    Attributes:
        way: name of the pass.
        step: ladder step.
        error: largest difference of a logit.
        scale: largest absolute logit of the reference.
        other_labels: number of texts with another label.
        texts: number of texts.
    """

    way: str
    step: int
    error: float
    scale: float
    other_labels: int
    texts: int


@dataclass(frozen=True)
class GpuTiming:
    """The times of one pass at one step and batch size, in seconds per batch.

    Attributes:
        way: name of the pass.
        step: ladder step.
        tokens: mean tokens per batch.
        items: mean texts per batch.
        queued: time with further batches queued behind it (throughput).
        alone: time of a single batch from token ids to logits on the host (latency).
        device: time of a replay without transfers; None if the pass is not recorded.
    """

    way: str
    step: int
    tokens: int
    items: int
    queued: float
    alone: float
    device: float | None


@dataclass
class GpuReport:
    """The results of one run.

    Attributes:
        model: label of the checkpoint.
        facts: description of the machine.
        errors: errors of each pass at each step.
        agreements: agreement of labels with the float32 pass at each quality level, by pass.
        waits: operation that waited for the device within a batch, or "nothing", by pass.
        timings: times of each pass.
        memory: bytes by name.
        seconds: duration of the run.
    """

    model: str
    facts: dict[str, str]
    errors: list[StepError] = field(default_factory=list)
    agreements: dict[str, list[Agreement]] = field(default_factory=dict)
    waits: dict[str, str] = field(default_factory=dict)
    timings: list[GpuTiming] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def bench_gpu(
    checkpoint: Checkpoint,
    texts: Sequence[str] | None = None,
    device: str = "cuda",
    tokens: Sequence[int] = TOKENS,
    rounds: int = 24,
    steps: Sequence[int] | None = None,
) -> GpuReport:
    """Check and time every pass of a checkpoint on a device.

    Args:
        checkpoint: checkpoint to measure.
        texts: real texts; None: random tokens, without agreement of labels.
        device: "cuda", or "cpu" to test the program itself.
        tokens: approximate numbers of tokens of the timed batches.
        rounds: batches per measurement, after the same number for warm-up.
        steps: ladder steps to time, 0 for the decision; None: the decision, the first and the last
            step, and those at a sixth and a half of the ladder.
    """
    started = time.monotonic()
    model = load_model(checkpoint.path)
    nn.Module.to(model, torch.device(device))
    passes = dict(_passes(model))
    last = model.config.num_steps
    first = 1 if model.config.budget_scope == "layer" else DECISION
    default = {first, 1, small_step(last), max(1, last // 2), last}
    timed = sorted(default) if steps is None else steps
    items = token_ids(checkpoint, texts, RANDOM_TEXTS)
    report = GpuReport(checkpoint.label, _facts(device))
    checked = items[:CHECKED_TEXTS]
    for name, network in passes.items():
        report.errors += _check(name, network, model, checked)
        report.waits[name] = _waits(network, checked)
    if texts is not None:
        plain, *others = passes.items()
        for name, network in others:
            report.agreements[name] = compare_labels(checkpoint, texts, plain[1], network)
    dense = _dense_run(model)
    for count in tokens:
        batches = _batches(items, count)
        for name, network in passes.items():
            for step in timed:
                run = _step_run(network, step)
                report.timings.append(_time(name, step, run, batches, rounds))
        report.timings.append(_time(DENSE, last, dense, batches, rounds))
    report.memory = _memory(passes)
    report.seconds = time.monotonic() - started
    return report


def write_gpu_report(report: GpuReport, folder: Path) -> None:
    """Write `README.md` and `report.json` to `folder`, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (folder / "README.md").write_text(as_markdown(report))


def as_markdown(report: GpuReport) -> str:
    """Return the report's tables."""
    facts = ", ".join(f"{name} {value}" for name, value in report.facts.items())
    errors = markdown_table(
        ["pass", "step", "largest logit error", "largest logit", "different labels", "texts"],
        [
            [e.way, str(e.step), f"{e.error:.2e}", f"{e.scale:.2f}", str(e.other_labels)]
            + [str(e.texts)]
            for e in report.errors
        ],
    )
    agreements = markdown_table(
        ["pass", "quality", "same label", "texts", "ended at another step"],
        [
            [way, a.way, f"{100 * a.share:.2f} %", str(a.texts), str(a.moved)]
            for way, rows in report.agreements.items()
            for a in rows
        ],
    )
    waits = markdown_table(
        ["pass", "waits for the device"], [list(w) for w in report.waits.items()]
    )
    timings = markdown_table(
        ["tokens", "texts", "pass", "step", "/ full step", "/ full step on the device", "/ dense"]
        + ["ms queued", "ms on the device", "ms alone", "texts per second"],
        [_timing_row(timing, report.timings) for timing in report.timings],
    )
    memory = markdown_table(
        ["memory", "MiB"], [[n, f"{b / 2**20:.1f}"] for n, b in report.memory.items()]
    )
    return f"""# {report.model} on a GPU

{facts}; the run took {report.seconds:.0f} s.

## Correctness
Steps are compared with the reference network in float32, which computes all heads and masks some.
At step 0, the decision (step 0's logits, s and the ranking of heads) is compared with the plain
pass:

{errors}

Labels of real texts at each quality level, compared with the float32 pass:

{agreements}

## Waits
The operation that waits for the device between the first launch of a batch and its logits on the
device:

{waits}

## Speed
"Queued" is the time of a batch while others are queued behind it; "/ full step" and "/ dense" are
ratios of these times. "On the device" is the time of replaying the same batch without transfers.
"Alone" is the time of a single batch from token ids on the host to logits on the host.

{timings}

## Memory
{memory}
"""


def _timing_row(timing: GpuTiming, timings: Sequence[GpuTiming]) -> list[str]:
    same_size = [t for t in timings if t.tokens == timing.tokens]
    full = max((t for t in same_size if t.way == timing.way), key=lambda t: t.step)
    dense = next(t for t in same_size if t.way == DENSE)
    return [
        str(timing.tokens),
        str(timing.items),
        timing.way,
        str(timing.step),
        f"{timing.queued / full.queued:.2f}",
        f"{timing.device / full.device:.2f}" if timing.device and full.device else "",
        f"{timing.queued / dense.queued:.2f}",
        f"{1000 * timing.queued:.3f}",
        f"{1000 * timing.device:.3f}" if timing.device else "",
        f"{1000 * timing.alone:.3f}",
        f"{timing.items / timing.queued:.0f}",
    ]


def _passes(model: BudgetFormerForSequenceClassification) -> Iterator[tuple[str, PackedPass]]:
    """Yield the name of every pass and the pass; the first is in float32."""
    for precision in ("float32", "bfloat16"):
        yield precision, make_pass(model, precision)
    if model.device.type == "cuda":
        from budgetformer.inference.backends.kernels import gpu

        yield "bfloat16, not recorded", PackedPass(model, "bfloat16", gpu)


@torch.inference_mode()
def _check(
    name: str,
    network: PackedPass,
    model: BudgetFormerForSequenceClassification,
    items: Sequence[TokenIds],
) -> Iterator[StepError]:
    plain = PackedPass(model)
    for step in range(network.sizes.layerwise, network.config.num_steps + 1):
        actual, expected = [], []
        for start in range(0, len(items), 64):
            part = items[start : start + 64]
            tokens = PackedTokens.pack(part)
            if step == DECISION:
                actual.append(_concatenated(network.decide(tokens)))
                expected.append(_concatenated(plain.decide(tokens)))
                continue
            actual.append(network.run_at(step, tokens).logits)
            ids, mask, _ = (torch.from_numpy(a).to(network.device) for a in padded(part))
            at = torch.full((len(part),), step, device=network.device)
            exits = network.decide(tokens).exit_logits
            logits = model(ids, attention_mask=mask, steps=at).logits
            if exits is not None:  # `run_at` does not add step 0's logits
                logits = logits - network.config.exit_weights[step - 1] * exits
            expected.append(logits)
        ours, truth = torch.cat(actual).float(), torch.cat(expected)
        yield StepError(
            way=name,
            step=step,
            error=float((ours - truth).abs().max()),
            scale=float(truth.abs().max()),
            other_labels=int((ours.argmax(-1) != truth.argmax(-1)).sum()),
            texts=len(items),
        )


def _concatenated(decision: BudgetPrediction) -> Tensor:
    """Return the tensors of a decision side by side, [B, ...]."""
    parts = [decision.budget, decision.exit_logits, decision.ranking]
    return torch.cat([p.float().reshape(len(p), -1) for p in parts if p is not None], dim=1)


def _waits(network: PackedPass, items: Sequence[TokenIds]) -> str:
    """Return the first operation of a batch that waits for the device, or "nothing"."""
    if network.device.type != "cuda":
        return "not measured"
    tokens = PackedTokens.pack(items[:32])
    runs = [_step_run(network, step) for step in range(network.sizes.layerwise, 2)]
    try:
        for run in runs:
            run.run(tokens)
            with _no_waiting():
                run.run(tokens)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "nothing"


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Have every operation that waits for the device raise a RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _batches(items: Sequence[TokenIds], count: int) -> list[list[TokenIds]]:
    """Return `ROTATED` batches of about `count` tokens, starting over when texts are used up."""
    texts = cycle(items)
    batches = []
    for _ in range(ROTATED):
        batch = [next(texts)]
        while sum(map(len, batch)) < count:
            batch.append(next(texts))
        batches.append(batch)
    return batches


@dataclass(frozen=True)
class _TimedRun:
    """The parts of running a batch that are timed.

    Attributes:
        prepare: prepares token ids on the host.
        run: runs a prepared batch, and returns logits on the device.
        recorded: returns a function that replays a prepared batch, or None.
    """

    prepare: Callable[[Sequence[TokenIds]], Any]
    run: Callable[[Any], Tensor]
    recorded: Callable[[Any], Callable[[], None] | None] = lambda _: None


def _step_run(network: PackedPass, step: int) -> _TimedRun:
    def run(tokens: PackedTokens) -> Tensor:
        if step == DECISION:
            return _concatenated(network.decide(tokens))
        if network.sizes.picks_heads:
            return network.run_at(step, tokens).logits
        return network.run(tokens, [step] * len(tokens.lengths)).logits

    return _TimedRun(PackedTokens.pack, run, partial(network.recorded, step))


def _dense_run(model: BudgetFormerForSequenceClassification) -> _TimedRun:
    twin = bfloat16_twin(model).to(model.device)

    @torch.inference_mode()
    def run(arrays: Sequence[Tensor]) -> Tensor:
        logits: Tensor = twin(*(array.to(model.device) for array in arrays))
        return logits

    return _TimedRun(lambda items: list(map(torch.from_numpy, padded(items))), run)


def _time(
    name: str, step: int, timed: _TimedRun, batches: Sequence[Sequence[TokenIds]], rounds: int
) -> GpuTiming:
    clock = _device_clock if torch.cuda.is_available() else time.perf_counter
    prepared = [timed.prepare(batch) for batch in batches]
    for _, batch in zip(range(max(rounds, len(prepared))), cycle(prepared), strict=False):
        timed.run(batch)
    clock()
    started = clock()
    for _, batch in zip(range(rounds), cycle(prepared), strict=False):
        timed.run(batch)
    queued = (clock() - started) / rounds
    device, replay = None, timed.recorded(prepared[0])
    if replay is not None:
        started = clock()
        for _ in range(rounds):
            replay()
        device = (clock() - started) / rounds
    alone = []
    for items in batches:
        started = time.perf_counter()
        timed.run(timed.prepare(items)).cpu()
        alone.append(time.perf_counter() - started)
    count = sum(map(len, batches)) // len(batches)
    tokens = sum(len(ids) for batch in batches for ids in batch) // len(batches)
    return GpuTiming(name, step, tokens, count, queued, statistics.median(alone), device)


def _device_clock() -> float:
    """Return the time after all queued work is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(passes: dict[str, PackedPass]) -> dict[str, int]:
    sizes = {f"weights, {name}": network.nbytes for name, network in passes.items()}
    if torch.cuda.is_available():
        sizes["allocated, all passes"] = torch.cuda.memory_allocated()
        sizes["peak allocated"] = torch.cuda.max_memory_allocated()
        sizes["reserved"] = torch.cuda.memory_reserved()
    return sizes


def _facts(device: str) -> dict[str, str]:
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if find_spec("triton"):
        import triton

        facts["triton"] = triton.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["card"] = properties.name
        facts["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["CUDA"] = torch.version.cuda
    return {name: str(value) for name, value in facts.items()}
