"""Requests and constants for jobs, which both clients share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from budgetformer.client.errors import InputError

FINAL_STATES = ("finished", "failed", "cancelled")
POLL_SECONDS = 0.5
"""Polling interval."""
LOST_SECONDS = 60.0
"""Time that a server may be unreachable, for example during a restart, before polling fails."""
CHUNK_BYTES = 2**20
"""Size of the chunks of an upload."""
TYPES = {
    ".csv": "text/csv",
    ".jsonl": "application/x-ndjson",
    ".ndjson": "application/x-ndjson",
    ".parquet": "application/vnd.apache.parquet",
}

TellJob = Callable[[dict[str, Any]], None]
"""Called with the job after each poll."""


class JobOptions(TypedDict, total=False):
    """Options of POST /jobs; see docs/jobs.md."""

    model: str | None
    quality: str | float | None
    heads: int | None
    format: Literal["csv", "jsonl", "parquet"] | None


@dataclass(frozen=True)
class Submission:
    """A request to POST /jobs: either `path`, an upload, or `json`, which names a URL."""

    headers: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    json: dict[str, Any] | None = None
    path: Path | None = None

    @classmethod
    def of(cls, file: str | Path, options: JobOptions) -> Submission:
        """Build the request for a file or a URL.

        Raises:
            InputError: there is no such file, or its extension is not supported.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if "://" in str(file):
            return cls(json={"source": str(file), **given})
        path = Path(file)
        kind = TYPES.get(path.suffix.lower())
        if kind is None:
            raise InputError(f"{path}: not a .parquet, .csv, .jsonl or .ndjson file")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        return cls({"content-type": kind, "content-length": str(size)}, given, path=path)

    def parts(self) -> Iterator[bytes]:
        """Yield the file part by part."""
        assert self.path is not None
        with self.path.open("rb") as file:
            while part := file.read(CHUNK_BYTES):
                yield part


def unfinished(output: Path) -> Path:
    """Return the path to which a result is written until it is complete."""
    return output.with_name(f"{output.name}.part")
