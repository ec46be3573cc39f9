"""Texts of a simulation: measured, or generated from the figures of calibration."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import DataError
from budgetformer.inference.policy import QUALITY_NAMES
from service.simulation.texts import Population, generate_texts, measure_texts, paths_with_shares
from tests.support.simulated import text
from tests.support.stores import CHAIN, CHAINED, LABELS, MAX_TOKENS, TOPICS, sentences


@pytest.fixture
def topics(model_store: Path) -> Checkpoint:
    return read_checkpoint(model_store / TOPICS / "2")


@pytest.mark.parametrize("name", [f"{TOPICS}/2", f"{CHAINED}/1"])
def test_measured_texts_run_the_steps_of_the_classifier(model_store: Path, name: str) -> None:
    words = [sentence for label in LABELS for sentence in sentences(label)[:12]]
    found = measure_texts(read_checkpoint(model_store / name), words).texts
    classifier = Classifier(model_store / name, precision="float32")
    for level in QUALITY_NAMES:
        answers = classifier(words, quality=level)
        assert [t.tokens for t in found] == [a.tokens for a in answers]
        assert [[*t.steps[level]] for t in found] == [[k for k in a.steps if k] for a in answers]


def test_measuring_without_texts_is_an_error(topics: Checkpoint) -> None:
    with pytest.raises(DataError, match="no texts"):
        measure_texts(topics, [])


def test_generated_texts_run_the_calibrated_shares_of_steps(topics: Checkpoint) -> None:
    rules = {level: topics.rule(level) for level in QUALITY_NAMES}
    found = generate_texts(rules, 20.0, 512, seed=1)
    for level, rule in rules.items():
        counts = Counter(t.steps[level] for t in found.texts)
        for share, steps in paths_with_shares(rule):
            assert counts[steps] / len(found.texts) == pytest.approx(share, abs=0.001)
    assert found.mean_tokens == pytest.approx(20.0, rel=0.03)


def test_a_heavy_tail_keeps_the_mean_length(topics: Checkpoint) -> None:
    rules = {level: topics.rule(level) for level in QUALITY_NAMES}
    plain, heavy = (
        [t.tokens for t in generate_texts(rules, 50.0, 5000, tail).texts] for tail in (None, 2.0)
    )
    assert np.mean(heavy) == pytest.approx(50.0, rel=0.15)
    assert np.quantile(heavy, 0.999) > 3 * np.quantile(plain, 0.999)
    assert max(t.tokens for t in generate_texts(rules, 50.0, 64, 2.0).texts) == 64


def test_step_0_reads_more_tokens_of_long_texts(topics: Checkpoint) -> None:
    rules = {level: topics.rule(level) for level in QUALITY_NAMES}
    found = generate_texts(rules, 50.0, 64, 2.0, max_step_0_tokens=200).texts
    assert max(t.tokens for t in found) == 64
    assert max(t.step_0_tokens for t in found) == 200
    assert all(t.tokens == min(t.step_0_tokens, 64) for t in found)
    (long, short) = measure_texts(topics, ["The otter slept. " * 20, "The otter slept."]).texts
    assert long.tokens == MAX_TOKENS < long.step_0_tokens
    assert short.tokens == short.step_0_tokens


def test_the_share_of_hard_texts_can_be_set() -> None:
    mixed = Population([text(), text(), text(), text(1)]).with_hard_share(0.6)
    assert mixed.hard_share == pytest.approx(0.6)
    drawn = mixed.draw(10_000, np.random.default_rng(0))
    assert np.mean(drawn == 3) == pytest.approx(0.6, abs=0.02)
    with pytest.raises(DataError, match="equally hard"):
        Population([text(1)]).with_hard_share(0.5)


@pytest.mark.parametrize("quality", [*QUALITY_NAMES, 1.5, 0.3])
def test_paths_through_a_chain_have_the_calibrated_shares(
    model_store: Path, quality: str | float
) -> None:
    rule = read_checkpoint(model_store / CHAINED / "1").rule(quality)
    paths = paths_with_shares(rule)
    assert sum(share for share, _ in paths) == pytest.approx(1)
    ends, runs = defaultdict[int, float](float), defaultdict[int, float](float)
    for share, steps in paths:
        assert list(steps) == sorted({*steps} & {*CHAIN})
        ends[steps[-1] if steps else 0] += share
        for step in steps:
            runs[step] += share
    assert ends == pytest.approx({k: v for k, v in (rule.expected_budgets() or {}).items() if v})
    assert runs == pytest.approx({k: v for k, v in (rule.expected_runs() or {}).items() if v})


def test_generated_texts_run_whole_chains(model_store: Path) -> None:
    chained = read_checkpoint(model_store / CHAINED / "1")
    found = generate_texts({level: chained.rule(level) for level in QUALITY_NAMES}, 20.0, 512)
    assert {text.steps["best"] for text in found.texts} == {(1,), (2,), (1, 2)}
