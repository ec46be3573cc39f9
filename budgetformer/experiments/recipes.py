"""Compare training ideas on one data set: variants of a recipe.

`python -m budgetformer.experiments.recipes STUDY.toml --data FOLDER --start ENCODER --store FOLDER
--out FOLDER` trains a checkpoint with each variant and compares their answers at equal mean
multiply-adds. The report states how long each variant took; epochs in the study can make these
times equal. An interrupted study resumes. A study file has the keys of a recipe, and one table per
variant with the keys that differ:

    budget_epochs = 3
    [variants."random steps only"]
    sandwich = false
    budget_epochs = 7

The key `teacher` of a variant names a checkpoint whose answers with all heads teach every epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.errors import BudgetFormerError, DataError
from budgetformer.experiments import terminal
from budgetformer.experiments.report import paired_gain
from budgetformer.experiments.sizes import Frontier
from budgetformer.inference.policy import BudgetRule
from budgetformer.training.calibration import answer_all
from budgetformer.training.data import Examples, TokenizedTexts, read_examples
from budgetformer.training.pages import markdown_table
from budgetformer.training.pipeline import find_data, train_checkpoint
from budgetformer.training.recipe import Recipe

BASE = "the recipe itself"
COSTS = (0.03, 0.06, 0.12)
"""Shares of the dense network's multiply-adds at which variants are compared."""
SECONDS = "seconds.json"


@dataclass(frozen=True)
class Variant:
    """One training idea.

    Attributes:
        name: name of the idea.
        recipe: recipe of the variant.
        teacher: folder of the checkpoint that teaches; None: the network teaches itself.
    """

    name: str
    recipe: Recipe
    teacher: Path | None


@dataclass(frozen=True)
class Result:
    """A trained variant compared with the recipe itself, on N test texts.

    Attributes:
        name: name of the idea.
        minutes: time of training and calibration.
        step0, full: accuracy of step 0 and of all heads, 0..1.
        accuracies: accuracy (0..1) at each of `COSTS`; None: its chain cannot run that cheaply.
        gains: percentage points gained over the recipe itself at each of `COSTS` and with all
            heads, each with its paired 95 % interval; None: one of the two cannot run that cheaply.
    """

    name: str
    minutes: float
    step0: float
    full: float
    accuracies: list[float | None]
    gains: list[tuple[float, float, float] | None]


def read_study(path: Path) -> list[Variant]:
    """Return the variants of a study, the recipe itself first.

    Raises:
        DataError: the file cannot be read, or a key or value is invalid.
    """
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    tables: dict[str, dict[str, Any]] = values.pop("variants", {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise DataError(f'{path}: variants must be tables, such as [variants."no teacher"]')
    variants = []
    for name, changes in [(BASE, {}), *tables.items()]:
        keys = values | changes
        teacher = keys.pop("teacher", "")
        if not isinstance(teacher, str):
            raise DataError(f"{path}: teacher must be a folder, not {teacher!r}")
        recipe = Recipe.read(None, **keys)
        variants.append(Variant(name, recipe, Path(teacher) if teacher else None))
    return variants


def teacher_logits(teacher: Path) -> Callable[[Examples], Tensor]:
    """Return a function from N texts to a checkpoint's logits with all heads [N, C].

    They are fused with those of step 0, which the encoder may have been trained to correct.
    """
    checkpoint = read_checkpoint(teacher)
    network = load_network(checkpoint)
    rule = BudgetRule(num_steps=network.num_steps, fixed=network.num_steps)

    def answer(examples: Examples) -> Tensor:
        tokens = TokenizedTexts.of(checkpoint, examples)
        return torch.from_numpy(answer_all(network, tokens, rule).logits)

    return answer


def compare(
    frontiers: Sequence[Frontier], seconds: Sequence[float], names: Sequence[str]
) -> list[Result]:
    """Compare variants with the first one at equal mean cost."""
    base, results = frontiers[0], []
    costs = [share * base.dense_macs for share in COSTS]
    for name, duration, frontier in zip(names, seconds, frontiers, strict=True):
        at_costs = [frontier.correct_within(cost) for cost in costs]
        pairs = [
            *zip(at_costs, [base.correct_within(cost) for cost in costs], strict=True),
            (frontier.correct_with_all_heads, base.correct_with_all_heads),
        ]
        results.append(
            Result(
                name,
                duration / 60,
                float(frontier.correct[0].mean()),
                float(frontier.correct_with_all_heads.mean()),
                [None if correct is None else float(correct.mean()) for correct in at_costs],
                [None if a is None or b is None else paired_gain(a, b) for a, b in pairs],
            )
        )
    return results


def page(results: Sequence[Result], source: str, count: int) -> str:
    """Return the comparison as Markdown."""
    headings = ["idea", "minutes", "step 0", *(f"{cost:.0%}" for cost in COSTS), "all heads"]
    rows, gains = [], []
    for r in results:
        accuracies = ["" if value is None else f"{value:.4f}" for value in r.accuracies]
        rows.append([r.name, f"{r.minutes:.0f}", f"{r.step0:.4f}", *accuracies, f"{r.full:.4f}"])
        if r.name != BASE:
            cells = [
                "" if g is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*g) for g in r.gains
            ]
            gains.append([r.name, *cells])
    return "\n".join(
        [
            f"# Training ideas on {source}",
            "",
            f"Accuracy on {count} test texts at equal mean multiply-adds, as shares of the dense "
            "network's. Each variant goes along its own chain; the threshold sets the mean cost.",
            "",
            markdown_table(headings, rows),
            "",
            "Points gained over the recipe itself, with paired 95 % intervals:",
            "",
            markdown_table(["idea", *headings[3:]], gains),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the variants without a checkpoint, and write the comparison to a folder."""
    parser = argparse.ArgumentParser(prog="python -m budgetformer.experiments.recipes")
    parser.add_argument("study", type=Path, help="TOML file: a recipe and its variants")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test files")
    parser.add_argument("--start", help="folder of an encoder, or `minilm-l6`; none: from scratch")
    parser.add_argument("--store", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--threads", type=int, help="threads; all cores unless given")
    given = parser.parse_args(arguments)
    try:
        text = _run(given)
    except BudgetFormerError as error:
        terminal.log(str(error))
        return 1
    sys.stdout.write(text)
    return 0


def _run(given: argparse.Namespace) -> str:
    """Run a study and return its page.

    Raises:
        DataError: the study or the data is invalid.
    """
    variants = read_study(given.study)
    _, test_file = find_data(given.data)
    if test_file is None:
        raise DataError(f"{given.data}: has no test file, which the comparison requires")
    frontiers, seconds = [], []
    for number, variant in enumerate(variants, 1):
        output = given.store / f"variant-{number}" / "1"
        seconds.append(_train(variant, output, given))
        checkpoint = read_checkpoint(output)
        examples = read_examples(test_file, list(checkpoint.manifest.labels))
        frontiers.append(Frontier.of(checkpoint, examples))
    results = compare(frontiers, seconds, [variant.name for variant in variants])
    text = page(results, given.data.name, len(frontiers[0].correct_with_all_heads))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "README.md").write_text(text)
    figures = json.dumps([asdict(result) for result in results], indent=1)
    (given.out / "recipes.json").write_text(figures + "\n")
    return text


def _train(variant: Variant, output: Path, given: argparse.Namespace) -> float:
    """Train a variant unless its checkpoint exists; return the seconds over all attempts.

    Raises:
        DataError: the checkpoint exists, but was trained with another recipe.
    """
    record = output.parent / SECONDS
    seconds: float = json.loads(record.read_text()) if record.is_file() else 0.0
    if output.is_dir():
        if Recipe.read(None, **read_checkpoint(output).manifest.recipe) != variant.recipe:
            raise DataError(f"{output}: trained with another recipe; choose another --store")
        return seconds
    begin = time.monotonic()
    try:
        train_checkpoint(
            data=given.data,
            output=output,
            start=given.start,
            recipe=variant.recipe,
            work_dir=output.parent / ".work",
            threads=given.threads,
            log=lambda line: terminal.log(f"{variant.name}: {line}"),
            teacher=None if variant.teacher is None else teacher_logits(variant.teacher),
        )
    finally:
        output.parent.mkdir(parents=True, exist_ok=True)
        seconds += time.monotonic() - begin
        record.write_text(json.dumps(seconds))
    return seconds


if __name__ == "__main__":
    sys.exit(main())
