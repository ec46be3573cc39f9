"""Every converted family gives the logits of Transformers in every pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from budgetformer.cost.macs import dense_macs
from budgetformer.errors import CheckpointError
from budgetformer.families import FAMILIES
from budgetformer.families.conversion import convert_encoder
from budgetformer.inference.packed import PackedTokens
from budgetformer.inference.precision_choice import load_pass
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.importance import order_by_importance
from tests.support.classifiers import CONFIGS, LABELS, SMALL, V3, make
from tests.support.counter import MacCounter
from tests.support.networks import assert_close

TOLERANCE = 1e-4
CASES = [(name, variant) for name in CONFIGS for variant in range(len(CONFIGS[name]))]


def batch_of(model: PreTrainedModel, lengths: list[int]) -> dict[str, Tensor]:
    """Return padded pairs of these lengths."""
    config, longest = model.config, max(lengths)
    random = torch.Generator().manual_seed(sum(lengths))
    pad = config.pad_token_id or 0
    ids = torch.randint(config.vocab_size - 1, (len(lengths), longest), generator=random)
    ids += ids >= pad
    positions = torch.arange(longest)
    mask = positions < torch.tensor(lengths)[:, None]
    types = (2 * positions >= torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": ids.where(mask, pad),
        "attention_mask": mask.long(),
        "token_type_ids": types if has_token_types(config) else torch.zeros_like(types),
    }


def has_token_types(config: PretrainedConfig) -> bool:
    has_several = getattr(config, "type_vocab_size", 0) > 1
    return bool(has_several and FAMILIES[config.model_type].has_types)


@torch.no_grad()
def expected_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return Transformers' logits [B, C]."""
    types = has_token_types(model.config)
    inputs = {k: v for k, v in batch.items() if types or k != "token_type_ids"}
    logits: Tensor = model(**inputs).logits
    return logits


def packed(batch: dict[str, Tensor]) -> PackedTokens:
    """Return the real tokens of a padded batch."""
    kept = [mask.bool() for mask in batch["attention_mask"]]
    ids, types = (
        [row[mask].tolist() for row, mask in zip(batch[name], kept, strict=True)]
        for name in ("input_ids", "token_type_ids")
    )
    return PackedTokens.pack(ids, types)


@pytest.fixture
def converted(
    tmp_path: Path,
) -> Callable[..., tuple[PreTrainedModel, BudgetFormerForSequenceClassification]]:
    def convert(
        model_type: str, variant: int, **choices: Any
    ) -> tuple[PreTrainedModel, BudgetFormerForSequenceClassification]:
        source = make(model_type, tmp_path, **CONFIGS[model_type][variant])
        return source, convert_encoder(tmp_path, LABELS, **choices).model.eval()

    return convert


Converted = Callable[..., tuple[PreTrainedModel, BudgetFormerForSequenceClassification]]


def test_every_family_is_tested() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(("model_type", "variant"), CASES)
class TestSameLogits:
    @torch.no_grad()
    def test_at_the_full_budget(self, converted: Converted, model_type: str, variant: int) -> None:
        source, model = converted(model_type, variant)
        limit = model.config.max_position_embeddings
        last = model.config.num_steps
        for lengths in ([5, 1, 12], [40], [limit, 9]):
            batch = batch_of(source, lengths)
            expected = expected_logits(source, batch)
            assert_close(model(**batch, steps=last).logits, expected, TOLERANCE)
            compact = load_pass(model).run(packed(batch), [last] * len(lengths))
            assert_close(compact.logits, expected, TOLERANCE)

    @torch.no_grad()
    def test_after_ordering_by_importance(
        self, converted: Converted, model_type: str, variant: int
    ) -> None:
        source, model = converted(model_type, variant)
        batch = batch_of(source, [30, 7])
        before = model(**batch, steps=4).logits
        with torch.enable_grad():
            order_by_importance(model, [batch | {"labels": torch.tensor([0, 2])}])
        assert_close(model.eval()(**batch, steps=4).logits, before, TOLERANCE)

    @torch.no_grad()
    def test_at_a_small_budget_in_every_pass(
        self, converted: Converted, model_type: str, variant: int
    ) -> None:
        _, model = converted(model_type, variant)
        batch = batch_for_budgetformer(model, [30, 7, 19])
        expected = model(**batch, steps=2).logits
        assert_close(model.logits_at(2, **batch), expected, TOLERANCE)
        assert_close(load_pass(model).run(packed(batch), [2, 2, 2]).logits, expected, TOLERANCE)


def batch_for_budgetformer(
    model: BudgetFormerForSequenceClassification, lengths: list[int]
) -> dict[str, Tensor]:
    """Return padded pairs for a converted network."""
    longest = max(lengths)
    ids = torch.randint(2, model.config.vocab_size, (len(lengths), longest))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "token_type_ids": (torch.arange(longest) % 2).expand_as(ids),
    }


class TestRefusals:
    @pytest.mark.parametrize(
        ("model_type", "changes", "message"),
        [
            ("deberta-v2", V3 | {"conv_kernel_size": 3}, "conv_kernel_size"),
            ("deberta-v2", {"pos_att_type": ["c2p"]}, "pos_att_type"),
            ("nomic_bert", {"head_dim": 8}, "head_dim"),
            ("mpnet", {"relative_attention_num_buckets": 16}, "num_buckets"),
        ],
    )
    def test_an_unsupported_configuration_names_its_key(
        self, tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
    ) -> None:
        make(model_type, tmp_path, **SMALL | changes)
        with pytest.raises(CheckpointError, match=message):
            convert_encoder(tmp_path, LABELS)

    def test_the_error_for_an_unknown_family_lists_the_families(self, tmp_path: Path) -> None:
        make("gpt2", tmp_path, vocab_size=60, n_embd=24, n_layer=1, n_head=4)
        with pytest.raises(CheckpointError) as caught:
            convert_encoder(tmp_path, LABELS)
        assert all(name in str(caught.value) for name in FAMILIES)


def test_local_attention_computes_no_pair_outside_its_window(converted: Converted) -> None:
    _, model = converted("modernbert", 1)
    config, ids = model.config, torch.zeros(70, dtype=torch.long)
    tokens, compact = PackedTokens(ids, ids, (70,)), load_pass(model)
    with MacCounter() as counter:
        compact.run(tokens, [config.num_steps])
    everywhere = BudgetFormerConfig.from_dict(config.to_dict() | {"windows": None})
    assert counter.macs == dense_macs(config, 70)
    near = 2 * config.hidden_size * sum(70**2 - 70 * 6 for window in config.windows or [] if window)
    assert dense_macs(everywhere, 70) - counter.macs == near


TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.3,
}
AS_RELEASED: dict[str, dict[str, Any]] = {
    "modernbert": {"pad_token_id": 0, "global_attn_every_n_layers": 2},
    "deberta-v2": V3 | {"position_buckets": 256, "max_position_embeddings": 512},
    "mpnet": {"max_position_embeddings": 514},
    "nomic_bert": {},
    "gte": {"pad_token_id": 1, "max_position_embeddings": 4096},
}


@pytest.mark.parametrize("model_type", AS_RELEASED)
@torch.no_grad()
def test_texts_of_maximum_length_give_the_same_logits(tmp_path: Path, model_type: str) -> None:
    source = make(model_type, tmp_path, **TINY | AS_RELEASED[model_type])
    model = convert_encoder(tmp_path, LABELS).model.eval()
    limit = model.config.max_position_embeddings
    batch = batch_of(source, [limit])
    expected = expected_logits(source, batch)
    assert_close(load_pass(model).run(packed(batch), [2]).logits, expected, TOLERANCE)


def largest_error(model_type: str, folder: Path) -> float:
    """Return the largest difference of a family's logits, relative to the largest logit."""
    errors = []
    for sizes in CONFIGS[model_type]:
        source = make(model_type, folder, **sizes)
        model = convert_encoder(folder, LABELS).model.eval()
        for lengths in ([5, 1, 12], [model.config.max_position_embeddings, 9]):
            batch = batch_of(source, lengths)
            steps = [model.config.num_steps] * len(lengths)
            actual = load_pass(model).run(packed(batch), steps).logits
            expected = expected_logits(source, batch)
            errors.append(((actual - expected).abs().max() / expected.abs().max()).item())
    return max(errors)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        for name in sorted(CONFIGS):
            error = largest_error(name, Path(folder))
            sys.stdout.write(f"| `{name}` | {len(CONFIGS[name])} | {error:.1e} |\n")
