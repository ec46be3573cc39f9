"""Multiply-adds of a pass, counted exactly from configuration, heads and tokens.

A multiply-add (MAC) is one product that is added to a sum, in a projection, an attention score, a
weighted sum of values, or a linear head. Table look-ups, sums, norms and activations are not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from budgetformer.configuration import BudgetFormerConfig
from budgetformer.modeling import EVIDENCE_SIZE


def layer_macs(config: BudgetFormerConfig, heads: int, tokens: int) -> int:
    """Count one encoder layer that computes `heads` heads over `tokens` tokens of one item."""
    if heads == 0:
        return 0
    width, kept = config.hidden_size, heads * config.head_size
    neurons = heads * config.neurons_per_head if config.budget_ffn else config.intermediate_size
    projections = 4 * tokens * width * kept
    attention = 2 * tokens * tokens * kept
    return projections + attention + 2 * tokens * width * neurons


def decision_macs(config: BudgetFormerConfig) -> int:
    """Count f_o and g_d for one item.

    Once (scope "input"), or once in every layer (scope "layer").
    """
    evidence = EVIDENCE_SIZE if config.embedding_exit else 0
    controller = (config.hidden_size + evidence + 1) * config.controller_hidden_size
    times = 1 if config.budget_scope == "input" else config.num_hidden_layers
    return times * controller + scorer_macs(config)


def scorer_macs(config: BudgetFormerConfig) -> int:
    """Count g_d alone, over all layers; 0 when heads are ranked once for all inputs."""
    if config.head_selection == "ranked":
        return 0
    return config.hidden_size * config.num_hidden_layers * config.num_attention_heads


def encoder_macs(config: BudgetFormerConfig, heads: Sequence[int], tokens: int) -> int:
    """Count the encoder and the classifier for one item with `heads` per layer; no decision."""
    layers = sum(layer_macs(config, k, tokens) for k in heads)
    head = 0 if config.head_activation is None else config.hidden_size**2
    return layers + head + config.hidden_size * config.num_classes


def step_macs(config: BudgetFormerConfig, steps: Sequence[int], tokens: int) -> int:
    """Count one item that is decided once and run at each of `steps` in turn.

    An escalation has several steps; step 0 costs no more than the decision.
    """
    passes = (encoder_macs(config, config.heads_per_layer(s), tokens) for s in steps if s > 0)
    return decision_macs(config) + sum(passes)


def dense_macs(config: BudgetFormerConfig, tokens: int) -> int:
    """Count the dense network, which has all heads and decides nothing, for one item."""
    full = [config.num_attention_heads] * config.num_hidden_layers
    return encoder_macs(config, full, tokens)


class MacCounter(TorchFunctionMode):
    """Count the multiply-adds that torch functions really execute inside a `with` block.

    It sees the shapes of linear maps, matrix products and attention, and knows nothing of budgets,
    so it is an independent check of this module's formulas.
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
        ):
            self.macs += result.numel() * args[0].shape[-1]
        elif func is torch.addmm:
            self.macs += result.numel() * args[1].shape[-1]
        elif func is F.scaled_dot_product_attention:
            query, key = args[0], args[1]
            self.macs += 2 * query.numel() * key.shape[-2]
        return result
