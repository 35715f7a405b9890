"""Data folders that are damaged in any way: one line that names the file, before anything is made of it."""

from __future__ import annotations

import copy
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq import tasks
from fairseq.data import data_utils
from helpers import TINY_ARGS, build, write_toy_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xmoe_fairseq.data_prep import learn_spm
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.mt_benchmarks import BENCHMARKS
from xmoe_fairseq.subword import Subword
from xmoe_fairseq.tasks.binary_text import check_text
from xmoe_fairseq.tasks.data_folder import count_symbols, read_groups

NAME = "train.en-xx.xx"
HEAD = 26
SYMBOLS = 44


@pytest.fixture
def data(toy_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_data, tmp_path / "bin"))


@pytest.fixture(scope="module")
def options(toy_data: Path) -> Any:
    """The task's options, which take long to parse."""
    return build(toy_data).cfg.task


def task_of(options: Any, data: Path) -> Any:
    """Gives the task of a folder."""
    cfg = copy.deepcopy(options)
    cfg.data = str(data)
    return tasks.setup_task(cfg)


def refusal(run: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        run()
    message = str(caught.value.code)
    assert "\n" not in message and len(message) < 700
    assert all(part in message for part in parts), message


# --- Text files


def content(name: str, text: bytes | str) -> Callable[[Path], object]:
    return lambda data: (data / name).write_bytes(text.encode() if isinstance(text, str) else text)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def edit(data: Path) -> None:
        (data / name).unlink()
        make(data / name)

    return edit


DICT = "".join(f"w{i} 1\n" for i in range(SYMBOLS - 4))
TEXTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "languages not UTF-8": (content("langs.txt", b"en\nx\xff\n"), ["langs.txt, line 2: not UTF-8 (0xff)"]),
    "languages empty": (content("langs.txt", ""), ["langs.txt must list two or more"]),
    "language that is a path": (content("langs.txt", "en\n../xx\nyy\n"), ["langs.txt lists '../xx'"]),
    "language that ends in a hyphen": (content("langs.txt", "en\nxx-\n"), ["lists 'xx-'"]),
    "binary languages": (content("langs.txt", bytes(range(256))), ["langs.txt, line"]),
    "languages are a folder": (instead("langs.txt", Path.mkdir), ["has no langs.txt"]),
    "languages are a pipe": (instead("langs.txt", os.mkfifo), ["has no langs.txt"]),
    "dictionary is a pipe": (instead("dict.txt", os.mkfifo), ["has no dict.txt"]),
    "dictionary in circles": (instead("dict.txt", lambda path: path.symlink_to(path)), ["has no dict.txt"]),
    "dictionary not UTF-8": (content("dict.txt", DICT.encode() + b"\xff 1\n"), ["dict.txt, line 41: not UTF-8"]),
    "dictionary empty": (content("dict.txt", ""), ["dict.txt is empty"]),
    "no count": (content("dict.txt", DICT.replace("w7 1", "w7")), ["dict.txt, line 8: expected PIECE COUNT"]),
    "no piece": (content("dict.txt", DICT.replace("w7 1", " 1")), ["dict.txt, line 8: expected PIECE COUNT"]),
    "count of letters": (content("dict.txt", DICT.replace("w7 1", "w7 one")), ["line 8", "'w7 one'"]),
    "count without an end": (content("dict.txt", DICT.replace("w7 1", "w7 " + "1" * 9999)), ["line 8"]),
    "blank line": (content("dict.txt", DICT.replace("w7 1\n", "\n")), ["line 8: expected PIECE COUNT, found ''"]),
    "piece twice": (content("dict.txt", DICT + "w3 1\n"), ["line 41: the piece 'w3' is there before"]),
    "special piece": (content("dict.txt", "<pad> 1\n" + DICT), ["line 1: the piece '<pad>' is there before"]),
    "carriage return": (content("dict.txt", "w0\rx 1\n" + DICT), ["line 1: expected PIECE COUNT"]),
    "cut off": (content("dict.txt", "".join(DICT.splitlines(True)[:20])), ["beyond dict.txt, which has 24 symbols"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_damaged_text_files_are_named(case: str, data: Path, options: Any) -> None:
    edit, parts = TEXTS[case]
    edit(data)
    refusal(lambda: task_of(options, data).load_dataset("train"), *parts)


def test_a_dictionary_of_stock_fairseq_is_read(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("a 5\nmadeupword0000 0\n<pad> 1 #fairseq:overwrite\n\u3000x 1\r\nlast 1")
    assert count_symbols(str(tmp_path / "dict.txt")) == 4 + 5


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"xx\t\xff\n", "groups.tsv, line 1: not UTF-8"),
        (b"xx mine\n", "line 1: expected LANGUAGE<tab>GROUP"),
        (b"xx\tmine\n\nyy\tmine\n", "line 2: expected"),
        (b"xx\tmine\nxx\tother\n", "line 2: xx is there before"),
    ],
)
def test_damaged_groups_are_named(text: bytes, part: str, data: Path) -> None:
    (data.parent / "groups.tsv").write_bytes(text)
    refusal(lambda: read_groups(str(data), BENCHMARKS["local"]), part)


@pytest.mark.parametrize("pairs", ["abc", "en", "en-", "-", "en-xx-yy", "en-xx,,xx-en", "../x-en"])
def test_directions_that_are_none_are_one_line(pairs: str, toy_data: Path) -> None:
    refusal(lambda: build(toy_data, *TINY_ARGS, f"--lang-pairs={pairs}"), "has no direction")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, value) for option in ("max_source_positions", "max_target_positions") for value in (0, -1)),
        *(("sampling_temperature", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
        ("valid_lines", -1),
        ("batch_pool_size", -1),
    ],
)
def test_options_out_of_range_are_one_line(option: str, value: float, toy_data: Path, options: Any) -> None:
    cfg = copy.deepcopy(options)
    setattr(cfg, option, value)
    refusal(lambda: task_of(cfg, toy_data), f"--{option.replace('_', '-')} {value} is out of range")


def test_mutants_of_a_model_are_refused_or_used(tmp_path: Path) -> None:
    """SentencePiece says some of what is wrong in bytes that are not UTF-8."""
    good = learn_spm.train(iter(["the cat and the dog saw 12 birds"] * 9), 9, 300)
    path = tmp_path / "gr\udcfcn.model"

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        changes=st.dictionaries(st.integers(0, len(good) - 1), st.integers(0, 255), max_size=3),
        size=st.just(len(good)) | st.integers(0, len(good)),
    )
    def check(changes: dict[int, int], size: int) -> None:
        mutant = bytearray(good)
        for position, byte in changes.items():
            mutant[position] = byte
        path.write_bytes(mutant[:size])
        try:
            Subword(path).encode_pieces("the cat")
        except UserError as error:
            assert "prepare" in error.message

    check()
    path.write_bytes(good)
    assert Subword(path).decode_pieces(Subword(path).encode_pieces("the cat")) == "the cat"
    path.write_bytes(b"")
    refusal(lambda: Subword(path), "is not a SentencePiece model, or is damaged")


# --- Binary files


def packed(path: Path, offset: int, form: str, value: Any) -> None:
    changed = bytearray(path.read_bytes())
    struct.pack_into(f"<{form}", changed, offset, value)
    path.write_bytes(changed)


def index(offset: int, form: str, value: Any) -> Callable[[Path], object]:
    return lambda data: packed(data / f"{NAME}.idx", offset, form, value)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:size])


LINES = 200
PLACES = HEAD + 4 * LINES
BINARY: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (cut(f"{NAME}.idx", 0), [".idx is truncated"]),
    "cut to 100 bytes": (cut(f"{NAME}.idx", 100), [".idx is truncated"]),
    "cut by 400 bytes": (cut(f"{NAME}.idx", HEAD + 12 * LINES - 400), [".idx is truncated"]),
    "something behind": (lambda data: (data / f"{NAME}.idx").open("ab").write(b"x"), [".idx is truncated, damaged"]),
    "2^62 lines": (index(18, "Q", 2**62), [".idx is truncated, damaged"]),
    "2^64 - 1 lines": (index(18, "Q", 2**64 - 1), [".idx is truncated, damaged"]),
    "fewer lines": (index(18, "Q", 5), [".idx is truncated, damaged"]),
    "another version": (index(9, "Q", 2), [".idx is truncated, damaged"]),
    "unknown numbers": (index(17, "B", 99), [".idx is truncated, damaged"]),
    "fractions": (index(17, "B", 6), [".idx is truncated, damaged"]),
    "wider numbers": (index(17, "B", 4), ["line 2 is not where it must be"]),
    "places of zero": (index(PLACES, "1600s", bytes(1600)), ["line 2 is not where it must be"]),
    "last places of zero": (index(PLACES + 800, "800s", bytes(800)), ["line 101 is not where it must be"]),
    "negative place": (index(PLACES + 8, "q", -2), ["line 2 is not where it must be"]),
    "length of zero": (index(HEAD + 4, "i", 0), ["line 2 is not where it must be"]),
    "negative length": (index(HEAD, "i", -1), ["line 1 is not where it must be"]),
    "length without an end": (index(HEAD + 4 * 199, "i", 2**31 - 1), [".bin has", "bytes instead of"]),
    "index is a pipe": (instead(f"{NAME}.idx", os.mkfifo), [".idx is missing"]),
    "text is a folder": (instead(f"{NAME}.bin", Path.mkdir), [".bin is missing"]),
    "token beyond": (
        lambda data: packed(data / f"{NAME}.bin", 0, "H", 44),
        ["line 1: the token 44 is beyond dict.txt"],
    ),
    "language token": (lambda data: packed(data / f"{NAME}.bin", 0, "H", 46), ["the token 46 is beyond dict.txt"]),
    "not written to its end": (
        lambda data: (data / f"{NAME}.bin").write_bytes(bytes((data / f"{NAME}.bin").stat().st_size)),
        [".bin is damaged, line 1 has no end"],
    ),
}


@pytest.mark.parametrize("case", BINARY)
def test_damaged_binary_files_are_named(case: str, data: Path, options: Any) -> None:
    edit, parts = BINARY[case]
    edit(data)
    refusal(lambda: task_of(options, data).load_dataset("train"), NAME, *parts)


def test_further_parts_of_a_text_are_checked(data: Path, options: Any) -> None:
    for path in data.glob("train.en-xx.*"):
        shutil.copy(path, data / path.name.replace("train", "train1"))
    task = task_of(options, data)
    task.load_dataset("train", combine=True)
    cut("train1.en-xx.xx.idx", 100)(data)
    again = task_of(options, data)
    refusal(lambda: again.load_dataset("train", combine=True), "train1.en-xx.xx.idx is truncated")


@pytest.mark.parametrize("kind", ["idx", "bin"])
def test_mutants_are_refused_or_read_as_they_are(kind: str, toy_data: Path, tmp_path: Path) -> None:
    """An index that is taken gives the lines that it gave before; a text that is taken has tokens that exist."""
    for end in ("idx", "bin"):
        shutil.copy(toy_data / f"{NAME}.{end}", tmp_path / f"x.{end}")
    path = tmp_path / f"x.{kind}"
    good = path.read_bytes()
    stored = data_utils.load_indexed_dataset(str(tmp_path / "x"))
    sentences = [stored[i].tolist() for i in range(len(stored))]

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        changes=st.dictionaries(
            st.integers(0, 60) | st.integers(0, len(good) - 1), st.integers(0, 255), min_size=1, max_size=4
        ),
        size=st.just(len(good)) | st.integers(0, len(good)),
    )
    def check(changes: dict[int, int], size: int) -> None:
        mutant = bytearray(good)
        for position, byte in changes.items():
            mutant[position] = byte
        # Another file of its name, for the one before may still be mapped into memory.
        path.unlink()
        path.write_bytes(mutant[:size])
        try:
            assert check_text(str(tmp_path / "x"), SYMBOLS) == LINES
        except UserError as error:
            assert str(tmp_path / "x") in error.message
            return
        read = data_utils.load_indexed_dataset(str(tmp_path / "x"))
        got = [read[i].tolist() for i in range(len(read))]
        if kind == "idx":
            assert got == sentences
        else:
            assert list(map(len, got)) == list(map(len, sentences))
            assert all(min(line) >= 0 and max(line) < SYMBOLS and line[-1] == 2 for line in got)

    check()


def test_large_numbers_of_tokens_are_compared_whole(tmp_path: Path) -> None:
    """A dictionary of more than 65,500 symbols has its tokens in 32 bits."""
    write_toy_data(tmp_path / "bin", ("xx",), lines=3)
    prefix = tmp_path / "bin" / NAME
    tokens = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.uint32)
    tokens[0] = 70_000
    tokens.tofile(f"{prefix}.bin")
    sizes = np.fromfile(f"{prefix}.idx", np.int32, 3, offset=HEAD)
    places = 4 * (np.cumsum(sizes) - sizes)
    head = Path(f"{prefix}.idx").read_bytes()[:17] + struct.pack("<BQ", 9, 3)
    Path(f"{prefix}.idx").write_bytes(head + sizes.tobytes() + places.astype(np.int64).tobytes())
    assert check_text(str(prefix), 70_001) == 3
    refusal(lambda: check_text(str(prefix), 70_000), "line 1: the token 70000 is beyond")
