"""What stock fairseq lacks when it translates, above all with multilingual tasks, from which ours are derived."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fairseq.data import TransformEosLangPairDataset
from fairseq.data.multilingual.multilingual_utils import get_lang_tok
from fairseq.models import FairseqEncoderDecoderModel
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.search import LexicallyConstrainedBeamSearch
from torch import Tensor, nn

from ..errors import UserError
from .lengths import nothing

logger = logging.getLogger(__name__)


def pairs(dataset: Any) -> Any:
    """Returns the dataset of sentence pairs inside one that replaces their first or last tokens."""
    return dataset.dataset if isinstance(dataset, TransformEosLangPairDataset) else dataset


def knowing_languages(model: Any, task: Any) -> nn.Module:
    """Returns a language model that may stand beside the translation model of a task.

    Raises:
        UserError: it is no language model, or has another dictionary.
    """
    if isinstance(model, FairseqEncoderDecoderModel):
        raise UserError("--lm-path: the checkpoint holds a translation model: give one of a language model")
    known, needed = model.decoder.dictionary.symbols, task.target_dictionary.symbols
    if known == needed:
        return model
    if known != needed[: len(known)]:
        raise UserError(
            f"--lm-path: the language model has another dictionary ({len(known)} entries) than the data: train it with "
            f"the dict.txt of {task.args.data}"
        )
    _, decoder_token = task.args.langtoks["main"]
    first = bool(decoder_token) and not task.args.lang_tok_replacing_bos_eos
    return WithLanguages(model, len(needed) - len(known), first)


class WithLanguages(nn.Module):
    """A language model beside a translation model that has tokens of languages, which no text contains.

    It reads the text without them, and gives to each of them the probability of its least probable token.

    Args:
        model: whose dictionary lacks them.
        added: how many there are; they have the last numbers.
        first: whether each translation begins with one, about which the language model says nothing.
    """

    def __init__(self, model: Any, added: int, first: bool) -> None:
        super().__init__()
        self.model = model
        self.added = added
        self.first = first

    def forward(self, tokens: Tensor) -> tuple[Any, bool]:
        """Reads hypotheses.

        Args:
            tokens: (batch, length) so far.

        Returns:
            What the model gives, and whether the next token is a language's.
        """
        dictionary = self.model.decoder.dictionary
        waits = self.first and tokens.size(1) == 1
        if self.first and not waits:
            tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
        return self.model(tokens.masked_fill(tokens >= len(dictionary), dictionary.eos())), waits

    def get_normalized_probs(self, net_output: tuple[Any, bool], log_probs: bool, sample: Any = None) -> Tensor:
        """Gives (batch, length, entries) probabilities, or their logarithms."""
        output, waits = net_output
        probabilities = self.model.get_normalized_probs(output, log_probs, sample)
        least = probabilities.amin(dim=-1, keepdim=True)
        whole = torch.cat([probabilities, least.expand(*least.shape[:-1], self.added)], dim=-1)
        return torch.full_like(whole, 0.0 if log_probs else 1.0) if waits else whole


def without_text(task: Any, generator: Any, sample: Any, translations: Any) -> Any:
    """Puts an empty translation in the place of that of a source without text."""
    sources = sample["net_input"].get("src_tokens")
    if hasattr(generator, "search") and sources is not None:  # else references are scored
        blank = torch.isin(sources, torch.tensor(_no_text(task), device=sources.device)).all(dim=1)
        for row in blank.nonzero().flatten().tolist():
            translations[row : row + 1] = nothing(sources[row : row + 1], task.target_dictionary.eos())
    return translations


def _no_text(task: Any) -> list[int]:
    dictionary = task.source_dictionary
    return [dictionary.bos(), dictionary.pad(), dictionary.eos(), *languages_of(task)]


def languages_of(task: Any) -> list[int]:
    """Returns the numbers of the tokens that name languages; none if a task has one direction."""
    if not hasattr(task, "data_manager"):
        return []
    args = task.args
    names = {
        get_lang_tok(lang=language, lang_tok_style=args.lang_tok_style, spec=spec)
        for language in task.langs
        for spec in args.langtoks_specs
    }
    numbers = (task.target_dictionary.index(name) for name in names)
    return [number for number in numbers if number != task.target_dictionary.unk()]


class ConstrainedSearch(LexicallyConstrainedBeamSearch):
    """fairseq's search with constraints, without its tracebacks."""

    constraint_states: list[Any]

    def init_constraints(self, batch_constraints: Tensor | None, beam_size: int) -> None:
        """Takes the constraints of a batch.

        Raises:
            UserError: no sentence can have any.
        """
        if batch_constraints is None:
            raise UserError(
                "--constraints: the text has none, for prepared data cannot hold them; give fairseq-interactive "
                "lines of a sentence and its constraints, with tabs between them"
            )
        super().init_constraints(batch_constraints, beam_size)

    def step(self, step: int, lprobs: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Chooses the next tokens.

        A translation that has its longest length ends, where stock fairseq would allow it no token; one that lacks
        constraints ends only if none of the sentence has them all.
        """
        others = lprobs.index_fill(-1, torch.tensor([self.eos], device=lprobs.device), -torch.inf)
        if self.constraint_states and bool(torch.isneginf(others).all()):
            for sentence, states in enumerate(self.constraint_states):
                lacking = [beam for beam, state in enumerate(states) if not state.finished]
                if len(lacking) == len(states):
                    logger.warning("a translation is as long as --max-len-b allows, and may lack some constraints")
                else:
                    lprobs[sentence, lacking] = -torch.inf
            self.constraint_states = []
        return super().step(step, lprobs, *args, **kwargs)


class RepeatBlock(NGramRepeatBlock):
    """fairseq's ``--no-repeat-ngram-size``, which without a GPU compares with what is behind the last token."""

    def _no_repeat_ngram(self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int) -> Tensor:
        if self.no_repeat_ngram_size == 1:
            return lprobs.scatter_(1, tokens[:, 1 : step + 1], -torch.inf)
        blocked: Tensor = super()._no_repeat_ngram(tokens[:, : step + 1], lprobs, bsz, beam_size, step)
        return blocked


def mended_search(generator: Any, task: Any) -> Any:
    """Puts the classes above in the place of fairseq's in a generator."""
    search: Any = getattr(generator, "search", None)
    blocker: Any = getattr(generator, "repeat_ngram_blocker", None)
    if type(search) is LexicallyConstrainedBeamSearch:
        generator.search = ConstrainedSearch(task.target_dictionary, search.representation)
    if type(blocker) is NGramRepeatBlock:
        generator.repeat_ngram_blocker = RepeatBlock(blocker.no_repeat_ngram_size)
    return generator
