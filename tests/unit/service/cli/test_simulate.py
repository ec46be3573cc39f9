"""`budgetformer simulate`, and `tune --url`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.cost.table import CostTable, StepCost
from tests.support.command_line import CommandLine
from tests.support.simulated import COSTS
from tests.support.stores import TOPICS

STEPS = (StepCost(3e-4, 2e-7, 1e-5), *(StepCost(1e-3 * n, 1e-5 * n, 1e-4) for n in range(1, 5)))


@pytest.fixture
def costs(tmp_path: Path, model_store: Path) -> Path:
    label = read_checkpoint(model_store / TOPICS / "2").label
    (tmp_path / "topics-2.json").write_text(CostTable(label, "cpu", "float32", STEPS).dump())
    (tmp_path / "server.json").write_text(COSTS.dump())
    return tmp_path


@pytest.fixture
def asked(costs: Path, model_store: Path) -> list[Any]:
    """Return options that most tests share."""
    return [
        "--model", TOPICS, "--cost-tables", costs, "--model-store", model_store,
        "--seconds", 2, "--cores", 2,
    ]  # fmt: skip


def figures(command: CommandLine, *arguments: Any) -> dict[str, Any]:
    outcome = command("simulate", "--json", *arguments)
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    assert isinstance(found, dict)
    return found


def test_it_says_how_many_servers_a_rate_needs(command: CommandLine, asked: list[Any]) -> None:
    found = figures(command, *asked, "--rate", 5000, "--core-hour", 0.05)
    assert found["servers"] > 1
    assert found["cores"] == 2 * found["servers"]
    assert found["sent"] == found["answered"] + found["refused"] + found["expired"]
    assert found["texts_per_second"] == pytest.approx(5000, rel=0.1)
    core_hours = found["cores"] * 0.05 / 3600
    price = 1e6 * core_hours / found["texts_per_second"]
    assert found["price_of_a_million_texts"] == pytest.approx(price)


def test_it_says_what_so_many_servers_do(command: CommandLine, asked: list[Any]) -> None:
    few = figures(command, *asked, "--rate", 4000, "--servers", 2)
    many = figures(command, *asked, "--rate", 4000, "--servers", 20)
    assert few["servers"] == 2
    assert not few["goals_met"]
    assert few["p99"] > many["p99"]
    assert few["busy"]["frontend"] > many["busy"]["frontend"]


def test_the_options_of_serve_are_of_the_servers(command: CommandLine, asked: list[Any]) -> None:
    one, two = (
        figures(command, *asked, "--rate", 300, "--servers", 1, "--engines", count)
        for count in (1, 2)
    )
    assert one["busy"]["engine"] > two["busy"]["engine"]
    named = figures(command, *asked, "--rate", 300, "--servers", 1, "--quality", "best")
    assert named["levels"]["best"] == 1.0


def test_for_people_it_prints_a_table(command: CommandLine, asked: list[Any]) -> None:
    outcome = command("simulate", *asked, "--rate", 200, "--core-hour", 0.05)
    assert outcome.code == 0
    for name in ("servers", "goals met", "p50, p90, p99", "quality", "price of a million"):
        assert name in outcome.out


def test_traffic_from_a_log(command: CommandLine, asked: list[Any], tmp_path: Path) -> None:
    lines = [
        {
            "event": "request",
            "route": "/classify",
            "ms": 3.0,
            "timestamp": f"2026-01-01T10:00:{n % 4:02}.5Z",
        }
        for n in range(400)
    ]
    log = tmp_path / "server.log"
    log.write_text("\n".join(map(json.dumps, lines)))
    found = figures(command, *asked, "--traffic", log, "--servers", 1)
    assert found["texts_per_second_asked"] == pytest.approx(100.0)
    ten = figures(command, *asked, "--traffic", log, "--rate", 1000, "--servers", 4)
    assert ten["texts_per_second_asked"] == pytest.approx(1000.0)


def test_your_texts_and_how_hard_they_are(
    command: CommandLine, asked: list[Any], tmp_path: Path
) -> None:
    data = tmp_path / "texts.csv"
    data.write_text("text\n" + "The otter slept.\nFog over the sea.\n" * 10)
    assert figures(command, *asked, "--rate", 100, "--servers", 1, "--data", data)["answered"] > 100
    easy, hard = (
        figures(command, *asked, "--rate", 300, "--servers", 1, "--hard-share", share)
        for share in (0.05, 0.95)
    )
    assert easy["busy_cores"] < hard["busy_cores"]


def test_a_plot_is_drawn(command: CommandLine, asked: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    figures(command, *asked, "--traffic", "bursts", "--rate", 900, "--servers", 2, "--plot", plot)
    assert plot.read_text().startswith("<?xml")


def test_goals_that_no_number_meets_fail(command: CommandLine, asked: list[Any]) -> None:
    line = command("simulate", *asked, "--rate", 100, "--p99-ms", 1).complaint(1)
    assert "no number of such servers" in line


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        (["--rate", 10, "--quality", "0.5"], 2, "auto, fast, balanced or best"),
        (["--rate", 10, "--engines", "-1"], 2, "engines"),
        (["--rate", 10, "--data", "nothing.csv"], 1, "nothing.csv"),
        (["--traffic", "nothing.log"], 1, "nothing.log"),
        (["--rate", 10, "--cost-tables", "nowhere"], 1, "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(
    command: CommandLine, asked: list[Any], wrong: list[Any], code: int, said: str
) -> None:
    assert said in command("simulate", *asked, *wrong).complaint(code)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--traffic", "steady"],
        ["--rate", "0"],
        ["--rate", "10", "--router", "x"],
        ["--rate", "10", "--nonsense", "1"],
    ],
)
def test_wrong_usage_ends_with_code_2(
    command: CommandLine, asked: list[Any], wrong: list[str]
) -> None:
    assert command("simulate", *asked, *wrong).code == 2


def test_costs_have_to_be_measured_first(
    command: CommandLine, asked: list[Any], costs: Path, model_store: Path
) -> None:
    (costs / "server.json").unlink()
    assert "tune --url" in command("simulate", *asked, "--rate", 10).complaint()
    without = ["--model", TOPICS, "--model-store", model_store, "--rate", 10]
    assert "--cost-tables" in command("simulate", *without).complaint(2)


class TestTuneServer:
    def test_it_needs_texts(self, command: CommandLine, costs: Path) -> None:
        assert command("tune", "--out", costs, "--url", "http://127.0.0.1:9").code == 2

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:9", "ftp://there", "http://there:x", "nonsense"]
    )
    def test_a_server_that_is_not_there_is_one_line(
        self, command: CommandLine, costs: Path, model_store: Path, tmp_path: Path, url: str
    ) -> None:
        data = tmp_path / "texts.csv"
        data.write_text("text\nThe otter slept.\nFog.\n")
        line = command(
            "tune", "--model", TOPICS, "--model-store", model_store, "--out", costs,
            "--url", url, "--data", data,
        ).complaint()  # fmt: skip
        assert url in line
