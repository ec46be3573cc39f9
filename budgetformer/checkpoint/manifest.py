"""The schema of `manifest.json`; importing it loads neither torch nor Transformers."""

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
"""Files that are required to load a network."""
FULL = "full budget"
"""Name of the results with all heads for every text, beside those of quality levels."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Pattern of model names; it excludes paths."""
MAX_VERSION = 2**63 - 1
"""Largest version that the messages between processes can encode."""
MAX_READ_BYTES = 64 * 2**20
"""Maximum size of a manifest or a configuration."""
CORE_HOUR_PRICE = 0.05
"""Approximate price of renting one core for an hour, in dollars."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Data):
    """Size and digest of one file of a checkpoint folder."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Provenance(_Data):
    """Origin and terms of the starting weights and the data."""

    starting_weights: str
    starting_weights_license: str
    data: str
    data_terms: str = "not stated"


class FixedStep(_Data):
    """The result of running one ladder step for every text of the calibration data.

    Without labels, `accuracy` is None and `agreement` with the full network is set.
    """

    step: int
    accuracy: float | None = None
    agreement: float | None = None
    macs_share: float


class Timing(_Data):
    """Time per text on the machine that made a checkpoint, in batches, tokenization included.

    Attributes:
        processor, threads, precision: processor, torch threads and precision of the measurement.
        texts: number of timed texts.
        milliseconds: milliseconds per text by quality level, and for `FULL`.
        core_hour_price: price of one core for an hour, in any currency.
    """

    processor: str
    threads: int = Field(ge=1)
    precision: str
    texts: int = Field(ge=1)
    milliseconds: dict[str, float]
    core_hour_price: float = Field(ge=0)

    def price(self, level: str) -> float:
        """Return the price of a million texts at a level."""
        return self.milliseconds[level] * 1e6 / 3.6e6 * self.threads * self.core_hour_price

    def price_text(self, level: str) -> str:
        """Return that price with two decimals, or below 1 with three significant digits."""
        price = self.price(level)
        return f"{price:#.3g}" if price < 1 else f"{price:,.2f}"


class Manifest(_Data):
    """The content of a checkpoint's `manifest.json`.

    Attributes:
        format: version of this schema.
        name: model name.
        version: integer; the highest is served.
        created: date, ISO 8601.
        files: entry of every other file that is needed to serve, by file name.
        max_tokens: longest input of the encoder, including special tokens; longer ones are
            truncated.
        exit_tokens: longest input of step 0; None: `max_tokens`.
        truncation_side: the end at which longer inputs are truncated.
        labels: label names in class order.
        problem_type: `single_label_classification` or `multi_label_classification`.
        seed, recipe: settings of the training run.
        metrics: figures of the run (rows, epochs, accuracies).
        frontier: results of fixed steps, for comparison.
        policy: calibrated chain and its levels.
        operating_points: calibrated rules of older checkpoints, in order of rising cost; empty if
            there is a policy. `levels` has the results in both cases.
        timing: measured time of the levels, if any.
        ranges: state ranges of each layer on the calibration data, for int8; may be empty.
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
        """Every calibrated level, with or without a name, in order of rising cost."""
        if self.policy is not None:
            return self.policy.levels
        return tuple(point.level for point in self.operating_points)

    @property
    def named_levels(self) -> dict[str, Level]:
        """The quality levels by name."""
        return {level.name: level for level in self.levels if level.name}

    @property
    def measure(self) -> Measure:
        """Measure for which the levels are calibrated."""
        return "accuracy" if self.policy is None else self.policy.measure

    @property
    def whole_tokens(self) -> int:
        """Maximum tokens of a text that step 0 reads."""
        return self.exit_tokens or self.max_tokens


def file_entries(path: Path) -> dict[str, FileEntry]:
    """Return size and digest of every file of a checkpoint folder that is needed to serve."""
    return {
        file.name: FileEntry(sha256=digest_of(file), bytes=file.stat().st_size)
        for file in sorted(path.iterdir())
        if file.is_file() and file.suffix in {".json", ".safetensors"} and file.name != MANIFEST
    }


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    partial = path / f"{MANIFEST}.part"
    partial.write_text(manifest.model_dump_json(indent=1) + "\n")
    partial.replace(path / MANIFEST)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
