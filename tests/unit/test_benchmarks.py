"""The published benchmarks: their table, and their preparation from small archives of the published layouts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fairseq.data import data_utils
from helpers_prepare import error_of, nllb_command, read, write_flores, write_local
from published import Site, mined, opus100, serve, tar_gz, text, zipped

from xmoe_fairseq.data_prep import download, prepare, raw_nllb
from xmoe_fairseq.mt_benchmarks import BENCHMARKS, FLORES200, M4, M15, OPUS100, OPUS100_GROUPS, directions

WITHOUT_TEST = {"an", "dz", "hy", "mn", "yo"}
OPUS_SIZES = {"train": 30, "dev": 4, "test": 5}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 0.0)


# --- The table


def test_languages_and_groups() -> None:
    assert len(OPUS100) == len(set(OPUS100)) == 94 and list(OPUS100) == sorted(OPUS100)
    assert not WITHOUT_TEST & set(OPUS100) and "en" not in OPUS100
    assert {group: len(members) for group, members in OPUS100_GROUPS.items()} == {"high": 45, "medium": 28, "low": 21}
    assert len(set(M15)) == 15 and set(M4) < set(M15)
    assert {g: len(m) for g, m in BENCHMARKS["m15"].groups.items()} == {"high": 5, "low": 5, "very_low": 5}
    for benchmark in BENCHMARKS.values():
        grouped = [language for members in benchmark.groups.values() for language in members]
        assert not grouped or sorted(grouped) == sorted(benchmark.languages)
        assert not benchmark.groups or all(
            language in benchmark.groups[benchmark.group_of(language)] for language in grouped
        )
    for language in M4:
        assert BENCHMARKS["m4"].group_of(language) == BENCHMARKS["m15"].group_of(language)
    assert BENCHMARKS["demo4"].group_of("ca") == "all"


def test_codes_of_the_sources() -> None:
    assert raw_nllb.flores_code("msa") == "zsm_Latn" and raw_nllb.flores_code("eng") == "eng_Latn"
    assert raw_nllb.OPUS_CODES.keys() == {"eng", *M15}
    assert set(raw_nllb.MINED) < set(M15) and set(raw_nllb.SEED) < set(M15)
    assert BENCHMARKS["m4"].pairs == ("eng-nso", "eng-msa", "eng-tgl", "eng-cat")
    assert directions(M4, "eng")[:2] == ["eng-nso", "nso-eng"]
    assert len(directions(OPUS100)) == 188


# --- OPUS-100


@pytest.fixture(scope="module")
def opus_members() -> dict[str, bytes]:
    return opus100((*OPUS100, "yo"), OPUS_SIZES)


def opus_command(out: Path, *more: str) -> list[str]:
    return ["--benchmark", "opus100", "--out", str(out), "--vocab-size", "800", *more]


def opus_name(language: str) -> str:
    """The pair as the publisher wrote it: both orders occur."""
    return f"en-{language}" if language > "en" else f"{language}-en"


@pytest.fixture(scope="module")
def whole(opus_members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPUS-100 prepared from the one archive, over a connection that breaks off."""
    out = tmp_path_factory.mktemp("opus100") / "out"
    archive = tar_gz(opus_members)
    with serve(Site({"/all.tar.gz": archive}, cut=len(archive) // 3)) as site:
        prepare.main(opus_command(out, "--source", "whole", "--url", f"{site.url}/all.tar.gz"))
        assert len(site.asked) > 1
    return out


def test_opus100_layout(whole: Path, opus_members: dict[str, bytes]) -> None:
    assert {path.name for path in whole.iterdir()} == {"raw", "spm", "bin", "groups.tsv", "MANIFEST.json", "download"}
    assert read(whole / "bin/langs.txt") == ["en", *OPUS100]
    assert read(whole / "bin/lang_pairs.txt") == directions(OPUS100)
    raw = {path.name for path in (whole / "raw").iterdir()} - {".stage.json"}
    assert raw == {f"{s}.en-{xx}.{side}" for s in ("train", "valid", "test") for xx in OPUS100 for side in ("en", xx)}
    for language in OPUS100:
        pair = opus_name(language)
        for published, split in (("train", "train"), ("dev", "valid"), ("test", "test")):
            for side in ("en", language):
                member = f"opus-100-corpus/v1.0/supervised/{pair}/opus.{pair}-{published}.{side}"
                assert (whole / f"raw/{split}.en-{language}.{side}").read_bytes() == opus_members[member]
    assert (whole / "groups.tsv").read_text().startswith("af\tmedium\t30\nam\tlow\t30\nar\thigh\t30\n")
    record = json.loads((whole / "MANIFEST.json").read_text())["raw"]["archives"]["opus-100-corpus-v1.0.tar.gz"]
    assert record["source"] == "whole" and record["url"].endswith("/all.tar.gz") and len(record["sha256"]) == 64


def test_opus100_a_pair_at_a_time(
    whole: Path, opus_members: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for language in OPUS100:
        folder = f"opus-100-corpus/v1.0/supervised/{opus_name(language)}/"
        members = {name: content for name, content in opus_members.items() if name.startswith(folder)}
        files[f"/opus-100-corpus-{opus_name(language)}-v1.0.tar.gz"] = tar_gz(members)
    late = files.pop("/opus-100-corpus-en-zu-v1.0.tar.gz")
    out = tmp_path / "out"
    with serve(Site(files)) as site:
        command = opus_command(out, "--url", f"{site.url}/opus-100-corpus-{{pair}}-v1.0.tar.gz")
        message = error_of(*command)
        assert f"{site.url}/opus-100-corpus-en-zu-v1.0.tar.gz: the server answered 404" in message
        assert [path.name for path in out.iterdir()] == ["download"]
        assert len(site.asked) == 94
        files["/opus-100-corpus-en-zu-v1.0.tar.gz"] = late
        prepare.main(command)
        assert len(site.asked) == 95  # what came the first time is not fetched again
        prepare.main(command)
        assert len(site.asked) == 95 and capsys.readouterr().out.count("already finished") == 3
    for path in (whole / "raw").iterdir():
        if not path.name.startswith("."):
            assert (out / "raw" / path.name).read_bytes() == path.read_bytes()
    assert (out / "bin/dict.txt").read_bytes() == (whole / "bin/dict.txt").read_bytes()
    assert "source = " in error_of(*opus_command(out, "--source", "whole"))
    # The same from files that are there already.
    again = tmp_path / "again"
    prepare.main(opus_command(again, "--archive", str(out / "download")))
    assert (again / "bin/dict.txt").read_bytes() == (whole / "bin/dict.txt").read_bytes()
    assert not (again / "download").exists()


def test_archive_without_a_pair_is_refused(opus_members: dict[str, bytes], tmp_path: Path) -> None:
    members = {name: content for name, content in opus_members.items() if not name.endswith("opus.en-fr-dev.fr")}
    (tmp_path / "a.tar.gz").write_bytes(tar_gz(members))
    message = error_of(*opus_command(tmp_path / "out", "--source", "whole", "--archive", str(tmp_path / "a.tar.gz")))
    assert "a.tar.gz has no supervised/en-fr/opus.en-fr-dev.fr" in message
    assert not (tmp_path / "out").exists()


# --- m4 and m15


@pytest.fixture
def flores(tmp_path: Path) -> Path:
    return write_flores(tmp_path / "flores.tar.gz")


def test_flores_and_local_text(flores: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = write_local(tmp_path / "in", M4)
    prepare.main(nllb_command(out, flores, "--source", "local", "--input", str(source)))
    assert read(out / "bin/langs.txt") == ["eng", *M4]
    for language in M4:
        code = raw_nllb.flores_code(language)
        assert (out / f"raw/valid.eng-{language}.{language}").read_bytes() == text(code, "dev", 7)
        assert (out / f"raw/test.eng-{language}.eng").read_bytes() == text("eng_Latn", "devtest", 8)
        name = f"train.eng-{language}.{language}"
        assert (out / "raw" / name).read_bytes() == (source / name).read_bytes()
        assert len(data_utils.load_indexed_dataset(str(out / "bin" / name))) == 60
    assert (out / "groups.tsv").read_text() == "nso\tlow\t60\nmsa\thigh\t60\ntgl\thigh\t60\ncat\tlow\t60\n"
    manifest = json.loads((out / "MANIFEST.json").read_text())
    assert manifest["source"] == ["local"] and manifest["languages"] == list(M4)
    assert len(manifest["sources"]) == 8 and manifest["raw"]["archives"]["flores200_dataset.tar.gz"]


def test_sources_are_joined(flores: Path, tmp_path: Path) -> None:
    """msa of OPUS has text in two corpora, nso in one and in the mined text, cat in one, tgl only mined."""
    title = {"en-ms": ("QED", "GNOME"), "en-nso": ("QED",), "ca-en": ("GNOME",)}
    files = {}
    for pair, corpora in title.items():
        for corpus in corpora:
            members = {f"{corpus}.{pair}.{side}": text(side, f"{corpus}{pair}-", 20) for side in pair.split("-")}
            files[f"/{corpus}/v1/{pair}.zip"] = zipped({"README": b"x\n", **members})
    for code in ("nso", "tgl", "zsm"):
        files[f"/nllb/eng_Latn-{code}_Latn.gz"] = mined(15, "eng_Latn", f"{code}_Latn")
    out = tmp_path / "out"
    with serve(Site(files)) as site:
        urls = ["--url", f"opus={site.url}/{{corpus}}/{{pair}}.zip", "--url", f"mined={site.url}/nllb/{{pair}}.gz"]
        chosen = ["--source", "opus,mined", "--opus-corpora", "QED/v1,GNOME/v1", *urls]
        prepare.main(nllb_command(out, flores, *chosen))
    manifest = json.loads((out / "MANIFEST.json").read_text())
    lines = {name: count for name, count in manifest["raw"]["lines"].items() if name.startswith("train")}
    assert lines == {"train.eng-nso": 35, "train.eng-msa": 55, "train.eng-tgl": 15, "train.eng-cat": 20}
    there = Counter(record.get("there", True) for record in manifest["raw"]["archives"].values())
    assert there == {True: 8, False: 4}
    catalan = read(out / "raw/train.eng-cat.cat")
    assert catalan == text("ca", "GNOMEca-en-", 20).decode().split("\n")[:-1]
    assert read(out / "raw/train.eng-nso.eng")[20:] == text("eng_Latn", "mined", 15).decode().split("\n")[:-1]


def test_seed_of_m15(flores: Path, tmp_path: Path) -> None:
    members = {
        f"NLLB-Seed/{pair}/{side}": text(side, pair, 30)
        for pair in ("fur_Latn-eng_Latn", "eng_Latn-lim_Latn")
        for side in pair.split("-")
    }
    (tmp_path / "seed.zip").write_bytes(zipped(members))
    source = write_local(tmp_path / "in", [language for language in M15 if language != "lim"])
    more = ["--benchmark", "m15", "--archive", f"seed={tmp_path / 'seed.zip'}"]
    out = tmp_path / "out"
    message = error_of(*nllb_command(out, flores, *more, "--source", "seed"))
    assert "--source seed has no text for nso, run, ssw, ind" in message and not out.exists()
    prepare.main(nllb_command(out, flores, *more, "--source", "seed,local", "--input", str(source)))
    lines = json.loads((out / "MANIFEST.json").read_text())["raw"]["lines"]
    assert (lines["train.eng-fur"], lines["train.eng-lim"], lines["train.eng-ssw"]) == (90, 30, 60)
    assert read(out / "bin/langs.txt") == ["eng", *M15]


def test_archive_of_the_authors(tmp_path: Path) -> None:
    members = {
        "m15_32k/vocab_bin/sentencepiece.source.32000.model": b"x",
        "m15_32k/data_bin/shard000/dict.nso.txt": b"x",
    }
    for language in M15:
        for split, lines in (("train", 40), ("valid", 5), ("test", 6)):
            for side in ("eng", language):
                name = f"m15_32k/retrieved_data/{split}.eng-{language}.{side}"
                members[name] = text(side, f"{language}{split}", lines)
    (tmp_path / "m15.zip").write_bytes(zipped(members))
    command = ["--benchmark", "m4", "--out", str(tmp_path / "out"), "--vocab-size", "330"]
    prepare.main([*command, "--archive", str(tmp_path / "m15.zip")])
    assert (tmp_path / "out/raw/test.eng-cat.cat").read_bytes() == text("cat", "cattest", 6)
    assert read(tmp_path / "out/bin/langs.txt") == ["eng", *M4]


def test_wrong_flores_is_refused(flores: Path, tmp_path: Path) -> None:
    source = write_local(tmp_path / "in", M4)
    command = ["--benchmark", "m4", "--out", str(tmp_path / "out"), "--source", "local", "--input", str(source)]
    message = error_of(*command, "--archive", f"flores={flores}")
    assert f"instead of {FLORES200.size}" in message
    zeros = "0" * 64
    assert f"instead of {zeros}" in error_of(*command, "--archive", f"flores={flores}", "--sha256", f"flores={zeros}")
    assert not (tmp_path / "out").exists()


def test_damaged_table_of_mined_text(flores: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mined"
    folder.mkdir()
    for code in ("nso", "zsm", "tgl"):
        (folder / f"nllb-eng_Latn-{code}_Latn.gz").write_bytes(mined(50, "eng_Latn", f"{code}_Latn"))
    bad = folder / "nllb-eng_Latn-tgl_Latn.gz"
    bad.write_bytes(bad.read_bytes()[:-20])
    command = nllb_command(tmp_path / "out", flores, "--source", "mined", "--archive", f"mined={folder}")
    assert "nllb-eng_Latn-tgl_Latn.gz: damaged after line" in error_of(*command)
    bad.write_bytes(mined(50, "eng_Latn", "tgl_Latn"))
    assert "--source mined has no text for cat" in error_of(*command)
    assert not (tmp_path / "out").exists()


def test_local_text_of_other_languages_is_refused(flores: Path, tmp_path: Path) -> None:
    source = write_local(tmp_path / "in", (*M4, "deu"))
    message = error_of(*nllb_command(tmp_path / "out", flores, "--source", "local", "--input", str(source)))
    assert "--input has deu, not of the benchmark" in message


@pytest.mark.parametrize(
    ("benchmark", "more", "part"),
    [
        ("opus100", ["--source", "drive"], "--source drive: choose from pairs, whole, local"),
        ("opus100", ["--source", "pairs,whole"], "pairs cannot be joined"),
        ("opus100", ["--source", "local"], "needs --input"),
        ("opus100", ["--input", "x"], "--input has no meaning for --source pairs: add local"),
        ("opus100", ["--url", "flores=http://x"], "no source 'flores' is used: choose from pairs"),
        ("opus100", ["--url", "http://x/all.tar.gz"], "it lacks {pair}"),
        ("opus100", ["--archive", "/no/such/folder"], "there is no file /no/such/folder"),
        ("m15", ["--source", "opus,drive"], "drive cannot be joined"),
        ("m15", ["--source", "seed,seed"], "cannot be joined"),
        ("m15", ["--source", "seed", "--opus-corpora", "QED/v1"], "no meaning without --source opus"),
        ("m15", ["--source", "opus", "--opus-corpora", "../x"], "expected NAME/VERSION"),
        ("m4", ["--max-ratio", "0.5"], "--max-ratio 0.5: give at least 1"),
        ("m4", ["--max-chars", "-1"], "--max-chars -1"),
        ("m4", ["--train", "5"], "--train has no meaning"),
        ("demo4", ["--dedup"], "--dedup has no meaning"),
        ("demo4", ["--source", "opus"], "--source has no meaning"),
        ("local", ["--url", "http://x"], "--url has no meaning"),
    ],
)
def test_wrong_options(benchmark: str, more: list[str], part: str, tmp_path: Path) -> None:
    assert part in error_of("--benchmark", benchmark, "--out", str(tmp_path / "out"), *more)
    assert not list(tmp_path.rglob("*.*"))


@pytest.fixture(autouse=True)
def no_rest(tmp_path: Path) -> Iterator[None]:
    """Frees the disk at once: these folders hold many files."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
