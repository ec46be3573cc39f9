"""Fast passes: they compute only the chosen heads, over tokens packed without padding.

A pass gives the answer of the reference network (`budgetformer.modeling`) run with all heads and a
mask, within the bound of its precision, and the tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from budgetformer.compact.choice import auto_pass, fastest_pass, make_pass
from budgetformer.compact.linear import PRECISIONS, can_multiply_int8
from budgetformer.compact.observed import measure_ranges
from budgetformer.compact.packed import Arrival, PackedPass, PackedTokens, PassResult
from budgetformer.modules import SequenceClassifier
from budgetformer.precision import Precision
from budgetformer.ranges import LayerRanges

__all__ = [
    "PRECISIONS",
    "Arrival",
    "PackedPass",
    "PackedTokens",
    "PassResult",
    "load_pass",
    "measure_ranges",
]


def load_pass(
    model: SequenceClassifier, precision: str = "float32", ranges: Sequence[LayerRanges] = ()
) -> PackedPass:
    """Return the compact pass over the weights of `model`.

    Args:
        model: the network.
        precision: of its matrix products: one of `PRECISIONS`; "auto", chosen by capability (see
            `choose_precision`); or "fastest", chosen by timing.
        ranges: of each layer's states (`measure_ranges`); without them there is no int8.

    Raises:
        ValueError: there is no such precision, or not here.
    """
    if precision not in get_args(Precision):
        raise ValueError(
            f"unknown precision {precision!r}; there are: auto, fastest, {', '.join(PRECISIONS)}"
        )
    if precision == "auto":
        return auto_pass(model, ranges)
    if precision == "fastest":
        return fastest_pass(model, ranges)
    if precision == "int8" and not ranges:
        raise ValueError("int8 needs ranges of states, which `budgetformer calibrate` measures")
    if precision == "int8" and not can_multiply_int8(model.where):
        raise ValueError("int8 is for x86 processors with AVX2")
    return make_pass(model, precision, ranges)
