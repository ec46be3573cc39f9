"""Make a checkpoint of a classifier unchanged: all heads for every text, no training."""

from __future__ import annotations

from pathlib import Path

import torch

from budgetformer.adoption.adding import Log
from budgetformer.checkpoint.manifest import CARD, Manifest, Provenance, write_manifest
from budgetformer.checkpoint.staging import staged
from budgetformer.checkpoint.writing import describe, smallest_dtype, write_network
from budgetformer.families.conversion import convert_classifier, read_classifier
from budgetformer.families.tokenizer import SourceTokenizer, check_tokenizer, read_tokenizer
from budgetformer.inference.policy import QUALITY_NAMES, EntryBand, Level, Policy
from budgetformer.inference.ranges import LayerRanges
from budgetformer.model.architecture import Architecture
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model_folder import model_name
from budgetformer.training.calibration import ranges_of_states
from budgetformer.training.data import TokenizedTexts, read_texts


def write_unchanged(
    folder: Path, target: Path, log: Log, texts: Path | None, recipe: dict[str, str]
) -> None:
    """Write a checkpoint of a classifier; `add_classifier` describes it.

    Args:
        folder: folder of the classifier.
        target: folder to write.
        log: called with one line per event.
        texts: texts to measure state ranges for int8; None: no ranges.
        recipe: `recipe` of the manifest.

    Raises:
        CheckpointError: the folder cannot be converted, or `target` exists.
        DataError: the texts cannot be read.
    """
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
    dtype = smallest_dtype(dict(model.state_dict()))
    with staged(target) as staging:
        write_network(model, tokenizer.tokenizer, staging, max_tokens, tokenizer.side, dtype)
        manifest = describe(
            staging,
            target,
            max_tokens=max_tokens,
            truncation_side=tokenizer.side,
            labels=tuple(source.label_names),
            problem_type=source.problem_type,
            seed=0,
            recipe=recipe,
            ranges=ranges,
            metrics={"conversion_difference": conversion.difference or 0.0},
            policy=_one_level(config),
            provenance=Provenance(
                starting_weights=model_name(folder),
                starting_weights_license="as stated with those weights",
                data="none: used as it is",
            ),
        )
        write_manifest(staging, manifest)
        (staging / CARD).write_text(_card(manifest, dtype))


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
