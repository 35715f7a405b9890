"""Prepare a benchmark: text, subword vocabulary, binary files, manifest."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common import guard, locks
from ..common.files import is_there
from ..errors import UserError
from ..mt_benchmarks import BENCHMARKS, Benchmark
from . import binarize, learn_spm, local_layout, parts, raw_local, raw_nllb, raw_opus100, raw_text, vocabulary
from .io_utils import DISK_FULL, SPLITS, SourceText, fingerprint, write_lines
from .layout import Layout, centred, lists
from .manifest import check_contents, finished_stage, run_stage, tool_versions, write_manifest
from .options import parse
from .sources import Corpus, Store, merge

GROUPS = "groups.tsv"


def prepare(given: argparse.Namespace) -> None:
    """Runs the stages that are not finished yet.

    Raises:
        UserError: the input or the output folder is not as it must be.
    """
    benchmark = BENCHMARKS[given.benchmark]
    layout, local = arrange(given, benchmark)
    files = [side for parts in local.values() for part in parts for side in part if side is not None]
    paths = dict.fromkeys(SourceText(side).path for side in files)
    parameters = {
        "benchmark": benchmark.name,
        "languages": list(layout.others),
        "seed": given.seed,
        "sizes": given.sizes,
        "source": [source.name for source in given.sources] + ["local"] * bool(given.local and benchmark.sources),
        "limits": {name: value for name, value in asdict(given.limits).items() if value},
        "opus_corpora": given.corpora if any(source.name == "opus" for source in given.sources) else [],
        "sources": {path.name: fingerprint(path) for path in tqdm(paths, desc="checking", unit="file", disable=None)},
        "tools": tool_versions(),
    }
    if not benchmark.languages:
        parameters["lang_pairs"] = list(layout.directions.trained) if given.lang_pairs else []
        parameters["english"] = given.english or ""
    # What is finished and cannot be written to needs no lock: nothing is made there.
    read_only = given.out.is_dir() and not os.access(given.out, os.W_OK)
    with contextlib.nullcontext() if read_only else locks.held(given.out):
        is_there(given.out / GROUPS)  # something else of this name is refused before the work, not after it
        records = run_stages(given, benchmark, parameters, layout, local)
        write_groups(given.out, benchmark, layout, records["raw"]["lines"])
        write_manifest(given.out, records)
    where = f"{given.out / 'bin'}" + (f", in {given.parts} parts" if given.parts else "")
    print(f"{given.out} is ready: train from {where}")


def arrange(given: argparse.Namespace, benchmark: Benchmark) -> tuple[Layout, Corpus]:
    """Returns what is prepared, and the user's files.

    Raises:
        UserError: the input is not as it must be.
    """
    if not benchmark.languages:
        return local_layout.plan(given.input, given.english, given.lang_pairs)
    local = raw_local.find_centred(given.input, benchmark.english, local_splits(benchmark)) if given.local else {}
    return centred(benchmark.english, benchmark.languages), local


def local_splits(benchmark: Benchmark) -> tuple[str, ...]:
    """Names the splits that are the user's: FLORES-200 gives valid and test of m4 and m15."""
    return ("train",) if benchmark.name in ("m4", "m15") else SPLITS


def run_stages(
    given: argparse.Namespace, benchmark: Benchmark, parameters: Mapping[str, Any], layout: Layout, local: Corpus
) -> dict[str, dict[str, Any]]:
    """Runs the stages that are not finished, in their order, and returns the records of all.

    Args:
        given: the options.
        benchmark: that is prepared.
        parameters: what decides the text.
        layout: what is made.
        local: the user's files.
    """
    out, taken = given.out, given.vocabulary
    whole = vocabulary.join_languages(taken, layout, fixed=bool(benchmark.languages)) if taken else layout
    # The text does not depend on these: if a first try shows that N is too large, it need not be made again.
    every = {
        **parameters,
        "vocab_size": taken.pieces if taken else given.vocab_size,
        "sampling_temperature": benchmark.sampling_temperature,
        "vocabulary": taken.decisive if taken else {},
    }

    def write_raw(folder: Path) -> dict[str, Any]:
        if benchmark.sizes:
            try:
                from . import raw_demo
            except ModuleNotFoundError as error:
                raise UserError(
                    f"--benchmark {benchmark.name} needs {error.name}, which is not installed: pip install "
                    "'babel>=2.14'"
                ) from error

            return raw_demo.write(layout.others, given.sizes, given.seed, folder)
        return write_text(given, layout, local, folder)

    def write_spm(folder: Path) -> dict[str, Any]:
        if taken:
            return vocabulary.write(taken, whole.directions, folder)
        return learn_spm.write(out / "raw", records["raw"]["lines"], layout, every, folder)

    def write_bin(folder: Path) -> dict[str, Any]:
        return binarize.write(out / "raw", out / "spm", whole, given.max_pieces, given.parts, folder)

    stages = {
        "raw": (parameters, write_raw),
        "spm": (every, write_spm),
        "bin": ({**every, "max_pieces": given.max_pieces, "parts": given.parts}, write_bin),
    }
    # All are checked before the first is made, so that a refused run changes nothing.
    files = stage_files(whole, given.parts, taken.files if taken else vocabulary.FILES)
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


def stage_files(layout: Layout, cut: int, of_vocabulary: Sequence[str]) -> dict[str, list[str]]:
    """Names the files that each stage makes.

    Args:
        layout: what is made.
        cut: into how many parts train is cut; 0 for none.
        of_vocabulary: the files of the vocabulary, without the lists of languages and directions.
    """
    texts = list(layout.files())
    every = [*of_vocabulary, *lists(layout.directions)]
    binary = [f"{text}.{kind}" for text in texts for kind in ("bin", "idx")]
    train = [name for name in binary if name.startswith("train.")]
    dictionaries = [f"dict.{language}.txt" for language in layout.languages]
    common = [*every, *dictionaries, *(name for name in binary if name not in train)]
    return {
        "raw": texts,
        "spm": [*every, "spm.vocab"],
        "bin": parts.files(common, train, cut),
    }


def write_text(given: argparse.Namespace, layout: Layout, local: Corpus, folder: Path) -> dict[str, Any]:
    """Brings the text of the chosen sources together and writes it into the stage's folder.

    Raises:
        UserError: a source cannot be had, or text is missing or not as it must be.
    """
    store = Store(
        given.out / "download", given.url, {name: Path(path) for name, path in given.archive.items()}, given.sha256
    )
    extracted, langs = folder / "extracted", layout.languages
    parts = [local]
    if given.benchmark == "opus100":
        parts += [raw_opus100.collect(source, store, langs, extracted) for source in given.sources]
    elif given.benchmark != "local":
        parts.append(raw_nllb.collect(given.sources, store, langs, extracted, given.corpora))
    corpus = in_order(merge(*parts), layout, ", ".join(source.name for source in given.sources) or "local")
    record = raw_text.write(corpus, given.limits, bool(given.sources), folder)
    shutil.rmtree(extracted, ignore_errors=True)
    return {**record, "archives": store.record}


def in_order(corpus: Corpus, layout: Layout, source: str) -> Corpus:
    """Puts a corpus in the order of the layout.

    Raises:
        UserError: a language has no text or is not of the benchmark.
    """
    missing = list(dict.fromkeys(text[-1] for text in layout.texts if text not in corpus))
    if missing:
        raise UserError(
            f"--source {source} has no text for {', '.join(missing)}: add a source that has, such as "
            "--source opus,seed,local with --input DIR, or choose another"
        )
    extra = list(dict.fromkeys(text[-1] for text in corpus if text not in layout.texts))
    if extra:
        raise UserError(f"--input has {', '.join(extra)}, not of the benchmark: take these files out")
    return {text: corpus[text] for text in layout.texts}


def write_groups(out: Path, benchmark: Benchmark, layout: Layout, lines: Mapping[str, int]) -> None:
    """Writes groups.tsv; leaves one that is there as it is, for the user may have edited it."""
    path = out / GROUPS
    if not is_there(path):
        counts = {code: sum(lines[text] for text in layout.training_texts(code)) for code in layout.others}
        write_lines(
            path, (f"{language}\t{benchmark.group_of(language)}\t{count}" for language, count in counts.items())
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Raises:
        UserError: the user can set something right.
    """
    given = parse(arguments)
    try:
        prepare(given)
    except OSError as error:
        end = guard.output_ending(error)
        if end is not None:
            raise end from error
        advice = "; free some space and run the same command again" if error.errno in DISK_FULL else ""
        raise UserError(f"{error.filename or given.out}: {error.strerror or error}{advice}") from error
    except KeyboardInterrupt:
        print("\nxmoe_fairseq: interrupted: run the same command again to resume", file=sys.stderr)
        raise SystemExit(guard.INTERRUPTED) from None
