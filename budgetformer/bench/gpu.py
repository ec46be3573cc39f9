"""Check correctness, speed and memory of all passes on a GPU, in one run of a few minutes.

It also runs without a GPU, on plain torch, to test the run itself.
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
from budgetformer.bench.baselines import bfloat16_twin, padded
from budgetformer.bench.passes import small_step
from budgetformer.bench.timing import TokenIds, random_texts, token_ids
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.inference.packed import DECISION, BudgetPrediction, PackedPass, PackedTokens
from budgetformer.inference.precision_choice import make_pass
from budgetformer.model.modeling import BudgetFormerForSequenceClassification, load_model
from budgetformer.training.pages import markdown_table

TOKENS = (64, 512, 2048, 8192, 16384)
"""Approximate tokens of the timed batches."""
ROTATED = 8
"""Number of batches that take turns, so that none is in a warm cache."""
CHECKED_TEXTS = 512
DENSE = "dense, Transformers sdpa bfloat16"


@dataclass(frozen=True)
class StepError:
    """Largest logit error and label differences of a pass against the float32 reference network.

    For step 0 (the decision): of step 0's logits and s, against the plain pass.
    """

    way: str
    step: int
    error: float
    scale: float
    other_labels: int
    texts: int


@dataclass(frozen=True)
class GpuTiming:
    """Seconds of one batch.

    Attributes:
        way, step: name of the pass, and ladder step.
        tokens, items: of the batch.
        queued: throughput: with further batches queued behind it.
        alone: latency of a single batch, from tokens to logits on the host.
        device: replay time without transfers; None if the pass is not recorded.
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
        model: the checkpoint's label.
        facts: description of the machine.
        errors, agreements: correctness.
        waits: by pass, the operation that waited for the device within a batch, or "nothing".
        timings: speed.
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
        checkpoint: the checkpoint.
        texts: real texts; None: random tokens, without agreement of labels.
        device: "cuda", or "cpu" to test the run itself.
        tokens: approximate tokens of the timed batches.
        rounds: batches per measurement, after as many for warm-up.
        steps: ladder steps to time, 0 for the decision; None: the decision, the first and the last
            step, and those at a sixth and a half of the ladder.
    """
    started = time.monotonic()
    model = load_model(checkpoint.path)
    nn.Module.to(model, torch.device(device))
    ways = dict(_ways(model))
    last = model.config.num_steps
    first = 1 if model.config.budget_scope == "layer" else DECISION
    usual = {first, 1, small_step(last), max(1, last // 2), last}
    timed = sorted(usual) if steps is None else steps
    items = _items(checkpoint, texts, model.config.vocab_size)
    report = GpuReport(checkpoint.label, _facts(device))
    checked = items[:CHECKED_TEXTS]
    for way, network in ways.items():
        report.errors += _check(way, network, model, checked)
        report.waits[way] = _waits(network, checked)
    if texts is not None:
        plain, *others = ways.items()
        for way, network in others:
            report.agreements[way] = compare_labels(checkpoint, texts, plain[1], network)
    dense = _dense_way(model)
    for count in tokens:
        batches = _batches(items, count)
        for way, network in ways.items():
            for step in timed:
                report.timings.append(_time(way, step, _step_way(network, step), batches, rounds))
        report.timings.append(_time(DENSE, last, dense, batches, rounds))
    report.memory = _memory(ways)
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
        ["pass", "step", "largest error of a logit", "of logits up to", "other labels", "of texts"],
        [
            [e.way, str(e.step), f"{e.error:.2e}", f"{e.scale:.2f}", str(e.other_labels)]
            + [str(e.texts)]
            for e in report.errors
        ],
    )
    agreements = markdown_table(
        ["pass", "quality", "same label", "of texts", "at another step"],
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
        ["tokens", "texts", "pass", "step", "to its full step", "on the device", "to dense"]
        + ["ms queued", "ms on the device", "ms alone", "texts a second"],
        [_timing_row(timing, report.timings) for timing in report.timings],
    )
    memory = markdown_table(
        ["memory", "MiB"], [[n, f"{b / 2**20:.1f}"] for n, b in report.memory.items()]
    )
    return f"""# {report.model} on a GPU

{facts}; the run took {report.seconds:.0f} s.

## Right
Against the reference network in float32, all heads computed and masked; step 0 is what is decided
on arrival, against the plain pass:

{errors}

Against the float32 pass, real texts at each quality:

{agreements}

## Waits
What a batch waits for between its first launch and its logits on the device:

{waits}

## Fast
"Queued" is the time of a batch when others queue behind it, and what the ratios are of; "on the
device" that of the same batch over and over, with nothing sent and nothing fetched; "alone" from
token ids on the host to logits on the host.

{timings}

## Large
{memory}
"""


def _timing_row(timing: GpuTiming, timings: Sequence[GpuTiming]) -> list[str]:
    beside = [t for t in timings if t.tokens == timing.tokens]
    full = max((t for t in beside if t.way == timing.way), key=lambda t: t.step)
    dense = next(t for t in beside if t.way == DENSE)
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


def _ways(model: BudgetFormerForSequenceClassification) -> Iterator[tuple[str, PackedPass]]:
    """Yield every pass; the first is in float32."""
    for precision in ("float32", "bfloat16"):
        yield precision, make_pass(model, precision)
    if model.device.type == "cuda":
        from budgetformer.inference.backends.kernels import gpu

        yield "bfloat16, not recorded", PackedPass(model, "bfloat16", gpu)


def _items(checkpoint: Checkpoint, texts: Sequence[str] | None, vocabulary: int) -> list[TokenIds]:
    if texts is None:
        longest = min(80, checkpoint.manifest.max_tokens)
        return random_texts(4096, min(12, longest), longest, vocabulary)
    return token_ids(checkpoint, texts)


@torch.inference_mode()
def _check(
    way: str,
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
                actual.append(_decided(network.decide(tokens)))
                expected.append(_decided(plain.decide(tokens)))
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
            way=way,
            step=step,
            error=float((ours - truth).abs().max()),
            scale=float(truth.abs().max()),
            other_labels=int((ours.argmax(-1) != truth.argmax(-1)).sum()),
            texts=len(items),
        )


def _decided(decision: BudgetPrediction) -> Tensor:
    """Return the tensors of a decision side by side, [B, ...]."""
    known = [decision.budget, decision.exit_logits, decision.ranking]
    return torch.cat([k.float().reshape(len(k), -1) for k in known if k is not None], dim=1)


def _waits(network: PackedPass, items: Sequence[TokenIds]) -> str:
    """Return the first operation of a batch that waits for the device, or "nothing"."""
    if network.device.type != "cuda":
        return "not asked"
    tokens = PackedTokens.pack(items[:32])
    ways = [_step_way(network, step) for step in range(network.sizes.layerwise, 2)]
    try:
        for way in ways:
            way.run(tokens)
            with _no_waiting():
                way.run(tokens)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "nothing"


@contextmanager
def _no_waiting() -> Iterator[None]:
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
class _Way:
    """One way to run a batch.

    Attributes:
        prepare: prepares token ids on the host.
        run: runs the prepared batch, up to logits on the device.
        recorded: returns a function that replays the prepared batch, or None.
    """

    prepare: Callable[[Sequence[TokenIds]], Any]
    run: Callable[[Any], Tensor]
    recorded: Callable[[Any], Callable[[], None] | None] = lambda _: None


def _step_way(network: PackedPass, step: int) -> _Way:
    def run(tokens: PackedTokens) -> Tensor:
        if step == DECISION:
            return _decided(network.decide(tokens))
        if network.sizes.picks_heads:
            return network.run_at(step, tokens).logits
        return network.run(tokens, [step] * len(tokens.lengths)).logits

    return _Way(PackedTokens.pack, run, partial(network.recorded, step))


def _dense_way(model: BudgetFormerForSequenceClassification) -> _Way:
    twin = bfloat16_twin(model).to(model.device)

    @torch.inference_mode()
    def run(arrays: Sequence[Tensor]) -> Tensor:
        logits: Tensor = twin(*(array.to(model.device) for array in arrays))
        return logits

    return _Way(lambda items: list(map(torch.from_numpy, padded(items))), run)


def _time(
    name: str, step: int, way: _Way, batches: Sequence[Sequence[TokenIds]], rounds: int
) -> GpuTiming:
    clock = _device_clock if torch.cuda.is_available() else time.perf_counter
    ready = [way.prepare(batch) for batch in batches]
    for _, batch in zip(range(max(rounds, len(ready))), cycle(ready), strict=False):
        way.run(batch)
    clock()
    started = clock()
    for _, batch in zip(range(rounds), cycle(ready), strict=False):
        way.run(batch)
    queued = (clock() - started) / rounds
    device, again = None, way.recorded(ready[0])
    if again is not None:
        started = clock()
        for _ in range(rounds):
            again()
        device = (clock() - started) / rounds
    alone = []
    for items in batches:
        started = time.perf_counter()
        way.run(way.prepare(items)).cpu()
        alone.append(time.perf_counter() - started)
    count = sum(map(len, batches)) // len(batches)
    tokens = sum(len(ids) for batch in batches for ids in batch) // len(batches)
    return GpuTiming(name, step, tokens, count, queued, statistics.median(alone), device)


def _device_clock() -> float:
    """Return the time after all queued work is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(ways: dict[str, PackedPass]) -> dict[str, int]:
    sizes = {f"weights, {way}": network.nbytes for way, network in ways.items()}
    if torch.cuda.is_available():
        sizes["allocated, all passes"] = torch.cuda.memory_allocated()
        sizes["most allocated"] = torch.cuda.max_memory_allocated()
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
