"""The training pass at one step for all items, and batches split into parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.training.data import TokenBatch
from budgetformer.training.trainer import inputs
from tests.support.networks import (
    PROPERTY,
    assert_close,
    configs,
    pad,
    random_items,
    random_network,
    small_config,
)


def padded(lengths: list[int], seed: int = 0) -> TokenBatch:
    """Return a batch of random items."""
    arguments = pad(random_items(lengths, seed))
    return TokenBatch(
        np.arange(len(lengths)),
        arguments["input_ids"],
        arguments["token_type_ids"],
        arguments["attention_mask"],
    )


class TestOneStep:
    @PROPERTY
    @given(
        config=configs(
            budget_scope="input",
            head_selection="ranked",
            embedding_exit=False,
            encoder_weight=1.0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        seed=st.integers(0, 100),
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
        data=st.data(),
    )
    def test_equals_the_reference_pass(
        self, config: object, seed: int, lengths: list[int], data: st.DataObject
    ) -> None:
        model = random_network(config, seed)  # type: ignore[arg-type]
        step = data.draw(st.integers(1, model.config.num_steps))
        batch = padded(lengths, seed)
        expected = model(batch.input_ids, batch.attention_mask, batch.token_type_ids, steps=step)
        with torch.no_grad():
            assert_close(model.logits_at(step, **inputs(batch)), expected.logits.detach())

    def test_has_the_gradients_of_the_reference_pass(self) -> None:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = random_network(small_config(**dropout)).train()
        batch = padded([5, 9, 3])
        labels = torch.tensor([0, 2, 1])
        gradients = []
        for logits in (
            model(batch.input_ids, batch.attention_mask, batch.token_type_ids, steps=2).logits,
            model.logits_at(2, **inputs(batch)),
        ):
            model.zero_grad()
            model.loss(logits, labels).backward()
            named = [
                (name, None if p.grad is None else p.grad.clone())
                for name, p in model.named_parameters()
                if "decision" not in name
            ]
            gradients.append(named)
        for (name, expected), (_, actual) in zip(*gradients, strict=True):
            assert expected is not None, name
            assert actual is not None, name
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("choice", [{"head_selection": "input"}, {"budget_scope": "layer"}])
    def test_refuses_networks_without_ranked_heads(self, choice: dict[str, str]) -> None:
        model = random_network(small_config(**choice))
        with pytest.raises(ValueError, match="ranked"):
            model.logits_at(1, **inputs(padded([4])))


class TestSplit:
    @given(rows=st.integers(1, 9), parts=st.integers(1, 4))
    def test_every_row_is_in_one_part(self, rows: int, parts: int) -> None:
        batch = padded([3] * rows)
        split = batch.split(parts)
        assert len(split) <= parts
        assert np.concatenate([part.rows for part in split]).tolist() == list(range(rows))
        assert torch.cat([part.input_ids for part in split]).equal(batch.input_ids)
