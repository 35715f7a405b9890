"""Trained models from Python: fairseq's ``from_pretrained``, for multilingual tasks too.

    from xmoe_fairseq import hub
    model = hub.from_pretrained("runs/local", "checkpoint_best.pt", "data/local/bin")
    model.translate(["Good morning."], source_lang="en", target_lang="ca")

``from_pretrained`` of every model class, also of stock fairseq's, gives the same.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fairseq import hub_utils, utils
from fairseq.data import ListDataset
from fairseq.dataclass.configs import GenerationConfig
from fairseq.registry import REGISTRIES
from torch import Tensor

from .checkpoints import options, reading
from .common.files import is_there
from .errors import UserError
from .models.routing_recorder import INPUTS, per_token, stack_of
from .tasks.decoding import languages_of, pairs

SPM = "spm.model"
# The --bpe that read such a file.
_SENTENCEPIECE = ("sentencepiece_bytes", "sentencepiece")
# Tokens of a batch if neither the caller nor the checkpoint says how many.
_MAX_TOKENS = 12000


class Translator(hub_utils.GeneratorHubInterface):
    """fairseq's interface to trained models; the direction is an argument of each call.

    If a call names no direction, that of ``from_pretrained`` is taken. Options of the search have fairseq's names:
    ``translate(..., beam=4, lenpen=0.6)``; ``max_tokens`` and ``batch_size`` are those of one batch.
    """

    def __init__(self, cfg: Any, task: Any, models: Sequence[Any]) -> None:
        if hasattr(task, "training"):  # a multilingual task takes itself to train where it was given no direction
            task.training = False
        super().__init__(cfg, task, models)
        self.bpe = task.build_bpe(cfg.bpe)  # which compares the SentencePiece model with the data

    def translate(self, sentences: Any, beam: int = 5, verbose: bool = False, **kwargs: Any) -> Any:
        """Translates by beam search.

        Args:
            sentences: plain text, one string or a list.
            beam: size of the beam.
            verbose: whether to log translations as ``fairseq-generate`` prints them.
            kwargs: ``source_lang``, ``target_lang``; ``nbest``; options of the search.

        Returns:
            A translation for each sentence; with ``nbest`` a list of them, the best first. For one string, one.

        Raises:
            UserError: a language or an option is unknown.
        """
        return self.sample(sentences, beam, verbose, **kwargs)

    def sample(self, sentences: Any, beam: int = 1, verbose: bool = False, **kwargs: Any) -> Any:
        """As `translate`, with a beam of 1 unless told otherwise; ``sampling=True`` draws the tokens."""
        if isinstance(sentences, str):
            return self.sample([sentences], beam, verbose, **kwargs)[0]
        found = self.generate([self.encode(sentence) for sentence in sentences], beam, verbose, **kwargs)
        texts = [[self.decode(hypothesis["tokens"]) for hypothesis in one] for one in found]
        nbest = kwargs.get("nbest")
        return [one[0] for one in texts] if nbest is None else [one[:nbest] for one in texts]

    def generate(
        self,
        tokenized_sentences: Any,
        beam: int = 5,
        verbose: bool = False,
        *args: Any,
        source_lang: str | None = None,
        target_lang: str | None = None,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Searches.

        Args:
            tokenized_sentences: (length,) ids of each sentence, as `encode` gives them; or those of one sentence.
            beam, verbose: see `translate`.
            args, kwargs: of fairseq's ``generate``, and options of the search.
            source_lang, target_lang: the direction.
            max_tokens, batch_size: the most that a batch may hold.

        Returns:
            For each sentence its hypotheses, the best first: ``tokens``, ``score`` (natural logarithm, by length),
            ``positional_scores``, ``attention``, ``alignment``.
        """
        if torch.is_tensor(tokenized_sentences) and tokenized_sentences.dim() == 1:
            tokenized_sentences = [tokenized_sentences]
            one = True
        else:
            one = False
        _check_names(kwargs)
        if kwargs.get("print_alignment"):
            for module in self.modules():
                if hasattr(module, "need_attn"):
                    module.need_attn = True
        with self._direction(source_lang, target_lang), self._batch_limits(max_tokens, batch_size):
            found = super().generate(tokenized_sentences, beam, verbose, *args, **kwargs) if tokenized_sentences else []
        return found[0] if one else found

    def score(self, sentences: Any, references: Any = None, **kwargs: Any) -> Any:
        """Scores given translations, as ``fairseq-generate --score-reference`` does.

        Args:
            sentences: plain text, one string or a list.
            references: their translations; none for a language model, which scores the sentences.
            kwargs: ``source_lang``, ``target_lang``, ``max_tokens``, ``batch_size``.

        Returns:
            For each sentence a hypothesis as of `generate`: ``score`` is the mean of ``positional_scores``, natural
            logarithms of the probabilities of the reference's tokens. For one string, one of them.
        """
        if references is None:
            if hasattr(self.task, "build_dataset_for_inference") and self._directed:
                raise UserError("score() needs references: give the translations of the sentences")
            return super().score(sentences, **kwargs)
        if isinstance(sentences, str):
            return self.score([sentences], [references], **kwargs)[0]
        with self._reading(sentences, references, **kwargs) as batches:
            generator = self.task.build_generator(self.models, _WithScores(self.cfg.generation))
            found: dict[int, Any] = {}
            for batch in batches:
                hypotheses = self.task.inference_step(generator, self.models, batch)
                found |= zip(batch["id"].tolist(), (one[0] for one in hypotheses), strict=True)
        return [found[number] for number in range(len(sentences))]

    def experts(self, sentences: Any, translations: Any = None, **kwargs: Any) -> Any:
        """Returns how many experts each token takes.

        Args:
            sentences: plain text, one string or a list.
            translations: what the decoder reads; if not given, what `translate` gives.
            kwargs: ``source_lang``, ``target_lang``, ``max_tokens``, ``batch_size``.

        Returns:
            For each sentence and each MoE layer, such as ``encoder.2``, the tokens that the layer reads, in their
            order, with the experts that each takes in the first model: ``{"encoder.2": [("▁Good", 3), ...]}``. A
            decoder reads ``</s>`` first. Nothing for a dense model.
        """
        if isinstance(sentences, str):
            given = None if translations is None else [translations]
            return self.experts([sentences], given, **kwargs)[0]
        if translations is None:
            translations = self.translate(sentences, **kwargs)
        found: dict[int, dict[str, list[tuple[str, int]]]] = {}
        with self._reading(sentences, translations, **kwargs) as batches:
            for batch in batches:
                found |= self._experts_of(batch)
        return [found[number] for number in range(len(sentences))]

    def _experts_of(self, batch: Mapping[str, Any]) -> dict[int, dict[str, list[tuple[str, int]]]]:
        dictionaries = {"encoder": self.src_dict, "decoder": self.tgt_dict}
        found: dict[int, dict[str, list[tuple[str, int]]]] = {number: {} for number in batch["id"].tolist()}
        for layer, routing in per_token(self.models[0], batch["net_input"]).items():
            dictionary = dictionaries[stack_of(layer)]
            rows = batch["net_input"][INPUTS[stack_of(layer)]].tolist()
            for number, row, taken in zip(batch["id"].tolist(), rows, routing.experts.tolist(), strict=True):
                tokens = zip(row, taken, strict=True)
                found[number][layer] = [(dictionary[i], count) for i, count in tokens if i != dictionary.pad()]
        return found

    def string(self, tokens: Tensor) -> str:
        """Spells tokens, without those of languages."""
        return self.tgt_dict.string(tokens, extra_symbols_to_ignore=self._tokens_of_languages)

    @functools.cached_property
    def _tokens_of_languages(self) -> set[int]:
        return set(languages_of(self.task))

    @property
    def _options(self) -> Any:
        """The task's options, which hold the direction."""
        return getattr(self.task, "args", None) or self.task.cfg

    @property
    def _directed(self) -> bool:
        return hasattr(self._options, "source_lang")

    @contextmanager
    def _direction(self, source: str | None, target: str | None) -> Iterator[None]:
        """Sets the direction of one call.

        Raises:
            UserError: a language is missing or unknown.
        """
        if not self._directed:
            if source or target:
                raise UserError("source_lang and target_lang: this model does not translate")
            yield
            return
        before = self._options.source_lang, self._options.target_lang
        source, target = source or before[0], target or before[1]
        known = getattr(self.task, "langs", None) or before
        for name, language in (("source_lang", source), ("target_lang", target)):
            if language is None:
                raise UserError(f"{name} is missing: give one of {', '.join(known)}")
            if language not in known:
                raise UserError(f"{name} {language!r} is unknown: the model knows {', '.join(known)}")
        if known is before and (source, target) != before:
            raise UserError(f"this model translates from {before[0]} to {before[1]} only, not {source} to {target}")
        self._options.source_lang, self._options.target_lang = source, target
        try:
            yield
        finally:
            self._options.source_lang, self._options.target_lang = before

    @contextmanager
    def _batch_limits(self, max_tokens: int | None, batch_size: int | None) -> Iterator[None]:
        dataset = self.cfg.dataset
        before = dataset.max_tokens, dataset.batch_size
        dataset.max_tokens = max_tokens or (None if batch_size else before[0] or _MAX_TOKENS)
        dataset.batch_size = batch_size or (None if max_tokens else before[1])
        try:
            yield
        finally:
            dataset.max_tokens, dataset.batch_size = before

    @contextmanager
    def _reading(
        self,
        sentences: Sequence[str],
        targets: Sequence[str],
        source_lang: str | None = None,
        target_lang: str | None = None,
        max_tokens: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Iterator[Any]]:
        """Yields batches of sentences with their translations, on the models' device.

        Raises:
            UserError: there are not as many translations as sentences.
        """
        if isinstance(targets, str) or len(sentences) != len(targets):
            raise UserError(f"{len(sentences)} sentences and {len(targets)} translations: give one for each sentence")
        sources = [self.encode(sentence) for sentence in sentences]
        encoded = [self._encode_target(target) for target in targets]
        with self._direction(source_lang, target_lang), self._batch_limits(max_tokens, batch_size):
            yield self._batches_of(sources, encoded) if sources else iter(())

    def _encode_target(self, sentence: str) -> Tensor:
        pieces = self.apply_bpe(self.tokenize(sentence))
        return self.tgt_dict.encode_line(pieces, add_if_not_exist=False).long()

    def _batches_of(self, sources: list[Tensor], targets: list[Tensor]) -> Iterator[Any]:
        dataset = self.task.build_dataset_for_inference(sources, [len(one) for one in sources])
        inner, text = pairs(dataset), ListDataset(targets, [len(one) for one in targets])
        if hasattr(self.task, "data_manager"):
            options = self._options
            _, spec = options.langtoks["main"]
            direction = options.source_lang, options.target_lang
            text = self.task.data_manager.tgt_dataset_tranform_func(*direction, dataset=text, spec=spec)
        inner.tgt, inner.tgt_dict = text, self.tgt_dict
        inner.tgt_sizes = np.array([len(text[number]) for number in range(len(targets))])
        batches = self.task.get_batch_iterator(
            dataset=dataset,
            max_tokens=self.cfg.dataset.max_tokens,
            max_sentences=self.cfg.dataset.batch_size,
            max_positions=self.max_positions,
        ).next_epoch_itr(shuffle=False)
        return (utils.apply_to_sample(lambda tensor: tensor.to(self.device), batch) for batch in batches)


class _WithScores:
    """Options of the search, of which one says that references are scored."""

    score_reference = True

    def __init__(self, generation: Any) -> None:
        self.generation = generation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generation, name)


def _check_names(given: Mapping[str, Any]) -> None:
    """Refuses an option of the search that fairseq would take and never look at."""
    known = {field.name for field in dataclasses.fields(GenerationConfig)}
    known |= {"skip_invalid_size_inputs", "inference_step_args", "prefix_allowed_tokens_fn"}
    for name in given:
        if name not in known:
            raise UserError(f"{name} is no option of the search{options.near(name, known)}")


def from_pretrained(
    folder: Any, checkpoint_file: str = "checkpoint_best.pt", data: Any = ".", **kwargs: Any
) -> Translator:
    """Loads a trained model, or several as an ensemble.

    Args:
        folder: of the checkpoint.
        checkpoint_file: its name; several with ``:`` between them.
        data: the folder ``bin/`` of the prepared data, with the dictionary. Its ``spm.model`` splits and joins text.
        kwargs: options that are not to be as in training, such as ``moe_threshold``, ``bpe`` or ``source_lang``.

    Raises:
        UserError: a file is missing, or the checkpoint is refused.
    """
    loaded = hub_utils.from_pretrained(folder, checkpoint_file, data, **kwargs)
    return Translator(loaded["args"], loaded["task"], loaded["models"])


def found(folder: str, checkpoint_file: str, data: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Finds and checks what a model is made of.

    Args:
        folder: of the checkpoints.
        checkpoint_file: a name in it, or several with ``:`` between them.
        data: the data folder.
        given: options for the model and the search.

    Returns:
        The data folder, and the options with the SentencePiece model of the data.

    Raises:
        UserError: a folder or file is missing, or nothing has an option of that name.
    """
    paths = _checkpoints(folder, checkpoint_file)
    data = _data_folder(folder, data)
    options = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    _check_overrides(paths, options)
    return data, _with_sentencepiece(data, options)


def _checkpoints(folder: str, names: str) -> list[str]:
    """Finds the files that a name, or several with ``:`` between them, stands for."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder: from_pretrained takes a checkpoint's folder, then the file's name")
    paths = [os.path.join(folder, name) for name in names.split(os.pathsep)]
    for path in paths:
        if not os.path.isfile(path):
            others = sorted(name for name in os.listdir(folder) if name.endswith(".pt"))
            raise UserError(f"there is no checkpoint {path}; the folder has {', '.join(others[:8]) or 'none'}")
    return paths


def _data_folder(folder: str, data: str) -> str:
    """Finds the data folder: what begins with a dot is looked for in the checkpoint's folder first."""
    inside = os.path.join(folder, data)
    place = inside if data.startswith(".") and os.path.isdir(inside) else data
    if not os.path.isdir(place):
        raise UserError(f"there is no data folder {data}: give the folder bin/ made by data_prep/prepare.sh")
    return os.path.abspath(place)


def _with_sentencepiece(data: str, given: dict[str, Any]) -> dict[str, Any]:
    """Adds the SentencePiece model beside the data, unless text is to be split otherwise."""
    model = os.path.join(data, SPM)
    wanted = given.get("bpe", _SENTENCEPIECE[0])
    if "sentencepiece_model" in given:  # without --bpe, it would be ignored
        return {**given, "bpe": wanted}
    if wanted not in _SENTENCEPIECE or not is_there(model):
        return given
    return {**given, "bpe": wanted, "sentencepiece_model": model}


def _check_overrides(paths: Sequence[str], given: Mapping[str, Any]) -> None:
    of_registries = {
        name
        for registry in REGISTRIES.values()
        for dataclass in registry["dataclass_registry"].values()
        for name in dataclass.__dataclass_fields__
    }
    own = {"data", "user_dir", "generation_args", "is_vocoder", *of_registries, *REGISTRIES}
    overrides = {name: value for name, value in given.items() if name not in own}
    for path in paths:
        state = reading.peek(path)
        options.check(state, path)
        options.check_overrides(state, overrides, path, "from_pretrained")
