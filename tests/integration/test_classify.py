"""POST /classify: the content of its answers."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from budgetformer.classifier import Classifier
from tests.support.serving import Service
from tests.support.stores import (  # fmt: skip
    CHAINED,
    EXIT_TOKENS,
    HEADS,
    LABELS,
    LAYERS,
    MAX_TOKENS,
    PAIRS,
    PICKY,
    TAGS,
    TOPICS,
    labelled_sentences,
    sentences,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXT = sentences("animals")[4]
TEXTS = [text for text, _ in labelled_sentences()][::4]
LONG = "the otter slept " * 30
WINDOW = "once more while nobody looked " * 8
"""Fills the window of the encoder with words that say nothing of the topic."""

STAGES = ["tokenize", "budget", "queue", "compute", "total"]


async def test_the_fields_of_an_answer(shared: Service) -> None:
    answer = await shared.answer(TEXT)
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert answer["id"].startswith("classify-")
    assert answer["object"] == "list"
    assert isinstance(answer["created"], int)
    assert answer["model"] == "topics:2"
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens", "heads_used", "heads_total"}
    (item,) = answer["data"]
    assert set(item) == {
        "index", "label", "score", "probs", "num_classes", "labels", "heads", "macs",
        "dense_macs", "tokens", "truncated", "quality",
    }  # fmt: skip
    assert set(item["heads"]) == {"used", "total", "budget", "predicted", "steps", "per_layer"}
    assert item["heads"]["per_layer"] is None


async def test_the_values_of_an_item(shared: Service) -> None:
    item = await shared.item(TEXT)
    assert item["index"] == 0
    assert item["num_classes"] == len(LABELS) == len(item["probs"])
    assert sum(item["probs"]) == pytest.approx(1)
    assert item["label"] == LABELS[item["probs"].index(max(item["probs"]))]
    assert item["score"] == max(item["probs"])
    assert item["heads"]["total"] == LAYERS * HEADS
    assert item["macs"] > 0
    assert item["truncated"] is False
    assert item["quality"] == "auto"


async def test_all_labels_are_listed_by_descending_score(shared: Service) -> None:
    item = await shared.item(TEXT)
    scores = [one["score"] for one in item["labels"]]
    assert scores == sorted(item["probs"], reverse=True)
    assert {one["label"]: one["score"] for one in item["labels"]} == dict(
        zip(LABELS, item["probs"], strict=True)
    )


async def test_usage_is_the_sum_over_the_items(shared: Service) -> None:
    answer = await shared.answer(TEXTS, quality="best")
    tokens = sum(item["tokens"] for item in answer["data"])
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "heads_used": sum(item["heads"]["used"] for item in answer["data"]),
        "heads_total": LAYERS * HEADS * len(TEXTS),
    }


async def test_the_answers_to_a_batch_are_in_its_order(shared: Service) -> None:
    answer = await shared.answer(TEXTS)
    assert [item["index"] for item in answer["data"]] == list(range(len(TEXTS)))
    alone = [await shared.item(text) for text in TEXTS[:6]]
    for together, single in zip(answer["data"], alone, strict=False):
        assert together["probs"] == pytest.approx(single["probs"], rel=1e-4)


async def test_a_model_recognises_its_training_sentences(shared: Service) -> None:
    rows = labelled_sentences()[:60]
    answer = await shared.answer([text for text, _ in rows], quality="best")
    right = sum(i["label"] == label for i, (_, label) in zip(answer["data"], rows, strict=True))
    assert right > 0.9 * len(rows)


@pytest.mark.parametrize(
    "choice",
    [
        {"quality": "fast"},
        {"quality": "balanced"},
        {"quality": "best"},
        {"quality": 1.5},
        {"quality": 0},
        {"heads": 0},
        {"heads": 3},
        {"quality": "best", "max_heads": 2},
        {"quality": "balanced", "max_heads": 1},
        {"quality": "best", "max_heads": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [TOPICS, PICKY, CHAINED])
async def test_answers_equal_those_of_the_python_classifier(
    shared: Service, model_store: Path, name: str, choice: dict[str, Any]
) -> None:
    if name == PICKY and 0 in (choice.get("heads"), choice.get("max_heads")):
        pytest.skip("this model has no step 0")
    expected = Classifier(model_store / name)(TEXTS, **choice)
    answer = await shared.answer(TEXTS, model=name, **choice)
    for item, prediction in zip(answer["data"], expected, strict=True):
        assert item["label"] == prediction.label
        assert item["probs"] == pytest.approx(prediction.probs, rel=1e-4)
        assert item["heads"]["budget"] == prediction.budget
        assert item["heads"]["predicted"] == prediction.predicted
        assert item["heads"]["steps"] == prediction.steps
        assert item["heads"]["used"] == prediction.heads
        assert (item["macs"], item["dense_macs"]) == (prediction.macs, prediction.dense_macs)
        assert item["tokens"] == prediction.tokens


class TestLabelsAndScores:
    @pytest.mark.parametrize("top_k", [1, 2, 3, 50])
    async def test_top_k_keeps_the_best_labels(self, shared: Service, top_k: int) -> None:
        every = await shared.item(TEXT)
        item = await shared.item(TEXT, top_k=top_k)
        assert item["labels"] == every["labels"][:top_k]
        assert item["probs"] == every["probs"]

    async def test_threshold_only_shortens_the_list_of_labels(self, shared: Service) -> None:
        every = await shared.item(TEXT)
        middle = sorted(every["probs"])[1]
        item = await shared.item(TEXT, threshold=middle)
        assert item["labels"] == every["labels"][:2]
        assert (item["label"], item["probs"]) == (every["label"], every["probs"])

    async def test_a_threshold_above_all_scores_leaves_no_labels(self, shared: Service) -> None:
        item = await shared.item(TEXT, threshold=1)
        assert item["labels"] == []
        assert item["label"] in LABELS

    async def test_top_k_and_threshold_can_be_combined(self, shared: Service) -> None:
        item = await shared.item(TEXT, threshold=0, top_k=2)
        assert len(item["labels"]) == 2

    async def test_without_activation_probs_are_logits(self, shared: Service) -> None:
        expected = await shared.item(TEXT)
        item = await shared.item(TEXT, use_activation=False)
        powers = [math.exp(logit) for logit in item["probs"]]
        assert [p / sum(powers) for p in powers] == pytest.approx(expected["probs"])
        assert item["score"] == pytest.approx(expected["score"])
        assert item["label"] == expected["label"]


class TestBudgets:
    @pytest.mark.parametrize("heads", range(HEADS + 1))
    async def test_heads_fixes_the_number_of_heads(self, shared: Service, heads: int) -> None:
        item = await shared.item(TEXT, heads=heads)
        assert item["heads"]["budget"] == heads
        assert item["heads"]["used"] == heads * LAYERS

    async def test_more_heads_cost_more(self, shared: Service) -> None:
        costs = [(await shared.item(TEXT, heads=k))["macs"] for k in range(HEADS + 1)]
        assert costs == sorted(set(costs))
        full = await shared.item(TEXT, heads=HEADS)
        assert full["macs"] >= full["dense_macs"]
        assert costs[0] < 0.1 * full["dense_macs"]

    @pytest.mark.parametrize("ceiling", range(HEADS + 1))
    async def test_max_heads_limits_the_budget(self, shared: Service, ceiling: int) -> None:
        answer = await shared.answer(TEXTS, quality="best", max_heads=ceiling)
        assert max(item["heads"]["budget"] for item in answer["data"]) <= ceiling

    async def test_heads_override_quality_and_ceiling(self, shared: Service) -> None:
        item = await shared.item(TEXT, heads=3, max_heads=1, quality="fast")
        assert item["heads"]["budget"] == 3

    @pytest.mark.parametrize(
        ("quality", "budgets"),
        [("fast", {0}), ("balanced", {0, 2}), ("best", {1, 3, 4}), (1.5, {1}), (100, {0})],
    )
    async def test_qualities_have_the_budgets_of_their_operating_points(
        self, shared: Service, quality: str | float, budgets: set[int]
    ) -> None:
        answer = await shared.answer(TEXTS, quality=quality)
        assert {item["heads"]["budget"] for item in answer["data"]} == budgets
        assert {item["quality"] for item in answer["data"]} == {quality}

    async def test_the_default_is_auto_which_means_balanced_without_load(
        self, shared: Service
    ) -> None:
        budgets = [
            [item["heads"]["budget"] for item in (await shared.answer(TEXTS, **choice))["data"]]
            for choice in ({}, {"quality": "auto"}, {"quality": None}, {"quality": "balanced"})
        ]
        assert budgets[0] == budgets[1] == budgets[2] == budgets[3]

    async def test_the_cost_of_an_escalated_item_includes_every_step(self, shared: Service) -> None:
        answer = await shared.answer(TEXTS, quality="best")
        escalated = [item for item in answer["data"] if item["heads"]["budget"] == 4]
        assert escalated
        for item in escalated:
            assert item["heads"]["used"] in ((1 + 4) * LAYERS, (3 + 4) * LAYERS)
            assert item["macs"] > item["dense_macs"]

    async def test_return_heads_lists_the_heads_of_each_layer(self, shared: Service) -> None:
        item = await shared.item(TEXT, heads=2, return_heads=True)
        assert [len(layer) for layer in item["heads"]["per_layer"]] == [2] * LAYERS
        assert item["heads"]["per_layer"] == [[0, 1]] * LAYERS

    async def test_heads_selected_by_input_are_distinct(self, shared: Service) -> None:
        answer = await shared.answer(TEXTS, model=PICKY, heads=2, return_heads=True)
        for item in answer["data"]:
            for layer in item["heads"]["per_layer"]:
                assert len(set(layer)) == 2
                assert set(layer) <= set(range(HEADS))

    async def test_return_heads_lists_no_heads_at_step_0(self, shared: Service) -> None:
        item = await shared.item(TEXT, heads=0, return_heads=True)
        assert item["heads"]["per_layer"] == [[]] * LAYERS


class TestKindsOfInput:
    async def test_an_object_is_answered_like_its_text(self, shared: Service) -> None:
        assert (await shared.item({"text": TEXT}))["probs"] == (await shared.item(TEXT))["probs"]

    async def test_strings_and_objects_can_be_mixed(self, shared: Service) -> None:
        answer = await shared.answer([TEXT, {"text": TEXT}, {"text": TEXT, "text_pair": None}])
        first, *others = [item["probs"] for item in answer["data"]]
        for probs in others:
            assert probs == pytest.approx(first, rel=1e-5)

    async def test_pairs_are_answered_as_by_the_python_classifier(
        self, shared: Service, model_store: Path
    ) -> None:
        animals, music = sentences("animals")[:8], sentences("music")[:8]
        expected = Classifier(model_store / PAIRS)(animals, music, "best")
        given = [{"text": a, "text_pair": b} for a, b in zip(animals, music, strict=True)]
        answer = await shared.answer(given, model=PAIRS, quality="best")
        for item, prediction in zip(answer["data"], expected, strict=True):
            assert item["probs"] == pytest.approx(prediction.probs, rel=1e-4)
            assert item["tokens"] == prediction.tokens

    async def test_the_second_text_of_a_pair_matters(self, shared: Service) -> None:
        one = {"text": TEXT, "text_pair": sentences("animals")[0]}
        other = {"text": TEXT, "text_pair": sentences("music")[0]}
        answer = await shared.answer([one, other, TEXT], model=PAIRS, heads=HEADS)
        assert len({tuple(item["probs"]) for item in answer["data"]}) == 3

    async def test_multi_label_scores_are_sigmoids(self, shared: Service) -> None:
        expected = await shared.item(TEXT, model=TAGS)
        logits = (await shared.item(TEXT, model=TAGS, use_activation=False))["probs"]
        assert expected["probs"] == pytest.approx([1 / (1 + math.exp(-z)) for z in logits])

    async def test_multi_label_answers_equal_those_of_the_python_classifier(
        self, shared: Service, model_store: Path
    ) -> None:
        expected = Classifier(model_store / TAGS)(TEXTS)
        answer = await shared.answer(TEXTS, model=TAGS, quality="balanced")
        for item, prediction in zip(answer["data"], expected, strict=True):
            assert item["probs"] == pytest.approx(prediction.probs, rel=1e-4)

    async def test_a_model_may_be_named_with_its_version(self, shared: Service) -> None:
        assert (await shared.answer(TEXT, model="topics:2"))["model"] == "topics:2"
        assert (await shared.answer(TEXT, model="topics"))["model"] == "topics:2"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "\n\t",
            "\x00",
            "a\x00b",
            "🦦🎻⛈️",
            "👩‍👩‍👧‍👦" * 20,
            "שלום עולם",
            "مرحبا بالعالم",
            "漢字" * 50,
            "e\u0301" * 10,
            "\u202eright to left\u202c",
            "\ufeff\ufffe\uffff",
            "\u0600" * 200,
            "\x7f\x1b[31m",
            "[CLS] [SEP] [PAD] [UNK]",
            "x" * 4000,
            "<script>alert(1)</script>",
            "%00%ff",
        ],
        ids=lambda text: ascii(text)[:20],
    )
    async def test_unusual_texts_are_classified(self, shared: Service, text: str) -> None:
        for given in (text, [text], {"text": text, "text_pair": text}):
            item = await shared.item(given)
            assert item["label"] in LABELS
            assert item["tokens"] >= 2
            assert all(map(math.isfinite, item["probs"]))

    async def test_empty_texts_do_not_change_the_answers_to_others(self, shared: Service) -> None:
        answer = await shared.answer(["", TEXT, ""])
        assert answer["data"][1]["probs"] == pytest.approx(
            (await shared.item(TEXT))["probs"], rel=1e-4
        )


class TestTruncation:
    async def test_a_long_text_is_truncated_and_marked(self, shared: Service) -> None:
        answer = await shared.answer([TEXT, LONG])
        assert [item["truncated"] for item in answer["data"]] == [False, True]
        assert answer["data"][1]["tokens"] == MAX_TOKENS

    async def test_a_long_pair_is_truncated_and_marked(self, shared: Service) -> None:
        item = await shared.item({"text": LONG, "text_pair": LONG}, model=PAIRS)
        assert (item["truncated"], item["tokens"]) == (True, MAX_TOKENS)

    @pytest.mark.parametrize("label", LABELS)
    async def test_step_0_reads_beyond_the_window_of_the_encoder(
        self, shared: Service, label: str
    ) -> None:
        decisive = " ".join(sentences(label)[:6])
        item = await shared.item(f"{WINDOW}{decisive}", max_heads=0)
        assert (item["label"], item["heads"]["budget"]) == (label, 0)
        assert (item["tokens"], item["truncated"]) == (MAX_TOKENS, True)
        cut = await shared.item(WINDOW, max_heads=0)
        assert (cut["tokens"], cut["truncated"]) == (MAX_TOKENS, True)
        assert item["score"] > max(cut["score"], 0.5)

    async def test_step_0_reads_at_most_exit_tokens(self, shared: Service) -> None:
        window = WINDOW * (EXIT_TOKENS // 32)
        beyond = " ".join(sentences(LABELS[0]))
        answers = [await shared.item(window + end, max_heads=0) for end in ("", beyond)]
        assert answers[0]["probs"] == answers[1]["probs"]

    async def test_step_0_reads_both_texts_of_a_long_pair(self, shared: Service) -> None:
        animals, music = (" ".join(sentences(name)[:6]) for name in ("animals", "music"))
        for pair, label in ((animals, "same"), (music, "other")):
            item = await shared.item(
                {"text": WINDOW + animals, "text_pair": WINDOW + pair}, model=PAIRS, max_heads=0
            )
            assert (item["label"], item["heads"]["budget"]) == (label, 0)

    async def test_short_texts_are_accepted_without_truncation(self, shared: Service) -> None:
        assert (await shared.item(TEXT, truncate=False))["truncated"] is False


class TestHeaders:
    async def test_server_timing_lists_every_stage(self, shared: Service) -> None:
        header = (await shared.ask(TEXT)).headers["server-timing"]
        parts = [part.strip().split(";dur=") for part in header.split(",")]
        assert [name for name, _ in parts] == STAGES
        assert all(float(duration) >= 0 for _, duration in parts)

    @pytest.mark.parametrize("given", ["abc", "3f2504e0-4f89-41d3-9a0c-0305e82c3301", "a.b:c_d"])
    async def test_a_valid_request_id_is_returned(self, shared: Service, given: str) -> None:
        response = await shared.client.post(
            "/classify", json={"input": TEXT}, headers={"X-Request-Id": given}
        )
        assert response.headers["x-request-id"] == given
        assert response.json()["id"] == f"classify-{given}"

    @pytest.mark.parametrize("given", ["", "a b", "x" * 200, "a\tb", "ü"])
    async def test_an_invalid_request_id_is_replaced(self, shared: Service, given: str) -> None:
        headers = [(b"X-Request-Id", given.encode("latin-1"))]
        response = await shared.client.get("/health/live", headers=headers)
        made = response.headers["x-request-id"]
        assert made
        assert made != given

    async def test_every_request_has_a_new_id(self, shared: Service) -> None:
        made = {(await shared.ask(TEXT)).headers["x-request-id"] for _ in range(5)}
        assert len(made) == 5

    async def test_a_trace_context_is_accepted(self, shared: Service) -> None:
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        response = await shared.client.post("/classify", json={"input": TEXT}, headers=headers)
        assert response.status_code == 200


async def test_concurrent_requests_get_their_own_answers(shared: Service) -> None:
    expected = [(await shared.item(text, quality="best"))["probs"] for text in TEXTS]
    given = TEXTS * 4
    items = await asyncio.gather(*(shared.item(text, quality="best") for text in given))
    for item, probs in zip(items, expected * 4, strict=True):
        assert item["probs"] == pytest.approx(probs, rel=1e-4)
