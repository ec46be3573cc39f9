"""The answer cache: answers by text, model and options, within a limit of memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from budgetformer.tokenization import Text
from service.ipc.answers import COLUMNS, Answers
from service.pipeline.answer_cache import AnswerCache, AnsweredTexts, AnswerOptions, Lookup
from service.pipeline.served_models import ServedModel, open_model
from tests.support.stores import TOPICS

BALANCED = AnswerOptions("balanced")
PLENTY = 2**20


@pytest.fixture(scope="module")
def model(model_store: Path) -> ServedModel:
    return open_model(model_store / TOPICS / "2")


def computed(model: ServedModel, count: int, seed: int, **more: Any) -> AnsweredTexts:
    """Return random answers, so that those of two texts hardly ever coincide."""
    draw = np.random.default_rng(seed)
    labels, steps = len(model.checkpoint.manifest.labels), len(model.checkpoint.ladder)
    answers = Answers(
        logits=draw.normal(size=(count, labels)).astype(np.float32),
        step=draw.integers(0, steps, count, np.int32),
        predicted=draw.integers(-1, steps, count, np.int32),
        ran=draw.random((count, steps + 1)) < 0.5,
        heads=draw.integers(0, 2**20, count, np.int32),
        macs=draw.integers(0, 2**50, count, np.int64),
        dense_macs=draw.integers(0, 2**50, count, np.int64),
        next_step=np.zeros(count, np.int32),
        quality="balanced",
        budget_seconds=0.1,
        queue_seconds=0.2,
        compute_seconds=0.3,
    )
    lengths, truncated = draw.integers(0, 500, count, np.int32), draw.random(count) < 0.5
    return AnsweredTexts(lengths, truncated, replace(answers, **more))


def fill(
    cache: AnswerCache,
    model: ServedModel,
    *texts: Text,
    options: AnswerOptions = BALANCED,
    seed: int = 0,
) -> AnsweredTexts:
    """Put answers to texts into the cache, and return them."""
    lookup = cache.look_up(model, options, texts)
    new = computed(model, len(lookup.misses), seed, quality=options.quality)
    return lookup.complete(new)


def columns(answered: AnsweredTexts) -> dict[str, np.ndarray[Any, Any]]:
    of_texts = {"lengths": answered.lengths, "truncated": answered.truncated}
    return of_texts | {name: getattr(answered.answers, name) for name in COLUMNS}


def look_up(
    cache: AnswerCache, model: ServedModel, *texts: Text, options: AnswerOptions = BALANCED
) -> Lookup:
    return cache.look_up(model, options, texts)


def test_cached_answers_equal_the_computed_ones(model: ServedModel) -> None:
    cache = AnswerCache(PLENTY)
    first = fill(cache, model, "a", "b", ("a", "b"))
    lookup = look_up(cache, model, ("a", "b"), "a", "b")
    assert lookup.outcome == "hit"
    assert not lookup.missing
    cached = lookup.complete(None)
    for name, column in columns(first).items():
        cached_column = columns(cached)[name]
        assert cached_column.dtype == column.dtype
        assert cached_column.flags.c_contiguous
        np.testing.assert_array_equal(cached_column, column[[2, 0, 1]], name)
    assert cached.answers.quality == "balanced"
    assert not cached.answers.errors
    assert cached.answers.queue_seconds == cached.answers.compute_seconds == 0


def test_only_texts_without_an_answer_are_computed(model: ServedModel) -> None:
    cache = AnswerCache(PLENTY)
    first = fill(cache, model, "a", "b")
    lookup = look_up(cache, model, "x", "b", "y", "a")
    assert (lookup.outcome, lookup.misses, lookup.missing) == ("partial", [0, 2], ["x", "y"])
    np.testing.assert_array_equal(lookup.truncated[[1, 3]], first.truncated[[1, 0]])
    new = computed(model, 2, seed=7)
    found = lookup.complete(new)
    for name, column in columns(found).items():
        np.testing.assert_array_equal(column[[3, 1]], columns(first)[name], name)
        np.testing.assert_array_equal(column[[0, 2]], columns(new)[name], name)
    assert found.answers.queue_seconds == 0.2
    assert look_up(cache, model, "x", "y").outcome == "hit"


def test_failed_texts_are_named_by_their_index_and_not_cached(model: ServedModel) -> None:
    cache = AnswerCache(PLENTY)
    fill(cache, model, "a")
    new = computed(model, 2, seed=1, errors={1: "it failed"})
    found = look_up(cache, model, "x", "a", "y").complete(new)
    assert found.answers.errors == {2: "it failed"}
    assert look_up(cache, model, "x", "y").missing == ["y"]


def test_answers_at_another_level_than_requested_are_not_cached(model: ServedModel) -> None:
    cache = AnswerCache(PLENTY)
    found = look_up(cache, model, "a").complete(computed(model, 1, seed=1, quality="fast"))
    assert found.answers.quality == "fast"
    assert look_up(cache, model, "a").outcome == "miss"


@pytest.mark.parametrize(
    "other",
    [
        AnswerOptions("fast"),
        AnswerOptions("best"),
        AnswerOptions(1.5),
        AnswerOptions("balanced", heads=2),
        AnswerOptions("balanced", max_heads=2),
        AnswerOptions("balanced", caller="web"),
    ],
    ids=str,
)
def test_an_answer_is_used_only_for_the_same_options(
    model: ServedModel, other: AnswerOptions
) -> None:
    cache = AnswerCache(PLENTY)
    fill(cache, model, "a")
    assert look_up(cache, model, "a", options=other).outcome == "miss"
    fill(cache, model, "a", options=other, seed=1)
    assert look_up(cache, model, "a", options=other).outcome == "hit"
    assert look_up(cache, model, "a").outcome == "hit"
    assert len(cache) == 2


def test_a_pair_is_not_confused_with_other_texts(model: ServedModel) -> None:
    cache = AnswerCache(PLENTY)
    fill(cache, model, ("ab", "c"))
    others: list[Text] = ["ab", "abc", ("a", "bc"), ("abc", ""), ("c", "ab"), "ab\0c", "ab c"]
    assert look_up(cache, model, *others).outcome == "miss"


def test_the_least_recently_used_answers_are_evicted(model: ServedModel) -> None:
    one = AnswerCache(PLENTY)
    fill(one, model, "a")
    cache = AnswerCache(3 * one.bytes)
    for text in "abc":
        fill(cache, model, text)
    assert cache.bytes == 3 * one.bytes
    look_up(cache, model, "a")
    fill(cache, model, "d")
    assert [look_up(cache, model, text).outcome for text in "abcd"] == ["hit", "miss", "hit", "hit"]
    fill(cache, model, *"efgh")
    assert (len(cache), cache.bytes) == (3, 3 * one.bytes)
    assert look_up(cache, model, *"efgh").missing == ["e"]


def test_a_repeated_text_is_cached_once(model: ServedModel) -> None:
    one = AnswerCache(PLENTY)
    fill(one, model, "a")
    cache = AnswerCache(PLENTY)
    fill(cache, model, "a", "a")
    assert (len(cache), cache.bytes) == (1, one.bytes)


def test_an_answer_larger_than_the_cache_is_not_cached(model: ServedModel) -> None:
    cache = AnswerCache(10)
    fill(cache, model, "a")
    assert (len(cache), cache.bytes) == (0, 0)


def test_forgetting_a_model_removes_its_answers(model: ServedModel) -> None:
    sizes: list[int] = []
    cache, other = AnswerCache(PLENTY, sizes.append), replace(model)
    fill(cache, model, "a", "b")
    half = cache.bytes
    fill(cache, other, "a", "b", seed=1)
    assert sizes[-1] == cache.bytes == 2 * half
    cache.forget(model)
    assert sizes[-1] == cache.bytes == half
    assert look_up(cache, model, "a", "b").outcome == "miss"
    assert look_up(cache, other, "a", "b").outcome == "hit"


def test_the_stated_size_bounds_the_memory_used(model: ServedModel) -> None:
    cache = AnswerCache(64 * PLENTY)
    batches = [[f"text {i + j}" for i in range(500)] for j in range(0, 20_000, 500)]
    new = computed(model, 500, seed=0)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for batch in batches:
            look_up(cache, model, *batch).complete(new)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache) == 20_000
    assert after - before <= cache.bytes <= 1.5 * (after - before)
