"""`budgetformer simulate` plans servers, and `tune --url` measures their costs."""

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
def options(costs: Path, model_store: Path) -> list[Any]:
    """Return the options that most tests share."""
    return [
        "--model", TOPICS, "--cost-tables", costs, "--model-store", model_store,
        "--seconds", 2, "--cores", 2,
    ]  # fmt: skip


def figures(command: CommandLine, *arguments: Any) -> dict[str, Any]:
    outcome = command("simulate", "--json", *arguments)
    assert outcome.code == 0, outcome
    result = json.loads(outcome.out)
    assert isinstance(result, dict)
    return result


def test_reports_the_number_of_servers_for_a_rate(command: CommandLine, options: list[Any]) -> None:
    result = figures(command, *options, "--rate", 5000, "--core-hour", 0.05)
    assert result["servers"] > 1
    assert result["cores"] == 2 * result["servers"]
    assert result["sent"] == result["answered"] + result["refused"] + result["expired"]
    assert result["texts_per_second"] == pytest.approx(5000, rel=0.1)
    price_per_second = result["cores"] * 0.05 / 3600
    price = 1e6 * price_per_second / result["texts_per_second"]
    assert result["price_of_a_million_texts"] == pytest.approx(price)


def test_reports_the_load_of_a_number_of_servers(command: CommandLine, options: list[Any]) -> None:
    few = figures(command, *options, "--rate", 4000, "--servers", 2)
    many = figures(command, *options, "--rate", 4000, "--servers", 20)
    assert few["servers"] == 2
    assert not few["goals_met"]
    assert few["p99"] > many["p99"]
    assert few["busy"]["frontend"] > many["busy"]["frontend"]


def test_options_of_serve_configure_the_servers(command: CommandLine, options: list[Any]) -> None:
    one, two = (
        figures(command, *options, "--rate", 300, "--servers", 1, "--engines", count)
        for count in (1, 2)
    )
    assert one["busy"]["engine"] > two["busy"]["engine"]
    named = figures(command, *options, "--rate", 300, "--servers", 1, "--quality", "best")
    assert named["levels"]["best"] == 1.0


def test_prints_a_table_without_json(command: CommandLine, options: list[Any]) -> None:
    outcome = command("simulate", *options, "--rate", 200, "--core-hour", 0.05)
    assert outcome.code == 0
    for name in ("servers", "goals met", "p50, p90, p99", "quality", "price of a million"):
        assert name in outcome.out


def test_traffic_can_be_read_from_a_log(
    command: CommandLine, options: list[Any], tmp_path: Path
) -> None:
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
    result = figures(command, *options, "--traffic", log, "--servers", 1)
    assert result["texts_per_second_asked"] == pytest.approx(100.0)
    scaled = figures(command, *options, "--traffic", log, "--rate", 1000, "--servers", 4)
    assert scaled["texts_per_second_asked"] == pytest.approx(1000.0)


def test_texts_and_their_difficulty_can_be_given(
    command: CommandLine, options: list[Any], tmp_path: Path
) -> None:
    data = tmp_path / "texts.csv"
    data.write_text("text\n" + "The otter slept.\nFog over the sea.\n" * 10)
    assert (
        figures(command, *options, "--rate", 100, "--servers", 1, "--data", data)["answered"] > 100
    )
    easy, hard = (
        figures(command, *options, "--rate", 300, "--servers", 1, "--hard-share", share)
        for share in (0.05, 0.95)
    )
    assert easy["busy_cores"] < hard["busy_cores"]


def test_a_plot_is_written(command: CommandLine, options: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    figures(command, *options, "--traffic", "bursts", "--rate", 900, "--servers", 2, "--plot", plot)
    assert plot.read_text().startswith("<?xml")


def test_goals_that_no_number_of_servers_meets_are_an_error(
    command: CommandLine, options: list[Any]
) -> None:
    line = command("simulate", *options, "--rate", 100, "--p99-ms", 1).complaint(1)
    assert "no number of such servers" in line


@pytest.mark.parametrize(
    ("invalid", "code", "message"),
    [
        (["--rate", 10, "--quality", "0.5"], 2, "auto, fast, balanced or best"),
        (["--rate", 10, "--engines", "-1"], 2, "engines"),
        (["--rate", 10, "--data", "nothing.csv"], 1, "nothing.csv"),
        (["--traffic", "nothing.log"], 1, "nothing.log"),
        (["--rate", 10, "--cost-tables", "nowhere"], 1, "nowhere"),
    ],
)
def test_invalid_input_is_one_line(
    command: CommandLine, options: list[Any], invalid: list[Any], code: int, message: str
) -> None:
    assert message in command("simulate", *options, *invalid).complaint(code)


@pytest.mark.parametrize(
    "invalid",
    [
        ["--traffic", "steady"],
        ["--rate", "0"],
        ["--rate", "10", "--router", "x"],
        ["--rate", "10", "--nonsense", "1"],
    ],
)
def test_wrong_usage_ends_with_code_2(
    command: CommandLine, options: list[Any], invalid: list[str]
) -> None:
    assert command("simulate", *options, *invalid).code == 2


def test_missing_costs_are_an_error_that_names_the_command_for_them(
    command: CommandLine, options: list[Any], costs: Path, model_store: Path
) -> None:
    (costs / "server.json").unlink()
    assert "tune --url" in command("simulate", *options, "--rate", 10).complaint()
    without_tables = ["--model", TOPICS, "--model-store", model_store, "--rate", 10]
    assert "--cost-tables" in command("simulate", *without_tables).complaint(2)


class TestTuneServer:
    def test_tune_requires_texts(self, command: CommandLine, costs: Path) -> None:
        assert command("tune", "--out", costs, "--url", "http://127.0.0.1:9").code == 2

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:9", "ftp://there", "http://there:x", "nonsense"]
    )
    def test_an_unreachable_server_is_one_line(
        self, command: CommandLine, costs: Path, model_store: Path, tmp_path: Path, url: str
    ) -> None:
        data = tmp_path / "texts.csv"
        data.write_text("text\nThe otter slept.\nFog.\n")
        line = command(
            "tune", "--model", TOPICS, "--model-store", model_store, "--out", costs,
            "--url", url, "--data", data,
        ).complaint()  # fmt: skip
        assert url in line
