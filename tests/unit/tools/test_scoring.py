"""``xmoe score`` without a model: figures against naive ones, resuming, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import sacrebleu
from helpers_scoring import PAIRS, FakeTranslator, fake_translator, sentence, spoil, write_checkpoint, write_data

from xmoe_fairseq import cli
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation import language_id
from xmoe_fairseq.metrics.corpus import build_metric
from xmoe_fairseq.results.usage import LayerUsage, add_up


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "last.pt")


def score(data: Path, checkpoint: Path, *more: str | Path) -> None:
    cli.main(["score", str(data), "--checkpoint", str(checkpoint), "--quiet", *map(str, more)])


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(capsys.readouterr().out)  # and nothing but JSON
    return values


def odd(pair: str, number: int, line: str) -> str:
    """An empty line, a copy of the source, a longer and a wrong one."""
    return {0: "", 1: sentence(pair.split("-")[0], number), 2: f"{line} and more", 3: "all wrong"}.get(number, line)


def test_figures_are_those_of_naive_ways(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_translator(monkeypatch, odd)
    score(data, checkpoint, "--out", tmp_path / "out", "--json")
    found = as_json(capsys)
    assert found == json.loads((tmp_path / "out/scores.json").read_text())
    assert [f"{row['source']}-{row['target']}" for row in found["rows"]] == list(PAIRS)
    for pair, row in zip(PAIRS, found["rows"], strict=True):
        folder = tmp_path / "out" / pair
        source, target = pair.split("-")
        sources, refs, hyps = (
            (folder / name).read_text().split("\n")[:-1] for name in (f"src.{source}", f"ref.{target}", f"hyp.{target}")
        )
        assert hyps == [odd(pair, number, ref) for number, ref in enumerate(refs)] and len(refs) == 12
        assert row["scores"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hyps, [refs]).score)
        assert row["scores"]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hyps, [refs], word_order=2).score)
        # The texts hold words and spaces only, so that 13a separates nothing else.
        assert row["length_ratio"] == sum(len(h.split()) for h in hyps) / sum(len(r.split()) for r in refs)
        assert (row["empty"], row["copies"], row["sentences"]) == (1, 1, 12)
        assert row["source_words"] == sum(len(line.split()) for line in sources)
        assert row["group"] == {"ca": "high", "sw": "low"}[(set(pair.split("-")) - {"en"}).pop()]
    by_name = {f"{row['source']}-{row['target']}": row for row in found["rows"]}
    averages = {one["name"]: one for one in found["averages"]}
    members = {
        "all": PAIRS, "en-xx": ("en-ca", "en-sw"), "xx-en": ("ca-en", "sw-en"),
        "high": ("en-ca", "ca-en"), "high en-xx": ("en-ca",), "high xx-en": ("ca-en",),
        "low": ("en-sw", "sw-en"), "low en-xx": ("en-sw",), "low xx-en": ("sw-en",),
    }  # fmt: skip
    assert averages.keys() == members.keys() and list(averages)[:3] == ["all", "en-xx", "xx-en"]
    for name, pairs in members.items():
        assert averages[name]["directions"] == len(pairs)
        for metric in ("bleu", "chrf"):
            assert averages[name]["scores"][metric] == pytest.approx(mean(by_name[p]["scores"][metric] for p in pairs))
        assert averages[name]["length_ratio"] == pytest.approx(mean(by_name[p]["length_ratio"] for p in pairs))
    words = sum(row["source_words"] for row in found["rows"])
    assert found["words_per_second"] == pytest.approx(words / 8)
    # Experts a token: of all tokens together, not the mean of the directions' means.
    tokens = [100, 110, 120, 130]
    assert found["model"]["experts_per_token"] == pytest.approx(sum(round(2.5 * t) for t in tokens) / sum(tokens))
    assert found["rows"][0]["experts_per_token"] == 2.5


def test_page_and_table_show_the_figures(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_translator(monkeypatch, odd)
    score(data, checkpoint, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/scores.json").read_text())
    page = (tmp_path / "out/scores.md").read_text()
    assert capsys.readouterr().out.startswith(page)
    for row in found["rows"]:
        line = next(line for line in page.split("\n") if line.startswith(f"| {row['source']}-{row['target']} "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:5] == [row["group"], "12", f"{row['scores']['bleu']:.2f}", f"{row['scores']['chrf']:.2f}"]
    assert f"`{found['rows'][0]['signatures']['bleu']}`" in page
    lines = [line.split("\t") for line in (tmp_path / "out/scores.tsv").read_text().split("\n")[:-1]]
    assert [line[0] for line in lines] == ["direction", *PAIRS] and {len(line) for line in lines} == {len(lines[0])}
    assert float(lines[1][lines[0].index("BLEU")]) == pytest.approx(found["rows"][0]["scores"]["bleu"], abs=1e-4)


def test_what_is_finished_is_not_translated_again(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def dies(pair: str, number: int, line: str) -> str:
        if pair == "en-sw" and number == 5:
            raise KeyboardInterrupt
        return line

    fake = fake_translator(monkeypatch, dies)
    with pytest.raises(KeyboardInterrupt):
        score(data, checkpoint, "--out", out)
    assert fake.asked == ["en-ca", "ca-en", "en-sw"]
    assert {path.name for path in out.iterdir()} == {"settings.json", "en-ca", "ca-en"}
    (out / ".en-sw.tmp").mkdir()  # of a run that was killed while it wrote
    fake = fake_translator(monkeypatch, spoil(3))
    score(data, checkpoint, "--out", out)
    assert fake.asked == ["en-sw", "sw-en"]
    before = (out / "scores.json").read_text()
    fake = fake_translator(monkeypatch, spoil(3))
    score(data, checkpoint, "--out", out, "--pairs", "sw-en,en-ca", "--metrics", "chrf")
    assert fake.asked == []
    after = json.loads((out / "scores.json").read_text())
    assert [row["source"] for row in after["rows"]] == ["sw", "en"] and list(after["rows"][0]["scores"]) == ["chrf"]
    score(data, checkpoint, "--out", out)
    assert (out / "scores.json").read_text() == before


def test_results_of_two_systems_are_never_mixed(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fake_translator(monkeypatch, spoil(3))
    score(data, checkpoint, "--out", out, "--pairs", "en-ca")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"out holds results of beam 5, now it is 2: give another --out"):
        score(data, checkpoint, "--out", out, "--beam", "2")
    with pytest.raises(UserError, match=r"holds results of moe_threshold None, now it is 0.5"):
        score(data, checkpoint, "--out", out, "--moe-threshold", "0.5")
    write_checkpoint(checkpoint, "another")
    with pytest.raises(UserError, match=r"holds results of checkpoint 7692c3ad3540\.\.\., now it is"):
        score(data, checkpoint, "--out", out)
    write_checkpoint(checkpoint)
    with (data / "raw/test.en-ca.ca").open("a") as file:
        file.write("one more\n")
    with pytest.raises(UserError, match=r"test.en-ca.en has 12 lines but .*test.en-ca.ca has 13"):
        score(data, checkpoint, "--out", out)
    with (data / "raw/test.en-ca.en").open("a") as file:
        file.write("one more\n")
    with pytest.raises(UserError, match=r"en-ca is of another test set than"):
        score(data, checkpoint, "--out", out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds no results: give another --out"):
        score(data, checkpoint, "--out", data)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("en-ca/hyp.ca", "one line\n", r"en-ca has 12 sources, 12 references and 1 translations: remove it"),
        ("en-ca/about.json", "{", r"about.json is not JSON .*; remove .*en-ca and score again"),
        (
            "en-ca/about.json",
            '{"usage": [{}]}',
            r"about.json does not .* form: seconds is missing; remove .*en-ca",
        ),
        ("settings.json", "[]", r"settings.json holds no JSON object"),
    ],
)
def test_damaged_results_are_named(
    file: str, text: str, message: str, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_translator(monkeypatch, spoil(3))
    score(data, checkpoint, "--out", tmp_path / "out", "--pairs", "en-ca")
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises(UserError, match=message):
        score(data, checkpoint, "--out", tmp_path / "out", "--pairs", "en-ca")


def write_run(folder: Path, data: Path, pair: str = "en-ca") -> Path:
    """Writes what fairseq-generate would of the references with one word changed."""
    target = pair.split("-")[1]
    lines = (data / f"raw/test.en-ca.{target}").read_text().split("\n")[:-1]
    output = folder / "generate" / pair / "generate-test.txt"
    output.parent.mkdir(parents=True)
    output.write_text(
        "".join(f"D-{i}\t-1.0\t{line.replace('the', 'a')}\n" for i, line in reversed([*enumerate(lines)]))
    )
    return folder


def test_a_run_that_was_translated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", data)
    cli.main(["score", str(run), "--data", str(data), "--json", "--quiet"])
    found = as_json(capsys)
    refs = (data / "raw/test.en-ca.ca").read_text().split("\n")[:-1]
    hyps = [line.replace("the", "a") for line in refs]
    assert (run / "scores/en-ca/hyp.ca").read_text().split("\n")[:-1] == hyps
    (row,) = found["rows"]
    assert row["scores"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hyps, [refs]).score)
    assert (row["seconds"], row["experts_per_token"], found["model"], found["device"]) == (None, None, None, None)
    output = run / "generate/en-ca/generate-test.txt"
    output.write_text(output.read_text().replace("cat", "dog"))
    with pytest.raises(UserError, match=r"scores/en-ca holds other translations than .*generate/en-ca: remove it"):
        cli.main(["score", str(run), "--data", str(data), "--quiet"])
    (run / "scores/en-ca").rename(tmp_path / "old")
    fake_translator(monkeypatch, spoil(3))
    with pytest.raises(UserError, match="scores holds results of checkpoint None"):
        score(run, write_checkpoint(tmp_path / "c.pt"), "--data", data)
    score(run, tmp_path / "c.pt", "--data", data, "--out", tmp_path / "out", "--json")
    found = as_json(capsys)
    assert found["model"]["parameters"] == 1000 and found["rows"][0]["experts_per_token"] == 2.5


def test_long_sources_are_empty_translations_and_counted(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_translator(monkeypatch, spoil(3))
    translate = FakeTranslator.translate

    def longer(self: FakeTranslator, source: str, target: str) -> Any:
        found = translate(self, source, target)
        return type(found)(["", *found.hypotheses[1:]], found.seconds, 1, found.usage)

    monkeypatch.setattr(FakeTranslator, "translate", longer)
    score(data, checkpoint, "--out", tmp_path / "out", "--pairs", "en-ca", "--json")
    (row,) = as_json(capsys)["rows"]
    assert (row["too_long"], row["empty"]) == (1, 1)


def test_languages_are_told_apart() -> None:
    detector = language_id.LanguageDetector(["eng", "deu_Latn", "fr", "nob", "xx"])
    german = ["Das ist ein kleines Haus am Ende der Straße.", "Der Hund läuft über die grüne Wiese."]
    assert detector.wrong_share([*german, ""], "deu_Latn") == 0
    assert detector.wrong_share([german[0], "This is a small house at the end of the street."], "deu_Latn") == 0.5
    assert detector.wrong_share(["Dette er et lite hus ved enden av gaten."], "nob") == 0
    other = language_id.LanguageDetector(["fr", "en"])
    assert other.wrong_share(german, "deu_Latn") is None and detector.wrong_share(german, "deu_Latn") == 0
    assert detector.wrong_share(german, "xx") is None and detector.wrong_share([" "], "fr") is None


def test_without_a_detector_the_columns_are_absent_and_it_is_said_once(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_translator(monkeypatch, spoil(3))
    score(data, checkpoint, "--out", tmp_path / "with")
    assert "wrong language" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language_id._load_model.cache_clear()
    words = ["--data", str(data), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "sweep")]
    cli.main(["sweep", *words, "--thresholds", "0.3,0.6", "--pairs", "en-ca"])
    cli.main(["score", str(data), *words[2:4], "--out", str(tmp_path / "without")])
    said = capsys.readouterr()
    assert "wrong language" not in said.out and said.err.count("pip install py3langid langcodes") == 1


def test_spbleu_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))

    def unreachable(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match=r"'flores200' \(Name or service not known\): it downloads https.* by hand"):
        build_metric("spbleu", "ca")


def test_usage_adds_up_layer_by_layer() -> None:
    one = [LayerUsage("a", 1, 2, 3, 4, 0.5, (1, 2), (0, 1), 1), LayerUsage("b", 9, 9, 9, 0, 1.0, (9,), (9,), 9)]
    two = [LayerUsage("a", 10, 20, 30, 40, 5.0, (10, 20), (5, 5), 10)]
    assert add_up([one, two, []]) == [LayerUsage("a", 11, 22, 33, 44, 5.5, (11, 22), (5, 6), 11), one[1]]
    assert add_up([[], []]) == []


BAD = {
    "no checkpoint": (["DATA"], "DATA is a data folder: give --checkpoint FILE"),
    "lost checkpoint": (["DATA", "--checkpoint", "none.pt"], "there is no checkpoint none.pt"),
    "neither": (["bin", "--checkpoint", "last.pt"], "neither a data folder .* nor a run"),
    "direction": (["DATA", "--checkpoint", "last.pt", "--pairs", "en-xx"], "no direction 'en-xx': choose from en-ca"),
    "twice": (["DATA", "--checkpoint", "last.pt", "--pairs", "en-ca,en-ca"], "names en-ca twice"),
    "metric": (["DATA", "--checkpoint", "last.pt", "--metrics", "ter"], "--metrics ter is refused: choose from bleu"),
    "beam": (["DATA", "--checkpoint", "last.pt", "--beam", "0"], r"--beam: 0 is out of range: it must be in \[1, "),
    "threshold": (["DATA", "--checkpoint", "last.pt", "--moe-threshold", "2"], r"2 is out of range: .* \[0, 1\]"),
    "subset": (["DATA", "--checkpoint", "last.pt", "--subset", "valid"], "has no set 'valid': choose from test"),
    "no subset": (["DATA", "--checkpoint", "last.pt", "--subset", "dev"], "--subset 'dev' is refused: give test"),
    "run without data": (["run"], "run is a run: give --data"),
    "run and beam": (["run", "--data", "DATA", "--beam", "2"], "--beam goes with a data folder"),
    "tokenizer": (["DATA", "--checkpoint", "last.pt", "--tokenize", "no"], "argument --tokenize: invalid choice"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_translator(monkeypatch, spoil(3))
    write_checkpoint(Path("last.pt"))
    write_run(tmp_path / "run", write_data(tmp_path / "DATA"))
    Path("bin").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        cli.main(["score", *words, "--quiet"])
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["score", "compare", "sweep"])
def test_help_has_options_and_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"\n  xmoe {command} " in text and "--json" in text and "--quiet" in text
    cli.main(["--help"])
    assert f"\n  {command} " in capsys.readouterr().out
