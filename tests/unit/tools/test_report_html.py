"""The page of a report: it is whole, alone, escaped, and its shades are what the model computed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from helpers_training import train
from helpers_translation import generated, write_output

from xmoe_fairseq.commands import report as command
from xmoe_fairseq.commands import score
from xmoe_fairseq.common.files import read_lines, write_lines
from xmoe_fairseq.data_prep import prepare
from xmoe_fairseq.moe import Router
from xmoe_fairseq.subword import Subword

VOID = {"meta", "br", "img", "input"}
EVIL = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)> </script><!--"
SENTENCES = 8
WORDS = ("cat", "dog", "bird", "fish", "<script>alert('x')</script>")
ARABIC = "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645"


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order, and no id occurs twice.

    Attributes:
        tags: of all elements, with their attributes.
        tokens: of each sentence, its stack and (text, experts, share) of its tokens.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, list[tuple[str, list[int], float]]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        links = [attributes["href"] for tag, attributes in self.tags if tag == "a"]
        assert links and all(link and link[0] == "#" and link[1:] in ids for link in links)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if attributes.get("class") == "tokens":
            self.tokens.append((attributes["data-stack"] or "", []))
        if "data-n" in attributes:
            counts = [int(count) for count in (attributes["data-n"] or "").split(" ")]
            share = float((attributes["style"] or "").removeprefix("--f:"))
            self.tokens[-1][1].append(("", counts, share))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open and self._open[-1] == "i" and self.tokens:
            *_, (_, counts, share) = self.tokens[-1][1]
            self.tokens[-1][1][-1] = (data, counts, share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of two pairs, a model whose routers have opinions, and translations of two directions."""
    root = tmp_path_factory.mktemp("report")
    text = root / "text"
    text.mkdir()
    for pair in ("xx-en", "yy-en"):
        for split, lines in (("train", 60), ("valid", 4), ("test", SENTENCES)):
            for side in pair.split("-"):
                sentences = [f"{side} house {number} and the {WORDS[number % 5]} of {pair}" for number in range(lines)]
                write_lines(text / f"{split}.{pair}.{side}", sentences)
    prepare.main(["--benchmark", "local", "--input", str(text), "--out", str(root / "data"), "--vocab-size", "330"])
    model = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32")
    layers = ("--encoder-layers", "4", "--moe-num-experts", "6", "--moe-threshold", "0.6")
    train(root / "data/bin", root / "run/checkpoints", 1, *model, *layers)
    path = root / "run/checkpoints/checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    torch.manual_seed(1)
    for name, weight in state["model"].items():
        if "router" in name:
            weight.normal_(std=0.7)
    torch.save(state, path)
    for other in path.parent.glob("checkpoint*.pt"):
        if other != path:
            other.unlink()
    for pair in ("en-xx", "yy-en"):
        hypotheses = [EVIL, ARABIC, "", *(f"hello world {number}" for number in range(SENTENCES - 3))]
        raw = root / f"data/raw/test.en-{pair.replace('en', '').strip('-')}.{pair[:2]}"
        write_output(root / "run/generate" / pair, generated(hypotheses, sources=read_lines(raw, "sources")))
    return root


def report(folder: Path, *options: str, run: str = "run") -> str:
    command.main([str(folder / run), "--data", str(folder / "data"), "--quiet", *options])
    return (folder / run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return report(folder)


def test_page_is_whole_and_needs_no_network(page: str) -> None:
    parsed = Page(page)
    assert page.startswith("<!doctype html>")
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "xlink:href")
            assert name != "src" or (value or "").startswith("data:")
    assert [t for t, a in parsed.tags if t == "script" and "src" in a] == []
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest", page)
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:") in [
        (tag, attributes.get("content")) for tag, attributes in parsed.tags
    ]


def test_text_is_escaped_and_nothing_is_lost(page: str) -> None:
    parsed = Page(page)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1 and sum(tag == "img" for tag, _ in parsed.tags) == 0
    sentences = ["".join(text for text, *_ in tokens) for _, tokens in parsed.tokens]
    assert any("<script>alert('x')</script>" in text for text in sentences)
    assert any("<script>alert('x')</script> of" in text for text in parsed.text)  # the reference
    assert any("<0xD9>" in text for text in sentences)  # Arabic, which the vocabulary lacks, in bytes
    directed = [a for _, a in parsed.tags if a.get("class") == "tokens"]
    assert directed and all(attributes["dir"] == "auto" for attributes in directed)


class Naive:
    """Counts, pair by pair, how often a layer computed an expert for each token of one sentence."""

    def __init__(self, folder: Path) -> None:
        checkpoint = str(folder / "run/checkpoints/checkpoint_last.pt")
        overrides = {"data": str(folder / "data/bin")}
        models, _, self.task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], overrides)
        self.model = models[0].eval()
        self.subword = Subword(folder / "data/bin/spm.model")
        self.counts: dict[str, list[int]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Router):
                module.register_forward_hook(lambda m, given, plan, name=name: self._count(name, plan))

    def _count(self, name: str, plan: Any) -> None:
        pairs = plan.token.tolist()
        self.counts[name] = [pairs.count(place) for place in range(plan.num_tokens)]

    def __call__(self, source: str, hypothesis: str, target: str) -> dict[str, list[list[int]]]:
        ids = self.task.source_dictionary.index
        pieces = [[ids(piece) for piece in self.subword.encode_pieces(text)] for text in (source, hypothesis)]
        read = torch.tensor([[ids(f"__{target}__"), *pieces[0], 2]])
        written = torch.tensor([[2, *pieces[1]]])
        self.counts.clear()
        with torch.no_grad():
            self.model(read, torch.tensor([read.shape[1]]), written)
        return {
            stack: [list(one) for one in zip(*(c for n, c in self.counts.items() if n.startswith(stack)), strict=True)]
            for stack in ("encoder", "decoder")
        }


def test_shades_are_what_the_model_computed(folder: Path, page: str) -> None:
    naive = Naive(folder)
    shown = iter(Page(page).tokens)
    seen = []
    for pair, samples in samples_of(folder, page):
        target = pair.split("-")[1]
        for source, hypothesis in samples:
            expected = naive(source, hypothesis, target)
            for stack in ("encoder", "decoder"):
                found_stack, tokens = next(shown)
                assert found_stack == stack
                assert [counts for _, counts, _ in tokens] == expected[stack]
                seen += [(stack, sum(counts) / len(counts), share) for _, counts, share in tokens]
    assert next(shown, None) is None
    for stack in ("encoder", "decoder"):
        means = {mean for name, mean, _ in seen if name == stack}
        low, high = min(means), max(means)
        assert len(means) > 2
        for name, mean, share in seen:
            assert name != stack or share == pytest.approx((mean - low) / (high - low), abs=0.0051)
        assert f'data-low="{low}" data-high="{high}"' in page


def samples_of(folder: Path, page: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The sentences that the page must show: four of each direction, spread over the test set."""
    pairs = ["en-xx", "yy-en"]
    for number, pair in enumerate(pairs):
        source, target = pair.split("-")
        stem = f"test.en-{source if target == 'en' else target}"
        sources = read_lines(folder / "data/raw" / f"{stem}.{source}", "source")
        hypotheses = read_lines(folder / "run/generate" / pair / f"hyp.{target}", "hypotheses")
        places = [(2 * pick + 1) * len(sources) // 16 for pick in range(8) if pick % 2 == number]
        yield pair, [(sources[place], hypotheses[place]) for place in dict.fromkeys(places)]


def test_selectors_name_directions_and_layers(page: str) -> None:
    options = re.findall(r"<option[^>]*>([^<]*)</option>", page)
    assert options == [
        *("en → xx", "yy → en", "mean of the encoder&#39;s layers", "encoder.2", "encoder.4"),
        *("mean of the decoder&#39;s layers", "decoder.2", "decoder.4"),
    ]


def test_what_is_missing_is_said(folder: Path) -> None:
    bare = folder / "bare"
    (bare / "checkpoints").mkdir(parents=True)
    (bare / "checkpoints/checkpoint_best.pt").symlink_to(folder / "run/checkpoints/checkpoint_last.pt")
    page = report(folder, run="bare")
    Page(page)
    for text in ("Nothing was translated", "No log of the training was found", "xmoe analyze", "No sentences"):
        assert text in page
    assert "encoder.2" in page and "<svg" in page  # the use of experts is measured all the same
    assert "Nothing was translated" in (bare / "report.md").read_text()


def test_page_of_a_dense_model(folder: Path) -> None:
    dense = folder / "dense"
    model = ("--arch", "moe_transformer_tiny", "--moe-placement", "none", "--share-all-embeddings")
    logged = ("--log-file", str(dense / "train.log"), "--log-interval", "1")
    train(folder / "data/bin", dense / "checkpoints", 1, *model, *logged)
    (dense / "generate").symlink_to(folder / "run/generate")
    page = report(folder, run="dense")
    parsed = Page(page)
    assert "The model is dense" in page and parsed.tokens == [] and "data-shades" not in page.partition("<script>")[0]
    assert EVIL in parsed.text
    assert "<figcaption>Loss</figcaption>" in page and "Experts a token" not in page


def test_figures_of_the_analysis_are_shown(folder: Path) -> None:
    analysis = folder / "bare/analysis"
    analysis.mkdir(parents=True)
    (analysis / "layers.svg").write_text("<svg/>")
    (analysis / "layers.png").write_bytes(b"larger than the other")
    page = report(folder, "--checkpoint", str(folder / "run/checkpoints/checkpoint_last.pt"), run="bare")
    Page(page)
    assert 'src="data:image/svg+xml;base64,PHN2Zy8+" alt="Capacity by layer"' in page
    assert "image/png" not in page


def test_what_xmoe_score_found_is_shown(folder: Path) -> None:
    scored = folder / "scored"
    (scored / "generate").mkdir(parents=True)
    for pair in ("en-xx", "yy-en"):
        (scored / "generate" / pair).symlink_to(folder / "run/generate" / pair)
    checkpoint = str(folder / "run/checkpoints/checkpoint_last.pt")
    score.main([str(scored), "--data", str(folder / "data"), "--metrics", "chrf", "--quiet"])
    (scored / "generate").rename(scored / "elsewhere")  # the results of xmoe score are enough
    page = report(folder, "--checkpoint", checkpoint, run="scored")
    Page(page)
    found = json.loads((scored / "scores/scores.json").read_text())
    for row in found["rows"]:
        assert f"{row['scores']['chrf']:.2f}</span>" in page
    data = json.loads((scored / "report.json").read_text())
    same = json.loads((folder / "run/report.json").read_text())
    assert data["directions"] == same["directions"] and data["samples"] == same["samples"]
