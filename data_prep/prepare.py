"""Prepare a benchmark: text, subword vocabulary, binary files, manifest."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import binarize
import learn_spm
import raw_local
import raw_nllb
import raw_opus100
import raw_text
from io_utils import DISK_FULL, SPLITS, fingerprint, lock, pair_name, write_lines
from manifest import check_contents, finished_stage, run_stage, tool_versions, write_manifest
from options import parse
from sources import Corpus, Store, merge
from tqdm import tqdm

from xmoe_fairseq.benchmarks import BENCHMARKS, Benchmark
from xmoe_fairseq.errors import UserError


def prepare(given: argparse.Namespace) -> None:
    """Runs the stages that are not finished yet.

    Raises:
        UserError: where the input or the output folder is not as it must be.
    """
    benchmark = BENCHMARKS[given.benchmark]
    local = raw_local.find(given.input, benchmark.english, local_splits(benchmark)) if given.local else {}
    languages = benchmark.languages or tuple(dict.fromkeys(language for _, language in local))
    paths = [path for files in local.values() for pair in files for path in pair]
    parameters = {
        "benchmark": benchmark.name,
        "languages": list(languages),
        "seed": given.seed,
        "sizes": given.sizes,
        "source": [source.name for source in given.sources] + ["local"] * bool(given.local and benchmark.sources),
        "limits": {name: value for name, value in asdict(given.limits).items() if value},
        "opus_corpora": given.corpora if any(source.name == "opus" for source in given.sources) else [],
        "sources": {path.name: fingerprint(path) for path in tqdm(paths, desc="checking", unit="file", disable=None)},
        "tools": tool_versions(),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    with lock(given.out):
        records = run_stages(given, benchmark, parameters, local)
        write_groups(given.out, benchmark, languages, records["raw"]["lines"])
        write_manifest(given.out, records)
    print(f"{given.out} is ready: train from {given.out / 'bin'}")


def local_splits(benchmark: Benchmark) -> tuple[str, ...]:
    """Names the splits that are the user's: FLORES-200 gives valid and test of m4 and m15."""
    return ("train",) if benchmark.name in ("m4", "m15") else SPLITS


def run_stages(
    given: argparse.Namespace, benchmark: Benchmark, parameters: Mapping[str, Any], local: Corpus
) -> dict[str, dict[str, Any]]:
    """Runs the stages that are not finished, in their order, and returns the records of all.

    Args:
        given: the options.
        benchmark: that is prepared.
        parameters: what decides the text.
        local: the user's files.
    """
    out, langs = given.out, [benchmark.english, *parameters["languages"]]
    # The text does not depend on these: where a first try shows that N is too large, it need not be made again.
    vocabulary = {"vocab_size": given.vocab_size, "sampling_temperature": benchmark.sampling_temperature}
    every = {**parameters, **vocabulary}

    def write_raw(folder: Path) -> dict[str, Any]:
        if benchmark.sizes:
            # Only the demos need Babel.
            import raw_demo

            return raw_demo.write(langs[1:], given.sizes, given.seed, folder)
        return write_text(given, langs, local, folder)

    def write_spm(folder: Path) -> dict[str, Any]:
        return learn_spm.write(out / "raw", records["raw"]["lines"], langs, every, folder)

    def write_bin(folder: Path) -> dict[str, Any]:
        return binarize.write(out / "raw", out / "spm", langs, given.max_pieces, folder)

    stages = {
        "raw": (parameters, write_raw),
        "spm": (every, write_spm),
        "bin": ({**every, "max_pieces": given.max_pieces}, write_bin),
    }
    # All are checked before the first is made, so that a refused run changes nothing.
    files = stage_files(langs)
    finished = {name: finished_stage(out, name, decisive, files[name]) for name, (decisive, _) in stages.items()}
    # What is made now is made of what was finished then.
    made = [name for name, record in finished.items() if record is None]
    for name, record in finished.items():
        if record and made and name != "bin":
            check_contents(out / name, record)
    records: dict[str, dict[str, Any]] = {}
    for name, (decisive, write) in stages.items():
        records[name] = finished[name] or run_stage(out, name, decisive, write)
    return records


def stage_files(langs: Sequence[str]) -> dict[str, list[str]]:
    """Names the files that each stage makes.

    Args:
        langs: English and then the other languages.
    """
    english, *languages = langs
    texts = [
        f"{pair_name(split, english, language)}.{side}"
        for language in languages
        for split in SPLITS
        for side in (english, language)
    ]
    binary = [f"{text}.{kind}" for text in texts for kind in ("bin", "idx")]
    dictionaries = [f"dict.{language}.txt" for language in langs]
    return {
        "raw": texts,
        "spm": [*binarize.VOCABULARY, "spm.vocab"],
        "bin": [*binarize.VOCABULARY, *dictionaries, *binary],
    }


def write_text(given: argparse.Namespace, langs: Sequence[str], local: Corpus, folder: Path) -> dict[str, Any]:
    """Brings the text of the chosen sources together and writes it into the stage's folder.

    Raises:
        UserError: where a source cannot be had, or text is missing or not as it must be.
    """
    store = Store(
        given.out / "download", given.url, {name: Path(path) for name, path in given.archive.items()}, given.sha256
    )
    extracted = folder / "extracted"
    parts = [local]
    if given.benchmark == "opus100":
        parts += [raw_opus100.collect(source, store, langs, extracted) for source in given.sources]
    elif given.benchmark != "local":
        parts.append(raw_nllb.collect(given.sources, store, langs, extracted, given.corpora))
    corpus = in_order(merge(*parts), langs, ", ".join(source.name for source in given.sources) or "local")
    record = raw_text.write(corpus, langs[0], given.limits, bool(given.sources), folder)
    shutil.rmtree(extracted, ignore_errors=True)
    return {**record, "archives": store.record}


def in_order(corpus: Corpus, langs: Sequence[str], source: str) -> Corpus:
    """Puts a corpus in the order of the languages.

    Raises:
        UserError: where a language has no text or is not of the benchmark.
    """
    wanted = [(split, language) for language in langs[1:] for split in SPLITS]
    missing = list(dict.fromkeys(language for split, language in wanted if (split, language) not in corpus))
    if missing:
        raise UserError(
            f"--source {source} has no text for {', '.join(missing)}: add a source that has, such as "
            "--source opus,seed,local with --input DIR, or choose another"
        )
    extra = list(dict.fromkeys(language for key in corpus if key not in wanted for language in key[1:]))
    if extra:
        raise UserError(f"--input has {', '.join(extra)}, not of the benchmark: take these files out")
    return {key: corpus[key] for key in wanted}


def write_groups(out: Path, benchmark: Benchmark, languages: Sequence[str], lines: Mapping[str, int]) -> None:
    """Writes groups.tsv; leaves one that is there as it is, for the user may have edited it."""
    path = out / "groups.tsv"
    if not path.exists():
        counts = {language: lines[pair_name("train", benchmark.english, language)] for language in languages}
        write_lines(
            path, (f"{language}\t{benchmark.group_of(language)}\t{count}" for language, count in counts.items())
        )


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
