"""The encoder layer: one function for the reference network, training and the compact passes.

`run_layer` defines what a layer computes. Its callers differ in the heads whose weights they pass
(`LayerWeights`) and in how they compute sums, norms and attention (`Backend`).

Shapes: B items, T tokens, D width, H heads, k of them kept, d columns of a head, I feed-forward
neurons. States are [B, T, D] padded, or [N, D] packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgetformer.model.activations import activation
from budgetformer.model.architecture import Architecture
from budgetformer.model.budget import BudgetDecision
from budgetformer.model.distances import uses_block_attention
from budgetformer.model.positions import Disentangled, DistanceBias, Positions, Rotary


@dataclass(frozen=True)
class LayerSpec:
    """The structure of one layer, without its weights.

    Attributes:
        num_heads: number of heads H.
        head_size: columns of a head, d.
        norm_position: "post" normalises after each residual sum, "pre" before each sublayer.
        norms_attention: whether attention has a norm; the first layer of some pre-norm encoders
            has none.
        activation: Transformers name of the feed-forward net's activation.
        gated: whether the feed-forward net is gated (GLU).
        neurons_per_head: neurons that each head owns; None: all neurons are always computed.
        window: tokens on each side that a token attends to; None: all.
        rotary_base: base of rotary positions; None: no rotary positions.
    """

    num_heads: int
    head_size: int
    norm_position: Literal["post", "pre"]
    norms_attention: bool
    activation: str
    gated: bool
    neurons_per_head: int | None
    window: int | None
    rotary_base: float | None

    @classmethod
    def of(cls, config: Architecture, index: int) -> LayerSpec:
        """Return the structure of layer `index` of a network."""
        return cls(
            num_heads=config.num_attention_heads,
            head_size=config.head_size,
            norm_position=config.norm_position,
            norms_attention=index > 0 or config.norm_first_layer,
            activation=config.hidden_act,
            gated=config.gated_ffn,
            neurons_per_head=config.neurons_per_head if config.budget_ffn else None,
            window=config.window(index),
            rotary_base=config.rotary_base(index),
        )


class AttentionHeads(Protocol):
    """The k heads that one call of attention computes, without their queries, keys and values."""

    @property
    def spec(self) -> LayerSpec:
        """The structure of the layer."""

    @property
    def num_heads(self) -> int:
        """Number of kept heads k."""

    @property
    def positions(self) -> Positions | None:
        """Relative or rotary positions of these heads; None: the layer has none."""


class LayerWeights(AttentionHeads, Protocol):
    """The linear maps and norms of one layer for k heads and the neurons that they own."""

    @property
    def attention_norm(self) -> nn.Module:
        """The norm of attention: of its input (pre-norm) or of the residual sum (post-norm)."""

    @property
    def feed_forward_norm(self) -> nn.Module:
        """The norm of the feed-forward net: of its input or of the residual sum."""

    def qkv(self, states: Tensor) -> Any:
        """Map states to queries, keys and values in the form that the backend's `attend` takes."""

    def output(self, context: Tensor) -> Tensor:
        """Map contexts of the kept heads to states."""

    def up(self, states: Tensor) -> Tensor:
        """Map states to neurons, including activation and gate."""

    def down(self, neurons: Tensor) -> Tensor:
        """Map neurons to states."""


class Backend(Protocol):
    """An implementation of attention, norms and residual sums."""

    def attend(self, projected: Any, weights: LayerWeights) -> Tensor:
        """Return the contexts for the result of `weights.qkv`."""

    def norm(self, states: Tensor, layer_norm: nn.Module) -> Tensor:
        """Normalise states."""

    def add(self, states: Tensor, change: Tensor) -> Tensor:
        """Add a change to states."""

    def add_norm(self, states: Tensor, change: Tensor, layer_norm: nn.Module) -> Tensor:
        """Normalise the sum of states and a change."""


def run_layer(states: Tensor, weights: LayerWeights, backend: Backend) -> Tensor:
    """Run one encoder layer: attention and the feed-forward net, each with its residual."""
    if weights.spec.norm_position == "post":
        context = backend.attend(weights.qkv(states), weights)
        mixed = backend.add_norm(states, weights.output(context), weights.attention_norm)
        neurons = weights.up(mixed)
        return backend.add_norm(mixed, weights.down(neurons), weights.feed_forward_norm)
    read = backend.norm(states, weights.attention_norm)
    context = backend.attend(weights.qkv(read), weights)
    mixed = backend.add(states, weights.output(context))
    neurons = weights.up(backend.norm(mixed, weights.feed_forward_norm))
    return backend.add(mixed, weights.down(neurons))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend within padded items.

    Args:
        query, key, value: [B, k, T, d] each.
        positions: relative or rotary positions; None: none.
        window: tokens on each side that a token attends to; None: all.
        mask: additive mask of the scores, [B, 1, 1, T].
        dropout: dropout rate of attention weights.

    Returns:
        Contexts [B, k, T, d].
    """
    if positions is None and window is None:  # a fast path, which matters for short texts
        return _weighted_values(query, key, value, mask, dropout)
    bias = scale = None
    if positions is not None:
        query, key = positions.rotate(query, key)
        bias, scale = positions.bias(query, key), positions.scale
    tokens = query.shape[-2]
    if window is not None and tokens > window + 1:
        if uses_block_attention(tokens, window):
            return _attend_in_blocks(query, key, value, window, mask, dropout)
        position = torch.arange(tokens, device=query.device)
        outside = (position[:, None] - position).abs() > window
        far = torch.zeros_like(outside, dtype=query.dtype).masked_fill(outside, -1e9)
        bias = far if bias is None else bias + far
    if mask is not None:
        mask = mask.to(query.dtype)
        bias = mask if bias is None else bias + mask
    return _weighted_values(query, key, value, bias, dropout, scale)


def _weighted_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout: float,
    scale: float | None = None,
) -> Tensor:
    """Return the values, weighted by the softmax of the products of queries and keys.

    In training, a CPU computes attention in float32 even if its inputs are in bfloat16: products as
    small as those of a head have gradients that take 2 to 7 times as long in bfloat16.
    """
    dtype, device = query.dtype, query.device.type
    if dtype == torch.bfloat16 and device == "cpu" and torch.is_grad_enabled():
        with torch.autocast(device, enabled=False):
            parts = query.float(), key.float(), value.float()
            return _weighted_values(*parts, bias, dropout, scale).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
    )


def _attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, window: int, mask: Tensor | None, dropout: float
) -> Tensor:
    """Let each block of `window` queries attend to its own and the two neighbouring blocks."""
    items, num_heads, tokens, size = query.shape
    blocks = -(-tokens // window)
    spare = blocks * window - tokens
    flat = items * num_heads
    query = F.pad(query, (0, 0, 0, spare)).reshape(flat, blocks, window, size)
    key, value = (
        F.pad(x, (0, 0, window, spare + window))
        .reshape(flat, (blocks + 2) * window, size)
        .unfold(1, 3 * window, window)
        .transpose(-1, -2)
        for x in (key, value)
    )
    at = torch.arange(window, device=query.device)
    other = torch.arange(3 * window, device=query.device) - window
    first = torch.arange(blocks, device=query.device)[:, None, None] * window
    position = first + other
    near = (other - at[:, None]).abs() <= window
    outside = ~(near & (position >= 0) & (position < tokens))
    bias = torch.zeros(outside.shape, device=query.device, dtype=query.dtype)
    bias = bias.masked_fill(outside, -1e9)
    if mask is not None:
        padding = F.pad(mask.to(query.dtype)[:, 0, 0], (window, spare + window))
        padding = padding.unfold(1, 3 * window, window)[:, None, :, None]
        bias = (bias + padding).expand(items, num_heads, -1, -1, -1).reshape(flat, *bias.shape)
    context = _weighted_values(query, key, value, bias, dropout)
    return context.reshape(items, num_heads, blocks * window, size)[:, :, :tokens]


class SelfAttention(nn.Module):
    """Weights of multi-head self-attention; head h owns rows h*d .. (h+1)*d of each map."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        width = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.dropout = config.attention_probs_dropout_prob
        self.scheme = config.relative_positions
        self.max_distance, self.buckets = config.relative_distance, config.relative_buckets
        self.terms = config.relative_terms
        self.distance_bias: nn.Embedding | None = None
        self.position_key: nn.Linear | None = None
        self.position_query: nn.Linear | None = None
        if self.scheme == "bias":
            rows, num_heads = config.relative_buckets, config.num_attention_heads
            self.distance_bias = nn.Embedding(rows, num_heads)
        if self.scheme == "disentangled" and not config.relative_shares_maps:
            if "c2p" in self.terms:
                self.position_key = nn.Linear(width, width)
            if "p2c" in self.terms:
                self.position_query = nn.Linear(width, width)

    def positions(
        self, spec: LayerSpec, num_heads: int, distances: Tensor | None
    ) -> Positions | None:
        """Return the relative or rotary positions of the first `num_heads` heads, if any.

        Args:
            spec: structure of the layer.
            num_heads: number of heads.
            distances: distance embeddings [2S, D], required for "disentangled".
        """
        if spec.rotary_base is not None:
            return Rotary(spec.rotary_base)
        if self.distance_bias is not None:
            return DistanceBias(self.distance_bias.weight[:, :num_heads], self.max_distance)
        if self.scheme != "disentangled":
            return None
        assert distances is not None
        rows = num_heads * spec.head_size

        def table(term: str, linear: nn.Linear) -> Tensor | None:
            if term not in self.terms:
                return None
            weight, bias = linear.weight[:rows].to(distances.dtype), linear.bias[:rows]
            mapped: Tensor = F.linear(distances, weight, bias.to(distances.dtype))
            by_head: Tensor = mapped.unflatten(-1, (num_heads, spec.head_size)).transpose(0, 1)
            return by_head

        return Disentangled(
            to_position=table("c2p", self.position_key or self.key),
            from_position=table("p2c", self.position_query or self.query),
            max_distance=self.max_distance,
            terms=1 + len(self.terms),
            buckets=self.buckets > 0,
            size=spec.head_size,
        )


class FeedForward(nn.Module):
    """Weights of the feed-forward net; if coupled, head h owns neurons h*I/H .. (h+1)*I/H."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        gated = config.gated_ffn
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size) if gated else None
        self.activation = activation(config.hidden_act)


class EncoderLayer(nn.Module):
    """The weights of one layer, which the reference network and training run on padded items."""

    def __init__(self, config: Architecture, index: int) -> None:
        super().__init__()
        self.spec = LayerSpec.of(config, index)
        self.attention = SelfAttention(config)
        normed = self.spec.norms_attention
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps) if normed else nn.Identity()
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.decision = BudgetDecision(config, index) if config.budget_scope == "layer" else None

    def forward(
        self, states: Tensor, bias: Tensor, gates: Tensor, distances: Tensor | None = None
    ) -> Tensor:
        """Run all heads, multiplied by their gates; an item without an open gate is unchanged.

        Args:
            states: states [B, T, D].
            bias: additive mask [B, 1, 1, T].
            gates: factor of each head [B, H].
            distances: distance embeddings [2S, D]; see `SelfAttention.positions`.
        """
        weights = PrefixWeights(self, self.spec.num_heads, distances, gates)
        result = run_layer(states, weights, PaddedBackend(self, bias))
        used = (gates != 0).any(-1)[:, None, None]
        return torch.where(used, result, states)

    def run_first_heads(
        self, states: Tensor, bias: Tensor, num_heads: int, distances: Tensor | None = None
    ) -> Tensor:
        """Run only the first `num_heads` heads; equals `forward` with the other gates at 0."""
        if not num_heads:
            return states
        return run_layer(
            states, PrefixWeights(self, num_heads, distances), PaddedBackend(self, bias)
        )


@dataclass(frozen=True)
class PrefixWeights:
    """Differentiable weights of a layer's first k heads, with optional gates [B, k]."""

    layer: EncoderLayer
    num_heads: int
    distances: Tensor | None = None
    gates: Tensor | None = None

    @property
    def spec(self) -> LayerSpec:
        """The structure of the layer."""
        return self.layer.spec

    @property
    def attention_norm(self) -> nn.Module:
        """The norm of attention."""
        return self.layer.attention_norm

    @property
    def feed_forward_norm(self) -> nn.Module:
        """The norm of the feed-forward net."""
        return self.layer.feed_forward_norm

    @cached_property
    def positions(self) -> Positions | None:
        """Relative or rotary positions of these heads."""
        return self.layer.attention.positions(self.spec, self.num_heads, self.distances)

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]:
        """Map states [B, T, D] to queries, keys and values, [B, T, k * d] each."""
        attention = self.layer.attention
        maps = (attention.query, attention.key, attention.value)
        return tuple(_first_rows(by, states, self._columns) for by in maps)

    def output(self, context: Tensor) -> Tensor:
        """Map contexts [B, T, k * d] to states [B, T, D]."""
        return _first_columns(self.layer.attention.output, self._gated(context))

    def up(self, states: Tensor) -> Tensor:
        """Map states [B, T, D] to neurons."""
        net, kept = self.layer.feed_forward, self._neurons
        neurons = _first_rows(net.up, states, kept)
        if net.gate is not None:
            return net.activation(_first_rows(net.gate, states, kept)) * neurons
        return net.activation(neurons)

    def down(self, neurons: Tensor) -> Tensor:
        """Map neurons to states [B, T, D]."""
        coupled = self.spec.neurons_per_head is not None
        return _first_columns(
            self.layer.feed_forward.down, self._gated(neurons) if coupled else neurons
        )

    @property
    def _columns(self) -> int:
        return self.num_heads * self.spec.head_size

    @property
    def _neurons(self) -> int:
        per_head = self.spec.neurons_per_head
        if per_head is None:
            return self.layer.feed_forward.up.out_features
        return per_head * self.num_heads

    def _gated(self, values: Tensor) -> Tensor:
        """Multiply each head's n columns of values [B, T, k * n] by its gate."""
        if self.gates is None:
            return values
        by_head = values.unflatten(-1, (self.num_heads, -1))
        gated: Tensor = (by_head * self.gates[:, None, :, None]).flatten(-2)
        return gated


def _first_rows(linear: nn.Linear, values: Tensor, rows: int) -> Tensor:
    """Apply the first rows of a linear map; for all rows, call the module, which runs its hooks."""
    if rows == linear.out_features:
        return cast(Tensor, linear(values))
    return F.linear(values, linear.weight[:rows], linear.bias[:rows])


def _first_columns(linear: nn.Linear, values: Tensor) -> Tensor:
    """Apply the first columns of a linear map, as many as `values` has."""
    columns = values.shape[-1]
    if columns == linear.in_features:
        return cast(Tensor, linear(values))
    return F.linear(values, linear.weight[:, :columns], linear.bias)


@dataclass(frozen=True)
class PaddedBackend:
    """The `Backend` of the reference and of training: padded items, dropout while training."""

    layer: EncoderLayer
    mask: Tensor

    def attend(self, projected: tuple[Tensor, ...], weights: LayerWeights) -> Tensor:
        """Attend within each item."""
        query, key, value = (
            part.unflatten(-1, (weights.num_heads, -1)).transpose(1, 2) for part in projected
        )
        dropout = self.layer.attention.dropout if self.layer.training else 0.0
        context = attend(
            query, key, value, weights.positions, weights.spec.window, self.mask, dropout
        )
        return context.transpose(1, 2).flatten(2)

    def norm(self, states: Tensor, layer_norm: nn.Module) -> Tensor:
        """Normalise states."""
        return cast(Tensor, layer_norm(states))

    def add(self, states: Tensor, change: Tensor) -> Tensor:
        """Add a change to states."""
        return states + cast(Tensor, self.layer.dropout(change))

    def add_norm(self, states: Tensor, change: Tensor, layer_norm: nn.Module) -> Tensor:
        """Normalise the sum of states and a change."""
        return cast(Tensor, layer_norm(self.add(states, change)))
