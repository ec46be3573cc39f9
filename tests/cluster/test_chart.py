"""The Helm chart, rendered by Helm and checked against the schemas of Kubernetes and Ray."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.cluster import RAY

helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk (make test-cluster)")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

# Ray's schemas use deprecated features of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker" / "kubernetes"
KUBERNETES = ("1.30", "1.33", "1.37")
"""The oldest supported version, one between, and the newest for which there are schemas."""

KEYS = {"access": {"keysSecret": "callers"}}
VALUES: dict[str, dict[str, Any]] = {
    "open": {"access": {"allowAnonymous": True}, "network": {"policy": False}},
    "keys": KEYS | {"service": {"type": "LoadBalancer"}},
    "everything": {
        "access": {"keysSecret": "callers", "adminKeySecret": "admin"},
        "scaling": {"by": "hpa"},
        "monitoring": {"serviceMonitor": True, "labels": {"release": "prometheus"}},
        "ingress": {"enabled": True, "host": "x.org", "tlsSecret": "x", "className": "nginx"},
        "models": {"claim": "models"},
        "readyWhen": "all",
        "service": {"grpcPort": 8001},
        "state": {"enabled": True, "claim": "state"},
        "settings": {"quality": "fast", "model_queue_items": {"ag_news": 100}, "fronts": 2},
        "podAnnotations": {"a": "b"},
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"disk": "fast"},
    },
    "keda": KEYS | {"scaling": {"by": "keda"}, "state": {"enabled": True}},
    "gpu": KEYS | {"gpu": {"enabled": True}, "models": {"remoteStore": "s3://bucket/models"}},
    "ray": KEYS | {"mode": "ray", "monitoring": {"serviceMonitor": True}},
    "ray, pools": {
        "access": {"keysSecret": "callers", "adminKeySecret": "admin"},
        "mode": "ray",
        "ingress": {"enabled": True, "host": "x.org"},
        "ray": {
            "pools": {
                "small": {
                    "max_step": 2, "replicas": 1, "max_replicas": 4,
                    "cores": 1, "memory": "2Gi", "gpus": 0,
                },
                "large": {"replicas": 1, "cores": 4, "memory": "8Gi", "gpus": 1},
            }
        },
    },
}  # fmt: skip


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="demo", namespace="production")
    documents = [yaml.safe_load_all(t) for p, t in sorted(texts.items()) if p.endswith(".yaml")]
    return [document for of_file in documents for document in of_file if document]


def only(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    (document,) = [document for document in rendered(values) if document["kind"] == kind]
    return document


def pod_templates(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if document["kind"] == "Deployment":
        yield document["spec"]["template"]
    elif document["kind"] == "RayService":
        cluster = document["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield group["template"]


def check_kubernetes(document: dict[str, Any]) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)


def check_custom(document: dict[str, Any]) -> None:
    """Check a resource of KEDA or Prometheus; its model would drop unknown fields."""
    if document["kind"] == "ServiceMonitor":
        from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor as Model
    else:
        from cloudcoil.models.keda.v1alpha1 import ScaledObject as Model
    read = Model.model_validate(document)
    assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == document


def check_ray(document: dict[str, Any]) -> None:
    """Check a RayService: its pods by Kubernetes' schema, its application by Ray Serve's."""
    from ray.serve.schema import ServeDeploySchema

    from service.settings import Settings

    for template in pod_templates(document):
        check_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
    config = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    (application,) = config.applications
    settings = Settings(**application.args)
    assert settings.ordered_pools()
    assert application.import_path == "service.cluster.application:application"


CHECKS = {"ServiceMonitor": check_custom, "ScaledObject": check_custom, "RayService": check_ray}


def check(document: dict[str, Any]) -> None:
    CHECKS.get(document["kind"], check_kubernetes)(document)


each_variant = pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))


def test_helm_lint_finds_no_error() -> None:
    report = helm.lint(str(CHART), VALUES["open"])
    assert not report["errors"]
    assert {m["error"] for m in report["messages"]} <= {"icon is recommended"}


@each_variant
def test_every_resource_conforms_to_its_schema(values: dict[str, Any]) -> None:
    documents = rendered(values)
    assert documents
    for document in documents:
        check(document)


INVALID_CHANGES: dict[str, list[Any]] = {
    "Deployment": [
        lambda s: s.update(replicaz=2),
        lambda s: s["template"]["spec"]["containers"][0].update(livenessProbes={}),
        lambda s: s["template"]["spec"]["containers"][0]["ports"][0].update(containerPort="http"),
    ],
    "Service": [lambda s: s["ports"][0].update(port="eight")],
    "NetworkPolicy": [lambda s: s.update(policyTypes="Ingress")],
    "PodDisruptionBudget": [lambda s: s.update(maxUnavailble=1)],
    "HorizontalPodAutoscaler": [lambda s: s["metrics"][0].pop("type")],
    "Ingress": [lambda s: s["rules"][0]["http"]["paths"][0].pop("pathType")],
    "ServiceMonitor": [
        lambda s: s["endpoints"][0].update(interval="15x"),
        lambda s: s["endpoints"][0].update(intervall="15s"),
    ],
    "ScaledObject": [
        lambda s: s["triggers"][0].pop("type"),
        lambda s: s.update(maxReplicas=3),
    ],
    "RayService": [
        lambda s: s["rayClusterConfig"]["headGroupSpec"]["template"]["spec"].update(containrs=[]),
        lambda s: s.update(serveConfigV2=s["serveConfigV2"].replace("import_path", "import")),
        lambda s: s.update(serveConfigV2=s["serveConfigV2"].replace("drain_seconds", "drain")),
    ],
}


@pytest.mark.parametrize("kind", INVALID_CHANGES)
def test_the_checks_find_invalid_fields(kind: str) -> None:
    values = {"ScaledObject": VALUES["keda"], "RayService": VALUES["ray"]}
    document = only(kind, values.get(kind, VALUES["everything"]))
    check(document)
    for change in INVALID_CHANGES[kind]:
        broken = copy.deepcopy(document)
        change(broken["spec"])
        with pytest.raises(Exception, match=r"."):
            check(broken)


@each_variant
def test_every_pod_has_few_privileges_and_limits(values: dict[str, Any]) -> None:
    pods = [t["spec"] for document in rendered(values) for t in pod_templates(document)]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
        assert pod["terminationGracePeriodSeconds"] > values.get("drainSeconds", 20)


@each_variant
def test_no_secret_is_rendered(values: dict[str, Any]) -> None:
    documents = rendered(values)
    assert "Secret" not in {document["kind"] for document in documents}
    for document in documents:
        for template in pod_templates(document):
            for container in template["spec"]["containers"]:
                names = {variable["name"] for variable in container["env"]}
                assert not names & {"BUDGETFORMER_ADMIN_KEY", "BUDGETFORMER_KEYS"}


def test_grpc_is_exposed_if_it_has_a_port() -> None:
    everything = VALUES["everything"]
    ports = only("Service", everything)["spec"]["ports"]
    assert {"name": "grpc", "port": 8001, "targetPort": "grpc"} in ports
    (container,) = only("Deployment", everything)["spec"]["template"]["spec"]["containers"]
    assert {"name": "grpc", "containerPort": 8001} in container["ports"]
    callers, _ = only("NetworkPolicy", everything)["spec"]["ingress"]
    assert callers["ports"] == [{"port": 8000}, {"port": 8001}]
    for document in rendered(KEYS):
        assert "grpc" not in str(document).lower()


def test_the_grace_period_follows_the_drain_setting() -> None:
    pod = only("Deployment", KEYS | {"drainSeconds": 90})["spec"]["template"]["spec"]
    environment = {v["name"]: v["value"] for v in pod["containers"][0]["env"]}
    assert environment["BUDGETFORMER_DRAIN_SECONDS"] == "90"
    assert pod["terminationGracePeriodSeconds"] == 90 + 5 + 15


def test_pods_of_ray_have_rays_environment() -> None:
    for template in pod_templates(only("RayService", VALUES["ray"])):
        environment = template["spec"]["containers"][0]["env"]
        assert RAY.items() <= {v["name"]: v.get("value") for v in environment}.items()


def test_the_environment_of_pods_consists_of_known_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service.settings import Settings, refuse_unknown_environment

    pod = only("Deployment", VALUES["everything"])["spec"]["template"]["spec"]
    for variable in pod["containers"][0]["env"]:
        if not variable["name"].endswith("_FILE"):  # the files are in the pod alone
            monkeypatch.setenv(variable["name"], variable["value"])
    refuse_unknown_environment()
    settings = Settings()
    assert (settings.engines, settings.fronts, settings.quality) == (2, 2, "fast")
    assert settings.model_queue_items == {"ag_news": 100}
    assert (settings.metrics_port, settings.grpc_port) == (9464, 8001)
    assert settings.ready_when == "all"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "keysSecret"),
        (KEYS | {"replica": 3}, "replica"),
        (KEYS | {"replicas": 0}, "minimum"),
        (KEYS | {"mode": "swarm"}, "mode"),
        (KEYS | {"settings": {"admin_key": "open-sesame"}}, "admin_key"),
        (KEYS | {"settings": {"port": 1}}, "port"),
        (KEYS | {"memory": "much"}, "memory"),
        (KEYS | {"ingress": {"enabled": True}}, "ingress.host"),
        (KEYS | {"service": {"grpcPort": 9464}}, "another port"),
        (KEYS | {"service": {"grpcPort": 8001}, "mode": "ray"}, "none with mode=ray"),
    ],
    ids=[
        "open by accident",
        "unknown",
        "no replicas",
        "mode",
        "a secret",
        "a reserved setting",
        "quantity",
        "host",
        "a port that is taken",
        "a port on Ray",
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError, match=message):
        rendered(values)
