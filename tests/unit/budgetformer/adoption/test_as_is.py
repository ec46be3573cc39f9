"""A Transformers classifier becomes a checkpoint with the same answers, or a one-line error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from budgetformer.adoption.adding import add_classifier, find_classifier
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import CheckpointError, DataError
from budgetformer.model.modeling import silence_transformers
from tests.support.classifiers import (
    CONFIGS,
    DISTILBERT,
    SMALL,
    TEXTS,
    save_classifier,
    save_tokenizer,
)
from tests.support.stores import write_jsonl

PAIRS = list(zip(TEXTS[:20], TEXTS[20:], strict=True))


def adopt(folder: Path, **choices: Any) -> Checkpoint:
    lines: list[str] = []
    return add_classifier(folder, folder.parent / "store", lines.append, **choices)


def pipeline_probabilities(
    folder: Path, texts: list[Any], **settings: Any
) -> list[dict[str, float]]:
    """Return the probabilities of Transformers' pipeline by label."""
    with silence_transformers():
        ask = pipeline("text-classification", model=str(folder), top_k=None, dtype=torch.float32)
    inputs = [{"text": t[0], "text_pair": t[1]} if isinstance(t, tuple) else t for t in texts]
    answers = [ask([one_input], **settings)[0] for one_input in inputs]
    return [{label["label"]: label["score"] for label in answer} for answer in answers]


def checkpoint_probabilities(checkpoint: Checkpoint, texts: list[Any]) -> list[dict[str, float]]:
    labels = checkpoint.manifest.labels
    if isinstance(texts[0], tuple):
        answers = Classifier(checkpoint.path)([a for a, _ in texts], [b for _, b in texts])
    else:
        answers = Classifier(checkpoint.path)(texts)
    return [dict(zip(labels, answer.probs, strict=True)) for answer in answers]


def assert_same_probabilities(
    folder: Path, checkpoint: Checkpoint, texts: list[Any], **settings: Any
) -> None:
    expected = pipeline_probabilities(folder, texts, **settings)
    for ours, theirs in zip(checkpoint_probabilities(checkpoint, texts), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_probabilities_are_those_of_the_pipeline(tmp_path: Path, family: str) -> None:
    folder = save_classifier(tmp_path / "made", family)
    checkpoint = adopt(folder)
    assert_same_probabilities(folder, checkpoint, TEXTS[:5])
    assert checkpoint.label == "made:1"
    assert checkpoint.manifest.labels == ("calm", "glad", "sad")
    checkpoint.verify()


def test_pairs_have_the_probabilities_of_the_pipeline(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    assert_same_probabilities(folder, adopt(folder), PAIRS[:5])


def test_pairs_work_with_a_tokenizer_without_token_types(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    save_tokenizer(folder, model_input_names=["input_ids", "attention_mask"])
    assert_same_probabilities(folder, adopt(folder), PAIRS[:5])


def test_unnamed_labels_are_label_0_and_label_1(tmp_path: Path) -> None:
    """Transformers does not write the labels if they are its defaults."""
    folder = save_classifier(tmp_path / "made", id2label=None, label2id=None)
    assert "id2label" not in json.loads((folder / "config.json").read_text())
    checkpoint = adopt(folder)
    assert checkpoint.manifest.labels == ("LABEL_0", "LABEL_1")
    assert_same_probabilities(folder, checkpoint, TEXTS[:5])


def test_a_multi_label_classifier_stays_multi_label(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made", problem_type="multi_label_classification")
    checkpoint = adopt(folder)
    assert checkpoint.multi_label
    assert_same_probabilities(folder, checkpoint, TEXTS[:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_classifier(tmp_path / "made")
    with silence_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    checkpoint = adopt(folder)
    kinds = {weight.dtype for weight in load_file(checkpoint.path / "model.safetensors").values()}
    assert {kind.itemsize for kind in kinds} == {dtype.itemsize}
    assert_same_probabilities(folder, checkpoint, TEXTS[:5])


def test_every_quality_uses_all_heads(tmp_path: Path) -> None:
    ask = Classifier(adopt(save_classifier(tmp_path / "made")).path)
    full, *others = [
        ask(TEXTS[:3], quality=quality) for quality in ("best", "fast", "balanced", 2.0)
    ]
    assert all(answers == full for answers in others)
    assert {(a.macs, a.budget) for a in full} == {(a.dense_macs, 1) for a in full}


def test_the_same_classifier_is_added_once(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    assert adopt(folder).path == adopt(folder).path
    with silence_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        model.classifier.bias.data += 0.5
        model.save_pretrained(folder)
    assert adopt(folder).label == "made:2"
    assert adopt(folder, name="other").label == "other:1"


def test_a_classifier_that_the_store_has_is_found_without_torch(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    adopt(folder)
    code = f"""
import sys
from pathlib import Path
from budgetformer.adoption.adding import add_classifier, find_classifier

folder = find_classifier({str(folder)!r})
print(add_classifier(folder, Path({str(tmp_path / "store")!r}), lambda _: None).label)
print({{"torch", "transformers"}} & sys.modules.keys())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "made:1\nset()\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_classifier_with_another_file_is_added_again(tmp_path: Path, file: str) -> None:
    folder = save_classifier(tmp_path / "made")
    adopt(folder)
    (folder / "README.md").write_text("Not read.")
    assert adopt(folder).label == "made:1"
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert adopt(folder).label == "made:2"


def test_a_checkpoint_of_another_release_is_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_classifier(tmp_path / "made")
    adopt(folder)
    monkeypatch.setattr("budgetformer.adoption.adding.__version__", "9.9.9")
    assert adopt(folder).label == "made:2"


def test_sample_texts_calibrate_the_int8_ranges(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    texts = write_jsonl(tmp_path / "sample.jsonl", ({"text": text} for text in TEXTS))
    checkpoint = adopt(folder, texts=texts)
    assert len(checkpoint.manifest.ranges) == SMALL["num_hidden_layers"]
    assert adopt(folder, texts=texts).path == checkpoint.path
    assert adopt(folder).path == checkpoint.path
    others = write_jsonl(tmp_path / "others.jsonl", ({"text": text} for text in TEXTS[::2]))
    assert adopt(folder, texts=others).version == 2
    with pytest.raises(DataError, match="no.jsonl: No such file"):
        adopt(folder, texts=tmp_path / "no.jsonl")


class TestTokenizers:
    def assert_same_tokens(self, checkpoint: Checkpoint, folder: Path, text: str) -> None:
        with silence_transformers():
            expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert Classifier(checkpoint.path)([text])[0].tokens == len(expected)
        assert_same_probabilities(folder, checkpoint, [text])

    def test_a_vocabulary_without_tokenizer_json_is_read(self, tmp_path: Path) -> None:
        folder = save_classifier(tmp_path / "made")
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        self.assert_same_tokens(adopt(folder), folder, TEXTS[0])

    @pytest.mark.parametrize("lower", [True, False])
    def test_do_lower_case_overrides_tokenizer_json(self, tmp_path: Path, lower: bool) -> None:
        folder = save_classifier(tmp_path / "made")
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        self.assert_same_tokens(adopt(folder), folder, TEXTS[0].upper())

    @pytest.mark.parametrize("limit", [int(1e30), 12])
    def test_max_tokens_is_the_limit_of_tokenizer_and_positions(
        self, tmp_path: Path, limit: int
    ) -> None:
        folder = save_classifier(tmp_path / "made")
        save_tokenizer(folder, model_max_length=limit)
        checkpoint = adopt(folder)
        longest = min(limit, int(SMALL["max_position_embeddings"]))
        assert checkpoint.manifest.max_tokens == longest
        text = " ".join(TEXTS[:9])
        assert_same_probabilities(folder, checkpoint, [text], truncation=True, max_length=longest)

    def test_long_texts_are_truncated_on_the_side_that_the_tokenizer_names(
        self, tmp_path: Path
    ) -> None:
        folder = save_classifier(tmp_path / "made")
        save_tokenizer(folder, model_max_length=12, truncation_side="left")
        assert_same_probabilities(folder, adopt(folder), [" ".join(TEXTS[:9])], truncation=True)


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def save_as(auto: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with silence_transformers(), torch.random.fork_rng(devices=[]):
            auto.from_pretrained(folder).save_pretrained(folder)

    return change


def add_files(*names: str, remove_config: bool = False) -> Callable[[Path], None]:
    """Add files of another kind of model; without its configuration or its classification head."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_text("{}")
        if remove_config:
            (folder / "config.json").unlink()
        else:
            save_as(AutoModel)(folder)

    return change


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a PEFT adapter": (add_files("adapter_config.json", remove_config=True), "merge_and_unload"),
    "an adapter beside its model": (add_files("adapter_config.json"), "merge_and_unload"),
    "a SetFit model": (add_files("config_setfit.json", "model_head.pkl"), "a SetFit model"),
    "a pickled head": (add_files("modules.json", "model_head.pkl"), "pickled code"),
    "sentence-transformers": (add_files("modules.json"), "sentence-transformers model"),
    "sentence-transformers without a configuration": (
        add_files("modules.json", remove_config=True),
        "sentence-transformers model",
    ),
    "a token classifier": (save_as(AutoModelForTokenClassification), "ForTokenClassification"),
    "an encoder": (save_as(AutoModel), "no text classification head"),
    "regression": (set_config(problem_type="regression"), "regression"),
    "custom code": (set_config(auto_map={"AutoModel": "x.Y"}), "requires its own code"),
    "another kind of model": (set_config(model_type="t5"), "cannot be converted"),
    "no tokenizer": (remove_tokenizer, "no tokenizer"),
    "duplicate label names": (set_config(id2label=dict.fromkeys("012", "a")), "the same name"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_unsupported_model_is_refused_with_one_line(tmp_path: Path, kind: str) -> None:
    change, message = REFUSED[kind]
    folder = save_classifier(tmp_path / "made")
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        adopt(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not list((tmp_path / "store").glob("*/*"))


@pytest.mark.parametrize("name", ["a b", "..", "", "x" * 65])
def test_an_invalid_model_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_classifier(tmp_path / "made")
    with pytest.raises(CheckpointError, match="--name"):
        adopt(folder, name=name or " ")


class TestFindClassifier:
    def test_finds_a_folder(self, tmp_path: Path) -> None:
        folder = save_classifier(tmp_path / "made")
        assert find_classifier(str(folder)) == folder

    def test_a_checkpoint_is_not_a_classifier(self, tmp_path: Path) -> None:
        checkpoint = adopt(save_classifier(tmp_path / "made"))
        assert find_classifier(str(checkpoint.path)) is None
        assert read_checkpoint(checkpoint.path)

    @pytest.mark.parametrize("source", ["model.tar", "https://host/model.tar", "s3://a/b", "name"])
    def test_archives_and_urls_are_not_classifiers(self, source: str) -> None:
        assert find_classifier(source) is None

    def test_an_unreachable_hub_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="Hugging Face hub") as caught:
            find_classifier("somebody/some-model")
        assert "\n" not in str(caught.value)


def test_sizes_are_read_under_the_names_of_the_family(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made", "distilbert")
    assert adopt(folder).num_heads == DISTILBERT["n_heads"]
