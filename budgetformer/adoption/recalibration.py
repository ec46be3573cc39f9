"""Calibrate the quality levels of a checkpoint again, on other texts."""

from __future__ import annotations

from pathlib import Path

import torch

from budgetformer.adoption.costs import add_timing
from budgetformer.checkpoint.manifest import Manifest, file_entries, write_manifest
from budgetformer.checkpoint.staging import check_replaceable, staged
from budgetformer.checkpoint.store import Checkpoint, load_tokenizer
from budgetformer.checkpoint.writing import smallest_dtype, write_network
from budgetformer.cost.table import CostTable
from budgetformer.errors import DataError
from budgetformer.inference.policy import Measure
from budgetformer.inference.precision_choice import load_pass
from budgetformer.model.modeling import load_model
from budgetformer.training.calibration import ranges_of_states
from budgetformer.training.card import write_card
from budgetformer.training.data import TokenizedTexts, read_examples, read_texts
from budgetformer.training.pipeline import MIN_ROWS, Log, check_output, find_policy, today
from budgetformer.training.recipe import Recipe


def recalibrate(
    checkpoint: Checkpoint,
    data: Path,
    output: Path,
    log: Log,
    *,
    measure: Measure = "accuracy",
    costs: CostTable | None = None,
) -> Manifest:
    """Write a new version of a checkpoint with quality levels calibrated on other texts.

    The weights are unchanged; the budget rules, their figures and the state ranges are new. Levels
    are timed again if the manifest of the checkpoint has times.

    Args:
        checkpoint: checkpoint to calibrate.
        data: file with texts not used in training, ideally production traffic; with labels if
            `measure` is "accuracy".
        output: folder to write, `<store>/<name>/<version>`; it must not exist.
        log: function that is called with one line per event.
        measure: measure of the levels: accuracy, or agreement with the full network.
        costs: measured seconds of this checkpoint's steps, used instead of multiply-adds; None:
            multiply-adds.

    Returns:
        The manifest of the new version.

    Raises:
        DataError: the data is invalid, or the output is not a version folder.
        CheckpointError: the checkpoint is damaged, or the output exists.
    """
    check_output(output)
    check_replaceable(output, replace=False)
    if measure == "agreement":
        if checkpoint.config.get("budget_scope") == "layer":
            raise DataError(
                'a checkpoint with budget_scope "layer" cannot be calibrated for agreement'
            )
        examples = read_texts(data)
    else:
        names = list(checkpoint.manifest.labels)
        examples = read_examples(data, names, multi_label=checkpoint.multi_label)
    if costs is not None and len(costs.steps) != len(checkpoint.ladder) + 1:
        raise DataError(
            f"the cost table of {costs.model} has {len(costs.steps)} steps, "
            f"but the checkpoint has {len(checkpoint.ladder) + 1}"
        )
    if len(examples) < MIN_ROWS:
        raise DataError(
            f"{data}: has {len(examples)} rows, calibration requires at least {MIN_ROWS}"
        )
    checkpoint.verify()
    model = load_model(checkpoint.path)
    tokens = TokenizedTexts.of(checkpoint, examples)
    log(f"calibrating on {len(examples)} texts")
    ranges = ranges_of_states(model, tokens)
    network = load_pass(model, "auto", ranges)
    level_costs = checkpoint.manifest.recipe.get("level_costs", Recipe.level_costs)
    labels = None if measure == "agreement" else torch.from_numpy(examples.labels)
    calibration = find_policy(network, tokens, labels, level_costs, costs)
    with staged(output) as folder:
        write_network(
            model,
            load_tokenizer(checkpoint),
            folder,
            checkpoint.manifest.max_tokens,
            checkpoint.manifest.truncation_side,
            smallest_dtype(dict(model.state_dict())),
        )
        manifest = checkpoint.manifest.model_copy(
            update={
                "name": output.parent.name,
                "version": int(output.name),
                "created": today(),
                "files": file_entries(folder),
                "ranges": ranges,
                "timing": None,  # of the old levels
                "metrics": checkpoint.manifest.metrics | {"calibration_rows": float(len(examples))},
            }
            | calibration.manifest_fields()
        )
        write_manifest(folder, manifest)
        timing = checkpoint.manifest.timing
        if timing is not None:
            manifest = add_timing(folder, examples, timing.core_hour_price, log)
        write_card(folder, manifest, [])
    log(f"wrote {output}")
    return manifest
