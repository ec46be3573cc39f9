"""The precisions of the compact pass; this module does not import torch."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "fastest", "float32", "bfloat16", "int8"]
"""Precision of the matrix products.

auto: chosen by the capabilities of device and checkpoint, the same at every start.
fastest: chosen by timing every precision while the model loads.
int8: requires state ranges, which calibration stores in the checkpoint.
"""
