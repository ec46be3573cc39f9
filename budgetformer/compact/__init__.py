"""Fast passes: they compute only the chosen heads, over tokens packed without padding.

A pass gives the answer of the reference network (`budgetformer.modeling`) run with all heads and a
mask, within the bound of its precision, and the tests hold it to that.
"""

from __future__ import annotations

from typing import get_args

from budgetformer.compact.choice import fastest_pass
from budgetformer.compact.linear import LINEARS
from budgetformer.compact.packed import Arrival, PackedPass, PackedTokens, PassResult
from budgetformer.modules import SequenceClassifier
from budgetformer.precision import Precision

__all__ = [
    "LINEARS",
    "Arrival",
    "PackedPass",
    "PackedTokens",
    "PassResult",
    "load_pass",
]


def load_pass(model: SequenceClassifier, precision: str = "float32") -> PackedPass:
    """Return the compact pass over the weights of `model`.

    Args:
        model: the network.
        precision: of its matrix products, one of `LINEARS`, or "auto", whichever is fastest here.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}; there are: auto, {', '.join(LINEARS)}")
    return fastest_pass(model, list(LINEARS) if precision == "auto" else [precision])
