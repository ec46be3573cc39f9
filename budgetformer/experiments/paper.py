"""Study whether the budget of the paper's recipe adapts to texts.

`python -m budgetformer.experiments.paper --data FOLDER ...` trains, on each data set, the plain
multi-head network, the paper's recipe, the recipe with a price on the budget, and the paper's two
ablations, all from scratch and with the same steps. It prints their results on the test file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from budgetformer.cost.macs import decision_macs, dense_macs, encoder_macs
from budgetformer.errors import DataError
from budgetformer.experiments import terminal
from budgetformer.model.architecture import Architecture
from budgetformer.model.budget import Gating
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.data import Examples, TokenBatch, TokenizedTexts, read_examples
from budgetformer.training.pages import markdown_table
from budgetformer.training.pipeline import build_model, find_data, find_start, saved_tokenizer
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import Log, Trainer, inputs
from budgetformer.wilson import interval

FULL = "full multi-head"
RECIPE = "paper's recipe"
VARIANTS: dict[str, dict[str, Any]] = {
    # No decision: with ranked heads, g_d's gradient does not affect the plain network.
    FULL: {"head_selection": "ranked", "budget_scope": "input"},
    RECIPE: {},
    # With s_min = s_max, the hinge is a price on every head above s_min.
    "price on s": {"budget_bounds": (0.1, 0.1), "budget_weight": 0.1},
    "fixed s = 0.1": {"fixed_share": 0.1},
    "fixed s = 1.0": {"fixed_share": 1.0},
    "random heads": {"random_heads": True},
}
FORCED = (1, 2, 4, 8)
EVALUATION_BATCH = 64

PUBLISHED: dict[str, dict[str, float]] = {
    "dbpedia14": {
        FULL: 0.9830,
        RECIPE: 0.9859,
        "fixed s = 0.1": 0.9846,
        "random heads": 0.7511,
    },
    "ag_news": {FULL: 0.9099, RECIPE: 0.9022},
    "imdb": {FULL: 0.8354, RECIPE: 0.8356},
    "snli": {FULL: 0.7835, RECIPE: 0.8106, "fixed s = 0.1": 0.6704, "random heads": 0.3370},
}
"""The paper's test accuracies (full data, width 768), by folder name."""


@dataclass(frozen=True)
class Outcome:
    """The results of one trained network on N test texts.

    Attributes:
        recipe: recipe of the network, as plain values.
        right: 1 if the answer at the budget of f_o (the plain network: all heads) is right, else 0
            [N].
        s: outputs of f_o [N][layers]; empty for the plain network.
        heads: heads computed [N][layers].
        forced: accuracy by forced number of heads in every layer.
        saved_attention: share of the dense multiply-adds that is saved if only the attention of
            unselected heads is skipped, as the paper counts.
        saved_compact: share that a compact pass saves, which also skips the projections of
            unselected heads, minus the cost of f_o and g_d.
    """

    recipe: dict[str, Any]
    right: list[int]
    s: list[list[float]]
    heads: list[list[int]]
    forced: dict[str, float]
    saved_attention: float
    saved_compact: float


@dataclass(frozen=True)
class DataSet:
    """A data set, tokenized once for all variants."""

    name: str
    train: Examples
    tokens: TokenizedTexts
    test: Examples
    test_tokens: TokenizedTexts
    vocab_size: int

    @classmethod
    def read(cls, folder: Path, recipe: Recipe, work_dir: Path) -> DataSet:
        """Read a folder with a training and a test file; the tokenizer is saved in `work_dir`.

        Raises:
            DataError: a file is missing, or the labels are not one per text.
        """
        train_file, test_file = find_data(folder)
        if test_file is None:
            raise DataError(f"{folder}: the folder has no test file")
        train = read_examples(train_file)
        if train.multi_label:
            raise DataError(f"{folder}: the study requires one label per text")
        if recipe.max_train_rows:
            train = train.sample(recipe.max_train_rows, recipe.seed)
        test = read_examples(test_file, train.names)
        tokenizer = saved_tokenizer(train, recipe.vocab_size, work_dir)
        window = (recipe.max_length, recipe.truncation_side)
        return cls(
            name=folder.name,
            train=train,
            tokens=TokenizedTexts(tokenizer, train.texts, train.pairs, *window),
            test=test,
            test_tokens=TokenizedTexts(tokenizer, test.texts, test.pairs, *window),
            vocab_size=tokenizer.get_vocab_size(),
        )


def variant_recipe(base: Recipe, name: str) -> Recipe:
    """Return the recipe of a variant, with the same data, steps and seed."""
    changes = VARIANTS[name]
    if name == FULL:
        changes = changes | {"dense_epochs": base.budget_epochs, "budget_epochs": 0}
    return Recipe(**base.as_dict() | changes)


def run_variant(data: DataSet, recipe: Recipe, work_dir: Path, log: Log) -> Outcome:
    """Train and score one network; an interrupted run resumes from `work_dir`."""
    torch.manual_seed(recipe.seed)
    model = build_model(find_start(None), data.train, recipe, data.vocab_size)
    Trainer(model, data.tokens, data.train, recipe, work_dir, log).train()
    outcome = score(model, data, recipe)
    shutil.rmtree(work_dir)
    return outcome


def score(model: BudgetFormerForSequenceClassification, data: DataSet, recipe: Recipe) -> Outcome:
    """Score a network on the test texts, at the budgets of f_o and at forced budgets."""
    model.eval()
    model.set_gating(Gating(random_heads=recipe.random_heads))
    torch.manual_seed(recipe.seed)  # random heads are drawn in evaluation too
    config = model.config
    plain = recipe.budget_epochs == 0
    right, s, heads = _answers(model, data, config.num_steps if plain else None)
    lengths = data.test_tokens.lengths
    forced = {
        str(k): float(_answers(model, data, k)[0].mean()) for k in FORCED if k <= config.num_steps
    }
    attention, compact = (0.0, 0.0) if plain else saved_shares(config, heads, lengths)
    return Outcome(
        recipe=json.loads(json.dumps(recipe.as_dict())),
        right=right.tolist(),
        s=[] if plain else s.round(5).tolist(),
        heads=heads.tolist(),
        forced=forced,
        saved_attention=attention,
        saved_compact=compact,
    )


def saved_shares(
    config: Architecture, heads: np.ndarray, lengths: np.ndarray
) -> tuple[float, float]:
    """Return `saved_attention` and `saved_compact` (see `Outcome`) of selected heads [N, L]."""
    dense = sum(dense_macs(config, int(n)) for n in lengths)
    compact = sum(
        encoder_macs(config, plan, int(n)) + decision_macs(config)
        for plan, n in zip(heads.tolist(), lengths, strict=True)
    )
    skipped = (config.num_attention_heads - heads).sum(1)
    attention = float((skipped * 2 * lengths**2 * config.head_size).sum())
    return attention / dense, 1 - compact / dense


@torch.no_grad()
def _answers(
    model: BudgetFormerForSequenceClassification, data: DataSet, step: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return right [N], s [N, layers or 1] and heads [N, layers]; step None: f_o's budgets."""
    count = len(data.test)
    right = np.zeros(count, dtype=np.int64)
    heads = np.zeros((count, model.config.num_hidden_layers), dtype=np.int64)
    s = np.zeros((count, 1 if model.config.budget_scope == "input" else heads.shape[1]))
    batch: TokenBatch
    for batch in data.test_tokens.batches(EVALUATION_BATCH):
        output = model(**inputs(batch), steps=step)
        right[batch.rows] = output.logits.argmax(-1).numpy() == data.test.labels[batch.rows]
        heads[batch.rows] = output.gates.sum(-1).long().numpy()
        s[batch.rows] = output.budget.numpy()
    return right, s, heads


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve of scores [N]; 0.5 if all rows have the same class."""
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return 0.5
    rank_sum = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(rank_sum / (positives * negatives))


def explained_variance(values: np.ndarray, groups: np.ndarray) -> float:
    """Return the share of the variance of values [N] that lies between groups [N]."""
    if values.min() == values.max():  # rounding may give a variance above 0
        return 0.0
    means = np.zeros(len(values))
    for group in np.unique(groups):
        means[groups == group] = values[groups == group].mean()
    return float(means.var() / values.var())


def study(
    folder: Path, base: Recipe, work_dir: Path, log: Log
) -> tuple[DataSet, dict[str, Outcome]]:
    """Run the variants on one data set whose results are not in `work_dir`; return all results."""
    folder = folder.resolve()
    results = work_dir / folder.name
    data = DataSet.read(folder, base, results)
    outcomes: dict[str, Outcome] = {}
    for name in VARIANTS:
        recipe = variant_recipe(base, name)
        slug = "-".join("".join(c if c.isalnum() else " " for c in name).split())
        file = results / f"{slug}.json"
        outcome = _read_outcome(file, recipe)
        if outcome is None:
            log(f"{data.name}: {name}")
            outcome = run_variant(data, recipe, file.with_suffix(".work"), log)
            file.write_text(json.dumps(asdict(outcome)))
        outcomes[name] = outcome
    return data, outcomes


def _read_outcome(file: Path, recipe: Recipe) -> Outcome | None:
    if not file.is_file():
        return None
    outcome = Outcome(**json.loads(file.read_text()))
    if outcome.recipe != json.loads(json.dumps(recipe.as_dict())):
        raise DataError(f"{file}: belongs to another recipe; choose another --work-dir")
    return outcome


def report(data: DataSet, outcomes: dict[str, Outcome]) -> str:
    """Return the tables of one data set in Markdown."""
    headings = [
        "variant", "paper", "accuracy", "95 %", "s mean", "s sd, texts", "s sd, layers",
        "same plan", "saved, attention only", "saved, compact",
    ]  # fmt: skip
    rows = [_main_row(data.name, name, outcome) for name, outcome in outcomes.items()]
    by_step = [
        "variant", *(f"k = {k}" for k in outcomes[FULL].forced),
        "s where full is wrong", "s where full is right", "AUC", "s explained by label",
    ]  # fmt: skip
    failed = np.array(outcomes[FULL].right) == 0
    second_rows = [
        _second_row(name, outcome, failed, data.test.labels) for name, outcome in outcomes.items()
    ]
    return f"""### {data.name}

{len(data.train)} training texts, {len(data.test)} test texts.

{markdown_table(headings, rows)}

{markdown_table(by_step, second_rows)}
"""


def _main_row(data_name: str, name: str, outcome: Outcome) -> list[str]:
    accuracy = float(np.mean(outcome.right))
    low, high = interval(accuracy, len(outcome.right))
    published = PUBLISHED.get(data_name, {}).get(name)
    cells = [
        name,
        "" if published is None else f"{published:.4f}",
        f"{accuracy:.4f}",
        f"{low:.4f}..{high:.4f}",
    ]
    if outcome.s:
        s = np.array(outcome.s)
        plans = np.unique(outcome.heads, axis=0, return_counts=True)[1]
        cells += [
            f"{s.mean():.3f}",
            f"{s.mean(1).std():.4f}",
            f"{s.mean(0).std():.4f}",
            f"{plans.max() / len(s):.1%}",
            f"{outcome.saved_attention:.1%}",
            f"{outcome.saved_compact:.1%}",
        ]
    else:
        cells += [""] * 6
    return cells


def _second_row(name: str, outcome: Outcome, failed: np.ndarray, labels: np.ndarray) -> list[str]:
    cells = [name, *(f"{accuracy:.4f}" for accuracy in outcome.forced.values())]
    if outcome.s:
        s = np.array(outcome.s).mean(1)
        cells += [
            f"{s[failed].mean():.4f}",
            f"{s[~failed].mean():.4f}",
            f"{auc(s, failed):.3f}",
            f"{explained_variance(s, labels):.1%}",
        ]
    else:
        cells += [""] * 4
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Run the study and print, or write, its tables."""
    parser = argparse.ArgumentParser(description="Study the paper's own recipe.")
    parser.add_argument(
        "--data", nargs="+", type=Path, required=True, help="folders with train and test files"
    )
    parser.add_argument("--recipe", default="paper-small", help="TOML file or packaged recipe")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("runs/paper"), help="folder of finished results"
    )
    parser.add_argument("--out", type=Path, help="write the tables here instead of printing them")
    parser.add_argument("--threads", type=int, help="number of torch threads")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    base = Recipe.read(options.recipe)

    log, work_dir = terminal.log, options.work_dir
    text = "\n".join(report(*study(folder, base, work_dir, log)) for folder in options.data)
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
