"""Compare two versions of a model during a roll-out, and decide when the new one is stopped.

Pure logic; `service.control.versions` acts on its results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from budgetformer.wilson import interval
from service.telemetry.counts import DURATIONS, Difference, Observations, quantile

State = Literal["running", "promoted", "rolled_back", "stopped"]
Side = Literal["served", "candidate"]

FAILURES = ("error", "partial", "timeout")
"""Outcomes that count as failures of a version. The server may be the cause, so the candidate's
failures are compared with those of the served version."""
DEVIATIONS = 3.0
"""Standard deviations by which a share must exceed its bound. Shares are checked every second, so a
smaller number would stop versions that are within their bounds."""
MIN_FAILURES = 5
"""Fewest failed requests, or failed or differing shadow texts, for which a share is compared."""
MIN_REQUESTS = 100
"""Fewest requests of each version for which latency is compared."""
MIN_TEXTS = 200
"""Fewest shadow texts for which compute time is compared."""
SLOW = 0.9
"""Quantile of the latency that is compared."""


class Bounds(msgspec.Struct, frozen=True):
    """Bounds beyond which a roll-out stops by itself; None: no bound.

    Attributes:
        min_agreement: lowest share of shadow texts to which both versions give the same label.
        max_error_rate: highest share of failed requests above the served version's share, or of
            failed shadow texts.
        max_latency_ratio: highest ratio of the candidate to the served version, both of the 90th
            percentile of the latency and of the compute time of shadow texts.
    """

    min_agreement: float | None = None
    max_error_rate: float | None = 0.01
    max_latency_ratio: float | None = None


class Figures(msgspec.Struct):
    """Measurements of one version since its roll-out began.

    Attributes:
        outcomes: number of its requests by outcome.
        durations: durations of its requests, in seconds.
        shadow_seconds: time of its passes for shadow texts.
        shadow_macs, shadow_heads: multiply-adds and heads computed for shadow texts.
    """

    outcomes: dict[str, int] = {}
    durations: Observations = msgspec.field(default_factory=Observations)
    shadow_seconds: float = 0.0
    shadow_macs: float = 0.0
    shadow_heads: float = 0.0

    @property
    def requests(self) -> int:
        """Number of requests that were answered or failed."""
        return self.outcomes.get("ok", 0) + self.failures

    @property
    def failures(self) -> int:
        """Number of requests that failed, completely or in part."""
        return sum(self.outcomes.get(outcome, 0) for outcome in FAILURES)

    @property
    def failure_share(self) -> float:
        """Share of the requests that failed."""
        return self.failures / max(self.requests, 1)

    @property
    def slow_seconds(self) -> float | None:
        """The 90th percentile of the durations; None: too few requests."""
        if self.requests < MIN_REQUESTS:
            return None
        return quantile(self.durations.cumulative(DURATIONS), SLOW)


class RollOut(msgspec.Struct):
    """Roll-out of a new version of a model.

    Attributes:
        model: name of the model.
        served, candidate: the versions that are compared.
        weight: share of the requests that the candidate answers.
        shadow: share of the other requests that the candidate computes too; its answers are not
            returned.
        bounds: bounds beyond which the roll-out stops.
        state: state of the roll-out.
        reason: why it ended, for people.
        began, ended: start and end, in seconds since 1970.
        figures: measurements of both versions.
        shadow_texts: number of shadow texts by outcome: agreed, differed, failed, skipped.
    """

    model: str
    served: int
    candidate: int
    weight: float = 0.0
    shadow: float = 0.0
    bounds: Bounds = Bounds()
    state: State = "running"
    reason: str = ""
    began: float = 0.0
    ended: float | None = None
    figures: dict[Side, Figures] = msgspec.field(
        default_factory=lambda: {"served": Figures(), "candidate": Figures()}
    )
    shadow_texts: dict[str, int] = {}

    def count(self, difference: Difference) -> None:
        """Add the counts of a frontend for these two versions."""
        candidate = self.figures["candidate"]
        keys = {
            (self.model, str(self.served)): self.figures["served"],
            (self.model, str(self.candidate)): candidate,
        }
        for (name, *labels), grown in difference.counters.items():
            figures = keys.get((labels[0], labels[1])) if len(labels) > 2 else None
            if figures is None:
                continue
            kind = labels[2]
            if name == "model_requests":
                figures.outcomes[kind] = figures.outcomes.get(kind, 0) + int(grown)
            elif figures is not candidate:
                continue  # shadow texts of an earlier roll-out, whose candidate is served now
            elif name == "shadow_items":
                self.shadow_texts[kind] = self.shadow_texts.get(kind, 0) + int(grown)
            elif name.startswith("shadow_"):
                side = self.figures[kind]  # type: ignore[index]
                setattr(side, name, getattr(side, name) + grown)
        for (name, *labels), observed in difference.histograms.items():
            if name == "model_request_duration_seconds" and tuple(labels) in keys:
                keys[labels[0], labels[1]].durations.add(observed)

    @property
    def compared(self) -> int:
        """Number of shadow texts that both versions labelled."""
        return self.shadow_texts.get("agreed", 0) + self.shadow_texts.get("differed", 0)

    @property
    def agreement(self) -> float | None:
        """Share of compared shadow texts with the same label; None: none were compared."""
        return self.shadow_texts.get("agreed", 0) / self.compared if self.compared else None

    @property
    def latency_ratio(self) -> float | None:
        """Latency of the candidate divided by the served version's; None: too few requests."""
        served, candidate = (self.figures[side].slow_seconds for side in ("served", "candidate"))
        return candidate / served if served and candidate else None

    @property
    def compute_ratio(self) -> float | None:
        """Compute time of the candidate divided by the served version's; None: too few texts."""
        served = self.figures["served"].shadow_seconds
        if self.compared < MIN_TEXTS or not served:
            return None
        return self.figures["candidate"].shadow_seconds / served

    def breach(self) -> str:
        """Describe the bound that the candidate exceeds, in one line; empty: none."""
        return self._failures() or self._disagreement() or self._slowness()

    def _failures(self) -> str:
        limit = self.bounds.max_error_rate
        candidate, served_share = self.figures["candidate"], self.figures["served"].failure_share
        if limit is None:
            return ""
        if _above(candidate.failures, candidate.requests, limit + served_share):
            return (
                f"{candidate.failures} of {candidate.requests} requests failed "
                f"({candidate.failure_share:.2%}, of the served version {served_share:.2%}; "
                f"max_error_rate {limit:g})"
            )
        failed = self.shadow_texts.get("failed", 0)
        texts = failed + self.compared
        if _above(failed, texts, limit):
            return f"{failed} of {texts} shadow texts failed (max_error_rate {limit:g})"
        return ""

    def _disagreement(self) -> str:
        limit, texts = self.bounds.min_agreement, self.compared
        differed = self.shadow_texts.get("differed", 0)
        if limit is None or not _above(differed, texts, 1 - limit):
            return ""
        share = f"{1 - differed / texts:.2%}; min_agreement {limit:g}"
        return f"the same label for {texts - differed} of {texts} shadow texts ({share})"

    def _slowness(self) -> str:
        limit = self.bounds.max_latency_ratio
        for kind, ratio in (("latency", self.latency_ratio), ("compute", self.compute_ratio)):
            if ratio is not None and limit is not None and ratio > limit:
                times = f"{ratio:.2f} times the {kind} time of the served version"
                return f"{times} (max_latency_ratio {limit:g})"
        return ""

    def report(self) -> dict[str, Any]:
        """Return the roll-out as JSON types."""
        return {
            "model": self.model,
            "state": self.state,
            "reason": self.reason or None,
            "began": round(self.began),
            "ended": None if self.ended is None else round(self.ended),
            "weight": self.weight,
            "shadow": self.shadow,
            **msgspec.to_builtins(self.bounds),
            "served": self._side("served", self.served),
            "candidate": self._side("candidate", self.candidate),
            "shadow_texts": self.shadow_texts,
            "agreement": _rounded(self.agreement, 5),
            "latency_ratio": _rounded(self.latency_ratio, 3),
            "compute_ratio": _rounded(self.compute_ratio, 3),
        }

    def _side(self, side: Side, version: int) -> dict[str, Any]:
        figures = self.figures[side]
        texts = max(1, self.compared)
        slow = figures.slow_seconds
        return {
            "version": version,
            "requests": figures.requests,
            "failed_requests": figures.failures,
            "latency_p90_ms": None if slow is None else round(slow * 1000, 2),
            "shadow_ms_per_text": round(figures.shadow_seconds * 1000 / texts, 4),
            "shadow_macs_per_text": round(figures.shadow_macs / texts),
            "shadow_heads_per_text": round(figures.shadow_heads / texts, 3),
        }


def _above(hits: int, count: int, share: float) -> bool:
    """Return whether the observed share `hits / count` is significantly above `share`."""
    return hits >= MIN_FAILURES and share_bounds(hits, count)[0] > share


def share_bounds(hits: int, count: int) -> tuple[float, float]:
    """Return the confidence interval of an observed share, `DEVIATIONS` to either side."""
    return interval(hits / count, count, DEVIATIONS) if count else (0.0, 1.0)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def changed(bounds: Bounds, given: Mapping[str, float | None]) -> Bounds:
    """Return bounds with the given ones replaced."""
    fields = {name: given[name] for name in Bounds.__struct_fields__ if name in given}
    return msgspec.structs.replace(bounds, **fields)
