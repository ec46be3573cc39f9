"""BudgetFormer: a Transformer text classifier that computes only as many heads as a text needs.

Importing the package is cheap: the names below load torch and Transformers on first use, so a
process that only reads manifests (`budgetformer.checkpoint.store`) does not need them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook

__version__ = "0.1.0"

_MODULES = {
    "BudgetFormerConfig": "budgetformer.model.configuration",
    "BudgetFormerModel": "budgetformer.model.modeling",
    "BudgetFormerForSequenceClassification": "budgetformer.model.modeling",
    "Classifier": "budgetformer.classifier",
}

__all__ = [*_MODULES, "__version__"]


def _register(auto: ModuleType) -> None:
    """Register our classes with Transformers' Auto classes, by importing our module."""
    import_module(f"budgetformer.model.{auto.__name__.rpartition('.')[2].removesuffix('_auto')}")


for _auto in ("configuration_auto", "modeling_auto"):
    register_post_import_hook(_register, f"transformers.models.auto.{_auto}")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'budgetformer' has no attribute {name!r}")
