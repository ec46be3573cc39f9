"""The recipe (settings) of a training run; read from TOML files, stored in manifests."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from budgetformer.errors import DataError

_PACKAGED = Path(__file__).parent / "recipes"

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Recipe:
    """The settings of a training run.

    Attributes:
        data_name: name of the data in the manifest; empty: the name of its folder.
        data_terms: terms of use of the data.
        seed: seed of all random numbers.
        max_train_rows: number of training rows, drawn at random; 0: all.
        max_length: maximum tokens of a text or pair that the encoder reads.
        truncation_side: the end at which longer texts are truncated, "right" or "left".
        batch_size: items per optimiser step.
        learning_rate: peak learning rate of AdamW, between a linear warm-up and a linear decay.
        weight_decay: weight decay of AdamW, applied to matrices only.
        warmup: share of the optimiser steps in which the learning rate rises.
        attention_dropout: dropout of attention weights in training (attention is faster without).
        precision: "bf16" computes matrix products in bfloat16, "fp32" in float32; "auto" uses
            bfloat16 if the device has instructions for it.
        dense_epochs: epochs with all heads, which produce the teacher. Without `budget_epochs`, the
            result is the plain multi-head network.
        budget_epochs: epochs in which items train at random ladder steps, with the teacher.
        min_budget_updates: minimum number of optimiser steps in the budget epochs, if there are
            any; with few texts, epochs are added. Small steps need a few thousand updates.
        small_step_bias: exponent b of the random step ceil(S * u^b); above 1 favours small steps.
        full_step_share: share of the random steps that are replaced by the full step, to preserve
            the full network.
        sandwich: train the smallest, a random and the full ladder step in each update (Yu and
            Huang, 2019), instead of random ones only.
        reach_weight: how strongly a text's loss is weighted by its chance to get past step 0, 0..1.
        freeze_embeddings: whether the budget epochs leave the embeddings unchanged, which saves
            time: they are half of a small encoder's weights.
        gating: "hard" trains random steps with a straight-through gradient on g_d's relevance;
            "soft" trains f_o too, which chooses the steps, and weights all heads (paper).
        temperature: temperature of the relevance softmax at the start and the end of the budget
            epochs.
        noise: initial standard deviation of the noise on g_d's scores; it decays to 0.
        entropy_weight, budget_weight: weights of the paper's two regularisers, on the entropy of
            the relevance and on the budget.
        budget_bounds: lowest and highest share of the heads without a budget penalty.
        fixed_share: constant output of f_o; None: f_o is trained. An ablation of the paper.
        random_heads: draw heads at random instead of by g_d. An ablation of the paper, for
            `budgetformer.experiments.paper` only: no checkpoint can serve it.
        distillation: weight of the distillation loss, 0..1; the label loss has the rest; 0: no
            teacher.
        distillation_temperature: temperature of the student's and the teacher's logits in the
            distillation loss.
        head_selection, budget_scope, budget_ffn, embedding_exit: see `BudgetFormerConfig`.
        ladder: "uniform" gives every layer the same number of heads; "importance" gives a step the
            most important heads of the whole network, so that a layer may get none.
        hold_out: share of the training rows held out for calibration.
        exit_folds: number of folds for step 0's out-of-fold logits, with which the encoder is
            trained.
        exit_share: weight of step 0's out-of-fold logits, which are added to the encoder's in
            training, so that the encoder learns to correct step 0; 0: not added.
        exit_tokens: maximum tokens of a text that step 0 reads.
        level_costs: maximum mean costs of `fast` and `balanced`, as shares of the dense network's
            multiply-adds.
        exit_weights: number of weights in step 0's table for pairs of tokens; 0: no table.
        hidden_size, num_layers, num_heads, intermediate_size, vocab_size: sizes of a network that
            is trained from scratch.
    """

    data_name: str = ""
    data_terms: str = "not stated"
    seed: Count = 0
    max_train_rows: Count = 0
    max_length: Size = 128
    truncation_side: Literal["right", "left"] = "right"
    batch_size: Size = 32
    learning_rate: Positive = 5e-5
    weight_decay: Weight = 0.01
    warmup: Share = 0.06
    attention_dropout: Share = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    dense_epochs: Count = 1
    budget_epochs: Count = 2
    min_budget_updates: Count = 0
    small_step_bias: Positive = 2.0
    full_step_share: Share = 0.0
    sandwich: bool = True
    reach_weight: Share = 0.0
    freeze_embeddings: bool = False
    gating: Literal["hard", "soft"] = "hard"
    temperature: tuple[Positive, Positive] = (2.0, 0.5)
    noise: Weight = 0.5
    entropy_weight: Weight = 0.0
    budget_weight: Weight = 0.0
    budget_bounds: tuple[Share, Share] = (0.1, 0.9)
    fixed_share: Share | None = None
    random_heads: bool = False
    distillation: Share = 0.7
    distillation_temperature: Positive = 2.0
    head_selection: Literal["input", "ranked"] = "ranked"
    budget_scope: Literal["input", "layer"] = "input"
    budget_ffn: bool = True
    embedding_exit: bool = True
    ladder: Literal["uniform", "importance"] = "uniform"
    hold_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    exit_folds: Annotated[int, Field(ge=2)] = 5
    exit_share: Weight = 0.7
    exit_tokens: Size = 4096
    exit_weights: Count = 2**20
    level_costs: tuple[Share, Share] = (0.1, 0.3)
    hidden_size: Size = 256
    num_layers: Size = 2
    num_heads: Size = 8
    intermediate_size: Size = 1024
    vocab_size: Size = 8000

    @classmethod
    def read(cls, source: Path | str | None, **overrides: Any) -> Recipe:
        """Read a recipe from a TOML file, and replace the fields in `overrides` that are not None.

        Args:
            source: a file, or the name of a packaged recipe (see `packaged_recipes`); None: the
                defaults.
            overrides: values by field name.

        Raises:
            DataError: the file cannot be read, or has an unknown key or an invalid value.
        """
        values: dict[str, Any] = {}
        if source is not None:
            is_packaged = str(source) in packaged_recipes()
            path = _PACKAGED / f"{source}.toml" if is_packaged else Path(source)
            try:
                values = tomllib.loads(path.read_text())
            except FileNotFoundError as error:
                names = ", ".join(packaged_recipes())
                raise DataError(f"{path}: no such file (packaged recipes: {names})") from error
            except (OSError, tomllib.TOMLDecodeError) as error:
                raise DataError(f"{path}: {error}") from error
        values |= {name: value for name, value in overrides.items() if value is not None}
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise DataError(f"unknown recipe key: {', '.join(sorted(unknown))}")
        for name, value in values.items():
            if isinstance(value, list):  # TOML has no tuples
                values[name] = tuple(value)
        try:
            return cls(**values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key, message = str(problem["loc"][0]), problem["msg"]
            raise DataError(f"recipe key {key} is {values[key]!r}: {message}") from None

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return dataclasses.asdict(self)


def packaged_recipes() -> list[str]:
    """Return the names of the recipes that come with this package."""
    return sorted(path.stem for path in _PACKAGED.glob("*.toml"))
