"""Tests of the demo corpus generator."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path
from random import Random

import pytest
from babel import localedata
from babel.dates import format_timedelta

from xmoe_fairseq.data_prep import cldr, demo_corpus
from xmoe_fairseq.data_prep.demo_corpus import CorpusError, Language, build, main, open_language

SIZES = {"train": 600, "valid": 60, "test": 60}
LANGUAGES = ("ca", "ka", "sw", "tl")
FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@pytest.fixture(scope="module")
def corpus() -> dict[str, dict[str, list[str]]]:
    """Return one small corpus that several tests look at."""
    return build(LANGUAGES, SIZES, 1)


def arguments(out: Path, **changes: object) -> list[str]:
    """Return a valid command line with some options changed."""
    options = {"languages": "ca,ka", "train": 30, "valid": 3, "test": 3, "seed": 1, "out": out} | changes
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def digest(folder: Path) -> dict[str, str]:
    """Return file name -> hash of its bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def language(code: str, **own: object) -> Language:
    """Return a language with some of its own data replaced."""
    real = open_language(code)
    return Language(code, real.locale, {**real.own, **own})


def test_shape(corpus: dict[str, dict[str, list[str]]]) -> None:
    assert list(corpus) == list(SIZES)
    for split, sides in corpus.items():
        assert list(sides) == ["en", *LANGUAGES]
        assert {len(lines) for lines in sides.values()} == {SIZES[split]}


def test_lines_are_unique_in_each_language_within_and_across_splits(corpus: dict[str, dict[str, list[str]]]) -> None:
    for code in ("en", *LANGUAGES):
        lines = [line for sides in corpus.values() for line in sides[code]]
        assert len(set(lines)) == len(lines)


def test_no_forbidden_characters(corpus: dict[str, dict[str, list[str]]]) -> None:
    for sides in corpus.values():
        for lines in sides.values():
            for line in lines:
                assert line == line.strip() != ""
                assert not FORBIDDEN.search(line)
                assert line.splitlines() == [line]
                assert not re.search(r"[{}]|\bM\d\d\b", line)


def test_same_seed_same_corpus_other_seed_another(corpus: dict[str, dict[str, list[str]]]) -> None:
    assert build(LANGUAGES, SIZES, 1) == corpus
    assert build(LANGUAGES, SIZES, 2) != corpus


def test_the_order_of_languages_does_not_matter(corpus: dict[str, dict[str, list[str]]]) -> None:
    assert build(LANGUAGES[::-1], SIZES, 1) == corpus


def test_same_bytes_in_processes_with_different_hash_seeds(tmp_path: Path) -> None:
    for seed in ("0", "1"):
        command = [sys.executable, "-m", demo_corpus.__name__, *arguments(tmp_path / seed)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert digest(tmp_path / "0") == digest(tmp_path / "1")
    assert len(digest(tmp_path / "0")) == 12


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path / "new" / "out")) == 0
    expected = build(["ca", "ka"], {"train": 30, "valid": 3, "test": 3}, 1)
    names = set()
    for split, sides in expected.items():
        for code in ("ca", "ka"):
            for side in ("en", code):
                names.add(f"{split}.en-{code}.{side}")
                written = (tmp_path / "new" / "out" / f"{split}.en-{code}.{side}").read_bytes()
                assert written == "".join(line + "\n" for line in sides[side]).encode()
    assert set(digest(tmp_path / "new" / "out")) == names
    assert "36/36" in capsys.readouterr().err


def written(item: demo_corpus.Item, *codes: str) -> list[str]:
    """Return an item's line in some languages."""
    return [item(open_language(code)) for code in codes]


def test_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpus, "FIRST_DAY", date(2024, 3, 5))
    monkeypatch.setattr(demo_corpus, "DAYS", 1)
    full = demo_corpus.draw_date("full", range(1, 13), Random(1))
    assert written(full, "en", "ca", "ja", "tl") == [
        "Tuesday, March 5, 2024",
        "dimarts, 5 de març del 2024",
        "2024年3月5日火曜日",
        "Martes, Marso 5, 2024",
    ]
    medium = demo_corpus.draw_date("medium", range(1, 13), Random(1))
    assert written(medium, "en", "de", "ru") == ["Mar 5, 2024", "05.03.2024", "5 мар. 2024\u202fг."]
    # The time itself pins Python's generator: it must not change from version to version.
    assert written(demo_corpus.draw_datetime(Random(3)), "en", "ca", "hi", "el") == [
        "March 5, 2024, 6:34\u202fPM",
        "5 de març del 2024, 18:34",
        "5 मार्च 2024, 6:34 pm",
        "5 Μαρτίου 2024 - 6:34\u202fμ.μ.",
    ]


def test_quantities_and_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpus, "AMOUNTS", range(3, 4))
    kilometers = demo_corpus.draw_quantity("length-kilometer", Random(1))
    # The Chinese one is in CLDR only as the short form, which its long form inherits.
    assert written(kilometers, "en", "ca", "ru", "zh") == ["3 kilometers", "3 quilòmetres", "3 километра", "3公里"]
    dollars = demo_corpus.draw_price("USD", Random(1))
    assert written(dollars, "en", "ru", "sw") == ["3 US dollars", "3 доллара США", "dola za Marekani 3"]


def test_lists_and_relative_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(code: str, rng: Random) -> demo_corpus.Item:
        return demo_corpus.draw_name("territories", code, rng)

    countries = demo_corpus.draw_list(name, ["FR", "ES"], range(2, 3), Random(1))
    assert written(countries, "en", "sw") == ["France and Spain", "Ufaransa na Uhispania"]
    monkeypatch.setattr(demo_corpus, "STEPS", {"day": (86_400, 1)})
    ago, ahead = (demo_corpus.draw_relative([("day", direction)], Random(1)) for direction in ("past", "future"))
    assert written(ago, "en", "ca", "de") == ["1 day ago", "fa 1 dia", "vor 1 Tag"]
    assert written(ahead, "en", "ca", "de") == ["in 1 day", "d’aquí a 1 dia", "in 1 Tag"]


@pytest.mark.parametrize("step", demo_corpus.STEPS)
def test_relative_times_stay_in_their_unit(step: str) -> None:
    """Babel rounds 6 days to 1 week; the number drawn must come out as it is."""
    seconds, reach = demo_corpus.STEPS[step]
    for number in range(1, reach + 1):
        line = format_timedelta(number * seconds, add_direction=True, locale="en")
        assert line == f"in {number} {step}{'s' if number > 1 else ''}"


def test_own_data_is_babels_minus_root() -> None:
    """Compare with Babel's merged data: what differs from root there must be ours, what is only root's must not."""
    root = cldr.own_data("root")
    for code in ("ca", "nb", "sw", "bn", "iu"):
        merged, own = localedata.load(open_language(code).locale.language), open_language(code).own
        for section in ("territories", "languages", "currency_names"):
            assert own.get(section, {}) == merged[section]
        for section in ("date_formats", "time_formats", "datetime_formats"):
            for style, pattern in merged[section].items():
                source = own if style in own.get(section, {}) else root
                assert str(pattern) == str(source[section][style])
    assert "months" in open_language("nb").own  # Inherited from "no", its real parent.


def test_codes_and_root_texts_are_no_names() -> None:
    chosen = [open_language(code) for code in ("en", "iu", "ca")]
    assert demo_corpus.kinds(chosen, Random(1)).keys() <= {"full dates", "long dates", "medium dates"}
    assert demo_corpus.own_name("territories", open_language("iu"), "ZA") == set()
    assert demo_corpus.own_name("territories", language("ca", territories={"ZA": "ZA"}), "ZA") == set()
    assert demo_corpus.own_name("territories", open_language("ca"), "TG") == {"Togo"}
    assert demo_corpus.currency_names(open_language("iu"), "USD") == set()
    # Oromo has no units at all; a symbol of root's is no word.
    assert demo_corpus.unit_names(open_language("om"), "length-kilometer") == set()
    symbol = {"length-kilometer": {"long": {"one": "{0} km", "other": "{0} km"}}}
    assert demo_corpus.unit_names(language("en", unit_patterns=symbol), "length-kilometer") == set()
    word = {"length-kilometer": {"long": {"one": "{0} kilom", "other": "{0} kiloms"}}}
    assert demo_corpus.unit_names(language("en", unit_patterns=word), "length-kilometer") == {"kilom", "kiloms"}
    # Chuvash writes its relative times with root's sign.
    assert demo_corpus.relative_names(open_language("cv"), ("day", "past")) == set()
    assert demo_corpus.relative_names(open_language("ca"), ("day", "past")) == {"fa {0} dia", "fa {0} dies"}


def test_patterns_need_their_names() -> None:
    assert demo_corpus.has_pattern(open_language("ca"), "date_formats", "full")
    assert not demo_corpus.has_pattern(language("ca", months={}), "date_formats", "full")
    assert not demo_corpus.has_pattern(language("ca", days={}), "date_formats", "full")
    assert demo_corpus.has_pattern(language("ca", days={}), "date_formats", "long")
    assert not demo_corpus.has_pattern(language("ca", date_formats={}), "date_formats", "long")
    assert not demo_corpus.has_pattern(open_language("ca"), "date_formats", "short")  # d/M/yy
    # Bengali takes AM and PM from root.
    assert not demo_corpus.has_pattern(open_language("bn"), "time_formats", "short")


@pytest.mark.parametrize(
    ("codes", "missing"),
    [
        (["zh"], "medium dates"),  # 2024年3月5日 is both the long and the medium form.
        (["bn"], "dates with times"),
        (["om"], "territories, languages, quantities, prices"),
    ],
)
def test_kinds_left_out_are_reported(codes: list[str], missing: str, caplog: pytest.LogCaptureFixture) -> None:
    build(codes, {"train": 5}, 1)
    assert missing in caplog.text


def test_no_english_in_a_language_with_a_script_of_its_own(corpus: dict[str, dict[str, list[str]]]) -> None:
    for line in corpus["train"]["ka"]:
        assert not re.search("[a-z]", line)  # Capitals stay in "CFA", the franc.


def test_ambiguous_names_are_skipped() -> None:
    chosen = [open_language(code) for code in ("en", "ca")]

    def spell(language: Language, name: str) -> set[str]:
        return {"both"} if language.code == "ca" and name in "ab" else {name} if name != "d" else set()

    assert demo_corpus.unambiguous("abcd", chosen, spell) == ["a", "c"]


@pytest.mark.parametrize("text", ["", " a", "a\u00a0", "a\tb", "a\nb", "a\x85b", "a\u2028b", "a\u2029b"])
def test_unusable(text: str) -> None:
    assert not demo_corpus.usable(text)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"languages": "ca,qq"}, 1, "unknown language 'qq': give ISO 639 codes"),
        ({"languages": "ca,root"}, 1, "unknown language 'root'"),
        ({"languages": "../../ca"}, 1, "unknown language '../../ca'"),
        ({"languages": ""}, 1, "unknown language ''"),
        ({"languages": "ca,zu,ca"}, 1, "language 'ca' is given more than once"),
        ({"languages": "ca,en"}, 1, "'en' is among the languages: leave it out"),
        ({"train": 0}, 1, "train is 0 lines: ask for at least 1"),
        ({"test": -3}, 1, "test is -3 lines: ask for at least 1"),
        ({"valid": "many"}, 2, "argument --valid: invalid int value: 'many'"),
        # Rohingya has relative times only.
        ({"languages": "rhg", "train": 1000}, 1, "1006 different lines asked for, but these languages give only 2"),
    ],
)
def test_bad_request(
    changes: dict[str, object], code: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", demo_corpus.__name__, *arguments(tmp_path / "out", **changes)]
    assert subprocess.run(command).returncode == code
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"demo_corpus.py: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_build_without_languages() -> None:
    with pytest.raises(CorpusError, match="no languages given"):
        build([], {"train": 1}, 1)


@pytest.mark.parametrize(("out", "message"), [("out", "File exists"), ("out/inside", "Not a directory")])
def test_out_is_a_file(out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(arguments(tmp_path / out)) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_is_not_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main(arguments(tmp_path)) == 1
    assert "Permission denied" in capsys.readouterr().err.splitlines()[-1]


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Let the system refuse the bytes beyond the first 200 of a file, in a process of its own."""
    (tmp_path / "train.en-ca.en").write_text("older\n")
    command = [sys.executable, "-m", demo_corpus.__name__, *arguments(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("demo_corpus.py: error: [Errno 27] File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["train.en-ca.en"]
    assert (tmp_path / "train.en-ca.en").read_text() == "older\n"
