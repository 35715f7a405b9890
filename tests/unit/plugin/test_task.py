"""The tasks: languages and directions from the data folder, and what is said of a bad one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fairseq import checkpoint_utils
from helpers import TINY_ARGS, TRAIN_ARGS, batches, build, write_toy_data
from helpers_commands import run_warm
from helpers_decoding import write_checkpoint

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.mt_benchmarks import BENCHMARKS, M4, directions
from xmoe_fairseq.patches import training
from xmoe_fairseq.tasks.data_folder import read_languages


@pytest.fixture
def data(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the toy data that a test may damage."""
    return Path(shutil.copytree(toy_data, tmp_path / "bin"))


def test_all_directions_are_trained_with_the_target_token_first(toy_data: Path) -> None:
    task = build(toy_data).task
    assert task.lang_pairs == ["en-xx", "xx-en", "en-yy", "yy-en"] == directions(["xx", "yy"])
    tags = {task.source_dictionary.index(f"__{lang}__"): lang for lang in ("en", "xx", "yy")}
    assert len(tags) == 3 and task.source_dictionary.unk() not in tags
    firsts = set()
    for sample in batches(task):
        tokens = sample["net_input"]["src_tokens"]
        firsts |= {tags[int(row[row != 1][0])] for row in tokens}
    assert firsts == {"en", "xx", "yy"}


@pytest.mark.parametrize("multiple", ["1", "8"])
def test_no_sentence_is_left_out_of_validation(multiple: str, toy_data: Path) -> None:
    task = build(toy_data).task
    task.load_dataset("valid")
    iterator = task.get_batch_iterator(
        task.dataset("valid"), max_tokens=200, required_batch_size_multiple=int(multiple)
    )
    ids = [i for sample in iterator.next_epoch_itr(shuffle=False) for i in sample["id"].tolist()]
    assert sorted(ids) == sorted(4 * list(range(20)))  # numbered within each of the 4 directions


@pytest.mark.parametrize("name", ["translation", "translation_multi_simple_epoch"])
def test_stock_tasks_leave_sentences_out_in_training_only(name: str, data: Path) -> None:
    for language in ("en", "xx"):
        shutil.copy(data / "dict.txt", data / f"dict.{language}.txt")
    words = ["--source-lang", "en", "--target-lang", "xx"] if name == "translation" else ["--lang-pairs", "en-xx"]
    words += ["--langs", "en,xx"] if name != "translation" else []
    task = build(data, *TINY_ARGS, "--task", name, *words).task
    task.load_dataset("valid")

    def read(max_tokens: int) -> list[int]:
        size: dict[str, Any] = {"max_tokens": max_tokens, "required_batch_size_multiple": 8}
        iterator = task.get_batch_iterator(task.dataset("valid"), **size, disable_iterator_cache=True)
        return sorted(i for sample in iterator.next_epoch_itr(shuffle=False) for i in sample["id"].tolist())

    sizes = range(40, 200, 20)
    assert all(read(size) == list(range(20)) for size in sizes)
    token = training._trains.set(True)
    try:
        assert min(len(read(size)) for size in sizes) < 20
    finally:
        training._trains.reset(token)


def test_a_part_of_the_directions_can_be_trained(toy_data: Path) -> None:
    assert build(toy_data, *TINY_ARGS, "--lang-pairs", "en-yy").task.lang_pairs == ["en-yy"]


def test_sampling_temperature_is_the_benchmarks() -> None:
    from xmoe_fairseq.tasks import TASKS

    assert TASKS.keys() == BENCHMARKS.keys()
    for name, task in TASKS.items():
        config = getattr(task, "__dataclass")()
        assert config.sampling_temperature == BENCHMARKS[name].sampling_temperature
        assert config.sampling_method == "temperature"
        assert config.encoder_langtok == "tgt"
        assert config.valid_lines == BENCHMARKS[name].valid_lines


def test_demo_languages() -> None:
    for name, count in (("demo4", 4), ("demo15", 15), ("demo94", 94)):
        languages = BENCHMARKS[name].languages
        assert len(set(languages)) == len(languages) == count
        assert "en" not in languages
        assert len(BENCHMARKS[name].pairs) == count


def test_94_languages_load_one_dictionary(tmp_path: Path) -> None:
    languages = BENCHMARKS["demo94"].languages
    data = write_toy_data(tmp_path / "bin", languages, lines=2)
    built = build(data, "--task", "multilingual_demo94", *TINY_ARGS)
    assert len(built.task.lang_pairs) == 188
    assert list(built.task.dicts) == ["src", "tgt"]
    built.task.load_dataset("train")
    assert len(built.task.dataset("train")) > 0


@pytest.fixture(scope="module")
def m4_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("m4") / "bin", M4, english_code="eng")


def m4_task(data: Path, *more: str) -> Any:
    return build(data, "--task", "multilingual_m4", *TINY_ARGS, *more).task


def test_english_has_the_code_of_the_benchmark(m4_data: Path) -> None:
    task = m4_task(m4_data)
    assert task.lang_pairs == directions(M4, "eng") and task.langs == ["eng", *M4]
    task.load_dataset("train")
    assert len(task.dataset("train")) > 0


@pytest.mark.parametrize(("lines", "read"), [("0", 20), ("7", 7), ("20", 20), ("100", 20)])
def test_validation_reads_the_first_lines(lines: str, read: int, m4_data: Path) -> None:
    task = m4_task(m4_data, "--valid-lines", lines)
    ids = sorted(i for sample in batches(task) for i in sample["id"].tolist())
    assert ids == sorted(8 * list(range(read)))
    whole = m4_task(m4_data)
    whole.load_dataset("valid")
    for position in (0, read - 1, read, 8 * read - 1):
        direction, line = divmod(position, read)
        for side in ("source", "target"):
            assert task.dataset("valid")[position][side].equal(whole.dataset("valid")[20 * direction + line][side])
    task.load_dataset("test")
    assert len(task.dataset("test")) == 8 * 20


def test_generation_reads_all_lines(m4_data: Path) -> None:
    task = m4_task(m4_data, "--valid-lines", "7", "--source-lang", "cat", "--target-lang", "eng")
    task.load_dataset("valid")
    assert len(task.dataset("valid")) == 20


def test_subset_of_a_group(m4_data: Path) -> None:
    task = m4_task(m4_data, "--valid-lines", "7")
    task.load_dataset("valid@low")
    assert len(task.dataset("valid@low")) == 4 * 7  # nso and cat
    task.load_dataset("test@high")
    assert len(task.dataset("test@high")) == 4 * 20
    part = m4_task(m4_data, "--lang-pairs", "cat-eng,eng-tgl")
    part.load_dataset("valid@low")
    assert len(part.dataset("valid@low")) == 20
    every = m4_task(m4_data)
    every.load_dataset("valid")
    assert all(
        part.dataset("valid@low")[i]["source"].equal(every.dataset("valid")[7 * 20 + i]["source"]) for i in range(20)
    )


def test_groups_of_the_user_are_those_of_groups_tsv(toy_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy_data, tmp_path / "bin"))
    with pytest.raises(UserError, match=r"there is no .*/groups\.tsv"):
        build(data).task.load_dataset("valid@mine")
    (tmp_path / "groups.tsv").write_text("xx\tmine\t200\nyy\tother\n")
    task = build(data).task
    task.load_dataset("valid@mine")
    assert len(task.dataset("valid@mine")) == 2 * 20
    (tmp_path / "groups.tsv").write_text("xx mine\n")
    with pytest.raises(UserError, match=r"groups\.tsv, line 1: expected LANGUAGE<tab>GROUP, found 'xx mine'"):
        build(data).task.load_dataset("valid@mine")


def test_unknown_and_empty_groups_are_named(m4_data: Path) -> None:
    task = m4_task(m4_data, "--lang-pairs", "cat-eng")
    with pytest.raises(UserError, match=r"no group 'medium' for the subset valid@medium: choose from high, low"):
        task.load_dataset("valid@medium")
    with pytest.raises(UserError, match="subset valid@high is empty: none of cat-eng"):
        task.load_dataset("valid@high")


def test_losses_of_groups_are_logged_in_training(m4_data: Path, tmp_path: Path) -> None:
    """The loss of all is the mean of those of the groups by tokens, and decides the best checkpoint."""
    log = run_warm(
        "fairseq-train",
        m4_data,
        *("--user-dir", "xmoe_fairseq"),
        *TRAIN_ARGS,
        *("--task", "multilingual_m4"),
        *TINY_ARGS,
        *("--valid-lines", "5", "--valid-subset", "valid,valid@high,valid@low", "--max-update", "3"),
        *("--log-format", "json", "--save-dir", tmp_path, "--no-epoch-checkpoints"),
    )
    rows = [json.loads(line[line.index("{") :]) for line in (log.stdout + log.stderr).splitlines() if '_loss"' in line]
    losses = {
        subset: next(float(row[f"{subset}_loss"]) for row in rows if f"{subset}_loss" in row)
        for subset in ("valid", "valid@high", "valid@low")
    }
    low, high = sorted((losses["valid@high"], losses["valid@low"]))
    assert low < losses["valid"] < high
    assert (tmp_path / "checkpoint_best.pt").exists()


@pytest.mark.parametrize("name", ["m4", "m15", "opus100"])
def test_other_language_lists_are_refused(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    english, (first, second, *rest) = benchmark.english, benchmark.languages
    (tmp_path / "dict.txt").write_text("a 1\n")
    for wrong, message in (
        ([english, second, first, *rest], f"was not made for {name}: its languages are {second},{first}"),
        ([english, first, *rest], f"was not made for {name}"),
        ([english, first, second, *rest, "xx"], f"was not made for {name}"),
        ([first, second, *rest], f"must list {english} and then"),
        (["xx", first, second, *rest], f"must list {english} and then"),
    ):
        (tmp_path / "langs.txt").write_text("".join(f"{language}\n" for language in wrong))
        with pytest.raises(UserError, match=message):
            read_languages(str(tmp_path), benchmark)


def remove(name: str) -> Callable[[Path], None]:
    return lambda data: (data / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:size])


def languages(*names: str) -> Callable[[Path], None]:
    return lambda data: (data / "langs.txt").write_text("".join(f"{name}\n" for name in names)) and None


def shorter_side(data: Path) -> None:
    other = write_toy_data(data.parent / "other", ("xx",), lines=5)
    for end in ("bin", "idx"):
        shutil.copy(other / f"train.en-xx.xx.{end}", data / f"train.en-xx.xx.{end}")


def empty_split(data: Path) -> None:
    other = write_toy_data(data.parent / "other", ("xx",), lines=0)
    for lang in ("en", "xx"):
        for end in ("bin", "idx"):
            shutil.copy(other / f"train.en-xx.{lang}.{end}", data / f"train.en-xx.{lang}.{end}")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no data folder"),
    "no languages": (remove("langs.txt"), "has no langs.txt"),
    "no dictionary": (remove("dict.txt"), "has no dict.txt"),
    "duplicate language": (languages("en", "xx", "xx"), "each once"),
    "one language": (languages("en"), "must list two or more languages"),
    "a language without data": (languages("en", "xx", "yy", "zz"), r"train\.en-zz\.en\.idx is missing"),
    "missing file": (remove("train.en-xx.en.bin"), r"train\.en-xx\.en\.bin is missing"),
    "truncated text": (truncate("train.en-xx.en.bin", 10), r"train\.en-xx\.en\.bin has 10 bytes instead of"),
    "truncated index": (truncate("train.en-xx.en.idx", 30), r"train\.en-xx\.en\.idx is truncated"),
    "truncated header": (truncate("train.en-xx.en.idx", 3), r"train\.en-xx\.en\.idx is truncated"),
    "misaligned": (shorter_side, r"train\.en-xx is misaligned: 200 lines in en, 5 in xx"),
    "empty": (empty_split, r"train\.en-xx is empty"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_bad_data_is_named_in_one_line(damage: Callable[[Path], object], message: str, data: Path) -> None:
    damage(data)
    with pytest.raises(UserError, match=message) as error:
        build(data).task.load_dataset("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "multilingual_demo4"], "was not made for demo4: its languages are xx,yy"),
        (["--lang-pairs", "en-zz"], "has no direction en-zz: it has en-xx, xx-en"),
        (["--lang-pairs", "en-xx,en-xx"], "names a direction twice"),
        (["--valid-lines", "-1"], "--valid-lines -1 is out of range"),
        *((["--dataset-impl", name], f"--dataset-impl {name} does not go with") for name in ("lazy", "cached", "raw")),
        (["--source-lang", "en"], "go together"),
        (["--source-lang", "xx", "--target-lang", "zz"], "has no language zz: it has en, xx, yy"),
        (["--source-lang", "xx", "--target-lang", "xx"], "are both xx: give two languages"),
    ],
)
def test_bad_choices_are_named_in_one_line(options: list[str], message: str, toy_data: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(toy_data, *TINY_ARGS, *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["xmoe_transformer_tiny", "transformer_tiny"])
def test_checkpoints_of_the_stock_multilingual_task_are_read(arch: str, data: Path, tmp_path: Path) -> None:
    """Its options that are written as text, such as --left-pad-source, it keeps as it has read them."""
    for language in ("en", "xx"):
        shutil.copy(data / "dict.txt", data / f"dict.{language}.txt")
    words = ("--arch", arch, "--share-all-embeddings", "--encoder-embed-dim", "32", "--decoder-embed-dim", "32")
    task = ("--task", "translation_multi_simple_epoch", "--langs", "en,xx", "--lang-pairs", "en-xx")
    built = build(data, *words, *task)
    assert built.cfg.task.left_pad_source is True
    path = write_checkpoint(tmp_path / "stock.pt", built.cfg, built.model)
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], {"data": str(data)})
    assert models[0].state_dict().keys() == built.model.state_dict().keys()
