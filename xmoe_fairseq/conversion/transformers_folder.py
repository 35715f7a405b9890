"""Reads an M2M-100 or NLLB model as `transformers` stores it: a folder with ``config.json``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints import reading
from ..common.schema import read_json
from ..errors import UserError
from . import names, safetensors
from .safetensors import File
from .source import Parameters, Source, check_positions, words
from .transformers_vocabulary import read_vocabulary

DENSE, MOE = "m2m_100", "nllb-moe"
_AGAIN = "get the folder again"
# How fairseq names activation functions.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_accurate", "tanh": "tanh"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read(folder: Path) -> Source:
    """Reads a model; the bytes of its tensors stay in the files until they are used.

    Raises:
        UserError: a file is missing or damaged, or the model computes what this package does not.
    """
    config = Config(folder / "config.json")
    notes: list[str] = []
    options = _options(config, notes)
    files = _files(folder)
    parameters = Parameters(files=files)
    for file in files:
        for name, tensor in file.tensors.items():
            parameters.add(names.of_transformers(name), tensor)
    if config.kind == MOE:
        parameters.check_experts(config.number("num_experts"))
    entries, rows = config.number("vocab_size"), len(parameters.plain.get(names.EMBEDDINGS, ()))
    if entries != rows:
        raise UserError(f"{config.path}: vocab_size is {entries}, but the embeddings have {rows} rows: {_AGAIN}")
    vocabulary = read_vocabulary(folder, config.kind, entries)
    return Source(f"transformers {config.kind}", words(options), parameters, vocabulary, tuple(notes))


class Config:
    """The file ``config.json``.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path, _AGAIN)
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        self.kind = str(self.values.get("model_type"))
        if self.kind not in (DENSE, MOE):
            raise UserError(
                f"{path}: model_type is {self.kind[:40]!r}: only {DENSE} (M2M-100, NLLB-200) and {MOE} are read"
            )

    def number(self, name: str) -> int:
        """Returns a whole number of 0 or more."""
        value = self.values.get(name)
        if type(value) is not int or not 0 <= value < 2**31:
            raise UserError(f"{self.path}: {name} is {str(value)[:40]}, it must be a whole number; {_AGAIN}")
        return value

    def rate(self, name: str, default: float = 0.0) -> float:
        """Returns a probability."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{self.path}: {name} is {str(value)[:40]}, it must be from 0 to 1; {_AGAIN}")
        return float(value)

    def fixed(self, name: str, default: Any, only: Any, reason: str) -> None:
        """Refuses a model that sets an option to a value that this package has no equal of."""
        value = self.values.get(name, default)
        if value != only:
            raise UserError(f"{self.path}: {name} is {str(value)[:40]}, only {only} is read: {reason}")


def _options(config: Config, notes: list[str]) -> dict[str, Any]:
    """Translates the configuration to options of ``moe_transformer``."""
    values = config.values
    for name, token in (("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2), ("decoder_start_token_id", 2)):
        config.fixed(name, token, token, "its special tokens have other numbers than fairseq's")
    config.fixed("tie_word_embeddings", True, True, "its output layer is another matrix than its embeddings")
    activation = str(values.get("activation_function", "relu"))
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{config.path}: activation_function is {activation[:40]!r}, choose from {', '.join(ACTIVATIONS)}"
        )
    dim, positions = config.number("d_model"), config.number("max_position_embeddings")
    check_positions(positions, "max_position_embeddings", config.path)
    options: dict[str, Any] = {"arch": "moe_transformer", "share_all_embeddings": True}
    for stack in ("encoder", "decoder"):
        options |= {
            f"{stack}_embed_dim": dim,
            f"{stack}_layers": config.number(f"{stack}_layers"),
            f"{stack}_ffn_embed_dim": config.number(f"{stack}_ffn_dim"),
            f"{stack}_attention_heads": config.number(f"{stack}_attention_heads"),
            f"{stack}_layerdrop": config.rate(f"{stack}_layerdrop"),
            f"{stack}_normalize_before": True,
        }
    options |= {
        "max_source_positions": positions,
        "max_target_positions": positions,
        "activation_fn": ACTIVATIONS[activation],
        "no_scale_embedding": not values.get("scale_embedding", True),
        **{name: config.rate(name) for name in ("dropout", "attention_dropout", "activation_dropout")},
    }
    return options | ({"moe_placement": "none"} if config.kind == DENSE else _expert_options(config, notes))


def _expert_options(config: Config, notes: list[str]) -> dict[str, Any]:
    config.fixed("router_bias", False, False, "its router has a bias")
    config.fixed("router_dtype", "float32", "float32", "its router computes in half precision")
    config.fixed("second_expert_policy", "all", "all", "it draws the second expert at random")
    fraction = config.values.get("moe_eval_capacity_token_fraction", 1.0)
    if fraction != 1:
        notes.append(
            f"moe_eval_capacity_token_fraction is {str(fraction)[:20]}: transformers drops assignments beyond it in "
            "translation, this package drops none"
        )
    steps = {stack: config.number(f"{stack}_sparse_step") for stack in ("encoder", "decoder")}
    # A step beyond the layers makes no layer sparse, as 0 does.
    sparse = {stack: step for stack, step in steps.items() if 0 < step <= config.number(f"{stack}_layers")}
    if len(set(sparse.values())) > 1:
        raise UserError(
            f"{config.path}: encoder_sparse_step {steps['encoder']} and decoder_sparse_step {steps['decoder']} "
            "differ: MoE layers of both stacks must be equally far apart"
        )
    if not sparse:
        return {"moe_placement": "none"}
    masked = config.rate("moe_token_dropout")
    return {
        "moe_placement": "both" if len(sparse) == 2 else next(iter(sparse)),
        "moe_interval": next(iter(sparse.values())),
        "moe_num_experts": config.number("num_experts"),
        "moe_split_ratio": 1,
        "moe_router": "gshard",
        "moe_second_expert": "gate",
        "moe_regularizer": "eom" if masked else "none",
        "moe_eom_rate": masked,
    }


def _files(folder: Path) -> list[File]:
    """Finds the tensors of a folder: in one file, or in several with an index."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            found = read_json(index, _AGAIN)
            places = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(places, dict) or not all(_is_plain(file) for file in places.values()):
                raise UserError(f"{index} has no weight_map of names and files: {_AGAIN}")
            files = {file: _read(folder / file) for file in sorted(set(places.values()))}
            if lacking := [one for one, file in places.items() if one not in files[file].tensors]:
                raise UserError(f"{folder / places[lacking[0]]} lacks the tensor {lacking[0][:80]!r}: {_AGAIN}")
            named = {file: {one for one, place in places.items() if place == file} for file in files}
            return [
                replace(found, tensors={one: tensor for one, tensor in found.tensors.items() if one in named[file]})
                for file, found in files.items()
            ]
        if (folder / name).is_file():
            return [_read(folder / name)]
    raise UserError(f"{folder} has no {' or '.join(_WEIGHTS)}: {_AGAIN}")


def _is_plain(file: Any) -> bool:
    """Whether an index names a file of its own folder."""
    return isinstance(file, str) and Path(file).name == file and file.endswith((".safetensors", ".bin"))


def _read(path: Path) -> File:
    return safetensors.read(path) if path.suffix == ".safetensors" else File(reading.read_parameters(str(path)))
