"""Read the column `label`, which has class names or class ids, and map ids to names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from budgetformer.errors import DataError
from budgetformer.tables import TableFile, check_string, kind_of

Label = str | int

MAX_MATRIX_BYTES = 2**31
"""Maximum size of the 0/1 matrix of a multi-label data set."""
MIN_ROWS_PER_LABEL = 2
"""Minimum mean number of rows per label; with fewer, the column probably has no classes."""
SHOWN_LABELS = 10


class LabelColumn:
    """The labels of a file, checked as they are added.

    Args:
        path: path of the file, for error messages.
        multi_label: True: rows have lists of labels or single labels; False: single labels only;
            None: the first row decides.
    """

    def __init__(self, path: Path, multi_label: bool | None = None) -> None:
        self._path = path
        self._multi_label = multi_label
        self._rows: list[list[Label]] = []
        self._listed: bool | None = None
        self._kind: type[Label] | None = None

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels."""
        return bool(self._listed if self._multi_label is None else self._multi_label)

    def add(self, cell: object) -> None:
        """Add the label, or the list of labels, of one row.

        Raises:
            ValueError: the label is empty, neither a string nor an integer, or differs in type from
                earlier rows.
        """
        listed = isinstance(cell, list)
        if listed and self._multi_label is False:
            raise ValueError("a list of labels, but each text must have one label")
        if self._listed is None:
            self._listed = listed
        elif listed != self._listed:
            raise ValueError("some rows have a list of labels, others a single label")
        labels = cell if isinstance(cell, list) else [cell]
        self._rows.append([self._checked(label) for label in labels])

    def encode(
        self,
        names: list[str] | None,
        stored: list[str] | None,
        encoder_names: list[str] | None,
    ) -> tuple[list[str], np.ndarray]:
        """Return class names, and class ids [N] or 0/1 rows [N, C].

        Args:
            names: class names of the model; None: the class names of this file.
            stored: class names stored with the file, in the order of its class ids.
            encoder_names: class names for class ids without names, if the counts match.

        Raises:
            DataError: a label is unknown, or ids without names have gaps.
        """
        id_names = names if stored is None else stored
        distinct = {label for row in self._rows for label in row}
        if not distinct:
            raise DataError(f"{self._path}: no row has a label")
        if id_names is None and encoder_names is not None:
            ids = {int(label) for label in distinct if _is_id(label)}
            if ids == set(range(len(encoder_names))) and len(ids) == len(distinct):
                id_names = encoder_names
        if self._kind is int and id_names is None:
            id_names = self._ids_as_names(distinct)
        if id_names is not None and (self._kind is int or self._strings_are_ids(id_names)):
            self._replace_ids(id_names)
        elif id_names is None:
            all_ids = all(map(_is_id, distinct))
            id_names = sorted(map(str, distinct), key=int if all_ids else None)
        assert id_names is not None
        names = id_names if names is None else names
        return names, self._matrix(names) if self.multi_label else self._vector(names)

    def _checked(self, label: object) -> Label:
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(
                f"the label is {kind_of(label)}; it must be a string (class name) "
                "or an integer (class id)"
            )
        if isinstance(label, str) and not check_string(label, "label").strip():
            raise ValueError("the label is empty")
        if self._kind is None:
            self._kind = type(label)
        elif not isinstance(label, self._kind):
            raise ValueError(f"the label is {kind_of(label)}, unlike the labels of earlier rows")
        return label

    def _ids_as_names(self, distinct: set[Label]) -> list[str]:
        """Return the class ids 0 to C-1 as strings, which name classes without names.

        Raises:
            DataError: the ids are not 0 to C-1.
        """
        count = len(distinct)
        for number, row in enumerate(self._rows, 1):
            for label in row:
                if not 0 <= int(label) < count:
                    raise DataError(
                        f"{self._path}, row {number}: class id {label}, but the file has only "
                        f"{count} different ids. Ids without names must run from 0 without gaps: "
                        "name them in labels.json, or write class names as strings"
                    )
        return [str(i) for i in range(count)]

    def _strings_are_ids(self, names: list[str]) -> bool:
        """Return whether string labels are class ids: the first is a number, and no name is."""
        first = next(label for row in self._rows for label in row)
        return _is_id(first) and not any(name.strip().isdigit() for name in names)

    def _replace_ids(self, names: list[str]) -> None:
        for number, row in enumerate(self._rows, 1):
            for label in row:
                if not _is_id(label) or int(label) >= len(names):
                    raise self._unknown(number, label, names)
        self._rows = [[names[int(label)] for label in row] for row in self._rows]

    def _class_ids(self, names: list[str]) -> list[list[int]]:
        index = {name: i for i, name in enumerate(names)}
        for number, row in enumerate(self._rows, 1):
            for label in row:
                if label not in index:
                    raise self._unknown(number, label, names)
        return [[index[str(label)] for label in row] for row in self._rows]

    def _vector(self, names: list[str]) -> np.ndarray:
        return np.array([class_id for (class_id,) in self._class_ids(names)], dtype=np.int64)

    def _matrix(self, names: list[str]) -> np.ndarray:
        shape = (len(self._rows), len(names))
        if 8 * shape[0] * shape[1] > MAX_MATRIX_BYTES:
            raise DataError(f"{self._path}: {shape[1]} labels are too many for {shape[0]} rows")
        matrix = np.zeros(shape, dtype=np.int64)
        for row, class_ids in enumerate(self._class_ids(names)):
            matrix[row, class_ids] = 1
        return matrix

    def _unknown(self, row: int, label: Label, names: list[str]) -> DataError:
        return DataError(
            f"{self._path}, row {row}: unknown label {label!r}; known labels: {_quoted(names)}"
        )


def stored_names(table: TableFile) -> list[str] | None:
    """Return the class names in `labels.json` beside a file, or in the file's metadata.

    Raises:
        DataError: `labels.json` is not a list of distinct names, or differs from the metadata.
    """
    labels_file = table.path.parent / "labels.json"
    in_metadata = table.label_names()
    if not labels_file.is_file():
        return None if in_metadata is None else check_names(in_metadata, table.path)
    names = read_names(labels_file)
    if in_metadata is not None and in_metadata != names:
        raise DataError(f"{table.path}: the label names in its metadata differ from {labels_file}")
    return names


def read_names(path: Path) -> list[str]:
    """Read `labels.json`, a list of class names in the order of class ids.

    Raises:
        DataError: the file cannot be read, or is not a list of distinct names.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return check_names(names, path)


def check_names(names: object, path: Path) -> list[str]:
    """Check that class names are distinct strings, and return them.

    Raises:
        DataError: they are not; the message begins with `path`.
    """
    if not isinstance(names, list):
        raise DataError(f"{path}: {kind_of(names)}, not a list of label names")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            problem = "empty" if isinstance(name, str) else kind_of(name)
            raise DataError(f"{path}: label name {index} is {problem}; it must be a string")
        if name in names[:index]:
            raise DataError(f"{path}: the label name {name!r} occurs more than once")
    return names


def check_classes(path: Path, names: Sequence[str], labels: np.ndarray) -> list[str]:
    """Check that labelled texts can train a classifier, and return notes for the user.

    Raises:
        DataError: all rows have the same label, or there are nearly as many labels as rows.
    """
    if (labels == labels[0]).all():
        class_ids = np.flatnonzero(labels[0]) if labels.ndim == 2 else labels[:1]
        same = _quoted([names[i] for i in class_ids.tolist()])
        raise DataError(
            f"{path}: every row has the label {same}; training requires at least two labels"
        )
    flat = np.nonzero(labels)[1] if labels.ndim == 2 else labels
    counts = np.bincount(flat, minlength=len(names))
    used = int((counts > 0).sum())
    if used * MIN_ROWS_PER_LABEL > len(labels):
        raise DataError(
            f"{path}: {used} different labels in {len(labels)} rows; "
            f"training requires at least {MIN_ROWS_PER_LABEL} rows per label"
        )
    notes = [f"{len(labels)} rows, {len(names)} labels: {_quoted(names)}"]
    for rows, matches in (("no row", counts == 0), ("one row only", counts == 1)):
        if matches.any():
            matching = [name for name, match in zip(names, matches, strict=True) if match]
            notes.append(f"labels with {rows}: {_quoted(matching)}")
    folded = Counter(name.strip().casefold() for name in names)
    alike = [name for name in names if folded[name.strip().casefold()] > 1]
    if alike:
        notes.append(f"labels that differ only in spaces or upper case: {_quoted(alike)}")
    return notes


def _is_id(label: Label) -> bool:
    """Return whether a label is a class id in plain digits, unlike `07`, `+1` or `1.0`."""
    text = str(label)
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0") and len(text) < 10


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
    return ", ".join(map(repr, names[:SHOWN_LABELS])) + more
