"""What a training run does, as one value that a TOML file can hold and a manifest can record."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from budgetformer.errors import DataError

_PACKAGED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
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
    seed: int = 0
    max_train_rows: int = 0
    max_length: int = 128
    truncation_side: Literal["right", "left"] = "right"
    batch_size: int = 32
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    attention_dropout: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    dense_epochs: int = 1
    budget_epochs: int = 2
    small_step_bias: float = 2.0
    full_step_share: float = 0.0
    sandwich: bool = True
    reach_weight: float = 0.0
    freeze_embeddings: bool = False
    gating: Literal["hard", "soft"] = "hard"
    temperature: tuple[float, float] = (2.0, 0.5)
    noise: float = 0.5
    entropy_weight: float = 0.0
    budget_weight: float = 0.0
    budget_bounds: tuple[float, float] = (0.1, 0.9)
    fixed_share: float | None = None
    random_heads: bool = False
    distillation: float = 0.7
    distillation_temperature: float = 2.0
    head_selection: Literal["input", "ranked"] = "ranked"
    budget_scope: Literal["input", "layer"] = "input"
    budget_ffn: bool = True
    embedding_exit: bool = True
    ladder: Literal["uniform", "importance"] = "uniform"
    hold_out: float = 0.1
    exit_folds: int = 5
    exit_share: float = 0.7
    exit_tokens: int = 4096
    exit_weights: int = 2**20
    level_costs: tuple[float, float] = (0.1, 0.3)
    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 8
    intermediate_size: int = 1024
    vocab_size: int = 8000

    @classmethod
    def read(cls, source: Path | str | None, **overrides: Any) -> Recipe:
        """Read a TOML recipe, if any, then apply the overrides that are not None.

        Args:
            source: the file, or the name of a packaged recipe (see `packaged_recipes`).
            overrides: fields of the recipe.

        Raises:
            DataError: the file cannot be read, or names an unknown key.
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
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return dataclasses.asdict(self)


def packaged_recipes() -> list[str]:
    """Return the names of the recipes that come with this package."""
    return sorted(path.stem for path in _PACKAGED.glob("*.toml"))
