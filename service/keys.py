"""Who may ask for what: keys, what they open, and how much they may ask for.

A key is 256 random bits, so one round of SHA-256 hides it: there is nothing to guess that a slow
hash would make slower, and whoever floods the server with wrong keys would have it compute them.
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
"""What a caller without a key is called."""
ADMIN = "admin"
"""What the key is called that the setting `admin_key` gives."""
PREFIX = "bf_"
"""How our keys begin, so that scanners of leaked secrets can tell them."""
KEY_BYTES = 32
MAX_KEYS = 256
"""Every key is compared with each of them, and each is a series in the metrics."""
MAX_FILE_BYTES = 2**20
LOOK_SECONDS = 1.0
"""How old what is known of the key file may be."""


class KeysError(BudgetFormerError):
    """Keys are not what they should be."""


class Key(BaseModel):
    """What is kept of a key.

    Attributes:
        sha256: of the key, hexadecimal.
        scopes: what it opens: `classify` and what belongs to it, `jobs` for files that are
            classified in the background, `admin` for changing models and for everybody's jobs.
        texts_per_second: that it may ask for in the long run; None: as many as there is room for.
        burst: texts that it may ask for at once; by default a second's.
        max_requests: that it may have under way at once.
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


def digest(secret: bytes) -> str:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret).hexdigest()


def new_key(scopes: Collection[str], **limits: Any) -> tuple[str, Key]:
    """Make a key: the secret, which is nowhere kept, and what is kept of it.

    Raises:
        KeysError: a scope or a limit is none.
    """
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    try:
        kept = {"sha256": digest(secret.encode()), "scopes": frozenset(scopes), **limits}
        return secret, Key.model_validate(kept)
    except ValidationError as error:
        raise KeysError(_first_problem(error)) from None


def key_line(name: str, key: Key) -> str:
    """Return the line of a key file."""
    fields = key.model_dump(mode="json", exclude_none=True) | {"scopes": sorted(key.scopes)}
    # JSON's strings, numbers and lists are TOML's too.
    table = ", ".join(f"{field} = {json.dumps(value)}" for field, value in fields.items())
    return f"{json.dumps(name)} = {{ {table} }}"


def check_keys(given: Mapping[str, Any]) -> dict[str, Key]:
    """Check keys by name.

    Raises:
        KeysError: a name or a key is none, or one key has two names.
    """
    try:
        keys = _KEYS.validate_python(dict(given))
    except ValidationError as error:
        raise KeysError(_first_problem(error)) from None
    if ANONYMOUS in keys:
        raise KeysError(f"{ANONYMOUS} is what callers without a key are called")
    names: dict[str, str] = {}
    for name, key in keys.items():
        if key.sha256 in names:
            raise KeysError(f"{names[key.sha256]} and {name} are the same key")
        names[key.sha256] = name
    return keys


def read_keys(path: Path) -> dict[str, Key]:
    """Read a key file: TOML, a table for each key, its name the key's.

    Raises:
        KeysError: it cannot be read, or is none.
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
        raise KeysError(f"{path}: this is no text") from None
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
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    return f"{place}: {first['msg']}" if place else first["msg"]


class Caller:
    """Who holds a key, and what it may still ask for.

    Args:
        name: of the key.
        scopes: what it opens.
        key: where its limits stand; None: it has none.
        usage: what all frontends count for it; None: nobody counts.
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
        self._most = None if key is None else key.max_requests
        self._rate = None if key is None else key.texts_per_second
        burst = None if key is None else key.burst
        self._burst = 0.0 if self._rate is None else (burst or max(1.0, self._rate)) / self._rate

    def begin(self) -> bool:
        """Count a request until `end`; False: as many are under way as it may have."""
        return self._usage is None or self._usage.begin(self._most)

    def end(self) -> None:
        """Count a request no longer."""
        if self._usage is not None:
            self._usage.end()

    def take(self, texts: int, now: float) -> float:
        """Take so many texts and return 0, or the seconds until they may be asked for."""
        if self._usage is None or self._rate is None:
            return 0.0
        return self._usage.take(texts / self._rate, self._burst, now)

    def give_back(self, texts: int) -> None:
        """Return texts that were taken for a request that was refused."""
        if self._usage is not None and self._rate is not None:
            self._usage.give_back(texts / self._rate)


class KeyRing:
    """The keys that open this server; a key file is read again when it has changed.

    A file that becomes unreadable or wrong leaves the keys as they were, and is logged.

    Args:
        keys: that stand in the settings.
        file: with more of them.
        anonymous: whether callers without a key, or with an unknown one, may classify.
        usage: where all frontends count what each key asks for; None: this one counts alone.
        clock: seconds, for when to look at the file.
        changed: told the names of all keys, at first and whenever the file has changed.

    Raises:
        KeysError: keys or file are none, or a name stands in both.
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
        """Go by other keys of the settings, and read the file again.

        Raises:
            KeysError: keys or file are none, or a name stands in both; then nothing has changed.
        """
        stamp = self._look()
        self._take(keys)
        self._keys = dict(keys)
        self._anonymous = Caller(ANONYMOUS, {"classify", "jobs"}) if anonymous else None
        self._stamp = stamp
        self._looked = self._clock()

    @property
    def names(self) -> list[str]:
        """Names of all keys."""
        return list(self._callers)

    def find(self, secret: bytes | None) -> Caller | None:
        """Return who holds a secret; None: nobody, and it takes somebody."""
        self._refresh()
        found = self._anonymous
        if secret:
            given = digest(secret)
            # Every key is compared, whichever fits: how long it takes tells nothing.
            for caller in self._callers.values():
                assert caller.key is not None
                if hmac.compare_digest(given, caller.key.sha256):
                    found = caller
        return found

    def opens(self, caller: Caller, scope: Scope) -> bool:
        """Say whether a caller may do what takes a scope."""
        free = self._anonymous is not None and scope in self._anonymous.scopes
        # Whoever may end everybody's jobs may have some.
        return free or scope in caller.scopes or (scope == "jobs" and "admin" in caller.scopes)

    def _refresh(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(self._keys)
        except KeysError as error:
            log.error("keys not reloaded", reason=str(error))
        else:
            log.info("keys reloaded", keys=self.names)

    def _look(self) -> tuple[int, ...] | None:
        if self._file is None:
            return None
        try:
            seen = os.stat(self._file)
        except OSError:
            return None
        return seen.st_mtime_ns, seen.st_size, seen.st_ino

    def _take(self, own: Mapping[str, Key]) -> None:
        more = {} if self._file is None else read_keys(self._file)
        if twice := sorted(own.keys() & more.keys()):
            raise KeysError(f"{self._file}: {twice[0]} stands in the settings too")
        keys = check_keys(dict(own) | more)
        self._callers = {
            name: Caller(name, key.scopes, key, self._usage.of(name)) for name, key in keys.items()
        }
        self._changed(self.names)
