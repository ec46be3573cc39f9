"""One training pass at one ladder step of a ranked network, at that step's cost.

The reference network computes every head and masks most of them. When a whole batch trains at one
step of ranked heads, the heads outside it get no gradient anyway, so the first rows and columns of
each weight are enough: the same logits and the same gradients for a fraction of the time.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model.modules import (
    AdaptiveMultiHeadAttention,
    EncoderLayer,
    FeedForward,
    masked_mean,
)
from budgetformer.training.data import TokenBatch


def sliced_logits(
    model: BudgetFormerForSequenceClassification, batch: TokenBatch, step: int
) -> Tensor:
    """Classify a padded batch at ladder step `step` >= 1; step 0's share is not added.

    Args:
        model: a network with ranked heads and scope "input".
        batch: B items, padded to T tokens.
        step: of all of them.

    Returns:
        Logits [B, C], those of `model(..., steps=step)` where step 0 has no say in them.

    Raises:
        ValueError: the network picks heads per input or per layer, or has no such step.
    """
    states, mask = model.encoder.final_norm(_run(model, batch, step)), batch.attention_mask
    if model.config.pooling == "cls":
        pooled = (states[:, :1] * mask[:, :1, None]).sum(1)
    else:
        pooled = masked_mean(states, mask)
    return model.classify(model.dropout(pooled))


def sliced_states(
    model: BudgetFormerForSequenceClassification, batch: TokenBatch, step: int, layers: int
) -> Tensor:
    """Return mean token states [B, D] after the first `layers` layers at ladder step `step`.

    Raises:
        ValueError: as for `sliced_logits`.
    """
    return masked_mean(_run(model, batch, step, layers), batch.attention_mask)


def _run(
    model: BudgetFormerForSequenceClassification,
    batch: TokenBatch,
    step: int,
    layers: int | None = None,
) -> Tensor:
    config, encoder = model.config, model.encoder
    if config.head_selection != "ranked" or config.budget_scope != "input":
        raise ValueError("only ranked heads, decided once per input, are a prefix of the weights")
    states = encoder.embed(batch.input_ids, batch.token_type_ids)
    bias = torch.where(batch.attention_mask[:, None, None, :] > 0, 0.0, -1e9)
    plan = config.heads_per_layer(step)
    for layer, heads in list(zip(encoder.encoder_layers, plan, strict=True))[:layers]:
        if heads:
            states = _layer(layer, states, bias, heads, config.head_size)
    return states


def _layer(layer: EncoderLayer, states: Tensor, bias: Tensor, heads: int, size: int) -> Tensor:
    def attend(x: Tensor) -> Tensor:
        return cast(Tensor, layer.dropout(_attend(layer.attention, x, bias, heads, size)))

    def transform(x: Tensor) -> Tensor:
        return cast(Tensor, layer.dropout(_transform(layer.feed_forward, x, heads)))

    if layer.post:
        mixed = layer.attention_norm(states + attend(states))
        return cast(Tensor, layer.feed_forward_norm(mixed + transform(mixed)))
    mixed = states + attend(layer.attention_norm(states))
    return mixed + transform(layer.feed_forward_norm(mixed))


def _attend(
    attention: AdaptiveMultiHeadAttention, states: Tensor, bias: Tensor, heads: int, size: int
) -> Tensor:
    kept = heads * size
    query, key, value = (
        F.linear(states, part.weight[:kept], part.bias[:kept])
        .unflatten(-1, (heads, size))
        .transpose(1, 2)
        for part in (attention.query, attention.key, attention.value)
    )
    dropout = attention.dropout if attention.training else 0.0
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout
    )
    merged = context.transpose(1, 2).flatten(2)
    return F.linear(merged, attention.output.weight[:, :kept], attention.output.bias)


def _transform(net: FeedForward, states: Tensor, heads: int) -> Tensor:
    kept = None if net.neurons_per_head is None else heads * net.neurons_per_head
    neurons = net.activation(F.linear(states, net.up.weight[:kept], net.up.bias[:kept]))
    return F.linear(neurons, net.down.weight[:, :kept], net.down.bias)
