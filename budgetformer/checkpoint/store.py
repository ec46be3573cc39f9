"""Read and verify checkpoint folders and model stores, without torch or Transformers.

A checkpoint folder `<store>/<name>/<version>/` has `config.json`, `model.safetensors`,
`tokenizer.json` (and its config), `manifest.json` and `README.md`. The highest version is served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from budgetformer.checkpoint.manifest import (
    CONFIG,
    FORMAT,
    LOADED,
    MANIFEST,
    MAX_READ_BYTES,
    TOKENIZER,
    FileEntry,
    Manifest,
    digest_of,
)
from budgetformer.cost.macs import fits_in_full_pass
from budgetformer.errors import CheckpointError, PolicyError, TokenizerError
from budgetformer.inference.policy import (
    BudgetRule,
    choose_point,
)
from budgetformer.model.architecture import Architecture
from budgetformer.tokenization import TextEncoder, tokenizer_errors


class _Shape(BaseModel):
    """The keys of `config.json` that this module checks."""

    model_config = ConfigDict(extra="ignore", strict=True)

    ladder: list[list[int]] = Field(min_length=1)
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_attention_heads: int = Field(ge=1, le=1024)
    hidden_size: int = Field(ge=1, le=2**16)
    max_position_embeddings: int = Field(ge=1, le=2**20)
    embedding_exit: bool
    id2label: dict[str, str]


def first_problem(error: ValidationError) -> str:
    """Return the key and the message of a schema's first error, on one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    return f"{key.encode('unicode_escape').decode()}: {first['msg']}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its folder, its manifest and its configuration (`config.json`)."""

    path: Path
    manifest: Manifest
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.name

    @property
    def version(self) -> int:
        """Version of the model."""
        return self.manifest.version

    @property
    def label(self) -> str:
        """`name:version`, as in answers."""
        return f"{self.name}:{self.version}"

    @cached_property
    def architecture(self) -> Architecture:
        """The network's sizes and options."""
        return Architecture.read(self.config)

    @cached_property
    def ladder(self) -> list[list[int]]:
        """Heads per layer of steps 1..S."""
        return [list(map(int, plan)) for plan in self.config["ladder"]]

    @property
    def num_layers(self) -> int:
        """Number of encoder layers L."""
        return int(self.config["num_hidden_layers"])

    @property
    def num_heads(self) -> int:
        """Number of heads per layer H."""
        return int(self.config["num_attention_heads"])

    @property
    def has_exit(self) -> bool:
        """Whether the network has a step 0."""
        return bool(self.config["embedding_exit"])

    @property
    def calibrated(self) -> bool:
        """Whether there are quality levels; if not, f_o alone sets budgets: ceil(s * S)."""
        return bool(self.manifest.policy or self.manifest.operating_points)

    @property
    def multi_label(self) -> bool:
        """Whether a text may have several labels."""
        return self.manifest.problem_type == "multi_label_classification"

    @property
    def budgets(self) -> list[int]:
        """All ladder steps, including step 0 if the network has it."""
        return list(range(0 if self.has_exit else 1, len(self.ladder) + 1))

    def rule(
        self,
        quality: str | float | None = "balanced",
        heads: int | None = None,
        max_heads: int | None = None,
    ) -> BudgetRule:
        """Return the rule by which the budgets of a request are decided.

        Args:
            quality: name of a level, or accepted drop of the manifest's measure in percentage
                points; None: step ceil(s * S) of f_o.
            heads: heads per layer of all texts; None: f_o decides.
            max_heads: maximum heads per layer; None: no limit.

        Raises:
            PolicyError: there is no such level, or every step has more heads.
        """
        return self._rules(quality, heads, max_heads)

    @cached_property
    def _rules(self) -> Callable[[str | float | None, int | None, int | None], BudgetRule]:
        """Cached `_make_rule`, because requests use few different rules."""
        return lru_cache(maxsize=256)(self._make_rule)

    def _make_rule(
        self, quality: str | float | None, heads: int | None, max_heads: int | None
    ) -> BudgetRule:
        fixed = None if heads is None else self._step_within("heads", heads)
        ceiling = None if max_heads is None else self._step_within("max_heads", max_heads)
        limits = (len(self.ladder), fixed, ceiling)
        if quality is None:
            return BudgetRule(num_steps=len(self.ladder), fixed=fixed, ceiling=ceiling)
        if self.manifest.policy is not None:
            policy = self.manifest.policy
            return policy.rule_at(policy.level(quality), *limits)
        return choose_point(self.manifest.operating_points, quality).rule(*limits)

    @property
    def level_rules(self) -> list[BudgetRule]:
        """The rule of every calibrated level, with or without a name, in order of rising cost."""
        steps = len(self.ladder)
        if self.manifest.policy is not None:
            return [self.manifest.policy.rule_at(level, steps) for level in self.manifest.levels]
        return [point.rule(steps) for point in self.manifest.operating_points]

    def _step_within(self, field: str, heads: int) -> int:
        if not 0 <= heads <= self.num_heads:
            raise PolicyError(f"{field} must be 0..{self.num_heads}, not {heads}")
        fitting = [step for step, plan in enumerate(self.ladder, start=1) if max(plan) <= heads]
        if fitting:
            return fitting[-1]
        if self.has_exit:
            return 0
        raise PolicyError(f"{field}: no budget step computes at most {heads} heads per layer")

    def verify(self, but: str | None = None) -> None:
        """Compare every file except `but` with the manifest.

        Raises:
            CheckpointError: a file is missing or differs from the manifest.
        """
        for name in LOADED:
            if name not in self.manifest.files:
                raise CheckpointError(f"{self.path / MANIFEST}: does not list {name}")
        for name, entry in self.manifest.files.items():
            if Path(name).name != name:
                raise CheckpointError(
                    f"{self.path / MANIFEST}: file name {name!r} leaves the folder"
                )
            if name != but:
                with _as_checkpoint_errors(self.path / name):
                    path = self._checked_size(name)
                    _compare(path, digest_of(path), entry)

    def read(self, name: str) -> bytes:
        """Return a file's content after comparing it with the manifest.

        Unlike reading a file after `verify`, this is safe if the file changes meanwhile.

        Raises:
            CheckpointError: the file is missing or differs from the manifest.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path / MANIFEST}: does not list {name}")
        with _as_checkpoint_errors(self.path / name):
            path = self._checked_size(name)
            with path.open("rb") as file:
                content = file.read(entry.bytes + 1)
        _compare(path, hashlib.sha256(content).hexdigest(), entry)
        return content

    def _checked_size(self, name: str) -> Path:
        path, entry = _checked_path(self.path, name), self.manifest.files[name]
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{path}: has {size} bytes, but the manifest says {entry.bytes}")
        return path


@contextmanager
def _as_checkpoint_errors(path: Path) -> Iterator[None]:
    """Convert errors of reading and checking a file in this block to `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _compare(path: Path, digest: str, entry: FileEntry) -> None:
    if digest != entry.sha256:
        raise CheckpointError(f"{path}: sha256 differs from the manifest")


def _checked_path(folder: Path, name: str) -> Path:
    """Return the path of a file inside a folder.

    Raises:
        CheckpointError: the file is missing, not a file, or a link to a file outside the folder.
    """
    path = folder / name
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{path}: is a link to a file outside its folder")
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise CheckpointError(f"{folder}: file name {name[:80]!r}: {error}") from error
    return path


def _read_limited(folder: Path, name: str) -> bytes:
    with _checked_path(folder, name).open("rb") as file:
        content = file.read(MAX_READ_BYTES + 1)
    if len(content) > MAX_READ_BYTES:
        raise CheckpointError(f"{folder / name}: larger than {MAX_READ_BYTES} bytes")
    return content


def read_checkpoint(path: Path) -> Checkpoint:
    """Read manifest and configuration of a checkpoint folder; `Checkpoint.verify` checks the files.

    Raises:
        CheckpointError: one of them is missing or invalid, or they contradict each other.
    """
    with _as_checkpoint_errors(path / MANIFEST):
        manifest = Manifest.model_validate_json(_read_limited(path, MANIFEST))
        if manifest.format != FORMAT:
            raise ValueError(f"format {manifest.format} is not supported, only {FORMAT}")
    with _as_checkpoint_errors(path / CONFIG):
        config = _parse_json(_read_limited(path, CONFIG))
        if not isinstance(config, dict) or config.get("model_type") != "budgetformer":
            raise ValueError("model_type is not 'budgetformer'")
        shape = _Shape.model_validate(config)
    with _as_checkpoint_errors(path / MANIFEST):
        _check_sizes(manifest, shape)
        if manifest.policy is not None:
            _check_chain(manifest.policy.chain, Architecture.read(config))
    return Checkpoint(path, manifest, config)


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def _check_sizes(manifest: Manifest, shape: _Shape) -> None:
    """Check that a manifest fits the sizes of its network.

    Raises:
        ValueError: it does not.
    """
    labels, layers, top = len(shape.id2label), shape.num_hidden_layers, len(shape.ladder)
    if len(manifest.labels) != labels:
        raise ValueError(f"{len(manifest.labels)} labels, but the network has {labels}")
    if manifest.max_tokens > shape.max_position_embeddings:
        raise ValueError(
            f"max_tokens is {manifest.max_tokens}, "
            f"but the network has only {shape.max_position_embeddings} positions"
        )
    if manifest.exit_tokens is not None and manifest.exit_tokens < manifest.max_tokens:
        raise ValueError(
            f"exit_tokens is {manifest.exit_tokens}, less than max_tokens {manifest.max_tokens}"
        )
    if len(manifest.ranges) not in (0, layers):
        raise ValueError(f"ranges of {len(manifest.ranges)} layers, but the network has {layers}")
    for point in manifest.operating_points:
        steps = [band.step for band in point.entry]
        steps += [point.escalation.step] if point.escalation else []
        if steps and max(steps) > top:
            raise ValueError(f"step {max(steps)} is not on the ladder of {top}")


def _check_chain(chain: Sequence[int], architecture: Architecture) -> None:
    """Check that a network can run a chain, at no more than the cost of its full step.

    Raises:
        ValueError: the network cannot run it, or it costs more.
    """
    if chain[-1] > architecture.num_steps:
        raise ValueError(f"step {chain[-1]} is not on the ladder of {architecture.num_steps}")
    if architecture.budget_scope == "layer":
        raise ValueError('a network with budget_scope "layer" cannot have a chain')
    if (chain[0] == 0) != architecture.embedding_exit:
        has = "a" if architecture.embedding_exit else "no"
        raise ValueError(f"the chain begins with step {chain[0]}, but the network has {has} step 0")
    if not fits_in_full_pass(architecture, chain):
        steps = ", ".join(map(str, chain))
        raise ValueError(f"the steps {steps} together cost more than the full step")


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Return a checkpoint's tokenizer, which truncates to `max_tokens` and does not pad.

    Raises:
        CheckpointError: the file differs from the manifest, or is not a tokenizer.
    """
    content = checkpoint.read(TOKENIZER)
    try:
        with tokenizer_errors():
            tokenizer = Tokenizer.from_buffer(content)
    except TokenizerError as error:
        raise CheckpointError(f"{checkpoint.path / TOKENIZER}: {error}") from error
    tokenizer.no_padding()
    manifest = checkpoint.manifest
    tokenizer.enable_truncation(manifest.max_tokens, direction=manifest.truncation_side)
    return tokenizer


def load_encoder(checkpoint: Checkpoint) -> TextEncoder:
    """Return a checkpoint's tokenizer as a `TextEncoder` with the checkpoint's lengths.

    Raises:
        CheckpointError: see `load_tokenizer`.
    """
    manifest = checkpoint.manifest
    return TextEncoder(
        load_tokenizer(checkpoint),
        manifest.max_tokens,
        manifest.truncation_side,
        manifest.whole_tokens,
    )


@dataclass(frozen=True)
class Store:
    """A model store.

    Attributes:
        checkpoints: valid checkpoints by model name, versions rising.
        errors: messages about the invalid checkpoints.
    """

    checkpoints: dict[str, list[Checkpoint]]
    errors: list[str]

    def latest(self, name: str) -> Checkpoint:
        """Return the highest version of `name`.

        Raises:
            CheckpointError: the store has no such model.
        """
        return self.find(name)

    def find(self, spec: str) -> Checkpoint:
        """Return the checkpoint for `name` (its highest version) or `name:version`.

        Raises:
            CheckpointError: the store has no such model.
        """
        name, _, version = spec.partition(":")
        for checkpoint in reversed(self.checkpoints.get(name, [])):
            if not version or version == str(checkpoint.version):
                return checkpoint
        raise CheckpointError(f"the store has no model {spec!r}")


def next_version(folder: Path) -> int:
    """Return the highest version in a model's folder plus 1; 1 if there is none."""
    return max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0) + 1


def read_store(path: Path) -> Store:
    """Read every `<name>/<version>/` below `path`; invalid ones are listed in `Store.errors`.

    Raises:
        CheckpointError: `path` is not a folder.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    checkpoints: dict[str, list[Checkpoint]] = {}
    errors = []
    for folder in sorted(p for p in path.glob("*/*") if p.is_dir() and p.name.isdecimal()):
        try:
            if not folder.resolve().is_relative_to(path.resolve()):
                raise CheckpointError(f"{folder}: is a link to a folder outside the store")
            checkpoint = read_checkpoint(folder)
            if (checkpoint.name, str(checkpoint.version)) != (folder.parent.name, folder.name):
                raise CheckpointError(f"{folder}: the manifest says {checkpoint.label}")
        except CheckpointError as error:
            errors.append(str(error))
        else:
            checkpoints.setdefault(checkpoint.name, []).append(checkpoint)
    for versions in checkpoints.values():
        versions.sort(key=lambda c: c.version)
    return Store(checkpoints, errors)
