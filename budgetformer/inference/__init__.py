"""Compact passes: compute only the chosen heads, over tokens packed without padding.

Tests check that a pass gives the answer of the reference network (`budgetformer.model`), which
computes all heads and masks some, within the error bound of the pass's precision.
"""
