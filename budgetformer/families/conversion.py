"""Convert an encoder or classifier into a BudgetFormer that computes the same function."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budgetformer.errors import CheckpointError
from budgetformer.families.family import Weights
from budgetformer.families.source import Source, read_encoder
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model_folder import describe_headless

TOLERANCE = 1e-4
"""Largest accepted difference between a converted network and its source, relative to the largest
value; float32 rounding causes about 1e-6."""
PROOF_LENGTHS = ((1, 5, 16), (64,))
"""Lengths of the sequences, by batch, on which source and result are compared; embeddings are
compared at every position."""
MIN_POSITIONS = 3
"""Positions for one token between the special tokens at the beginning and the end."""


@dataclass(frozen=True)
class Conversion:
    """A converted network, ready to be trained.

    Attributes:
        model: the network.
        notes: messages about kept, changed and unused parts, one line each.
        difference: largest relative difference from the source's outputs; None: from scratch.
        origin: digest of the source's weights; empty: from scratch.
    """

    model: BudgetFormerForSequenceClassification
    notes: tuple[str, ...] = ()
    difference: float | None = None
    origin: str = ""


def convert_encoder(
    folder: Path, names: list[str], numbered: bool = False, **choices: Any
) -> Conversion:
    """Convert an encoder or classifier into a BudgetFormer with the same outputs at full budget.

    The result is compared with Transformers' network on random tokens. A fine-tuned classifier
    whose labels are `names`, in any order, keeps its head; otherwise the head is new and reads the
    mean of the token states.

    Args:
        folder: folder of the encoder, see `read_encoder`.
        names: names of the labels.
        numbered: whether the user chose the order of `names`, so that a head with unnamed labels
            (`LABEL_0`, ...) can be matched by number.
        choices: further `BudgetFormerConfig` arguments.

    Raises:
        CheckpointError: `read_encoder` fails, or the result has other outputs.
    """
    source = read_encoder(folder)
    rows, notes = _match_head(source, names, numbered, choices.get("problem_type"))
    return _convert(source, names, rows, notes, choices)


def read_classifier(folder: Path) -> Source:
    """Load a classifier, after the same checks as `read_encoder`.

    Raises:
        CheckpointError: `read_encoder` fails, there is no head, or two labels have the same name.
    """
    source = read_encoder(folder)
    if not source.has_head:
        architecture = next(iter(source.architectures), "an encoder")
        raise CheckpointError(
            f"{folder}: "
            + (
                describe_headless(folder)
                or f"{architecture} has no text classification head; train one with "
                "`budgetformer import --data`"
            )
        )
    if len(set(source.label_names)) < len(source.label_names):
        raise CheckpointError(f"{folder}: two labels of config.json (id2label) have the same name")
    return source


def convert_classifier(source: Source, **choices: Any) -> Conversion:
    """Convert a classifier into a BudgetFormer with the same outputs at full budget.

    The result has the classifier's labels, in the same order, and its problem type.

    Args:
        source: classifier, read with `read_classifier`.
        choices: further `BudgetFormerConfig` arguments.

    Raises:
        CheckpointError: the result has other outputs.
    """
    names, choices = source.label_names, {"problem_type": source.problem_type} | choices
    return _convert(source, names, list(range(len(names))), [], choices)


def _convert(
    source: Source,
    names: list[str],
    rows: list[int] | None,
    notes: list[str],
    choices: dict[str, Any],
) -> Conversion:
    """Convert a source, with its head if `rows` are given, and compare the result with it."""
    folder, weights = source.folder, _rename(source)
    head: Weights = {}
    if rows is not None:
        choices = source.family.head_choices(source.network.config) | choices
        named = source.family.head_names.items()
        head = {ours: source.weights[theirs] for ours, theirs in named if theirs in source.weights}
        head |= {n: head[n][rows] for n in ("classifier.weight", "classifier.bias") if n in head}
    try:
        config = _configure(source, weights, names, choices)
        model = BudgetFormerForSequenceClassification(config)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    _fill(model.encoder, weights, folder)
    if rows is not None:
        modules = {name.rpartition(".")[0] for name in head}
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                if name.rpartition(".")[0] in modules:
                    weight.copy_(head[name] if name in head else torch.zeros_like(weight))
    difference = measure_difference(source, model, rows)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: this encoder cannot be converted: the result differs from it by "
            f"{difference:.2g} of its largest output (allowed: {TOLERANCE:g})"
        )
    proof = (
        f"the converted network and the encoder differ by {difference:.1e} of the largest output"
    )
    return Conversion(model, (*source.notes, *notes, proof), difference, _digest(source.weights))


@torch.no_grad()
def _fill(encoder: nn.Module, weights: Weights, folder: Path) -> None:
    """Copy weights into an encoder; a bias that the family does not have is 0."""
    state = encoder.state_dict()
    for name, weight in weights.items():
        state.pop(name).copy_(weight)
    for name, weight in state.items():
        if "decision" in name:
            continue
        if not name.endswith(".bias") or name.removesuffix("bias") + "weight" not in weights:
            raise CheckpointError(f"{folder}: the conversion provides no weight for {name}")
        weight.zero_()


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def _configure(
    source: Source, weights: Weights, names: list[str], choices: dict[str, Any]
) -> BudgetFormerConfig:
    theirs = source.network.config
    sizes = {ours: getattr(theirs, name) for ours, name in source.family.sizes.items()}
    sizes |= source.family.choices(theirs)
    # Sizes of the renamed embeddings, from which positions before the first were removed.
    if (position := weights.get("embeddings.position.weight")) is not None:
        sizes["max_position_embeddings"] = len(position)
    sizes["type_vocab_size"] = len(weights["embeddings.segment.weight"])
    if sizes["max_position_embeddings"] < MIN_POSITIONS:
        raise ValueError(f"the encoder has fewer than {MIN_POSITIONS} positions")
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return BudgetFormerConfig(**sizes | labels | choices)


def _rename(source: Source) -> Weights:
    """Return the encoder's weights by our names, with two token types and no unused positions."""
    renamed = source.encoder_weights
    if (position := renamed.get("embeddings.position.weight")) is not None:
        renamed["embeddings.position.weight"] = position[source.first_position :]
    # Tokenizers set token types of pairs even for encoders without token types.
    width = renamed["embeddings.word.weight"].shape[1]
    types = renamed.get("embeddings.segment.weight", torch.zeros(1, width))
    renamed["embeddings.segment.weight"] = types.expand(2, -1) if len(types) == 1 else types
    return renamed


def _match_head(
    source: Source, names: list[str], numbered: bool, problem_type: str | None
) -> tuple[list[int] | None, list[str]]:
    """Return the source head's row for each of `names`, or None for a new head, and notes."""
    if not source.has_head:
        return None, []
    config: Any = source.network.config
    theirs = [str(config.id2label.get(i)) for i in range(config.num_labels)]
    rows = {_plain(name): row for row, name in enumerate(theirs)}
    wanted = [_plain(name) for name in names]
    if config.problem_type not in (None, problem_type):
        reason = f"its problem type is {config.problem_type}, not that of the data"
    elif len(rows) == len(theirs) == len(names) and set(wanted) == set(rows):
        matched = [rows[name] for name in wanted]
        moved = "" if matched == sorted(matched) else ", in the order of the data"
        return matched, [f"the classification head is kept, its labels matched by name{moved}"]
    elif len(theirs) != len(names):
        reason = f"it has {len(theirs)} labels, but the data have {len(names)}"
    elif rows.keys() == {str(i) for i in range(len(names))}:
        if numbered:
            note = "the classification head is kept, its labels matched by number (labels.json)"
            return list(range(len(names))), [note]
        reason = (
            f"its labels are unnamed ({theirs[0]}, ...); "
            "name them in its config.json (id2label), or give labels.json in their order"
        )
    else:
        unknown = next((n for n, plain in zip(names, wanted, strict=True) if plain not in rows), "")
        reason = f"its labels are {', '.join(theirs[:5])[:120]}, but the data have {unknown!r}"
    return None, [f"a new classification head is trained, the old one is not kept: {reason}"]


def _plain(name: str) -> str:
    """Return a label's name without case and outer spaces; `LABEL_3` becomes `3`."""
    plain = name.strip().casefold()
    return re.sub(r"^label_(\d+)$", r"\1", plain)


@torch.no_grad()
def measure_difference(
    source: Source, model: BudgetFormerForSequenceClassification, rows: list[int] | None
) -> float:
    """Compare a converted network at its full budget with its source, on random tokens.

    Args:
        source: the source.
        model: the converted network.
        rows: the source head's row for each label; None: compare only states.

    Returns:
        The largest difference of embeddings, states and logits, relative to the largest value.
    """
    training = model.training
    model.eval()
    config = model.config
    limit = config.max_position_embeddings
    batch = _random_batch(source, [limit])
    compared = [
        (model.encoder.embed(batch["input_ids"], batch["token_type_ids"]), _embed(source, batch))
    ]
    # Long enough to test local attention, and distances that share a row.
    longest = max([0, 4 * max(config.windows or [0]), config.relative_distance + 2])
    for lengths in (*PROOF_LENGTHS, (longest,) if longest else ()):
        if not lengths:
            continue
        batch = _random_batch(source, [min(length, limit) for length in lengths])
        mask = batch["attention_mask"]
        given = _for_source(source, batch) | {"attention_mask": mask}
        theirs = source.network.base_model(**given).last_hidden_state
        ours = model.encoder(**batch, steps=config.num_steps)
        used = mask.bool()
        compared.append((ours.last_hidden_state[used], theirs[used]))
        if rows is not None:
            logits = source.network(**given).logits
            compared.append((model.classify(ours.pooled), logits[:, rows]))
    model.train(training)
    differences = [
        (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-2)
        for actual, expected in compared
    ]
    return torch.stack(differences).max().item()


class _ReachedError(Exception):
    """Carries the input of a network's first layer."""


def _embed(source: Source, batch: dict[str, Tensor]) -> Tensor:
    """Return the input of the source's first layer, without running the layers."""

    def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _ReachedError(args[0] if args else named["hidden_states"])

    hook = source.first_layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        source.network.base_model(**_for_source(source, batch))
    except _ReachedError as reached:
        states: Tensor = reached.args[0]
        return states
    finally:
        hook.remove()
    raise RuntimeError("the source has not run its first layer")


def _random_batch(source: Source, lengths: list[int]) -> dict[str, Tensor]:
    """Return random ids (no padding) and token types for sequences of these lengths."""
    random = torch.Generator().manual_seed(0)
    pad, shape = source.network.config.pad_token_id or 0, (len(lengths), max(lengths))
    ids = torch.randint(source.network.config.vocab_size - 1, shape, generator=random)
    ids += ids >= pad
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.where(mask, pad),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(2, shape, generator=random),
    }


def _for_source(source: Source, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ids, and token types if the source has more than one."""
    types = getattr(source.network.config, "type_vocab_size", 1) if source.family.has_types else 1
    return {name: batch[name] for name in ("input_ids", "token_type_ids")[: 1 + (types > 1)]}
