"""BLEU and chrF++ of the model that is trained, on the first lines of each development set.

Lines are translated in rounds, the first ones of all directions before the next ones of any, each round as large as
all before it. That bounds the time: a round that would make an evaluation longer than the training since the one
before is left out, in all evaluations from then on.
"""

from __future__ import annotations

import copy
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from fairseq.distributed import utils as distributed

from ..common.directions import Direction
from ..distributed.lockstep_search import in_step
from ..errors import UserError
from ..subword import SentencepieceBytes
from .data_manager import split_name

logger = logging.getLogger(__name__)

METRICS = ("bleu", "chrf")
# Lines of each direction in the first round, which is translated however long it takes.
_FIRST_ROUND = 8


@dataclass(frozen=True)
class Search:
    """How to search, by the names of ``fairseq-generate``; shorter and cheaper by default."""

    beam: int = 1
    max_len_a: float = 2.0
    max_len_b: int = 20
    min_len: int = 1
    unnormalized: bool = False
    lenpen: float = 1.0
    unkpen: float = 0.0
    temperature: float = 1.0
    match_source_len: bool = False
    no_repeat_ngram_size: int = 0
    sampling: bool = False
    sampling_topk: int = -1
    sampling_topp: float = -1.0
    diverse_beam_groups: int = -1
    diverse_beam_strength: float = 0.5
    diversity_rate: float = -1.0


class Clock:
    """The longest time of training between two validations, which an evaluation may take.

    Attributes:
        longest: seconds.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._since: float | None = None

    def training(self) -> None:
        """Notes that training goes on."""
        if self._since is None:
            self._since = perf_counter()

    def stop(self) -> float:
        """Notes that validation begins; gives the seconds of training since the last one."""
        trained = 0.0 if self._since is None else perf_counter() - self._since
        self.longest, self._since = max(self.longest, trained), None
        return trained


class DevelopmentSet:
    """The lines of one direction in a development set.

    Attributes:
        name: of the direction, such as ``en-ca``.
        dataset: fairseq's, whose items have source and target.
        metrics: sacreBLEU's, by name.
        sums: what each of them adds up, of the translations of this process.
    """

    def __init__(self, name: Direction, dataset: Any) -> None:
        from ..metrics.corpus import build_metric

        self.name, self.dataset = name, dataset
        self.metrics = {metric: build_metric(metric, name.target) for metric in METRICS}
        self.sums: dict[str, np.ndarray] = {}

    def add(self, hypothesis: str, reference: str) -> None:
        """Counts one translation."""
        from ..metrics.sentences import sentence_statistics

        for name, metric in self.metrics.items():
            self.sums[name] = self.sums[name] + sentence_statistics(metric, [reference], [hypothesis])[0].astype(int)

    def clear(self) -> None:
        """Forgets what was counted."""
        from ..metrics.sentences import sentence_statistics

        self.sums = {
            name: 0 * sentence_statistics(one, ["a"], ["a"])[0].astype(int) for name, one in self.metrics.items()
        }

    def score(self, name: str) -> float:
        """Scores all that was counted as one text, rounded as it is shown."""
        from ..metrics.sentences import corpus_score

        return round(corpus_score(self.metrics[name], [self.sums[name][None]]), 2)


def _counts(metric: Any, hypothesis: str, reference: str) -> np.ndarray:
    """Returns what a metric adds up over sentences, (statistics,), of one of them."""
    from ..metrics.sentences import sentence_statistics

    return sentence_statistics(metric, [reference], [hypothesis])[0].astype(np.int64)


class Evaluation:
    """Translates and scores.

    Args:
        task: a multilingual one; its options say how many lines.
        search: how to search.

    Attributes:
        scores: by subset, the value of each metric.
        clock: how long an evaluation may take.
        limits: most tokens and sentences in a batch of validation.
    """

    def __init__(self, task: Any, search: Search) -> None:
        self.task, self.search = task, search
        self.scores: dict[str, dict[str, float]] = {}
        self.clock = Clock()
        self.limits: tuple[int | None, int | None] = (None, None)
        self.lines = self.wanted
        self._said = False

    @property
    def wanted(self) -> int:
        """The lines of each direction that are asked for; the most there can be if all are."""
        return self.task.args.eval_bleu_lines or 2**31

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs to translate the same lines."""
        return {"wanted": self.wanted, "lines": self.lines, "longest": self.clock.longest}

    def restore(self, kept: dict[str, Any]) -> None:
        """Takes it from a checkpoint, unless another number of lines is asked for now."""
        lines, longest = kept.get("lines"), kept.get("longest")
        if kept.get("wanted") == self.wanted and isinstance(lines, int) and isinstance(longest, float):
            self.lines, self.clock.longest = max(1, min(lines, self.wanted)), longest

    def check_search(self, model: Any) -> None:
        """Builds the search, which refuses options that contradict each other.

        Raises:
            UserError: says which.
        """
        try:
            self._generator(model)
        except (ValueError, AssertionError) as error:
            raise UserError(f"--eval-bleu-args {self.task.args.eval_bleu_args} is refused: {error}") from error

    def _generator(self, model: Any) -> Any:
        task = copy.copy(self.task)  # whose generator wants to know a language; its token is removed from all texts
        task.args = Namespace(**{**vars(task.args), "target_lang": task.target_langs[0], "contrast_beta": 0.0})
        return task.build_generator([model], Namespace(**asdict(self.search)))

    @cached_property
    def bpe(self) -> SentencepieceBytes:
        """Joins pieces to text."""
        return SentencepieceBytes(SentencepieceConfig(sentencepiece_model=os.path.join(self.task.folder, "spm.model")))

    @cached_property
    def _directions(self) -> dict[tuple[str, str], DevelopmentSet]:
        """The directions of all files that are validated, each once, by the name of the files and their own."""
        found: dict[tuple[str, str], DevelopmentSet] = {}
        for subset, dataset in self.task.datasets.items():
            if subset == self.task.args.train_subset:
                continue
            for pair, part in zip(self._pairs(subset), dataset.datasets, strict=True):
                key = split_name(subset)[0], pair
                if key not in found:
                    found[key] = DevelopmentSet(pair, part)
        return found

    def _pairs(self, subset: str) -> list[Direction]:
        wanted = self.task.data_manager.directions_of[subset]
        return [pair for pair in self.task.lang_pairs if pair in wanted]

    def run(self, model: Any, subsets: Sequence[str]) -> None:
        """Translates and scores; all processes of a training must call it."""
        trained, start = self.clock.stop(), perf_counter()
        directions = list(self._directions.values())
        for direction in directions:
            direction.clear()
        was_training = model.training
        model.eval()
        try:
            done = self._rounds(model, directions, start)
        finally:
            model.train(was_training)
        self._add_up(directions, model)
        self.scores = {subset: self._scores(subset) for subset in subsets}
        self._say(directions, done, perf_counter() - start, trained)

    def _rounds(self, model: Any, directions: Sequence[DevelopmentSet], start: float) -> int:
        """Translates rounds of lines while there is time; gives how many lines of each direction were done."""
        most = min(self.lines, max(len(direction.dataset) for direction in directions))
        generator = self._generator(model)
        done = 0
        while done < most:
            upto = min(max(_FIRST_ROUND, 2 * done), most)
            if done and self._is_too_long((perf_counter() - start) * upto / done, model):
                logger.warning(
                    f"--eval-bleu: translating {upto} lines of each direction would take longer than the "
                    f"{self.clock.longest:.1f} s of training between two validations: from now on BLEU and chrF++ are "
                    f"of the first {done} lines. Validate less often, or give --eval-bleu-lines {done}"
                )
                self.lines = done
                break
            batches = self._batches(directions, done, upto, model)
            here, every = _place()
            with in_step(model, self._sample(directions, [(0, 0)], model)):
                for batch in batches[here::every]:
                    self._translate(generator, model, directions, batch)
            done = upto
        return done

    def _is_too_long(self, seconds: float, model: Any) -> bool:
        """Returns whether an evaluation would take too long; the slowest process decides for all."""
        over = torch.tensor([float(seconds > self.clock.longest)], device=_device(model))
        if _place()[1] > 1:
            distributed.all_reduce(over, group=distributed.get_data_parallel_group(), op="max")
        return bool(over.item())

    def _batches(
        self, directions: Sequence[DevelopmentSet], start: int, upto: int, model: Any
    ) -> list[list[tuple[int, int]]]:
        """Cuts the lines of a round into batches, the same in every process; counts those that are too long.

        Returns:
            Batches of the numbers of a direction and a line.
        """
        longest = min(self.task.max_positions()[0], model.max_positions()[0])
        lines = []
        for number, direction in enumerate(directions):
            for line in range(start, min(upto, len(direction.dataset))):
                length = len(direction.dataset[line]["source"])
                if length <= longest:
                    lines.append((number if self._apart else 0, length, number, line))
                elif _place()[0] == 0:
                    direction.add("", self._text(direction.dataset[line]["target"]))
        tokens, sentences = (limit // self.search.beam if limit else 2**31 for limit in self.limits)
        batches: list[list[tuple[int, int]]] = []
        kind = -1
        for group, length, number, line in sorted(lines):
            batch = batches[-1] if batches and group == kind else []
            if not batch or (len(batch) + 1) * length > tokens or len(batch) >= sentences:
                batch = []
                batches.append(batch)
            batch.append((number, line))
            kind = group
        return batches

    @property
    def _apart(self) -> bool:
        """Whether sentences of different directions cannot share a batch."""
        return bool(self.task.args.lang_tok_replacing_bos_eos)

    def _sample(self, directions: Sequence[DevelopmentSet], batch: Sequence[tuple[int, int]], model: Any) -> Any:
        """Collates a batch whose sentences are numbered by their places in it."""
        items = [{**directions[number].dataset[line], "id": place} for place, (number, line) in enumerate(batch)]
        sample = directions[batch[0][0]].dataset.collater(items)
        device = _device(model)
        return utils.apply_to_sample(lambda tensor: tensor.to(device), sample)

    def _translate(
        self, generator: Any, model: Any, directions: Sequence[DevelopmentSet], batch: Sequence[tuple[int, int]]
    ) -> None:
        """Translates a batch and counts its translations."""
        sample = self._sample(directions, batch, model)
        chosen = [batch[place] for place in sample["id"].tolist()]
        targets = [directions[number].name.target for number, _ in chosen]
        task = copy.copy(self.task)
        task.args = Namespace(**{**vars(task.args), "target_lang": targets[0]})
        _, spec = task.args.langtoks["main"]
        prefix = None
        if spec and not self._apart:
            tokens = [[task.data_manager.get_decoder_langtok(target, spec)] for target in targets]
            prefix = torch.tensor(tokens).to(sample["net_input"]["src_tokens"])
        found = task.inference_step(generator, [model], sample, prefix_tokens=prefix)
        for (number, line), hypotheses in zip(chosen, found, strict=True):
            direction = directions[number]
            texts = [self._text(tokens) for tokens in (hypotheses[0]["tokens"], direction.dataset[line]["target"])]
            direction.add(*texts)
            if line == 0 and self.task.args.eval_bleu_print_samples:
                logger.info(f"example hypothesis ({direction.name}): {texts[0]}")
                logger.info(f"example reference ({direction.name}): {texts[1]}")

    @cached_property
    def _language_tokens(self) -> set[int]:
        _, spec = self.task.args.langtoks["main"]
        targets = self.task.target_langs if spec else ()
        return {self.task.data_manager.get_decoder_langtok(target, spec) for target in targets}

    def _text(self, tokens: Any) -> str:
        """Joins the pieces of a sentence; tokens of languages are no text."""
        dictionary = self.task.target_dictionary
        return self.bpe.decode(dictionary.string(tokens.int().cpu(), extra_symbols_to_ignore=self._language_tokens))

    def _add_up(self, directions: Sequence[DevelopmentSet], model: Any) -> None:
        """Adds up the counts of all processes."""
        if _place()[1] == 1:
            return
        parts = [direction.sums[name] for direction in directions for name in METRICS]
        counts = torch.from_numpy(np.concatenate(parts)).to(_device(model))
        distributed.all_reduce(counts, group=distributed.get_data_parallel_group())
        ends = list(accumulate(map(len, parts)))
        sums = iter(np.split(counts.cpu().numpy(), ends[:-1]))
        for direction in directions:
            direction.sums = {name: next(sums) for name in METRICS}

    def _scores(self, subset: str) -> dict[str, float]:
        """Returns means and the score of each direction, all rounded: the means are of what is shown."""
        chosen = [self._directions[split_name(subset)[0], pair] for pair in self._pairs(subset)]
        each = {name: {one.name: one.score(name) for one in chosen} for name in METRICS}
        means = {name: round(fmean(values.values()), 2) for name, values in each.items()}
        return means | {f"{name}_{pair}": value for name, values in each.items() for pair, value in values.items()}

    def _say(self, directions: Sequence[DevelopmentSet], done: int, seconds: float, trained: float) -> None:
        logger.info(
            f"translated {done} lines of each of {len(directions)} directions in {seconds:.1f} s, "
            f"after {trained:.1f} s of training"
        )
        if not self._said:
            for name in METRICS:
                signatures = sorted({str(one.metrics[name].get_signature()) for one in directions})
                logger.info(f"{name} of validation: {', '.join(signatures)}")
        self._said = True


def _place() -> tuple[int, int]:
    """Returns the number of this process, and of how many."""
    size = distributed.get_data_parallel_world_size()
    return (distributed.get_data_parallel_rank() if size > 1 else 0), size


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
