"""Two versions of a model side by side: what is measured of them, and when the new one goes.

Pure logic; `service.control.versions` does what it says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from budgetformer.wilson import interval
from service.telemetry.counts import DURATIONS, Difference, Observations

State = Literal["running", "promoted", "rolled_back", "stopped"]
Side = Literal["served", "candidate"]

FAILURES = ("error", "partial", "timeout")
"""Outcomes of requests that a version is to blame for; it may be the server, so both versions are
compared."""
DEVIATIONS = 3.0
"""Standard deviations by which a share must be beyond its bound, as it is judged again and again: a
version that is within its bounds is then hardly ever stopped."""
MIN_FAILURES = 5
"""Requests that failed, or shadow texts that failed or differ, before their share is judged."""
MIN_REQUESTS = 100
"""Requests of each version before their latency is compared."""
MIN_TEXTS = 200
"""Shadow texts before their time to compute is compared."""
SLOW = 0.9
"""Quantile of the latency that is compared."""


class Bounds(msgspec.Struct, frozen=True):
    """Where a roll-out stops by itself; None: it does not.

    Attributes:
        min_agreement: share of shadow texts to which both versions give the same label.
        max_error_rate: share of failed requests above the served version's, or of failed shadow
            texts.
        max_latency_ratio: the candidate's 90th percentile of the latency, or its time to compute
            shadow texts, divided by the served version's.
    """

    min_agreement: float | None = None
    max_error_rate: float | None = 0.01
    max_latency_ratio: float | None = None


class Figures(msgspec.Struct):
    """What was counted of one version since its roll-out began.

    Attributes:
        outcomes: requests that it was to answer, by outcome.
        durations: of those, in seconds.
        shadow_seconds: that its passes took for shadow texts.
        shadow_macs, shadow_heads: that it computed for them.
    """

    outcomes: dict[str, int] = {}
    durations: Observations = msgspec.field(default_factory=Observations)
    shadow_seconds: float = 0.0
    shadow_macs: float = 0.0
    shadow_heads: float = 0.0

    @property
    def requests(self) -> int:
        """Requests that were answered, or failed."""
        return self.outcomes.get("ok", 0) + self.failures

    @property
    def failures(self) -> int:
        """Requests that failed, if only in part."""
        return sum(self.outcomes.get(outcome, 0) for outcome in FAILURES)

    @property
    def failure_share(self) -> float:
        """Share of the requests that failed."""
        return self.failures / max(self.requests, 1)

    @property
    def slow_seconds(self) -> float | None:
        """The 90th percentile of the durations; None: there are too few."""
        return quantile(self.durations, SLOW) if self.requests >= MIN_REQUESTS else None


class RollOut(msgspec.Struct):
    """A new version beside the served one.

    Attributes:
        model: its name.
        served, candidate: the versions.
        weight: share of the requests that the candidate answers.
        shadow: share of the other requests that it computes too, without its answers being
            returned.
        bounds: beyond which it stops.
        state: of the roll-out.
        reason: why it ended, for people.
        began, ended: seconds since 1970.
        figures: of both versions.
        shadow_texts: by outcome: agreed, differed, failed, skipped.
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
        """Add what a frontend counted of these two versions."""
        keys = {
            (self.model, str(self.served)): self.figures["served"],
            (self.model, str(self.candidate)): self.figures["candidate"],
        }
        for (name, *labels), grown in difference.counters.items():
            figures = keys.get((labels[0], labels[1])) if len(labels) > 2 else None
            if figures is None:
                continue
            if name == "model_requests":
                figures.outcomes[labels[2]] = figures.outcomes.get(labels[2], 0) + int(grown)
            elif name == "shadow_items" and figures is self.figures["candidate"]:
                outcome = labels[2]
                self.shadow_texts[outcome] = self.shadow_texts.get(outcome, 0) + int(grown)
            elif name.startswith("shadow_") and int(labels[1]) == self.candidate:
                side = self.figures[labels[2]]  # type: ignore[index]
                setattr(side, name, getattr(side, name) + grown)
        for (name, *labels), observed in difference.histograms.items():
            if name == "model_request_duration_seconds" and tuple(labels) in keys:
                keys[labels[0], labels[1]].durations.add(observed)

    @property
    def compared(self) -> int:
        """Shadow texts that both versions labelled."""
        return self.shadow_texts.get("agreed", 0) + self.shadow_texts.get("differed", 0)

    @property
    def agreement(self) -> float | None:
        """Share of those with the same label; None: there are none."""
        return self.shadow_texts.get("agreed", 0) / self.compared if self.compared else None

    @property
    def latency_ratio(self) -> float | None:
        """The candidate's latency divided by the served version's; None: too few requests."""
        served, candidate = (self.figures[side].slow_seconds for side in ("served", "candidate"))
        return candidate / served if served and candidate else None

    @property
    def compute_ratio(self) -> float | None:
        """The same of the time to compute shadow texts."""
        served = self.figures["served"].shadow_seconds
        if self.compared < MIN_TEXTS or not served:
            return None
        return self.figures["candidate"].shadow_seconds / served

    def breach(self) -> str:
        """Return which bound the candidate is beyond, in a line for people; empty: none."""
        return self._failures() or self._disagreement() or self._slowness()

    def _failures(self) -> str:
        most = self.bounds.max_error_rate
        candidate, usual = self.figures["candidate"], self.figures["served"].failure_share
        if most is None:
            return ""
        if _above(candidate.failures, candidate.requests, most + usual):
            shares = f"{candidate.failure_share:.2%}, of the served version {usual:.2%}"
            which = f"{candidate.failures} of {candidate.requests} requests failed ({shares}"
            return f"{which}; max_error_rate {most:g})"
        failed = self.shadow_texts.get("failed", 0)
        texts = failed + self.compared
        if _above(failed, texts, most):
            return f"{failed} of {texts} shadow texts failed (max_error_rate {most:g})"
        return ""

    def _disagreement(self) -> str:
        least, texts = self.bounds.min_agreement, self.compared
        differed = self.shadow_texts.get("differed", 0)
        if least is None or not _above(differed, texts, 1 - least):
            return ""
        share = f"{1 - differed / texts:.2%}; min_agreement {least:g}"
        return f"the same label for {texts - differed} of {texts} shadow texts ({share})"

    def _slowness(self) -> str:
        most = self.bounds.max_latency_ratio
        for what, ratio in (("latency", self.latency_ratio), ("compute", self.compute_ratio)):
            if ratio is not None and most is not None and ratio > most:
                times = f"{ratio:.2f} times the {what} time of the served version"
                return f"{times} (max_latency_ratio {most:g})"
        return ""

    def report(self) -> dict[str, Any]:
        """Return everything as JSON's types."""
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
    """Say whether a share is certainly above another one."""
    return hits >= MIN_FAILURES and share_bounds(hits, count)[0] > share


def share_bounds(hits: int, count: int) -> tuple[float, float]:
    """Return the interval of a share that was observed, `DEVIATIONS` wide to either side."""
    return interval(hits / count, count, DEVIATIONS) if count else (0.0, 1.0)


def quantile(durations: Observations, at: float) -> float:
    """Return a quantile of durations, linear within its bucket, as Prometheus does."""
    cumulative = durations.cumulative(DURATIONS)
    rank = at * cumulative[-1]
    bucket = bisect_left(cumulative, rank)
    if bucket >= len(DURATIONS):
        return float(DURATIONS[-1])
    low = DURATIONS[bucket - 1] if bucket else 0.0
    before = cumulative[bucket - 1] if bucket else 0
    inside = cumulative[bucket] - before
    return low + (DURATIONS[bucket] - low) * (rank - before) / inside if inside else low


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def changed(bounds: Bounds, given: Mapping[str, float | None]) -> Bounds:
    """Return bounds with those that are given."""
    own = {name: given[name] for name in Bounds.__struct_fields__ if name in given}
    return msgspec.structs.replace(bounds, **own)
