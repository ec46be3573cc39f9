"""Fast passes: they compute only the chosen heads, over tokens packed without padding.

A pass gives the answer of the reference network (`budgetformer.model`) run with all heads and a
mask, within the bound of its precision, and the tests hold it to that.
"""
