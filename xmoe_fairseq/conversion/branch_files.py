"""Reads an M2M-100 or NLLB model as fairseq's nllb branch stores it.

One file, or ``NAME-shared.pt`` with the experts of each process in ``NAME-rank-N.pt``. The files lack the dictionary of
pieces, the list of languages and the SentencePiece model: the user names them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq.utils import get_available_activation_fns
from torch import Tensor

from ..checkpoints import reading
from ..errors import UserError
from ..tasks.data_folder import count_symbols
from . import names
from .source import SPECIAL, Parameters, Source, Vocabulary, check_positions, words

_AGAIN = "get all files of the model again"
_SHARED = "-shared.pt"
# Options of the branch that this package has under the same name; those that a file lacks have fairseq's defaults.
_SAME = (
    *(f"{stack}_{size}" for stack in ("encoder", "decoder") for size in ("embed_dim", "ffn_embed_dim", "layers")),
    *(f"{stack}_{name}" for stack in ("encoder", "decoder") for name in ("attention_heads", "layerdrop")),
    *("encoder_normalize_before", "decoder_normalize_before", "max_source_positions", "max_target_positions"),
    *("activation_fn", "no_scale_embedding", "dropout", "attention_dropout", "activation_dropout"),
)


def read(path: Path, dictionary: Path, languages: Path, sentencepiece: Path | None) -> Source:
    """Reads a model; the bytes of its tensors stay in the files until they are used.

    Args:
        path: the file, or ``NAME-shared.pt``.
        dictionary: its ``dict.txt``.
        languages: a text with its language codes, one per line or separated by commas, in the order of their tokens.
        sentencepiece: the model that splits its text.

    Raises:
        UserError: a file is missing or damaged, or the model computes what this package does not.
    """
    state = reading.read(str(path))
    model = _model_options(state, path)
    parameters = Parameters()
    for name, tensor in state["model"].items():
        parameters.add(names.of_branch(name), tensor)
    experts = 0
    if path.name.endswith(_SHARED):
        experts = _add_ranks(path, parameters)
    elif parameters.experts:
        experts = max(map(len, parameters.experts.values()))
    parameters.check_experts(experts)
    notes: list[str] = []
    options = _options(model, experts, path, notes)
    entries = len(parameters.plain[names.EMBEDDINGS]) if names.EMBEDDINGS in parameters.plain else 0
    vocabulary = _vocabulary(dictionary, languages, sentencepiece, entries)
    return Source("fairseq nllb branch", words(options), parameters, vocabulary, tuple(notes))


def _model_options(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Returns the options of a file's model."""
    cfg = state.get("cfg")
    options = cfg.get("model") if isinstance(cfg, dict) else state.get("args")
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    if not isinstance(options, Mapping):
        raise UserError(f"{path} does not contain the options of its model (cfg.model or args): {_AGAIN}")
    return options


def _add_ranks(path: Path, parameters: Parameters) -> int:
    """Reads the experts of all processes and returns their number."""
    stem = path.name.removesuffix(_SHARED)
    pattern = re.compile(re.escape(stem) + r"-rank-(\d{1,6})\.pt")
    ranks = {int(found[1]): one for one in path.parent.iterdir() if (found := pattern.fullmatch(one.name))}
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        lacking = min(set(range(len(ranks) + 1)) - ranks.keys())
        raise UserError(f"{path.parent / f'{stem}-rank-{lacking}.pt'} is missing: {_AGAIN}")
    held = 0
    for number in sorted(ranks):
        tensors: dict[str, Tensor] = reading.read(str(ranks[number]))["model"]
        own = {name: place for name in tensors if isinstance(place := names.of_branch(name, held), names.Expert)}
        if not own:
            raise UserError(f"{ranks[number]} holds no experts: {_AGAIN}")
        for name, place in own.items():
            parameters.add(place, tensors[name])
        held = 1 + max(place.number for place in own.values())
    return held


def _options(model: Mapping[str, Any], experts: int, path: Path, notes: list[str]) -> dict[str, Any]:
    """Translates the options of the branch to those of ``moe_transformer``."""
    for name in ("encoder_normalize_before", "decoder_normalize_before", "share_all_embeddings"):
        if not model.get(name):
            raise UserError(f"{path}: its option {name} is off: only models like M2M-100 and NLLB are read")
    options: dict[str, Any] = {"arch": "moe_transformer", "share_all_embeddings": True}
    options |= {name: _plain(model, name, path) for name in _SAME if model.get(name) is not None}
    for name in ("max_source_positions", "max_target_positions"):
        check_positions(options.get(name, 0), name, path)
    if not experts:
        return options | {"moe_placement": "none"}
    if model.get("moe_top1_expert"):
        router: dict[str, Any] = {"moe_router": "switch"}
    elif (policy := model.get("moe_second_expert_policy", "sampling")) == "random":
        raise UserError(f"{path}: its option moe_second_expert_policy is {policy}: only all and sampling are read")
    else:
        router = {"moe_router": "gshard", "moe_second_expert": "sampling" if policy == "sampling" else "gate"}
    # A frequency of 0, or none, is of a stack without MoE layers.
    freq = {stack: _first(model, (f"{stack}_moe_freq", "moe_freq"), path) for stack in ("encoder", "decoder")}
    sparse = {stack: one for stack, one in freq.items() if one}
    if len(set(sparse.values())) != 1:
        raise UserError(f"{path}: MoE layers every {freq['encoder']} and {freq['decoder']} layers cannot be built")
    if (fraction := model.get("moe_eval_capacity_token_fraction", 0.25)) != 1:
        notes.append(
            f"moe_eval_capacity_token_fraction is {str(fraction)[:20]}: fairseq's nllb branch drops assignments beyond "
            "it in translation, this package drops none"
        )
    masked = _first(model, ("moe_eom",), path)
    return options | {
        **router,
        "moe_placement": "both" if len(sparse) == 2 else next(iter(sparse)),
        "moe_interval": next(iter(sparse.values())),
        "moe_num_experts": experts,
        "moe_split_ratio": 1,
        "moe_regularizer": "eom" if masked else "none",
        "moe_eom_rate": masked,
    }


def _first(model: Mapping[str, Any], options: Sequence[str], path: Path) -> Any:
    """Returns the first of some options that is set; 0 if none is."""
    return next((_plain(model, name, path) for name in options if model.get(name)), 0)


def _plain(model: Mapping[str, Any], name: str, path: Path) -> Any:
    """Returns an option that is a number, a flag, or the name of an activation function."""
    value = model[name]
    known = value in get_available_activation_fns() if name == "activation_fn" else isinstance(value, int | float)
    if not known:
        raise UserError(f"{path}: its option {name} is {str(value)[:40]!r}, which is none of its values: {_AGAIN}")
    return value


def _vocabulary(dictionary: Path, languages: Path, sentencepiece: Path | None, entries: int) -> Vocabulary:
    """Numbers pieces, then languages, then symbols that no text has."""
    for path in (dictionary, languages, *([sentencepiece] if sentencepiece else [])):
        if not path.is_file():
            raise UserError(f"there is no file {path}: give the one of the model")
    count_symbols(str(dictionary))
    pieces = [line.rpartition(" ")[0] for line in dictionary.read_text(encoding="utf-8").splitlines() if line]
    try:
        codes = [code for code in re.split(r"[\s,]+", languages.read_text(encoding="utf-8")) if code]
    except UnicodeDecodeError as error:
        raise UserError(f"{languages} is not UTF-8: give the list of the model's languages") from error
    tokens = [f"__{code}__" for code in codes]
    symbols = [*SPECIAL, *pieces, *(token for token in tokens if token not in pieces)]
    if len(symbols) > entries:
        raise UserError(
            f"{dictionary} and {languages} make {len(symbols)} symbols, the model has {entries}: give its own files"
        )
    symbols += [f"madeupword{count:04d}" for count in range(entries - len(symbols))]
    return Vocabulary(tuple(symbols), tuple(codes), sentencepiece)
