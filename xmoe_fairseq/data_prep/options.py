"""The command line of ``prepare.sh``."""

from __future__ import annotations

import argparse
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import UserError
from ..mt_benchmarks import BENCHMARKS, FLORES200, Benchmark, Source
from . import learn_spm, raw_local, raw_nllb, vocabulary
from .filters import Limits
from .io_utils import SPLITS

DESCRIPTION = "Prepare a benchmark: text, subword vocabulary, binary files, manifest."
# Sources that hold all three splits of all languages; the others may be joined.
COMPLETE = ("pairs", "whole", "drive")
LOCAL = "local"
REPLACEMENTS = ("url", "archive", "sha256")
SCHEMES = ("https", "http", "ftp", "file")
# More than any text supports, and still a number for SentencePiece.
MOST_PIECES = 10_000_000
# Of the demos: generating more would take hours.
MOST_DEMO_LINES = 1_000_000
# Each part of a pair is two files that are open at once.
MOST_PARTS = 200
# Of other numbers: more than any text has lines.
MOST = 10**12


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command like every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse found wrong as a `UserError`."""
        raise UserError(f"{message if len(message) < 500 else message[:500] + ' ...'}; see --help")


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="xmoe prepare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS, help="which set of languages to prepare")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to, made if missing")
    parser.add_argument("--source", metavar="NAME", help=f"m4, m15, opus100: where the text is from: {_source_names()}")
    parser.add_argument("--input", metavar="DIR", help=f"local: the folder that holds {raw_local.expected()}")
    parser.add_argument(
        "--lang-pairs",
        metavar="PAIRS",
        help="local: the directions that are trained, such as fr-en,en-de, or a file of them (default: all)",
    )
    parser.add_argument(
        "--english", metavar="CODE", help="local: the code of English (default: the one that all pairs share)"
    )
    for option, kind, text in (
        ("url", "URL", "an address that replaces a source's; {pair} and {corpus} as in the published one"),
        ("archive", "PATH", "a file, or a folder of files under their published names, instead of a download"),
        ("sha256", "HEX", "the checksum to expect of such a file"),
    ):
        metavar = f"[SOURCE=]{kind}"
        parser.add_argument(
            f"--{option}", action="append", default=[], metavar=metavar, help=f"{text}; may be repeated"
        )
    parser.add_argument(
        "--opus-corpora",
        metavar="A/V,B/V",
        help=f"opus: names and versions (default: {','.join(raw_nllb.OPUS_CORPORA)})",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="SentencePiece pieces (default: the benchmark's)")
    parser.add_argument(
        "--vocabulary", metavar="DIR", help="take the vocabulary of a prepared folder, or spm.model and dict.txt in DIR"
    )
    parser.add_argument(
        "--add-languages", metavar="XX,YY", help="languages of the text that are new to langs.txt of --vocabulary"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed gives the same files")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, metavar="N", help=f"demos: lines per pair in {split}")
    no_limit = "left out of train; 0, the default, leaves out none"
    parser.add_argument(
        "--max-chars", type=int, default=0, metavar="N", help=f"lines of more characters are {no_limit}"
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        default=0,
        metavar="R",
        help=f"lines over R times the length of the other side are {no_limit}",
    )
    parser.add_argument("--max-pieces", type=int, default=0, metavar="N", help=f"lines of more pieces are {no_limit}")
    parser.add_argument(
        "--parts", type=int, default=0, metavar="N", help="cut train into bin/part0 and so on, one for each epoch"
    )
    parser.add_argument(
        "--dedup", action="store_true", help="leave repetitions and what is in valid or test out of train"
    )
    return parser


def _source_names() -> str:
    kinds = (("opus100", BENCHMARKS["opus100"]), ("m4 and m15", BENCHMARKS["m15"]))
    return "; ".join(f"{', '.join((*(s.name for s in b.sources), LOCAL))} for {name}" for name, b in kinds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line and fills in the benchmark's own values if an option is not given.

    Raises:
        UserError: an option is unknown, out of range, or has no meaning for the benchmark.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    _check_texts(parser, given)
    benchmark = BENCHMARKS[given.benchmark]
    given.sizes = {split: getattr(given, split) for split in SPLITS if getattr(given, split) is not None}
    _read_vocabulary(parser, given, benchmark)
    _check_numbers(parser, given)
    _check_meaning(parser, given, benchmark)
    given.sources, given.local = _sources(parser, given, benchmark)
    _check_input(parser, given, benchmark)
    _read_replacements(parser, given, benchmark)
    given.sizes = {**benchmark.sizes, **given.sizes}
    given.limits = Limits(given.max_chars, given.max_ratio, given.dedup)
    return given


def _read_vocabulary(parser: OneLineParser, given: argparse.Namespace, benchmark: Benchmark) -> None:
    """Finds the vocabulary that is taken, if one is."""
    if given.vocabulary is None:
        if given.add_languages is not None:
            parser.error("--add-languages has no meaning without --vocabulary")
        if given.vocab_size is None:
            given.vocab_size = benchmark.vocab_size
        return
    if given.vocab_size is not None:
        parser.error("--vocab-size has no meaning with --vocabulary: nothing is learned")
    added = given.add_languages.split(",") if given.add_languages else []
    given.vocabulary = vocabulary.find(Path(given.vocabulary), added)


def _check_texts(parser: OneLineParser, given: argparse.Namespace) -> None:
    """Refuses empty values, as an unset variable gives them, and a folder that later programs cannot be told."""
    for name, value in vars(given).items():
        if any(isinstance(one, str) and not one.strip() for one in (value if isinstance(value, list) else [value])):
            parser.error(f"--{name.replace('_', '-')} is empty: is the variable set that it is from?")
    given.out, given.input = Path(given.out), None if given.input is None else Path(given.input)
    try:
        str(given.out).encode()
    except UnicodeEncodeError:
        parser.error(f"--out {str(given.out).encode(errors='backslashreplace').decode()}: not UTF-8: choose another")


def _check_numbers(parser: OneLineParser, given: argparse.Namespace) -> None:
    ranges = {
        **{split: (1, MOST_DEMO_LINES, "") for split in given.sizes},
        **{name: (1, MOST, ", or 0 for no limit") for name in ("max_chars", "max_pieces") if getattr(given, name)},
        **({"vocab_size": (learn_spm.LEAST_PIECES, MOST_PIECES, "")} if given.vocabulary is None else {}),
        **({"parts": (2, MOST_PARTS, ", or 0 for no parts")} if given.parts else {}),
        "seed": (-MOST, MOST, ""),
    }
    if given.max_ratio:
        ranges["max_ratio"] = (1, MOST, ", or 0 for no limit")
    for name, (least, most, other) in ranges.items():
        value = getattr(given, name)
        if not least <= value <= most:
            option = name.replace("_", "-")
            bound = f"at least {least}" if value < least else f"at most {most}"
            parser.error(f"--{option} {value}: give {bound}{other}")


def _check_meaning(parser: OneLineParser, given: argparse.Namespace, benchmark: Benchmark) -> None:
    """Refuses options of another kind of benchmark."""
    if not benchmark.sizes and given.sizes:
        parser.error(f"--{next(iter(given.sizes))} has no meaning for --benchmark {benchmark.name}: it takes all lines")
    if benchmark.languages:
        for name in ("lang_pairs", "english"):
            if getattr(given, name):
                option = name.replace("_", "-")
                parser.error(f"--{option} has no meaning for --benchmark {benchmark.name}: its directions are fixed")
    if benchmark.sizes:
        for name in ("input", "max_chars", "max_ratio", "max_pieces", "dedup"):
            if getattr(given, name):
                option = name.replace("_", "-")
                parser.error(f"--{option} has no meaning for --benchmark {benchmark.name}: its text is generated")
    if not benchmark.sources:
        for name in ("source", "opus_corpora", *REPLACEMENTS):
            if getattr(given, name):
                option = name.replace("_", "-")
                parser.error(f"--{option} has no meaning for --benchmark {benchmark.name}: it is not downloaded")


def _sources(parser: OneLineParser, given: argparse.Namespace, benchmark: Benchmark) -> tuple[tuple[Source, ...], bool]:
    """Returns the published sources that were chosen, and whether there is text of the user."""
    if not benchmark.sources:
        return (), not benchmark.sizes
    known = {source.name: source for source in benchmark.sources}
    names = given.source.split(",") if given.source else [benchmark.sources[0].name]
    for name in names:
        if name not in (*known, LOCAL):
            parser.error(f"--source {name}: choose from {', '.join((*known, LOCAL))}")
    alone = [name for name in names if name in COMPLETE or (name == LOCAL and benchmark.name == "opus100")]
    if len(set(names)) < len(names) or (alone and len(names) > 1):
        parser.error(f"--source {given.source}: {(alone or names)[0]} cannot be joined with others")
    if given.opus_corpora and "opus" not in names:
        parser.error("--opus-corpora has no meaning without --source opus")
    given.corpora = given.opus_corpora.split(",") if given.opus_corpora else list(raw_nllb.OPUS_CORPORA)
    for corpus in given.corpora:
        if not re.fullmatch(r"[\w-]+/[\w-][\w.-]*", corpus):
            parser.error(f"--opus-corpora {corpus}: expected NAME/VERSION, such as QED/v2.0a")
    return tuple(known[name] for name in names if name != LOCAL), LOCAL in names


def _check_input(parser: OneLineParser, given: argparse.Namespace, benchmark: Benchmark) -> None:
    if given.local and given.input is None:
        source = " --source local" if benchmark.sources else ""
        parser.error(f"--benchmark {benchmark.name}{source} needs --input DIR, the folder that holds the text")
    if given.input is not None and not given.local:
        parser.error(
            f"--input has no meaning for --source {given.source or benchmark.sources[0].name}: add local to it"
        )


def _read_replacements(parser: OneLineParser, given: argparse.Namespace, benchmark: Benchmark) -> None:
    """Makes a mapping from source to value of each of ``--url``, ``--archive`` and ``--sha256``."""
    used = [source.name for source in given.sources]
    if benchmark.name != "opus100" and "drive" not in used:
        used.append(FLORES200.name)
    for option in REPLACEMENTS:
        values: dict[str, str] = {}
        for text in getattr(given, option):
            # An address may hold an equals sign too, but not after a bare word.
            name, equals, value = text.partition("=")
            if not (equals and re.fullmatch(r"\w+", name)):
                name, value = used[0] if used else "", text
            if name not in used:
                parser.error(f"--{option} {text}: no source {name!r} is used: choose from {', '.join(used) or 'none'}")
            if problem := _problem(option, value):
                parser.error(f"--{option} {text}: {problem}")
            values[name] = value.lower() if option == "sha256" else value
        setattr(given, option, values)


def _problem(option: str, value: str) -> str | None:
    """Returns what is wrong with a value of ``--url``, ``--archive`` or ``--sha256``."""
    if not value:
        return "nothing follows the equals sign"
    if option == "sha256" and not re.fullmatch("[0-9a-fA-F]{64}", value):
        return "a checksum has 64 digits, 0 to 9 and a to f"
    if option == "url":
        try:
            parts = urllib.parse.urlsplit(value)
            complete = parts.scheme in SCHEMES and (parts.hostname or parts.scheme == "file") and parts.port != 0
        except ValueError:
            complete = False
        if not complete or re.search(r"[\s\0-\x1f\x7f]", value):
            return f"no address: it begins with {', '.join(f'{scheme}://' for scheme in SCHEMES)} and names a host"
    return None
