"""``data_prep/prepare.sh`` with a vocabulary that is there, and with training text in parts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from helpers import build
from helpers_prepare import (
    arguments,
    assert_nothing_half_written,
    error_of,
    read,
    remove,
    rewrite,
    snapshot,
    write_input,
)

from xmoe_fairseq.common import identity
from xmoe_fairseq.data_prep import prepare
from xmoe_fairseq.evaluation.test_sets import check_binarised
from xmoe_fairseq.subword import Subword


def command(text: Path, out: Path, *more: str | Path) -> list[str]:
    """A command that prepares text of the user."""
    return ["--benchmark", "local", "--input", str(text), "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New text in one of the two languages of the corpus."""

    def edit(folder: Path) -> None:
        remove("*zu*")(folder)
        (folder / "test.de-en.de").write_text("ein kleiner Hund\nzwölf Katzen ✓\n")
        (folder / "test.de-en.en").write_text("a small dog\ntwelve cats\n")

    return write_input(tmp_path_factory.mktemp("german") / "input", edit)


@pytest.fixture(scope="module")
def reused(prepared: Path, german: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reused") / "out"
    prepare.main(command(german, out, "--vocabulary", prepared))
    return out


def test_text_is_prepared_with_the_vocabulary_of_another_folder(prepared: Path, reused: Path) -> None:
    for name in ("spm.model", "dict.txt", "langs.txt"):
        assert (reused / "bin" / name).read_bytes() == (prepared / "bin" / name).read_bytes()
    assert read(reused / "bin/lang_pairs.txt") == ["en-de", "de-en"]
    assert sorted(path.name for path in (reused / "bin").glob("dict.*.txt")) == [
        f"dict.{x}.txt" for x in ("de", "en", "zu")
    ]
    one, other = (identity.of_folder(str(folder / "bin")) for folder in (prepared, reused))
    assert not list(identity.differences(one, other))
    texts = {reused / f"raw/test.en-de.{side}": read(reused / f"raw/test.en-de.{side}") for side in ("en", "de")}
    check_binarised(reused, "test", "en-de", texts)
    assert_nothing_half_written(reused)


def test_the_manifest_says_whose_vocabulary_it_is(prepared: Path, reused: Path) -> None:
    manifest = json.loads((reused / "MANIFEST.json").read_text())
    assert manifest["spm"]["taken_from"] == str(prepared / "bin")
    assert manifest["spm"]["pieces"] == manifest["vocab_size"] == 330 and manifest["spm"]["lines_used"] == {}
    assert manifest["vocabulary"]["languages"] == ["en", "de", "zu"]
    learned = json.loads((prepared / "MANIFEST.json").read_text())
    assert learned["vocabulary"] == {} and "taken_from" not in learned["spm"]
    assert manifest["vocabulary"]["spm.model"] == learned["bin"]["files"]["spm.model"]


def test_where_the_vocabulary_is_does_not_matter(
    prepared: Path, german: Path, reused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(reused)
    for place in ("bin", "spm"):
        copy = shutil.copytree(prepared / place, tmp_path / place, symlinks=True)
        prepare.main(command(german, reused, "--vocabulary", copy))
        assert capsys.readouterr().out.count("already finished, skipped") == 3
    assert snapshot(reused) == before
    (tmp_path / "spm/langs.txt").write_text("en\nzu\nde\n")
    assert "was prepared with vocabulary languages =" in error_of(
        *command(german, reused, "--vocabulary", tmp_path / "spm")
    )
    assert "was prepared with vocab" in error_of(*command(german, reused))


def test_languages_that_the_vocabulary_lacks_are_added_on_request(prepared: Path, tmp_path: Path) -> None:
    def more(folder: Path) -> None:
        for path in list(folder.glob("*.de-en.*")):
            path.rename(path.with_name(path.name.replace("de", "fr")))

    text, out = write_input(tmp_path / "text", more), tmp_path / "out"
    message = error_of(*command(text, out, "--vocabulary", prepared))
    assert "is of en, de, zu, the text also has fr: give --add-languages fr" in message
    assert "xmoe checkpoint add-languages" in message and not (out / "spm").exists()
    assert "--add-languages de: " in error_of(*command(text, out, "--vocabulary", prepared, "--add-languages", "de"))
    message = error_of(*command(text, out, "--vocabulary", prepared, "--add-languages", "fr,it"))
    assert "--add-languages it: there is no text in it" in message
    prepare.main(command(text, out, "--vocabulary", prepared, "--add-languages", "fr"))
    assert read(out / "bin/langs.txt") == ["en", "de", "zu", "fr"]
    assert read(out / "bin/lang_pairs.txt") == ["en-fr", "fr-en", "en-zu", "zu-en"]


def test_options_that_do_not_go_together(prepared: Path, source: Path, tmp_path: Path) -> None:
    for more, part in (
        (["--vocabulary", str(tmp_path)], "must be a folder made by prepare.sh, or one with spm.model and dict.txt"),
        (["--vocabulary", str(prepared), "--vocab-size", "400"], "--vocab-size has no meaning with --vocabulary"),
        (["--add-languages", "fr"], "--add-languages has no meaning without --vocabulary"),
        (["--parts", "1"], "--parts 1: give at least 2, or 0 for no parts"),
        (["--parts", "-2"], "--parts -2: give at least 2"),
    ):
        assert part in error_of(*command(source, tmp_path / "out", *more))
    demo = ["--benchmark", "demo4", "--out", str(tmp_path / "out"), "--vocabulary", str(prepared)]
    assert "is of en, de, zu, the benchmark of en, ca, id, ka, sw" in error_of(*demo)


def learn(folder: Path, text: Path, **options: object) -> Path:
    """Learns a SentencePiece model as people do elsewhere, and writes a dictionary in another order."""
    folder.mkdir()
    lines = [line for path in sorted(text.glob("train.*-en.*")) for line in read(path)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spm"),
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    pieces = [line.split("\t")[0] for line in read(folder / "spm.vocab")][3:]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in reversed(pieces)) + "madeupword0000 0\n")
    return folder


def test_a_vocabulary_from_elsewhere(german: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A unigram model that normalises text, with a dictionary in another order."""
    elsewhere, out = learn(tmp_path / "elsewhere", german, byte_fallback=True), tmp_path / "out"
    rewrite("test.de-en.de", "ein ﬁnger\nＡＢ Katzen ✓\n".encode())(shutil.copytree(german, tmp_path / "text"))
    prepare.main(command(tmp_path / "text", out, "--vocabulary", elsewhere))
    assert (out / "bin/dict.txt").read_bytes() == (elsewhere / "dict.txt").read_bytes()
    assert read(out / "bin/langs.txt") == ["en", "de"]
    dictionary = Dictionary.load(str(out / "bin/dict.txt"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(elsewhere / "spm.model"))
    held = MMapIndexedDataset(str(out / "bin/test.en-de.de"))
    for line, ids in zip(read(out / "raw/test.en-de.de"), held, strict=True):
        assert [dictionary[i] for i in ids.tolist()] == [*processor.encode(line, out_type=str), "</s>"]
    texts = {out / "raw/test.en-de.de": read(out / "raw/test.en-de.de")}
    check_binarised(out, "test", "en-de", texts)
    with pytest.raises(SystemExit, match="was changed after the data was prepared"):
        check_binarised(out, "test", "en-de", {out / "raw/test.en-de.de": ["ein finger", "AC Katzen ✓"]})
    assert "not in dict.txt" not in capsys.readouterr().out


def test_pieces_that_the_dictionary_lacks_are_told(
    german: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = learn(tmp_path / "elsewhere", german, byte_fallback=True)
    lines = read(elsewhere / "dict.txt")
    (elsewhere / "dict.txt").write_text("".join(f"{line}\n" for line in lines if not line.startswith("<0xE2>")))
    prepare.main(command(german, tmp_path / "out", "--vocabulary", elsewhere))
    assert "spm: 1 pieces are not in dict.txt, such as <0xE2>: they become <unk>" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/MANIFEST.json").read_text())["spm"]["unknown_pieces"] == 1
    last = MMapIndexedDataset(str(tmp_path / "out/bin/test.en-de.de"))[1].tolist()
    assert last.count(3) == 1
    assert (
        Subword(elsewhere / "spm.model", elsewhere / "dict.txt").decode_ids([last[:-1]])[0].startswith("zwölf Katzen")
    )


def test_models_that_lose_characters_are_refused(german: Path, tmp_path: Path) -> None:
    elsewhere = learn(tmp_path / "elsewhere", german)
    message = error_of(*command(german, tmp_path / "out", "--vocabulary", elsewhere))
    assert "was trained without byte_fallback and would lose characters" in message
    (elsewhere / "spm.model").write_bytes(b"none")
    assert "is not a SentencePiece model" in error_of(*command(german, tmp_path / "out", "--vocabulary", elsewhere))


def lines_of(prefix: Path) -> list[tuple[int, ...]]:
    return [tuple(line.tolist()) for line in MMapIndexedDataset(str(prefix))]


def test_training_text_in_parts(prepared: Path, tmp_path: Path) -> None:
    def few(folder: Path) -> None:
        for side in ("en", "de"):
            (folder / f"train.de-en.{side}").write_text(f"one {side}\ntwo {side}\n")

    text, out = write_input(tmp_path / "text", few), tmp_path / "out"
    prepare.main(command(text, out, "--vocabulary", prepared, "--parts", "3"))
    prepare.main(command(text, tmp_path / "whole", "--vocabulary", prepared))
    parts = [out / "bin" / f"part{number}" for number in range(3)]
    assert not list((out / "bin").glob("train.*")) and not (out / "bin/part3").exists()
    for name in ("train.en-zu.en", "train.en-zu.zu"):
        whole = lines_of(tmp_path / "whole/bin" / name)
        assert [lines_of(part / name) for part in parts] == [whole[number::3] for number in range(3)]
    for name in ("train.en-de.en", "train.en-de.de"):  # no part is without a line
        whole = lines_of(tmp_path / "whole/bin" / name)
        assert [lines_of(part / name) for part in parts] == [whole[:1], whole[1:], whole[:1]]
    common = {path.name for path in (out / "bin").iterdir() if path.is_file()} - {".stage.json"}
    for part in parts:
        assert {path.name for path in part.iterdir() if not path.name.startswith("train.")} == common
        assert all((part / name).read_bytes() == (out / "bin" / name).read_bytes() for name in common)
    manifest = json.loads((out / "MANIFEST.json").read_text())
    assert manifest["parts"] == 3 and "part2/train.en-zu.zu.bin" in manifest["bin"]["files"]
    kinds = Counter(name.split("/")[0] for name in manifest["bin"]["files"] if "/" in name)
    assert kinds["part0"] == kinds["part1"] == kinds["part2"]


def test_pairs_without_english_in_parts_with_a_vocabulary_that_grows(prepared: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    words = {"de": "rot Hund Katze Haus", "zu": "bomvu ikati inja indlu", "fr": "rouge chien chat maison"}
    for split, lines in (("train", 9), ("valid", 3), ("test", 2)):
        for pair in ("de-zu", "fr-de"):
            for side in pair.split("-"):
                (text / f"{split}.{pair}.{side}").write_text("".join(f"{words[side]} {n}\n" for n in range(lines)))
    prepare.main(command(text, out, "--vocabulary", prepared, "--add-languages", "fr", "--parts", "2"))
    assert read(out / "bin/langs.txt") == [*read(prepared / "bin/langs.txt"), "fr"]
    assert set(read(out / "bin/lang_pairs.txt")) == {"de-zu", "zu-de", "fr-de", "de-fr"}
    assert (out / "bin/dict.txt").read_bytes() == (prepared / "bin/dict.txt").read_bytes()
    subword = Subword(out / "bin/spm.model", out / "bin/dict.txt")
    for pair in ("de-zu", "de-fr"):
        for side in pair.split("-"):
            raw = read(out / "raw" / f"train.{pair}.{side}")
            held = [lines_of(out / f"bin/part{number}" / f"train.{pair}.{side}") for number in (0, 1)]
            assert [[subword.decode_ids([line[:-1]])[0] for line in part] for part in held] == [raw[::2], raw[1::2]]
    task = build(out / "bin").task
    for epoch, lines in ((1, 5), (2, 4)):
        task.load_dataset("train", epoch=epoch, combine=True)
        assert len(task.dataset("train")) == 4 * lines
    task.load_dataset("valid")
    assert len(task.dataset("valid")) == 4 * 3


def test_a_damaged_part_is_named(prepared: Path, source: Path, tmp_path: Path) -> None:
    words = command(source, tmp_path / "out", "--vocabulary", prepared, "--parts", "2")
    prepare.main(words)
    prepare.main(words)
    assert "parts = 2, now it is 0" in error_of(*words[:-2])
    (tmp_path / "out/bin/part1/train.en-de.de.idx").unlink()
    assert "part1/train.en-de.de.idx is missing or was changed" in error_of(*words)


def test_a_preparation_of_before_is_finished_still(prepared: Path, source: Path, tmp_path: Path) -> None:
    out = shutil.copytree(prepared, tmp_path / "out", symlinks=True)
    for path in out.glob("*/.stage.json"):
        record = json.loads(path.read_text())
        for key in ("vocabulary", "parts"):
            record["parameters"].pop(key, None)
        path.write_text(json.dumps(record) + "\n")
    prepare.main(arguments(source, out))
    assert "parts = null, now it is 2" in error_of(*arguments(source, out, "--parts", "2"))
