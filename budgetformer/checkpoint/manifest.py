"""What a checkpoint's `manifest.json` says, and how it is written; no torch, no Transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from budgetformer.inference.policy import Level, Measure, OperatingPoint, Policy
from budgetformer.inference.ranges import LayerRanges

FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER, MANIFEST, CARD = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "manifest.json",
    "README.md",
)
LOADED = (CONFIG, WEIGHTS, TOKENIZER)
"""What a network is loaded from."""
FULL = "full budget"
"""In place of a quality level's name: all heads for every text."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a model may be called; nothing of it leads elsewhere on a disk."""
MAX_VERSION = 2**63 - 1
"""What the messages between processes, which name versions, can hold."""
MAX_READ_BYTES = 64 * 2**20
"""Of a manifest or a configuration, which are read whole."""


CORE_HOUR_PRICE = 0.05
"""What a rented core costs for an hour, about, in dollars."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Data):
    """Size and digest of one file of the folder."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Provenance(_Data):
    """Where the starting weights and the data come from, and under which terms."""

    starting_weights: str
    starting_weights_license: str
    data: str
    data_terms: str = "not stated"


class FixedStep(_Data):
    """What one ladder step, given to every text, reached on the calibration data.

    `accuracy` is None where that had no labels; then `agreement` with the full network is known.
    """

    step: int
    accuracy: float | None = None
    agreement: float | None = None
    macs_share: float


class Evaluation(_Data):
    """Accuracy on one data set: rows, accuracy and its 95 % interval."""

    data: str
    rows: int
    accuracy: float
    low: float
    high: float


class Timing(_Data):
    """Time per text on the machine that made a checkpoint, in batches, tokenization included.

    Attributes:
        processor, threads, precision: what computed, and in which precision.
        texts: how many were timed.
        milliseconds: per text, by quality level and for the full budget.
        core_hour_price: of one core for an hour, in any currency.
    """

    processor: str
    threads: int = Field(ge=1)
    precision: str
    texts: int = Field(ge=1)
    milliseconds: dict[str, float]
    core_hour_price: float = Field(ge=0)

    def price(self, level: str) -> float:
        """Return what a million texts cost at a level."""
        return self.milliseconds[level] * 1e6 / 3.6e6 * self.threads * self.core_hour_price


class Manifest(_Data):
    """What a checkpoint says of itself.

    Attributes:
        format: version of this layout.
        name: model name.
        version: whole number; the highest is served.
        created: date, ISO 8601.
        files: every other file of the folder that is needed to serve, by name.
        max_tokens: longest input, special tokens included; longer ones are truncated.
        exit_tokens: likewise of what step 0 reads; None: `max_tokens`.
        truncation_side: the end that is cut off then.
        labels: label names in class order.
        problem_type: `single_label_classification` or `multi_label_classification`.
        seed, recipe: what `budgetformer train` was asked.
        metrics: figures of the run (rows, epochs, accuracies).
        frontier: fixed steps, for comparison.
        policy: the calibrated chain and its levels.
        operating_points: calibrated rules of the older form, in order of rising cost; none where
            there is a policy. `levels` gives what either form reached.
        timing: what the levels took on the machine that made it, if that was measured.
        ranges: of what each layer's maps read on the calibration data, for int8; may be none.
        provenance: origin and terms of weights and data.
    """

    format: int = FORMAT
    name: str = Field(pattern=NAME)
    version: int = Field(ge=1, le=MAX_VERSION)
    created: str
    files: dict[str, FileEntry]
    max_tokens: int = Field(ge=3)
    exit_tokens: int | None = Field(default=None, le=2**20)
    truncation_side: Literal["right", "left"] = "right"
    labels: tuple[str, ...] = Field(min_length=1)
    problem_type: str
    seed: int
    recipe: dict[str, Any]
    metrics: dict[str, float]
    frontier: tuple[FixedStep, ...] = ()
    policy: Policy | None = None
    operating_points: tuple[OperatingPoint, ...] = ()
    timing: Timing | None = None
    ranges: tuple[LayerRanges, ...] = ()
    provenance: Provenance

    @property
    def levels(self) -> tuple[Level, ...]:
        """What every calibrated level reached, in order of rising cost; some carry a name."""
        if self.policy is not None:
            return self.policy.levels
        return tuple(point.level for point in self.operating_points)

    @property
    def named_levels(self) -> dict[str, Level]:
        """The quality levels by name."""
        return {level.name: level for level in self.levels if level.name}

    @property
    def measure(self) -> Measure:
        """What the points that a level loses are points of."""
        return "accuracy" if self.policy is None else self.policy.measure

    @property
    def whole_tokens(self) -> int:
        """Tokens of a text that step 0 reads at most."""
        return self.exit_tokens or self.max_tokens


def file_entries(path: Path) -> dict[str, FileEntry]:
    """Describe every file of a checkpoint folder that is needed to serve."""
    kept = sorted(
        p for p in path.iterdir() if p.is_file() and p.suffix in {".json", ".safetensors"}
    )
    return {
        p.name: FileEntry(sha256=digest_of(p), bytes=p.stat().st_size)
        for p in kept
        if p.name != MANIFEST
    }


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, by rename, so that it is whole or not there."""
    part = path / f"{MANIFEST}.part"
    part.write_text(manifest.model_dump_json(indent=1) + "\n")
    part.replace(path / MANIFEST)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
