"""``xmoe import`` and ``xmoe export`` beside `transformers`: the same logits and the same translations."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset
from helpers_commands import run_warm
from helpers_conversion import DIM, LONGEST, SENTENCES, TARGETS, Theirs, m2m, make
from helpers_distributed import World
from helpers_processes import close, fairseq_train
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from xmoe_fairseq import hub
from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.subword import VOCABULARY_RECORD

KINDS = ("dense", "moe")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Theirs]:
    root = tmp_path_factory.mktemp("theirs")
    return {kind: make(root / kind, kind == "moe") for kind in KINDS}


@pytest.fixture(scope="module")
def imported(theirs: dict[str, Theirs], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    for kind in KINDS:
        main(["import", str(theirs[kind].folder), "--out", str(root / kind)])
    return {kind: root / kind for kind in KINDS}


def load(folder: Path) -> Any:
    return hub.from_pretrained(str(folder), "checkpoint.pt", str(folder / "bin")).eval()


def directions() -> Iterator[tuple[str, str]]:
    return ((source, target) for source in SENTENCES for target in TARGETS)


def assert_same_logits(ours: Any, theirs: Theirs) -> None:
    for source, target in directions():
        tokens, prefixes = theirs.batch(source)["input_ids"], theirs.prefixes(source, target)
        real = tokens.ne(1)
        with torch.no_grad():
            encoded = ours.models[0].encoder(tokens, real.sum(1))["encoder_out"][0].transpose(0, 1)
            logits, _ = ours.models[0](tokens, real.sum(1), prefixes)
        wanted_encoded, wanted = theirs.logits(source, target)
        torch.testing.assert_close(encoded[real], wanted_encoded[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[prefixes.ne(1)], wanted[prefixes.ne(1)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, theirs: dict[str, Theirs], imported: dict[str, Path]) -> None:
    assert_same_logits(load(imported[kind]), theirs[kind])


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_translations_are_those_of_transformers(
    kind: str, beam: int, theirs: dict[str, Theirs], imported: dict[str, Path]
) -> None:
    ours = load(imported[kind])
    lengths = set()
    for source, target in directions():
        wanted = theirs[kind].translations(source, target, beam)
        sources = [ours.encode(sentence) for sentence in SENTENCES[source]]
        search = {"beam": beam, "lenpen": 0.0, "max_len_b": LONGEST}
        found = ours.generate(sources, source_lang=source, target_lang=target, **search)
        assert [one[0]["tokens"].tolist() for one in found] == wanted
        lengths |= {len(one) for one in wanted}
    assert len(lengths) > 3 and max(lengths) <= LONGEST  # else the search was not tested


def test_the_data_folder_has_their_numbers(theirs: dict[str, Theirs], imported: dict[str, Path]) -> None:
    tokenizer, ours = theirs["dense"].tokenizer, load(imported["dense"])
    for code in (imported["dense"] / "bin" / "langs.txt").read_text().split():
        assert ours.task.target_dictionary.index(f"__{code}__") == tokenizer.convert_tokens_to_ids(code)
    for source, sentences in SENTENCES.items():
        tokenizer.src_lang = source
        for sentence in sentences:
            assert [tokenizer.convert_tokens_to_ids(source), *ours.encode(sentence).tolist()] == tokenizer(sentence)[
                "input_ids"
            ]


@pytest.fixture(scope="module")
def text(imported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of the user, prepared with the vocabulary of an imported model; some of its characters are new to it."""
    root = tmp_path_factory.mktemp("text")
    (root / "input").mkdir()
    sides = {"eng_Latn": SENTENCES["eng_Latn"], "fra_Latn": ["bon dia ✓", "una casa", "casa\u00a0gran"]}
    for split, times in (("train", 4), ("valid", 1), ("test", 1)):
        for side, lines in sides.items():
            path = root / "input" / f"{split}.eng_Latn-fra_Latn.{side}"
            path.write_text("".join(f"{line}\n" for line in lines) * times)
    words = ["--benchmark", "local", "--input", str(root / "input"), "--out", str(root / "data")]
    main(["prepare", *words, "--vocabulary", str(imported["dense"])])
    return root / "data"


def test_prepared_text_has_the_vocabulary_of_the_model(text: Path, imported: dict[str, Path]) -> None:
    for name in ("spm.model", "dict.txt", "langs.txt", VOCABULARY_RECORD):
        assert (text / "bin" / name).read_bytes() == (imported["dense"] / "bin" / name).read_bytes()
    prefix = str(text / "bin" / "test.eng_Latn-fra_Latn.fra_Latn")
    assert 3 in MMapIndexedDataset(prefix)[0].tolist()  # <unk>


@pytest.mark.parametrize("kind", KINDS)
def test_score_translates_as_transformers(
    kind: str, theirs: dict[str, Theirs], imported: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    words = ["--checkpoint", str(imported[kind] / "checkpoint.pt"), "--out", str(tmp_path / "out"), "--quiet"]
    words += ["--pairs", "eng_Latn-fra_Latn", "--beam", "1", "--max-len-b", str(LONGEST), "--lenpen", "0"]
    main(["score", str(text), *words])
    found = (tmp_path / "out" / "eng_Latn-fra_Latn" / "hyp.fra_Latn").read_text().splitlines()
    tokens = theirs[kind].translations("eng_Latn", "fra_Latn", 1)
    assert found == theirs[kind].tokenizer.batch_decode(tokens, skip_special_tokens=True)


def test_programs_of_fairseq_take_an_imported_model(imported: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Fine-tuning, then ``fairseq-generate`` with what it wrote."""
    kept = json.loads((imported["moe"] / "import.json").read_text())
    common = (text / "bin", "--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--cpu")
    model = (*kept["options"], "--encoder-langtok", "src", "--decoder-langtok", "--moe-capacity-factor", "0")
    start = ("--finetune-from-model", imported["moe"] / "checkpoint.pt", "--save-dir", tmp_path / "run")
    training = ("--optimizer", "adam", "--lr", "1e-12", "--max-tokens", "200", "--max-update", "1")
    criterion = ("--criterion", "threshold_routing_cross_entropy", "--no-epoch-checkpoints", "--disable-validation")
    run_warm("fairseq-train", *common, *model, *start, *training, *criterion)
    search = ("--source-lang", "eng_Latn", "--target-lang", "fra_Latn", "--beam", "1", "--max-len-b", str(LONGEST))
    bpe = ("--bpe", "sentencepiece_bytes", "--sentencepiece-model", text / "bin" / "spm.model")
    path = ("--path", tmp_path / "run" / "checkpoint_last.pt")
    said = run_warm("fairseq-generate", *common, *path, *search, *bpe).stdout
    found = {line.split("\t")[0]: line.split("\t")[2] for line in said.splitlines() if line.startswith("D-")}
    ours = load(imported["moe"])
    options = {"source_lang": "eng_Latn", "target_lang": "fra_Latn", "beam": 1, "max_len_b": LONGEST}
    assert [found[f"D-{number}"] for number in range(3)] == ours.translate(SENTENCES["eng_Latn"], **options)


def test_two_processes_share_the_experts_of_an_imported_model(
    theirs: dict[str, Theirs], imported: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    parts, world = tmp_path / "parts", World(2)
    main(["import", str(theirs["moe"].folder), "--out", str(parts), "--shards", "2", "--quiet"])
    options = json.loads((parts / "import.json").read_text())["options"]
    model = (*options, "--encoder-langtok", "src", "--decoder-langtok", "--moe-expert-parallel", "2")
    model += ("--encoder-layerdrop", "0", "--decoder-layerdrop", "0", "--ddp-backend", "legacy_ddp")
    training = ("--lr", "1e-12", "--max-update", "1", "--disable-validation")
    start = ("--finetune-from-model", str(parts / "checkpoint.pt"))
    try:
        world.run(fairseq_train, 2, text / "bin", tmp_path / "run", *model, *training, *start)
    finally:
        world.stop()
    found = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)["model"]
    close(found, torch.load(imported["moe"] / "checkpoint.pt", weights_only=True)["model"])


@pytest.mark.parametrize("kind", KINDS)
def test_info_measures_an_imported_model(
    kind: str, theirs: dict[str, Theirs], imported: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = json.loads((imported[kind] / "import.json").read_text())["options"]
    rows, size = len(theirs[kind].model.model.shared.weight), theirs[kind].model.num_parameters()
    words = ["--checkpoint", str(imported[kind] / "checkpoint.pt"), "--data", str(text / "bin"), "--json"]
    main(["info", *options, "--vocab", str(rows), *words])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == size
    assert [(layer["experts"], layer["taken"]) for layer in found["layers"]] == (
        [(6, 2.0)] * 3 if kind == "moe" else []
    )
    assert found["assumption"].startswith("measured on the test set of ")
    with pytest.raises(UserError, match=f"has {size:,} parameters, .* has {size + DIM:,}: give those"):
        main(["info", *options, "--vocab", str(rows + 1), *words])


def test_shards_and_several_files_hold_the_same_model(
    theirs: dict[str, Theirs], imported: dict[str, Path], tmp_path: Path
) -> None:
    parts, out = tmp_path / "parts", tmp_path / "out"
    theirs["moe"].model.save_pretrained(parts, max_shard_size="60KB")
    theirs["moe"].tokenizer.save_pretrained(parts)
    assert (parts / "model.safetensors.index.json").is_file()
    main(["import", str(parts), "--out", str(out), "--shards", "4"])
    main(["checkpoint", "consolidate", str(out / "checkpoint.pt"), "--out", str(tmp_path / "whole.pt")])
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    wanted = torch.load(imported["moe"] / "checkpoint.pt", weights_only=True)["model"]
    assert list(whole) == list(wanted)
    assert all(torch.equal(whole[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_export_is_the_way_back(
    kind: str, theirs: dict[str, Theirs], imported: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    main(["export", str(imported[kind] / "checkpoint.pt"), "--data", str(imported[kind]), "--out", str(out)])
    model = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    wanted = theirs[kind].model.state_dict()
    found = model.state_dict()
    assert type(model) is type(theirs[kind].model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for source, target in directions():
        again = Theirs(out, model, theirs[kind].tokenizer)
        for one, other in zip(again.logits(source, target), theirs[kind].logits(source, target), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture(scope="module")
def exported(imported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    main(["export", str(imported["dense"] / "checkpoint.pt"), "--data", str(imported["dense"]), "--out", str(out)])
    return out


def test_the_exported_tokenizer_has_the_same_numbers(theirs: dict[str, Theirs], exported: Path) -> None:
    found, wanted = AutoTokenizer.from_pretrained(exported, use_fast=False), theirs["dense"].tokenizer
    for source, sentences in SENTENCES.items():
        found.src_lang = wanted.src_lang = source
        assert found([*sentences, "the ✓ cat"])["input_ids"] == wanted([*sentences, "the ✓ cat"])["input_ids"]


def test_a_vocabulary_of_m2m_there_and_back(tmp_path: Path) -> None:
    """Pieces in another order than in the SentencePiece model, 100 languages with codes as `en`."""
    wanted = m2m(tmp_path / "theirs")
    main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    ours = load(tmp_path / "ours")
    words = ["--data", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]
    main(["export", str(tmp_path / "ours" / "checkpoint.pt"), *words])
    found = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert len(ours.task.langs) == 100
    for source in ("en", "ca", "zu"):
        found.src_lang = wanted.src_lang = source
        for sentence in SENTENCES["eng_Latn"]:
            ids = wanted(sentence)["input_ids"]
            assert found(sentence)["input_ids"] == ids
            assert [ours.task.source_dictionary.index(f"__{source}__"), *ours.encode(sentence).tolist()] == ids


def test_ctranslate2_translates_what_was_exported(imported: dict[str, Path], exported: Path, tmp_path: Path) -> None:
    import ctranslate2  # late: it brings an OpenMP of its own

    ctranslate2.converters.TransformersConverter(str(exported)).convert(str(tmp_path / "out"))
    translator = ctranslate2.Translator(str(tmp_path / "out"), device="cpu", compute_type="float32")
    tokenizer, ours = AutoTokenizer.from_pretrained(exported), load(imported["dense"])
    for source, target in directions():
        tokenizer.src_lang = source
        pieces = [tokenizer.convert_ids_to_tokens(tokenizer(one)["input_ids"]) for one in SENTENCES[source]]
        sources = [ours.encode(one) for one in SENTENCES[source]]
        options = {"beam_size": 1, "max_decoding_length": LONGEST + 1}  # its beams end by another rule than fairseq's
        found = translator.translate_batch(pieces, target_prefix=[[target]] * len(pieces), **options)
        wanted = ours.generate(sources, source_lang=source, target_lang=target, beam=1, max_len_b=LONGEST)
        ids = [tokenizer.convert_tokens_to_ids(one.hypotheses[0]) for one in found]
        assert [[*one, 2] for one in ids] == [one[0]["tokens"].tolist() for one in wanted]


def test_files_of_the_branch_hold_the_same_model(imported: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(imported["moe"] / "checkpoint.pt", weights_only=True)
    shared: dict[str, torch.Tensor] = {}
    ranks: list[dict[str, torch.Tensor]] = [{}, {}, {}]  # two experts each
    for name, tensor in state["model"].items():
        layer, found, parameter = name.partition("moe.experts.")
        if not found:
            shared[name.replace("moe.router.weight", "moe_layer.gate.wg.weight")] = tensor
            continue
        matrix, kind = parameter.split("_")
        for number, part in enumerate(tensor):
            theirs = f"{layer}moe_layer.experts.{number % 2}.{matrix}.{kind}"
            ranks[number // 2][theirs] = part.t() if parameter == "fc2_weight" else part
    model = {
        **state["cfg"]["model"],
        **{"moe_freq": 2, "moe_expert_count": 6, "moe_eom": 0.2, "moe_second_expert_policy": "all"},
        "moe_eval_capacity_token_fraction": 1.0,
    }
    torch.save({"cfg": {"model": model}, "model": shared}, tmp_path / "nllb-shared.pt")
    for number, rank in enumerate(ranks):
        torch.save({"model": rank}, tmp_path / f"nllb-rank-{number}.pt")
    data = imported["moe"] / "bin"
    words = ["import", str(tmp_path / "nllb-shared.pt"), "--dictionary", str(data / "dict.txt")]
    words += ["--languages", str(data / "langs.txt"), "--sentencepiece", str(data / "spm.model")]
    main([*words, "--out", str(tmp_path / "out")])
    found = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in state["model"].items())
    assert found["cfg"]["model"] == state["cfg"]["model"]
    assert (tmp_path / "out" / "bin" / "dict.txt").read_bytes() == (data / "dict.txt").read_bytes()
    torch.save(
        {"cfg": {"model": {**model, "max_target_positions": 2**30}}, "model": shared}, tmp_path / "nllb-shared.pt"
    )
    with pytest.raises(UserError, match="max_target_positions is 1073741824"):
        main([*words, "--out", str(tmp_path / "other")])
    (tmp_path / "nllb-rank-1.pt").unlink()
    with pytest.raises(UserError, match=r"nllb-rank-1\.pt is missing"):
        main([*words, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_that_of_all_tensors(dtype: str, theirs: dict[str, Theirs], tmp_path: Path) -> None:
    main(["import", str(theirs["dense"].folder), "--out", str(tmp_path / "out"), "--dtype", dtype])
    model = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["model"]
    wanted = theirs["dense"].model.model.shared.weight.to(getattr(torch, dtype))
    assert torch.equal(model["encoder.embed_tokens.weight"], wanted)


class Runs:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


def test_nothing_in_a_file_runs(theirs: dict[str, Theirs], tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(theirs["dense"].folder, evil)
    (evil / "model.safetensors").unlink()
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps({"model.shared.weight": Runs(tmp_path / "ran")}, protocol=2))
    with pytest.raises(UserError):
        main(["import", str(evil), "--out", str(tmp_path / "out")])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["evil"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"d_model": 64}, "has the shape"),
        ({"encoder_layers": 5}, "the model lacks"),
        ({"encoder_layers": 3}, "has no place for"),
        ({"activation_function": "silu"}, "activation_function is 'silu'"),
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"encoder_attention_heads": 5}, "does not divide"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"d_model": "32"}, "d_model is 32, it must be a whole number"),
    ],
)
def test_bad_input_is_a_line(change: dict[str, Any], message: str, theirs: dict[str, Theirs], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(theirs["dense"].folder, bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        main(["import", str(bad), "--out", str(tmp_path / "out")])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bad"]


def test_a_truncated_file_is_a_line_and_an_output_that_exists_stays(theirs: dict[str, Theirs], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(theirs["dense"].folder, bad)
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="are not all in the file"):
        main(["import", str(bad), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is there already"):
        main(["import", str(theirs["dense"].folder), "--out", str(bad)])
    assert (bad / "model.safetensors").read_bytes() == content[:-100]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_is_imported_again(kind: str, imported: dict[str, Path], tmp_path: Path) -> None:
    main(
        ["export", str(imported[kind] / "checkpoint.pt"), "--data", str(imported[kind]), "--out", str(tmp_path / "out")]
    )
    main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    for name in ("dict.txt", "langs.txt", "spm.model"):
        assert (tmp_path / "again" / "bin" / name).read_bytes() == (imported[kind] / "bin" / name).read_bytes()
    found, wanted = (
        torch.load(one / "checkpoint.pt", weights_only=True) for one in (tmp_path / "again", imported[kind])
    )
    assert found["cfg"]["model"] == wanted["cfg"]["model"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in wanted["model"].items())


@pytest.mark.parametrize(
    ("option", "value"), [("moe_router", "threshold"), ("moe_strata", "2-4"), ("share_all_embeddings", False)]
)
def test_export_refuses_what_transformers_lacks(
    option: str, value: Any, imported: dict[str, Path], tmp_path: Path
) -> None:
    state = torch.load(imported["moe"] / "checkpoint.pt", weights_only=True)
    state["cfg"]["model"][option] = value
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"its {option} is {value}"):
        main(["export", str(tmp_path / "other.pt"), "--data", str(imported["moe"]), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
