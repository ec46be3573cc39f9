"""Every family of encoders with every kind of fault: the same function, or one line that says why.

Each case changes a small random classifier's folder, as a user may have it.
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
    """Return a classifier of each family, which a test may change."""
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
    placed = {n: file for file, part in zip(files, parts, strict=True) for n in part}
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def full_logits(model: Any) -> Tensor:
    ids = torch.tensor([[3, 9, 4, 20, 7], [8, 29, 2, 2, 11]])
    with torch.no_grad():
        logits: Tensor = model.eval()(ids, steps=4).logits
    return logits


def convert(folder: Path, names: list[str] | None = None, **choices: Any) -> Conversion:
    return convert_encoder(folder, names or NAMES, **choices)


def refusal(folder: Path, names: list[str] | None = None) -> str:
    """Return the one line with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        convert(folder, names)
    told = str(caught.value)
    assert told.startswith(str(folder))
    assert "\n" not in told
    return told.removeprefix(str(folder))


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


class TestSameFunction:
    @pytest.mark.parametrize("form", FORMS)
    def test_of_weights_in_every_form(self, folder: Path, form: str) -> None:
        expected = full_logits(convert(folder).model)
        FORMS[form](folder)
        made = convert(folder)
        torch.testing.assert_close(full_logits(made.model), expected)
        assert made.difference is not None
        assert made.difference < TOLERANCE
        assert "kept" in " ".join(made.notes)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_of_weights_in_half_precision(self, folder: Path, dtype: torch.dtype) -> None:
        cast(folder, dtype)
        half = load_file(folder / WEIGHTS)
        made = convert(folder)
        assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
        word = next(w for name, w in half.items() if name.endswith("word_embeddings.weight"))
        assert torch.equal(made.model.encoder.embeddings.word.weight, word.float())

    @pytest.mark.parametrize("family", SIZES)
    @pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM])
    def test_of_an_encoder_without_a_classifier(
        self, tmp_path: Path, family: str, kind: Any
    ) -> None:
        save(family, tmp_path, kind)
        made = convert(tmp_path)
        assert made.model.head is None
        assert made.difference is not None
        assert made.difference < TOLERANCE
        left_out = (
            kind is AutoModelForMaskedLM or family == "roberta"
        )  # its classifiers do not pool
        assert ("another task" in " ".join(made.notes)) == left_out

    @pytest.mark.parametrize("family", SIZES)
    def test_a_classifier_of_tokens_lends_its_encoder_only(
        self, tmp_path: Path, family: str
    ) -> None:
        save(family, tmp_path, AutoModelForTokenClassification)
        assert convert(tmp_path).model.head is None

    def test_a_multiple_choice_model_lends_its_encoder_only(self, tmp_path: Path) -> None:
        save("bert", tmp_path, BertForMultipleChoice)
        assert convert(tmp_path).model.head is None

    @pytest.mark.parametrize("pad", [0, 1, 4])
    def test_positions_begin_after_the_padding_token(self, tmp_path: Path, pad: int) -> None:
        save("roberta", tmp_path, pad_token_id=pad)
        made = convert(tmp_path)
        assert made.model.config.max_position_embeddings == 22 - pad - 1

    def test_without_token_types_a_pair_is_two_texts(self, folder: Path) -> None:
        model = convert(folder).model.eval()
        ids, types = torch.tensor([[3, 9, 4, 20, 7]]), torch.tensor([[0, 0, 0, 1, 1]])
        with torch.no_grad():
            marked = model(ids, token_type_ids=types, steps=4).logits
            plain = model(ids, steps=4).logits
        assert torch.equal(marked, plain) == (folder.name != "bert")

    @pytest.mark.parametrize("name", sorted(ACTIVATIONS))
    def test_activations_are_those_of_transformers(self, name: str) -> None:
        x = torch.linspace(-9, 9, 400)
        torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))

    @pytest.mark.parametrize("name", sorted(set(ACT2FN) - {"prelu", "xielu"}))
    def test_every_activation_is_converted_or_refused(self, tmp_path: Path, name: str) -> None:
        save("bert", tmp_path, hidden_act=name)
        if name in ACTIVATIONS:
            convert(tmp_path)
        else:
            assert "unknown activation" in refusal(tmp_path)

    def test_the_random_state_is_left_alone(self, folder: Path) -> None:
        # the network's new parts draw from it: which format the weights have must not matter
        torch.manual_seed(3)
        first = convert(folder, ["a", "b"]).model.classifier.weight
        to_bin(folder)
        torch.manual_seed(3)
        assert torch.equal(convert(folder, ["a", "b"]).model.classifier.weight, first)


def poison(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def set_one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            name = next(n for n in sorted(weights) if "layer.1" in n)
            weights[name].view(-1)[0] = value
            return weights

        set_weights(folder, set_one)

    return change


def add_weight(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        named = name.format(FAMILIES[folder.name].prefix)
        set_weights(folder, lambda weights: weights | {named: torch.zeros(2)})

    return change


def drop(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        places = {ours: theirs for theirs, ours in FAMILIES[folder.name].head.items()}
        name = places.get(pattern, pattern)
        set_weights(folder, lambda ws: {n: w for n, w in ws.items() if name not in n})

    return change


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pickle-was-run",))


def pickle_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Pickled()}, folder / BIN)


def lose_shard(folder: Path) -> None:
    shard(folder, "safetensors")
    next(folder.glob("model-00002*")).unlink()


def cut_short(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def flag(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **values)


def fewer_layers(folder: Path) -> None:
    set_config(folder, **{"n_layers" if folder.name == "distilbert" else "num_hidden_layers": 1})


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "relative positions": (flag(position_embedding_type="relative_key"), "'relative_key'"),
    "other positions": (flag(position_embedding_type="rotary"), "position_embedding_type"),
    "a decoder": (flag(is_decoder=True), "is_decoder"),
    "cross-attention": (flag(add_cross_attention=True), "add_cross_attention"),
    "quantized": (flag(quantization_config={"load_in_8bit": True}), "quantization_config"),
    "its own code": (flag(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "another embedding size": (flag(embedding_size=8, hidden_size=16), "embedding_size"),
    "sizes of a wrong type": (flag(vocab_size="thirty"), "vocab_size"),
    "another vocabulary": (flag(vocab_size=31), "has shape [30, 16]"),
    "fewer layers than weights": (fewer_layers, "unexpected weights"),
    "more labels than rows": (
        flag(id2label={str(i): str(i) for i in range(4)}, label2id={str(i): i for i in range(4)}),
        "has shape [3",
    ),
    "NaN": (poison(float("nan")), "layer.1."),
    "infinity": (poison(float("-inf")), "not finite"),
    "beyond float16": (poison(1e6), "exceeds the range of float16"),
    "unknown weight in the encoder": (
        add_weight("{}encoder.layer.0.attention.self.distance_embedding.weight"),
        "distance_embedding",
    ),
    "unknown weight on top": (add_weight("extra.weight"), "extra.weight"),
    "a weight is missing": (drop("layer.1.output"), "missing weights"),
    "half of the head is missing": (drop("head"), "missing weights"),
    "the classifier is missing": (drop("classifier"), "missing weights"),
    "pickled code": (pickle_code, "more than tensors"),
    "a shard is missing": (lose_shard, "not an encoder folder"),
    "a file is cut short": (cut_short, "not an encoder folder"),
    "an adapter": (lambda f: (f / "adapter_config.json").touch(), "adapter"),
    "regression": (flag(problem_type="regression"), "regression"),
}


class TestRefusals:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_one_line_names_the_cause(
        self, folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        change, message = FAULTS[fault]
        change(folder)
        assert message in refusal(folder)
        assert not Path("pickle-was-run").exists()

    @pytest.mark.parametrize("family", SIZES)
    def test_one_output(self, tmp_path: Path, family: str) -> None:
        save(family, tmp_path, labels=["score"])
        assert "regression" in refusal(tmp_path)

    @pytest.mark.parametrize("family", SIZES)
    def test_too_few_positions_for_any_text(self, tmp_path: Path, family: str) -> None:
        first = 2 if family == "roberta" else 0
        save(family, tmp_path, max_position_embeddings=first + 2)
        assert "positions" in refusal(tmp_path)

    def test_keys_that_are_not_used_are_named(self, folder: Path) -> None:
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
    def test_a_conversion_that_changes_the_function(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], None]
    ) -> None:
        """Whatever is read wrongly, the comparison with the source finds it."""
        right = conversion.BudgetFormerConfig

        def wrong(**fields: Any) -> Any:
            config = right(**fields)
            damage(config)
            return config

        monkeypatch.setattr(conversion, "BudgetFormerConfig", wrong)
        assert "result differs from it" in refusal(folder)

    @pytest.mark.parametrize("place", ["position", "segment", "word"])
    def test_a_conversion_that_takes_a_wrong_row(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        right = conversion._rename

        def wrong(source: Any) -> dict[str, Tensor]:
            weights = right(source)
            name = f"embeddings.{place}.weight"
            weights[name] = weights[name].clone()
            weights[name][-1] += 0.5 * torch.arange(16)
            return weights

        monkeypatch.setattr(conversion, "_rename", wrong)
        assert "result differs from it" in refusal(folder)


class TestLabels:
    """A head keeps the meaning of its rows, or is not kept."""

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_any_order(self, folder: Path, order: tuple[int, ...]) -> None:
        expected = full_logits(convert(folder).model)
        names = [NAMES[i] for i in order]
        model = convert(folder, names).model
        torch.testing.assert_close(full_logits(model), expected[:, list(order)])
        assert model.config.id2label == dict(enumerate(names))

    def test_names_in_other_case(self, folder: Path) -> None:
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
            (["LABEL_0", "LABEL_1", "LABEL_2"], NAMES, True, [0, 1, 2]),  # labels.json says so
            (["one", "two", "three"], NAMES, True, None),
            (["one", "two", "three"], ["0", "1", "2"], False, None),
            (["calm", "Calm", "glad"], ["calm", "glad", "sad"], False, None),
            (["calm", "Calm", "glad"], ["calm", "Calm", "glad"], False, None),
            (NAMES, ["calm", "glad"], False, None),
            (NAMES, [*NAMES, "tired"], False, None),
            (["a", "b"], ["a", "c"], False, None),
        ],
    )
    def test_which_head_is_kept(
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
    def test_of_another_problem(self, tmp_path: Path, theirs: str | None, ours: str) -> None:
        save("bert", tmp_path, problem_type=theirs)
        made = convert(tmp_path, problem_type=ours)
        assert (made.model.head is not None) == (theirs in (None, ours))
