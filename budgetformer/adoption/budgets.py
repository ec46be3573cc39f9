"""Add budgets to a classifier by distillation on texts without labels.

Step 0 and f_o are trained on the classifier's answers; with the recipe "hours", so is every step
of the ladder, and the trained steps are kept if they make `balanced` cheaper. Levels are calibrated
for agreement with the classifier, on held-out texts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from budgetformer.adoption.costs import add_timing
from budgetformer.checkpoint.manifest import CORE_HOUR_PRICE, Provenance, write_manifest
from budgetformer.checkpoint.staging import check_replaceable, staged
from budgetformer.checkpoint.writing import describe, smallest_dtype, write_network
from budgetformer.errors import DataError
from budgetformer.families.conversion import convert_classifier, read_classifier
from budgetformer.families.tokenizer import check_tokenizer, read_tokenizer
from budgetformer.inference.packed import PackedPass, PackedTokens
from budgetformer.inference.precision_choice import load_pass
from budgetformer.inference.ranges import LayerRanges
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model.tfidf import table_columns
from budgetformer.model_folder import model_name
from budgetformer.training.calibration import (
    AGREEMENT,
    CalibrationResult,
    answers_of,
    ranges_of_states,
)
from budgetformer.training.card import write_card
from budgetformer.training.data import (
    TokenizedTexts,
    drawn_rows,
    has_labels,
    read_examples,
    read_texts,
)
from budgetformer.training.pipeline import (
    MIN_ROWS,
    Log,
    check_output,
    find_device,
    find_policy,
    remove_state,
)
from budgetformer.training.processes import join_processes
from budgetformer.training.recipe import Recipe
from budgetformer.training.step0 import fit_step0
from budgetformer.training.trainer import Trainer, rows_by_length, split_rows

MAX_HELD_OUT = 5000
"""Maximum number of texts for calibration; more hardly narrow the intervals."""
BATCH = 32


def add_budgets(
    *,
    classifier: Path,
    texts: Path,
    output: Path,
    recipe: Recipe,
    work_dir: Path,
    threads: int | None,
    log: Log,
    device: str = "auto",
    micro_batch: int | None = None,
    core_hour_price: float = CORE_HOUR_PRICE,
) -> bool:
    """Write a checkpoint with budgets, distilled from a classifier on texts.

    Args:
        classifier: folder of a classifier of a supported family, with its tokenizer.
        texts: file with texts similar to production traffic. A column `label` is optional, and
            only used to report the accuracy of the levels.
        output: folder to write; ends with the model's name and version.
        recipe: `Recipe.read("minutes")` or `Recipe.read("hours")`, or another without dense epochs.
        work_dir: folder for the state of the run, from which a second call resumes.
        threads: number of torch threads; None: torch's default.
        log: function that is called with one line per event.
        device, micro_batch: see `budgetformer.training.pipeline.train_checkpoint`.
        core_hour_price: price of one core for an hour, for the prices in the model card.

    Returns:
        Whether this process wrote the checkpoint.

    Raises:
        DataError: the texts are too few or invalid, or the recipe cannot be used.
        CheckpointError: the classifier cannot be converted.
    """
    check_output(output)
    check_replaceable(output, replace=True)
    _check_recipe(recipe)
    if threads is not None:
        torch.set_num_threads(threads)
    processes, training_device = join_processes(find_device(device))
    log = processes.log_of_main(log)
    source = read_classifier(classifier)
    labelled = has_labels(texts)
    multi_label = source.problem_type == MULTI_LABEL
    examples = (
        read_examples(texts, source.label_names, multi_label=multi_label)
        if labelled
        else read_texts(texts)
    )
    if 0 < recipe.max_train_rows < len(examples):
        rows = drawn_rows(len(examples), recipe.max_train_rows, recipe.seed)
        log(f"{len(rows)} of {len(examples)} texts, drawn at random")
        examples = examples.subset(rows)
    if len(examples) < 2 * MIN_ROWS:
        raise DataError(f"{texts}: has {len(examples)} texts, at least {2 * MIN_ROWS} are required")
    tokenizer = read_tokenizer(classifier)
    columns = table_columns(len(source.label_names), multi_label)
    torch.manual_seed(recipe.seed)
    conversion = convert_classifier(
        source,
        head_selection="ranked",
        budget_scope="input",
        budget_ffn=recipe.budget_ffn,
        embedding_exit=True,
        exit_tfidf=True,
        exit_buckets=recipe.exit_weights // columns,
        attention_probs_dropout_prob=recipe.attention_dropout,
    )
    model = conversion.model
    check_tokenizer(tokenizer.tokenizer, model.config, classifier)
    tokenizer.match_token_types(model)
    for note in conversion.notes:
        log(note)
    max_tokens = min(tokenizer.longest(model.config), recipe.max_length)
    exit_tokens = max(recipe.exit_tokens, max_tokens)
    tokens = TokenizedTexts(
        tokenizer.tokenizer,
        examples.texts,
        examples.pairs,
        max_tokens,
        tokenizer.side,
        exit_tokens,
    )
    log(f"{len(tokens.ids)} texts of {tokens.lengths.mean():.1f} tokens on average")
    original = full_logits(load_pass(model, "float32"), tokens)
    answers = answers_of(original, model.config.problem_type).numpy()
    train_rows, held_out = split_rows(len(tokens.ids), recipe.hold_out, recipe.seed)
    held_out = held_out[:: -(-len(held_out) // MAX_HELD_OUT)]
    answered = replace(
        examples.subset(train_rows), labels=answers[train_rows], names=source.label_names
    )
    seen = tokens.subset(train_rows)
    model.exit_head, out_of_fold = fit_step0(model.config, seen, answered, recipe)
    unseen = tokens.subset(held_out)

    def train(model: BudgetFormerForSequenceClassification, recipe: Recipe, state: Path) -> None:
        Trainer(
            *(model, seen, answered, recipe, state, log, conversion.origin, out_of_fold),
            teacher=original[train_rows],
            device=training_device,
            micro_batch=micro_batch,
            processes=processes,
        ).train()

    def calibrate(model: BudgetFormerForSequenceClassification, dtype: torch.dtype) -> _Candidate:
        log("fitting f_o, calibrating budgets")
        with torch.no_grad():  # calibrate with the weights as they will be stored
            for weight in model.parameters():
                weight.copy_(weight.to(dtype).float())
        ranges = ranges_of_states(model, unseen)
        calibration = find_policy(
            load_pass(model, "auto", ranges),
            unseen,
            torch.from_numpy(examples.labels[held_out]) if labelled else None,
            recipe.level_costs,
            f_o_seed=recipe.seed,
            original=original[held_out],
        )
        return _Candidate(model, dtype, ranges, calibration)

    without_training = work_dir / "without_training"
    train(model, replace(recipe, budget_epochs=0), without_training)
    student = copy.deepcopy(model) if recipe.budget_epochs else None
    dtype = smallest_dtype(source.weights)
    candidate = calibrate(model, dtype) if processes.is_main else None
    if student is not None:
        if candidate is not None:
            log(f"without training of the steps: {candidate.summary}")
        train(student, recipe, work_dir)
        if candidate is not None:
            trained = calibrate(student, torch.float16)
            log(f"with training of the steps: {trained.summary}")
            if trained.is_better_than(candidate):
                candidate = trained
            else:
                log("`balanced` did not become cheaper: the classifier's weights are kept")
    if candidate is None:
        return False
    model = candidate.model
    with staged(output, replace=True) as folder:
        write_network(
            model, tokenizer.tokenizer, folder, max_tokens, tokenizer.side, candidate.dtype
        )
        manifest = describe(
            folder,
            output,
            max_tokens=max_tokens,
            exit_tokens=exit_tokens,
            truncation_side=tokenizer.side,
            labels=tuple(source.label_names),
            problem_type=source.problem_type,
            seed=recipe.seed,
            recipe=recipe.as_dict(),
            metrics={
                "train_rows": float(len(train_rows)),
                "calibration_rows": float(len(held_out)),
                "conversion_difference": conversion.difference or 0.0,
                "steps_trained": float(model is student),
            },
            ranges=candidate.ranges,
            provenance=Provenance(
                starting_weights=model_name(classifier),
                starting_weights_license="as stated with those weights",
                data=recipe.data_name or texts.name,
                data_terms=recipe.data_terms,
            ),
            **candidate.calibration.manifest_fields(),
        )
        write_manifest(folder, manifest)
        manifest = add_timing(folder, examples.subset(held_out), core_hour_price, log)
        write_card(folder, manifest, [])
    remove_state(without_training)
    remove_state(work_dir)
    log(f"wrote {output}")
    return True


@dataclass(frozen=True)
class _Candidate:
    """A calibrated network that may become the checkpoint.

    Attributes:
        model: the network.
        dtype: type of its stored weights.
        ranges: ranges of its states, for int8.
        calibration: its policy.
    """

    model: BudgetFormerForSequenceClassification
    dtype: torch.dtype
    ranges: tuple[LayerRanges, ...]
    calibration: CalibrationResult

    @property
    def balanced(self) -> tuple[float, float]:
        """Agreement of `balanced`, and its multiply-adds as a share of the dense network's."""
        assert self.calibration.policy is not None
        level = self.calibration.policy.level("balanced")
        return level.reached("agreement")[0], level.macs_share

    @property
    def summary(self) -> str:
        """Description of `balanced` for the log."""
        agreement, cost = self.balanced
        return f"`balanced` agrees on {agreement:.4f} of the texts, at {cost:.1%} of dense"

    def is_better_than(self, other: _Candidate) -> bool:
        """Return whether `balanced` costs less here and agrees as often, or as often as it must."""
        (agreement, cost), (least, most) = self.balanced, other.balanced
        return cost < most and agreement >= min(AGREEMENT["balanced"], least)


def full_logits(network: PackedPass, tokens: TokenizedTexts) -> Tensor:
    """Return the full network's logits [N, C] of N texts, before fusion with step 0's."""
    last = network.config.num_steps
    logits = torch.zeros(len(tokens.ids), network.config.num_classes)
    for rows in rows_by_length(tokens, BATCH, "the classifier's answers"):
        packed = PackedTokens.of(tokens.columns(rows).window)
        logits[rows] = network.run(packed, [last] * len(rows), fused=False).logits.cpu()
    return logits


def _check_recipe(recipe: Recipe) -> None:
    """Check that the full budget of a recipe equals the classifier.

    Raises:
        DataError: it does not.
    """
    required = {
        "dense_epochs": 0,
        "head_selection": "ranked",
        "budget_scope": "input",
        "embedding_exit": True,
        "gating": "hard",
    }
    for key, value in required.items():
        if getattr(recipe, key) != value:
            raise DataError(
                f"recipe key {key} must be {value!r} with --texts, not {getattr(recipe, key)!r}"
            )
