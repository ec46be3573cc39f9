"""Classify any number of rows on all cores, in bounded memory; interrupted runs can be resumed."""

from __future__ import annotations

from budgetformer.bulk.answerer import Asked
from budgetformer.bulk.chunks import Answered, Totals
from budgetformer.bulk.journal import Journal
from budgetformer.bulk.outputs import check_output, finish
from budgetformer.bulk.run import classify_rows
from budgetformer.tables import open_table as open_rows

__all__ = [
    "Answered",
    "Asked",
    "Journal",
    "Totals",
    "check_output",
    "classify_rows",
    "finish",
    "open_rows",
]
