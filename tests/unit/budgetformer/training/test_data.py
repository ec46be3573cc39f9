"""Data sets: labels and their names, errors, tokenization, batches and samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from budgetformer.errors import BudgetFormerError, DataError
from budgetformer.training import labels as labels_module
from budgetformer.training.data import Examples, TokenizedTexts, read_examples
from budgetformer.training.labels import check_classes
from tests.support.networks import PROPERTY
from tests.support.texts import topic_examples

Rows = list[dict[str, Any]]

GREETINGS: Rows = [
    {"text": "Good morning, everyone.", "label": "hello"},
    {"text": 'See you "soon",\nmy friend', "label": "bye"},
    {"text": "", "label": "hello"},
]


def write_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: Rows) -> None:
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "parquet": write_parquet,
    "csv": write_csv,
    "jsonl": write_jsonl,
}


@pytest.fixture(params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(folder: Path, kind: str, rows: Rows) -> Path:
    path = folder / f"rows.{kind}"
    WRITERS[kind](path, rows)
    return path


class TestReading:
    def test_texts_and_labels_are_read(self, tmp_path: Path, kind: str) -> None:
        examples = read_examples(write(tmp_path, kind, GREETINGS))
        assert examples.texts == [row["text"] for row in GREETINGS]
        assert examples.names == ["bye", "hello"]
        assert examples.labels.tolist() == [1, 0, 1]
        assert examples.pairs is None
        assert not examples.multi_label
        assert len(examples) == 3

    def test_class_ids_may_be_integers(self, tmp_path: Path, kind: str) -> None:
        ids = [2, *range(11), 0]
        rows = [{"text": f"text {i}", "label": i} for i in ids]
        examples = read_examples(write(tmp_path, kind, rows))
        assert examples.labels.tolist() == ids
        assert examples.names == [str(i) for i in range(11)]

    def test_pairs_are_read(self, tmp_path: Path, kind: str) -> None:
        rows = [{"text": "A dog runs.", "text_pair": "An animal moves.", "label": "yes"}]
        examples = read_examples(write(tmp_path, kind, rows))
        assert examples.pairs == ["An animal moves."]

    def test_other_columns_are_ignored(self, tmp_path: Path, kind: str) -> None:
        rows = [{"id": 7, "text": "One.", "label": "a", "source": "here"}]
        assert read_examples(write(tmp_path, kind, rows)).texts == ["One."]

    @pytest.mark.parametrize("many_kind", ["parquet", "jsonl"])
    def test_a_text_may_have_several_label_names(self, tmp_path: Path, many_kind: str) -> None:
        rows = [
            {"text": "one", "label": ["sad", "long"]},
            {"text": "two", "label": []},
            {"text": "three", "label": ["happy"]},
        ]
        examples = read_examples(write(tmp_path, many_kind, rows))
        assert examples.multi_label
        assert examples.names == ["happy", "long", "sad"]
        assert examples.labels.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]

    @pytest.mark.parametrize("many_kind", ["parquet", "jsonl"])
    def test_a_text_may_have_several_class_ids(self, tmp_path: Path, many_kind: str) -> None:
        rows = [{"text": "one", "label": [0, 2]}, {"text": "two", "label": [1]}]
        examples = read_examples(write(tmp_path, many_kind, rows))
        assert examples.labels.tolist() == [[1, 0, 1], [0, 1, 0]]

    def test_given_names_define_the_order(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path, kind, GREETINGS)
        examples = read_examples(path, ["hello", "bye", "thanks"])
        assert examples.names == ["hello", "bye", "thanks"]
        assert examples.labels.tolist() == [0, 1, 0]

    def test_class_ids_get_the_given_names(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path, kind, [{"text": "x", "label": 1}])
        assert read_examples(path, ["no", "yes"]).names == ["no", "yes"]

    def test_labels_json_defines_the_order(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "labels.json").write_text('["hello", "bye"]')
        examples = read_examples(write(tmp_path, kind, GREETINGS))
        assert examples.names == ["hello", "bye"]
        assert examples.labels.tolist() == [0, 1, 0]

    @pytest.mark.parametrize("label", ["0101", "007", "True", "1.0", "null", "NA", "1e3", "+1"])
    def test_csv_labels_are_read_as_strings(self, tmp_path: Path, label: str) -> None:
        path = tmp_path / "rows.csv"
        path.write_text(f"text,label\n1,{label}\n2,{label}\n3,x\n")
        examples = read_examples(path)
        assert [examples.names[i] for i in examples.labels] == [label, label, "x"]
        assert examples.texts == ["1", "2", "3"]

    def test_class_ids_get_the_names_of_labels_json(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "labels.json").write_text('["no", "yes", "maybe"]', encoding="utf-8-sig")
        path = write(tmp_path, kind, [{"text": "x", "label": i} for i in (1, 0, 1)])
        examples = read_examples(path)
        assert examples.names == ["no", "yes", "maybe"]
        assert examples.labels.tolist() == [1, 0, 1]

    def test_class_ids_are_converted_to_the_order_of_the_model(
        self, tmp_path: Path, kind: str
    ) -> None:
        (tmp_path / "labels.json").write_text('["no", "yes"]')
        path = write(tmp_path, kind, [{"text": "x", "label": i} for i in (1, 0, 1)])
        assert read_examples(path, ["yes", "no"]).labels.tolist() == [0, 1, 0]
        with pytest.raises(DataError, match="row 1: unknown label 'yes'"):
            read_examples(path, ["ja", "nein"])

    def test_digits_are_names_if_the_class_names_are_digits(self, tmp_path: Path) -> None:
        path = write(tmp_path, "csv", [{"text": "x", "label": label} for label in ("1", "5")])
        assert read_examples(path, ["1", "5"]).labels.tolist() == [0, 1]
        with pytest.raises(DataError, match="row 1: unknown label '1'; known labels: '0101'"):
            read_examples(path, ["0101", "8471"])

    def test_class_ids_get_the_names_of_the_encoder_if_all_have_one(
        self, tmp_path: Path, kind: str
    ) -> None:
        def names(*labels: Any) -> list[str]:
            path = write(tmp_path, kind, [{"text": "x", "label": label} for label in labels])
            return read_examples(path, encoder_names=["neg", "pos"]).names

        assert names(1, 0) == ["neg", "pos"]
        assert names(0, 1, 2) == ["0", "1", "2"]
        assert names("b", "a") == ["a", "b"]

    def test_label_names_in_parquet_metadata_are_used(self, tmp_path: Path) -> None:
        features = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}
        stored = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table({"text": ["a", "b"], "label": [1, 0]}).replace_schema_metadata(stored)
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(table, path)
        assert read_examples(path).names == ["neg", "pos"]
        assert read_examples(path, ["pos", "neg"]).labels.tolist() == [0, 1]
        (tmp_path / "labels.json").write_text('["pos", "neg"]')
        with pytest.raises(DataError, match="the label names in its metadata differ"):
            read_examples(path)

    @pytest.mark.parametrize("many_kind", ["parquet", "jsonl"])
    def test_single_labels_become_lists_for_multi_label_models_but_not_the_reverse(
        self, tmp_path: Path, many_kind: str
    ) -> None:
        rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
        path = write(tmp_path, many_kind, rows)
        found = read_examples(path, ["b", "a"], multi_label=True).labels.tolist()
        assert found == [[0, 1], [1, 0]]
        path = write(tmp_path, many_kind, [{"text": "one", "label": ["a"]}])
        with pytest.raises(DataError, match="row 1.*a list of labels, but each text must have one"):
            read_examples(path, ["a", "b"], multi_label=False)

    def test_given_names_override_labels_json(self, tmp_path: Path) -> None:
        (tmp_path / "labels.json").write_text('["hello", "bye"]')
        examples = read_examples(write(tmp_path, "jsonl", GREETINGS), ["bye", "hello"])
        assert examples.names == ["bye", "hello"]

    @pytest.mark.parametrize("suffix", [".ndjson", ".JSONL"])
    def test_ndjson_and_upper_case_suffixes_are_jsonl(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"rows{suffix}"
        write_jsonl(path, GREETINGS)
        assert len(read_examples(path)) == 3

    def test_texts_of_any_script_are_read(self, tmp_path: Path, kind: str) -> None:
        texts = ["Ünïcödé — “quotes”", "日本語のテキスト", "🙂 emoji", "tab\there"]
        path = write(tmp_path, kind, [{"text": text, "label": "a"} for text in texts])
        assert read_examples(path).texts == texts

    def test_subset_has_the_given_rows(self) -> None:
        examples = Examples(["a", "b", "c"], ["x", "y", "z"], np.array([0, 1, 2]), ["p", "q", "r"])
        some = examples.subset([2, 0])
        assert (some.texts, some.pairs, some.labels.tolist()) == (["c", "a"], ["z", "x"], [2, 0])
        assert some.names == examples.names

    def test_subset_accepts_an_array(self) -> None:
        some = topic_examples().subset(np.array([5, 3]))
        assert some.pairs is None
        assert some.labels.tolist() == [2, 0]


class TestClasses:
    """Checks of the labels before training."""

    def check(self, names: list[str], labels: list[Any]) -> list[str]:
        return check_classes(Path("train.csv"), names, np.array(labels))

    @pytest.mark.parametrize(
        ("labels", "shown"), [([1, 1, 1], "'b'"), ([[1, 1], [1, 1]], "'a', 'b'")]
    )
    def test_a_single_label_is_refused(self, labels: list[Any], shown: str) -> None:
        with pytest.raises(DataError, match=rf"train\.csv: every row has the label {shown}; "):
            self.check(["a", "b"], labels)

    @pytest.mark.parametrize("many", [False, True])
    def test_as_many_labels_as_rows_are_refused(self, many: bool) -> None:
        labels = np.eye(50, dtype=int).tolist() if many else list(range(50))
        with pytest.raises(DataError, match="50 different labels in 50 rows"):
            self.check([f"n{i}" for i in range(50)], labels)

    def test_unusual_labels_are_reported(self) -> None:
        lines = self.check(["a", "A ", "b", "c"], [0, 0, 0, 1, 1, 1, 2])
        assert lines == [
            "7 rows, 4 labels: 'a', 'A ', 'b', 'c'",
            "labels with no row: 'c'",
            "labels with one row only: 'b'",
            "labels that differ only in spaces or upper case: 'a', 'A '",
        ]
        assert self.check(["a", "b"], [[1, 0], [1, 1], [0, 1], [0, 0]]) == [
            "4 rows, 2 labels: 'a', 'b'"
        ]


class TestErrors:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"text": "one"}], r"no column 'label' \(it has 'text'\)"),
            ([{"label": "a"}], r"no column 'text' \(it has 'label'\)"),
            ([{"sentence": "one", "label": "a"}], "no column 'text'"),
        ],
    )
    def test_a_missing_column_is_refused(
        self, tmp_path: Path, kind: str, rows: Rows, message: str
    ) -> None:
        path = write(tmp_path, kind, rows)
        with pytest.raises(DataError, match=message) as caught:
            read_examples(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("null_kind", ["parquet", "jsonl"])
    def test_a_null_text_is_refused(self, tmp_path: Path, null_kind: str) -> None:
        rows = [{"text": "one", "label": "a"}, {"text": None, "label": "a"}]
        with pytest.raises(DataError, match="row 2.*column 'text' holds null"):
            read_examples(write(tmp_path, null_kind, rows))

    @pytest.mark.parametrize("label", ["c", "A", "a ", "0"])
    def test_an_unknown_label_is_refused(self, tmp_path: Path, kind: str, label: str) -> None:
        rows = [{"text": "one", "label": "a"}, {"text": "two", "label": label}]
        with pytest.raises(DataError, match=f"row 2: unknown label '{label}'; known labels: "):
            read_examples(write(tmp_path, kind, rows), ["a", "b"])

    @pytest.mark.parametrize("label", [2, -1, 99])
    def test_an_unknown_class_id_is_refused(self, tmp_path: Path, kind: str, label: int) -> None:
        rows = [{"text": "one", "label": 1}, {"text": "two", "label": label}]
        with pytest.raises(DataError, match=f"row 2: unknown label '?{label}"):
            read_examples(write(tmp_path, kind, rows), ["a", "b"])

    @pytest.mark.parametrize("many_kind", ["parquet", "jsonl"])
    def test_an_unknown_label_among_several_is_refused(
        self, tmp_path: Path, many_kind: str
    ) -> None:
        rows = [{"text": "one", "label": ["a"]}, {"text": "two", "label": ["a", "z"]}]
        with pytest.raises(DataError, match="row 2: unknown label 'z'"):
            read_examples(write(tmp_path, many_kind, rows), ["a", "b"])

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            (None, "the label is null"),
            (1.5, "the label is a floating-point number"),
            (True, "the label is a boolean"),
            ({"a": 1}, "the label is an object"),
            ("", "the label is empty"),
            (" ", "the label is empty"),
            (1, "the label is an integer, unlike the labels of earlier rows"),
            (["a"], "a list of labels"),
            ("\ud800", "column 'label' holds half of a surrogate pair"),
        ],
    )
    @pytest.mark.parametrize("names", [None, ["a", "b"]])
    def test_an_invalid_label_is_refused(
        self, tmp_path: Path, label: Any, message: str, names: list[str] | None
    ) -> None:
        rows = [{"text": "one", "label": "a"}, {"text": "two", "label": label}]
        path = write(tmp_path, "jsonl", rows)
        with pytest.raises(DataError, match=rf"rows\.jsonl, row 2 \(line 2\): {message}"):
            read_examples(path, names, multi_label=False)

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            ("a", "some rows have a list of labels, others a single label"),
            (None, "some rows have a list of labels, others a single label"),
            ([None], "the label is null"),
            ([1], "the label is an integer"),
            ([["a"]], "the label is a list"),
        ],
    )
    def test_an_invalid_list_of_labels_is_refused(
        self, tmp_path: Path, label: Any, message: str
    ) -> None:
        rows = [{"text": "one", "label": ["a"]}, {"text": "two", "label": label}]
        with pytest.raises(DataError, match=f"row 2 .*: {message}"):
            read_examples(write(tmp_path, "jsonl", rows))

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 1, 10_000_000], "row 3: class id 10000000, but the file has only 3 different"),
            ([0, 2, 2], "row 2: class id 2, but the file has only 2"),
            ([1, 2, 1], "row 2: class id 2, but the file has only 2"),
            ([0, -1, 1], "row 2: class id -1"),
        ],
    )
    @pytest.mark.parametrize("id_kind", ["parquet", "jsonl"])
    def test_class_ids_with_gaps_are_refused(
        self, tmp_path: Path, id_kind: str, labels: list[int], message: str
    ) -> None:
        rows = [{"text": "one", "label": label} for label in labels]
        with pytest.raises(DataError, match=message):
            read_examples(write(tmp_path, id_kind, rows))
        listed = write(tmp_path, id_kind, [row | {"label": [row["label"]]} for row in rows])
        with pytest.raises(DataError, match=message):
            read_examples(listed)

    @pytest.mark.parametrize("column", [[True, False], [0.0, 1.0], [b"a", b"b"]])
    def test_parquet_labels_of_another_type_are_refused(
        self, tmp_path: Path, column: list[Any]
    ) -> None:
        rows = [{"text": "one", "label": label} for label in column]
        with pytest.raises(DataError, match=r"rows\.parquet, row 1: the label is a?"):
            read_examples(write(tmp_path, "parquet", rows))

    def test_a_file_without_any_label_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path, "jsonl", [{"text": "one", "label": []}])
        with pytest.raises(DataError, match="no row has a label"):
            read_examples(path)

    def test_too_many_labels_for_memory_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(labels_module, "MAX_MATRIX_BYTES", 1000)
        rows = [{"text": "one", "label": [f"{i}", f"n{i}"]} for i in range(20)]
        with pytest.raises(DataError, match="40 labels are too many for 20 rows"):
            read_examples(write(tmp_path, "jsonl", rows))

    @pytest.mark.parametrize(
        ("name", "content"),
        [("rows.csv", "text,label\n"), ("rows.jsonl", ""), ("rows.jsonl", "\n")],
    )
    def test_a_file_without_rows_is_refused(self, tmp_path: Path, name: str, content: str) -> None:
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(DataError, match=f"{name}: no rows"):
            read_examples(path)

    def test_a_null_second_text_is_refused(self, tmp_path: Path) -> None:
        rows = [{"text": "one", "text_pair": pair, "label": "a"} for pair in ("two", None)]
        with pytest.raises(DataError, match="row 2 .*: column 'text_pair' holds null"):
            read_examples(write(tmp_path, "jsonl", rows))

    @pytest.mark.parametrize(
        "content",
        ["{", "3", '{"hello": 1}', "", '["a", "a"]', '["a", 1]', '["a", ""]', "[" * 10**5],
    )
    def test_an_invalid_labels_json_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "labels.json").write_text(content)
        with pytest.raises(DataError, match=r"labels\.json: "):
            read_examples(write(tmp_path, "jsonl", GREETINGS))

    @pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.json", "rows.tsv", "rows.csv.gz"])
    def test_another_kind_of_file_is_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_text("text,label\none,a\n")
        with pytest.raises(DataError, match=r"not a \.parquet, \.csv or \.jsonl file"):
            read_examples(path)

    def test_a_data_error_is_a_budgetformer_error(self) -> None:
        assert issubclass(DataError, BudgetFormerError)


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer for which a text of n words `w` has n tokens."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "w": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def words(lengths: list[int], max_length: int = 16) -> TokenizedTexts:
    """Return one text of each length, in tokens."""
    return TokenizedTexts(word_tokenizer(), ["w " * n for n in lengths], None, max_length)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=40)


class TestTokens:
    def test_a_text_begins_and_ends_with_special_tokens(self, tokenizer: Tokenizer) -> None:
        tokens = TokenizedTexts(tokenizer, ["The cook baked bread."], None, 32)
        assert tokens.ids[0][[0, -1]].tolist() == [2, 3]
        assert not tokens.types[0].any()

    def test_pairs_have_two_segments(self, tokenizer: Tokenizer) -> None:
        tokens = TokenizedTexts(tokenizer, ["bread"], ["a pie"], 32)
        ids, types = tokens.ids[0].tolist(), tokens.types[0].tolist()
        first = ids.index(3) + 1
        assert types == [0] * first + [1] * (len(ids) - first)
        assert 0 < first < len(ids)

    @pytest.mark.parametrize("paired", [False, True])
    def test_full_ids_have_more_of_long_inputs(self, tokenizer: Tokenizer, paired: bool) -> None:
        texts = ["The cook baked bread. " * 9, "bread"]
        pairs = ["a pie " * 30, "a pie"] if paired else None
        short, long = (TokenizedTexts(tokenizer, texts, pairs, n) for n in (16, 40))
        both = TokenizedTexts(tokenizer, texts, pairs, 16, full_length=40)
        for actual, expected in (
            (both.ids, short.ids), (both.types, short.types), (both.full_ids, long.ids),
        ):  # fmt: skip
            assert [a.tolist() for a in actual] == [e.tolist() for e in expected]
        assert [len(ids) for ids in both.full_ids] == [len(ids) for ids in both.full_types]
        assert len(both.full_ids[0]) == 40
        assert both.full_ids[1] is both.ids[1]
        assert both.lengths.tolist() == [16, len(both.ids[1])]

    @pytest.mark.parametrize("paired", [False, True])
    def test_long_inputs_are_truncated(self, tokenizer: Tokenizer, paired: bool) -> None:
        pairs = ["my aunt planted roses"] if paired else None
        tokens = TokenizedTexts(tokenizer, ["The gardener watered beans again"], pairs, 8)
        assert tokens.lengths.tolist() == [8]
        assert tokens.ids[0][-1] == 3

    def test_lengths_count_the_tokens_up_to_the_limit(self) -> None:
        assert words([3, 0, 12, 20]).lengths.tolist() == [3, 0, 12, 16]

    def test_texts_and_pairs_must_match(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            TokenizedTexts(word_tokenizer(), ["w", "w"], ["w"], 16)


class TestBatches:
    def test_pads_to_the_longest_row(self) -> None:
        batch = words([2, 4, 0, 9]).batch(np.array([0, 1, 2]))
        assert batch.rows.tolist() == [0, 1, 2]
        assert batch.input_ids.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
        assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
        assert batch.token_type_ids.tolist() == [[0] * 4] * 3

    def test_rows_without_tokens_are_padded_to_one(self) -> None:
        batch = words([0, 0]).batch(np.array([0, 1]))
        assert batch.input_ids.shape == (2, 1)
        assert not batch.attention_mask.any()

    def test_tensors_are_int64(self) -> None:
        batch = words([3]).batch(np.array([0]))
        for tensor in (batch.input_ids, batch.token_type_ids, batch.attention_mask):
            assert tensor.dtype == torch.long

    @PROPERTY
    @given(LENGTHS, st.integers(1, 9), st.none() | st.integers(0, 1000))
    def test_every_row_is_in_one_batch(
        self, lengths: list[int], size: int, seed: int | None
    ) -> None:
        seen = [row for batch in words(lengths).batches(size, seed) for row in batch.rows.tolist()]
        assert sorted(seen) == list(range(len(lengths)))

    @PROPERTY
    @given(LENGTHS, st.integers(1, 9), st.none() | st.integers(0, 1000))
    def test_batches_are_full_but_one_and_masks_follow_the_lengths(
        self, lengths: list[int], size: int, seed: int | None
    ) -> None:
        batches = list(words(lengths).batches(size, seed))
        assert sorted(len(batch.rows) for batch in batches)[1:] == [size] * (len(batches) - 1)
        for batch in batches:
            row_lengths = [lengths[row] for row in batch.rows]
            assert batch.input_ids.shape[1] == max(1, *row_lengths, 0)
            assert batch.attention_mask.sum(1).tolist() == row_lengths
            assert torch.equal(batch.input_ids, batch.attention_mask)

    @PROPERTY
    @given(LENGTHS, st.integers(1, 9), st.integers(0, 1000))
    def test_the_seed_defines_the_order(self, lengths: list[int], size: int, seed: int) -> None:
        tokens = words(lengths)
        first, second = ([b.rows.tolist() for b in tokens.batches(size, seed)] for _ in range(2))
        assert first == second

    def test_other_seeds_give_other_orders(self) -> None:
        tokens = words([n % 7 for n in range(40)])
        orders = [[b.rows.tolist() for b in tokens.batches(4, seed)] for seed in range(4)]
        assert all(orders.count(order) == 1 for order in orders)

    def test_without_a_seed_rows_are_sorted_by_length(self) -> None:
        tokens = words([5, 1, 4, 2, 3, 1])
        rows = [row for batch in tokens.batches(2) for row in batch.rows.tolist()]
        assert rows == [1, 5, 3, 4, 2, 0]

    @pytest.mark.parametrize("seed", [None, 0, 1])
    def test_rows_of_one_length_share_batches(self, seed: int | None) -> None:
        tokens = words([1, 12] * 20)
        assert all(len(set(tokens.lengths[b.rows])) == 1 for b in tokens.batches(4, seed))


class TestSample:
    def test_keeps_the_order_of_rows(self) -> None:
        rows = topic_examples()
        drawn = rows.sample(20, seed=1)
        indices = [rows.texts.index(text) for text in drawn.texts]
        assert len(set(indices)) == 20
        assert indices == sorted(indices)
        assert drawn.labels.tolist() == rows.labels[indices].tolist()

    def test_depends_on_the_seed(self) -> None:
        first, again, other = (topic_examples().sample(20, seed).texts for seed in (1, 1, 2))
        assert first == again
        assert first != other

    @pytest.mark.parametrize("count", [144, 1000])
    def test_is_the_whole_set_if_more_rows_are_requested(self, count: int) -> None:
        assert topic_examples().sample(count, seed=1).texts == topic_examples().texts
