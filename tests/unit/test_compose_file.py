"""docker-compose.yml: versions, privileges, ports, volumes and secrets of its containers."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.keys import read_keys
from tests.support.programs import program

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
each = pytest.mark.parametrize("name", SERVICES)


@each
def test_images_have_exact_versions(name: str) -> None:
    tag = SERVICES[name]["image"].rpartition(":")[2]
    assert tag == "local" or re.fullmatch(r"v?\d+\.\d+\.\d+", tag)


@each
def test_containers_have_few_privileges_and_limits(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]


@each
def test_ports_are_open_on_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@each
def test_containers_wait_for_healthy_ones(name: str) -> None:
    conditions = SERVICES[name].get("depends_on", {}).values()
    assert all(condition["condition"] == "service_healthy" for condition in conditions)


def test_only_service_prometheus_and_grafana_start_without_a_profile() -> None:
    plain = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert plain == {"service", "prometheus", "grafana"}


def test_named_volumes_are_declared() -> None:
    mounted = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }
    assert mounted == set(COMPOSE["volumes"])


def test_the_state_is_in_a_volume_owned_by_the_user_of_the_image() -> None:
    assert "state:/state" in SERVICES["service"]["volumes"]
    image = (ROOT / "docker" / "Dockerfile").read_text()
    assert "--owner=10001 --group=10001 --mode=0700 /state" in image
    assert "BUDGETFORMER_STATE_DIR=/state" in image


def test_files_of_secrets_exist() -> None:
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    for secret in COMPOSE["secrets"].values():
        default = secret["file"].partition(":-")[2].rstrip("}")
        assert (ROOT / default).is_file()


def test_anonymous_access_is_explicit_and_on_loopback_only() -> None:
    service = SERVICES["service"]
    assert service["environment"]["BUDGETFORMER_ALLOW_ANONYMOUS"].endswith(":-true}")
    assert [port.partition(":")[0] for port in service["ports"]] == ["127.0.0.1"]
    assert read_keys(ROOT / "docker" / "secrets" / "keys.toml") == {}


def test_mounted_files_exist() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            if volume.startswith("."):
                assert (ROOT / volume.partition(":")[0]).exists(), volume


def test_grpc_is_opt_in_and_on_loopback_only() -> None:
    def merged(*more: str) -> dict[str, Any]:
        files = [f"--file={ROOT / name}" for name in ("docker-compose.yml", *more)]
        command = [program("docker"), "compose", *files, "config", "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return dict(json.loads(done.stdout)["services"]["service"])

    plain, with_grpc = merged(), merged("docker/compose.grpc.yml")
    assert [port["target"] for port in plain["ports"]] == [8000]
    assert not [name for name in plain["environment"] if "GRPC" in name]
    assert [port["target"] for port in with_grpc["ports"]] == [8000, 8001]
    assert {port["host_ip"] for port in with_grpc["ports"]} == {"127.0.0.1"}
    assert with_grpc["environment"]["BUDGETFORMER_GRPC_PORT"] == "8001"


def test_alertmanager_accepts_its_configuration() -> None:
    configuration = ROOT / "docker" / "alertmanager" / "alertmanager.yml"
    command = [program("amtool"), "check-config", str(configuration)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_health_checks_use_no_proxy() -> None:
    """Docker passes the proxy variables of its client to every container."""
    checks = [s["healthcheck"]["test"] for s in SERVICES.values() if "healthcheck" in s]
    assert checks
    assert all(check[:4] == ["CMD", "wget", "-Y", "off"] for check in checks)
    for name, host in (("grafana", "prometheus"), ("loadtest", "service")):
        variables = SERVICES[name]["environment"]
        assert variables["NO_PROXY"] == variables["no_proxy"] == host
    image = (ROOT / "docker" / "Dockerfile").read_text()
    assert 'CMD ["python", "-P", "-m", "service.healthcheck"]' in image
    assert "use_proxy = off" in image
