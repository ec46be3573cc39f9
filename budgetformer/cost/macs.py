"""Multiply-adds of a pass, counted exactly from configuration, heads and tokens.

A multiply-add (MAC) is one product that is added to a sum, in a projection, an attention score, a
weighted sum of values, or a linear head. Table look-ups, sums of what was looked up (weighted as
in step 0 or not), norms and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from budgetformer.model.architecture import Architecture
from budgetformer.model.distances import count_score_rows, multiplied_pairs


@dataclass(frozen=True)
class Sizes:
    """The plain numbers of a configuration that cost depends on; quick to read, unlike it."""

    width: int
    head_size: int
    neurons_per_head: int | None
    neurons: int
    layers: int
    heads: int
    classes: int
    dense_head: bool
    decision_inputs: int
    exit_rank: int
    controller: int
    layerwise: bool
    picks_heads: bool
    windows: tuple[int | None, ...]
    maps_up: int
    embedding: int
    embeds_first: bool
    one_budget: bool
    distance_terms: int
    distances: int
    max_distance: int
    buckets: bool

    @classmethod
    def of(cls, config: Architecture | Sizes) -> Sizes:
        """Read them from a configuration, once."""
        if isinstance(config, Sizes):
            return config
        scores_distances = config.relative_positions == "disentangled"
        return cls(
            width=config.hidden_size,
            head_size=config.head_size,
            neurons_per_head=config.neurons_per_head if config.budget_ffn else None,
            neurons=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            classes=config.num_classes,
            dense_head=config.head_activation is not None,
            decision_inputs=config.decision_inputs,
            exit_rank=config.exit_rank if config.embedding_exit and not config.exit_tfidf else 0,
            controller=config.controller_hidden_size,
            layerwise=config.budget_scope == "layer",
            picks_heads=config.head_selection == "input",
            windows=tuple(config.window(i) for i in range(config.num_hidden_layers)),
            maps_up=2 if config.gated_ffn else 1,
            embedding=config.embedding_size or 0,
            embeds_first=config.budget_scope == "input"
            and (config.head_selection == "input" or not config.decides_from_step0),
            one_budget=config.has_one_budget,
            distance_terms=len(config.relative_terms) if scores_distances else 0,
            distances=config.relative_span,
            max_distance=config.relative_distance,
            buckets=config.relative_buckets > 0,
        )


Costed = Architecture | Sizes


def layer_macs(config: Costed, heads: int, tokens: int, layer: int = 0) -> int:
    """Count one encoder layer that computes `heads` heads over `tokens` tokens of one item."""
    if heads == 0:
        return 0
    sizes = Sizes.of(config)
    kept = heads * sizes.head_size
    per_head = sizes.neurons_per_head
    neurons = sizes.neurons if per_head is None else heads * per_head
    projections = 4 * tokens * sizes.width * kept
    attention = 2 * kept * multiplied_pairs(tokens, sizes.windows[layer])
    if sizes.distance_terms:
        rows = count_score_rows(tokens, sizes.distances, sizes.max_distance, sizes.buckets)
        attention += sizes.distance_terms * tokens * rows * kept
    net = (1 + sizes.maps_up) * tokens * sizes.width * neurons
    return projections + attention + net


def layer_weights(config: Costed, heads: int) -> int:
    """Count the weights that one encoder layer multiplies by when it computes `heads` heads."""
    sizes = Sizes.of(config)
    per_head = sizes.neurons_per_head
    neurons = sizes.neurons if per_head is None else heads * per_head
    net = (1 + sizes.maps_up) * neurons
    return sizes.width * (4 * heads * sizes.head_size + net) if heads else 0


def decision_macs(config: Costed, tokens: int = 0) -> int:
    """Count f_o, g_d and step 0's map for one item: once, or (scope "layer") in every layer.

    `tokens` count where f_o or g_d reads embeddings that a map brings to their width.
    """
    sizes = Sizes.of(config)
    if sizes.one_budget:
        return 0
    controller = (sizes.decision_inputs + 1) * sizes.controller
    decisions = (sizes.layers if sizes.layerwise else 1) * controller + scorer_macs(sizes)
    embeddings = embedding_macs(sizes, tokens) if sizes.embeds_first else 0
    return embeddings + decisions + sizes.exit_rank * sizes.classes


def embedding_macs(config: Costed, tokens: int) -> int:
    """Count what brings the embeddings of one item to the encoder's width."""
    sizes = Sizes.of(config)
    return tokens * sizes.embedding * sizes.width


def scorer_macs(config: Costed) -> int:
    """Count g_d alone, over all layers; 0 when heads are ranked once for all inputs."""
    sizes = Sizes.of(config)
    return sizes.width * sizes.layers * sizes.heads if sizes.picks_heads else 0


def encoder_macs(config: Costed, heads: Sequence[int], tokens: int) -> int:
    """Count the encoder and the classifier for one item with `heads` per layer; no decision."""
    sizes = Sizes.of(config)
    layers = sum(layer_macs(sizes, k, tokens, i) for i, k in enumerate(heads))
    head = sizes.width**2 if sizes.dense_head else 0
    return embedding_macs(sizes, tokens) + layers + head + sizes.width * sizes.classes


def step_macs(config: Architecture, steps: Sequence[int], tokens: int) -> int:
    """Count one item that is decided once and run at each of `steps` in turn.

    An escalation has several steps; step 0 costs no more than the decision.
    """
    passes = (encoder_macs(config, config.heads_per_layer(s), tokens) for s in steps if s > 0)
    return decision_macs(config, tokens) + sum(passes)


def dense_macs(config: Costed, tokens: int) -> int:
    """Count the dense network, which has all heads and decides nothing, for one item."""
    sizes = Sizes.of(config)
    return encoder_macs(sizes, [sizes.heads] * sizes.layers, tokens)


class MacCounts:
    """Multiply-adds of one network's passes, each counted once.

    Args:
        sizes: of the network.
        plans: heads per layer of each step, step 0 first.
    """

    def __init__(self, sizes: Sizes, plans: Sequence[Sequence[int]]) -> None:
        def of_step(step: int, tokens: int) -> int:
            return encoder_macs(sizes, plans[step], tokens)

        def of_dense(tokens: int) -> int:
            return dense_macs(sizes, tokens)

        self.step = lru_cache(maxsize=16384)(of_step)
        """Of one item at a step, by step and tokens."""
        self.dense = lru_cache(maxsize=4096)(of_dense)
        """Of one item in the dense network, by tokens."""


def fits_in_full_pass(config: Architecture, steps: Sequence[int]) -> bool:
    """Whether running all of `steps` never costs more than one pass at the full step.

    True if it holds for texts of every length.
    """
    sizes = Sizes.of(config)
    full = config.heads_per_layer(config.num_steps)
    plans = [config.heads_per_layer(step) for step in steps if step > 0]

    def left(tokens: int, layers: Sequence[int]) -> int:
        """Return what of the full pass is left in some layers."""
        spent = sum(layer_macs(sizes, p[i], tokens, i) for p in plans for i in layers)
        if 0 in layers:
            spent += (len(plans) - 1) * embedding_macs(sizes, tokens)
        return sum(layer_macs(sizes, full[i], tokens, i) for i in layers) - spent

    # A quadratic in the tokens stays above 0 if it starts there, rises first and bends upwards.
    # Layers with one window are one quadratic, until their attention is local and rises less.
    by_window: dict[int | None, list[int]] = {}
    for i, window in enumerate(sizes.windows):
        by_window.setdefault(window, []).append(i)
    for layers in by_window.values():
        one, two, three = (left(tokens, layers) for tokens in (1, 2, 3))
        if not (one <= two and two - one <= three - two):
            return False
    classified = encoder_macs(sizes, [0] * sizes.layers, 0)
    return left(1, range(sizes.layers)) >= (len(plans) - 1) * classified
