"""The Transformers by name: what they are, and building them without memory for their weights."""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import models, options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import nn

from ..errors import UserError
from ..moe import EXPERTS, ROUTERS, MultiHeadMoE, SizedExperts
from ..moe.experts.options import show_sizes
from .config import expert_class, expert_options, expert_sizes, hidden_size, layer_experts, router_class, router_options
from .config_checks import check_sizes
from .presets import LANGUAGE_MODELS, PRESETS

# fairseq's own symbols (start, padding, end, unknown) and one piece.
MIN_VOCAB, MAX_VOCAB = 5, 2**31 - 1


class Symbols(Dictionary):
    """A dictionary of so many entries, which have no names: only their number matters for a model's shapes."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries

    def __len__(self) -> int:
        return self.entries


def architectures() -> dict[str, str]:
    """Describes each of this plugin's architectures and of stock fairseq's Transformers in a line, by name."""
    stock = [
        name
        for family in (TransformerModel, TransformerLanguageModel)
        for name, model in models.ARCH_MODEL_REGISTRY.items()
        if model is family
    ]
    return {name: describe(_defaults(name)) for name in (*PRESETS, *LANGUAGE_MODELS, *stock)}


def is_language_model(arch: str) -> bool:
    """Returns whether an architecture of `architectures` has a decoder only."""
    return issubclass(models.ARCH_MODEL_REGISTRY[arch], models.FairseqLanguageModel)


def catalogue() -> dict[str, str]:
    """Describes each architecture, router and kind of experts in a line, with its paper; by name, or by the option."""
    lines = {name: f"{line}; {_papers(_defaults(name))}" for name, line in architectures().items()}
    for flag, kinds in (("--moe-router", ROUTERS), ("--moe-expert", EXPERTS)):
        for name, kind in kinds.items():
            sentence = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
            lines[f"{flag} {name}"] = f"{sentence.rstrip('.').replace('`', '')}; {kind.paper}"
    lines["--moe-expert-sizes hybrid"] = f"Experts of different hidden sizes; {SizedExperts.paper}"
    lines["--moe-heads 2"] = f"Parts of a token that are routed on their own; {MultiHeadMoE.paper}"
    return lines


def _papers(cfg: Any) -> str:
    """Names the papers of what a flat configuration gives."""
    if str(getattr(cfg, "moe_placement", "none")) == "none":
        return "Transformer: Vaswani et al. 2017, arXiv 1706.03762"
    papers = [router_class(cfg).paper]
    if cfg.moe_strata or cfg.moe_stack > 1:
        papers.insert(0, "SMoE: Xu et al. 2023, arXiv 2305.02176")
    if str(cfg.moe_regularizer) != "none":
        papers.append(f"{str(cfg.moe_regularizer).upper()}: NLLB Team 2022, arXiv 2207.04672")
    if str(cfg.moe_expert) != "ffn":
        papers.append(expert_class(cfg).paper)
    if cfg.moe_expert_sizes:
        papers.append(SizedExperts.paper)
    if cfg.moe_heads > 1:
        papers.append(MultiHeadMoE.paper)
    return "; ".join(papers)


def _defaults(arch: str) -> Any:
    """The options that an architecture has unless told otherwise."""
    if arch in models.MODEL_DATACLASS_REGISTRY:
        return models.MODEL_DATACLASS_REGISTRY[arch]()
    values = Namespace()
    models.ARCH_CONFIG_REGISTRY[arch](values)
    return values


def describe(cfg: Any) -> str:
    """Says in one line what model a flat configuration gives."""
    stack = _first_stack(cfg)
    dim, hidden, layers = (getattr(cfg, f"{stack}_{size}") for size in ("embed_dim", "ffn_embed_dim", "layers"))
    counted = f"{layers}+{cfg.decoder_layers or layers}" if stack == "encoder" else f"{layers}"
    size = f"d {dim}, feed-forward {hidden}, {counted} layers"
    if str(getattr(cfg, "moe_placement", "none")) == "none":  # stock models have no such option
        return f"dense; {size}"
    return f"{'; '.join(_experts(cfg))}; {size}"


def _first_stack(cfg: Any) -> str:
    """Returns the stack whose sizes a description names: a language model has a decoder only."""
    decoder_only = not hasattr(cfg, "encoder_layers") or (cfg.encoder_layers == 0 and cfg.no_cross_attention)
    return "decoder" if decoder_only else "encoder"


def _experts(cfg: Any) -> Iterator[str]:
    stack = _first_stack(cfg)
    router = router_class(cfg)
    taken = router.label(router_options(cfg))
    family = "SMoE" if cfg.moe_strata else router.family
    number = f"strata of {cfg.moe_strata}" if cfg.moe_strata else _number(cfg)
    experts, sizes = expert_class(cfg).label(expert_options(cfg)), expert_sizes(cfg, stack)
    size = f"sizes {show_sizes(sizes)}" if sizes else f"size {hidden_size(cfg, stack)}"
    yield f"{family}: {number} {experts} of hidden {size}, {taken}"
    if cfg.moe_heads > 1:
        yield f"{cfg.moe_heads} heads"
    if cfg.moe_stack > 1:
        yield f"{cfg.moe_stack} stacked"
    if str(cfg.moe_regularizer) != "none":
        yield str(cfg.moe_regularizer).upper()
    where = "both stacks" if str(cfg.moe_placement) == "both" else f"the {cfg.moe_placement}"
    yield f"1 layer in {cfg.moe_interval} of {where}"


def _number(cfg: Any) -> str:
    """Returns the number of experts of a layer, or the fewest and the most of all layers."""
    numbers = [cfg.moe_num_experts, *layer_experts(cfg).values()]
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def build_on_meta(arch: str, vocab: int, model_options: Sequence[str] = ()) -> nn.Module:
    """Builds what ``fairseq-train --arch ARCH`` would, on PyTorch's meta device: shapes without memory.

    Args:
        arch: a name of `architectures`.
        vocab: rows of the embeddings, special symbols included; source and target share the dictionary.
        model_options: words of the command line, such as ``--moe-num-experts 8``.

    Raises:
        UserError: the architecture is unknown, the vocabulary too small, or an option is refused.
    """
    check_arch(arch)
    if vocab < MIN_VOCAB:
        raise UserError(f"--vocab {vocab} is too small: a dictionary has 4 special symbols and at least one piece")
    if vocab > MAX_VOCAB:
        raise UserError(f"--vocab {vocab} is out of range: it must be at most {MAX_VOCAB}")
    cfg = parse_model(arch, model_options, f"xmoe info --arch {arch}")
    dictionary = Symbols(vocab)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    try:
        check_sizes(vars(cfg) if isinstance(cfg, Namespace) else cfg)
        with torch.device("meta"):
            model: Any = models.build_model(cfg, task)
        model.cfg = getattr(model, "cfg", cfg)  # stock's language models do not keep it
        return model
    except (ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"--arch {arch} cannot be built with these options: {reason}") from error


def check_arch(arch: str) -> None:
    """Refuses what is no Transformer of text.

    Raises:
        UserError: names architectures of similar names.
    """
    known = architectures()
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--arch {arch} is no known architecture: {hint}xmoe info --list names all")


def parse_model(arch: str, model_options: Sequence[str], command: str) -> Any:
    """Parses options as ``fairseq-train`` does, and gives the model's part.

    Args:
        arch: a name of `architectures`.
        model_options: words of the command line.
        command: what the words follow, for messages.
    """
    parser = options.get_training_parser()
    parser.prog = command
    task = "language_modeling" if is_language_model(arch) else "translation"
    words = ["no-data", "--task", task, "--arch", arch, *model_options]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words)).model
