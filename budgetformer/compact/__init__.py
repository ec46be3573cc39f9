"""Fast passes: they compute only the chosen heads, over tokens packed without padding.

A pass is looked up by name; each gives the answer of the reference network
(`budgetformer.modeling`) run with all heads and a mask, and the tests hold it to that.
"""

from __future__ import annotations

from budgetformer.compact.packed import Arrival, PackedPass, PackedTokens, PassResult
from budgetformer.modeling import BudgetFormerForSequenceClassification

__all__ = ["PASSES", "Arrival", "PackedPass", "PackedTokens", "PassResult", "load_pass"]

PASSES = {"packed": PackedPass}


def load_pass(model: BudgetFormerForSequenceClassification, name: str = "packed") -> PackedPass:
    """Return the compact pass called `name` over the weights of `model`.

    Raises:
        ValueError: there is no such pass.
    """
    if name not in PASSES:
        raise ValueError(f"unknown compact pass {name!r}; there are: {', '.join(PASSES)}")
    return PASSES[name](model)
