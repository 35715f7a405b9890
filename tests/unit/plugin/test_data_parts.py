"""Training on several data folders, one for each epoch in turn."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from helpers import TINY_ARGS, build, write_toy_data
from helpers_training import MODEL, Run, assert_same, train

from xmoe_fairseq.errors import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two parts, of which the second has three times as many lines of one pair, and no other ones."""
    folder = tmp_path_factory.mktemp("parts") / "bin"
    write_toy_data(folder / "part0", ("xx", "yy"), lines=100)
    write_toy_data(folder / "part1", ("xx", "yy"), lines=300)
    for path in (folder / "part1").glob("train.en-yy.*"):
        path.unlink()
    for path in (folder / "part0").iterdir():
        if not path.name.startswith("train."):
            shutil.copy(path, folder)
    return folder


def both(folder: Path) -> str:
    return os.pathsep.join(str(folder / part) for part in ("part0", "part1"))


def epochs(data: str | Path, numbers: Sequence[int]) -> Any:
    """The task after it has loaded the epochs, as a training does that is resumed before the first one."""
    task = build(Path(data), *TINY_ARGS, "--sampling-temperature", "2").task
    for number in numbers:
        task.load_dataset("train", epoch=number, combine=True)
    return task


def drawn(task: Any) -> list[tuple[int, ...]]:
    dataset = task.dataset("train")
    return [tuple(dataset[index][1]["source"].tolist()) for index in range(len(dataset))]


def test_each_epoch_reads_the_next_folder(parts: Path) -> None:
    manager = epochs(both(parts), [1]).data_manager
    found = [manager.get_split_data_param_list("train", epoch) for epoch in (1, 2, 3)]
    folders = [[Path(one["data_path"]).name for one in directions] for directions in found]
    # en-yy is in the first folder only.
    assert folders == [["part0"] * 4, ["part1"] * 2 + ["part0"] * 2, ["part0"] * 4]


def test_the_parts_of_a_folder_are_found(parts: Path) -> None:
    task, named = epochs(parts, [2]), epochs(both(parts), [2])
    assert task.data_manager.folders == both(parts).split(os.pathsep)
    assert task.folder == named.folder == str(parts) and task.identity == named.identity
    assert drawn(task) == drawn(named)


def test_sampling_does_not_depend_on_what_was_read_before(parts: Path) -> None:
    """Stock fairseq guesses the lines of folders that it has not read."""
    one, resumed = epochs(both(parts), [1, 2]), epochs(both(parts), [2])
    assert one.data_manager._training_data_sizes == resumed.data_manager._training_data_sizes
    assert one.data_manager._training_data_sizes["main:en-xx"] == {0: 100, 1: 300}
    assert one.data_manager._training_data_sizes["main:en-yy"] == {0: 100}
    assert drawn(one) == drawn(resumed) != drawn(epochs(both(parts), [1]))
    ratios = one.dataset("train").sample_ratios
    assert ratios == pytest.approx([(400 / 1000) ** 0.5] * 2 + [(100 / 1000) ** 0.5] * 2)


def test_numbered_files_are_counted_as_they_are_read(parts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(parts, tmp_path / "bin")
    for path in (parts / "part0").glob("train.en-xx.*"):
        shutil.copy(path, copy / "part1" / path.name.replace("train.", "train1."))
    task = build(copy, *TINY_ARGS, "--upsample-primary", "2").task
    task.load_dataset("train", epoch=2, combine=True)
    assert task.data_manager._training_data_sizes["main:en-xx"] == {0: 100, 1: 700}
    assert len(task.dataset("train").datasets[0]) == 700


def test_validation_and_test_are_of_the_first_folder(parts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(parts, tmp_path / "bin")
    for path in (copy / "part1").glob("[tv]*.en-*"):
        if not path.name.startswith("train."):
            path.unlink()
    task = epochs(both(copy), ())
    task.load_dataset("valid")
    assert len(task.dataset("valid")) == 4 * 20


def test_folders_that_do_not_go_together_are_one_line(parts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(parts, tmp_path / "bin")
    (copy / "part1/langs.txt").write_text("en\nyy\nxx\n")
    with pytest.raises(UserError, match=r"part0 has the languages en,xx,yy, but \S+part1 has en,yy,xx: folders of one"):
        epochs(copy, ())
    shutil.copy(parts / "langs.txt", copy / "part1")
    (copy / "part1/dict.txt").write_text("".join(f"v{i} 1\n" for i in range(40)))
    with pytest.raises(UserError, match=r"part0 has the dictionary \w+, but \S+part1 has \w+: folders of one"):
        epochs(both(copy), ())
    with pytest.raises(UserError, match=r"there is no data folder .*part2"):
        epochs(f"{both(parts)}:{parts / 'part2'}", ())
    with pytest.raises(UserError, match="--virtual-epoch-size does not go with several data folders"):
        build(parts, *TINY_ARGS, "--virtual-epoch-size", "100")
    odd = shutil.copytree(parts / "part0", tmp_path / "a:b")
    with pytest.raises(UserError, match="has a ':' in its path"):
        epochs(odd, ())


def test_a_later_folder_is_checked_before_the_first_epoch(parts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(parts, tmp_path / "bin")
    path = copy / "part1/train.en-xx.xx.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"part1/train\.en-xx\.xx\.bin has \d+ bytes instead of"):
        epochs(copy, [1])
    for path in copy.glob("part?/train.en-xx.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"part0/train\.en-xx\.en\.idx is missing"):
        epochs(copy, [1])


def test_directions_of_any_folder_are_trained(parts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(parts, tmp_path / "bin")
    (copy / "part0/lang_pairs.txt").write_text("en-xx\n")
    (copy / "part1/lang_pairs.txt").write_text("yy-en\nen-xx\n")
    assert epochs(copy, ()).lang_pairs == ["en-xx", "yy-en"]
    (copy / "part1/lang_pairs.txt").write_text("en-zz\n")
    with pytest.raises(UserError, match=r"lang_pairs\.txt holds 'en-zz', which is no direction"):
        epochs(copy, ())


def test_groups_are_beside_the_folder_of_the_parts(parts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(parts, tmp_path / "bin")
    (tmp_path / "groups.tsv").write_text("xx\thigh\nyy\tlow\n")
    for data in (copy, both(copy)):
        task = epochs(data, ())
        task.load_dataset("valid@low")
        assert len(task.dataset("valid@low")) == 2 * 20


def test_a_killed_training_goes_on_within_a_later_part(parts: Path, tmp_path: Path) -> None:
    options = (*MODEL, "--sampling-temperature", "2", "--max-tokens", "900", "--save-interval-updates", "1")
    whole = train(parts, tmp_path / "whole", 12, *options)
    assert "part1 train en-xx 300 examples" in whole.said
    size = (whole.save / "checkpoint_last.pt").stat().st_size
    # A save writes three files: of its update, best, last. It is killed in the tenth.
    killed = Run(parts, tmp_path / "killed", *options, "--max-update", "12", dies_after=int(28.5 * size))
    assert killed.wait() == -9
    resumed = train(parts, tmp_path / "killed", 12, *options)
    epoch, updates = re.findall(r"Loaded checkpoint .* \(epoch (\d) @ (\d+) updates\)", resumed.said)[-1]
    first = min(int(one) for one in re.findall(r"checkpoint_2_(\d+)\.pt", whole.said))
    assert epoch == "2" and first <= int(updates) < 12
    assert_same(resumed.parameters(), whole.parameters())


def test_very_unequal_pairs(tmp_path: Path) -> None:
    """10 lines beside 100,000: every line is drawn, in the share that the temperature gives."""
    data = write_toy_data(tmp_path / "bin", ("xx", "yy"), lines=10)
    for side in ("en", "xx"):
        prefix, large = data / f"train.en-xx.{side}", tmp_path / side
        builder = MMapIndexedDatasetBuilder(f"{large}.bin", dtype=np.uint16)
        for _ in range(10_000):
            builder.merge_file_(str(prefix))
        builder.finalize(f"{large}.idx")
        for kind in ("bin", "idx"):
            shutil.move(f"{large}.{kind}", f"{prefix}.{kind}")
    for temperature, share in (("1", 1e-4), ("5", 1e-4**0.2)):
        task = build(data, *TINY_ARGS, "--sampling-temperature", temperature, "--lang-pairs", "en-xx,yy-en").task
        task.load_dataset("train")
        dataset = task.dataset("train")
        large, few = np.split(dataset._cur_indices, [dataset.cumulated_sizes[0]])
        assert len(few) == pytest.approx(len(large) * share, abs=2)
        assert len(set(few)) >= (10 if share > 1e-3 else 5)
        iterator = task.get_batch_iterator(dataset, max_tokens=4000, max_positions=task.max_positions())
        batches = np.concatenate(iterator.frozen_batches)
        assert np.array_equal(np.sort(batches), np.arange(len(dataset)))
