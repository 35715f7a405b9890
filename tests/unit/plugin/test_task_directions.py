"""The tasks with any directions: codes with hyphens, sets that some directions lack, zero-shot, --lang-pairs FILE."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import tasks
from helpers import TINY_ARGS, TRAIN_ARGS, batches, build, write_toy_data
from helpers_commands import run_warm

from xmoe_fairseq.errors import UserError

PAIRS = ["en-pt-BR", "pt-BR-en", "en-zh-Hans", "zh-Hans-en"]


@pytest.fixture(scope="module")
def hyphens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes with hyphens, a test set between two languages that are not trained together, and one with one side."""
    data = write_toy_data(tmp_path_factory.mktemp("hyphens") / "bin", ("pt-BR", "zh-Hans"))
    (data / "lang_pairs.txt").write_text("".join(f"{pair}\n" for pair in PAIRS))
    for end in ("bin", "idx"):
        for side in ("pt-BR", "zh-Hans"):
            shutil.copy(data / f"test.en-{side}.{side}.{end}", data / f"test.zh-Hans-pt-BR.{side}.{end}")
        shutil.copy(data / f"test.en-pt-BR.en.{end}", data / f"test1.en-pt-BR.en.{end}")
        shutil.copy(data / f"test.en-zh-Hans.zh-Hans.{end}", data / f"test1.zh-Hans-pt-BR.zh-Hans.{end}")
        for side in ("en", "pt-BR"):
            shutil.copy(data / f"valid.en-pt-BR.{side}.{end}", data / f"valid1.en-pt-BR.{side}.{end}")
    return data


@pytest.fixture(scope="module")
def options(hyphens: Path) -> Any:
    """The task's options, which take long to parse."""
    return build(hyphens).cfg.task


@pytest.fixture
def task_of(options: Any, hyphens: Path) -> Callable[..., Any]:
    """Makes the task of training on a folder with other values of options."""

    def make(data: Path = hyphens, **values: Any) -> Any:
        cfg = copy.deepcopy(options)
        for name, value in {"data": str(data), **values}.items():
            setattr(cfg, name, value)
        return tasks.setup_task(cfg)

    return make


@pytest.fixture
def translation(task_of: Callable[..., Any]) -> Callable[[str, str], Any]:
    """Makes the task of ``fairseq-generate``."""
    return lambda source, target: task_of(source_lang=source, target_lang=target)


def test_codes_with_hyphens_are_trained(task_of: Callable[..., Any]) -> None:
    task = task_of()
    assert task.lang_pairs == PAIRS and task.langs == ["en", "pt-BR", "zh-Hans"]
    assert task.source_langs == ["en", "pt-BR", "en", "zh-Hans"]
    tags = {task.source_dictionary.index(f"__{code}__"): code for code in task.langs}
    firsts = {tags[int(row[row != 1][0])] for one in batches(task) for row in one["net_input"]["src_tokens"]}
    assert firsts == set(task.langs)
    task.load_dataset("train")
    assert len(task.dataset("train")) > 0


def test_directions_of_the_folder_are_the_listed_ones(
    task_of: Callable[..., Any], hyphens: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(hyphens, tmp_path / "bin"))
    (data / "lang_pairs.txt").write_text("en-zh-Hans\npt-BR-en\n")
    assert task_of(data).lang_pairs == ["en-zh-Hans", "pt-BR-en"]
    for content, message in (("en-xx\n", "holds 'en-xx', which is no direction"), ("\n", "names no direction")):
        (data / "lang_pairs.txt").write_text(content)
        with pytest.raises(UserError, match=message):
            task_of(data)


def test_a_direction_that_is_not_trained_can_be_translated(translation: Callable[[str, str], Any]) -> None:
    for source, target in (("zh-Hans", "pt-BR"), ("pt-BR", "zh-Hans")):
        task = translation(source, target)
        task.load_dataset("test")
        assert task.lang_pairs == [f"{source}-{target}"] and len(task.dataset("test")) == 20
        same = translation(source, "en")
        same.load_dataset("test")
        one, other = (each.dataset("test")[3]["source"].tolist() for each in (task, same))
        assert one[1:] == other[1:] and one[0] != other[0]  # the target's language token
        assert task.dataset("test")[3]["target"] is not None
    with pytest.raises(UserError, match="has no valid text of pt-BR-zh-Hans: its splits are test, test1, train, valid"):
        task.load_dataset("valid")


def test_a_set_without_references_can_be_translated_and_not_validated(
    translation: Callable[[str, str], Any], task_of: Callable[..., Any]
) -> None:
    task = translation("en", "pt-BR")
    task.load_dataset("test1")
    (sample, *_) = list(task.get_batch_iterator(task.dataset("test1"), max_tokens=200).next_epoch_itr(shuffle=False))
    assert sample["target"] is None and len(task.dataset("test1")) == 20
    with pytest.raises(UserError, match=r"test1\.en-pt-BR\.pt-BR\.idx is missing"):
        translation("pt-BR", "en").load_dataset("test1")
    trained = task_of(lang_pairs="en-pt-BR")
    with pytest.raises(UserError, match=r"test1\.en-pt-BR\.pt-BR\.idx is missing"):
        trained.load_dataset("test1")


def test_validation_leaves_out_directions_that_lack_a_set(
    task_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(valid_lines=7)
    with caplog.at_level(logging.WARNING):
        for subset in ("valid", "valid1"):
            task.load_dataset(subset)
    assert len(task.dataset("valid")) == 4 * 7 and len(task.dataset("valid1")) == 2 * 20
    assert "valid1 leaves out what has no text in it: en-zh-Hans, zh-Hans-en" in caplog.text
    with pytest.raises(UserError, match="has no valid2 text of en-pt-BR, pt-BR-en, en-zh-Hans, zh-Hans-en"):
        task.load_dataset("valid2")


def test_either_order_of_a_pair_is_found(task_of: Callable[..., Any], hyphens: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(hyphens, tmp_path / "bin"))
    for path in data.glob("*.en-pt-BR.*"):
        path.rename(path.with_name(path.name.replace("en-pt-BR", "pt-BR-en")))
    task, before = task_of(data), task_of()
    for each in (task, before):
        each.load_dataset("valid")
    for i in range(80):
        assert task.dataset("valid")[i]["source"].equal(before.dataset("valid")[i]["source"])


@pytest.mark.parametrize("text", ["en-zh-Hans,pt-BR-en", "en-zh-Hans\npt-BR-en\n", "\ufeffen-zh-Hans,\r\npt-BR-en"])
def test_lang_pairs_from_a_file(text: str, task_of: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text(text, newline="")
    assert task_of(lang_pairs=str(file)).lang_pairs == ["en-zh-Hans", "pt-BR-en"]
    values = {"lang_pairs": str(file), "source_lang": "en", "target_lang": "pt-BR"}
    assert task_of(**values).lang_pairs == ["en-pt-BR"]


def test_options_hold_what_is_in_the_files(hyphens: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("en-zh-Hans\npt-BR-en\n")
    (tmp_path / "data.txt").write_text(f"{hyphens}\n")
    built = build(tmp_path / "data.txt", *TINY_ARGS, "--lang-pairs", str(tmp_path / "pairs.txt"))
    assert built.cfg.task.data == str(hyphens) and built.cfg.task.lang_pairs == "en-zh-Hans,pt-BR-en"
    assert built.task.lang_pairs == ["en-zh-Hans", "pt-BR-en"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--lang-pairs \S*pairs\.txt is no file and no list of directions: the data in \S* has no direction"),
        (b"en-xx\n", "has no direction en-xx: it has en-pt-BR, pt-BR-en"),
        (b"en-pt-BR\nen-pt-BR\n", "names a direction twice, en-pt-BR"),
        (b"en-pt-BR\xff\n", r"the file \S*pairs\.txt cannot be read"),
    ],
)
@pytest.mark.parametrize("way", [{}, {"source_lang": "en", "target_lang": "pt-BR"}])
def test_wrong_lang_pairs_are_one_line(
    content: bytes | None, message: str, way: dict[str, str], task_of: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "pairs.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        task_of(lang_pairs=str(file), **way)
    assert "\n" not in str(caught.value)


def test_two_readings_of_a_direction_are_refused(task_of: Callable[..., Any], tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "bin", ("b-c", "c"), lines=4, english_code="a")
    (data / "langs.txt").write_text("a\nb-c\na-b\nc\n")
    with pytest.raises(UserError, match=re.escape("a-b-c can be read as a to b-c or a-b to c")):
        task_of(data, lang_pairs="a-b-c")


def test_training_and_translation_with_hyphens(hyphens: Path, tmp_path: Path) -> None:
    """Also from a file of directions, which is gone when the checkpoint is read."""
    file = tmp_path / "pairs.txt"
    file.write_text("en-pt-BR\nzh-Hans-en\n")
    run_warm(
        *("fairseq-train", hyphens, "--user-dir", "xmoe_fairseq", *TRAIN_ARGS, *TINY_ARGS, "--max-update", "3"),
        *("--valid-subset", "valid,valid1", "--lang-pairs", file, "--save-dir", tmp_path, "--no-epoch-checkpoints"),
    )
    file.unlink()
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert state["cfg"]["task"]["lang_pairs"] == "en-pt-BR,zh-Hans-en"
    said = run_warm(
        *("fairseq-generate", hyphens, "--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--cpu"),
        *("--source-lang", "zh-Hans", "--target-lang", "pt-BR", "--gen-subset", "test1", "--beam", "1"),
        *("--path", tmp_path / "checkpoint_last.pt", "--max-len-b", "9", "--num-workers", "0"),
    ).stdout
    assert len(re.findall("^D-", said, re.MULTILINE)) == 20 and not re.findall("^T-", said, re.MULTILINE)


WEIGHTS = {f"main:{pair}": 0.25 for pair in PAIRS}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ('{"main:en-pt-BR": 1', "is no JSON"),
        ("[1, 2]", "is no dictionary of weights"),
        ('{"main:en-pt-BR": 1}', "has no weight of main:pt-BR-en, main:en-zh-Hans, main:zh-Hans-en: every"),
        (json.dumps({**WEIGHTS, "main:en-pt-BR": "much"}), "the weight of main:en-pt-BR is 'much'"),
        (json.dumps({**WEIGHTS, "main:en-pt-BR": -1}), "the weight of main:en-pt-BR is -1"),
        (json.dumps(dict.fromkeys(WEIGHTS, 0)), "all weights are 0"),
        (json.dumps(WEIGHTS), ""),
    ],
)
def test_sampling_weights_from_a_file(
    content: str | None, message: str, task_of: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "weights.json"
    if content is not None:
        file.write_text(content)
    task = task_of(sampling_weights_from_file=str(file))
    if not message:
        task.load_dataset("train")
        assert len(task.dataset("train")) == 4 * 200
        return
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        task.load_dataset("train")
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_further_text_has_directions_of_its_own(task_of: Callable[..., Any], hyphens: Path) -> None:
    extra = {"mined": str(hyphens), "back": str(hyphens)}
    pairs = {"mined": "en-pt-BR,zh-Hans-en", "back": "pt-BR-en"}
    listed = "en-zh-Hans"  # the further directions need not be listed, as in stock fairseq
    tokens = {"main": ("tgt", None), "mined": ("src", "tgt")}
    task = task_of(lang_pairs=listed, extra_data=str(extra), extra_lang_pairs=str(pairs), langtoks=str(tokens))
    task.load_dataset("train")
    keys = ["main:en-zh-Hans", "mined:en-pt-BR", "mined:zh-Hans-en", "back:pt-BR-en"]
    assert list(task.dataset("train").keys) == keys
    assert len(task.dataset("train")) == 4 * 200
    number = {code: task.source_dictionary.index(f"__{code}__") for code in task.langs}
    mined, back = (task.dataset("train").datasets[place][0] for place in (1, 3))
    assert [int(mined[side][0]) for side in ("source", "target")] == [number["en"], number["pt-BR"]]
    assert not {int(back[side][0]) for side in ("source", "target")} & set(number.values())
    task.load_dataset("valid")
    assert len(task.dataset("valid")) == 20


@pytest.mark.parametrize(
    ("extra", "pairs", "message"),
    [
        ({"mined": "BIN"}, {"mined": "en-pt-BR,en"}, "'mined' has 'en', which is no direction between two of en, pt"),
        ({"mined": "BIN"}, {"mined": "en-xx"}, "'mined' has 'en-xx', which is no direction"),
        ({}, {"mined": "en-pt-BR"}, "--extra-lang-pairs names 'mined', and --extra-data has no folder of it"),
        ({"mined": "BIN"}, {}, "--extra-data names 'mined', and --extra-lang-pairs has no directions of it"),
        ({"mined": "BIN/none"}, {"mined": "en-pt-BR"}, "there is no folder .*none, which --extra-data names"),
        ({"mined": "BIN"}, {"mined": "zh-Hans-pt-BR"}, "train.zh-Hans-pt-BR.zh-Hans.idx is missing"),
    ],
)
def test_wrong_further_text_is_one_line(
    extra: dict[str, str], pairs: dict[str, str], message: str, task_of: Callable[..., Any], hyphens: Path
) -> None:
    folders = {kind: folder.replace("BIN", str(hyphens)) for kind, folder in extra.items()}
    with pytest.raises(UserError, match=message) as caught:
        task_of(extra_data=str(folders), extra_lang_pairs=str(pairs)).load_dataset("train")
    assert "\n" not in str(caught.value)
