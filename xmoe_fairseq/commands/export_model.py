"""``xmoe export``: a dense or GShard checkpoint becomes a folder that `transformers` loads."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary
from torch import Tensor

from ..checkpoints import options, reading, shards
from ..common import locks
from ..common.command_line import CommandParser, file_path
from ..common.identity import of_folder
from ..common.schema import json_text
from ..conversion import names, safetensors, tokenizer_files
from ..conversion.model_options import build_on_meta, changed_options, check_parameters, flat
from ..conversion.outputs import DTYPES, RECORD, check_free, progress, whole_folder
from ..conversion.source import SPECIAL
from ..conversion.transformers_folder import ACTIVATIONS, DENSE, MOE
from ..errors import UserError
from ..evaluation.perplexity import refuse_language_model
from ..tasks.data_folder import count_symbols

_EPILOG = """\
Written into DIR: config.json, model.safetensors, vocab.json, languages.json, export.json, and the files of a
tokenizer, if one of transformers has the numbers of the data folder. AutoModelForSeq2SeqLM.from_pretrained(DIR) loads
the model, AutoTokenizer the tokenizer. A source is `LANGUAGE pieces </s>`; a translation is forced to begin with the
target's token (forced_bos_token_id, by languages.json).

examples:
  xmoe export imported/nllb/checkpoint.pt --data imported/nllb --out exported/nllb
  xmoe export runs/dense/checkpoint_best.pt --data data/local --out exported/dense --dtype float16
"""
# An option, the only value that `transformers` has an equal of, and what the user reads.
_NEEDED: tuple[tuple[str, Any, str], ...] = (
    ("share_all_embeddings", True, "transformers ties all embeddings"),
    ("encoder_normalize_before", True, "transformers normalises before each part of a layer"),
    ("decoder_normalize_before", True, "transformers normalises before each part of a layer"),
    ("encoder_learned_pos", False, "transformers computes sinusoidal positions"),
    ("decoder_learned_pos", False, "transformers computes sinusoidal positions"),
    ("no_token_positional_embeddings", False, "transformers adds positions"),
    ("layernorm_embedding", False, "transformers does not normalise embeddings"),
    ("adaptive_softmax_cutoff", None, "transformers has no adaptive softmax"),
    ("no_cross_attention", False, "transformers attends to the source"),
    ("cross_self_attention", False, "transformers attends to source and target apart"),
    ("encoder_layers_to_keep", None, "all layers are exported"),
    ("decoder_layers_to_keep", None, "all layers are exported"),
)
# Only of models with experts.
_NEEDED_OF_EXPERTS: tuple[tuple[str, Any, str], ...] = (
    ("moe_router", "gshard", "transformers takes the two most probable experts and divides their weights by the sum"),
    ("moe_strata", "", "transformers has no strata"),
    ("moe_layer_experts", "", "transformers has equally many experts in all layers"),
    ("moe_stack", 1, "transformers has one MoE layer per place"),
    ("moe_heads", 1, "transformers routes whole tokens"),
    ("moe_split_ratio", 1, "transformers has experts as large as its feed-forward networks"),
)


def main(argv: Sequence[str]) -> None:
    """Exports a model.

    Args:
        argv: the words after ``xmoe export``.

    Raises:
        UserError: an argument or a file is refused, or `transformers` has no equal of the model.
    """
    args = _parser().parse_args(argv)
    check_free(args.out)
    refuse_language_model(args.checkpoint, "xmoe export", "and only encoder-decoder models are exported")
    with locks.held(args.out, file=True):
        record = _export(args)
    if args.json:
        print(json_text(record, RECORD), end="")
    else:
        lacking = "note: no tokenizer of transformers has these numbers; vocab.json has all symbols\n"
        print(f"{'' if record['src_lang'] else lacking}written: {args.out}")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe export",
        description="Makes a folder that transformers loads from a dense checkpoint or one with GShard MoE layers.",
        epilog=_EPILOG,
    )
    parser.add_argument("checkpoint", type=file_path, metavar="CHECKPOINT", help="the file; of shards, their NAME.pt")
    parser.add_argument(
        "--data", type=file_path, required=True, metavar="DIR", help="the data folder of the checkpoint"
    )
    parser.add_argument("--out", type=file_path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="precision of the folder (default: the checkpoint's)")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _export(args: argparse.Namespace) -> dict[str, Any]:
    path = str(args.checkpoint)
    state = reading.read(path)
    options.check(state, path)
    options.check_complete(state, path)
    shards.join(state, path)
    found = options.sections(state)
    tensors = state["model"]
    for stack in ("encoder", "decoder"):
        if f"{stack}.embed_tokens.weight" not in tensors:
            raise UserError(f"{path} lacks {stack}.embed_tokens.weight: get the file again")
    model, of_experts = flat(found["model"]), any(shards.is_expert(name) for name in tensors)
    _check_equal(model, of_experts, path)
    dense = {} if of_experts else {"moe_placement": "none"}
    asked = changed_options(model, {**dense, "moe_expert_parallel": 1}, "xmoe_transformer")
    config = _config(asked, tensors, of_experts, path)
    # Files of older versions of fairseq lack the output layer, which is the embeddings.
    check_parameters(build_on_meta(asked, tensors), {names.TIED[2]: tensors[names.EMBEDDINGS], **tensors}, path)
    data = args.data / "bin" if (args.data / "bin").is_dir() else args.data
    symbols, languages = _symbols(data, found["task"], config["vocab_size"])
    dtype = DTYPES[args.dtype] if args.dtype else None
    config["torch_dtype"] = str(dtype or tensors[names.EMBEDDINGS].dtype).removeprefix("torch.")
    record: dict[str, Any] = {
        "checkpoint": os.path.abspath(path),
        "kind": config["model_type"],
        "languages": list(languages),
    }
    with whole_folder(args.out) as made:
        _write_json(made / "config.json", config)
        _write_json(made / "vocab.json", {symbol: number for number, symbol in enumerate(symbols)})
        _write_json(made / "languages.json", languages)
        record["src_lang"] = tokenizer_files.write(symbols, languages, data, made)
        renamed = dict(_renamed(tensors, config["model_type"] == MOE))
        size = sum(one.numel() * (dtype or one.dtype).itemsize for one in renamed.values())
        with progress(size, args.quiet) as watch, open(made / "model.safetensors", "wb") as file:
            watch(lambda out: safetensors.write(renamed, out, dtype))(file)
        _write_json(made / "export.json", record)
    return record


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_equal(model: Mapping[str, Any], of_experts: bool, path: str) -> None:
    """Refuses a model that `transformers` has no equal of; options that it lacks are as they must be."""
    for name, only, reason in (*_NEEDED, *(_NEEDED_OF_EXPERTS if of_experts else ())):
        if (value := model.get(name, only)) != only:
            raise UserError(f"{path} cannot be exported: its {name} is {value}, only {only} can be: {reason}")
    if of_experts and model.get("moe_regularizer") == "cmr":
        raise UserError(f"{path} cannot be exported: its moe_regularizer is cmr, which transformers lacks")
    activation = model.get("activation_fn", "relu")
    if activation not in ACTIVATIONS.values():
        raise UserError(f"{path} cannot be exported: its activation_fn {activation} has no equal in transformers")


def _config(model: Mapping[str, Any], tensors: Mapping[str, Tensor], of_experts: bool, path: str) -> dict[str, Any]:
    """Translates all options of a model to ``config.json``."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    dim, entries = tensors[names.EMBEDDINGS].shape[1], len(tensors[names.EMBEDDINGS])
    stacks = {stack: _sizes(model, stack, dim, path) for stack in ("encoder", "decoder")}
    config: dict[str, Any] = {
        "architectures": ["NllbMoeForConditionalGeneration" if of_experts else "M2M100ForConditionalGeneration"],
        "model_type": MOE if of_experts else DENSE,
        "vocab_size": entries,
        "d_model": dim,
        "activation_function": activations[model["activation_fn"]],
        "max_position_embeddings": max(model["max_source_positions"], model["max_target_positions"]),
        "scale_embedding": not model["no_scale_embedding"],
        **{name: model[name] for name in ("dropout", "attention_dropout", "activation_dropout")},
        **{f"{stack}_{name}": value for stack, sizes in stacks.items() for name, value in sizes.items()},
        **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
    }
    return config | (_expert_config(model, tensors) if of_experts else {})


def _sizes(model: Mapping[str, Any], stack: str, dim: int, path: str) -> dict[str, Any]:
    def size(name: str) -> Any:
        value = model[f"{stack}_{name}"]
        return model[f"encoder_{name}"] if value is None else value

    if size("embed_dim") != dim:
        raise UserError(f"{path} cannot be exported: its {stack} is {size('embed_dim')} wide, its embeddings {dim}")
    return {
        "layers": size("layers"),
        "ffn_dim": size("ffn_embed_dim"),
        "attention_heads": size("attention_heads"),
        "layerdrop": model[f"{stack}_layerdrop"],
    }


def _expert_config(model: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    stacked = [name for name in tensors if shards.is_expert(name)]
    placed = {stack: any(name.startswith(stack) for name in stacked) for stack in ("encoder", "decoder")}
    return {
        "num_experts": model["moe_num_experts"],
        "router_bias": False,
        "router_dtype": "float32",
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": False,
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": model["moe_eom_rate"] if model["moe_regularizer"] == "eom" else 0.0,
        **{f"{stack}_sparse_step": model["moe_interval"] if there else 0 for stack, there in placed.items()},
    }


def _symbols(data: Path, task: Mapping[str, Any], entries: int) -> tuple[list[str], dict[str, int]]:
    """Returns the symbols of the model in order, and by language the number of its token."""
    count_symbols(str(data / "dict.txt"))
    symbols = list(Dictionary.load(str(data / "dict.txt")).symbols)
    style = "[{}]" if task.get("lang_tok_style") == "mbart" else "__{}__"
    tokens = {code: style.format(code) for code in of_folder(str(data)).languages}
    symbols += [token for token in tokens.values() if token not in symbols]
    if len(symbols) != entries:
        raise UserError(f"{data} makes {len(symbols)} symbols, the checkpoint has {entries}: give its own data folder")
    if symbols[: len(SPECIAL)] != list(SPECIAL):
        raise UserError(f"{data}/dict.txt overwrites a special symbol, which transformers cannot")
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    return symbols, {code: numbers[token] for code, token in tokens.items()}


def _renamed(tensors: Mapping[str, Tensor], of_experts: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name in names.TIED[1:] or names.is_computed(name):
            continue
        if shards.is_expert(name):
            for number, part in enumerate(tensor):
                yield names.expert_to_transformers(name, number), part.t() if name.endswith("fc2_weight") else part
        else:
            yield names.to_transformers(name, of_experts), tensor
