"""The text of the NLLB benchmarks m4 and m15: FLORES-200 for valid and test, several sources for train."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError
from ..mt_benchmarks import FLORES200, Source
from .archives import extract_all
from .download import NotThereError
from .io_utils import SPLITS, pair_name, short_lines
from .sources import Corpus, Store, merge

# FLORES-200 has the written standard of Malay, under its own code.
FLORES_CODES = {"msa": "zsm_Latn"}
FLORES_SPLITS = {"dev": "valid", "devtest": "test"}
OPUS_CODES = {
    **{"eng": "en", "nso": "nso", "run": "rn", "ssw": "ss", "ind": "id", "msa": "ms", "isl": "is", "nob": "nb"},
    **{"fao": "fo", "slv": "sl", "tgl": "tl", "cat": "ca", "glg": "gl", "fur": "fur", "ltz": "lb", "lim": "li"},
}
# The pairs with English in the published mined text.
MINED = ("nso", "run", "ssw", "msa", "fao", "tgl", "fur", "ltz", "lim")
SEED = ("fur", "lim")
# Corpora of OPUS that hold more than one of the languages and are translated by people.
OPUS_CORPORA = (
    *("Tatoeba/v2023-04-12", "QED/v2.0a", "TED2020/v1", "bible-uedin/v1", "wikimedia/v20230407"),
    *("GNOME/v1", "KDE4/v2", "Ubuntu/v14.10"),
)


def flores_code(language: str) -> str:
    """Returns the code of a language in FLORES-200, NLLB-Seed and the mined text."""
    return FLORES_CODES.get(language, f"{language}_Latn")


def flores(store: Store, langs: Sequence[str], folder: Path) -> Corpus:
    """Extracts valid and test from FLORES-200, where line i is the same sentence in every language.

    Raises:
        UserError: the archive cannot be had, is damaged, or lacks a language.
    """
    archive = store.get(FLORES200)
    wanted = {
        f"flores200_dataset/{published}/{flores_code(lang)}.{published}": folder / f"flores.{split}.{lang}"
        for published, split in FLORES_SPLITS.items()
        for lang in langs
    }
    extract_all(archive, wanted, depth=3)
    english, *languages = langs
    return {
        (split, english, language): [(folder / f"flores.{split}.{english}", folder / f"flores.{split}.{language}")]
        for split in FLORES_SPLITS.values()
        for language in languages
    }


def drive(source: Source, store: Store, langs: Sequence[str], folder: Path) -> Corpus:
    """Extracts all three splits from the authors' archive, which keeps the text beside its binary files.

    Raises:
        UserError: the archive cannot be had, is damaged, or lacks a pair.
    """
    english, *languages = langs
    corpus: Corpus = {}
    wanted: dict[str, Path] = {}
    for language in languages:
        for split in SPLITS:
            name = pair_name(split, english, language)
            sides = [f"retrieved_data/{name}.{side}" for side in (english, language)]
            wanted |= {side: folder / side for side in sides}
            corpus[split, english, language] = [(folder / sides[0], folder / sides[1])]
    extract_all(store.get(source), wanted, depth=2)
    return corpus


def seed(source: Source, store: Store, langs: Sequence[str], folder: Path) -> Corpus:
    """Extracts train from NLLB-Seed for the languages that it has.

    Raises:
        UserError: the archive cannot be had, is damaged, or lacks a pair.
    """
    english, *languages = langs
    parts: dict[str, Path] = {}
    corpus: Corpus = {}
    for language in languages:
        if language in SEED:
            # Each folder is named by its pair, in one order or the other, and each file by its language alone.
            pair = frozenset((flores_code(language), flores_code(english)))
            sides = [folder / f"seed.{language}.{side}" for side in (english, language)]
            for code, path in zip((flores_code(english), flores_code(language)), sides, strict=True):
                parts |= {f"{'-'.join(order)}/{code}": path for order in (sorted(pair), sorted(pair, reverse=True))}
            corpus["train", english, language] = [(sides[0], sides[1])]
    if corpus:
        extract_all(store.get(source), parts, depth=2)
    return corpus


def opus(source: Source, store: Store, langs: Sequence[str], folder: Path, corpora: Iterable[str]) -> Corpus:
    """Extracts train from corpora of OPUS; most have only some of the pairs, and MANIFEST.json tells which.

    Args:
        source: of the benchmark.
        store: gives the archives.
        langs: English and then the other languages.
        folder: where to put the text.
        corpora: ``NAME/VERSION`` of each.

    Raises:
        UserError: an archive cannot be had for another reason than that there is none, is damaged or lacks its text.
    """
    english, *languages = langs
    corpus: Corpus = {}
    for language in languages:
        pair = "-".join(sorted((OPUS_CODES[english], OPUS_CODES[language])))
        for name in corpora:
            try:
                archive = store.get(source, corpus=name, pair=pair)
            except NotThereError:
                store.record[source.file.format(corpus=name, pair=pair)] = {"source": source.name, "there": False}
                continue
            title = name.split("/")[0]
            sides = [folder / f"opus.{title}.{language}.{lang}" for lang in (english, language)]
            codes = (OPUS_CODES[english], OPUS_CODES[language])
            wanted = {f"{title}.{pair}.{code}": side for code, side in zip(codes, sides, strict=True)}
            extract_all(archive, wanted, depth=1)
            corpus.setdefault(("train", english, language), []).append((sides[0], sides[1]))
    return corpus


def mined(source: Source, store: Store, langs: Sequence[str], folder: Path) -> Corpus:
    """Extracts train from the mined text, tables of sentence, sentence and what is known of them.

    Raises:
        UserError: a table cannot be had or is damaged.
    """
    english, *languages = langs
    corpus: Corpus = {}
    for language in languages:
        if language in MINED:
            codes = sorted((flores_code(english), flores_code(language)))
            table = store.get(source, pair="-".join(codes))
            sides = [folder / f"mined.{language}.{lang}" for lang in (english, language)]
            ordered = sides if codes[0] == flores_code(english) else sides[::-1]
            _split_table(table, ordered)
            corpus["train", english, language] = [(sides[0], sides[1])]
    return corpus


def _split_table(table: Path, sides: Sequence[Path]) -> None:
    line_number = 0
    try:
        with gzip.open(table, "rb") as packed, open(sides[0], "wb") as first, open(sides[1], "wb") as second:
            for line in tqdm(short_lines(packed, table), desc=table.name, unit="line", disable=None):
                line_number += 1
                fields = line.rstrip(b"\n").split(b"\t")
                if len(fields) < 2:
                    raise UserError(f"{table}, line {line_number}: expected two sentences with a tab between them")
                first.write(fields[0] + b"\n")
                second.write(fields[1] + b"\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{table}: damaged after line {line_number} ({error}): delete it and get it again") from error


TRAIN_SOURCES: dict[str, Callable[..., Corpus]] = {"opus": opus, "seed": seed, "mined": mined}


def collect(
    sources: Sequence[Source], store: Store, langs: Sequence[str], folder: Path, corpora: Sequence[str]
) -> Corpus:
    """Extracts the text of all pairs from the chosen sources, one after the other.

    Raises:
        UserError: a file cannot be had or is damaged.
    """
    if [source.name for source in sources] == ["drive"]:
        return drive(sources[0], store, langs, folder)
    parts = [flores(store, langs, folder)]
    for source in sources:
        more = {"corpora": corpora} if source.name == "opus" else {}
        parts.append(TRAIN_SOURCES[source.name](source, store, langs, folder, **more))
    return merge(*parts)
