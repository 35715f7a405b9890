"""Languages that join those of a trained model: rows of its embeddings for their tokens."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import augment_dictionary, get_lang_tok
from torch import Tensor

from ..common import identity
from ..common.identity import DataIdentity
from ..errors import UserError
from ..tasks import TASKS
from ..tasks.data_folder import count_symbols
from ..tasks.stock_options import stock_namespace
from . import options

# Ends of the names of parameters that have a row for each symbol; tied ones are of one tensor.
_BY_SYMBOL = ("embed_tokens.weight", "output_projection.weight")
_LOCAL = "multilingual_local"


def add(state: dict[str, Any], path: str, data: str) -> tuple[str, ...]:
    """Adds the languages that a data folder has and a model lacks.

    The rows of all that the model knows stay as they are, bit for bit, wherever the new dictionary has them; the token
    of a new language starts as the mean of the tokens of the others. The optimizer's state is left out: it is of the
    old rows.

    Args:
        state: a whole checkpoint, which is changed.
        path: of the checkpoint, for messages.
        data: folder ``bin/``, prepared with the vocabulary of the model.

    Returns:
        The languages that are new.

    Raises:
        UserError: the data has another vocabulary, lacks a language of the model, or has none that is new.
    """
    trained, new = identity.recorded(state, path), identity.of_folder(data)
    options.check(state, path)
    options.check_complete(state, path)
    if trained is None:
        raise UserError(f"{path} does not say which languages it was trained with: train it with this version first")
    added = _check(trained, new, path)
    task = _task_of(state, path)
    old_symbols, symbols = (_symbols(data, languages, task) for languages in (trained.languages, new.languages))
    rows = {symbol: row for row, symbol in enumerate(old_symbols)}
    means = {
        get_lang_tok(language, task.lang_tok_style, spec): [
            rows[get_lang_tok(other, task.lang_tok_style, spec)] for other in trained.languages
        ]
        for spec in task.langtoks_specs
        for language in added
    }
    sources = [[rows[symbol]] if symbol in rows else means[symbol] for symbol in symbols]
    extra = state.get("extra_state") or {}
    for parameters in (state["model"], extra.get("ema"), extra.get("ema_fp32_params")):
        if parameters:
            _grow(parameters, sources, len(old_symbols), path)
    state.pop("last_optimizer_state", None)
    state["task_state"][identity.KEY] = new.as_plain()
    state["cfg"]["task"] = {**state["cfg"]["task"], "data": data, "_name": _name_of(state)}
    return added


def _check(trained: DataIdentity, new: DataIdentity, path: str) -> tuple[str, ...]:
    """Returns the languages that are new to a model."""
    for what, one, two in identity.differences(trained, new):
        if what != "languages":
            raise UserError(
                f"{path} was trained with the {what} {one}, but {new.folder} has {two}: prepare the text with "
                f"--vocabulary {trained.folder} --add-languages"
            )
    if lost := [language for language in trained.languages if language not in new.languages]:
        raise UserError(f"{path} was trained with {lost[0]}, which is not in langs.txt of {new.folder}: add it there")
    added = tuple(language for language in new.languages if language not in trained.languages)
    if not added:
        raise UserError(f"{new.folder} has no language that {path} lacks: use the checkpoint as it is")
    return added


def _task_of(state: dict[str, Any], path: str) -> Namespace:
    """Returns the options of a model's task."""
    section = options.sections(state)["task"]
    if not isinstance(state.get("cfg"), dict) or section["_name"] not in {f"multilingual_{name}" for name in TASKS}:
        raise UserError(f"{path} was trained with --task {section['_name']}: only tasks multilingual_* can have more")
    return stock_namespace(dict(section))


def _name_of(state: dict[str, Any]) -> str:
    """Names the task of a model with more languages, which is no longer a benchmark's."""
    name: str = state["cfg"]["task"]["_name"]
    return _LOCAL if TASKS[name.removeprefix("multilingual_")].benchmark.languages else name


def _symbols(data: str, languages: Sequence[str], task: Namespace) -> list[str]:
    """Lists the symbols of a model's dictionary in the order of its rows, as fairseq's task makes it."""
    file = os.path.join(data, "dict.txt")
    count_symbols(file)
    dictionary = Dictionary.load(file)
    augment_dictionary(dictionary, list(languages), task.lang_tok_style, task.langtoks_specs, task.extra_data)
    symbols: list[str] = dictionary.symbols
    return symbols


def _grow(parameters: dict[str, Tensor], sources: Sequence[Sequence[int]], symbols: int, path: str) -> None:
    """Puts larger tensors in the places of those that have a row for each symbol.

    Args:
        parameters: by name, which are changed.
        sources: for each new row the old rows whose mean it is.
        symbols: old rows.
        path: of the checkpoint, for messages.
    """
    grown: dict[int, Tensor] = {}
    for name, tensor in parameters.items():
        if "adaptive_softmax" in name:
            raise UserError(f"{path} has an adaptive softmax ({name}), whose words cannot be more")
        if not name.endswith(_BY_SYMBOL):
            continue
        if len(tensor) != symbols:
            raise UserError(f"{name} of {path} has {len(tensor)} rows, its dictionary has {symbols} symbols")
        if tensor.data_ptr() not in grown:
            grown[tensor.data_ptr()] = _rows(tensor, sources)
        parameters[name] = grown[tensor.data_ptr()]


def _rows(tensor: Tensor, sources: Sequence[Sequence[int]]) -> Tensor:
    rows = tensor[[first for first, *_ in sources]]
    for number, source in enumerate(sources):
        if len(source) > 1:
            rows[number] = tensor[list(source)].float().mean(0).to(tensor.dtype)
    return rows
