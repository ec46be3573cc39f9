"""A BERT-shaped encoder becomes a BudgetFormer.

Same function, its heads and neurons put in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from budgetformer.configuration import BudgetFormerConfig
from budgetformer.errors import CheckpointError
from budgetformer.modeling import (
    BudgetFormerForSequenceClassification,
    EncoderLayer,
    HeadScorer,
)

_EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.token_type_embeddings": "embeddings.segment",
    "embeddings.LayerNorm": "embeddings.norm",
}
_LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "pad_token_id",
)


def convert_encoder(
    folder: Path, names: list[str], **choices: Any
) -> BudgetFormerForSequenceClassification:
    """Build a BudgetFormer that computes at its full budget what a BERT encoder does.

    Args:
        folder: `config.json` and `model.safetensors` of a BERT-shaped encoder.
        names: label names; the classifier on top is new.
        choices: further `BudgetFormerConfig` arguments.

    Raises:
        CheckpointError: the folder holds no such encoder.
    """
    try:
        source = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not an encoder folder: {error}") from error
    if not isinstance(source, dict):
        raise CheckpointError(f"{folder}: not an encoder folder: config.json holds no object")
    if source.get("model_type") != "bert":
        raise CheckpointError(
            f"{folder}: model_type {source.get('model_type')!r}, only 'bert' can be converted"
        )
    config = BudgetFormerConfig(
        **{name: source[name] for name in _SIZES if name in source}
        | {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
        | choices
    )
    model = BudgetFormerForSequenceClassification(config)
    layers = {
        f"encoder.layer.{i}.{old}": f"layers.{i}.{new}"
        for i in range(config.num_hidden_layers)
        for old, new in _LAYER.items()
    }
    renamed: dict[str, Tensor] = {}
    for old, new in (_EMBEDDINGS | layers).items():
        for kind in ("weight", "bias"):
            tensor = weights.get(f"{old}.{kind}", weights.get(f"bert.{old}.{kind}"))
            if tensor is not None:
                renamed[f"{new}.{kind}"] = tensor.float()
    try:
        result = model.encoder.load_state_dict(renamed, strict=False)
    except RuntimeError as error:  # torch's word for a weight of another shape
        raise CheckpointError(f"{folder}: {error}") from error
    missing = [key for key in result.missing_keys if "decision" not in key]
    if missing:
        raise CheckpointError(
            f"{folder}: the weights lack {missing[0]} and {len(missing) - 1} more"
        )
    return model


class _UnitImportance:
    """First-order importance of the inputs of a linear map.

    |sum over tokens of value * gradient|.
    """

    def __init__(self, linear: nn.Linear, group: int) -> None:
        self.group = group
        self.total = torch.zeros(linear.in_features // group)
        self._inputs: Tensor | None = None
        self._hook = linear.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs = args[0]
        self._inputs.retain_grad()

    def collect(self) -> None:
        if self._inputs is None or self._inputs.grad is None:
            raise RuntimeError("collect() needs a backward pass first")
        product = (self._inputs * self._inputs.grad).detach().float()
        self.total += product.unflatten(-1, (-1, self.group)).sum((1, 3)).abs().sum(0)
        self._inputs = None

    def close(self) -> Tensor:
        self._hook.remove()
        return self.total


def order_by_importance(
    model: BudgetFormerForSequenceClassification, batches: Iterable[dict[str, Tensor]]
) -> None:
    """Permute every layer's heads, and its neurons, so that the most important come first.

    The network computes the same function afterwards; a ladder step, which keeps the first heads
    and with them the first neurons, then keeps what matters most. Importance is the mean size of
    the first-order change in the loss when a head or neuron is removed (Michel et al., 2019).

    Args:
        model: any BudgetFormer.
        batches: arguments of `forward`, labels among them.
    """
    meters: list[tuple[EncoderLayer, _UnitImportance, _UnitImportance]] = []
    for layer in model.encoder.encoder_layers:
        heads = _UnitImportance(layer.attention.output, model.config.head_size)
        meters.append((layer, heads, _UnitImportance(layer.feed_forward.down, 1)))
    training = model.training
    model.eval()
    for batch in batches:
        model.zero_grad()
        loss = model(**batch, steps=model.config.num_steps).loss
        loss.backward()
        for _, heads, neurons in meters:
            heads.collect()
            neurons.collect()
    model.zero_grad()
    model.train(training)
    size = model.config.head_size
    for index, (layer, heads, neurons) in enumerate(meters):
        order = heads.close().argsort(descending=True, stable=True)
        shared = model.encoder.decision
        if shared is not None and shared.scorer is not None:
            _permute_scores(shared.scorer, index * len(order), order)
        if layer.decision is not None and layer.decision.scorer is not None:
            _permute_scores(layer.decision.scorer, 0, order)
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        _permute(layer, rows, neurons.close().argsort(descending=True, stable=True))


@torch.no_grad()
def _permute_scores(scorer: HeadScorer, start: int, order: Tensor) -> None:
    rows = slice(start, start + len(order))
    scorer.out.weight[rows] = scorer.out.weight[rows][order].clone()
    scorer.out.bias[rows] = scorer.out.bias[rows][order].clone()


@torch.no_grad()
def _permute(layer: EncoderLayer, heads: Tensor, neurons: Tensor) -> None:
    attention, net = layer.attention, layer.feed_forward
    for linear in (attention.query, attention.key, attention.value):
        linear.weight.copy_(linear.weight[heads].clone())
        linear.bias.copy_(linear.bias[heads].clone())
    attention.output.weight.copy_(attention.output.weight[:, heads].clone())
    net.up.weight.copy_(net.up.weight[neurons].clone())
    net.up.bias.copy_(net.up.bias[neurons].clone())
    net.down.weight.copy_(net.down.weight[:, neurons].clone())
