"""Order heads and neurons by importance, and derive ladders from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from budgetformer.model.budget import HeadScorer
from budgetformer.model.layer import EncoderLayer
from budgetformer.model.modeling import BudgetFormerForSequenceClassification

PASS_TOKENS = 2048
"""Most padded tokens in one pass over several texts, which bounds the memory of a measurement."""


class _UnitImportance:
    """The first-order importance of groups of inputs of a linear map, summed over texts.

    For one text, it is |sum over tokens and inputs of value * gradient|.
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
            raise RuntimeError("collect() requires a backward pass first")
        product = (self._inputs * self._inputs.grad).detach().float()
        self.total += product.unflatten(-1, (-1, self.group)).sum((1, 3)).abs().sum(0)
        self._inputs = None

    def close(self) -> Tensor:
        self._hook.remove()
        return self.total


def order_by_importance(
    model: BudgetFormerForSequenceClassification, batches: Iterable[dict[str, Tensor]]
) -> Tensor:
    """Permute every layer's heads and neurons so that the most important come first.

    The network still computes the same function, but ladder steps, which keep the first heads and
    neurons, now keep the most important ones. Importance is the mean magnitude of the first-order
    change in the loss if a head or neuron is removed (Michel et al., 2019).

    Args:
        model: network whose weights are permuted, in place.
        batches: arguments of `forward`, including labels.

    Returns:
        The importance of every head [L, H], descending within each layer; it includes the head's
        neurons if budgets apply to neurons too.
    """
    meters: list[tuple[EncoderLayer, _UnitImportance, _UnitImportance]] = []
    for layer in model.encoder.encoder_layers:
        heads = _UnitImportance(layer.attention.output, model.config.head_size)
        meters.append((layer, heads, _UnitImportance(layer.feed_forward.down, 1)))
    training = model.training
    model.eval()
    for part in _parts(batches):
        model.zero_grad()
        mean_loss = model(**part, steps=model.config.num_steps).loss
        (mean_loss * len(part["labels"])).backward()
        for _, head_meter, neuron_meter in meters:
            head_meter.collect()
            neuron_meter.collect()
    model.zero_grad()
    model.train(training)
    size = model.config.head_size
    importance: list[Tensor] = []
    for index, (layer, head_meter, neuron_meter) in enumerate(meters):
        of_heads, order = head_meter.close().sort(descending=True, stable=True)
        of_neurons, neuron_order = neuron_meter.close().sort(descending=True, stable=True)
        if model.config.budget_ffn:
            of_heads = of_heads + of_neurons.unflatten(0, (len(order), -1)).sum(1)
        importance.append(of_heads)
        decision = model.encoder.decision
        if decision is not None and decision.scorer is not None:
            _permute_scores(decision.scorer, index * len(order), order)
        if layer.decision is not None and layer.decision.scorer is not None:
            _permute_scores(layer.decision.scorer, 0, order)
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        _permute(layer, rows, neuron_order)
    return torch.stack(importance)


def _parts(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Split batches into parts of at most `PASS_TOKENS` padded tokens, or of one text."""
    for batch in batches:
        texts, tokens = batch["input_ids"].shape
        size = max(1, PASS_TOKENS // tokens)
        for start in range(0, texts, size):
            yield {name: values[start : start + size] for name, values in batch.items()}


def ladder_by_importance(importance: Tensor) -> list[list[int]]:
    """Return a ladder of H steps, of which step k keeps the k * L most important heads.

    Args:
        importance: importance of the heads [L, H], descending within each layer.
    """
    layers, heads = importance.shape
    order = importance.flatten().argsort(descending=True, stable=True) // heads
    return [
        order[: step * layers].bincount(minlength=layers).tolist() for step in range(1, heads + 1)
    ]


@torch.no_grad()
def _permute_scores(scorer: HeadScorer, start: int, order: Tensor) -> None:
    rows = slice(start, start + len(order))
    scorer.out.weight[rows] = scorer.out.weight[rows][order].clone()
    scorer.out.bias[rows] = scorer.out.bias[rows][order].clone()


@torch.no_grad()
def _permute(layer: EncoderLayer, heads: Tensor, neurons: Tensor) -> None:
    attention, net = layer.attention, layer.feed_forward
    projections = [attention.query, attention.key, attention.value]
    projections += [m for m in (attention.position_key, attention.position_query) if m is not None]
    for linear in projections:
        linear.weight.copy_(linear.weight[heads].clone())
        linear.bias.copy_(linear.bias[heads].clone())
    if attention.distance_bias is not None:
        size = len(heads) // attention.distance_bias.embedding_dim
        order = heads[::size] // size
        attention.distance_bias.weight.copy_(attention.distance_bias.weight[:, order].clone())
    attention.output.weight.copy_(attention.output.weight[:, heads].clone())
    for linear in (net.up,) if net.gate is None else (net.up, net.gate):
        linear.weight.copy_(linear.weight[neurons].clone())
        linear.bias.copy_(linear.bias[neurons].clone())
    net.down.weight.copy_(net.down.weight[:, neurons].clone())
