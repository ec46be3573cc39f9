"""Rotary and relative positions: rotate queries and keys, or add a bias by distance to the scores.

Absolute positions are part of the embeddings instead. Distances are between tokens of the same
text, so padding and packing do not change them.

Cached tables are created outside inference mode, because training uses the same ones.

Shapes: B items, k heads, T tokens, d columns of a head, S rows of a table of distances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from budgetformer.model.distances import bias_rows, score_rows


class Positions:
    """Positions of k heads of one layer; this base class leaves the scores unchanged."""

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys [B, k, T, d] by their positions."""
        return query, key

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return the bias added to scaled scores, [B or 1, k, T, T]; None: no bias."""
        return None

    @property
    def scale(self) -> float | None:
        """Factor of the scores; None: the usual 1 / sqrt(d)."""
        return None

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Weight tables that differ between heads."""
        return ()

    def of_heads(self, selected_heads: slice | Tensor) -> Positions:  # noqa: ARG002
        """Return the positions of a subset of the heads."""
        return self


@dataclass(frozen=True)
class Rotary(Positions):
    """Rotary positions (Su et al., 2021): pairs of columns rotate by angles that grow by position.

    Attributes:
        base: base of the angles' frequencies.
    """

    base: float

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys."""
        tokens, size = query.shape[-2:]
        angles = _angles(self.base, size, _table_size(tokens), query.device)
        cos, sin = (table[:tokens] for table in angles)
        return _rotated(query, cos, sin), _rotated(key, cos, sin)

    def rotate_at(self, states: Tensor, positions: Tensor) -> Tensor:
        """Rotate packed states [N, k, d] by their positions [N], which stay on the device."""
        frequencies = _frequencies(self.base, states.shape[-1], states.device)
        angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]
        return _rotated(states, angles.cos(), angles.sin())


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate states [..., T, d]; columns c and c + d/2 are a pair."""
    first, second = states.float().chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    return (states.float() * cos + swapped * sin).to(states.dtype)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _angles(base: float, size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles of the first positions, [count, size] each."""
    positions = torch.arange(count, device=device)[:, None]
    angles = (positions * _frequencies(base, size, device)).repeat(1, 2)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _frequencies(base: float, size: int, device: torch.device) -> Tensor:
    """Return the angle between neighbouring positions for each pair of columns: [size / 2]."""
    return 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def _table_size(count: int) -> int:
    """Return the next power of two, at least 64, so that few tables are cached."""
    return max(64, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class DistanceBias(Positions):
    """A learned bias per distance and head (T5, MPNet).

    Attributes:
        table: bias by row and head, [S, k].
        max_distance: distance from which all larger distances share a row.
    """

    table: Tensor
    max_distance: int

    def bias(self, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """Return the bias of each pair of query and key, [1, k, T, T]."""
        tokens = query.shape[-2]
        by_distance = self.by_distance(tokens)
        # Each window has T distances; the last is query 0's, whose keys are at 0 and after it.
        return by_distance.unfold(-1, tokens, 1).flip(-2).unsqueeze(0).to(query.dtype)

    def by_distance(self, tokens: int) -> Tensor:
        """Return the bias of each distance 1 - T .. T - 1 (key - query): [k, 2T - 1]."""
        rows = _bias_rows(tokens, len(self.table), self.max_distance, self.table.device)
        return self.table[rows].t()

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Weight tables that differ between heads."""
        return (self.table,)

    def of_heads(self, selected_heads: slice | Tensor) -> DistanceBias:
        """Return the positions of a subset of the heads."""
        return replace(self, table=self.table[:, selected_heads])


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _bias_rows(tokens: int, rows: int, max_distance: int, device: torch.device) -> Tensor:
    """Return `distances.bias_rows` on a device."""
    return torch.from_numpy(bias_rows(tokens, rows, max_distance)).to(device)


@dataclass(frozen=True)
class Disentangled(Positions):
    """Disentangled attention: scores between contents and distances (DeBERTa).

    Attributes:
        to_position: distance keys for content-to-position scores, [k, 2S, d]; None: no such term.
        from_position: distance queries for position-to-content scores, [k, 2S, d]; None: no such
            term.
        max_distance: distance from which all larger distances share a row.
        terms: number of terms in a score, which scales it.
        buckets: whether distances beyond half of S are on a logarithmic scale.
        size: columns of a head, d.
    """

    to_position: Tensor | None
    from_position: Tensor | None
    max_distance: int
    terms: int
    buckets: bool
    size: int

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float((self.size * self.terms) ** -0.5)

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Return the sum of the position terms for each pair of query and key, [B, k, T, T]."""
        tables = [(query, self.to_position, False), (key, self.from_position, True)]
        total = None
        for states, table, flipped in tables:
            if table is None:
                continue
            rows, places = _score_rows(
                query.shape[-2], table.shape[1] // 2, self.max_distance, self.buckets, query.device
            )
            scores = states @ table[:, rows].transpose(-1, -2).to(states.dtype)
            index = places.t() if flipped else places
            part = scores.gather(-1, index.expand(*scores.shape[:-1], -1))
            part = part.transpose(-1, -2) if flipped else part
            total = part if total is None else total + part
        return None if total is None else total * self.scale

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Weight tables that differ between heads."""
        return tuple(t for t in (self.to_position, self.from_position) if t is not None)

    def of_heads(self, selected_heads: slice | Tensor) -> Disentangled:
        """Return the positions of a subset of the heads."""
        to_position, from_position = (
            None if table is None else table[selected_heads]
            for table in (self.to_position, self.from_position)
        )
        return replace(self, to_position=to_position, from_position=from_position)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _score_rows(
    tokens: int, span: int, max_distance: int, buckets: bool, device: torch.device
) -> tuple[slice, Tensor]:
    """Return the table rows that T tokens use, and each pair's index among them, [T, T].

    Pairs are (query, key); their distance is the query's position minus the key's.
    """
    rows = torch.from_numpy(score_rows(tokens, span, max_distance, buckets)).to(device)
    token = torch.arange(tokens, device=device)
    places = (rows - rows[0])[token[:, None] - token + tokens - 1]
    return slice(int(rows[0]), int(rows[-1]) + 1), places
