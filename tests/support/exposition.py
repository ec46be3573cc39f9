"""Read Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "budgetformer_"


@dataclass(frozen=True)
class Sample:
    """One series and its value; names without this program's prefix."""

    name: str
    labels: dict[str, str]
    value: float


class Exposition:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.kinds = {family.name.removeprefix(PREFIX): family.type for family in families}
        self.samples = [
            Sample(sample.name.removeprefix(PREFIX), dict(sample.labels), sample.value)
            for family in families
            for sample in family.samples
        ]

    def select(self, name: str, **labels: object) -> list[Sample]:
        """Return the series of a name with all the given labels."""
        wanted = {key: str(value) for key, value in labels.items()}
        return [s for s in self.samples if s.name == name and wanted.items() <= s.labels.items()]

    def total(self, name: str, **labels: object) -> float:
        """Return the sum of the series of a name with all the given labels, at least one."""
        found = self.select(name, **labels)
        assert found, f"no series {name} {labels}"
        return sum(sample.value for sample in found)

    def by(self, label: str, name: str, **labels: object) -> dict[str, float]:
        """Return the values that are not 0, by one label."""
        sums: dict[str, float] = {}
        for sample in self.select(name, **labels):
            sums[sample.labels[label]] = sums.get(sample.labels[label], 0) + sample.value
        return {key: value for key, value in sums.items() if value}

    def buckets(self, name: str) -> list[float]:
        """Return the finite upper bounds of a histogram."""
        return _finite(float(s.labels["le"]) for s in self.select(f"{name}_bucket"))

    def minus(self, before: Exposition, name: str, **labels: object) -> float:
        """Return the increase of the sum of some series since an earlier scrape."""
        earlier = sum(sample.value for sample in before.select(name, **labels))
        return sum(sample.value for sample in self.select(name, **labels)) - earlier


def _finite(bounds: Iterable[float]) -> list[float]:
    return sorted({bound for bound in bounds if bound != float("inf")})
