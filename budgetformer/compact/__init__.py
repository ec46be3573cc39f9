"""Fast passes: they compute only the chosen heads, over tokens packed without padding.

A pass gives the answer of the reference network (`budgetformer.modeling`) run with all heads and a
mask, within the bound of its precision, and the tests hold it to that.
"""

from __future__ import annotations

from budgetformer.compact.linear import LINEARS
from budgetformer.compact.packed import Arrival, PackedPass, PackedTokens, PassResult
from budgetformer.modeling import BudgetFormerForSequenceClassification

__all__ = ["LINEARS", "Arrival", "PackedPass", "PackedTokens", "PassResult", "load_pass"]


def load_pass(
    model: BudgetFormerForSequenceClassification, precision: str = "float32"
) -> PackedPass:
    """Return the compact pass over the weights of `model`, in one of the precisions of `LINEARS`.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in LINEARS:
        raise ValueError(f"unknown precision {precision!r}; there are: {', '.join(LINEARS)}")
    return PackedPass(model, precision)
