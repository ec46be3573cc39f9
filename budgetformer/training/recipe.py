"""What a training run does, as one value that a TOML file can hold and a manifest can record."""

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
    """A training run.

    Attributes:
        data_name: what the data is called in the manifest; empty: the name of its folder.
        data_terms: under which terms the data may be used.
        seed: everything random follows from it.
        max_train_rows: train on so many rows, drawn by `seed`; 0: on all.
        max_length: tokens kept of a text (and of a pair together).
        truncation_side: end of a longer text that is cut off, "right" or "left".
        batch_size: items per optimiser step.
        learning_rate: peak of AdamW's rate, after a linear warm-up and before a linear decay.
        weight_decay: AdamW's, on matrices only.
        warmup: share of the steps that warm up.
        attention_dropout: dropout of attention weights while training (without it attention is
            faster).
        precision: "bf16" computes matrix products in bfloat16 (fast where the processor has them).
        dense_epochs: passes over the data with all heads (the teacher comes out of this); with no
            `budget_epochs` the result is the plain multi-head network.
        budget_epochs: passes in which every item trains at a random ladder step, taught by the
            teacher.
        small_step_bias: exponent b of the random step ceil(S * u^b); above 1 favours small steps.
        full_step_share: share of the random steps that is the full one whatever was drawn: it
            keeps the network that it came from, and teaches the small steps by shared weights.
        sandwich: run the smallest, a random and the full step in each update (Yu and Huang, 2019)
            instead of random ones alone.
        reach_weight: how much a text's weight follows the chance that it gets past step 0, 0..1.
        freeze_embeddings: leave the embeddings as the dense epochs made them while budgets train;
            half of a small encoder's weights are theirs, and so is much of a cheap step's time.
        gating: "hard" trains random steps with a straight-through gradient on g_d's relevance;
            "soft" is the paper's form: f_o chooses and is trained too, all heads are weighted.
        temperature: of the relevance softmax at the start and at the end of the budget epochs.
        noise: standard deviation on g_d's scores at the start; it ends at 0.
        entropy_weight, budget_weight: of the paper's two regularisers.
        budget_bounds: shares of the heads outside which the second of them pushes f_o back.
        fixed_share: the share that f_o answers to every input, untrained; None: f_o learns. An
            ablation of the paper.
        random_heads: heads are drawn at random instead of by g_d. An ablation of the paper, for
            `budgetformer.experiments.paper` only: no checkpoint can serve it.
        distillation: weight of the teacher's answer against the label's, 0..1; 0: no teacher.
        distillation_temperature: softens both answers before they are compared.
        head_selection, budget_scope, budget_ffn, embedding_exit: see `BudgetFormerConfig`.
        ladder: "uniform" keeps as many heads in every layer; "importance" gives each step's heads
            to the layers where the loss misses them most (a layer may get none).
        hold_out: share of the training rows that no weight ever sees, for calibration.
        exit_folds: parts for the out-of-fold step-0 answers that the encoder and f_o learn from.
        exit_share: weight of step 0's out-of-fold logits in the answers that training scores, so
            that the encoder learns what step 0 leaves over; 0: the encoder learns alone.
        exit_tokens: tokens of a text that step 0 reads at most; the encoder reads `max_length`.
        level_costs: most that `fast` and `balanced` may cost on average, as shares of the dense
            network's multiply-adds.
        exit_weights: size of step 0's table for neighbouring tokens, in weights; 0: none.
        hidden_size, num_layers, num_heads, intermediate_size, vocab_size: of a network from
            scratch.
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
    precision: Literal["fp32", "bf16"] = "fp32"
    dense_epochs: Count = 1
    budget_epochs: Count = 2
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
        """Read a TOML recipe, if any, then apply the overrides that are not None.

        Args:
            source: the file, or the name of a packaged recipe (see `packaged_recipes`).
            overrides: fields of the recipe.

        Raises:
            DataError: the file cannot be read, names an unknown key, or gives a key a value that it
                cannot have.
        """
        values: dict[str, Any] = {}
        if source is not None:
            named = str(source) in packaged_recipes()
            path = _PACKAGED / f"{source}.toml" if named else Path(source)
            try:
                values = tomllib.loads(path.read_text())
            except FileNotFoundError as error:
                names = ", ".join(packaged_recipes())
                raise DataError(f"{path}: no such file (packaged: {names})") from error
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
