"""The study of decision rules: accuracy of each rule at each cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.experiments.study import CAPS, study
from tests.support.stores import TOPICS, labelled_examples, model_store

__all__ = ["model_store"]


@pytest.fixture(scope="module")
def table(model_store: Path) -> dict[str, list[float]]:
    """Return a study whose held-out texts are also its test texts."""
    checkpoint = read_checkpoint(model_store / TOPICS / "1")
    examples = labelled_examples(list(checkpoint.manifest.labels))
    return study(checkpoint, examples, examples)


class TestStudy:
    def test_every_rule_is_scored_at_every_cost(self, table: dict[str, list[float]]) -> None:
        assert len(table) == 17
        for row in table.values():
            assert len(row) == len(CAPS)
            assert all(0 <= x <= 1 for x in row if not np.isnan(x))

    def test_accuracy_never_falls_with_cost(self, table: dict[str, list[float]]) -> None:
        for row in table.values():
            known = [x for x in row if not np.isnan(x)]
            assert known == sorted(known)

    @pytest.mark.parametrize(
        ("wider", "narrower"),
        [
            ("fixed step, step 0 among them", "fixed step >= 1"),
            ("step 0 errs (f_o), with escalation", "step 0 errs (f_o), one decision"),
            ("step 0 errs (f_o), one decision", "fixed step, step 0 among them"),
        ],
    )
    def test_a_rule_that_includes_another_is_at_least_as_accurate(
        self, table: dict[str, list[float]], wider: str, narrower: str
    ) -> None:
        for more, less in zip(table[wider], table[narrower], strict=True):
            assert np.isnan(less) or more >= less
