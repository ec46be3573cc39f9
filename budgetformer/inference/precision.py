"""The precisions in which a compact pass can multiply; importing this is light."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "fastest", "float32", "bfloat16", "int8"]
"""Of the matrix products.

auto: chosen by what the device and the checkpoint are capable of, the same at every start.
fastest: chosen by timing all of them as the model loads.
int8: needs ranges of states, which a checkpoint holds since it was calibrated.
"""
