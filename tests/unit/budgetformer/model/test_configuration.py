"""The configuration: its ladder, its checks, and reading back what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from transformers import AutoConfig

from budgetformer.model.architecture import uniform_ladder
from budgetformer.model.configuration import BudgetFormerConfig
from tests.support.networks import PROPERTY, configs, small_config

RAGGED = [[0, 1, 0], [1, 1, 1], [1, 1, 1], [4, 2, 3]]


@pytest.mark.parametrize(
    ("layers", "heads", "expected"),
    [
        (1, 1, [[1]]),
        (3, 2, [[1, 1, 1], [2, 2, 2]]),
        (2, 4, [[1, 1], [2, 2], [3, 3], [4, 4]]),
    ],
)
def test_step_k_of_the_uniform_ladder_has_k_heads_per_layer(
    layers: int, heads: int, expected: list[list[int]]
) -> None:
    assert uniform_ladder(layers, heads) == expected


def test_the_default_ladder_is_uniform() -> None:
    config = small_config()
    assert config.ladder == uniform_ladder(3, 4)
    assert config.num_steps == 4


def test_given_ladder_is_kept() -> None:
    config = small_config(ladder=RAGGED)
    assert config.ladder == RAGGED
    assert config.num_steps == 4


def test_head_size_and_neurons_per_head() -> None:
    config = small_config(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    assert (config.head_size, config.neurons_per_head) == (8, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_position": "middle"}, "norm_position must be one of .* not 'middle'"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"budget_scope": "token"}, "budget_scope must be one of"),
        ({"head_selection": "random"}, "head_selection must be one of"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of 4 heads"),
        ({"intermediate_size": 26}, "intermediate_size 26 is not a multiple of 4 heads"),
        ({"ladder": []}, "no step"),
        ({"ladder": [[1, 1, 1], [2, 2]]}, "ladder step 2 has 2 entries for 3 layers"),
        ({"ladder": [[1, 1, 1, 1]]}, "ladder step 1 has 4 entries for 3 layers"),
        ({"ladder": [[1, 5, 1]]}, "ladder step 1 must have 0 to 4 heads"),
        ({"ladder": [[-1, 1, 1]]}, "ladder step 1 must have 0 to 4 heads"),
        ({"ladder": [[0, 1, 1]], "budget_ffn": False}, "ladder step 1 must have 1 to 4 heads"),
        ({"ladder": [[2, 2, 2], [1, 2, 2]]}, "ladder step 2 computes fewer heads"),
        ({"budget_scope": "layer", "embedding_exit": True}, "embedding_exit requires budget_scope"),
        ({"exit_weight": [0.5]}, "a list of 4 .one per step."),
        ({"exit_weight": [0.5, 0.5, 0.5, float("inf")]}, "a list of 4 .one per step."),
        ({"exit_weight": float("nan")}, "exit_weight must be a finite number"),
        ({"encoder_weight": [0.5]}, "a list of 4 .one per step."),
        ({"encoder_weight": float("nan")}, "encoder_weight must be a finite number"),
        ({"budget_scope": "layer", "encoder_weight": 0.5}, "encoder_weight requires budget_scope"),
    ],
)
def test_invalid_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 26, "budget_ffn": False},
        {"ladder": [[0, 0, 1], [4, 4, 4]]},
        {"ladder": [[1, 2, 3], [3, 2, 1]]},
        {"ladder": [[1, 1, 1]], "budget_ffn": False},
        {"num_attention_heads": 1, "hidden_size": 3, "intermediate_size": 5},
    ],
)
def test_valid_values_are_accepted(changes: dict[str, Any]) -> None:
    assert small_config(**changes).num_steps >= 1


def test_heads_per_layer_reads_the_ladder() -> None:
    config = small_config(ladder=RAGGED)
    assert [config.heads_per_layer(step) for step in (1, 2, 3, 4)] == RAGGED


@pytest.mark.parametrize("name", ["exit_weight", "encoder_weight"])
def test_a_single_weight_holds_for_every_step(name: str) -> None:
    assert getattr(small_config(**{name: 0.5}), f"{name}s") == [0.5] * 4
    weights = [0.1, 0.2, 0.3, 0.4]
    assert getattr(small_config(**{name: weights}), f"{name}s") == weights


def test_without_an_encoder_weight_it_is_1() -> None:
    older = small_config(embedding_exit=True, exit_weight=0.5).to_dict()
    del older["encoder_weight"]
    assert BudgetFormerConfig.from_dict(older).encoder_weights == [1.0] * 4


def test_step_0_computes_no_heads() -> None:
    assert small_config(embedding_exit=True).heads_per_layer(0) == [0, 0, 0]


@pytest.mark.parametrize(
    ("step", "embedding_exit", "offered"),
    [
        (0, False, "1..4"),
        (5, False, "1..4"),
        (-1, False, "1..4"),
        (5, True, "0..4"),
        (-1, True, "0..4"),
    ],
)
def test_a_step_outside_the_ladder_is_refused(
    step: int, embedding_exit: bool, offered: str
) -> None:
    config = small_config(embedding_exit=embedding_exit)
    with pytest.raises(ValueError, match=rf"step {step} is not on the ladder \({offered}\)"):
        config.heads_per_layer(step)


@PROPERTY
@given(configs())
def test_to_dict_and_from_dict_keep_the_configuration(config: BudgetFormerConfig) -> None:
    copy = BudgetFormerConfig.from_dict(config.to_dict())
    assert copy.to_dict() == config.to_dict()


def test_a_saved_configuration_is_loaded_unchanged(tmp_path: Path) -> None:
    config = small_config(
        ladder=RAGGED,
        embedding_exit=True,
        exit_weight=0.25,
        budget_bounds=(0.2, 0.7),
        pooling="cls",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, BudgetFormerConfig)
    assert loaded.ladder == RAGGED
    assert (loaded.exit_weight, loaded.budget_bounds, loaded.pooling) == (0.25, [0.2, 0.7], "cls")
    assert loaded.num_labels == 3
