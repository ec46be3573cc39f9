"""The benchmarks of passes: timing in turns, baselines, and reports on CPU and GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from budgetformer.bench.agreement import compare_labels
from budgetformer.bench.dense_twin import DENSE, ONNX_INT8, DenseTwin, baseline_contenders, padded
from budgetformer.bench.gpu import DENSE as DENSE_GPU
from budgetformer.bench.gpu import GpuReport, bench_gpu, write_gpu_report
from budgetformer.bench.passes import picked_name, step_name
from budgetformer.bench.report import BenchReport, compare_passes, write_bench_report
from budgetformer.bench.timing import Contender, Machine, Timing, random_texts, time_in_turns
from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from tests.support.networks import assert_close, pad, random_items, random_network, small_config
from tests.support.stores import TOPICS

ITEMS = [[4, 5, 6], [7, 8]]


def test_contenders_take_turns_after_a_warm_up_round() -> None:
    seen: list[str] = []
    contenders = [
        Contender("a", lambda _: seen.append("a")),
        Contender(
            "b", lambda items: seen.append(f"b{len(items)}"), lambda items: float(len(items))
        ),
    ]
    first, second = time_in_turns(contenders, [ITEMS] * 3)
    assert seen == ["a", "b2"] * 4
    assert (first.name, first.batch, len(first.rounds), first.limit) == ("a", 2, 3, None)
    assert second.limit == 2.0


def test_the_mean_of_the_rounds_is_reported() -> None:
    assert Timing("a", 1, (3.0, 1.0, 2.0, 2.0), None).mean == 2.0


def test_every_round_has_its_own_texts() -> None:
    seen: list[list[list[int]]] = []
    time_in_turns([Contender("a", lambda items: seen.append(list(items)))], [[[1]], [[2]], [[3]]])
    assert seen == [[[1]], [[1]], [[2]], [[3]]]


def test_random_texts_are_repeatable() -> None:
    texts = random_texts(5, 3, 6, 40)
    assert texts == random_texts(5, 3, 6, 40)
    assert all(3 <= len(ids) <= 6 and all(0 < i < 40 for i in ids) for ids in texts)


def test_the_limit_is_the_slower_of_computing_and_reading() -> None:
    machine = Machine({"float32": 100.0}, 10.0)
    assert machine.limit("float32", 1000, 5) == 10.0
    assert machine.limit("float32", 10, 50) == 5.0


def test_machine_speed_is_measured() -> None:
    machine = Machine.measure(["float32"])
    assert machine.macs["float32"] > 0
    assert machine.bandwidth > 0


def test_padding_marks_the_real_tokens() -> None:
    ids, mask, segments = padded(ITEMS)
    assert ids.tolist() == [[4, 5, 6], [7, 8, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not segments.any()


@pytest.mark.parametrize("head", [None, "tanh"])
@torch.no_grad()
def test_the_dense_twin_equals_the_full_step(head: str | None) -> None:
    network = random_network(small_config(head_activation=head))
    batch = pad(random_items([5, 9, 1]))
    ids, mask, segments = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    answer = DenseTwin(network).eval()(ids, mask, segments)
    assert_close(answer, network(**batch, steps=network.config.num_steps).logits)


@pytest.mark.parametrize("changes", [{"norm_position": "pre"}, {"pooling": "cls"}])
def test_networks_unlike_bert_have_no_dense_twin(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no|only a post-norm network"):
        DenseTwin(random_network(small_config(**changes)))


def test_every_baseline_gives_the_same_answers() -> None:
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        pytest.skip("ONNX Runtime is not installed (extra: bench)")
    network: BudgetFormerForSequenceClassification = random_network(small_config())
    baselines = {c.name: c.run(ITEMS) for c in baseline_contenders(network, 1, bfloat16=False)}
    expected = baselines.pop(DENSE)
    assert isinstance(expected, torch.Tensor)
    for name, answer in baselines.items():
        assert isinstance(answer, list)
        tolerance = 0.2 if name == ONNX_INT8 else 1e-5
        assert_close(torch.from_numpy(answer[0]), expected, tolerance)


@pytest.fixture(scope="module")
def report(model_store: Path) -> BenchReport:
    checkpoint = read_checkpoint(model_store / TOPICS / "1")
    texts = ["the match was won in the last minute", "shares fell again"]
    return compare_passes(checkpoint, texts, batches=(1, 2), rounds=2, baselines=False)


def test_every_step_and_level_is_timed_at_every_batch_size(report: BenchReport) -> None:
    names = {timing.name for timing in report.timings}
    assert {step_name("float32", step) for step in (1, 2, 3, 4)} <= names
    assert {"balanced, float32", picked_name(1)} <= names
    assert report.batches == [1, 2]
    assert len(report.timings) == 2 * len(names)


def test_times_are_relative_to_the_full_step(report: BenchReport) -> None:
    for timing in report.timings:
        ratio = report.ratio(timing, report.full)
        assert ratio is not None
        assert (ratio == 1) == (timing.name == report.full)
        assert report.ratio(timing, DENSE) is None


def test_a_report_has_a_page_plots_and_json(report: BenchReport, tmp_path: Path) -> None:
    write_bench_report(report, tmp_path)
    page, plain = (
        (tmp_path / "README.md").read_text(),
        json.loads((tmp_path / "report.json").read_text()),
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "report.json",
        "passes.png",
        "passes.svg",
    }
    assert "## Batches of 2" in page
    assert plain["timings"][0]["ms_per_text"] > 0


def test_a_single_text_is_refused(model_store: Path) -> None:
    with pytest.raises(ValueError, match="two texts"):
        compare_passes(read_checkpoint(model_store / TOPICS / "1"), ["one"])


TEXTS = ["the match was won in the last minute", "shares fell again", "a storm came"]


@pytest.fixture(scope="module")
def gpu_report(model_store: Path) -> GpuReport:
    """Return the report of the GPU benchmark, run on a CPU."""
    checkpoint = read_checkpoint(model_store / TOPICS / "1")
    return bench_gpu(checkpoint, TEXTS, device="cpu", tokens=(8, 20), rounds=2, steps=[1, 4])


def test_the_gpu_benchmark_compares_every_step_with_the_reference(gpu_report: GpuReport) -> None:
    plain = [error for error in gpu_report.errors if error.way.startswith("float32")]
    assert [error.step for error in plain] == [0, 1, 2, 3, 4]
    for error in plain:
        assert error.scale > 0
        assert error.error <= 1e-5 * error.scale
        assert error.other_labels == 0
    assert {error.way for error in gpu_report.errors} == {"float32", "bfloat16"}


def test_the_gpu_benchmark_times_every_step_and_the_dense_network(gpu_report: GpuReport) -> None:
    assert {(t.way, t.step) for t in gpu_report.timings} == {
        *((way, step) for way in ("float32", "bfloat16") for step in (1, 4)),
        (DENSE_GPU, 4),
    }
    assert len({t.tokens for t in gpu_report.timings}) == 2
    assert all(t.queued > 0 and t.alone > 0 and t.items > 0 for t in gpu_report.timings)


def test_the_gpu_report_has_a_page_and_json(gpu_report: GpuReport, tmp_path: Path) -> None:
    write_gpu_report(gpu_report, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert all(f"| {t.way} | {t.step} |" in page for t in gpu_report.timings)
    assert "100.00 %" in page
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["memory"]["weights, float32"] > 0


def test_without_texts_no_labels_are_compared(model_store: Path) -> None:
    checkpoint = read_checkpoint(model_store / TOPICS / "1")
    report = bench_gpu(checkpoint, device="cpu", tokens=(8,), rounds=1, steps=[1])
    assert not report.agreements
    assert report.errors


def test_labels_that_differ_are_counted(model_store: Path) -> None:
    checkpoint = read_checkpoint(model_store / TOPICS / "1")
    network, broken = load_network(checkpoint), load_network(checkpoint)
    texts = ["the otter slept", "a choir", "fog " * 40]
    assert {
        (a.way, a.other, a.moved) for a in compare_labels(checkpoint, texts, network, network)
    } == {(way, 0, 0) for way in ("fast", "balanced", "best", "full")}
    with torch.no_grad():
        # Reverse the answer of the encoder, too strongly for step 0 to compensate.
        broken.model.classifier.weight.mul_(-100)
        broken.model.classifier.bias.mul_(-100)
    full = compare_labels(checkpoint, texts, network, broken)[-1]
    assert (full.way, full.texts, full.other) == ("full", 3, 3)
    assert full.share == 0
    assert full.difference > 0
