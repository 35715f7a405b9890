"""``--eval-bleu`` of the tasks ``multilingual_*``: its options, and the hooks of fairseq where it takes place."""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
import dataclasses
import os
from argparse import Namespace
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationConfig

from ..common import schema
from ..errors import UserError
from .evaluation import METRICS, Evaluation, Search

# Where a checkpoint keeps how many lines are translated, in what fairseq saves of the task.
_KEY = "xmoe_eval_bleu"
_JSON = 'write it as \'{"beam": 4, "lenpen": 0.6}\''


def _stock(name: str, **changed: Any) -> Any:
    """Returns a field of stock ``translation``, with another default or help if given."""
    field = TranslationConfig.__dataclass_fields__[name]
    help_text = changed.pop("help", field.metadata["help"])
    return dataclasses.field(
        default=changed.pop("default", field.default), metadata={**field.metadata, "help": help_text}
    )


@dataclasses.dataclass
class EvalBleuConfig(FairseqDataclass):
    """Stock ``translation``'s options, and how many lines."""

    eval_bleu: bool = _stock(
        "eval_bleu",
        help="at each validation, translate lines of the development sets with the model that is trained, and log BLEU "
        "and chrF++ of each direction and their means",
    )
    eval_bleu_lines: int = dataclasses.field(
        default=100,
        metadata={"help": "lines of each direction that --eval-bleu translates, the first ones; 0 for all"},
    )
    eval_bleu_args: Optional[str] = _stock(
        "eval_bleu_args",
        help='options of the search as JSON, such as \'{"beam": 4, "lenpen": 0.6}\'; what is not given is beam 1, '
        "max_len_a 2, max_len_b 20, and as in fairseq-generate",
    )
    eval_bleu_detok: str = _stock("eval_bleu_detok", help="only 'space': SentencePiece joins the pieces to text")
    eval_bleu_detok_args: Optional[str] = _stock("eval_bleu_detok_args", help="only {}: see --eval-bleu-detok")
    eval_tokenized_bleu: bool = _stock("eval_tokenized_bleu", help="refused: BLEU is of text")
    eval_bleu_remove_bpe: Optional[str] = _stock(
        "eval_bleu_remove_bpe", help="only 'sentencepiece', which is done anyway"
    )
    eval_bleu_print_samples: bool = _stock("eval_bleu_print_samples")


def check_options(args: Any, folder: str) -> None:
    """Refuses what does not go with the pieces and texts of these tasks.

    Args:
        args: of the task.
        folder: of the data.

    Raises:
        UserError: names the option and what to give instead.
    """
    if not args.eval_bleu:
        return
    text = "--eval-bleu scores text whose pieces SentencePiece has joined"
    for given, option in (
        (args.eval_bleu_detok != "space", f"--eval-bleu-detok {args.eval_bleu_detok}"),
        (args.eval_bleu_detok_args not in (None, "{}"), f"--eval-bleu-detok-args {args.eval_bleu_detok_args}"),
        (args.eval_tokenized_bleu, "--eval-tokenized-bleu"),
        (
            args.eval_bleu_remove_bpe not in (None, "sentencepiece"),
            f"--eval-bleu-remove-bpe {args.eval_bleu_remove_bpe}",
        ),
    ):
        if given:
            raise UserError(f"{option} does not go with the tasks multilingual_*: {text}; leave it out")
    if args.eval_bleu_lines < 0:
        raise UserError(f"--eval-bleu-lines {args.eval_bleu_lines} is out of range: it must be at least 0")
    if not os.path.isfile(os.path.join(folder, "spm.model")):
        raise UserError(f"--eval-bleu needs {folder}/spm.model to join pieces to text: give data that has it")
    read_search(args.eval_bleu_args)


def read_search(text: Optional[str]) -> Search:
    """Reads ``--eval-bleu-args``.

    Raises:
        UserError: it is no JSON, or a name or value is not one of the search.
    """
    values = schema.parse_json(text or "{}", "--eval-bleu-args", _JSON)
    search = schema.build(Search, values, "--eval-bleu-args", _JSON)
    for name, low in (("beam", 1), ("max_len_a", 0), ("max_len_b", 0), ("min_len", 0)):
        if getattr(search, name) < low:
            raise UserError(f"--eval-bleu-args: {name} {getattr(search, name)} is out of range, at least {low} works")
    if search.temperature <= 0:
        raise UserError(f"--eval-bleu-args: temperature {search.temperature} is out of range: it must be above 0")
    if search.min_len > search.max_len_a + search.max_len_b:
        raise UserError(f"--eval-bleu-args: min_len {search.min_len} is more than max_len_a + max_len_b")
    return search


class TranslatesDevelopmentSets:
    """A multilingual task of fairseq that translates some lines before it validates, if ``--eval-bleu`` is given.

    The training's own model translates, as it is at inference. All processes must validate together, as fairseq does.
    """

    args: Namespace
    training: bool
    datasets: dict[str, Any]
    evaluation: Optional[Evaluation] = None
    # The subset that is validated.
    validated = ""

    @property
    def translation_metrics(self) -> tuple[str, ...]:
        """Names the metrics that every validation gives by translating."""
        if not (self.training and self.args.eval_bleu):
            return ()
        directions: list[str] = self.lang_pairs  # type: ignore[attr-defined]
        return tuple(name for metric in METRICS for name in (metric, *(f"{metric}_{pair}" for pair in directions)))

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the model, and its search once, so that options of the search are refused now.

        Raises:
            UserError: they contradict each other.
        """
        model = super().build_model(*args, **kwargs)
        if self.translation_metrics:
            self.evaluation = self.evaluation or Evaluation(self, read_search(self.args.eval_bleu_args))
            self.evaluation.check_search(model)
        return model

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; from here on time is counted that translating may take."""
        if self.evaluation is not None:
            self.evaluation.clock.training()
        return super().train_step(*args, **kwargs)

    def get_batch_iterator(self, dataset: Any, max_tokens: Any = None, max_sentences: Any = None, **kwargs: Any) -> Any:
        """Makes batches, and notes what is validated."""
        split = next((name for name, known in self.datasets.items() if known is dataset), "")
        if self.evaluation is not None and split != self.args.train_subset:
            self.validated = split
            self.evaluation.limits = (max_tokens, max_sentences)
        return super().get_batch_iterator(dataset, max_tokens, max_sentences, **kwargs)

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Translates the development sets."""
        super().begin_valid_epoch(epoch, model)
        if self.evaluation is not None:
            subsets = [split for split in self.datasets if split != self.args.train_subset]
            self.evaluation.run(model, subsets)

    def reduce_metrics(self, logging_outputs: Any, criterion: Any) -> None:
        """Logs the scores beside the loss; a weight of 0 shows the value that was logged last."""
        super().reduce_metrics(logging_outputs, criterion)
        if self.evaluation is not None and not criterion.training:
            for number, (name, value) in enumerate(self.evaluation.scores.get(self.validated, {}).items()):
                metrics.log_scalar(name, value, weight=0, priority=1500 + number, round=2)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the task."""
        kept = {} if self.evaluation is None else {_KEY: self.evaluation.state()}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what a checkpoint kept of its task."""
        if self.evaluation is not None and isinstance(state_dict.get(_KEY), dict):
            self.evaluation.restore(state_dict[_KEY])
