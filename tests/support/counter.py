"""Count the multiply-adds that torch executes, and those of the steps of a text by formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from budgetformer.cost.macs import decision_macs, encoder_macs
from budgetformer.model.architecture import Architecture


class MacCounter(TorchFunctionMode):
    """A counter of the multiply-adds that torch functions execute inside a `with` block.

    It counts from the shapes of linear maps, matrix products and attention, without knowledge of
    budgets, and so checks the formulas independently.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and add its multiply-adds."""
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.macs += result.numel() * args[1].shape[-1]
        elif func in (
            torch.matmul,
            torch.mm,
            torch.bmm,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
            torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32,
        ):
            self.macs += result.numel() * args[0].shape[-1]
        elif func in (torch.addmm, torch.ops.mkldnn._linear_pointwise):
            self.macs += result.numel() * args[1].shape[-1]
        elif func is F.scaled_dot_product_attention:
            query, key = args[0], args[1]
            self.macs += 2 * query.numel() * key.shape[-2]
        return result


def step_macs(config: Architecture, steps: Sequence[int], tokens: int) -> int:
    """Count the MACs of the decision and of all `steps` that one item runs.

    An escalated item runs several steps; step 0 is part of the decision.
    """
    passes = (encoder_macs(config, config.heads_per_layer(s), tokens) for s in steps if s > 0)
    return decision_macs(config, tokens) + sum(passes)
