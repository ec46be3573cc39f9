"""The application of Ray Serve: which deployments there are, and what each is given."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from threading import Event
from typing import Any

import ray
import structlog
from ray import serve
from ray.serve import Application
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    HTTPOptions,
    ProxyLocation,
    RequestRouterConfig,
)
from ray.serve.schema import LoggingConfig

from budgetformer.subprocesses import shadowing_files
from service.cluster import RAY
from service.cluster.engine import EngineReplica
from service.cluster.frontend import FrontendReplica
from service.cluster.hub import HubReplica
from service.settings import Pool, Settings, SettingsError

log = structlog.get_logger()

NAME = "budgetformer"
UNBOUNDED = 100_000
"""Engines and frontends know themselves what they can take, and say so with 429."""
STATS_SECONDS = 0.5
"""How often replicas say what waits in them."""
LOOK_BACK_SECONDS = 12.0
"""Scaling goes by what replicas said so lately; Ray hears them every ten seconds."""
HUB_SECONDS = 1.0
"""How long the hub may take to end: its streams never end by themselves."""
QUIET = LoggingConfig(enable_access_log=False)
"""The service has an access log of its own."""
HEAD = {"node:__internal_head__": 0.001}
"""Ray's own name of the head: without it nothing runs, so it is where the hub is safest."""


def application(settings: dict[str, Any]) -> Application:
    """Return the application for a Serve config file, whose `args` are settings.

    What they do not say comes from the environment, as for `budgetformer serve`.
    """
    return build(Settings(**settings, cluster=True))


def build(settings: Settings) -> Application:
    """Return the application: one hub, pools of engines, and frontends before them.

    Raises:
        KeysError, SettingsError: see `Settings.check_access`.
    """
    settings.check_access()
    values = _travelling(settings)
    drain = settings.drain_seconds
    common = {"max_ongoing_requests": UNBOUNDED, "logging_config": QUIET}
    hub = serve.deployment(HubReplica).options(
        name="hub",
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
        graceful_shutdown_timeout_s=HUB_SECONDS,
        **common,
    ).bind(values)  # fmt: skip
    engines = [
        serve.deployment(EngineReplica).options(
            name=name,
            ray_actor_options={"num_cpus": pool.cpus, "num_gpus": pool.gpus},
            graceful_shutdown_timeout_s=drain,
            health_check_timeout_s=settings.hang_seconds,
            request_router_config=RequestRouterConfig(
                request_router_class="service.cluster.router:BudgetRouter",
                request_routing_stats_period_s=STATS_SECONDS,
            ),
            **_size(pool),
            **common,
        ).bind(values, pool.model_dump(), name, hub)
        for name, pool in settings.ordered_pools().items()
    ]  # fmt: skip
    frontend = serve.deployment(serve.ingress()(FrontendReplica)).options(
        name="frontend",
        num_replicas=settings.fronts,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain,
        **common,
    )
    app: Application = frontend.bind(values, hub, *engines)
    return app


def _travelling(settings: Settings) -> dict[str, Any]:
    """Return the settings as the replicas get them: no secret in the clear leaves this process."""
    keys = {name: key.model_dump(mode="json") for name, key in settings.all_keys().items()}
    # A key for administrators alone shuts nobody out; among `keys` it would.
    access = {"keys": keys, "allow_anonymous": settings.anonymous}
    without = {"admin_key": None, "admin_key_file": None}
    return settings.model_dump(mode="json") | access | without


def _size(pool: Pool) -> dict[str, Any]:
    if pool.max_replicas is None or pool.max_replicas == pool.replicas:
        return {"num_replicas": pool.replicas}
    policy = AutoscalingPolicy(
        policy_function="service.cluster.autoscaling:QueueSeconds",
        policy_kwargs={"target": pool.target_seconds},
    )
    config = AutoscalingConfig(
        min_replicas=pool.replicas,
        max_replicas=pool.max_replicas,
        upscale_delay_s=pool.up_seconds,
        downscale_delay_s=pool.down_seconds,
        look_back_period_s=LOOK_BACK_SECONDS,
        policy=policy,
    )
    return {"autoscaling_config": config}


def run(settings: Settings) -> None:
    """Serve on a Ray cluster until SIGTERM or SIGINT.

    RAY_ADDRESS names the cluster; without it, one of this host's processes is made for as long.

    Raises:
        SettingsError: a file in the working directory would replace a module in workers.
        KeysError, SettingsError: see `build`.
    """
    if hidden := shadowing_files(Path.cwd()):
        # Ray puts the folder that it was started in before all others on its workers' path.
        raise SettingsError(f"workers would import {hidden[0]}: start from another folder")
    app = build(settings)
    if "RAY_ADDRESS" in os.environ:
        ray.init(namespace="serve", log_to_driver=False)
    else:
        # Ray only counts cores: as many as all replicas ask for, as for the plain server.
        pools = settings.ordered_pools().values()
        cpus = sum((pool.max_replicas or pool.replicas) * pool.cpus for pool in pools)
        for name, value in RAY.items():
            os.environ.setdefault(name, value)
        ray.init("local", namespace="serve", num_cpus=math.ceil(cpus), include_dashboard=False)
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(host=settings.host, port=settings.port),
    )
    serve.run(app, name=NAME, route_prefix="/")
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # here, as Ray has set its own by now
        signal.signal(number, lambda *_: stopping.set())
    log.info("serving on a cluster", url=f"http://{settings.host}:{settings.port}")
    stopping.wait()
    log.info("draining", seconds=settings.drain_seconds)
    serve.delete(NAME)
    ray.shutdown()
    log.info("stopped")
