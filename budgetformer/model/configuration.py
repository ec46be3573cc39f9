"""The configuration of a BudgetFormer network, as Transformers reads and writes it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from budgetformer.model.architecture import FIELDS, Architecture


class BudgetFormerConfig(Architecture, PreTrainedConfig):  # type: ignore[misc]  # labels are known here
    """Configure a BudgetFormer encoder and its classification head.

    Args:
        fields: the arguments of `Architecture` and of every Transformers configuration
            (`id2label`, `problem_type`, ...).

    Raises:
        ValueError: as for `Architecture`.
    """

    model_type = "budgetformer"

    def __init__(self, **fields: Any) -> None:
        own = {name: fields.pop(name) for name in FIELDS if name in fields}
        Architecture.__init__(self, **own)
        PreTrainedConfig.__init__(self, **fields)


AutoConfig.register("budgetformer", BudgetFormerConfig, exist_ok=True)
