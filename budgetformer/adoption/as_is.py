"""Make a checkpoint of a classifier unchanged: all heads for every text, no training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from budgetformer.checkpoint.manifest import (
    CARD,
    MANIFEST,
    NAME,
    Manifest,
    Provenance,
    write_manifest,
)
from budgetformer.checkpoint.staging import staged
from budgetformer.checkpoint.store import Checkpoint, next_version, read_checkpoint
from budgetformer.checkpoint.writing import describe, smallest_dtype, write_network
from budgetformer.errors import CheckpointError
from budgetformer.families.conversion import convert_classifier, read_classifier
from budgetformer.families.hub import model_folder, model_name
from budgetformer.families.source import is_source
from budgetformer.families.tokenizer import SourceTokenizer, check_tokenizer, read_tokenizer
from budgetformer.inference.policy import QUALITY_NAMES, EntryBand, Level, Policy
from budgetformer.inference.ranges import LayerRanges
from budgetformer.model.architecture import Architecture
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.calibration import ranges_of_states
from budgetformer.training.data import TokenizedTexts, read_texts

Log = Callable[[str], None]

ORIGIN = "origin"
"""Key of a manifest's recipe for the digest of the classifier that was converted."""


def add_classifier(
    folder: Path,
    model_store: Path,
    log: Log,
    name: str | None = None,
    version: int | None = None,
    texts: Path | None = None,
) -> Checkpoint:
    """Convert a classifier without training, and add it to a store.

    Weights keep their precision, so answers equal those of Transformers' pipeline. All quality
    levels are the same: every text gets all heads. If `version` is None and the store has the same
    classifier already, that version is returned.

    Args:
        folder: output of `save_pretrained`: a classifier of a supported family and its tokenizer.
        model_store: folder of the store.
        log: called with one line per event.
        name: name of the model; None: the folder's name.
        version: version to write; None: the next one.
        texts: texts similar to production traffic, to measure state ranges for int8; None: no int8,
            so CPUs without AMX compute in float32.

    Raises:
        CheckpointError: the folder cannot be converted, or the version exists.
        DataError: the texts cannot be read.
    """
    name = name or Path(model_name(folder)).name
    if not re.match(NAME, name):
        raise CheckpointError(
            f"{name!r} is not a valid model name (letters, digits, '.', '_' and '-', at most 64); "
            "choose another (--name)"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    source = read_classifier(folder)
    conversion = convert_classifier(
        source,
        head_selection="ranked",
        budget_scope="input",
        budget_ffn=False,
        embedding_exit=False,
    )
    model, tokenizer = conversion.model, read_tokenizer(folder)
    check_tokenizer(tokenizer.tokenizer, model.config, folder)
    config = model.config
    config.ladder = [[config.num_attention_heads] * config.num_hidden_layers]
    assert model.encoder.decision is not None
    for weight in model.encoder.decision.parameters():  # unused: there is only one step
        weight.data.zero_()
    tokenizer.match_token_types(model)
    for note in conversion.notes:
        log(note)
    max_tokens = tokenizer.longest(config)
    ranges = () if texts is None else _measure(model, tokenizer, max_tokens, texts, log)
    origin = f"{conversion.origin} {tokenizer.tokenizer.to_str()}"
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "truncation_side": tokenizer.side,
        "labels": tuple(source.label_names),
        "problem_type": source.problem_type,
        "recipe": {ORIGIN: hashlib.sha256(origin.encode()).hexdigest()},
        "ranges": ranges,
    }
    if version is None:
        for existing in _versions(model_store / name):
            if _is_same(existing.manifest, fields):
                log(f"{existing.label} already is this classifier")
                return existing
    target = model_store / name / str(version or next_version(model_store / name))
    dtype = smallest_dtype(dict(model.state_dict()))
    with staged(target) as staging:
        write_network(model, tokenizer.tokenizer, staging, max_tokens, tokenizer.side, dtype)
        manifest = describe(
            staging,
            target,
            seed=0,
            metrics={"conversion_difference": conversion.difference or 0.0},
            policy=_one_level(config),
            provenance=Provenance(
                starting_weights=model_name(folder),
                starting_weights_license="as stated with those weights",
                data="none: used as it is",
            ),
            **fields,
        )
        write_manifest(staging, manifest)
        (staging / CARD).write_text(_card(manifest, dtype))
    log(f"wrote {target}")
    return read_checkpoint(target)


def find_classifier(source: str) -> Path | None:
    """Return the folder of a classifier, or None if the source is a checkpoint or something else.

    Args:
        source: folder that Transformers wrote, or id of a model on the Hugging Face hub, which is
            downloaded.

    Raises:
        CheckpointError: the hub does not have the model, or cannot be reached.
    """
    folder = model_folder(source)
    return folder if is_source(folder) and not (folder / MANIFEST).exists() else None


def _measure(
    model: BudgetFormerForSequenceClassification,
    tokenizer: SourceTokenizer,
    max_tokens: int,
    texts: Path,
    log: Log,
) -> tuple[LayerRanges, ...]:
    """Measure the state ranges of a network on a file of texts, for int8 products."""
    examples = read_texts(texts)
    tokens = TokenizedTexts(
        tokenizer.tokenizer, examples.texts, examples.pairs, max_tokens, tokenizer.side
    )
    log(f"measuring state ranges for int8 on {texts}")
    return ranges_of_states(model, tokens)


def _one_level(config: Architecture) -> Policy:
    """Return the policy of a network with one step: all quality levels are that step."""
    heads = config.num_hidden_layers * config.num_attention_heads
    levels = (
        Level(
            name=name,
            threshold=0,
            agreement=1,
            points_lost=0,
            macs_share=1,
            mean_heads=heads,
            budgets={1: 1},
            runs={1: 1},
        )
        for name in QUALITY_NAMES
    )
    entry = (EntryBand(upto=1, step=1),)
    return Policy(measure="agreement", chain=(1,), entry=entry, levels=tuple(levels))


def _versions(folder: Path) -> list[Checkpoint]:
    """Return the valid checkpoints of a model, newest first."""
    checkpoints = []
    for path in folder.glob("*"):
        if path.name.isdecimal():
            try:
                checkpoints.append(read_checkpoint(path))
            except CheckpointError:  # the store reports it
                continue
    return sorted(checkpoints, key=lambda checkpoint: -checkpoint.version)


def _is_same(manifest: Manifest, fields: dict[str, Any]) -> bool:
    """Return whether a manifest has the values of `fields`; empty ranges match any."""
    names = [name for name in fields if name != "ranges" or fields[name]]
    return all(getattr(manifest, name) == fields[name] for name in names)


def _card(manifest: Manifest, dtype: torch.dtype) -> str:
    served = "int8 on CPUs without AMX" if manifest.ranges else "float32 on CPUs without AMX"
    return f"""# {manifest.name}, version {manifest.version}

{manifest.provenance.starting_weights}, served unchanged. Labels: {", ".join(manifest.labels)}.

- Starting weights: {manifest.provenance.starting_weights} (licence as stated with them)
- Longest input: {manifest.max_tokens} tokens
- Precision: stored in {str(dtype).removeprefix("torch.")}; served in {served}, in bfloat16 on CPUs
  with AMX and on GPUs
- Largest relative difference from the network of Transformers:
  {manifest.metrics["conversion_difference"]:.1e}
- Created: {manifest.created}

## Quality levels
Every text gets all heads, at every quality level. `budgetformer import` makes a version with
budgets from a log of texts without labels.
"""
