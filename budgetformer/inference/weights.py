"""The weights that passes read: one packed slice per layer and head set, cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgetformer.cost.macs import Sizes
from budgetformer.inference.backends.linear import (
    INPUT_DTYPES,
    Linear,
    PackLinear,
    Product,
    Weights,
)
from budgetformer.model.layer import EncoderLayer, LayerSpec
from budgetformer.model.positions import Positions

HeadSet = tuple[int, ...]
WeightAndBias = tuple[Tensor, Tensor]
"""Weight and bias of a linear map."""

CACHE_BYTES = 256 * 2**20
"""Memory limit of slices that are copies; the least recently used are dropped first."""


@dataclass(frozen=True)
class Slice:
    """The `LayerWeights` of k heads and the neurons that they own.

    Attributes:
        spec: the structure of the layer.
        num_heads: number of heads k.
        attention_norm: norm of attention.
        feed_forward_norm: norm of the feed-forward net.
        positions: relative or rotary positions of the heads.
        qkv: maps [N, D] to queries, keys and values, interleaved by head, [N, k * 3 * D/H].
        output: maps [N, k * D/H] to [N, D].
        up: first map of the feed-forward net, with activation and gate.
        down: second map of the feed-forward net.
        nbytes: memory in bytes that is not shared with the layer.
    """

    spec: LayerSpec
    num_heads: int
    attention_norm: nn.Module
    feed_forward_norm: nn.Module
    positions: Positions | None
    qkv: Linear
    output: Linear
    up: Linear
    down: Linear
    nbytes: int

    def warm(self, rows: Sequence[int], sizes: Sizes) -> None:
        """Run every map once for each number of rows in `rows`."""
        per_head = sizes.neurons_per_head
        neurons = sizes.neurons if per_head is None else self.num_heads * per_head
        widths = (sizes.width, self.num_heads * sizes.head_size, sizes.width, neurons)
        for apply, width in zip((self.qkv, self.output, self.up, self.down), widths, strict=True):
            for count in rows:
                apply(torch.zeros(count, width))


class LayerMatrices:
    """One layer's weights for all heads, from which slices are taken.

    Queries, keys and values are interleaved by head, [H * 3 * D/H, D]: once heads are ordered by
    rank, the first k heads are the first rows of the matrix.

    Args:
        layer: layer whose weights are sliced.
        sizes: sizes of the network.
        dtype: type of the slices' weights.
        pack_linear: packs the linear maps.
        distances: distance embeddings [2S, D], if the layer's positions use them.
    """

    def __init__(
        self,
        layer: EncoderLayer,
        sizes: Sizes,
        dtype: torch.dtype,
        pack_linear: PackLinear,
        distances: Tensor | None,
    ) -> None:
        attention, net = layer.attention, layer.feed_forward
        self.layer, self.spec = layer, layer.spec
        self._dtype = dtype
        self.positions = attention.positions(layer.spec, sizes.heads, distances)
        maps = [self._read(m) for m in (attention.query, attention.key, attention.value)]
        weight, bias = (
            torch.stack([part.unflatten(0, (sizes.heads, -1)) for part in parts], dim=1)
            for parts in zip(*maps, strict=True)
        )
        self._qkv = weight.flatten(0, 2), bias.flatten()
        self._output, self._down = map(self._read, (attention.output, net.down))
        self._up = self._read(net.up)
        if net.gate is not None:
            self._up = self._gated(self._read(net.gate), self._up)
        self._sizes = sizes
        self._activation: Callable[[Tensor], Tensor] = net.activation
        self._pack_linear = pack_linear

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The matrices from which slices are taken, and the tables of positions."""
        tables = () if self.positions is None else self.positions.tables
        return self._qkv[0], self._output[0], self._up[0], self._down[0], *tables

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """Biases of `output` and `down`, [D] each.

        A caller that takes slices with `with_bias=False` adds them itself. A feed-forward net that
        all slices share always includes its biases.
        """
        return self._output[1], self._down[1]

    def slice_heads(self, head_set: HeadSet, with_bias: bool = True) -> Slice:
        """Pack the rows and columns of a head set; in float32, the first heads are not copied.

        Args:
            head_set: indices of the heads.
            with_bias: whether `output`, and `down` if neurons belong to heads, add their biases. A
                caller that sums the results of several slices passes False, and adds `biases` once.
        """
        sizes = self._sizes
        columns = self._index(head_set, sizes.head_size)
        fused = self._index(head_set, sizes.head_size * 3)
        qkv = Weights("qkv", self._qkv[0][fused], self._qkv[1][fused])
        output_bias, down_bias = self.biases if with_bias else (None, None)
        output = Weights("output", self._output[0], output_bias, columns)
        unpacked = [qkv, output]
        if sizes.neurons_per_head is None:
            up, down = self.shared_feed_forward
        else:
            neurons = self._index(head_set, sizes.neurons_per_head)
            rows = self._index(head_set, sizes.neurons_per_head * (2 if self.spec.gated else 1))
            unpacked.append(Weights("up", self._up[0][rows], self._up[1][rows]))
            unpacked.append(Weights("down", self._down[0], down_bias, neurons))
            up, down = self._pack_up(unpacked[2]), self._pack_linear(unpacked[3])
        copied = unpacked
        if self._dtype == torch.float32 and isinstance(columns, slice):
            copied = []  # views
        positions = self.positions
        if positions is not None:
            positions = positions.of_heads(self._index(head_set, 1))
        return Slice(
            spec=self.spec,
            num_heads=len(head_set),
            attention_norm=self.layer.attention_norm,
            feed_forward_norm=self.layer.feed_forward_norm,
            positions=positions,
            qkv=self._pack_linear(qkv),
            output=self._pack_linear(output),
            up=up,
            down=down,
            nbytes=sum(self._dtype.itemsize * weights.weight.numel() for weights in copied),
        )

    @cached_property
    def shared_feed_forward(self) -> tuple[Linear, Linear]:
        """Both maps of a feed-forward net whose neurons do not belong to heads, for all slices."""
        up, down = Weights("up", *self._up), Weights("down", *self._down)
        return self._pack_up(up), self._pack_linear(down)

    def forget(self) -> None:
        """Drop `shared_feed_forward`; it is packed again on demand."""
        self.__dict__.pop("shared_feed_forward", None)

    def _pack_up(self, weights: Weights) -> Linear:
        """Pack the first map of the feed-forward net, with activation and gate."""
        activation, up = self._activation, self._pack_linear(weights)
        if self.spec.gated:
            neurons = self.spec.neurons_per_head or self._sizes.neurons

            def gate(states: Tensor) -> Tensor:
                mapped = up(states)
                pairs = mapped.unflatten(1, (mapped.shape[1] // (2 * neurons), 2, neurons))
                activated, factors = pairs.unbind(2)
                gated: Tensor = (activation(activated) * factors).flatten(1)
                return gated

            return gate
        if activation is F.gelu and isinstance(up, Product):
            return replace(up, gelu=True)
        return lambda states: activation(up(states))

    def _gated(self, gate: WeightAndBias, up: WeightAndBias) -> WeightAndBias:
        """Interleave gate and up by head: a head's gate rows, then its up rows."""
        neurons = self.spec.neurons_per_head or len(up[0])
        weight, bias = (
            torch.stack([part.unflatten(0, (-1, neurons)) for part in parts], dim=1)
            for parts in zip(gate, up, strict=True)
        )
        return weight.flatten(0, 2), bias.flatten()

    def _read(self, linear: nn.Linear) -> WeightAndBias:
        """Return weight and bias.

        Slices in float32 may be views, so the weight is converted to float32 here. For other types
        it is converted when a slice is packed.
        """
        weight = linear.weight.detach()
        return weight.float() if self._dtype == torch.float32 else weight, linear.bias.detach()

    def _index(self, head_set: HeadSet, size: int) -> slice | Tensor:
        """Return the index of the rows or columns of a head set, `size` for each head.

        A slice for the first heads, which gives views; otherwise a tensor, which gives copies.
        """
        if head_set == tuple(range(len(head_set))):
            return slice(0, len(head_set) * size)
        starts = torch.tensor(head_set, device=self._qkv[0].device).unsqueeze(1) * size
        return (starts + torch.arange(size, device=starts.device)).flatten()


class SliceCache:
    """Cache of packed slices, with a memory limit for those that are copies.

    Args:
        layers: layers of the network.
        sizes: sizes of the network.
        precision: precision of the matrix products, one of `PRECISIONS`.
        packers: functions that pack the linear maps of each layer.
        distances: distance embeddings, see `LayerMatrices`.

    Attributes:
        dtype: input type of the maps.
        nbytes: memory of the cached slices that are copies, in bytes.
    """

    def __init__(
        self,
        layers: list[EncoderLayer],
        sizes: Sizes,
        precision: str,
        packers: Sequence[PackLinear],
        distances: Tensor | None = None,
    ) -> None:
        self.layers = [
            LayerMatrices(layer, sizes, getattr(torch, precision), pack_linear, distances)
            for layer, pack_linear in zip(layers, packers, strict=True)
        ]
        self.dtype = INPUT_DTYPES[precision]
        self.nbytes = 0
        self._slices: OrderedDict[tuple[int, HeadSet, bool], Slice] = OrderedDict()

    @property
    def weights(self) -> list[Tensor]:
        """The matrices of all layers."""
        return [weight for layer in self.layers for weight in layer.weights]

    def forget(self) -> None:
        """Drop all slices; they are packed again on demand."""
        self._slices.clear()
        self.nbytes = 0
        for layer in self.layers:
            layer.forget()

    def get(self, layer: int, head_set: HeadSet, with_bias: bool = True) -> Slice:
        """Return a layer's slice for a head set, packing it on first use.

        Args:
            layer: index of the layer.
            head_set: indices of the heads.
            with_bias: see `LayerMatrices.slice_heads`.
        """
        key = (layer, head_set, with_bias)
        packed = self._slices.get(key)
        if packed is not None:
            self._slices.move_to_end(key)
            return packed
        packed = self.layers[layer].slice_heads(head_set, with_bias)
        self._slices[key] = packed
        self.nbytes += packed.nbytes
        while self.nbytes > CACHE_BYTES and len(self._slices) > 1:
            _, dropped = self._slices.popitem(last=False)
            self.nbytes -= dropped.nbytes
        return packed
