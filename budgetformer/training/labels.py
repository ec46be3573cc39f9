"""Read the column `label`, which has class names or class ids, and find the names of ids."""

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
"""Minimum mean rows per label; with fewer, the column probably has numbers or texts, not classes.
"""
SHOWN_LABELS = 10


class LabelColumn:
    """The labels of a file, checked as they are added.

    Args:
        path: the file, for messages.
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
            ValueError: the label is empty, neither a string nor an integer, or of another type than
                in earlier rows.
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
            names: class names of the model; None: those of this file.
            stored: class names stored with the file, in the order of its class ids.
            encoder_names: class names for class ids without names, if the counts match.

        Raises:
            DataError: a label is unknown, or ids without names have gaps.
        """
        known = names if stored is None else stored
        distinct = {label for row in self._rows for label in row}
        if not distinct:
            raise DataError(f"{self._path}: no row has a label")
        if known is None and encoder_names is not None:
            ids = {int(label) for label in distinct if _is_id(label)}
            if ids == set(range(len(encoder_names))) and len(ids) == len(distinct):
                known = encoder_names
        if self._kind is int and known is None:
            known = self._dense_names(distinct)
        if known is not None and (self._kind is int or self._digits_are_ids(known)):
            self._name_ids(known)
        elif known is None:
            numbers = all(map(_is_id, distinct))
            known = sorted(map(str, distinct), key=int if numbers else None)
        assert known is not None
        names = known if names is None else names
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

    def _dense_names(self, distinct: set[Label]) -> list[str]:
        """Return names for ids without names: their digits.

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

    def _digits_are_ids(self, names: list[str]) -> bool:
        """Return whether string labels are class ids: the first is a number, but no name is."""
        first = next(label for row in self._rows for label in row)
        return _is_id(first) and not any(name.strip().isdigit() for name in names)

    def _name_ids(self, names: list[str]) -> None:
        for number, row in enumerate(self._rows, 1):
            for label in row:
                if not _is_id(label) or int(label) >= len(names):
                    raise self._unknown(number, label, names)
        self._rows = [[names[int(label)] for label in row] for row in self._rows]

    def _places(self, names: list[str]) -> list[list[int]]:
        index = {name: i for i, name in enumerate(names)}
        for number, row in enumerate(self._rows, 1):
            for label in row:
                if label not in index:
                    raise self._unknown(number, label, names)
        return [[index[str(label)] for label in row] for row in self._rows]

    def _vector(self, names: list[str]) -> np.ndarray:
        return np.array([place for (place,) in self._places(names)], dtype=np.int64)

    def _matrix(self, names: list[str]) -> np.ndarray:
        shape = (len(self._rows), len(names))
        if 8 * shape[0] * shape[1] > MAX_MATRIX_BYTES:
            raise DataError(f"{self._path}: {shape[1]} labels are too many for {shape[0]} rows")
        matrix = np.zeros(shape, dtype=np.int64)
        for row, places in enumerate(self._places(names)):
            matrix[row, places] = 1
        return matrix

    def _unknown(self, row: int, label: Label, names: list[str]) -> DataError:
        return DataError(
            f"{self._path}, row {row}: unknown label {label!r}; known labels: {_shown(names)}"
        )


def stored_names(table: TableFile) -> list[str] | None:
    """Return the class names in `labels.json` beside a file, or in the file's metadata.

    Raises:
        DataError: `labels.json` is not a list of distinct names, or the metadata has other names.
    """
    beside = table.path.parent / "labels.json"
    inside = table.label_names()
    if not beside.is_file():
        return None if inside is None else check_names(inside, table.path)
    names = read_names(beside)
    if inside is not None and inside != names:
        raise DataError(f"{table.path}: the label names in its metadata differ from {beside}")
    return names


def read_names(path: Path) -> list[str]:
    """Read `labels.json`, a list of class names in the order of class ids.

    Raises:
        DataError: it cannot be read, or is not a list of distinct names.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return check_names(found, path)


def check_names(names: object, path: Path) -> list[str]:
    """Return class names after checking that they are distinct strings.

    Raises:
        DataError: they are not; the message begins with `path`.
    """
    if not isinstance(names, list):
        raise DataError(f"{path}: {kind_of(names)}, not a list of label names")
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            problem = "empty" if isinstance(name, str) else kind_of(name)
            raise DataError(f"{path}: label name {place} is {problem}; it must be a string")
        if name in names[:place]:
            raise DataError(f"{path}: the label name {name!r} occurs more than once")
    return names


def check_classes(path: Path, names: Sequence[str], labels: np.ndarray) -> list[str]:
    """Check that labelled texts can train a classifier, and return notes for the user.

    Raises:
        DataError: all rows have the same label, or there are nearly as many labels as rows.
    """
    if (labels == labels[0]).all():
        places = np.flatnonzero(labels[0]) if labels.ndim == 2 else labels[:1]
        same = _shown([names[i] for i in places.tolist()])
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
    notes = [f"{len(labels)} rows, {len(names)} labels: {_shown(names)}"]
    for text, chosen in (("no row", counts == 0), ("one row only", counts == 1)):
        if chosen.any():
            matching = [name for name, match in zip(names, chosen, strict=True) if match]
            notes.append(f"labels with {text}: {_shown(matching)}")
    folded = Counter(name.strip().casefold() for name in names)
    alike = [name for name in names if folded[name.strip().casefold()] > 1]
    if alike:
        notes.append(f"labels that differ only in spaces or upper case: {_shown(alike)}")
    return notes


def _is_id(label: Label) -> bool:
    """Return whether a label is a class id in plain digits, unlike `07`, `+1` or `1.0`."""
    text = str(label)
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0") and len(text) < 10


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
    return ", ".join(map(repr, names[:SHOWN_LABELS])) + more
