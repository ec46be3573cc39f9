"""Exact multiply-adds of a pass, from configuration, heads and tokens.

A multiply-add (MAC) is one product that is added to a sum, in a projection, an attention score, a
weighted sum of values, or a linear head. Table look-ups, (weighted) sums of table rows, norms and
activations are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from budgetformer.model.architecture import Architecture
from budgetformer.model.distances import count_score_rows, multiplied_pairs


@dataclass(frozen=True)
class Sizes:
    """The sizes of a configuration that determine costs; faster to read than a configuration."""

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
        """Return the sizes of a configuration, or the sizes themselves."""
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
"""A network, given by its architecture or its sizes."""


def layer_macs(config: Costed, heads: int, tokens: int, layer: int = 0) -> int:
    """Count the MACs of one encoder layer with `heads` heads over an item of `tokens` tokens."""
    if heads == 0:
        return 0
    sizes = Sizes.of(config)
    head_width = heads * sizes.head_size
    per_head = sizes.neurons_per_head
    neurons = sizes.neurons if per_head is None else heads * per_head
    projections = 4 * tokens * sizes.width * head_width
    attention = 2 * head_width * multiplied_pairs(tokens, sizes.windows[layer])
    if sizes.distance_terms:
        rows = count_score_rows(tokens, sizes.distances, sizes.max_distance, sizes.buckets)
        attention += sizes.distance_terms * tokens * rows * head_width
    net = (1 + sizes.maps_up) * tokens * sizes.width * neurons
    return projections + attention + net


def layer_weights(config: Costed, heads: int) -> int:
    """Count the weights that one encoder layer uses to compute `heads` heads."""
    sizes = Sizes.of(config)
    per_head = sizes.neurons_per_head
    neurons = sizes.neurons if per_head is None else heads * per_head
    net = (1 + sizes.maps_up) * neurons
    return sizes.width * (4 * heads * sizes.head_size + net) if heads else 0


def decision_macs(config: Costed, tokens: int = 0) -> int:
    """Count the MACs of f_o, g_d and step 0 for one item, over all layers that decide.

    `tokens` matters only if f_o or g_d reads embeddings that are projected by a linear map.
    """
    sizes = Sizes.of(config)
    if sizes.one_budget:
        return 0
    controller = (sizes.decision_inputs + 1) * sizes.controller
    decisions = (sizes.layers if sizes.layerwise else 1) * controller + scorer_macs(sizes)
    embeddings = embedding_macs(sizes, tokens) if sizes.embeds_first else 0
    return embeddings + decisions + sizes.exit_rank * sizes.classes


def embedding_macs(config: Costed, tokens: int) -> int:
    """Count the MACs that project the embeddings of one item to the encoder's width."""
    sizes = Sizes.of(config)
    return tokens * sizes.embedding * sizes.width


def scorer_macs(config: Costed) -> int:
    """Count the MACs of g_d over all layers; 0 if all inputs use the same ranking of heads."""
    sizes = Sizes.of(config)
    return sizes.width * sizes.layers * sizes.heads if sizes.picks_heads else 0


def encoder_macs(config: Costed, heads: Sequence[int], tokens: int) -> int:
    """Count the MACs of encoder and classifier for one item, given the heads of each layer."""
    sizes = Sizes.of(config)
    layers = sum(layer_macs(sizes, k, tokens, i) for i, k in enumerate(heads))
    head = sizes.width**2 if sizes.dense_head else 0
    return embedding_macs(sizes, tokens) + layers + head + sizes.width * sizes.classes


def dense_macs(config: Costed, tokens: int) -> int:
    """Count the MACs of the dense network (all heads, no decision) for one item."""
    sizes = Sizes.of(config)
    return encoder_macs(sizes, [sizes.heads] * sizes.layers, tokens)


class MacCounts:
    """Cached multiply-adds of the passes of one network.

    Args:
        sizes: sizes of the network.
        plans: heads per layer of each step, step 0 first.
    """

    def __init__(self, sizes: Sizes, plans: Sequence[Sequence[int]]) -> None:
        def of_step(step: int, tokens: int) -> int:
            return encoder_macs(sizes, plans[step], tokens)

        def of_dense(tokens: int) -> int:
            return dense_macs(sizes, tokens)

        self.step = lru_cache(maxsize=16384)(of_step)
        """MACs of one item at a step, given step and tokens."""
        self.dense = lru_cache(maxsize=4096)(of_dense)
        """MACs of one item in the dense network, given its tokens."""


def fits_in_full_pass(config: Architecture, steps: Sequence[int]) -> bool:
    """Return whether `steps` together cost at most one full pass, for texts of any length."""
    sizes = Sizes.of(config)
    full = config.heads_per_layer(config.num_steps)
    plans = [config.heads_per_layer(step) for step in steps if step > 0]

    def remaining(tokens: int, layers: Sequence[int]) -> int:
        """Return the MACs of a full pass minus those of `steps` in these layers."""
        spent = sum(layer_macs(sizes, p[i], tokens, i) for p in plans for i in layers)
        if 0 in layers:
            spent += (len(plans) - 1) * embedding_macs(sizes, tokens)
        return sum(layer_macs(sizes, full[i], tokens, i) for i in layers) - spent

    # For layers with the same window, `remaining` is quadratic in the tokens until their attention
    # becomes local and rises less. If it is at least 0 for one token, rises at first and is convex,
    # it is at least 0 for any length.
    by_window: dict[int | None, list[int]] = {}
    for i, window in enumerate(sizes.windows):
        by_window.setdefault(window, []).append(i)
    for layers in by_window.values():
        one, two, three = (remaining(tokens, layers) for tokens in (1, 2, 3))
        if not (one <= two and two - one <= three - two):
            return False
    classified = encoder_macs(sizes, [0] * sizes.layers, 0)
    return remaining(1, range(sizes.layers)) >= (len(plans) - 1) * classified
