"""Traffic of a simulation: generated, or read from logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from budgetformer.errors import DataError
from service.simulation.traffic import Traffic, bursts, diurnal, read_traffic, steady

KINDS = [steady(200.0, 60.0), diurnal(200.0, 60.0), bursts(200.0, 600.0, seed=2)]


@pytest.mark.parametrize("traffic", KINDS)
def test_traffic_has_the_requested_rate(traffic: Traffic) -> None:
    assert traffic.mean_rate == pytest.approx(200.0, rel=0.1)
    times, sizes = traffic.draw(np.random.default_rng(0))
    assert len(times) / traffic.seconds == pytest.approx(traffic.mean_rate, rel=0.03)
    assert (np.diff(times) >= 0).all()
    assert 0 <= times[0] <= times[-1] < traffic.seconds
    assert set(sizes) == {1}


def test_the_variance_of_poisson_traffic_equals_its_mean() -> None:
    times, _ = steady(1000.0, 100.0).draw(np.random.default_rng(1))
    counts = np.bincount(times.astype(int))
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.4)


def test_bursts_have_their_share_factor_and_length() -> None:
    traffic = bursts(100.0, 2000.0, factor=4.0, share=0.1)
    high = traffic.rates > traffic.mean_rate
    assert high.mean() == pytest.approx(0.1, abs=0.04)
    assert traffic.rates.max() == pytest.approx(4 * traffic.rates.min())
    lengths = np.diff(np.flatnonzero(np.diff(high.astype(int))))[::2] * traffic.slot
    assert 1.0 < lengths.mean() < 9.0


def test_diurnal_traffic_swings_around_its_mean() -> None:
    day = diurnal(100.0, 24.0, swing=0.5)
    assert day.rates[0] == pytest.approx(50.0, rel=0.01)
    assert day.rates.max() == pytest.approx(150.0, rel=0.01)


def test_large_requests_have_their_share_of_the_texts() -> None:
    traffic = steady(1000.0, 200.0).of_texts(0.5, 100)
    assert traffic.mean_rate * traffic.mean_texts == pytest.approx(1000.0)
    _, sizes = traffic.draw(np.random.default_rng(0))
    assert sizes[sizes > 1].sum() / sizes.sum() == pytest.approx(0.5, abs=0.05)


class TestFiles:
    def log(self, path: Path, ends: list[tuple[str, float]], **more: Any) -> Path:
        lines = [
            {"event": "request", "route": "/classify", "timestamp": end, "ms": ms} | more
            for end, ms in ends
        ]
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        return path

    def test_arrivals_are_read_from_a_log(self, tmp_path: Path) -> None:
        ends = [("2026-01-01T10:00:01.500Z", 1000.0), ("2026-01-01T10:00:01.600Z", 500.0)]
        ends += [("2026-01-01T10:00:04.200Z", 100.0)]
        found = read_traffic(self.log(tmp_path / "log", ends))
        assert found.rates.tolist() == [2.0, 0.0, 0.0, 1.0]

    def test_rates_of_a_sampled_log_are_scaled_up(self, tmp_path: Path) -> None:
        path = self.log(tmp_path / "log", [("2026-01-01T10:00:01Z", 1.0)])
        assert read_traffic(path, 0.01).rates.tolist() == [100.0]

    def test_other_lines_are_ignored(self, tmp_path: Path) -> None:
        path = self.log(tmp_path / "log", [("2026-01-01T10:00:01Z", 1.0)])
        other = {"event": "model loaded", "route": "/classify"}
        path.write_text(f"{path.read_text()}{json.dumps(other)}\nno JSON at all\n")
        assert read_traffic(path).rates.tolist() == [1.0]

    def test_rates_are_read_from_recent_slots(self, tmp_path: Path) -> None:
        slots = [{"seconds": 5.0, "requests": 100, "texts": 250}]
        slots += [{"seconds": 5.0, "requests": 300, "texts": 750}]
        path = tmp_path / "recent.json"
        path.write_text(json.dumps({"model": "news", "slots": slots, "window": None}))
        found = read_traffic(path)
        assert found.rates.tolist() == [20.0, 60.0]
        assert found.mean_texts == pytest.approx(2.5)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "nothing\n",
            '{"slots": [{"requests": 1}]}',
            '{"slots": []}',
            '{"route": "/classify"',
            "[1]",
        ],
    )
    def test_another_kind_of_file_is_refused(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "file"
        path.write_text(content)
        with pytest.raises(DataError, match=str(path)):
            read_traffic(path)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="No such file"):
            read_traffic(tmp_path / "nothing")
