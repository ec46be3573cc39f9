"""API keys: their scopes, their limits, and the file that holds them.

A key is 256 random bits, so one round of SHA-256 protects it. A slow hash protects passwords that
can be guessed; here it would only let callers with wrong keys use up the server's time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from budgetformer.errors import BudgetFormerError
from service.key_usage import KeyUsage
from service.scheduling.rate import SharedUsage

log = structlog.get_logger()

Scope = Literal["classify", "jobs", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
ANONYMOUS = "anonymous"
"""Name of callers without a key."""
ADMIN = "admin"
"""Name of the key in the setting `admin_key`."""
PREFIX = "bf_"
"""Prefix of all keys, by which scanners for leaked secrets can recognize them."""
KEY_BYTES = 32
MAX_KEYS = 256
"""Most keys: each request is compared with all of them, and each has its own metrics."""
MAX_FILE_BYTES = 2**20
POLL_SECONDS = 1.0
"""Interval at which the key file is checked for changes."""


class KeysError(BudgetFormerError):
    """Keys or a key file are invalid."""


class Key(BaseModel):
    """A key, of which only the hash is stored.

    Attributes:
        sha256: SHA-256 of the key, hexadecimal.
        scopes: permissions: `classify` for requests to classify and similar ones, `jobs` for jobs,
            `admin` for changes of models and for the jobs of all callers.
        texts_per_second: highest mean rate; None: no limit.
        burst: most texts at once; None: the texts of one second.
        max_requests: most requests in flight; None: no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(default=frozenset({"classify"}), min_length=1)
    texts_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    burst: int | None = Field(default=None, ge=1)
    max_requests: int | None = Field(default=None, ge=1)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Keys = Annotated[dict[Name, Key], Field(max_length=MAX_KEYS)]
_KEYS: TypeAdapter[dict[str, Key]] = TypeAdapter(Keys)


_NO_LIMITS = Key(sha256="0" * 64)


def digest(secret: bytes) -> str:
    """Return the hash of a secret that is stored."""
    return hashlib.sha256(secret).hexdigest()


def new_key(scopes: Collection[str], **limits: Any) -> tuple[str, Key]:
    """Create a key, and return its secret, which is not stored, and the key.

    Raises:
        KeysError: a scope or a limit is invalid.
    """
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    try:
        fields = {"sha256": digest(secret.encode()), "scopes": frozenset(scopes), **limits}
        return secret, Key.model_validate(fields)
    except ValidationError as error:
        raise KeysError(_first_problem(error)) from None


def key_line(name: str, key: Key) -> str:
    """Return the line of a key file for a key."""
    fields = key.model_dump(mode="json", exclude_none=True) | {"scopes": sorted(key.scopes)}
    # JSON's strings, numbers and lists are TOML's too.
    table = ", ".join(f"{field} = {json.dumps(value)}" for field, value in fields.items())
    return f"{json.dumps(name)} = {{ {table} }}"


def check_keys(given: Mapping[str, Any]) -> dict[str, Key]:
    """Validate keys by name.

    Raises:
        KeysError: a name or a key is invalid, or one key has two names.
    """
    try:
        keys = _KEYS.validate_python(dict(given))
    except ValidationError as error:
        raise KeysError(_first_problem(error)) from None
    if ANONYMOUS in keys:
        raise KeysError(f"{ANONYMOUS} is reserved for callers without a key; rename this key")
    names: dict[str, str] = {}
    for name, key in keys.items():
        if key.sha256 in names:
            raise KeysError(f"{names[key.sha256]} and {name} are the same key")
        names[key.sha256] = name
    return keys


def read_keys(path: Path) -> dict[str, Key]:
    """Read a key file: TOML, with a table for each key under its name.

    Raises:
        KeysError: the file cannot be read, or is invalid.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise KeysError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return check_keys(tomllib.loads(content.decode()))
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise KeysError(f"{path}: not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise KeysError(f"{path}: {error}") from None
    except RecursionError:
        raise KeysError(f"{path}: nested too deeply") from None
    except KeysError as error:
        message = str(error)
        raise KeysError(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")
    return f"{field}: {first['msg']}" if field else first["msg"]


class Caller:
    """The holder of a key, with its scopes and limits.

    Args:
        name: name of the key.
        scopes: permissions of the key.
        key: the key with its limits; None: no limits.
        usage: use of the key, counted by all frontends; None: not counted.
    """

    def __init__(
        self,
        name: str,
        scopes: Collection[Scope],
        key: Key | None = None,
        usage: SharedUsage | None = None,
    ) -> None:
        self.name = name
        self.scopes = frozenset(scopes)
        self.key = key
        self._usage = usage
        limits = key or _NO_LIMITS
        self._max_requests, self._rate = limits.max_requests, limits.texts_per_second
        rate = self._rate or 1.0
        self._burst = (limits.burst or max(1.0, rate)) / rate

    def begin(self) -> bool:
        """Count a request until `end`; return False if `max_requests` are in flight already."""
        return self._usage is None or self._usage.begin(self._max_requests)

    def end(self) -> None:
        """Count the end of a request."""
        if self._usage is not None:
            self._usage.end()

    def take(self, texts: int, now: float) -> float:
        """Take texts of the rate and return 0, or return the seconds until they are available."""
        if self._usage is None or self._rate is None:
            return 0.0
        return self._usage.take(texts / self._rate, self._burst, now)

    def give_back(self, texts: int) -> None:
        """Return texts that were taken for a request that was refused."""
        if self._usage is not None and self._rate is not None:
            self._usage.give_back(texts / self._rate)


class KeyRing:
    """The valid keys of a server; the key file is read again when it has changed.

    If the file becomes unreadable or invalid, this is logged and the keys stay as they were.

    Args:
        keys: keys in the settings.
        file: file with further keys.
        anonymous: whether callers without a key, or with an unknown one, may classify.
        usage: use of the keys, counted by all frontends; None: this frontend counts alone.
        clock: returns seconds; it decides when the file is checked.
        changed: called with the names of all keys, at the start and after each change.

    Raises:
        KeysError: the keys or the file are invalid, or a name is in both.
    """

    def __init__(
        self,
        keys: Mapping[str, Key],
        file: Path | None = None,
        *,
        anonymous: bool = False,
        usage: KeyUsage | None = None,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[Collection[str]], None] = lambda _: None,
    ) -> None:
        self._file = file
        self._usage = usage or KeyUsage()
        self._clock = clock
        self._changed = changed
        self._callers: dict[str, Caller] = {}
        self.configure(keys, anonymous=anonymous)

    def configure(self, keys: Mapping[str, Key], *, anonymous: bool) -> None:
        """Replace the keys of the settings, and read the file again.

        Raises:
            KeysError: the keys or the file are invalid, or a name is in both; nothing has changed.
        """
        stamp = self._file_stamp()
        self._replace(keys)
        self._keys = dict(keys)
        self._anonymous = Caller(ANONYMOUS, {"classify", "jobs"}) if anonymous else None
        self._stamp = stamp
        self._checked = self._clock()

    @property
    def names(self) -> list[str]:
        """Names of all keys."""
        return list(self._callers)

    def find(self, secret: bytes | None) -> Caller | None:
        """Return the holder of a secret, else the anonymous caller; None: a key is required."""
        self._refresh()
        holder = self._anonymous
        if secret:
            given = digest(secret)
            # All keys are compared, so that the time does not depend on which one matches.
            for caller in self._callers.values():
                assert caller.key is not None
                if hmac.compare_digest(given, caller.key.sha256):
                    holder = caller
        return holder

    def opens(self, caller: Caller, scope: Scope) -> bool:
        """Return whether a caller may make requests that require a scope."""
        free = self._anonymous is not None and scope in self._anonymous.scopes
        # `admin` includes `jobs`, since administrators may end the jobs of all callers.
        return free or scope in caller.scopes or (scope == "jobs" and "admin" in caller.scopes)

    def _refresh(self) -> None:
        """Read the key file again if it has changed."""
        now = self._clock()
        if self._file is None or now - self._checked < POLL_SECONDS:
            return
        self._checked = now
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._replace(self._keys)
        except KeysError as error:
            log.error("keys not reloaded", reason=str(error))
        else:
            log.info("keys reloaded", keys=self.names)

    def _file_stamp(self) -> tuple[int, ...] | None:
        if self._file is None:
            return None
        try:
            stat = os.stat(self._file)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _replace(self, in_settings: Mapping[str, Key]) -> None:
        in_file = {} if self._file is None else read_keys(self._file)
        if duplicates := sorted(in_settings.keys() & in_file.keys()):
            raise KeysError(f"{self._file}: the key {duplicates[0]} is also in the settings")
        keys = check_keys(dict(in_settings) | in_file)
        self._callers = {
            name: Caller(name, key.scopes, key, self._usage.of(name)) for name, key in keys.items()
        }
        self._changed(self.names)
