"""Checkpoints and stores: reading, verification, rules, damaged files, links."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.manifest import write_manifest
from budgetformer.checkpoint.store import Checkpoint, load_tokenizer, read_checkpoint, read_store
from budgetformer.errors import CheckpointError, PolicyError
from budgetformer.inference.precision import Precision
from tests.support.stores import (
    EXIT_TOKENS,
    HEADS,
    LABELS,
    LAYERS,
    MAX_TOKENS,
    PANICS,
    PICKY,
    TOPICS,
    sign,
)

Damage = Callable[[Path], None]


@pytest.fixture
def store(model_store: Path, tmp_path: Path) -> Path:
    """Return a store of three checkpoints that a test may damage."""
    copy = tmp_path / "store"
    for name in ("topics/1", "topics/2", "pairs/1"):
        shutil.copytree(model_store / name, copy / name)
    return copy


def edit(file: str, /, **changes: Any) -> Damage:
    """Change top-level keys of a JSON file; None removes a key."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def rename_in_manifest(new: str) -> Damage:
    """Rename the tokenizer's configuration in the manifest."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][new] = manifest["files"].pop("tokenizer_config.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def flip_a_byte(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def append(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b" ") and None


def unlisted(name: str) -> Damage:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"][name]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def assert_one_line(message: str, *parts: str) -> None:
    assert "\n" not in message
    for part in parts:
        assert part in message


LEVELS = (
    {"name": "fast", "threshold": 0.5, "points_lost": 2.0, "macs_share": 0.1, "mean_heads": 1.0},
    {"name": "best", "threshold": 0.9, "points_lost": 0.0, "macs_share": 0.4, "mean_heads": 3.0},
)


def with_policy(chain: tuple[int, ...]) -> Damage:
    """Replace the operating points by a chain with two levels."""
    policy = {
        "measure": "agreement",
        "chain": chain,
        "entry": [{"upto": 0.5, "step": chain[1]}, {"upto": 1.0, "step": chain[-1]}],
        "levels": LEVELS,
    }
    return edit("manifest.json", policy=policy, operating_points=[])


def layerwise_with_policy(folder: Path) -> None:
    edit("config.json", budget_scope="layer", embedding_exit=False)(folder)
    with_policy((1, 2))(folder)


UNREADABLE = {
    "no manifest": (without("manifest.json"), "manifest.json", "missing"),
    "manifest not JSON": (write("manifest.json", b"{"), "manifest.json", "JSON"),
    "manifest empty": (write("manifest.json", b""), "manifest.json", "JSON"),
    "manifest not UTF-8": (write("manifest.json", b"\xff\xfe{}"), "manifest.json", ""),
    "manifest a list": (write("manifest.json", b"[]"), "manifest.json", ""),
    "later format": (edit("manifest.json", format=2), "manifest.json", "format 2"),
    "no files": (edit("manifest.json", files=None), "manifest.json", "files"),
    "no labels": (edit("manifest.json", labels=[]), "manifest.json", "labels"),
    "unknown key": (edit("manifest.json", colour="red"), "manifest.json", "colour"),
    "bad name": (edit("manifest.json", name="../topics"), "manifest.json", "name"),
    "other name": (edit("manifest.json", name="tropics"), "topics/2", "tropics:2"),
    "other version": (edit("manifest.json", version=3), "topics/2", "topics:3"),
    "version too high": (edit("manifest.json", version=2**63), "manifest.json", "version"),
    "no configuration": (without("config.json"), "config.json", "missing"),
    "configuration not JSON": (write("config.json", b"}"), "config.json", "JSON"),
    "configuration not UTF-8": (write("config.json", b'"\xff"'), "config.json", ""),
    "configuration a list": (write("config.json", b"[]"), "config.json", "model_type"),
    "another network": (edit("config.json", model_type="bert"), "config.json", "model_type"),
    "no ladder": (edit("config.json", ladder=None), "config.json", "ladder"),
    "ladder a number": (edit("config.json", ladder=3), "config.json", "ladder"),
    "ladder of words": (edit("config.json", ladder=["a"] * 4), "config.json", "ladder"),
    "ladder empty": (edit("config.json", ladder=[]), "", ""),
    "ladder too short": (edit("config.json", ladder=[[1, 1]]), "", "step"),
    "step beyond the ladder": (with_policy((0, 1, 9)), "manifest.json", "step 9"),
    "chain without its step 0": (with_policy((1, 2)), "manifest.json", "step 0"),
    "chain above the cost of the full step": (with_policy((0, 2, 4)), "manifest.json", "full step"),
    "chain where layers decide": (layerwise_with_policy, "manifest.json", "budget_scope"),
    "chain that falls": (with_policy((0, 2, 1)), "manifest.json", "rise"),
    "layers not a number": (
        edit("config.json", num_hidden_layers="two"),
        "config.json",
        "num_hidden_layers",
    ),
}

DAMAGED = {
    "missing": (without("tokenizer_config.json"), "tokenizer_config.json", "missing"),
    "shorter": (write("tokenizer_config.json", b"{}"), "tokenizer_config.json", "2 bytes"),
    "longer": (append("model.safetensors"), "model.safetensors", "bytes"),
    "one bit": (flip_a_byte("model.safetensors"), "model.safetensors", "sha256"),
    "configuration edited": (append("config.json"), "config.json", "bytes"),
    "weights not listed": (unlisted("model.safetensors"), "manifest.json", "model.safetensors"),
    "tokenizer not listed": (unlisted("tokenizer.json"), "manifest.json", "tokenizer.json"),
    "leaves upwards": (rename_in_manifest("../tokenizer_config.json"), "manifest.json", ".."),
    "leaves to the root": (rename_in_manifest("/etc/passwd"), "manifest.json", "/etc/passwd"),
    "leaves below": (rename_in_manifest("a/b.json"), "manifest.json", "a/b.json"),
    "leaves to the parent": (rename_in_manifest(".."), "", ""),
}


class TestValidCheckpoint:
    def test_its_properties_come_from_manifest_and_configuration(self, model_store: Path) -> None:
        checkpoint = read_checkpoint(model_store / TOPICS / "2")
        assert (checkpoint.name, checkpoint.version, checkpoint.label) == ("topics", 2, "topics:2")
        assert checkpoint.manifest.labels == LABELS
        assert checkpoint.manifest.max_tokens == MAX_TOKENS
        assert checkpoint.manifest.whole_tokens == EXIT_TOKENS
        assert (checkpoint.num_layers, checkpoint.num_heads) == (LAYERS, HEADS)
        assert checkpoint.ladder == [[k] * LAYERS for k in range(1, HEADS + 1)]
        assert checkpoint.budgets == [0, 1, 2, 3, 4]

    def test_without_step_0_budgets_start_at_1(self, model_store: Path) -> None:
        checkpoint = read_checkpoint(model_store / PICKY / "1")
        assert checkpoint.budgets == [1, 2, 3, 4]
        assert checkpoint.manifest.exit_tokens is None
        assert checkpoint.manifest.whole_tokens == MAX_TOKENS

    def test_every_checkpoint_of_the_store_can_be_verified(self, model_store: Path) -> None:
        for versions in read_store(model_store).checkpoints.values():
            for checkpoint in versions:
                checkpoint.verify()
                assert set(checkpoint.manifest.files) == {
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                }
                assert (checkpoint.path / "README.md").is_file()

    def test_the_auto_classes_load_it(self, model_store: Path) -> None:
        path = model_store / TOPICS / "1"
        assert AutoConfig.from_pretrained(path).model_type == "budgetformer"
        model = AutoModelForSequenceClassification.from_pretrained(path)
        assert type(model).__name__ == "BudgetFormerForSequenceClassification"

    @pytest.mark.parametrize("name", [f"{TOPICS}/1", f"{PICKY}/1"])
    def test_loading_keeps_each_weight_once(self, model_store: Path, name: str) -> None:
        """Tables keep the type of the file; all other weights are float32."""
        folder = model_store / name
        weights = load_file(folder / "model.safetensors")
        tables = [w for n, w in weights.items() if n.startswith("encoder.embeddings.")]
        tables = [w for w in tables if w.dim() == 2]
        tables += [weight for weight in weights.values() if not weight.is_floating_point()]
        kept = sum(table.nbytes - 4 * table.numel() for table in tables)
        everything = 4 * sum(weight.numel() for weight in weights.values())
        network = load_network(read_checkpoint(folder))
        network.warm([HEADS])
        assert network.nbytes == everything + kept

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_the_tokenizer_truncates_on_the_side_of_the_manifest(
        self, store: Path, side: str
    ) -> None:
        path = store / TOPICS / "1"
        manifest = read_checkpoint(path).manifest
        write_manifest(path, manifest.model_copy(update={"truncation_side": side}))
        tokenizer = load_tokenizer(read_checkpoint(path))
        first, last, short = tokenizer.encode_batch(
            ["the " * 100 + "cat", "cat " + "the " * 100, "the cat"]
        )
        assert len(first.ids) == len(last.ids) == MAX_TOKENS
        assert len(short.ids) < MAX_TOKENS  # not padded
        kept, cut = (last, first) if side == "right" else (first, last)
        assert len(set(kept.ids)) > len(set(cut.ids))

    def test_a_manifest_is_read_as_it_was_written(self, store: Path) -> None:
        path = store / TOPICS / "1"
        manifest = read_checkpoint(path).manifest
        write_manifest(path, manifest.model_copy(update={"metrics": {"x": 1.0}}))
        assert read_checkpoint(path).manifest.metrics == {"x": 1.0}
        assert not list(path.glob("*.part"))


class TestRule:
    @pytest.mark.parametrize(("heads", "step"), [(0, 0), (1, 1), (3, 3), (4, 4)])
    def test_fixed_heads_select_a_step(self, model_store: Path, heads: int, step: int) -> None:
        rule = read_checkpoint(model_store / TOPICS / "1").rule(heads=heads)
        assert rule.fixed == step

    @pytest.mark.parametrize("field", ["heads", "max_heads"])
    @pytest.mark.parametrize("value", [-1, HEADS + 1, 1000])
    def test_heads_outside_the_network_are_refused(
        self, model_store: Path, field: str, value: int
    ) -> None:
        checkpoint = read_checkpoint(model_store / TOPICS / "1")
        with pytest.raises(PolicyError, match=f"{field} must be 0..{HEADS}"):
            checkpoint.rule(**{field: value})

    @pytest.mark.parametrize("field", ["heads", "max_heads"])
    def test_zero_heads_require_step_0(self, model_store: Path, field: str) -> None:
        with pytest.raises(PolicyError, match=field):
            read_checkpoint(model_store / PICKY / "1").rule(**{field: 0})

    def test_heads_select_the_largest_fitting_step_of_an_uneven_ladder(self, store: Path) -> None:
        edit("config.json", ladder=[[0, 1], [1, 2], [4, 1], [4, 4]])(store / TOPICS / "1")
        checkpoint = read_checkpoint(store / TOPICS / "1")
        assert [checkpoint.rule(heads=k).fixed for k in range(HEADS + 1)] == [0, 1, 2, 2, 4]

    def test_a_policy_gives_rules_with_its_chain_and_a_threshold(self, store: Path) -> None:
        with_policy((0, 1, 2))(store / TOPICS / "1")
        checkpoint = read_checkpoint(store / TOPICS / "1")
        fast, between = checkpoint.rule("fast"), checkpoint.rule(1.0, max_heads=1)
        assert fast.path(0.4) == (0, 1, 2)
        assert fast.path(0.6) == (0, 2)
        assert (fast.next_step(0, 0.5, 0.4), fast.next_step(0, 0.4, 0.4)) == (None, 1)
        assert between.path(0.6) == (0, 1)
        assert between.level is not None
        assert between.level.threshold == pytest.approx(0.7)
        assert checkpoint.rule(None).level is None

    def test_operating_points_and_policies_both_have_named_levels(self, store: Path) -> None:
        old = read_checkpoint(store / TOPICS / "1").manifest
        with_policy((0, 1, 2))(store / TOPICS / "1")
        new = read_checkpoint(store / TOPICS / "1").manifest
        assert list(old.named_levels) == ["fast", "balanced", "best"]
        assert (old.measure, new.measure) == ("accuracy", "agreement")
        assert {name: level.macs_share for name, level in new.named_levels.items()} == {
            "fast": 0.1,
            "best": 0.4,
        }


class TestDamage:
    @pytest.mark.parametrize("kind", UNREADABLE)
    def test_an_unreadable_version_is_one_line_and_the_others_are_read(
        self, store: Path, kind: str
    ) -> None:
        damage, file, cause = UNREADABLE[kind]
        damage(store / TOPICS / "2")
        found = read_store(store)
        (problem,) = found.errors
        assert_one_line(problem, str(store / TOPICS / "2"), file, cause)
        assert {n: [c.version for c in vs] for n, vs in found.checkpoints.items()} == {
            "pairs": [1],
            "topics": [1],
        }
        assert found.latest(TOPICS).version == 1

    @pytest.mark.parametrize("kind", DAMAGED)
    def test_verify_reports_a_difference_from_the_manifest_in_one_line(
        self, store: Path, kind: str
    ) -> None:
        damage, file, cause = DAMAGED[kind]
        damage(store / TOPICS / "2")
        checkpoint = read_checkpoint(store / TOPICS / "2")
        with pytest.raises(CheckpointError) as caught:
            checkpoint.verify()
        assert_one_line(str(caught.value), str(store / TOPICS / "2"), file, cause)

    @pytest.mark.parametrize("kind", DAMAGED)
    def test_a_checkpoint_that_differs_from_its_manifest_is_not_loaded(
        self, store: Path, kind: str
    ) -> None:
        DAMAGED[kind][0](store / TOPICS / "2")
        with pytest.raises(CheckpointError):
            load_network(read_checkpoint(store / TOPICS / "2"))

    @pytest.mark.parametrize("folder", ["topics/3", "topics/02", "tropics/1"])
    def test_a_folder_of_another_name_or_version_is_reported(
        self, store: Path, folder: str
    ) -> None:
        shutil.copytree(store / "topics/2", store / folder)
        (problem,) = read_store(store).errors
        assert_one_line(problem, str(store / folder), "topics:2")

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"version": "1.0"}'])
    def test_an_invalid_tokenizer_is_one_line(self, store: Path, content: bytes) -> None:
        path = store / TOPICS / "2" / "tokenizer.json"
        path.write_bytes(content)
        sign(path.parent)
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(read_checkpoint(path.parent))
        assert_one_line(str(caught.value), str(path))

    def test_a_tokenizer_that_panics_is_one_line(self, store: Path) -> None:
        folder = store / TOPICS / "2"
        edit("tokenizer.json", model=PANICS)(folder)
        sign(folder)
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(read_checkpoint(folder))
        assert_one_line(str(caught.value), str(folder / "tokenizer.json"))

    def test_a_changed_tokenizer_is_refused(self, store: Path) -> None:
        edit("tokenizer.json", pre_tokenizer=None)(store / TOPICS / "2")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            load_tokenizer(read_checkpoint(store / TOPICS / "2"))

    @pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"\0" * 99)])
    def test_weights_changed_after_verification_are_not_used(
        self, store: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
    ) -> None:
        verify = Checkpoint.verify

        def then_change(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> None:
            verify(checkpoint, *arguments, **options)
            change(checkpoint.path / "model.safetensors")

        monkeypatch.setattr(Checkpoint, "verify", then_change)
        with pytest.raises(CheckpointError) as caught:
            load_network(read_checkpoint(store / TOPICS / "2"))
        assert_one_line(str(caught.value), str(store / TOPICS / "2" / "model.safetensors"))


class TestDamagedWeights:
    """Weights that agree with the manifest but not with the network."""

    @pytest.fixture
    def folder(self, store: Path) -> Path:
        return store / TOPICS / "2"

    def refusal(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> str:
        """Update the manifest, and return the message that refuses the checkpoint."""
        if weights is not None:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        sign(folder)
        with pytest.raises(CheckpointError) as caught:
            load_network(read_checkpoint(folder))
        return str(caught.value)

    def test_a_missing_weight_is_named(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = sorted(weights)[0]
        del weights[name]
        assert_one_line(self.refusal(folder, weights), "model.safetensors", "missing", name)

    @pytest.mark.parametrize("name", ["stray.weight", "stray.weight\n\r"])
    def test_an_unexpected_weight_is_named(self, folder: Path, name: str) -> None:
        weights = load_file(folder / "model.safetensors") | {name: torch.zeros(2)}
        message = self.refusal(folder, weights)
        assert_one_line(message, "model.safetensors", "unexpected", "stray.weight")

    def test_a_weight_of_another_shape_is_named(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in sorted(weights) if weights[name].ndim == 2)
        weights[name] = weights[name][:1].clone()
        assert_one_line(self.refusal(folder, weights), str(folder), name)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_weight_that_is_not_finite_is_refused(self, folder: Path, value: float) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[sorted(weights)[0]].view(-1)[0] = value
        assert_one_line(self.refusal(folder, weights), "model.safetensors", "finite")

    @pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"\x80\x04."])
    def test_another_kind_of_file_is_refused(self, folder: Path, content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)
        assert_one_line(self.refusal(folder), str(folder))

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": 33},
            {"hidden_size": 64},
            {"num_attention_heads": 5},
            {"ladder": [[9, 9]]},
            {"norm_position": "beside"},
            {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_configuration_that_does_not_fit_is_refused(
        self, folder: Path, changes: dict[str, Any]
    ) -> None:
        points = read_checkpoint(folder).manifest.model_copy(
            update={"policy": None, "operating_points": ()}
        )
        write_manifest(folder, points)
        edit("config.json", **changes)(folder)
        assert_one_line(self.refusal(folder), str(folder))

    def test_another_number_of_labels_is_refused(self, folder: Path) -> None:
        manifest = read_checkpoint(folder).manifest
        write_manifest(folder, manifest.model_copy(update={"labels": LABELS[:2]}))
        assert_one_line(self.refusal(folder), str(folder), "labels")

    def test_max_tokens_above_the_positions_is_refused(self, folder: Path) -> None:
        manifest = read_checkpoint(folder).manifest
        write_manifest(folder, manifest.model_copy(update={"max_tokens": MAX_TOKENS + 1}))
        assert_one_line(self.refusal(folder), str(folder), "max_tokens")

    @pytest.mark.parametrize("tokens", [0, -1, MAX_TOKENS - 1])
    def test_exit_tokens_below_max_tokens_is_refused(self, folder: Path, tokens: int) -> None:
        manifest = read_checkpoint(folder).manifest
        write_manifest(folder, manifest.model_copy(update={"exit_tokens": tokens}))
        assert_one_line(self.refusal(folder), str(folder), "exit_tokens")

    def test_ranges_of_another_number_of_layers_are_refused(self, folder: Path) -> None:
        manifest = read_checkpoint(folder).manifest
        ranges = manifest.ranges * 2
        write_manifest(folder, manifest.model_copy(update={"ranges": ranges}))
        assert_one_line(self.refusal(folder), str(folder), f"ranges of {len(ranges)} layers")


class TestPrecision:
    def test_training_measures_ranges_for_int8(self, store: Path) -> None:
        checkpoint = read_checkpoint(store / TOPICS / "2")
        assert len(checkpoint.manifest.ranges) == LAYERS
        assert load_network(checkpoint, precision="int8").precision == "int8"

    @pytest.mark.parametrize("precision", ["int8", "float32", "auto"])
    def test_without_ranges_only_int8_is_refused(self, store: Path, precision: Precision) -> None:
        folder = store / TOPICS / "2"
        edit("manifest.json", ranges=None)(folder)
        checkpoint = read_checkpoint(folder)
        if precision == "int8":
            with pytest.raises(CheckpointError) as caught:
                load_network(checkpoint, precision=precision)
            assert_one_line(str(caught.value), str(folder), "budgetformer calibrate")
        else:
            assert load_network(checkpoint, precision=precision).precision == "float32"


class TestStore:
    def test_versions_are_sorted_by_number(self, store: Path) -> None:
        shutil.copytree(store / "topics/2", store / "topics/10")
        edit("manifest.json", version=10)(store / "topics/10")
        assert [c.version for c in read_store(store).checkpoints[TOPICS]] == [1, 2, 10]
        assert read_store(store).latest(TOPICS).version == 10

    def test_other_files_and_folders_are_ignored(self, store: Path) -> None:
        (store / TOPICS / ".3.work").mkdir()
        (store / TOPICS / "notes").mkdir()
        (store / "README.md").write_text("models")
        assert read_store(store).errors == []

    def test_an_empty_store_has_no_checkpoints(self, tmp_path: Path) -> None:
        assert read_store(tmp_path).checkpoints == {}

    def test_a_missing_store_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such folder"):
            read_store(tmp_path / "none")

    def test_a_missing_model_is_an_error(self, store: Path) -> None:
        with pytest.raises(CheckpointError, match="'nothing'"):
            read_store(store).latest("nothing")


class TestLinks:
    def test_a_version_linked_outside_the_store_is_reported(
        self, store: Path, tmp_path: Path
    ) -> None:
        shutil.move(store / "topics/2", tmp_path / "elsewhere")
        (store / "topics/2").symlink_to(tmp_path / "elsewhere")
        found = read_store(store)
        (problem,) = found.errors
        assert_one_line(problem, str(store / "topics/2"), "is a link to a folder outside the store")
        assert found.latest(TOPICS).version == 1

    def test_a_model_linked_outside_the_store_is_reported(
        self, store: Path, tmp_path: Path
    ) -> None:
        shutil.move(store / "topics", tmp_path / "elsewhere")
        (store / "topics").symlink_to(tmp_path / "elsewhere")
        found = read_store(store)
        assert len(found.errors) == 2
        assert TOPICS not in found.checkpoints

    @pytest.mark.parametrize(
        "name", ["manifest.json", "config.json", "model.safetensors", "tokenizer.json"]
    )
    def test_a_file_linked_outside_its_folder_is_not_loaded(
        self, store: Path, tmp_path: Path, name: str
    ) -> None:
        folder = store / "topics/2"
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match="is a link to a file outside its folder"):
            load_network(read_checkpoint(folder))

    def test_a_link_within_the_folder_is_followed(self, store: Path) -> None:
        folder = store / "topics/2"
        (folder / "data").mkdir()
        shutil.move(folder / "config.json", folder / "data/config.json")
        (folder / "config.json").symlink_to("data/config.json")
        read_checkpoint(folder).verify()

    @pytest.mark.parametrize("name", ["..", "x" * 300, "a\x00b", "a/b", ""])
    def test_an_invalid_file_name_in_the_manifest_is_refused(self, store: Path, name: str) -> None:
        folder = store / "topics/2"
        manifest = read_checkpoint(folder).manifest
        entry = manifest.files["config.json"]
        write_manifest(
            folder, manifest.model_copy(update={"files": manifest.files | {name: entry}})
        )
        with pytest.raises(CheckpointError):
            read_checkpoint(folder).verify()

    def test_a_pipe_does_not_block_reading(self, store: Path) -> None:
        path = store / "topics/2/manifest.json"
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match="missing"):
            read_checkpoint(path.parent)


def test_loading_in_threads_does_not_affect_the_initial_weights_of_others(
    model_store: Path,
) -> None:
    """Loading skips the initialization of weights, but only for its own network."""
    checkpoint = read_checkpoint(model_store / TOPICS / "1")
    stop = threading.Event()
    initialized: list[bool] = []

    def draw() -> None:
        while not stop.is_set():
            with torch.no_grad():
                # Weights without initialization would reuse this memory.
                torch.full((16, 16), 7.0)
            initialized.append(bool((nn.Linear(16, 16).weight.abs() <= 0.25).all()))

    with ThreadPoolExecutor(5) as pool:
        drawing = pool.submit(draw)
        for loaded in [pool.submit(load_network, checkpoint) for _ in range(40)]:
            loaded.result()
        stop.set()
        drawing.result()
    assert all(initialized)
    assert nn.Linear.reset_parameters.__qualname__ == "Linear.reset_parameters"
