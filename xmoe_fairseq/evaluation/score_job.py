"""Scoring one system: what is not translated yet is translated, then all of it is scored."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from ..checkpoints.shards import fingerprint
from ..checkpoints.summary import summarize
from ..common import schema
from ..common.directions import Direction
from ..common.outputs import check_no_folders, replacing_all
from ..errors import UserError
from ..metrics.corpus import build_metric
from ..results.decoding import Decoding, Translated
from ..results.folder import SCORES, ResultFolder
from ..results.scores import DirectionScore, SystemScores, average, words_per_second
from ..results.usage import LayerUsage, add_up
from ..results.versions import read_versions
from ..stock_commands.generate import generate_file
from .decode import Translator
from .direction_scorer import DirectionScorer, read_benchmark
from .generate_output import count_too_long
from .language_id import MISSING, LanguageDetector, find_detector
from .model_directions import choose_directions, has_set, known_direction, known_pairs
from .test_sets import check_made_alike, find_raw, read_generated, texts_checksum


class ScoreJob:
    """One system to be scored.

    Args:
        data: folder made by data_prep/prepare.sh.
        checkpoint: to translate with; None if the translations are there.
        decoding: how to translate.
        pairs: directions, such as ``en-ca``; if there are none, those that the model was trained on, or that were
            translated.
        metrics: names of `METRICS`.
        tokenizer: BLEU's, whatever the language.
        generated: folder of what fairseq-generate wrote; None to translate.
        trained_by: the checkpoint that says what was trained, if ``checkpoint`` is None.

    Raises:
        UserError: a direction is unknown, or a metric cannot be had.
    """

    def __init__(
        self,
        data: Path,
        checkpoint: Path | None,
        decoding: Decoding,
        pairs: Sequence[str] = (),
        metrics: Sequence[str] = ("bleu", "chrf"),
        tokenizer: str | None = None,
        generated: Path | None = None,
        trained_by: Path | None = None,
    ) -> None:
        self.data, self.checkpoint, self.decoding = data, checkpoint, decoding
        self.tokenizer, self.generated = tokenizer, generated
        self.benchmark = read_benchmark(data)
        if checkpoint is not None and not checkpoint.is_file():
            raise UserError(f"there is no checkpoint {checkpoint}: check --checkpoint")
        of_model = trained_by or checkpoint
        wanted = _generated_pairs(data, generated, decoding.subset, pairs) if generated else pairs
        chosen = choose_directions(data, of_model, decoding.subset, wanted)
        self.pairs = chosen.pairs
        self.scorer = DirectionScorer(
            data, self.benchmark, chosen.pairs, chosen.untrained, decoding.subset, decoding.lines, metrics, tokenizer
        )
        for pair in self.pairs:  # what cannot be had is said before anything is translated
            for metric in metrics:
                build_metric(metric, pair.target, tokenizer)
            find_raw(data, decoding.subset, *pair.split("-"))
        if generated is not None:
            check_made_alike([generated / pair for pair in self.pairs], checkpoint)
        self.settings = {"checkpoint": fingerprint(str(checkpoint)) if checkpoint else None, **asdict(decoding)}
        self._translator: Translator | None = None

    @property
    def translator(self) -> Translator:
        """The model, loaded when it is first needed."""
        if self._translator is None:
            assert self.checkpoint is not None
            self._translator = Translator(self.checkpoint, self.data, self.decoding)
        return self._translator

    def take(self, translator: Translator | None) -> None:
        """Translates with the model of another job, whose decoding differs in the threshold at most."""
        self._translator = translator and translator.at(self.decoding.moe_threshold, self.decoding.moe_shift)

    def run(self, out: Path, bar: tqdm, pages: Mapping[str, Callable[[SystemScores], str]]) -> SystemScores:
        """Translates what is not finished, scores everything and writes it to ``out``.

        Args:
            out: the folder of results.
            bar: a progress bar, advanced by one for each direction; one that is disabled also keeps hints back.
            pages: what is written beside ``scores.json``, by the name of the file.

        Raises:
            UserError: a file is missing or refused, or ``out`` holds results of other settings.
        """
        files = [out / name for name in (*pages, SCORES)]
        check_no_folders(files)
        test_set = texts_checksum((pair, *self.scorer.texts(pair)) for pair in self.pairs)
        if self.checkpoint is not None:
            _ = self.translator  # what cannot be loaded is said before a folder is made
        folder = ResultFolder(out, self.settings)
        languages = {language for pair in self.pairs for language in pair.split("-")}
        detector = find_detector(languages)
        if detector is None and not bar.disable:
            _say_once(MISSING)
        rows: list[DirectionScore] = []
        usages: dict[bool, list[list[LayerUsage]]] = {False: [], True: []}
        for pair in self.pairs:
            bar.set_description(pair)
            row, usage = self._direction(folder, pair, detector)
            rows.append(row)
            usages[row.zero_shot].append(usage)
            bar.update()
        scores = self._scores(out, rows, add_up(usages[False] or usages[True]), detector, test_set)
        with replacing_all(files) as (*parts, data):
            for part, render in zip(parts, pages.values(), strict=True):
                part.write_text(render(scores), encoding="utf-8")
            data.write_text(schema.json_text(scores.as_json(), str(files[-1])), encoding="utf-8")
        return scores

    def _direction(
        self, folder: ResultFolder, pair: Direction, detector: LanguageDetector | None
    ) -> tuple[DirectionScore, list[LayerUsage]]:
        sources, references = self.scorer.texts(pair)
        if not folder.finished(pair):
            folder.keep(pair, sources, references, self._translated(pair, sources))
        kept_sources, kept_references, found = folder.read(pair)
        if (kept_sources, kept_references) != (sources, references):
            raise UserError(f"{folder.path / pair} is of another test set than {self.data}: give another --out")
        if self.generated is not None and list(found.hypotheses) != self._generated(pair, sources):
            raise UserError(f"{folder.path / pair} holds other translations than {self.generated / pair}: remove it")
        experts = _experts(found.usage) if self.checkpoint is not None else None
        return self.scorer.score(pair, sources, references, found, experts, detector), list(found.usage)

    def _translated(self, pair: Direction, sources: Sequence[str]) -> Translated:
        source, target = pair.split("-")
        if self.generated is not None:
            usage = self.translator.usage(source, target) if self.checkpoint is not None else []
            too_long = count_too_long(self._output(pair))
            return Translated(self._generated(pair, sources), None, too_long, usage)
        found = self.translator.translate(source, target)
        if len(found.hypotheses) != len(sources):
            raise UserError(
                f"{self.data}/bin has {len(found.hypotheses)} sentences of {pair} but raw/ has {len(sources)}: prepare "
                "the data again"
            )
        return found

    def _output(self, pair: Direction) -> Path:
        assert self.generated is not None
        return self.generated / pair / generate_file(self.decoding.subset)

    def _generated(self, pair: Direction, sources: Sequence[str]) -> list[str]:
        return read_generated(self._output(pair), self.data, sources)

    def _scores(
        self,
        out: Path,
        rows: Sequence[DirectionScore],
        usage: Sequence[LayerUsage],
        detector: LanguageDetector | None,
        test_set: str,
    ) -> SystemScores:
        model = self.translator if self.checkpoint is not None else None
        about = summarize(str(self.checkpoint)) if self.checkpoint is not None else None
        settings = {
            "file": str(self.checkpoint) if self.checkpoint else None,
            "arch": about.arch if about else None,
            "updates": about.updates if about else None,
            "benchmark": self.benchmark.name,
            "test_set": test_set,
            **self.settings,
        }
        return SystemScores(
            name=out.resolve().name,
            settings=settings,
            english=self.benchmark.english,
            tokenize=self.tokenizer,
            rows=rows,
            averages=average(rows, self.benchmark.english),
            model=model.size(usage) if model else None,
            words_per_second=words_per_second(rows),
            device=_device(model.device) if model and self.generated is None else None,
            detector=detector.name if detector else None,
            versions=read_versions(),
        )


@functools.cache
def _say_once(hint: str) -> None:
    """Prints a line above the progress bar, in a sweep not for every threshold."""
    tqdm.write(hint, file=sys.stderr)


def _generated_pairs(data: Path, generated: Path, subset: str, wanted: Sequence[str]) -> list[str]:
    """Returns the directions that were translated, those of the data first, or the wanted ones of them."""
    known, file = known_pairs(data), generate_file(subset)
    names = sorted(path.parent.name for path in generated.glob(f"*/{file}"))
    there = [pair for name in names if (pair := known_direction(name, data, known)) is not None]
    others = [pair for pair in there if pair not in known and has_set(data, subset, pair)]
    found: list[str] = [*(pair for pair in known if pair in there), *others]
    if not found:
        raise UserError(f"{generated} has no folder SRC-TGT/{file} of a direction of {data}: translate first")
    for name in wanted:
        if name not in found:
            raise UserError(f"there is no direction {name!r}: choose from {', '.join(found)}")
    return list(wanted or found)


def _experts(usage: Sequence[LayerUsage]) -> float:
    tokens = sum(use.tokens for use in usage)
    return sum(use.received for use in usage) / tokens if tokens else 0.0


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"
