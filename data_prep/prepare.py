"""Prepare a benchmark: text, subword vocabulary, binary files, manifest."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import binarize
import learn_spm
import raw_local
from io_utils import SPLITS, fingerprint, lock, pair_name, write_lines
from manifest import finished_stage, run_stage, tool_versions, write_manifest
from tqdm import tqdm

from xmoe_fairseq.benchmarks import BENCHMARKS
from xmoe_fairseq.errors import UserError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command like every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse found wrong as a `UserError`."""
        raise UserError(f"{message}; see --help")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line and fills in the benchmark's own values where an option is not given.

    Raises:
        UserError: where an option is unknown, out of range, or has no meaning for the benchmark.
    """
    parser = OneLineParser(prog="prepare.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS, help="which set of languages to prepare")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to, made if missing")
    parser.add_argument("--input", type=Path, metavar="DIR", help=f"local: the folder that holds {raw_local.EXPECTED}")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="SentencePiece pieces (default: the benchmark's)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed gives the same files")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, metavar="N", help=f"demos: lines a pair in {split}")
    given = parser.parse_args(arguments)
    benchmark = BENCHMARKS[given.benchmark]
    local = not benchmark.sizes
    given.sizes = {split: getattr(given, split) for split in SPLITS if getattr(given, split) is not None}
    if given.vocab_size is None:
        given.vocab_size = benchmark.vocab_size
    if local and given.input is None:
        parser.error(f"--benchmark {benchmark.name} needs --input DIR, the folder that holds the text")
    if local and given.sizes:
        parser.error(f"--{next(iter(given.sizes))} has no meaning for --benchmark {benchmark.name}: it takes all lines")
    if not local and given.input is not None:
        parser.error(f"--input has no meaning for --benchmark {benchmark.name}: its text is generated")
    for split, size in given.sizes.items():
        if size < 1:
            parser.error(f"--{split} {size}: give at least 1")
    if given.vocab_size < learn_spm.LEAST_PIECES:
        parser.error(f"--vocab-size {given.vocab_size}: give at least {learn_spm.LEAST_PIECES}")
    given.sizes = {**benchmark.sizes, **given.sizes}
    return given


def prepare(given: argparse.Namespace) -> None:
    """Runs the stages that are not finished yet.

    Raises:
        UserError: where the input or the output folder is not as it must be.
    """
    benchmark = BENCHMARKS[given.benchmark]
    corpus = raw_local.find(given.input) if given.input else {}
    languages = benchmark.languages or tuple(dict.fromkeys(language for _, language in corpus))
    sources = tqdm([path for pair in corpus.values() for path in pair], desc="checking", unit="file", disable=None)
    parameters = {
        "benchmark": benchmark.name,
        "languages": list(languages),
        "seed": given.seed,
        "sizes": given.sizes,
        "sources": {path.name: fingerprint(path) for path in sources},
        "tools": tool_versions(),
    }
    # The text does not depend on these: where a first try shows that N is too large, it need not be made again.
    vocabulary = {"vocab_size": given.vocab_size, "sampling_temperature": benchmark.sampling_temperature}
    given.out.mkdir(parents=True, exist_ok=True)
    with lock(given.out):
        records = run_stages(given.out, corpus, parameters, vocabulary)
        write_groups(given.out, languages, records["raw"]["lines"])
        write_manifest(given.out, records)
    print(f"{given.out} is ready: train from {given.out / 'bin'}")


def run_stages(
    out: Path, corpus: raw_local.Corpus, parameters: Mapping[str, Any], vocabulary: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Runs the stages that are not finished, in their order, and returns the records of all.

    Args:
        out: the folder of the whole preparation.
        corpus: the user's files; empty where the text is generated.
        parameters: what decides the text.
        vocabulary: what decides, with the text, the vocabulary and the binary files.
    """
    languages, sizes, seed = parameters["languages"], parameters["sizes"], parameters["seed"]
    every = {**parameters, **vocabulary}

    def write_raw(folder: Path) -> dict[str, Any]:
        if corpus:
            return raw_local.write(corpus, folder)
        # Only the demos need Babel.
        import raw_demo

        return raw_demo.write(languages, sizes, seed, folder)

    def write_spm(folder: Path) -> dict[str, Any]:
        return learn_spm.write(out / "raw", records["raw"]["lines"], languages, every, folder)

    def write_bin(folder: Path) -> dict[str, Any]:
        return binarize.write(out / "raw", out / "spm", languages, folder)

    stages = {"raw": (parameters, write_raw), "spm": (every, write_spm), "bin": (every, write_bin)}
    # All are checked before the first is made, so that a refused run changes nothing.
    finished = {name: finished_stage(out, name, decisive) for name, (decisive, _) in stages.items()}
    records: dict[str, dict[str, Any]] = {}
    for name, (decisive, write) in stages.items():
        records[name] = finished[name] or run_stage(out, name, decisive, write)
    return records


def write_groups(out: Path, languages: Sequence[str], lines: Mapping[str, int]) -> None:
    """Writes groups.tsv, one group for all; leaves one that is there as it is, for the user may have edited it."""
    path = out / "groups.tsv"
    if not path.exists():
        write_lines(path, (f"{language}\tall\t{lines[pair_name('train', language)]}" for language in languages))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Raises:
        UserError: where the user can set something right.
    """
    given = parse(arguments)
    try:
        prepare(given)
    except OSError as error:
        advice = "; free some space and run the same command again" if error.errno in DISK_FULL else ""
        raise UserError(f"{error.filename or given.out}: {error.strerror or error}{advice}") from error


if __name__ == "__main__":
    main()
