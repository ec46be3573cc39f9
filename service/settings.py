"""All settings of the server.

One class defines flags, environment variables, the TOML file, help and `--print-config`.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from budgetformer.cores import usable_cores
from budgetformer.errors import BudgetFormerError, readable
from budgetformer.inference.policy import QualityName
from budgetformer.inference.precision import Precision
from budgetformer.subprocesses import python_command
from service.environment import PREFIX, has_prefix, service_variables
from service.keys import ADMIN, Key, KeyRing, Keys, digest
from service.scheduling.brownout import NORMAL
from service.source_urls import split_url

CONFIG_FILE = "config"
DEFAULT_QUALITY = NORMAL
"""Level of `auto` requests while there is no overload."""
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Device files of GPU drivers; without any of them there is no GPU."""
ROUTES = (
    "classify", "docs", "health", "invocations", "jobs", "metrics", "models", "openapi.json",
    "ping", "playground", "predict", "settings", "tokenize", "v1", "v2",
)  # fmt: skip
"""First segments of the server's own paths."""
RELOADS: JsonDict = {"reloads": True}
"""Marks settings that change without a restart when the settings are reloaded."""
_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")


class SettingsError(BudgetFormerError):
    """A setting is unknown or has an invalid value."""


class Pool(BaseModel, extra="forbid", frozen=True):
    """A pool of equal engines on a cluster.

    Attributes:
        max_step: highest ladder step that the engines compute; None: all.
        replicas: smallest number of engines.
        max_replicas: largest number of engines; None: `replicas`.
        target_seconds: device time (s) waiting in one engine, above which engines are added.
        up_seconds, down_seconds: time (s) for which more, or fewer, engines must be needed without
            interruption before the number changes.
        cpus, gpus: CPUs and GPUs that Ray reserves for each engine. If `gpus` is not 0, also a
            fraction, the engines compute on a GPU.
        models: most models that one engine holds; None: all. Other models replace the one unused
            for longest when they are requested.
    """

    max_step: int | None = Field(default=None, ge=0)
    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    target_seconds: float = Field(default=0.25, gt=0)
    up_seconds: float = Field(default=30.0, ge=0)
    down_seconds: float = Field(default=600.0, ge=0)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    models: int | None = Field(default=None, ge=1)

    def computes(self, step: int) -> bool:
        """Return whether its engines compute a ladder step."""
        return self.max_step is None or step <= self.max_step

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas must not be below replicas")
        return self


Share = Annotated[float, Field(ge=0, le=1)]


class RollOutSettings(BaseModel, extra="forbid", frozen=True):
    """How new versions of a model are rolled out.

    Attributes:
        weight: share of the requests that the new version answers.
        shadow: share of the other requests that it computes too; these answers are not returned.
        min_agreement, max_error_rate, max_latency_ratio: bounds beyond which a roll-out stops by
            itself, see `service.control.rollout.Bounds`; None: no bound.
    """

    weight: Share = 0.0
    shadow: Share = 0.0
    min_agreement: Share | None = None
    max_error_rate: Share | None = 0.01
    max_latency_ratio: float | None = Field(default=None, gt=0)


class ModelSettings(BaseModel, extra="forbid", frozen=True):
    """Settings of one model; None: the server's setting applies.

    Attributes:
        version: version to serve; None: the version of the last promotion or rollback, else the
            highest.
        rollout: how new versions are rolled out, including those that a poll of the store finds;
            None: they are served at once.
        quality, quality_floor, timeout_ms: see `Settings`.
        queue_items: most texts of this model that wait in one engine.
        warm_up_steps: ladder steps whose weights are packed when the model loads; None: the steps
            that its quality levels use. The first request for another step waits for it.
    """

    version: int | None = Field(default=None, ge=1)
    rollout: RollOutSettings | None = None
    quality: Literal["auto", "fast", "balanced", "best"] | float | None = None
    quality_floor: QualityName | None = None
    queue_items: int | None = Field(default=None, ge=1)
    timeout_ms: int | None = Field(default=None, ge=1)
    warm_up_steps: frozenset[Annotated[int, Field(ge=1)]] | None = None

    @field_validator("quality")
    @classmethod
    def _sensible_quality(cls, value: str | float | None) -> str | float | None:
        return _check_quality(value)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                near = get_close_matches(str(name), cls.model_fields, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"a model has no setting {name!r}{hint}")
        return given


class Settings(BaseSettings):
    """Serve text classification that spends, on each text, only what it needs.

    Every option is also an environment variable BUDGETFORMER_<NAME> and a key of the TOML file
    named by --config. The flag wins over the environment, the environment over the file, the file
    over the default. Those with `RELOADS` change without a restart.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_prog_name="budgetformer serve",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on. An address that others can reach requires keys or `allow_anonymous`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 chooses a free one."""
    root_path: str = ""
    """Path prefix that a reverse proxy uses for this server, such as /classifier. It works whether
    or not the proxy strips it."""
    model_store: Path = Path("model_store")
    """Folder of checkpoints, <name>/<version>/."""
    remote_store: str | None = None
    """Remote folder of checkpoints, such as s3://bucket/models. It is copied to the store at start
    and at every poll of the store."""
    state_dir: Path = Path("state")
    """Folder for state that survives a restart: roll-outs and jobs. It is created with the first of
    them."""
    job_sources: list[str] = []
    """URL prefixes that jobs may read, such as s3://bucket/texts/ or https://example.org/. Empty:
    jobs read uploads only. Needs the extra `remote` and the driver of the scheme."""
    max_job_bytes: int = Field(default=2**30, ge=1)
    """Largest input file of a job, in bytes."""
    max_jobs_bytes: int = Field(default=4 * 2**30, ge=1)
    """Largest total size of the files of all jobs, results included, in bytes."""
    max_jobs: int = Field(default=100, ge=1)
    """Most jobs that are kept, finished ones included. Further jobs are refused with 429."""
    job_retention_seconds: float = Field(default=7 * 86_400.0, gt=0)
    """Time after which a finished job is deleted."""
    poll_store_seconds: float = Field(default=0.0, ge=0)
    """Interval at which the store is checked for higher versions, which are then served; 0 disables
    it."""
    model: str | None = None
    """Classifier to serve without conversion: a folder written by `save_pretrained`, or a model id
    of the Hugging Face hub. It is added to the store once. Other models are served only if `models`
    names them."""
    models: list[str] = []
    """Models to load, `name` or `name:version`. Empty: all in the store."""
    default_model: str | None = None
    """Model for requests that name none. Default: the first by name."""
    fronts: int = Field(default=1, ge=1, le=64)
    """Number of frontend processes (HTTP, tokenization, decisions). They share the port."""
    engines: int = Field(default=0, ge=0, le=256)
    """Number of engine processes. 0: one per GPU; on a CPU one per core within the CPU affinity and
    the container's quota."""
    cluster: bool = False
    """Run on the Ray cluster that RAY_ADDRESS names, or on a local one. Needs the extra `cluster`.
    """
    pools: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")], Pool] = {}
    """Engine pools on a cluster, by name. One pool computes all steps; others may compute only the
    lower ones. None: one pool of `engines` engines."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the engines. auto: a GPU if there is one."""
    dtype: Precision = "auto"
    """Precision of matrix products. auto: chosen by the capabilities of device and checkpoint, the
    same at every start. fastest: all are timed when a model loads."""
    threads_per_engine: int = Field(default=1, ge=1, le=256)
    """Threads that one engine uses for a pass."""
    quality: Literal["auto", "fast", "balanced", "best"] | float = Field(
        default="auto", json_schema_extra=RELOADS
    )
    """Default quality: a level, or the accuracy drop (percentage points) that is acceptable."""
    quality_floor: QualityName = Field(default="fast", json_schema_extra=RELOADS)
    """Lowest level that overload may choose for `auto` requests."""
    brownout_queue_ms: float = Field(default=500.0, gt=0)
    """Queue delay (ms) above which `auto` requests are served at a lower quality level."""
    cost_tables: Path | None = None
    """File or folder of cost tables written by `budgetformer tune`. None: costs are measured while
    serving."""
    max_batch_items: int = Field(default=2048, ge=1)
    """Most texts in one request."""
    max_text_characters: int = Field(default=100_000, ge=1)
    """Most characters in one text, including its pair."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    """Largest request body, in bytes."""
    compress_min_bytes: int = Field(default=4096, ge=0)
    """Smallest response, in bytes, that is compressed for clients that accept gzip; 0 disables
    compression."""
    max_queue_items: int = Field(default=4096, ge=1)
    """Most texts that wait in one engine. Further requests are refused with 429."""
    model_queue_items: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Most texts of one model that wait in one engine, as `name=number`, so that one model cannot
    fill the queue."""
    model_settings: dict[str, ModelSettings] = Field(default={}, json_schema_extra=RELOADS)
    """Settings of single models, by name: version, rollout, quality, quality_floor, queue_items,
    timeout_ms, warm_up_steps. In the TOML file each is a table, such as [models.ag_news]."""
    batch_milliseconds: float = Field(default=50.0, gt=0)
    """Target computing time of a batch (ms). It may be twice as long if many texts wait."""
    batch_items: int = Field(default=256, ge=1)
    """Most texts in one batch."""
    answer_cache_mib: int = Field(default=0, ge=0)
    """Size of the answer cache of each frontend (MiB); 0 disables it."""
    answer_cache_per_key: bool = False
    """Keep a separate answer cache for each key, so that no caller can learn what others asked."""
    timeout_ms: int = Field(default=10_000, ge=1)
    """Default deadline of a request (ms)."""
    max_timeout_ms: int = Field(default=3_600_000, ge=1, le=2**31)
    """Longest deadline that a request may ask for (ms)."""
    hang_seconds: float = Field(default=10.0, ge=2)
    """Time without a heartbeat after which a process is killed and restarted."""
    ready_when: Literal["any", "all"] = "any"
    """When the server is ready: `any`: an engine has loaded the default model; `all`: every engine
    has loaded all served models."""
    load_timeout_seconds: float = Field(default=300.0, gt=0)
    """Time that an engine may take to load a model. After that the change fails and the served
    models stay."""
    drain_seconds: float = Field(default=20.0, ge=0)
    """Time that requests in flight have to finish after SIGTERM."""
    keys_file: Path | None = None
    """File of API keys, written by `budgetformer keys new`. It is read again when it changes."""
    keys: Keys = Field(default={}, json_schema_extra=RELOADS)
    """API keys by name, in the settings instead of a file."""
    allow_anonymous: bool = False
    """Allow requests without a key. Without any keys, they are allowed on loopback only."""
    admin_key: SecretStr | None = Field(default=None, json_schema_extra=RELOADS)
    """Secret of the key `admin`, which may load and unload models."""
    admin_key_file: Path | None = Field(default=None, json_schema_extra=RELOADS)
    """File with the admin key, such as a container secret. An empty file means no admin key."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Second port for probes and metrics, always plain HTTP. Metrics are then served on this port
    only."""
    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Port for KServe v2 over gRPC. Needs the extra `grpc`."""
    tls_cert: Path | None = Field(default=None, json_schema_extra=RELOADS)
    """TLS certificate chain (PEM); it enables TLS."""
    tls_key: Path | None = Field(default=None, json_schema_extra=RELOADS)
    """Private key of the certificate (PEM), without a password."""
    tls_client_ca: Path | None = Field(default=None, json_schema_extra=RELOADS)
    """Certificate authorities (PEM) that client certificates must be signed by."""
    trusted_proxies: list[str] = []
    """Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted."""
    cors_origins: list[str] = []
    """Origins whose pages may call the API, such as https://example.org. Empty: the server's own
    pages only."""
    max_connections: int = Field(default=4096, ge=1)
    """Most open connections of one frontend, including TLS handshakes."""
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    """Largest request line and headers together, in bytes."""
    receive_seconds: float = Field(default=30.0, gt=0)
    """Time limit for a TLS handshake, for the headers and for the body of a request, each; also the
    time that a client may keep sending after its last response."""
    retired_series_seconds: float = Field(default=900.0, ge=0)
    """Time that the metrics of a model version are kept after it was unloaded or replaced."""
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", json_schema_extra=RELOADS
    )
    """Lowest level of log lines that are written."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """Format of log lines. auto: readable on a terminal, JSON otherwise."""
    access_log: float = Field(default=0.01, ge=0, le=1, json_schema_extra=RELOADS)
    """Share of requests that get a log line (0 to 1). Server errors and refused admin requests
    always get one."""

    @field_validator("quality")
    @classmethod
    def _sensible_quality(cls, value: str | float) -> str | float | None:
        return _check_quality(value)

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, value: str) -> str:
        value = value.rstrip("/")
        if not _PREFIX.fullmatch(value):
            raise ValueError(
                f"{value!r} is not a valid URL path; a valid one looks like /classifier"
            )
        if value.split("/")[1:2] and value.split("/")[1] in ROUTES:
            raise ValueError(f"{value} begins like a route of this server; choose another path")
        return value

    @field_validator("job_sources")
    @classmethod
    def _sources(cls, value: list[str]) -> list[str]:
        for prefix in value:
            split_url(prefix)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        for network in value:
            ip_network(network)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin; a valid one looks like https://example.org"
                )
        return value

    @field_validator("admin_key_file")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                value.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
                raise ValueError(f"{value}: {reason}") from None
        return value

    @model_validator(mode="after")
    def _readable_by_all(self) -> Self:
        # Processes send paths and names to each other as UTF-8.
        for name in type(self).model_fields:
            value = getattr(self, name)
            for text in _texts(value):
                if readable(text) != text:
                    shown = "" if isinstance(value, SecretStr) else f": {readable(text)}"
                    raise ValueError(f"{name} holds bytes that are not UTF-8{shown}")
        return self

    @model_validator(mode="after")
    def _take_admin_key(self) -> Self:
        if self.admin_key is None and self.admin_key_file is not None:
            key = self.admin_key_file.read_text(encoding="utf-8").strip()
            self.admin_key = SecretStr(key) if key else None
        return self

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS requires both tls_cert and tls_key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca requires tls_cert and tls_key")
        if self.timeout_ms > self.max_timeout_ms:
            raise ValueError("timeout_ms must not be above max_timeout_ms")
        for name, model in self.model_settings.items():
            if (model.timeout_ms or 0) > self.max_timeout_ms:
                raise ValueError(f"timeout_ms of {name} must not be above max_timeout_ms")
        if self.metrics_port is not None and self.metrics_port == self.port:
            raise ValueError("metrics_port must differ from port")
        if self.grpc_port is not None:
            if self.grpc_port in (self.port, self.metrics_port):
                raise ValueError("grpc_port must differ from port and metrics_port")
            if find_spec("grpc") is None:
                extra = "pip install 'budgetformer-serving[grpc]'"
                raise ValueError(f"grpc_port needs gRPC, which is not installed: {extra}")
        return self

    @model_validator(mode="after")
    def _clustered(self) -> Self:
        if self.pools and all(pool.max_step is not None for pool in self.pools.values()):
            raise ValueError("one of the pools must compute all steps: give it no max_step")
        steps = [pool.max_step for pool in self.pools.values()]
        if len(set(steps)) < len(steps):
            raise ValueError("pools must differ in max_step")
        local = [name for name in ("tls_cert", "metrics_port", "grpc_port") if getattr(self, name)]
        if self.cluster and local:
            raise ValueError(f"on a cluster Ray listens: {local[0]} does not apply")
        if self.cluster and self.ready_when == "all":
            raise ValueError("on a cluster engines come and go: ready_when=all does not apply")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flags (given to the constructor), environment, TOML file."""
        assert isinstance(env_settings, EnvSettingsSource)
        foreign = {name.lower() for name in service_variables(os.environ)}
        found = env_settings.env_vars.items()
        env_settings.env_vars = {name: value for name, value in found if name not in foreign}
        path = os.environ.get(f"{PREFIX}{CONFIG_FILE.upper()}")
        file = _File(settings_cls, Path(path)) if path else None
        return (init_settings, env_settings, *([file] if file else []))

    def all_keys(self) -> dict[str, Key]:
        """Return the keys in the settings, including the admin key."""
        if self.admin_key is None:
            return dict(self.keys)
        secret = self.admin_key.get_secret_value().encode()
        return {**self.keys, ADMIN: Key(sha256=digest(secret), scopes=frozenset({"admin"}))}

    @property
    def anonymous(self) -> bool:
        """Whether callers may classify without a key."""
        return self.allow_anonymous or not (self.keys or self.keys_file)

    def check_access(self) -> None:
        """Check keys and certificates, and that a server without keys listens on loopback only.

        Raises:
            KeysError: the keys or the key file are invalid.
            SettingsError: a certificate cannot be used, or the server would accept requests from a
                network without keys although `allow_anonymous` is not set.
        """
        KeyRing(self.all_keys(), self.keys_file)
        self._check_certificates()
        if self.anonymous and not self.allow_anonymous and not _is_loopback(self.host):
            raise SettingsError(
                f"{self.host} is not a loopback address, and there are no keys: set keys_file "
                "(`budgetformer keys new` writes one), or pass --allow-anonymous"
            )

    def _check_certificates(self) -> None:
        if self.tls_cert is None or self.tls_key is None:
            return
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key, password=_no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise SettingsError(f"tls_cert and tls_key: {error}") from None
        if self.tls_client_ca is not None:
            try:
                context.load_verify_locations(self.tls_client_ca)
            except OSError as error:
                raise SettingsError(f"tls_client_ca: {error}") from None

    def quality_of(self, model: str) -> str | float:
        """Return the default quality of requests to a model."""
        quality = self._model(model).quality
        return self.quality if quality is None else quality

    def version_of(self, model: str) -> int | None:
        """Return the version of a model to serve; None: the settings do not name one."""
        return self._model(model).version

    def rollout_of(self, model: str) -> RollOutSettings | None:
        """Return how new versions of a model are rolled out; None: they are served at once."""
        return self._model(model).rollout

    def floor_of(self, model: str) -> QualityName:
        """Return the lowest level that overload may choose for `auto` requests to a model."""
        return self._model(model).quality_floor or self.quality_floor

    def timeout_ms_of(self, model: str) -> int:
        """Return the default deadline of requests to a model (ms)."""
        return self._model(model).timeout_ms or self.timeout_ms

    def _model(self, name: str) -> ModelSettings:
        return self.model_settings.get(name, _DEFAULT_MODEL_SETTINGS)

    def queue_items(self) -> dict[str, int]:
        """Return the most texts that wait in one engine, for each model with such a limit."""
        models = self.model_settings.items()
        limits = {name: model.queue_items for name, model in models if model.queue_items}
        return self.model_queue_items | limits

    def model_floors(self) -> dict[str, QualityName]:
        """Return the quality floors of the models with their own floor."""
        models = self.model_settings.items()
        return {name: model.quality_floor for name, model in models if model.quality_floor}

    def warm_up_steps(self) -> dict[str, list[int]]:
        """Return the warm-up steps of the models with their own warm-up steps."""
        return {
            name: sorted(model.warm_up_steps)
            for name, model in self.model_settings.items()
            if model.warm_up_steps is not None
        }

    @classmethod
    def reloadable(cls) -> list[str]:
        """Return the names of the settings that change without a restart."""
        return [name for name, field in cls.model_fields.items() if field.json_schema_extra]

    def differences(self, other: Settings) -> tuple[list[str], list[str]]:
        """Compare two readings of the settings.

        Returns:
            The names of the settings that differ: first those that change without a restart, then
            those that need one. Turning TLS on or off needs a restart, and with `grpc_port` also
            turning client certificates on or off.
        """
        differ = [n for n in type(self).model_fields if getattr(self, n) != getattr(other, n)]
        changing = set(self.reloadable())
        if (self.tls_cert is None) != (other.tls_cert is None):
            changing -= {"tls_cert", "tls_key", "tls_client_ca"}
        if self.grpc_port and (self.tls_client_ca is None) != (other.tls_client_ca is None):
            changing -= {"tls_client_ca"}
        return [n for n in differ if n in changing], [n for n in differ if n not in changing]

    def resolved_engines(self) -> int:
        """Return the number of engines to run."""
        if self.engines:
            return self.engines
        if self.resolved_device() == "cuda":
            return max(1, gpu_count())
        return max(1, usable_cores() // self.threads_per_engine)

    def ordered_pools(self) -> dict[str, Pool]:
        """Return the pools of a cluster by rising `max_step`; the last one computes all steps."""
        if not self.pools:
            gpus = 1.0 if self.device == "cuda" else 0.0
            return {"engine": Pool(replicas=self.resolved_engines(), gpus=gpus)}
        last = max(pool.max_step or 0 for pool in self.pools.values()) + 1

        def highest_step(named: tuple[str, Pool]) -> int:
            return last if named[1].max_step is None else named[1].max_step

        return dict(sorted(self.pools.items(), key=highest_step))

    def resolved_device(self) -> str:
        """Return the device that the engines compute on: "cpu" or "cuda"."""
        if self.device != "auto":
            return self.device
        return "cuda" if gpu_count() else "cpu"

    def printable(self) -> dict[str, Any]:
        """Return all values as JSON types, with secrets masked."""
        return self.model_dump(mode="json")


_DEFAULT_MODEL_SETTINGS = ModelSettings()


class _File(TomlConfigSettingsSource):
    """The TOML file, in which `models` is either a list of models or tables of their settings."""

    def __call__(self) -> dict[str, Any]:
        given = super().__call__()
        if isinstance(given.get("models"), dict):
            if "model_settings" in given:
                raise SettingsError("[models.NAME] and model_settings mean the same: give one only")
            given = {**given, "model_settings": given["models"]}
            del given["models"]
        return given


def first_problem(error: ValidationError) -> str:
    """Return the first error and its field in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field}: {first['msg']}" if field else str(first["msg"])


@cache
def gpu_count() -> int:
    """Return the number of GPUs that torch can use.

    If there is a driver, torch is imported in a separate process, since that takes seconds and
    memory that is never freed.
    """
    if not any(map(os.path.exists, GPU_DRIVERS)):
        return 0
    command = python_command("-c", "import torch; print(torch.cuda.device_count())")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(result.stdout) if result.returncode == 0 else 0


def _check_quality(value: str | float | None) -> str | float | None:
    if isinstance(value, float) and not 0 <= value <= 100:
        raise ValueError("quality as a number is an accuracy drop, 0..100 percentage points")
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings and paths in a setting, with secrets in the clear."""
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, (list, dict)):
        for part in value:
            yield from _texts(part)


def _no_password() -> str:
    raise ValueError("the private key must have no password")


def _is_loopback(host: str) -> bool:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}: {error.strerror or error}") from error
    return all(ip_address(str(info[4][0]).partition("%")[0]).is_loopback for info in infos)


def refuse_unknown_environment() -> None:
    """Check that every BUDGETFORMER_ variable is a setting, or describes another service's port.

    Raises:
        SettingsError: a variable is unknown; the message suggests the nearest name.
    """
    known = {f"{PREFIX}{name.upper()}" for name in (*Settings.model_fields, CONFIG_FILE)}
    known |= {name.upper() for name in service_variables(os.environ)}
    for name in sorted(filter(has_prefix, os.environ)):
        if name.upper() not in known:
            near = get_close_matches(name.upper(), sorted(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(f"unknown environment variable {name}{hint}")
