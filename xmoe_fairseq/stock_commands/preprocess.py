"""What stock ``fairseq-preprocess`` reads: files of UTF-8 text, checked before anything is written."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from typing import Any

from ..common.files import check_regular
from ..errors import UserError
from .arguments import refuse
from .numbers import check_numbers


def check_files(parser: argparse.ArgumentParser) -> None:
    """Makes a parser of the command's options check the files that they name, and end in one line."""
    parse_args: Any = parser.parse_args

    @functools.wraps(parse_args)
    def parse(*args: Any, **kwargs: Any) -> argparse.Namespace:
        parsed: argparse.Namespace = parse_args(*args, **kwargs)
        check_numbers(vars(parsed))
        for path in _inputs(parsed):
            _check_text(path)
        return parsed

    parser.parse_args = parse  # type: ignore[method-assign, assignment]
    parser.error = functools.partial(refuse, parser)  # type: ignore[method-assign]


def _inputs(args: argparse.Namespace) -> Iterator[str]:
    """Lists the files that are read, which must be there."""
    yield from filter(None, (args.srcdict, args.tgtdict, args.alignfile))
    prefixes = [args.trainpref, *(args.validpref or "").split(","), *(args.testpref or "").split(",")]
    for prefix in filter(None, prefixes):
        for ending in [args.source_lang] if args.only_source else [args.source_lang, args.target_lang]:
            yield f"{prefix}.{ending}" if ending else prefix
        if args.align_suffix and os.path.lexists(alignments := f"{prefix}.{args.align_suffix}"):
            yield alignments


def _check_text(path: str) -> None:
    check_regular(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 (0x{line[error.start]:02x}): convert the file, as iconv does"
                ) from error
