"""What fairseq's users do with a trained model, done with an MoE model and with the dense one of stock fairseq."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from helpers import batches, build, write_toy_data
from helpers_decoding import generate, interactive, learn, write_checkpoint

from xmoe_fairseq.checkpoints import average
from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError

LANGTOK = ("--decoder-langtok",)
SIZE = (
    *("--share-all-embeddings", "--encoder-layers", "2", "--decoder-layers", "2"),
    *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--decoder-ffn-embed-dim", "64", "--encoder-attention-heads", "4", "--decoder-attention-heads", "4"),
)
KINDS = ("xmoe_transformer_tiny", "transformer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("decoding") / "bin", ("xx",), lines=100, symbols=20)


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, data: Path) -> Path:
    """The checkpoint of a model of each kind; its moving averages are what it was earlier."""
    built = build(data, "--arch", request.param, *SIZE, *LANGTOK)
    folder = data.parent / request.param
    folder.mkdir()
    samples = batches(built.task, "train", 500)
    learn(built, samples, 30)
    write_checkpoint(folder / "early.pt", built.cfg, built.model)
    early = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    learn(built, samples, 30)
    return write_checkpoint(folder / "last.pt", built.cfg, built.model, ema=early)


def decode(data: Path, path: Any, *words: str, **task: tuple[str, ...]) -> dict[int, Any]:
    return generate(data, path, *LANGTOK, *words, **task)


def texts(printed: dict[int, Any]) -> dict[int, list[str]]:
    return {number: one.texts for number, one in printed.items()}


def test_searches_find_what_they_are_asked_for(data: Path, path: Path) -> None:
    plain = decode(data, path)
    three = decode(data, path, "--nbest", "3")
    assert {number: one.texts[:1] for number, one in three.items()} == texts(plain)
    assert all(len(one.texts) == 3 and one.scores == sorted(one.scores, reverse=True) for one in three.values())

    greedy = decode(data, path, "--beam", "1")
    drawn = decode(data, path, "--beam", "1", "--sampling", "--sampling-topk", "1")
    assert texts(drawn) == texts(greedy)
    likely = decode(data, path, "--beam", "1", "--sampling", "--sampling-topp", "0.00001")
    assert texts(likely) == texts(greedy)
    one, same, other = (decode(data, path, "--beam", "1", "--sampling", "--seed", seed) for seed in ("1", "1", "2"))
    assert texts(one) == texts(same) != texts(other)

    groups = decode(
        data, path, "--beam", "4", "--nbest", "4", "--diverse-beam-groups", "4", "--diverse-beam-strength", "9"
    )
    assert any(len({text.split()[0] for text in one.texts if text}) > 1 for one in groups.values())
    for one in decode(data, path, "--no-repeat-ngram-size", "2", "--min-len", "8").values():
        words = one.texts[0].split()
        assert len(set(pairwise(words))) == len(words) - 1
    assert all("<unk>" in one.texts[0] for one in decode(data, path, "--unkpen", "-1000").values())
    matching = decode(data, path, "--match-source-len", "--batch-size", "1")
    for one in matching.values():
        assert len(one.texts[0].split()) <= len(one.lines["S"][0].split()) + 1


def test_prefixes_references_and_padding_sides(data: Path, path: Path) -> None:
    prefixed = decode(data, path, "--prefix-size", "3")  # the token of the language is the first
    for one in prefixed.values():
        assert one.texts[0].split()[:2] == one.lines["T"][0].split()[:2]
    scored = decode(data, path, "--score-reference")
    alone = decode(data, path, "--score-reference", "--batch-size", "1")
    with pytest.raises(UserError, match="direction to translate by --source-lang and --target-lang: en-xx, xx-en"):
        decode(data, path, task=("--task", "multilingual_local"))
    for number, one in scored.items():
        assert one.texts == one.lines["T"]
        assert one.scores == pytest.approx(alone[number].scores, abs=2e-4)
    plain = texts(decode(data, path))
    assert texts(decode(data, path, "--left-pad-source", "False")) == plain
    assert texts(decode(data, path, "--left-pad-target", "True")) == plain
    assert texts(decode(data, path, "--num-workers", "2")) == plain
    assert texts(decode(data, path, "--required-batch-size-multiple", "8")) == plain
    assert len(plain) == 20


def test_alignments_hard_and_soft(data: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hard = decode(data, path, "--print-alignment", "hard")
    soft = decode(data, path, "--print-alignment", "soft")
    for number, one in hard.items():
        target = len(one.texts[0].split())
        pairs = [tuple(map(int, pair.split("-"))) for pair in one.lines["A"][0].split()]
        assert {at for _, at in pairs} == set(range(target + 1)) - {target} or len(pairs) >= target
        rows = [[float(p) for p in row.split(",")] for row in soft[number].lines["A"][0].split()]
        assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in rows)
    typed = tmp_path / "typed"
    typed.write_text("w1 w2 w3\n\nw4\n")
    for kind in ("hard", "soft"):
        printed = interactive(capsys, data, path, typed, *LANGTOK, "--print-alignment", kind)
        assert [bool(printed[number].lines["A"][0]) for number in range(3)] == [True, False, True]
    assert all(
        sum(map(float, row.split(","))) == pytest.approx(1, abs=1e-3) for row in printed[0].lines["A"][0].split()
    )


def test_lines_typed_with_and_without_text(
    data: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = tmp_path / "typed"
    typed.write_bytes(b"\xef\xbb\xbfw1 w2\n\nw3\rw4\n \nw5")
    printed = interactive(capsys, data, path, typed, *LANGTOK)
    assert [bool(printed[number].texts[0]) for number in range(5)] == [True, False, True, False, True]
    assert printed[0].lines["S"] == ["__xx__ w1 w2"]
    unknown = tmp_path / "unknown"
    unknown.write_text("w1 w3 w2\n")
    replaced = interactive(
        capsys, data, path, unknown, *LANGTOK, "--unkpen", "-1000", "--replace-unk", "--print-alignment", "hard"
    )
    assert "<unk>" not in replaced[0].texts[0]


@pytest.mark.parametrize("order", ["ordered", "unordered"])
@pytest.mark.parametrize("tokens", [LANGTOK, (*LANGTOK, "--lang-tok-replacing-bos-eos")])
def test_translations_hold_their_constraints(
    order: str, tokens: tuple[str, ...], data: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [["w9 w8"], [], ["w7", "w3"], ["w11"]]
    typed = tmp_path / "typed"
    typed.write_text("".join("\t".join([f"w1 w{n} w2", *words]) + "\n" for n, words in enumerate(wanted)))
    words = (*tokens, "--constraints", order, "--batch-size", "4", "--beam", "6", "--max-len-b", "30")
    printed = interactive(capsys, data, path, typed, *words)
    for number, parts in enumerate(wanted):
        text, place = f" {printed[number].texts[0]} ", 0
        for part in parts:  # a word may come once more, before its turn
            place = text.find(f" {part} ", place if order == "ordered" else 0)
            assert place >= 0, (text, parts)
    with pytest.raises(UserError, match=r"--constraints: the text has none, .*fairseq-interactive"):
        decode(data, path, "--constraints", order)


def test_long_sources_are_cut_or_translated_to_nothing(data: Path, path: Path) -> None:
    few = ("--max-source-positions", "6")
    cut = decode(data, path, "--truncate-source", *few)
    for number, one in decode(data, path, *few).items():
        long = len(one.lines["S"][0].split()) > 5
        assert (one.texts == [""]) == long
        assert cut[number].texts != [""]
        if not long:
            assert cut[number].texts == one.texts


def test_ensembles_averages_and_moving_averages(data: Path, path: Path, tmp_path: Path) -> None:
    plain, early = decode(data, path), path.with_name("early.pt")
    assert texts(decode(data, f"{path}:{path}")) == texts(plain)
    one, other, both = (decode(data, paths, "--score-reference") for paths in (path, early, f"{path}:{early}"))
    for number, pair in both.items():  # of each token, the mean of the probabilities
        parts = [
            2 ** torch.tensor([float(p) for p in found[number].lines["P"][0].split()]) for found in (one, other, both)
        ]
        torch.testing.assert_close((parts[0] + parts[1]) / 2, parts[2], atol=1e-3, rtol=1e-3)
        assert pair.texts == one[number].texts

    mean = tmp_path / "mean.pt"
    torch.save(average.average([str(path), str(path)]), mean)
    assert texts(decode(data, mean)) == texts(plain)

    averages = ("--model-overrides", "{'ema_weights': True}")
    assert decode(data, path, "--score-reference", *averages)[0].scores == other[0].scores != one[0].scores
    with pytest.raises(UserError, match=r"ema_weights: checkpoint .*early.pt holds no moving averages"):
        decode(data, early, *averages)


def test_a_language_model_helps_to_translate(data: Path, path: Path, tmp_path: Path) -> None:
    plain, model = decode(data, path), _likes_one_word(data, tmp_path / "lm.pt")
    none = decode(data, path, "--lm-path", str(model), "--lm-weight", "0")
    assert texts(none) == texts(plain)
    assert [one.scores[0] for one in none.values()] == pytest.approx(
        [one.scores[0] for one in plain.values()], abs=1e-4
    )
    ours = _likes_one_word(data, tmp_path / "ours.pt", experts=True)
    for one in decode(data, path, "--lm-path", str(ours), "--lm-weight", "20").values():
        assert set(one.texts[0].split()) == {"w7"}  # and no token of a language


@pytest.mark.parametrize("path", KINDS[:1], indirect=True)
def test_files_split_by_experts_decode_as_whole_ones(
    data: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "parts.pt"
    main(["checkpoint", "shard", str(path), "--shards", "2", "--out", str(parts)])
    typed = tmp_path / "typed"
    typed.write_text("w1 w5 w2\tw9 w8\nw1 w2 w6\n")
    lm, early = str(_likes_one_word(data, tmp_path / "lm.pt")), path.with_name("early.pt")
    several = ("--beam", "4", "--nbest", "3", "--diverse-beam-groups", "2", "--prefix-size", "3")
    for words, others in (
        ((*several, "--lm-path", lm, "--lm-weight", "0.5"), ""),
        (("--sampling", "--sampling-topk", "4", "--model-overrides", "{'moe_threshold': 0.3}"), f":{early}"),
        (("--score-reference", "--truncate-source", "--model-overrides", "{'ema_weights': True}"), ""),
    ):
        assert decode(data, f"{parts}{others}", *words) == decode(data, f"{path}{others}", *words)
    constrained = [
        interactive(capsys, data, file, typed, *LANGTOK, "--constraints", "ordered", "--print-alignment", "soft")
        for file in (parts, path)
    ]
    for number, one in constrained[0].items():
        assert one.lines | {"W": []} == constrained[1][number].lines | {"W": []}  # which says how long it took
    assert "w9 w8" in constrained[0][0].texts[0]
    means = [average.average([str(file), str(early)])["model"] for file in (parts, path)]
    assert all(torch.equal(value, means[1][name]) for name, value in means[0].items())


def _likes_one_word(data: Path, path: Path, experts: bool = False) -> Path:
    """Writes a language model that knows the words of the data, no language, and expects w7 or the end."""
    words = ["--arch", "xmoe_transformer_lm_tiny", "--moe-interval", "1"] if experts else ["--arch", "transformer_lm"]
    words += ["--decoder-embed-dim", "8", "--decoder-ffn-embed-dim", "8"]
    words += ["--decoder-layers", "1", "--decoder-attention-heads", "1"]
    words += ["--decoder-input-dim", "8", "--decoder-output-dim", "8"]
    parser = options.get_training_parser("language_modeling")
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(data), *words]))
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        last = model.decoder.layer_norm if experts else model.decoder.layers[0].final_layer_norm
        last.bias[0] = 10
        for number in (model.decoder.dictionary.index("w7"), model.decoder.dictionary.eos()):
            model.decoder.output_projection.weight[number, 0] = 1
    return write_checkpoint(path, cfg, model)
