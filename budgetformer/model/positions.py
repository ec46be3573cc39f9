"""What attention scores know of places: rotated queries and keys, or a bias by distance.

Absolute positions are part of the embeddings and need none of this. Distances are those of tokens
of one text, so padding and packing make no difference.

Tables are made outside of inference mode, whoever asks first: training shares them with passes.

Shapes: B items, k heads, T tokens, d columns of a head, S rows of a table of distances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from budgetformer.model.distances import bias_rows, score_rows


class Positions:
    """How k heads of one layer take places into account: here, not at all."""

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys [B, k, T, d] by their places."""
        return query, key

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return what is added to scaled scores, [B or 1, k, T, T]; None: nothing."""
        return None

    @property
    def scale(self) -> float | None:
        """Factor of the scores; None: the usual 1 / sqrt(d)."""
        return None

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Weights that it holds, which differ between heads."""
        return ()

    def of_heads(self, heads: slice | Tensor) -> Positions:  # noqa: ARG002
        """Return the same for some of the heads."""
        return self


@dataclass(frozen=True)
class Rotary(Positions):
    """Rotary positions (Su et al., 2021): pairs of columns rotate by angles that grow with it.

    Attributes:
        base: of the angles' frequencies.
    """

    base: float

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys."""
        tokens, size = query.shape[-2:]
        angles = _angles(self.base, size, _room(tokens), query.device)
        cos, sin = (own[:tokens] for own in angles)
        return _rotated(query, cos, sin), _rotated(key, cos, sin)

    def rotate_at(self, states: Tensor, places: Tensor) -> Tensor:
        """Rotate packed states [N, k, d] by their places [N], which only the device may know."""
        frequencies = _frequencies(self.base, states.shape[-1], states.device)
        angles = (places[:, None] * frequencies).repeat(1, 2)[:, None]
        return _rotated(states, angles.cos(), angles.sin())


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate states [..., T, d], whose column c and column c + d/2 are a pair."""
    first, second = states.float().chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    return (states.float() * cos + swapped * sin).to(states.dtype)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _angles(base: float, size: int, places: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles of some places, [places, size] each."""
    place = torch.arange(places, device=device)[:, None]
    angles = (place * _frequencies(base, size, device)).repeat(1, 2)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _frequencies(base: float, size: int, device: torch.device) -> Tensor:
    """Return the angle between one place and the next, of each pair of columns: [size / 2]."""
    return 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def _room(places: int) -> int:
    """Return the next power of two, so that few tables are kept."""
    return max(64, 1 << (places - 1).bit_length())


@dataclass(frozen=True)
class DistanceBias(Positions):
    """A learned number by distance and head (T5, MPNet).

    Attributes:
        table: [S, k].
        farthest: distance from which on all share a row.
    """

    table: Tensor
    farthest: int

    def bias(self, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """Look up the distance from each query to each key."""
        tokens = query.shape[-2]
        by_distance = self.by_distance(tokens)
        # Windows of T distances, the last one that of query 0: keys at 0 and after it.
        return by_distance.unfold(-1, tokens, 1).flip(-2).unsqueeze(0).to(query.dtype)

    def by_distance(self, tokens: int) -> Tensor:
        """Return the bias of each distance, from 1 - T to T - 1, key minus query: [k, 2T - 1]."""
        rows = _bias_rows(tokens, len(self.table), self.farthest, self.table.device)
        return self.table[rows].t()

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What it holds in memory."""
        return (self.table,)

    def of_heads(self, heads: slice | Tensor) -> DistanceBias:
        """Return the same for some of the heads."""
        return replace(self, table=self.table[:, heads])


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _bias_rows(tokens: int, rows: int, farthest: int, device: torch.device) -> Tensor:
    """Return `bias_rows` on a device."""
    return torch.from_numpy(bias_rows(tokens, rows, farthest)).to(device)


@dataclass(frozen=True)
class Disentangled(Positions):
    """Scores of contents with distances (DeBERTa).

    Attributes:
        to_position: keys of distances, [k, 2S, d]; None: contents do not look at distances.
        from_position: queries of distances, [k, 2S, d]; None: distances do not look at contents.
        farthest: the largest distance of all.
        terms: sums that scores are made of, which their scale divides by.
        buckets: whether rows beyond the first half are on a logarithmic scale.
        size: d.
    """

    to_position: Tensor | None
    from_position: Tensor | None
    farthest: int
    terms: int
    buckets: bool
    size: int

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float((self.size * self.terms) ** -0.5)

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Score each content with its distance to each other."""
        tables = [(query, self.to_position, False), (key, self.from_position, True)]
        total = None
        for states, table, flipped in tables:
            if table is None:
                continue
            rows, places = _score_rows(
                query.shape[-2], table.shape[1] // 2, self.farthest, self.buckets, query.device
            )
            scores = states @ table[:, rows].transpose(-1, -2).to(states.dtype)
            index = places.t() if flipped else places
            part = scores.gather(-1, index.expand(*scores.shape[:-1], -1))
            part = part.transpose(-1, -2) if flipped else part
            total = part if total is None else total + part
        return None if total is None else total * self.scale

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What it holds in memory."""
        return tuple(t for t in (self.to_position, self.from_position) if t is not None)

    def of_heads(self, heads: slice | Tensor) -> Disentangled:
        """Return the same for some of the heads."""
        own = (None if t is None else t[heads] for t in (self.to_position, self.from_position))
        to_position, from_position = own
        return replace(self, to_position=to_position, from_position=from_position)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _score_rows(
    tokens: int, span: int, farthest: int, buckets: bool, device: torch.device
) -> tuple[slice, Tensor]:
    """Return the table's rows that T tokens need, and which of them each pair has, [T, T].

    Pairs are (query, key), and their distance is the query's place minus the key's.
    """
    rows = torch.from_numpy(score_rows(tokens, span, farthest, buckets)).to(device)
    token = torch.arange(tokens, device=device)
    places = (rows - rows[0])[token[:, None] - token + tokens - 1]
    return slice(int(rows[0]), int(rows[-1]) + 1), places
