"""Classify more rows than fit into memory, on all cores, so that a run that was stopped goes on."""

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
