"""The user's own text in any directions: names of files, what is trained, what is left out, kinds of files."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers_prepare import arguments, error_of, nllb_command, read, write_flores, write_input, write_local

from xmoe_fairseq.common.directions import Direction, Directions
from xmoe_fairseq.data_prep import local_layout, prepare
from xmoe_fairseq.data_prep.io_utils import Column, SourceText
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.mt_benchmarks import M4

WORDS = "north south east west house river bridge school garden table window market doctor train city lake".split()


def write_pair(folder: Path, pair: str, splits: str = "train:80 valid:3 test:3", sides: str = "") -> None:
    """Writes text of a pair, such as ``fr+de``, or of some of its sides."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = pair.split("+")
    for split, lines in (part.split(":") for part in splits.split()):
        for code in sides.split() or codes:
            text = "".join(f"{code} {WORDS[i % 16]} {WORDS[i % 7]} {i}\n" for i in range(int(lines)))
            (folder / f"{split}.{'-'.join(codes)}.{code}").write_text(text)


def write_text(folder: Path, *pairs: str) -> Path:
    for pair in pairs:
        write_pair(folder, pair)
    return folder


def plan(folder: Path, english: str | None = None, lang_pairs: str | None = None) -> Directions:
    return local_layout.plan(folder, english, lang_pairs)[0].directions


# --- Directions


@pytest.mark.parametrize(
    ("pairs", "languages", "trained", "pivot"),
    [
        ("en+xx yy+en", "en xx yy", "en-xx xx-en en-yy yy-en", "en"),
        ("eng_Latn+fra_Latn", "eng_Latn fra_Latn", "eng_Latn-fra_Latn fra_Latn-eng_Latn", "eng_Latn"),
        ("eng_Latn+fra_Latn deu_Latn+eng_Latn", "eng_Latn deu_Latn fra_Latn", None, "eng_Latn"),
        ("en+pt-BR zh-Hans+en", "en pt-BR zh-Hans", "en-pt-BR pt-BR-en en-zh-Hans zh-Hans-en", "en"),
        ("fr+de", "de fr", "de-fr fr-de", "de"),
        ("fr+de it+fr", "fr de it", "fr-de de-fr fr-it it-fr", "fr"),
        ("fr+de en+fr en+de", "de en fr", "de-en en-de de-fr fr-de en-fr fr-en", None),
        ("tgk-Cyrl+uzb-Latn", "tgk-Cyrl uzb-Latn", None, "tgk-Cyrl"),
    ],
)
def test_directions_follow_from_the_names(
    pairs: str, languages: str, trained: str | None, pivot: str | None, tmp_path: Path
) -> None:
    found = plan(write_text(tmp_path, *pairs.split()))
    assert found.languages == tuple(languages.split()) and found.pivot == pivot
    assert trained is None or list(found.trained) == trained.split()
    assert not found.zero_shot


def test_english_can_be_given(tmp_path: Path) -> None:
    write_text(tmp_path, "fr+de", "xx+fr", "xx+de")
    assert plan(tmp_path).languages == ("de", "fr", "xx")
    assert plan(tmp_path, "xx").languages == ("xx", "de", "fr")
    with pytest.raises(UserError, match=r"--english en: no language of that code is trained; there are de, fr, xx"):
        plan(tmp_path, "en")


def test_one_way_only_and_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "in", "en+fr", "en+de", "it+en")
    (tmp_path / "pairs").write_text("en-fr\nen-de,\n")
    for option in ("en-fr,en-de", str(tmp_path / "pairs")):
        found = plan(tmp_path / "in", None, option)
        assert list(found.trained) == ["en-fr", "en-de"] and found.languages == ("en", "de", "fr")
    said = capsys.readouterr().out
    assert all(
        f"not used: {split}.it-en.{side}: " in said for split in ("train", "valid", "test") for side in ("it", "en")
    )
    with pytest.raises(UserError, match="has no direction en-zz: it has de-en, en-de"):
        plan(tmp_path / "in", None, "en-fr,en-zz")
    with pytest.raises(UserError, match=r"--lang-pairs \S*nowhere is no file and no list of directions"):
        plan(tmp_path / "in", None, str(tmp_path / "nowhere"))
    write_pair(tmp_path / "in", "fr+de", "test:3")
    with pytest.raises(UserError, match="has no training text of fr-de"):
        plan(tmp_path / "in", None, "en-fr,fr-de")


def test_zero_shot_directions_have_no_training_text(tmp_path: Path) -> None:
    write_text(tmp_path, "en+fr", "en+de")
    write_pair(tmp_path, "fr+de", "test:3")
    assert list(plan(tmp_path).zero_shot) == ["de-fr", "fr-de"]
    # From a source into a target that are trained, and not the other way round.
    found = plan(tmp_path, None, "fr-en,en-de")
    assert list(found.zero_shot) == ["fr-de"] and list(found.trained) == ["fr-en", "en-de"]
    write_pair(tmp_path, "fr+de", "train:80")
    assert list(plan(tmp_path, None, "fr-en,en-de").zero_shot) == ["fr-de"]
    (tmp_path / "test.fr-de.fr").unlink()
    assert not plan(tmp_path, None, "fr-en,en-de").zero_shot


def test_a_language_without_training_text_is_named(tmp_path: Path) -> None:
    write_text(tmp_path, "en+fr")
    write_pair(tmp_path, "it+fr", "test:3")
    with pytest.raises(UserError, match=r"there is no training text in it, of which test\.it-fr is"):
        plan(tmp_path)
    assert plan(tmp_path, None, "en-fr").languages == ("en", "fr")


# --- Names


def test_a_name_that_can_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"{split}.zh-hans-en.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match="the pair zh-hans-en can be read as zh and hans-en or as zh-hans and en"):
        plan(tmp_path)
    assert plan(tmp_path, "en").languages == ("en", "zh-hans")
    # A file's own language says it too, and a country or script is no language.
    (tmp_path / "test.zh-hans-en.en").write_text("a\n")
    assert plan(tmp_path).languages == ("en", "zh-hans")


def test_a_country_is_no_language(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"{split}.en-pt-BR.tsv").write_text("a\tb\n")
    assert plan(tmp_path).languages == ("en", "pt-BR")


@pytest.mark.parametrize(
    "name", ["train.en-xx.yy", "test.en.en", "valid.en-xx.en.zip", "train1.-xx.xx", "test.en-en.en"]
)
def test_wrong_names_are_refused(name: str, tmp_path: Path) -> None:
    write_text(tmp_path, "en+xx")
    (tmp_path / name).write_text("a\n")
    with pytest.raises(UserError, match=f"{name}: not a name of parallel text"):
        plan(tmp_path)


def test_what_is_not_used_or_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path, "en+xx", "en+yy")
    for name in ("dev.en-xx.en", "newstest2014.en-xx.xx", "train_old.en-xx.en", "README.md"):
        (tmp_path / name).write_text("a\n")
    for name in ("valid.en-xx.en", "valid.en-xx.xx", "test.en-yy.yy"):
        (tmp_path / name).unlink()
    plan(tmp_path)
    said = capsys.readouterr().out
    for name in ("dev.en-xx.en", "newstest2014.en-xx.xx", "train_old.en-xx.en"):
        assert f"not used: {name}: the names of texts begin with train, valid or test" in said
    assert "README" not in said
    assert "valid.en-xx is missing: its loss is not in the validation loss" in said
    assert "test.en-yy.yy is missing: the set can be translated and not scored" in said
    for path in tmp_path.glob("valid.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"valid\.en-xx\.en is missing"):
        plan(tmp_path)


# --- Kinds of files


def zstd(content: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True).stdout


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}
needs_zstd = pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not installed")
EACH = [pytest.param(end, marks=needs_zstd) if end == ".zst" else end for end in PACKERS]


@pytest.mark.parametrize("end", EACH)
def test_compressed_text_is_read_and_damage_named(end: str, tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(5000)]
    packed = PACKERS[end]("".join(f"{line}\n" for line in lines).encode())
    path = tmp_path / f"train.en-xx.en{end}"
    path.write_bytes(packed)
    assert list(SourceText(path)) == lines
    for damaged in (packed[: len(packed) // 2], b"plain\n" * 9):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name}: damaged after line"):
            list(SourceText(path))


def test_what_unpacks_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "train.zst").write_bytes(b"")
    with pytest.raises(UserError, match="is read with the program zstd, which is not installed: install it"):
        list(SourceText(tmp_path / "train.zst"))


def test_columns_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "train.fr-de.tsv"
    path.write_bytes("\ufeffun chat\teine Katze\r\n\tleer\n".encode())
    assert list(SourceText(Column(path, 0))) == ["un chat", ""]
    assert list(SourceText(Column(path, 1))) == ["eine Katze", "leer"]
    for line, count in (("no tab", 1), ("a\tb\tc", 3)):
        path.write_text(f"a\tb\n{line}\n")
        with pytest.raises(UserError, match=rf"train.fr-de.tsv, line 2: {count} columns: give two"):
            list(SourceText(Column(path, 1)))


def test_a_table_beside_files_is_the_same_text_twice(tmp_path: Path) -> None:
    write_text(tmp_path, "fr+de")
    (tmp_path / "train.de-fr.tsv.gz").write_bytes(gzip.compress(b"a\tb\n"))
    with pytest.raises(UserError, match=r"holds both train\.de-fr.tsv.gz and train.fr-de.de: the same text twice"):
        plan(tmp_path)


# --- All of it prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of train, several sets, a table, zero-shot, a set without references, codes with hyphens."""
    folder = tmp_path_factory.mktemp("any")
    source = write_text(folder / "in", "en+pt-BR", "de+en")
    write_pair(source, "en+pt-BR", "train1:40 train10:10 train2:20 valid1:4 test1:5 test2:6")
    write_pair(source, "en+pt-BR", "test3:7", sides="en")
    write_pair(source, "pt-BR+de", "test:8")
    for name in ("train10.en-pt-BR.en", "train2.en-pt-BR.pt-BR"):
        (source / f"{name}.xz").write_bytes(lzma.compress((source / name).read_bytes()))
        (source / name).unlink()
    table = zip(read(source / "train.de-en.de"), read(source / "train.de-en.en"), strict=True)
    (source / "train1.en-de.tsv.bz2").write_bytes(bz2.compress("".join(f"{b}\t{a}\n" for a, b in table).encode()))
    prepare.main(arguments(source, folder / "out"))
    return folder / "out"


def test_lists_of_the_prepared(prepared: Path) -> None:
    lists = {
        "langs.txt": ["en", "de", "pt-BR"],
        "lang_pairs.txt": ["en-de", "de-en", "en-pt-BR", "pt-BR-en"],
        "zero_shot.txt": ["de-pt-BR", "pt-BR-de"],
    }
    for name, lines in lists.items():
        assert read(prepared / "bin" / name) == read(prepared / "spm" / name) == lines
    assert read(prepared / "groups.tsv") == ["de\tall\t160", "pt-BR\tall\t150"]


def test_parts_of_train_follow_each_other(prepared: Path) -> None:
    numbers = [int(line.split()[-1]) for line in read(prepared / "raw/train.en-pt-BR.pt-BR")]
    assert numbers == [*range(80), *range(40), *range(20), *range(10)]
    assert read(prepared / "raw/train.en-de.de") == 2 * read(prepared / "raw/train.en-de.de")[:80]


def test_sets_of_the_prepared(prepared: Path) -> None:
    raw = {path.name for path in (prepared / "raw").iterdir()} - {".stage.json"}
    pairs = {
        "en-pt-BR": "train valid valid1 test test1 test2".split(),
        "en-de": "train valid test".split(),
        "pt-BR-de": ["test"],
    }
    expected = {
        f"{split}.{pair}.{side}"
        for pair, splits in pairs.items()
        for split in splits
        for side in ("en", "de", "pt-BR")
        if side in pair
    }
    assert raw == expected | {"test3.en-pt-BR.en"}
    for name in raw:
        assert (prepared / f"bin/{name}.bin").is_file() and (prepared / f"bin/{name}.idx").is_file()


def test_prepared_again_it_is_skipped_and_other_directions_are_refused(prepared: Path, tmp_path: Path) -> None:
    source, out = prepared.parent / "in", shutil.copytree(prepared, tmp_path / "out", symlinks=True)
    prepare.main(arguments(source, out))
    message = error_of(*arguments(source, out, "--lang-pairs", "en-de,en-pt-BR,pt-BR-en,de-en"))
    assert "was prepared with lang_pairs = []" in message and "choose another --out" in message


def test_options_have_no_meaning_for_benchmarks(tmp_path: Path) -> None:
    for option, value in (("--lang-pairs", "en-ca"), ("--english", "en")):
        message = error_of("--benchmark", "demo4", "--out", str(tmp_path / "out"), option, value)
        assert f"{option} has no meaning for --benchmark demo4" in message


def checksum(out: Path) -> str:
    """The checksum of all files but the records, which have versions of programs."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in (".stage.json", "MANIFEST.json"):
            digest.update(f"{path.relative_to(out)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def test_english_centred_data_is_what_it_was(tmp_path: Path) -> None:
    """These are the checksums of what was prepared before there were other directions."""
    sizes = ("--train", "100", "--valid", "5", "--test", "6")
    commands: dict[str, Sequence[str]] = {
        "1248d67b097d15a8": ["--benchmark", "demo4", "--out", str(tmp_path / "a"), "--vocab-size", "500", *sizes],
        "9645f2ec58621b9c": [
            *nllb_command(tmp_path / "b", write_flores(tmp_path / "flores.tar.gz")),
            *("--source", "local", "--input", str(write_local(tmp_path / "train", M4))),
        ],
        "9e28ceeff86d6230": arguments(write_input(tmp_path / "in"), tmp_path / "c", "--dedup"),
    }
    for before, command in commands.items():
        prepare.main(list(command))
        assert checksum(Path(command[command.index("--out") + 1])) == before


def test_direction_is_its_name() -> None:
    import copy
    import pickle

    one = Direction("pt-BR", "zh-Hans")
    assert one == "pt-BR-zh-Hans" and {one: 1}["pt-BR-zh-Hans"] == 1
    for same in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert same == one and same.split("-") == ["pt-BR", "zh-Hans"] and same.reverse == "zh-Hans-pt-BR"
    assert one.split("R") == ["pt-B", "-zh-Hans"]
