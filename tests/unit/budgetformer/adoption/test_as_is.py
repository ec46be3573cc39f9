"""A classifier of somebody else is served as it is: Transformers' answers, or one clear line."""

from __future__ import annotations

import json
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

from budgetformer.adoption.as_is import add_classifier, find_classifier
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import CheckpointError
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


def theirs(folder: Path, texts: list[Any], **settings: Any) -> list[dict[str, float]]:
    """Return the probabilities of Transformers' pipeline by label."""
    with silence_transformers():
        ask = pipeline("text-classification", model=str(folder), top_k=None, dtype=torch.float32)
    given = [{"text": t[0], "text_pair": t[1]} if isinstance(t, tuple) else t for t in texts]
    answers = [ask([one], **settings)[0] for one in given]
    return [{label["label"]: label["score"] for label in answer} for answer in answers]


def ours(checkpoint: Checkpoint, texts: list[Any]) -> list[dict[str, float]]:
    labels = checkpoint.manifest.labels
    if isinstance(texts[0], tuple):
        found = Classifier(checkpoint.path)([a for a, _ in texts], [b for _, b in texts])
    else:
        found = Classifier(checkpoint.path)(texts)
    return [dict(zip(labels, answer.probs, strict=True)) for answer in found]


def assert_same(folder: Path, checkpoint: Checkpoint, texts: list[Any], **settings: Any) -> None:
    for own, their in zip(ours(checkpoint, texts), theirs(folder, texts, **settings), strict=True):
        assert own == pytest.approx(their, abs=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_probabilities_are_those_of_the_pipeline(tmp_path: Path, family: str) -> None:
    folder = save_classifier(tmp_path / "made", family)
    checkpoint = adopt(folder)
    assert_same(folder, checkpoint, TEXTS[:5])
    assert checkpoint.label == "made:1"
    assert checkpoint.manifest.labels == ("calm", "glad", "sad")
    checkpoint.verify()


def test_pairs(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    assert_same(folder, adopt(folder), PAIRS[:5])


def test_pairs_of_a_tokenizer_without_token_types(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    save_tokenizer(folder, model_input_names=["input_ids", "attention_mask"])
    assert_same(folder, adopt(folder), PAIRS[:5])


def test_two_labels_without_names(tmp_path: Path) -> None:
    """Transformers writes no labels at all where they are what it assumes."""
    folder = save_classifier(tmp_path / "made", id2label=None, label2id=None)
    assert "id2label" not in json.loads((folder / "config.json").read_text())
    checkpoint = adopt(folder)
    assert checkpoint.manifest.labels == ("LABEL_0", "LABEL_1")
    assert_same(folder, checkpoint, TEXTS[:5])


def test_several_labels_of_a_text(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made", problem_type="multi_label_classification")
    checkpoint = adopt(folder)
    assert checkpoint.multi_label
    assert_same(folder, checkpoint, TEXTS[:5])


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
    assert_same(folder, checkpoint, TEXTS[:5])


def test_every_quality_is_all_heads(tmp_path: Path) -> None:
    ask = Classifier(adopt(save_classifier(tmp_path / "made")).path)
    found = [ask(TEXTS[:3], quality=quality) for quality in ("fast", "balanced", "best", 2.0)]
    assert all(answers == found[0] for answers in found)
    assert {(a.macs, a.budget) for a in found[0]} == {(a.dense_macs, 1) for a in found[0]}


def test_the_same_classifier_is_added_once(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    assert adopt(folder).path == adopt(folder).path
    with silence_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        model.classifier.bias.data += 0.5
        model.save_pretrained(folder)
    assert adopt(folder).label == "made:2"
    assert adopt(folder, name="other").label == "other:1"


def test_texts_give_int8_its_ranges(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made")
    texts = write_jsonl(tmp_path / "sample.jsonl", ({"text": text} for text in TEXTS))
    checkpoint = adopt(folder, texts=texts)
    assert len(checkpoint.manifest.ranges) == SMALL["num_hidden_layers"]
    assert adopt(folder, texts=texts).path == checkpoint.path


class TestTokenizers:
    def words(self, checkpoint: Checkpoint, folder: Path, text: str) -> None:
        with silence_transformers():
            expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert Classifier(checkpoint.path)([text])[0].tokens == len(expected)
        assert_same(folder, checkpoint, [text])

    def test_without_tokenizer_json(self, tmp_path: Path) -> None:
        folder = save_classifier(tmp_path / "made")
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        self.words(adopt(folder), folder, TEXTS[0])

    @pytest.mark.parametrize("lower", [True, False])
    def test_casing_that_differs_from_its_configuration(self, tmp_path: Path, lower: bool) -> None:
        folder = save_classifier(tmp_path / "made")
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        self.words(adopt(folder), folder, TEXTS[0].upper())

    @pytest.mark.parametrize("limit", [int(1e30), 12])
    def test_its_longest_input(self, tmp_path: Path, limit: int) -> None:
        folder = save_classifier(tmp_path / "made")
        save_tokenizer(folder, model_max_length=limit)
        checkpoint = adopt(folder)
        longest = min(limit, int(SMALL["max_position_embeddings"]))
        assert checkpoint.manifest.max_tokens == longest
        text = " ".join(TEXTS[:9])
        assert_same(folder, checkpoint, [text], truncation=True, max_length=longest)

    def test_longer_texts_are_cut_at_its_own_side(self, tmp_path: Path) -> None:
        folder = save_classifier(tmp_path / "made")
        save_tokenizer(folder, model_max_length=12, truncation_side="left")
        assert_same(folder, adopt(folder), [" ".join(TEXTS[:9])], truncation=True)


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def of_class(auto: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with silence_transformers(), torch.random.fork_rng(devices=[]):
            auto.from_pretrained(folder).save_pretrained(folder)

    return change


def touch(*names: str, lose: bool = False) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_text("{}")
        if lose:
            (folder / "config.json").unlink()
        else:
            of_class(AutoModel)(folder)

    return change


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a PEFT adapter": (touch("adapter_config.json", lose=True), "merge_and_unload"),
    "an adapter beside its model": (touch("adapter_config.json"), "merge_and_unload"),
    "a SetFit model": (touch("config_setfit.json", "model_head.pkl"), "a SetFit model"),
    "a pickled head": (touch("modules.json", "model_head.pkl"), "pickled code"),
    "sentence-transformers": (touch("modules.json"), "sentence-transformers model"),
    "its folder of modules": (touch("modules.json", lose=True), "sentence-transformers model"),
    "a token classifier": (of_class(AutoModelForTokenClassification), "ForTokenClassification"),
    "an encoder": (of_class(AutoModel), "no text classification head"),
    "regression": (set_config(problem_type="regression"), "regression"),
    "code of its own": (set_config(auto_map={"AutoModel": "x.Y"}), "requires its own code"),
    "another kind of model": (set_config(model_type="t5"), "cannot be converted"),
    "no tokenizer": (lose_tokenizer, "no tokenizer"),
    "two labels of one name": (set_config(id2label=dict.fromkeys("012", "a")), "the same name"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    change, message = REFUSED[kind]
    folder = save_classifier(tmp_path / "made")
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        adopt(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not list((tmp_path / "store").glob("*/*"))


@pytest.mark.parametrize("name", ["a b", "..", "", "x" * 65])
def test_a_name_that_no_model_may_have(tmp_path: Path, name: str) -> None:
    folder = save_classifier(tmp_path / "made")
    with pytest.raises(CheckpointError, match="--name"):
        adopt(folder, name=name or " ")


class TestFinding:
    def test_a_folder(self, tmp_path: Path) -> None:
        folder = save_classifier(tmp_path / "made")
        assert find_classifier(str(folder)) == folder

    def test_a_checkpoint_is_none(self, tmp_path: Path) -> None:
        checkpoint = adopt(save_classifier(tmp_path / "made"))
        assert find_classifier(str(checkpoint.path)) is None
        assert read_checkpoint(checkpoint.path)

    @pytest.mark.parametrize("source", ["model.tar", "https://host/model.tar", "s3://a/b", "one"])
    def test_other_sources(self, source: str) -> None:
        assert find_classifier(source) is None

    def test_a_hub_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="Hugging Face hub") as caught:
            find_classifier("somebody/some-model")
        assert "\n" not in str(caught.value)


def test_distilbert_has_the_sizes_of_its_family(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "made", "distilbert")
    assert adopt(folder).num_heads == DISTILBERT["n_heads"]
