"""``data_prep/prepare.sh``: what it writes and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq.binarizer import FileBinarizer, VocabularyDatasetBinarizer
from fairseq.data import Dictionary, data_utils
from helpers_prepare import (
    SIZES,
    STAGES,
    Edit,
    arguments,
    assert_nothing_half_written,
    error_of,
    remove,
    rewrite,
    snapshot,
    write_input,
)

from xmoe_fairseq.data_prep import learn_spm, prepare
from xmoe_fairseq.data_prep.io_utils import SourceText
from xmoe_fairseq.subword import Subword

ROOT = Path(__file__).parents[3]


def test_layout(prepared: Path, source: Path) -> None:
    names = {f"{split}.en-{xx}.{side}" for split in SIZES for xx in ("de", "zu") for side in ("en", xx)}
    lists = {"langs.txt", "lang_pairs.txt", "dict.txt", "spm.model"}
    assert {path.name for path in prepared.iterdir()} == STAGES | {"groups.tsv", "MANIFEST.json"}
    assert {path.name for path in (prepared / "raw").iterdir()} == names | {".stage.json"}
    assert {path.name for path in (prepared / "spm").iterdir()} == lists | {"spm.vocab", ".stage.json"}
    dictionaries = {f"dict.{language}.txt" for language in ("en", "de", "zu")}
    binary = {f"{name}.{kind}" for name in names for kind in ("bin", "idx")}
    assert {path.name for path in (prepared / "bin").iterdir()} == binary | dictionaries | lists | {".stage.json"}
    assert {os.readlink(prepared / "bin" / name) for name in dictionaries} == {"dict.txt"}
    assert (prepared / "bin/langs.txt").read_text() == "en\nde\nzu\n"
    assert (prepared / "bin/lang_pairs.txt").read_text() == "en-de\nde-en\nen-zu\nzu-en\n"
    assert (prepared / "groups.tsv").read_text() == "de\tall\t200\nzu\tall\t200\n"
    for side in ("en", "de"):
        assert (prepared / f"raw/train.en-de.{side}").read_bytes() == (source / f"train.de-en.{side}").read_bytes()
    unzipped = gzip.decompress((source / "test.en-zu.zu.gz").read_bytes())
    assert (prepared / "raw/test.en-zu.zu").read_bytes() == unzipped


def test_manifest(prepared: Path, source: Path) -> None:
    text = (prepared / "MANIFEST.json").read_text()
    manifest = json.loads(text)
    assert str(source) not in text and str(prepared) not in text
    assert manifest["languages"] == ["de", "zu"] and manifest["vocab_size"] == 330 and manifest["seed"] == 1
    assert set(manifest["tools"]) == {"python", "torch", "fairseq-fixed", "sentencepiece", "babel"}
    assert torch.__version__.startswith(manifest["tools"]["torch"])
    assert len(manifest["sources"]) == 12 and "train.en-zu.zu.gz" in manifest["sources"]
    assert manifest["raw"]["lines"]["test.en-zu"] == 5 and len(manifest["raw"]["files"]) == 12
    assert manifest["raw"]["dropped_lines"] == manifest["raw"]["crlf_lines"] == {}
    assert manifest["spm"] | {"files": 0} == {
        "pieces": 330,
        "lines_used": {"en": 400, "de": 200, "zu": 200},
        "files": 0,
    }
    stored = data_utils.load_indexed_dataset(str(prepared / "bin/train.en-de.de"))
    assert manifest["bin"]["tokens"]["train.en-de.de"] == {
        "total": int(stored.sizes.sum()),
        "longest": int(stored.sizes.max()),
    }


def test_binary_files_equal_those_of_fairseq(prepared: Path, tmp_path: Path) -> None:
    dictionary = Dictionary.load(str(prepared / "bin/dict.txt"))
    subword = Subword(prepared / "bin/spm.model")
    assert len(dictionary) == 330 + 1
    for name in ("train.en-de.de", "test.en-zu.en"):
        lines = (prepared / "raw" / name).read_text(encoding="utf-8").split("\n")[:-1]
        (tmp_path / name).write_text("".join(" ".join(subword.encode_pieces(line)) + "\n" for line in lines))
        FileBinarizer.multiprocess_dataset(
            str(tmp_path / name),
            "mmap",
            VocabularyDatasetBinarizer(dictionary),
            str(tmp_path / name),
            vocab_size=len(dictionary),
        )
        for kind in ("bin", "idx"):
            assert (prepared / f"bin/{name}.{kind}").read_bytes() == (tmp_path / f"{name}.{kind}").read_bytes()
        stored = data_utils.load_indexed_dataset(str(prepared / "bin" / name), dictionary)
        assert len(stored) == len(lines)
        assert subword.decode_pieces(dictionary[i] for i in stored[0][:-1]) == lines[0]


def test_same_options_give_same_bytes(prepared: Path, source: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(source, tmp_path / "moved")
    prepare.main(arguments(moved, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(prepared)


# --- What is in the text


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    odd = "a\u2028b\x85c\x0bd\re\x00f"

    def edit(folder: Path) -> None:
        (folder / "train.de-en.en").write_bytes(b"\xef\xbb\xbf" + f"{odd}\r\nx\n\n \nlast".encode())
        (folder / "train.de-en.de").write_bytes(f"{odd}\r\ny\r\nz\nz\nende\n".encode())

    out = tmp_path / "out"
    prepare.main(arguments(write_input(tmp_path / "in", edit), out))
    assert (out / "raw/train.en-de.en").read_bytes() == f"{odd}\nx\nlast\n".encode()
    assert (out / "raw/train.en-de.de").read_bytes() == f"{odd}\ny\nende\n".encode()
    raw = json.loads((out / "MANIFEST.json").read_text())["raw"]
    assert raw["dropped_lines"] == {"train.en-de": {"blank": 2}}
    assert raw["crlf_lines"] == {"train.de-en.en": 1, "train.de-en.de": 2}
    assert (out / "groups.tsv").read_text().startswith("de\tall\t3\n")
    assert len(data_utils.load_indexed_dataset(str(out / "bin/train.en-de.en"))) == 3


BAD_INPUT: dict[str, tuple[Edit, list[str]]] = {
    "not UTF-8": (rewrite("valid.de-en.de", b"gut\ngr\xfcn\n"), ["valid.de-en.de, line 2", "not UTF-8", "0xfc"]),
    "not aligned": (rewrite("test.de-en.de", b"a\nb\n"), ["test.de-en.en has 5", "test.de-en.de has 2"]),
    "longer": (rewrite("test.de-en.de", b"a\n" * 9), ["test.de-en.en has 5", "test.de-en.de has 9"]),
    "blank in test": (rewrite("test.de-en.de", b"a\nb\n \nc\nd\n"), ["test.de-en.de, line 3", "blank"]),
    "empty split": (
        lambda folder: [(folder / f"valid.de-en.{side}").write_bytes(b"") for side in ("en", "de")],
        ["valid.de-en.en", "no line with text"],
    ),
    "nothing but blanks in train": (
        lambda folder: [(folder / f"train.de-en.{side}").write_bytes(b"\n \n") for side in ("en", "de")],
        ["train.de-en.en", "no line with text"],
    ),
    "missing": (remove("valid.en-zu.zu.gz"), ["valid.en-zu.zu is missing"]),
    "twice, plain and gzip": (
        rewrite("train.de-en.de.gz", gzip.compress(b"a\n")),
        ["train.de-en.de and train.de-en.de.gz", "twice"],
    ),
    "twice, both orders": (rewrite("train.en-de.de", b"a\n"), ["train.de-en.de and train.en-de.de", "twice"]),
    "one side of train": (rewrite("train.de-zu.de", b"a\n"), ["train.de-zu.zu is missing"]),
    "unknown ending": (rewrite("train.de-en.de.zip", b"a\n"), ["train.de-en.de.zip", "not a name"]),
    "damaged gzip": (rewrite("test.en-zu.zu.gz", gzip.compress(b"a\n" * 999)[:-9]), ["test.en-zu.zu.gz", "damaged"]),
    "not gzip": (rewrite("test.en-zu.zu.gz", b"plain\n"), ["test.en-zu.zu.gz", "damaged"]),
    "nothing": (remove("*"), ["no parallel text"]),
    "no folder": (shutil.rmtree, ["no such folder"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(tmp_path: Path, case: str) -> None:
    edit, parts = BAD_INPUT[case]
    out = tmp_path / "out"
    message = error_of(*arguments(write_input(tmp_path / "in", edit), out))
    assert all(part in message for part in parts), message
    assert_nothing_half_written(out)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--vocab-size", "299"], "--vocab-size 299: give at least 300"),
        (["--vocab-size", "many"], "invalid int value: 'many'"),
        (["--train", "5"], "--train has no meaning"),
        (["--benchmark", "opus"], "invalid choice: 'opus'"),
        (["--benchmark", "demo4"], "--input has no meaning"),
        (["--sed", "1"], "unrecognized arguments: --sed 1"),
    ],
)
def test_wrong_options(source: Path, tmp_path: Path, more: list[str], part: str) -> None:
    assert part in error_of(*arguments(source, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_wrong_options_of_demos(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert "needs --input" in error_of("--benchmark", "local", "--out", out)
    assert "--valid 0: give at least 1" in error_of("--benchmark", "demo4", "--out", out, "--valid", "0")
    assert "required: --out" in error_of("--benchmark", "demo4")


def test_vocabulary_size_that_works_is_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = error_of(*arguments(source, out, "--vocab-size", "5000"))
    assert "--vocab-size 5000 is more than this text supports" in message
    assert_nothing_half_written(out)
    most = int(message.split()[-3])
    # The text is kept and the advice works.
    prepare.main(arguments(source, out, "--vocab-size", str(most)))
    assert f"give {most} or less" in error_of(*arguments(source, tmp_path / "more", "--vocab-size", str(most + 1)))


def test_vocabulary_smaller_than_the_alphabet(tmp_path: Path) -> None:
    alphabet = "".join(f"{chr(0x4E00 + i)}\n" for i in range(SIZES["train"])).encode()
    source = write_input(tmp_path / "in", rewrite("train.de-en.de", alphabet))
    message = error_of(*arguments(source, tmp_path / "out"))
    assert "--vocab-size 330 is too small" in message
    assert_nothing_half_written(tmp_path / "out")
    prepare.main(arguments(source, tmp_path / "out", "--vocab-size", message.split()[-3]))


# --- The command


def run_script(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    script = ["bash", str(ROOT / "data_prep/prepare.sh"), *command]
    return subprocess.run(script, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_demo_from_any_folder(tmp_path: Path) -> None:
    sizes = ("--train", "300", "--valid", "10", "--test", "12")
    done = run_script("--benchmark", "demo4", "--out", "out", "--vocab-size", "500", *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/MANIFEST.json").read_text())
    assert manifest["sizes"] == {"train": 300, "valid": 10, "test": 12} and manifest["sources"] == {}
    languages = (tmp_path / "out/bin/langs.txt").read_text().split()
    assert languages == ["en", *manifest["languages"]]
    english = {(tmp_path / f"out/raw/test.en-{xx}.en").read_bytes() for xx in languages[1:]}
    assert len(english) == 1


def test_error_ends_the_command_with_one_line(tmp_path: Path) -> None:
    write_input(tmp_path / "in", rewrite("valid.de-en.de", b"gr\xfcn\n"))
    done = run_script("--benchmark", "local", "--input", "in", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.split("\n") if "error" in line] == [done.stderr.split("\n")[-2]]
    assert done.stderr.split("\n")[-2].startswith("xmoe_fairseq: error: in/valid.de-en.de, line 1: not UTF-8")


# --- Parts


def test_sample_sizes() -> None:
    counts = {"en": 1000, "de": 600, "zu": 10}
    assert learn_spm.sample_sizes(counts, 2000, 5.0) == counts
    proportional = learn_spm.sample_sizes(counts, 161, 1.0)
    assert proportional == {"en": 100, "de": 60, "zu": 1}
    flat = learn_spm.sample_sizes(counts, 210, 1e9)
    assert flat == {"en": 100, "de": 100, "zu": 10}


def test_sample_takes_that_many_seeded(tmp_path: Path) -> None:
    for language in ("aa", "bb"):
        for side in ("en", language):
            (tmp_path / f"train.en-{language}.{side}").write_text("".join(f"{side}{i}\n" for i in range(50)))
    both = {"train.en-aa": 50, "train.en-bb": 50}
    texts = {"en": both, "aa": {"train.en-aa": 50}, "bb": {"train.en-bb": 50}}
    sizes = {"en": 40, "aa": 7, "bb": 50}
    drawn = list(learn_spm.sample(tmp_path, texts, sizes, 1))
    assert [sum(line.startswith(side) for line in drawn) for side in sizes] == [40, 7, 50]
    assert drawn == list(learn_spm.sample(tmp_path, texts, sizes, 1))
    assert drawn != list(learn_spm.sample(tmp_path, texts, sizes, 2))


def test_source_text_can_be_read_twice(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a\r\nb")
    text = SourceText(tmp_path / "text")
    assert list(text) == list(text) == ["a", "b"]
    assert (text.lines, text.crlf_lines) == (2, 1)
