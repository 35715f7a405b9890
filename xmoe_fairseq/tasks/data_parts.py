"""Several data folders, ``PART0:PART1``, one for each epoch in turn, as stock fairseq has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count

from fairseq import utils
from fairseq.data.indexed_dataset import index_file_path

from ..common import identity
from ..common.directions import Direction
from ..errors import UserError
from .binary_text import HEADER
from .data_folder import find_text


def read_folders(data: str) -> list[str]:
    """Returns the folders that training goes through: those named, or the parts of one that was prepared with --parts.

    Raises:
        UserError: a folder has fairseq's separator in its path.
    """
    if os.pathsep in data and os.path.isdir(data):
        raise UserError(
            f"the data folder {data} has a {os.pathsep!r} in its path, where fairseq takes it for several folders: "
            "give it another name"
        )
    named = utils.split_paths(data)
    if len(named) > 1:
        return named
    parts = (os.path.join(data, f"part{number}") for number in count())
    found = []
    while os.path.isdir(part := next(parts)):
        found.append(part)
    return found or named


def home(folder: str) -> str:
    """Returns the folder ``bin/`` that a part is in; of any other folder itself."""
    path = os.path.abspath(folder)
    above = os.path.dirname(path)
    in_bin = os.path.basename(path).startswith("part") and os.path.isfile(os.path.join(above, "langs.txt"))
    return above if in_bin else folder


def check_alike(folders: Sequence[str]) -> None:
    """Makes sure that the folders of one training have one vocabulary.

    Raises:
        UserError: names two that differ.
    """
    first, *others = map(identity.of_folder, folders)
    for other in others:
        for what, one, two in identity.differences(first, other):
            raise UserError(
                f"{first.folder} has the {what} {one}, but {other.folder} has {two}: folders of one training need "
                "the same; make them with data_prep/prepare.sh --parts, or one with the --vocabulary of the other"
            )


def sources(folder: str, split: str, pair: Direction) -> list[str]:
    """Lists the texts of the source side of a direction in a folder, without ending: of train, train1 and so on."""
    found: list[str] = []
    while (name := find_text(folder, f"{split}{len(found) or ''}", pair)) is not None:
        found.append(f"{name}.{pair.source}")
    return found


def count_lines(prefix: str) -> int:
    """Reads the number of lines of a binary text from the head of its index, which was checked."""
    with open(index_file_path(prefix), "rb") as file:
        *_, lines = HEADER.unpack(file.read(HEADER.size))
    return int(lines)
