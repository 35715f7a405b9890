"""``--extra-data``: further text to train on, such as mined or back-translated text, with its own directions."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence

from fairseq import utils

from ..common.directions import Direction, read_direction
from ..errors import UserError
from .data_folder import check_split, find_text

# Of the names of texts in one language, which need no direction.
_ONE_LANGUAGE = "mono_"


def read_extra(args: Namespace, languages: Collection[str]) -> dict[str, list[Direction]]:
    """Reads ``--extra-lang-pairs``.

    Args:
        args: of the task.
        languages: of the data.

    Returns:
        By kind of text, its directions.

    Raises:
        UserError: a name is no direction between two of the languages.
    """
    found: dict[str, list[Direction]] = {}
    for kind, value in (args.extra_lang_pairs or {}).items():
        found[kind] = []
        for name in value.split(","):
            direction = read_direction(name.strip(), languages)
            if direction is None:
                raise UserError(
                    f"--extra-lang-pairs: {kind!r} has {name[:60]!r}, which is no direction between two of "
                    f"{', '.join(languages)}"
                )
            found[kind].append(direction)
    return found


def check_extra(args: Namespace, extra: Mapping[str, Sequence[Direction]], split: str, combine: bool) -> None:
    """Checks the files of the further text before training starts.

    Args:
        args: of the task.
        extra: the directions of each kind of text.
        split: that is trained on.
        combine: whether fairseq joins the files of train, train1, train2 and so on.

    Raises:
        UserError: a kind of text has directions and no folder, or a folder and no directions; or a file is missing or
            damaged.
    """
    folders = {kind: utils.split_paths(path) for kind, path in (args.extra_data or {}).items()}
    if lacking := [kind for kind in extra if kind not in folders]:
        raise UserError(
            f"--extra-lang-pairs names {lacking[0]!r}, and --extra-data has no folder of it: "
            f"add \"{{'{lacking[0]}': 'FOLDER'}}\""
        )
    if lacking := [kind for kind in folders if kind not in extra and not kind.startswith(_ONE_LANGUAGE)]:
        raise UserError(
            f"--extra-data names {lacking[0]!r}, and --extra-lang-pairs has no directions of it: "
            f"add \"{{'{lacking[0]}': 'en-de,de-en'}}\""
        )
    dictionary = utils.split_paths(args.data)[0]
    for kind, directions in extra.items():
        if missing := [folder for folder in folders[kind] if not os.path.isdir(folder)]:
            raise UserError(f"there is no folder {missing[0]}, which --extra-data names")
        for direction in directions:
            places = [folder for folder in folders[kind] if find_text(folder, split, direction)] or folders[kind][:1]
            for folder in places:
                check_split(folder, split, [direction], combine, dictionary=dictionary)
