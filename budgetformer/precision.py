"""The precisions in which a compact pass can multiply; importing this is light."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "float32", "bfloat16", "int8"]
"""Of the matrix products; "auto" times them as a model loads and takes the fastest.

int8 needs ranges of states, which a checkpoint holds since it was calibrated.
"""
