"""The Ray Serve application: its deployments and their options."""

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
MAX_ONGOING_REQUESTS = 100_000
"""Ray's request limit per replica, too high to matter: engines and frontends apply their own and
answer 429."""
STATS_SECONDS = 0.5
"""Interval at which replicas report their load to the routers, in seconds."""
LOOK_BACK_SECONDS = 12.0
"""Maximum age of the reports that count for scaling; Ray collects them every ten seconds."""
HUB_SHUTDOWN_SECONDS = 1.0
"""Time after which the hub is stopped; its streams never end by themselves."""
QUIET = LoggingConfig(enable_access_log=False)
"""Ray's access log is off, since the server writes its own."""
ON_HEAD_NODE = {"node:__internal_head__": 0.001}
"""Resource request that only Ray's head node can meet. The hub runs there, because the cluster
depends on that node anyway."""


def application(settings: dict[str, Any]) -> Application:
    """Build the application for a Serve config file, whose `args` are settings.

    Other settings come from the environment, as for `budgetformer serve`.
    """
    return build(Settings(**settings, cluster=True))


def build(settings: Settings) -> Application:
    """Build the application: one hub, pools of engines, and frontends.

    Raises:
        KeysError, SettingsError: see `Settings.check_access`.
    """
    settings.check_access()
    values = _without_secrets(settings)
    drain = settings.drain_seconds
    common = {"max_ongoing_requests": MAX_ONGOING_REQUESTS, "logging_config": QUIET}
    hub = serve.deployment(HubReplica).options(
        name="hub",
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD_NODE},
        graceful_shutdown_timeout_s=HUB_SHUTDOWN_SECONDS,
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
            **_replica_options(pool),
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


def _without_secrets(settings: Settings) -> dict[str, Any]:
    """Return the settings for the replicas, with hashes of keys instead of the admin key."""
    keys = {name: key.model_dump(mode="json") for name, key in settings.all_keys().items()}
    # Evaluate `anonymous` now: replicas see the admin key in `keys`, and would conclude that
    # anonymous access is off.
    access = {"keys": keys, "allow_anonymous": settings.anonymous}
    no_admin_key = {"admin_key": None, "admin_key_file": None}
    return settings.model_dump(mode="json") | access | no_admin_key


def _replica_options(pool: Pool) -> dict[str, Any]:
    """Return a deployment's options for a fixed number of replicas, or for autoscaling."""
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

    RAY_ADDRESS names the cluster; without it, a local one is started, and ended afterwards.

    Raises:
        SettingsError: a file in the working directory would shadow a module in the workers.
        KeysError, SettingsError: see `build`.
    """
    if files := shadowing_files(Path.cwd()):
        # Ray puts the working directory first on the import path of its workers.
        raise SettingsError(f"workers would import {files[0]}: start from another folder")
    app = build(settings)
    if "RAY_ADDRESS" in os.environ:
        ray.init(namespace="serve", log_to_driver=False)
    else:
        # Ray does not reserve cores, it only counts them, so declare as many as all replicas
        # request, whatever the host has.
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
    for number in (signal.SIGTERM, signal.SIGINT):  # set after Ray has set its own handlers
        signal.signal(number, lambda *_: stopping.set())
    log.info("serving on a cluster", url=f"http://{settings.host}:{settings.port}")
    stopping.wait()
    log.info("draining", seconds=settings.drain_seconds)
    serve.delete(NAME)
    ray.shutdown()
    log.info("stopped")
