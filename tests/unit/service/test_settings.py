"""The settings of `budgetformer serve`, read with `--print-config`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import service.settings
from budgetformer.cores import usable_cores
from service.http.app import create_app
from service.http.playground import UNLISTED
from service.ipc.engine_client import Engines
from service.settings import ModelSettings, Settings, gpu_count
from tests.support.command_line import CommandLine

OPTIONS = sorted(Settings.model_fields)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text('port = 7001\nhost = "0.0.0.0"\nengines = 3\n')
    return path


def printed(command: CommandLine, *arguments: Any) -> dict[str, Any]:
    """Return the output of `serve --print-config`."""
    outcome = command("serve", "--print-config", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    shown = json.loads(outcome.out)
    assert isinstance(shown, dict)
    return shown


def test_every_setting_is_printed(command: CommandLine) -> None:
    assert sorted(printed(command)) == OPTIONS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "127.0.0.1"),
        ("port", 8000),
        ("model_store", "model_store"),
        ("models", []),
        ("default_model", None),
        ("engines", 0),
        ("device", "auto"),
        ("quality", "auto"),
        ("admin_key", None),
    ],
)
def test_settings_have_their_defaults(command: CommandLine, name: str, value: object) -> None:
    assert printed(command)[name] == value


def test_the_file_overrides_defaults(command: CommandLine, config_file: Path) -> None:
    shown = printed(command, "--config", config_file)
    assert (shown["port"], shown["host"], shown["engines"]) == (7001, "0.0.0.0", 3)


def test_the_environment_overrides_the_file(
    command: CommandLine, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUDGETFORMER_PORT", "7002")
    shown = printed(command, "--config", config_file)
    assert (shown["port"], shown["engines"]) == (7002, 3)


def test_flags_override_environment_and_file(
    command: CommandLine, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUDGETFORMER_PORT", "7002")
    shown = printed(command, "--config", config_file, "--port", "7003")
    assert (shown["port"], shown["engines"]) == (7003, 3)


def test_the_file_can_be_named_by_the_environment(
    command: CommandLine, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUDGETFORMER_CONFIG", str(config_file))
    assert printed(command)["port"] == 7001


def test_the_file_can_be_named_with_an_equals_sign(command: CommandLine, config_file: Path) -> None:
    assert printed(command, f"--config={config_file}")["port"] == 7001


def test_options_can_be_given_with_an_equals_sign(command: CommandLine) -> None:
    assert printed(command, "--max-queue-items=9")["max_queue_items"] == 9


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--quality", "best", "best"),
        ("--quality", "1.5", 1.5),
        ("--quality", "0", 0.0),
        ("--drain-seconds", "0", 0.0),
        ("--log-format", "json", "json"),
        ("--device", "cpu", "cpu"),
        ("--default-model", "topics", "topics"),
    ],
)
def test_values_of_flags_are_parsed(
    command: CommandLine, flag: str, text: str, value: object
) -> None:
    assert printed(command, flag, text)[flag[2:].replace("-", "_")] == value


def test_a_flag_for_several_models_is_repeated(command: CommandLine) -> None:
    assert printed(command, "--models", "topics", "--models", "tags")["models"] == [
        "topics",
        "tags",
    ]


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_secrets_are_masked(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    arguments: list[object] = []
    match source:
        case "flag":
            arguments = ["--admin-key", "open-sesame"]
        case "environment":
            monkeypatch.setenv("BUDGETFORMER_ADMIN_KEY", "open-sesame")
        case _:
            path = tmp_path / "server.toml"
            path.write_text('admin_key = "open-sesame"\n')
            arguments = ["--config", path]
    outcome = command("serve", "--print-config", *arguments)
    assert "sesame" not in outcome.out + outcome.err
    assert json.loads(outcome.out)["admin_key"] == "**********"


def test_help_lists_every_option_with_its_description(command: CommandLine) -> None:
    outcome = command("serve", "--help")
    assert outcome.code == 0
    unwrapped = " ".join(outcome.out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in outcome.out
        assert field.description
        assert " ".join(field.description.split()) in unwrapped


class TestRefused:
    def test_an_unknown_flag(self, command: CommandLine) -> None:
        outcome = command("serve", "--print-config", "--prot", "1")
        assert outcome.code == 2
        assert "--prot" in outcome.err

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("BUDGETFORMER_PROT", "BUDGETFORMER_PORT"),
            ("BUDGETFORMER_MAX_QUEUE_ITEM", "BUDGETFORMER_MAX_QUEUE_ITEMS"),
            ("BUDGETFORMER_ENGINE", "BUDGETFORMER_ENGINES"),
            ("budgetformer_adminkey", "BUDGETFORMER_ADMIN_KEY"),
        ],
    )
    def test_an_unknown_variable_names_the_nearest_known_one(
        self, command: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str, near: str
    ) -> None:
        monkeypatch.setenv(name, "1")
        line = command("serve", "--print-config").complaint(2)
        assert name in line
        assert f"did you mean {near}?" in line

    def test_an_unknown_key_of_the_file(self, command: CommandLine, tmp_path: Path) -> None:
        path = tmp_path / "server.toml"
        path.write_text("prot = 1\n")
        assert "prot" in command("serve", "--print-config", "--config", path).complaint(2)

    def test_a_missing_file(self, command: CommandLine, tmp_path: Path) -> None:
        path = tmp_path / "none.toml"
        assert str(path) in command("serve", "--print-config", "--config", path).complaint(2)

    def test_a_file_that_is_not_toml(self, command: CommandLine, tmp_path: Path) -> None:
        path = tmp_path / "server.toml"
        path.write_text("port: 7001\n")
        command("serve", "--print-config", "--config", path).complaint(2)

    def test_config_without_a_value(self, command: CommandLine) -> None:
        assert "--config" in command("serve", "--print-config", "--config").complaint(2)

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--port", "many"),
            ("--port", "-1"),
            ("--port", "65536"),
            ("--engines", "-1"),
            ("--max-batch-items", "0"),
            ("--max-queue-items", "0"),
            ("--batch-milliseconds", "0"),
            ("--timeout-ms", "0"),
            ("--drain-seconds", "-1"),
            ("--device", "abacus"),
            ("--quality", "superb"),
            ("--quality", "101"),
            ("--quality", "-0.1"),
            ("--quality", "nan"),
            ("--log-level", "loud"),
        ],
    )
    def test_an_invalid_value_of_a_flag(self, command: CommandLine, flag: str, value: str) -> None:
        outcome = command("serve", "--print-config", f"{flag}={value}")
        assert flag[2:].replace("-", "_") in outcome.complaint(2)

    @pytest.mark.parametrize(
        ("name", "value"), [("PORT", "many"), ("ENGINES", "1.5"), ("DEVICE", "")]
    )
    def test_an_invalid_value_of_a_variable(
        self, command: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(f"BUDGETFORMER_{name}", value)
        assert name.lower() in command("serve", "--print-config").complaint(2)

    def test_an_invalid_value_in_the_file(self, command: CommandLine, tmp_path: Path) -> None:
        path = tmp_path / "server.toml"
        path.write_text('port = "many"\n')
        assert "port" in command("serve", "--print-config", "--config", path).complaint(2)

    def test_errors_do_not_repeat_secrets(self, command: CommandLine) -> None:
        outcome = command("serve", "--print-config", "--admin-key", "open-sesame", "--port=many")
        assert "sesame" not in outcome.complaint(2)


def test_the_admin_key_can_be_read_from_a_file(command: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("open-sesame\n")
    outcome = command("serve", "--print-config", f"--admin-key-file={path}")
    assert json.loads(outcome.out)["admin_key"] == "**********"
    assert "open-sesame" not in outcome.out
    settings = Settings(admin_key_file=path)
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "open-sesame"


def test_an_empty_file_means_no_admin_key(command: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("\n")
    assert printed(command, f"--admin-key-file={path}")["admin_key"] is None


def test_a_missing_file_of_the_admin_key_is_one_line(command: CommandLine, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    complaint = command("serve", "--print-config", f"--admin-key-file={missing}").complaint(2)
    assert f"{missing}: No such file" in complaint


@pytest.mark.parametrize(
    ("device", "gpus", "resolved", "engines"),
    [
        ("auto", 0, "cpu", usable_cores()),
        ("auto", 2, "cuda", 2),
        ("cpu", 2, "cpu", usable_cores()),
        ("cuda", 2, "cuda", 2),
        ("cuda", 0, "cuda", 1),
    ],
)
def test_one_engine_per_gpu_or_core(
    monkeypatch: pytest.MonkeyPatch,
    device: Literal["auto", "cpu", "cuda"],
    gpus: int,
    resolved: str,
    engines: int,
) -> None:
    monkeypatch.setattr(service.settings, "gpu_count", lambda: gpus)
    settings = Settings(device=device)
    assert (settings.resolved_device(), settings.resolved_engines()) == (resolved, engines)
    assert Settings(device=device, engines=3).resolved_engines() == 3


def test_gpus_are_counted_by_torch_if_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(service.settings, "GPU_DRIVERS", (str(tmp_path / "none"),))
    assert gpu_count.__wrapped__() == 0
    monkeypatch.setattr(service.settings, "GPU_DRIVERS", (str(tmp_path),))
    assert gpu_count.__wrapped__() == torch.cuda.device_count()
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    assert gpu_count.__wrapped__() == 0


class TestServiceVariables:
    """Variables that Kubernetes and Docker set for services whose names begin like settings."""

    KUBERNETES = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "SERVICE_PORT_METRICS": "9464",
        "PORT": "tcp://10.0.0.1:8000",
        "PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PORT_8000_TCP_PROTO": "tcp",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_ADDR": "10.0.0.1",
        "PORT_53_UDP": "udp://[fd00::1]:53",
        "PORT_53_UDP_ADDR": "fd00::1",
    }
    DOCKER = {
        "NAME": "/web/budgetformer",
        "PORT": "tcp://172.17.0.5:8000",
        "PORT_8000_TCP": "tcp://172.17.0.5:8000",
        "PORT_8000_TCP_START": "tcp://172.17.0.5:8000",
        "PORT_8000_TCP_PORT_END": "8001",
        "ENV_BUDGETFORMER_HOST": "0.0.0.0",
        "ENV_PATH": "/bin",
    }

    @pytest.mark.parametrize("variables", [KUBERNETES, DOCKER], ids=["kubernetes", "docker"])
    @pytest.mark.parametrize("name", ["", "CANARY_", "METRICS_", "A_B_C_"])
    def test_service_variables_are_ignored(
        self, command: CommandLine, monkeypatch: pytest.MonkeyPatch, variables: Any, name: str
    ) -> None:
        for variable, value in variables.items():
            monkeypatch.setenv(f"BUDGETFORMER_{name}{variable}", value)
        monkeypatch.setenv("BUDGETFORMER_ENGINES", "3")
        shown = printed(command)
        assert (shown["port"], shown["metrics_port"], shown["engines"]) == (8000, None, 3)
        assert Settings().port == 8000

    def test_a_setting_among_them_is_read(
        self, command: CommandLine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for variable, value in self.KUBERNETES.items():
            monkeypatch.setenv(f"BUDGETFORMER_{variable}", value)
        monkeypatch.setenv("BUDGETFORMER_PORT", "7002")
        assert printed(command)["port"] == 7002

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("SERVICE_PORT", "http"),
            ("SERVICE_HOST", "localhost"),
            ("SERVICE_PROT", "8000"),
            ("PORT_8000_TPC", "tcp://10.0.0.1:8000"),
            ("PORT_8000_TCP", "8000"),
            ("PORTS", "tcp://10.0.0.1:8000"),
            ("NAME", "topics"),
            ("ENV_HOST", "x"),
        ],
    )
    def test_similar_unknown_variables_are_refused(
        self, command: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(f"BUDGETFORMER_{name}", value)
        complaint = command("serve", "--print-config").complaint(2)
        assert f"unknown environment variable BUDGETFORMER_{name}" in complaint

    @pytest.mark.parametrize("value", ["tcp:/10.0.0.1", "http://10.0.0.1:8000"])
    def test_an_invalid_port_is_refused(
        self, command: CommandLine, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("BUDGETFORMER_PORT", value)
        assert "port" in command("serve", "--print-config").complaint(2)


class TestRootPath:
    @pytest.mark.parametrize(
        ("value", "expected"), [("", ""), ("/", ""), ("/a", "/a"), ("/a/b-c.d/", "/a/b-c.d")]
    )
    def test_a_final_slash_is_removed(
        self, command: CommandLine, value: str, expected: str
    ) -> None:
        assert printed(command, f"--root-path={value}")["root_path"] == expected

    @pytest.mark.parametrize(
        "value",
        [
            "a",
            "//a",
            "/a//b",
            "/a/../b",
            "/.",
            "/a b",
            "/a?b",
            "/a#b",
            "/é",
            "http://x/a",
            "/a%2Fb",
        ],
    )
    def test_an_invalid_path_is_refused(self, command: CommandLine, value: str) -> None:
        complaint = command("serve", "--print-config", f"--root-path={value}").complaint(2)
        assert "root_path" in complaint

    def test_a_path_that_begins_like_a_route_is_refused(self, command: CommandLine) -> None:
        """Otherwise, paths with and without the prefix would be ambiguous behind a proxy."""
        app = create_app(Settings(), Engines([]), Path("hub"))
        for path in (*app.openapi()["paths"], *UNLISTED, "/openapi.json"):
            if path != "/":
                start = path.split("/")[1]
                complaint = command("serve", "--print-config", f"--root-path=/{start}/x")
                assert "another path" in complaint.complaint(2)


def test_ready_when_all_is_refused_for_a_cluster(command: CommandLine) -> None:
    complaint = command("serve", "--print-config", "--ready-when=all", "--cluster").complaint(2)
    assert "ready_when=all does not apply" in complaint


class TestGrpcPort:
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["--grpc-port=0"], "grpc_port"),
            (["--grpc-port=8000"], "must differ from port"),
            (["--grpc-port=9000", "--metrics-port=9000"], "must differ from port and metrics"),
            (["--grpc-port=8001", "--cluster"], "grpc_port does not apply"),
        ],
    )
    def test_an_invalid_port_is_refused_for_grpc(
        self, command: CommandLine, arguments: list[str], problem: str
    ) -> None:
        assert problem in command("serve", "--print-config", *arguments).complaint(2)

    def test_a_missing_package_is_an_error_that_names_the_extra(
        self, command: CommandLine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service.settings, "find_spec", lambda _name: None)
        complaint = command("serve", "--print-config", "--grpc-port=8001").complaint(2)
        assert "pip install 'budgetformer-serving[grpc]'" in complaint
        assert printed(command)["grpc_port"] is None


class TestReload:
    def test_the_reloadable_settings_are_these(self) -> None:
        assert set(Settings.reloadable()) == {
            "quality", "quality_floor", "keys", "admin_key", "admin_key_file", "tls_cert",
            "tls_key", "tls_client_ca", "log_level", "access_log", "model_settings",
        }  # fmt: skip

    def test_differences_are_grouped_by_reloadable_and_not(self) -> None:
        before = Settings(log_level="info", port=8000, quality="auto")
        after = Settings(log_level="debug", port=9000, quality="fast", fronts=2)
        assert before.differences(after) == (["quality", "log_level"], ["port", "fronts"])
        assert before.differences(before.model_copy()) == ([], [])

    def test_client_certificates_cannot_be_switched_on_for_grpc(self) -> None:
        files = {"tls_cert": Path("a"), "tls_key": Path("b")}
        for port, changes in ((None, True), (8001, False)):
            before = Settings(grpc_port=port, **files)
            after = Settings(grpc_port=port, tls_client_ca=Path("c"), **files)
            reloadable = (["tls_client_ca"], [])
            assert before.differences(after) == (reloadable if changes else reloadable[::-1])
            other = after.model_copy(update={"tls_client_ca": Path("d")})
            assert after.differences(other) == reloadable

    def test_tls_cannot_be_switched_on_or_off(self) -> None:
        plain = Settings()
        secure = Settings(tls_cert=Path("a"), tls_key=Path("b"))
        other = Settings(tls_cert=Path("c"), tls_key=Path("b"))
        assert plain.differences(secure) == ([], ["tls_cert", "tls_key"])
        assert secure.differences(plain) == ([], ["tls_cert", "tls_key"])
        assert secure.differences(other) == (["tls_cert"], [])


class TestModels:
    def test_a_table_of_the_file_sets_the_settings_of_one_model(
        self, command: CommandLine, tmp_path: Path
    ) -> None:
        file = tmp_path / "config.toml"
        file.write_text(
            'quality = "best"\n[models.topics]\nquality = "fast"\nqueue_items = 9\n'
            'timeout_ms = 500\nwarm_up_steps = [2, 1]\nquality_floor = "balanced"\n'
        )
        outcome = command("serve", "--print-config", "--config", file, "--models", "topics")
        shown = Settings(**json.loads(outcome.out))
        assert shown.models == ["topics"]
        for model, expected in {
            "topics": ("fast", "balanced", 500),
            "tags": ("best", "fast", 10_000),
        }.items():
            actual = shown.quality_of(model), shown.floor_of(model), shown.timeout_ms_of(model)
            assert actual == expected
        assert shown.queue_items() == {"topics": 9}
        assert shown.model_floors() == {"topics": "balanced"}
        assert shown.warm_up_steps() == {"topics": [1, 2]}

    def test_queue_items_of_a_table_override_the_older_setting(self) -> None:
        tables = {"topics": ModelSettings(queue_items=3)}
        settings = Settings(model_queue_items={"topics": 5, "tags": 6}, model_settings=tables)
        assert settings.queue_items() == {"topics": 3, "tags": 6}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("qualty = 1", "model_settings.topics: Value error, a model has no setting 'qualty'"),
            ('quality = "fst"', "model_settings.topics.quality"),
            ("timeout_ms = 4000000", "timeout_ms of topics must not be above max_timeout_ms"),
            ("quality = 101.0", "0..100"),
        ],
    )
    def test_an_invalid_table_is_one_line(
        self, command: CommandLine, tmp_path: Path, line: str, message: str
    ) -> None:
        file = tmp_path / "config.toml"
        file.write_text(f"[models.topics]\n{line}\n")
        assert message in command("serve", "--print-config", "--config", file).complaint(2)

    def test_tables_under_both_names_are_refused(
        self, command: CommandLine, tmp_path: Path
    ) -> None:
        file = tmp_path / "config.toml"
        file.write_text("[models.topics]\n[model_settings.topics]\n")
        assert "give one" in command("serve", "--print-config", "--config", file).complaint(2)
