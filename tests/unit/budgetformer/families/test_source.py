"""Folders in every form that users have are converted, or refused with one line.

Each case changes the folder of a small random classifier.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMultipleChoice,
    DistilBertConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.activations import ACT2FN

from budgetformer.errors import CheckpointError
from budgetformer.families import FAMILIES, conversion
from budgetformer.families.conversion import TOLERANCE, Conversion, convert_encoder
from budgetformer.model.activations import ACTIVATIONS, activation
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.modeling import silence_transformers

NAMES = ["calm", "glad", "sad"]
WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"intermediate_size": 24, "max_position_embeddings": 20},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"intermediate_size": 24, "max_position_embeddings": 22}
    | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    | {"max_position_embeddings": 20},
}
CONFIGS: dict[str, Any] = {"bert": BertConfig, "roberta": RobertaConfig}
CONFIGS["distilbert"] = DistilBertConfig
Make = Callable[..., Path]


def save(
    family: str,
    folder: Path,
    kind: Any = AutoModelForSequenceClassification,
    labels: list[str] | None = None,
    **changes: Any,
) -> PreTrainedModel:
    names = dict(enumerate(labels or NAMES))
    config = CONFIGS[family](
        vocab_size=30,
        initializer_range=0.3,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **SIZES[family] | changes,
    )
    with torch.random.fork_rng(devices=[]), silence_transformers():
        torch.manual_seed(0)
        model: PreTrainedModel = (
            kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.2)
        model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifiers")
    for family in SIZES:
        save(family, root / family)
    return root


@pytest.fixture(params=sorted(SIZES))
def folder(request: pytest.FixtureRequest, classifiers: Path, tmp_path: Path) -> Path:
    """Return a copy of a classifier of each family, for a test to change."""
    return Path(shutil.copytree(classifiers / request.param, tmp_path / request.param))


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / WEIGHTS))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def cast(folder: Path, dtype: torch.dtype) -> None:
    set_weights(folder, lambda weights: {name: w.to(dtype) for name, w in weights.items()})


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / BIN)
    (folder / WEIGHTS).unlink()


def to_old_names(folder: Path) -> None:
    def old(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return name.replace("LayerNorm.bias", "LayerNorm.beta")

    set_weights(folder, lambda weights: {old(name): w for name, w in weights.items()})


def shard(folder: Path, suffix: str) -> None:
    """Split the weights over two files and an index, as `save_pretrained` does with large ones."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    stem, write = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    files = [f"{stem}-{i:05d}-of-00002.{suffix}" for i in (1, 2)]
    parts = [dict(list(weights.items())[i::2]) for i in (0, 1)]
    for file, part in zip(files, parts, strict=True):
        options = {"metadata": {"format": "pt"}} if suffix == "safetensors" else {}
        write(part, folder / file, **options)
    weight_map = {n: file for file, part in zip(files, parts, strict=True) for n in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def full_logits(model: Any) -> Tensor:
    ids = torch.tensor([[3, 9, 4, 20, 7], [8, 29, 2, 2, 11]])
    with torch.no_grad():
        logits: Tensor = model.eval()(ids, steps=4).logits
    return logits


def convert(folder: Path, names: list[str] | None = None, **choices: Any) -> Conversion:
    return convert_encoder(folder, names or NAMES, **choices)


def refusal(folder: Path, names: list[str] | None = None) -> str:
    """Return the message that refuses a folder, without the path that begins it."""
    with pytest.raises(CheckpointError) as caught:
        convert(folder, names)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message.removeprefix(str(folder))


FORMS: dict[str, Callable[[Path], None]] = {
    "old norm names": to_old_names,
    "bin": to_bin,
    "sharded safetensors": lambda folder: shard(folder, "safetensors"),
    "sharded bin": lambda folder: shard(folder, "bin"),
    "chunked feed-forward": lambda folder: set_config(folder, chunk_size_feed_forward=3),
    "absolute positions by name": lambda folder: set_config(
        folder, position_embedding_type="absolute"
    ),
    "no architectures": lambda folder: set_config(folder, architectures=None),
}


class TestConversion:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_of_weights_gives_the_same_logits(self, folder: Path, form: str) -> None:
        expected = full_logits(convert(folder).model)
        FORMS[form](folder)
        made = convert(folder)
        torch.testing.assert_close(full_logits(made.model), expected)
        assert made.difference is not None
        assert made.difference < TOLERANCE
        assert "kept" in " ".join(made.notes)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_weights_become_float32(self, folder: Path, dtype: torch.dtype) -> None:
        cast(folder, dtype)
        half = load_file(folder / WEIGHTS)
        made = convert(folder)
        assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
        word = next(w for name, w in half.items() if name.endswith("word_embeddings.weight"))
        assert torch.equal(made.model.encoder.embeddings.word.weight, word.float())

    @pytest.mark.parametrize("family", SIZES)
    @pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM])
    def test_an_encoder_without_a_classifier_gets_a_new_one(
        self, tmp_path: Path, family: str, kind: Any
    ) -> None:
        save(family, tmp_path, kind)
        made = convert(tmp_path)
        assert made.model.head is None
        assert made.difference is not None
        assert made.difference < TOLERANCE
        # RoBERTa's encoder has a pooler, which its classifiers do not use.
        has_unused_weights = kind is AutoModelForMaskedLM or family == "roberta"
        assert ("another task" in " ".join(made.notes)) == has_unused_weights

    @pytest.mark.parametrize("family", SIZES)
    def test_only_the_encoder_of_a_token_classifier_is_converted(
        self, tmp_path: Path, family: str
    ) -> None:
        save(family, tmp_path, AutoModelForTokenClassification)
        assert convert(tmp_path).model.head is None

    def test_only_the_encoder_of_a_multiple_choice_model_is_converted(self, tmp_path: Path) -> None:
        save("bert", tmp_path, BertForMultipleChoice)
        assert convert(tmp_path).model.head is None

    @pytest.mark.parametrize("pad", [0, 1, 4])
    def test_positions_up_to_the_padding_token_are_dropped(self, tmp_path: Path, pad: int) -> None:
        save("roberta", tmp_path, pad_token_id=pad)
        made = convert(tmp_path)
        assert made.model.config.max_position_embeddings == 22 - pad - 1

    def test_token_types_matter_only_for_families_that_have_them(self, folder: Path) -> None:
        model = convert(folder).model.eval()
        ids, types = torch.tensor([[3, 9, 4, 20, 7]]), torch.tensor([[0, 0, 0, 1, 1]])
        with torch.no_grad():
            marked = model(ids, token_type_ids=types, steps=4).logits
            plain = model(ids, steps=4).logits
        assert torch.equal(marked, plain) == (folder.name != "bert")

    @pytest.mark.parametrize("name", sorted(ACTIVATIONS))
    def test_activations_equal_those_of_transformers(self, name: str) -> None:
        x = torch.linspace(-9, 9, 400)
        torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))

    @pytest.mark.parametrize("name", sorted(set(ACT2FN) - {"prelu", "xielu"}))
    def test_every_activation_is_converted_or_refused(self, tmp_path: Path, name: str) -> None:
        save("bert", tmp_path, hidden_act=name)
        if name in ACTIVATIONS:
            convert(tmp_path)
        else:
            assert "unknown activation" in refusal(tmp_path)

    def test_new_weights_do_not_depend_on_the_format_of_the_source(self, folder: Path) -> None:
        torch.manual_seed(3)
        first = convert(folder, ["a", "b"]).model.classifier.weight
        to_bin(folder)
        torch.manual_seed(3)
        assert torch.equal(convert(folder, ["a", "b"]).model.classifier.weight, first)


def set_first_weight(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def set_value(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            name = next(n for n in sorted(weights) if "layer.1" in n)
            weights[name].view(-1)[0] = value
            return weights

        set_weights(folder, set_value)

    return change


def add_weight(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        named = name.format(FAMILIES[folder.name].prefix)
        set_weights(folder, lambda weights: weights | {named: torch.zeros(2)})

    return change


def remove_weights(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        source_names = {ours: theirs for theirs, ours in FAMILIES[folder.name].head.items()}
        name = source_names.get(pattern, pattern)
        set_weights(folder, lambda ws: {n: w for n, w in ws.items() if name not in n})

    return change


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pickle-was-run",))


def pickle_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Pickled()}, folder / BIN)


def remove_shard(folder: Path) -> None:
    shard(folder, "safetensors")
    next(folder.glob("model-00002*")).unlink()


def truncate_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def configured(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **values)


def fewer_layers(folder: Path) -> None:
    set_config(folder, **{"n_layers" if folder.name == "distilbert" else "num_hidden_layers": 1})


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "relative positions": (configured(position_embedding_type="relative_key"), "'relative_key'"),
    "other positions": (configured(position_embedding_type="rotary"), "position_embedding_type"),
    "a decoder": (configured(is_decoder=True), "is_decoder"),
    "cross-attention": (configured(add_cross_attention=True), "add_cross_attention"),
    "quantized": (configured(quantization_config={"load_in_8bit": True}), "quantization_config"),
    "custom code": (configured(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "another embedding size": (configured(embedding_size=8, hidden_size=16), "embedding_size"),
    "sizes of a wrong type": (configured(vocab_size="thirty"), "vocab_size"),
    "another vocabulary": (configured(vocab_size=31), "has shape [30, 16]"),
    "fewer layers than weights": (fewer_layers, "unexpected weights"),
    "more labels than rows": (
        configured(
            id2label={str(i): str(i) for i in range(4)}, label2id={str(i): i for i in range(4)}
        ),
        "has shape [3",
    ),
    "NaN": (set_first_weight(float("nan")), "layer.1."),
    "infinity": (set_first_weight(float("-inf")), "not finite"),
    "beyond float16": (set_first_weight(1e6), "exceeds the range of float16"),
    "unknown weight in the encoder": (
        add_weight("{}encoder.layer.0.attention.self.distance_embedding.weight"),
        "distance_embedding",
    ),
    "unknown weight outside the encoder": (add_weight("extra.weight"), "extra.weight"),
    "a weight is missing": (remove_weights("layer.1.output"), "missing weights"),
    "half of the head is missing": (remove_weights("head"), "missing weights"),
    "the classifier is missing": (remove_weights("classifier"), "missing weights"),
    "pickled code": (pickle_code, "more than tensors"),
    "a shard is missing": (remove_shard, "not an encoder folder"),
    "a file is cut short": (truncate_weights, "not an encoder folder"),
    "an adapter": (lambda f: (f / "adapter_config.json").touch(), "adapter"),
    "regression": (configured(problem_type="regression"), "regression"),
}


class TestRefusals:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_faulty_folder_is_refused_and_its_code_never_runs(
        self, folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        change, message = FAULTS[fault]
        change(folder)
        assert message in refusal(folder)
        assert not Path("pickle-was-run").exists()

    @pytest.mark.parametrize("family", SIZES)
    def test_a_single_output_is_refused_as_regression(self, tmp_path: Path, family: str) -> None:
        save(family, tmp_path, labels=["score"])
        assert "regression" in refusal(tmp_path)

    @pytest.mark.parametrize("family", SIZES)
    def test_too_few_positions_are_refused(self, tmp_path: Path, family: str) -> None:
        first = 2 if family == "roberta" else 0
        save(family, tmp_path, max_position_embeddings=first + 2)
        assert "positions" in refusal(tmp_path)

    def test_unused_keys_of_the_configuration_are_noted(self, folder: Path) -> None:
        set_config(folder, attention_window=64, torch_dtype="float32")
        notes = [note for note in convert(folder).notes if "config.json" in note]
        assert len(notes) == 1
        assert notes[0].endswith(": attention_window")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda c: setattr(c, "layer_norm_eps", 1e-2),
            lambda c: setattr(c, "hidden_act", "relu"),
        ],
    )
    def test_a_wrongly_read_configuration_is_detected(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], None]
    ) -> None:
        """The conversion compares its result with the source."""
        right = conversion.BudgetFormerConfig

        def wrong(**fields: Any) -> Any:
            config = right(**fields)
            damage(config)
            return config

        monkeypatch.setattr(conversion, "BudgetFormerConfig", wrong)
        assert "result differs from it" in refusal(folder)

    @pytest.mark.parametrize("kind", ["position", "segment", "word"])
    def test_a_wrongly_copied_embedding_is_detected(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        right = conversion._rename

        def wrong(source: Any) -> dict[str, Tensor]:
            weights = right(source)
            name = f"embeddings.{kind}.weight"
            weights[name] = weights[name].clone()
            weights[name][-1] += 0.5 * torch.arange(16)
            return weights

        monkeypatch.setattr(conversion, "_rename", wrong)
        assert "result differs from it" in refusal(folder)


class TestLabels:
    """The classification head is kept only if each of its rows keeps its label."""

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_rows_follow_the_order_of_the_labels(
        self, folder: Path, order: tuple[int, ...]
    ) -> None:
        expected = full_logits(convert(folder).model)
        names = [NAMES[i] for i in order]
        model = convert(folder, names).model
        torch.testing.assert_close(full_logits(model), expected[:, list(order)])
        assert model.config.id2label == dict(enumerate(names))

    def test_label_names_match_without_case_and_spaces(self, folder: Path) -> None:
        made = convert(folder, ["SAD", "Calm", " glad "])
        expected = full_logits(convert(folder).model)[:, [2, 0, 1]]
        torch.testing.assert_close(full_logits(made.model), expected)

    @pytest.mark.parametrize(
        ("theirs", "ours", "numbered", "rows"),
        [
            (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"], False, [0, 1, 2]),
            (["LABEL_0", "LABEL_1", "LABEL_2"], ["2", "0", "1"], False, [2, 0, 1]),
            (["0", "1", "2"], ["1", "0", "2"], False, [1, 0, 2]),
            (["LABEL_0", "LABEL_1", "LABEL_2"], NAMES, False, None),  # sorted by name, not by id
            (["LABEL_0", "LABEL_1", "LABEL_2"], NAMES, True, [0, 1, 2]),  # numbered by labels.json
            (["one", "two", "three"], NAMES, True, None),
            (["one", "two", "three"], ["0", "1", "2"], False, None),
            (["calm", "Calm", "glad"], ["calm", "glad", "sad"], False, None),
            (["calm", "Calm", "glad"], ["calm", "Calm", "glad"], False, None),
            (NAMES, ["calm", "glad"], False, None),
            (NAMES, [*NAMES, "tired"], False, None),
            (["a", "b"], ["a", "c"], False, None),
        ],
    )
    def test_the_head_is_kept_if_its_labels_match(
        self,
        tmp_path: Path,
        theirs: list[str],
        ours: list[str],
        numbered: bool,
        rows: list[int] | None,
    ) -> None:
        whole = save("bert", tmp_path, labels=theirs)
        made = convert(tmp_path, ours, numbered=numbered)
        notes = [note for note in made.notes if "classification head" in note]
        assert len(notes) == 1
        assert ("not kept" in notes[0]) == (rows is None)
        if rows is None:
            assert made.model.head is None
        else:
            assert torch.equal(made.model.classifier.weight, whole.classifier.weight[rows])
            assert torch.equal(made.model.classifier.bias, whole.classifier.bias[rows])

    @pytest.mark.parametrize("theirs", [MULTI_LABEL, "single_label_classification", None])
    @pytest.mark.parametrize("ours", [MULTI_LABEL, "single_label_classification"])
    def test_a_head_for_another_problem_type_is_not_kept(
        self, tmp_path: Path, theirs: str | None, ours: str
    ) -> None:
        save("bert", tmp_path, problem_type=theirs)
        made = convert(tmp_path, problem_type=ours)
        assert (made.model.head is not None) == (theirs in (None, ours))
