"""``xmoe checkpoint add-languages``: what a model knew stays, bit for bit, and it learns more."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from helpers import batches, build, write_toy_data
from helpers_training import MODEL, assert_same, train

from xmoe_fairseq.checkpoints import languages
from xmoe_fairseq.cli import main
from xmoe_fairseq.common import identity
from xmoe_fairseq.errors import UserError

EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
# Four special symbols and the toy data's pieces come before the language tokens.
FIRST_TOKEN = 44


@pytest.fixture(scope="module")
def checkpoint(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(toy_data, tmp_path_factory.mktemp("trained"), 6, *MODEL).save / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("more") / "bin", ("xx", "yy", "zz", "vv"))


@pytest.fixture(scope="module")
def grown(checkpoint: Path, more_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grown") / "more.pt"
    main(["checkpoint", "add-languages", str(checkpoint), "--data", str(more_data), "--out", str(out)])
    return out


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def traced(checkpoint: Path, symbols: int, **options: Any) -> dict[str, Any]:
    """A checkpoint whose embeddings, none tied to another, hold the numbers of their rows."""
    state = copy.deepcopy(read(checkpoint))
    state["cfg"]["task"] = {**state["cfg"]["task"], **options}
    for name in EMBEDDINGS:
        state["model"][name] = torch.arange(float(symbols)).unsqueeze(1).repeat(1, 3) + EMBEDDINGS.index(name)
    return state


def test_old_rows_stay_and_new_ones_are_the_mean_of_the_tokens(checkpoint: Path, grown: Path) -> None:
    old, new = read(checkpoint), read(grown)
    assert list(old["model"]) == list(new["model"])
    for name, tensor in old["model"].items():
        kept = new["model"][name]
        assert torch.equal(kept[: len(tensor)] if name in EMBEDDINGS else kept, tensor), name
    weight = new["model"][EMBEDDINGS[0]]
    assert len(weight) == len(old["model"][EMBEDDINGS[0]]) + 2 == FIRST_TOKEN + 5
    mean = weight[FIRST_TOKEN : FIRST_TOKEN + 3].mean(0)
    assert torch.allclose(weight[-2:], mean.expand(2, -1), atol=1e-7)
    assert len({new["model"][name].data_ptr() for name in EMBEDDINGS}) == 1
    assert "last_optimizer_state" in old and "last_optimizer_state" not in new


def test_the_file_is_of_the_new_data(grown: Path, more_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = read(grown)
    assert state["task_state"][identity.KEY] == identity.of_folder(str(more_data)).as_plain()
    assert state["cfg"]["task"]["data"] == str(more_data)
    main(["checkpoint", "info", str(grown)])
    assert "no state" in capsys.readouterr().out


@pytest.mark.parametrize("pair", ["en-xx", "yy-en"])
def test_what_the_model_says_of_before_is_the_same(
    pair: str, checkpoint: Path, grown: Path, toy_data: Path, more_data: Path
) -> None:
    found = []
    source, target = pair.split("-")
    for data, path in ((toy_data, checkpoint), (more_data, grown)):
        built = build(data, *MODEL, "--source-lang", source, "--target-lang", target)
        built.model.load_state_dict(read(path)["model"])
        built.model.eval()
        built.task.args.data = str(toy_data)  # the same text
        found.append([built.model(**sample["net_input"])[0] for sample in batches(built.task, "test")])
    for old, new in zip(*found, strict=True):
        assert new.shape[-1] == old.shape[-1] + 2
        torch.testing.assert_close(new[..., :-2], old, rtol=0, atol=1e-6)


def test_training_goes_on_with_all_languages(grown: Path, checkpoint: Path, more_data: Path, tmp_path: Path) -> None:
    run = train(more_data, tmp_path / "run", 2, *MODEL, "--finetune-from-model", str(grown))
    assert "num. shared model params" in run.said and len(run.parameters()[EMBEDDINGS[0]]) == FIRST_TOKEN + 5
    refused = train(more_data, tmp_path / "old", 2, *MODEL, "--finetune-from-model", str(checkpoint), check=False)
    last = refused.said.strip().split("\n")[-1]
    assert "add the new languages to it with xmoe checkpoint add-languages" in last and refused.process.exitcode == 1


def test_shards_are_joined(checkpoint: Path, grown: Path, more_data: Path, tmp_path: Path) -> None:
    parts, out = tmp_path / "parts.pt", tmp_path / "out.pt"
    main(["checkpoint", "shard", str(checkpoint), "--shards", "2", "--out", str(parts)])
    main(["checkpoint", "add-languages", str(parts), "--data", str(more_data), "--out", str(out)])
    assert_same(read(out)["model"], read(grown)["model"])


def test_rows_go_by_symbols(checkpoint: Path, tmp_path: Path) -> None:
    """Languages in another order, two kinds of tokens, the moving average, parameters that are not tied."""
    data = write_toy_data(tmp_path / "bin", ("zz", "yy", "xx"), lines=1)
    state = traced(checkpoint, FIRST_TOKEN + 6, langtoks_specs="main,mined")
    state["extra_state"]["ema"] = {EMBEDDINGS[1]: state["model"][EMBEDDINGS[1]].half()}
    assert languages.add(state, "my.pt", str(data)) == ("zz",)
    # en xx yy, en_mined xx_mined yy_mined -> en zz yy xx, the same mined
    rows = [*range(FIRST_TOKEN), 44, 45, 46, 45, 47, 48, 49, 48]
    for offset, name in enumerate(EMBEDDINGS):
        assert state["model"][name].tolist() == [[row + offset] * 3 for row in rows]
    average = state["extra_state"]["ema"][EMBEDDINGS[1]]
    assert average.dtype == torch.half and average[:, 0].tolist() == [row + 1 for row in rows]


def test_a_benchmarks_model_becomes_one_of_local_data(checkpoint: Path, more_data: Path) -> None:
    state = traced(checkpoint, FIRST_TOKEN + 3, _name="multilingual_demo4")
    languages.add(state, "my.pt", str(more_data))
    assert state["cfg"]["task"]["_name"] == "multilingual_local"


def test_what_cannot_be_added_is_one_line(checkpoint: Path, toy_data: Path, more_data: Path, tmp_path: Path) -> None:
    def refused(data: Path, change: Any = lambda state: None) -> str:
        state = traced(checkpoint, FIRST_TOKEN + 3)
        change(state)
        with pytest.raises(UserError) as error:
            languages.add(state, "my.pt", str(data))
        return error.value.message

    assert "has no language that my.pt lacks" in refused(toy_data)
    other = Path(shutil.copytree(more_data, tmp_path / "other"))
    (other / "langs.txt").write_text("en\nxx\nzz\n")
    assert "my.pt was trained with yy, which is not in langs.txt of" in refused(other)
    (other / "dict.txt").write_text("".join(f"v{i} 1\n" for i in range(40)))
    assert "prepare the text with --vocabulary" in refused(other)
    assert "does not say which languages" in refused(more_data, lambda state: state["task_state"].clear())
    assert "has 40 rows, its dictionary has 47 symbols" in refused(
        more_data, lambda state: state["model"].update({EMBEDDINGS[2]: torch.zeros(40, 3)})
    )
    assert "adaptive softmax" in refused(
        more_data, lambda state: state["model"].update({"decoder.adaptive_softmax.head.weight": torch.zeros(4, 3)})
    )
    assert "only tasks multilingual_*" in refused(
        more_data, lambda state: state["cfg"]["task"].update(_name="translation_multi_simple_epoch")
    )


def test_a_model_that_was_grown_is_used_by_fairseqs_loader(grown: Path, more_data: Path) -> None:
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(grown)])
    assert task.langs == ["en", "xx", "yy", "zz", "vv"] and models[0].encoder.embed_tokens.num_embeddings == 49
