"""``--contrast-*`` of the tasks ``multilingual_*``: what is contrasted with what."""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
import copy
import dataclasses
import math
import os
import zlib
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq.data import data_utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor, nn

from ..errors import UserError
from ..moe import MoELayer, StratifiedMoE
from ..moe.routing.weak import DEFAULTS, WeakRouter, WeakRule
from .binary_text import check_text
from .contrastive_ensemble import Contrast, ContrastiveEnsemble, Difference, Ratio, SameInput
from .data_folder import count_symbols, find_text
from .data_manager import VALID
from .decoding import languages_of

PREFIX = "contrast_"
_AUTO = "auto"
_SOURCE = "source"


@dataclasses.dataclass
class ContrastConfig(FairseqDataclass):
    """Options of decoding by contrast."""

    contrast_beta: float = dataclasses.field(
        default=0.0,
        metadata={
            "help": "decoding by contrast: weight of the weak distribution; 0 decodes as usual, as --eval-bleu does"
        },
    )
    contrast_with: ChoiceEnum(("routing", _SOURCE, "language")) = dataclasses.field(  # type: ignore[valid-type]
        default="routing",
        metadata={
            "help": "what makes the weak distribution: routing, the same model with other experts (SCMoE); source, "
            "another sentence; language, another target language (Sennrich et al. 2024)"
        },
    )
    contrast_alpha: float = dataclasses.field(
        default=0.1,
        metadata={"help": "tokens less probable than this fraction of the best one are left out; above 0, at most 1"},
    )
    contrast_score: ChoiceEnum((_AUTO, "ratio", "difference")) = dataclasses.field(  # type: ignore[valid-type]
        default=_AUTO,
        metadata={
            "help": "ratio: (1 + beta) log p - beta log p_weak over the tokens that --contrast-alpha leaves; "
            "difference: log(p - beta p_weak); auto: as published, ratio for routing and difference for the others"
        },
    )
    contrast_routing: str = dataclasses.field(
        default=_AUTO,
        metadata={
            "help": "with routing: rank-K, the expert of rank K alone; rest, the experts that the router leaves; "
            "threshold-T, the experts up to a probability mass T; auto: threshold-0 for the threshold router, rank-2 "
            "for topk, gshard and switch"
        },
    )
    contrast_stack: ChoiceEnum(("decoder", "both")) = dataclasses.field(  # type: ignore[valid-type]
        default="decoder", metadata={"help": "with routing: the stack whose routers are weak"}
    )
    contrast_language: str = dataclasses.field(
        default=_SOURCE,
        metadata={"help": "with language: the code of the other target language; source: the source's language"},
    )
    contrast_seed: int = dataclasses.field(
        default=1,
        metadata={"help": "with source: another seed draws other sentences, from the development set of the data"},
    )


OPTIONS = tuple(field.name for field in dataclasses.fields(ContrastConfig) if field.name.startswith(PREFIX))
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ContrastConfig)}
# Which options go with which contrast alone.
_ONLY = {"routing": ("routing", "stack"), _SOURCE: ("seed",), "language": ("language",)}


def contrast_settings(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fills in the options that are not given; None is decoding as usual."""
    return {name: (given or {}).get(name, _DEFAULTS[name]) for name in OPTIONS}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_contrast(args: Namespace) -> None:
    """Refuses options of decoding by contrast that are out of range or do not go together.

    Args:
        args: of the task.

    Raises:
        UserError: names the option, its value and what works.
    """
    if not 0 <= args.contrast_beta < math.inf:
        raise UserError(f"--contrast-beta {args.contrast_beta} is out of range: it must be at least 0")
    if not 0 < args.contrast_alpha <= 1:
        raise UserError(f"--contrast-alpha {args.contrast_alpha} is out of range: it must be above 0 and at most 1")
    if not args.contrast_beta:
        return
    kind = str(args.contrast_with)
    for other, names in _ONLY.items():
        for name in (PREFIX + one for one in names if other != kind):
            if (value := getattr(args, name)) != _DEFAULTS[name]:
                raise UserError(f"{_flag(name)} {value} goes with --contrast-with {other}, which is {kind}: drop one")
    if args.contrast_routing != _AUTO:
        try:
            WeakRule.read(args.contrast_routing)
        except ValueError as error:
            raise UserError(f"--contrast-routing: {error}") from error
    if _is_difference(args) and args.contrast_alpha != _DEFAULTS["contrast_alpha"]:
        raise UserError(
            f"--contrast-alpha {args.contrast_alpha} goes with --contrast-score ratio: a difference leaves out what "
            "the weak distribution makes more probable; drop one"
        )
    if args.contrast_seed < 0:
        raise UserError(f"--contrast-seed {args.contrast_seed} is out of range: it must be at least 0")


def _is_difference(args: Namespace) -> bool:
    score = str(args.contrast_score)
    return score == "difference" or (score == _AUTO and str(args.contrast_with) != "routing")


def contrastive(task: Any, models: Any, search: Any, allowed: Any = None) -> ContrastiveEnsemble:
    """Puts a model beside its weak form, as a task's options say.

    Args:
        task: a multilingual one with a direction.
        models: those of ``--path``.
        search: fairseq's options of generation.
        allowed: fairseq's function that says which tokens a prefix allows, if any.

    Raises:
        UserError: the models, the search or the data do not go with the options.
    """
    args, kind = task.args, str(task.args.contrast_with)
    given = f"--contrast-beta {args.contrast_beta:g}"
    if len(models) > 1:
        raise UserError(f"{given} does not go with an ensemble of {len(models)} checkpoints: give one --path")
    for name, reason in (
        ("score_reference", "there is nothing to search"),
        ("print_alignment", "an alignment is of one model"),
        ("constraints", "a constraint may be a token that the contrast leaves out"),
        ("prefix_allowed_tokens_fn", "what is allowed may be what the contrast leaves out"),
    ):
        if getattr(search, name, None) or (allowed is not None and name == "prefix_allowed_tokens_fn"):
            raise UserError(f"{given} does not go with {_flag(name)}: {reason}; leave one of them out")
    (model,) = models
    contrast: Contrast = Ratio(args.contrast_beta, args.contrast_alpha)
    if _is_difference(args):
        contrast = Difference(args.contrast_beta)
    weak = _weakened(model, args) if kind == "routing" else model
    change = SameInput()
    if kind == _SOURCE:
        change = OtherSource(task, model.max_positions()[0])
    elif kind == "language":
        change = OtherLanguage(task)
    return ContrastiveEnsemble(model, weak, contrast, change, task.target_dictionary)


def _weakened(model: Any, args: Namespace) -> nn.Module:
    """Copies a model's modules, not its parameters, and weakens their routers.

    Raises:
        UserError: there are none, or they cannot be weakened.
    """
    if getattr(model, "parallel_groups", None) is not None:
        raise UserError("--contrast-with routing works where a process holds all experts: translate with one process")
    shared: list[Any] = [*model.parameters(), *model.buffers(), model.encoder.dictionary, model.decoder.dictionary]
    if str(args.contrast_stack) == "decoder":
        shared.append(model.encoder)
    weak: nn.Module = copy.deepcopy(model, {id(one): one for one in shared})
    try:
        found = [_weaken(module, args.contrast_routing) for module in _changed(weak, str(args.contrast_stack))]
    except ValueError as error:
        raise UserError(f"--contrast-routing {args.contrast_routing}: {error}") from error
    if not any(found):
        raise UserError(
            f"--contrast-with routing --contrast-stack {args.contrast_stack}: the model has no experts there; give "
            "another stack, or --contrast-with source or language"
        )
    return weak


def _changed(model: Any, stack: str) -> list[nn.Module]:
    stacks = [model.decoder] if stack == "decoder" else [model.encoder, model.decoder]
    return [module for one in stacks for module in one.modules()]


def _weaken(module: nn.Module, rule: str) -> bool:
    """Weakens the routers of a module; returns whether it has any."""
    if isinstance(module, MoELayer):
        module.router = _weak_router(module.router, rule)
        return True
    if isinstance(module, StratifiedMoE):
        module.routers = nn.ModuleList(_weak_router(router, rule) for router in module.routers)
        return True
    return False


def _weak_router(router: Any, rule: str) -> WeakRouter:
    chosen = DEFAULTS.get(type(router), "rest") if rule == _AUTO else rule
    return WeakRouter(router, WeakRule.read(chosen))


class OtherLanguage(SameInput):
    """The weak model is asked for another target language.

    Args:
        task: its direction, and the option that names the language.

    Raises:
        UserError: the language is unknown or the target's, or nothing tells the model its target.
    """

    def __init__(self, task: Any) -> None:
        args, manager = task.args, task.data_manager
        source, target, other = args.source_lang, args.target_lang, args.contrast_language
        other = source if other == _SOURCE else other
        if other not in task.langs:
            raise UserError(f"--contrast-language {other} is unknown: the data has {', '.join(task.langs[:12])}")
        if other == target:
            raise UserError(f"--contrast-language {other} is the language that is translated into: give another")
        of_encoder, of_decoder = args.langtoks["main"]

        def tokens(language: str) -> tuple[int, int]:
            return (
                manager.get_encoder_langtok(source, language, of_encoder) if of_encoder else -1,
                manager.get_decoder_langtok(language, of_decoder) if of_decoder else -1,
            )

        self.wanted, self.others = tokens(target), tokens(other)
        if self.wanted == self.others:
            raise UserError(
                "--contrast-with language needs a model that is told its target language: it was trained without "
                "--encoder-langtok tgt and --decoder-langtok"
            )

    def source(self, tokens: Tensor) -> Tensor:
        return tokens.masked_fill(tokens == self.wanted[0], self.others[0])

    def target(self, tokens: Tensor) -> Tensor:
        return tokens.masked_fill(tokens == self.wanted[1], self.others[1])


class OtherSource(SameInput):
    """The weak model reads another sentence of the source's language, out of the development set.

    Which one depends on the sentence itself and the seed, not on its place or its batch.

    Args:
        task: its direction, data folder and seed.
        longest: tokens that the model can read.

    Raises:
        UserError: the data has no development text of the language, or it is damaged.
    """

    def __init__(self, task: Any, longest: int) -> None:
        self.prefix = _development_text(task.folder, f"{task.args.source_lang}-{task.args.target_lang}")
        check_text(self.prefix, count_symbols(os.path.join(task.folder, "dict.txt")))
        self.text = data_utils.load_indexed_dataset(self.prefix, task.source_dictionary)
        self.longest, self.seed = longest, task.args.contrast_seed
        self.left_pad, self.pad = bool(task.args.left_pad_source), task.source_dictionary.pad()
        self.marks = set(languages_of(task))

    def source(self, tokens: Tensor) -> Tensor:
        rows = [self._other([int(token) for token in row if token != self.pad]) for row in tokens.cpu()]
        padded = data_utils.collate_tokens([tokens.new_tensor(row) for row in rows], self.pad, left_pad=self.left_pad)
        return padded

    def _other(self, row: list[int]) -> list[int]:
        """Returns another sentence between the tokens that mark the beginning and the end of this one."""
        start = 1 if row[0] in self.marks else 0
        own = row[start:-1]
        drawn = zlib.crc32(" ".join(map(str, [self.seed, *own])).encode())
        for step in range(len(self.text)):
            other = self.text[(drawn + step) % len(self.text)].tolist()[:-1]
            if other and other != own:
                return [*row[:start], *other[: self.longest - start - 1], row[-1]]
        raise UserError(f"--contrast-with source: {self.prefix} has no sentence but the one that is translated")


def _development_text(folder: str, pair: str) -> str:
    """Finds development text of a direction's source language, in the direction itself or in another.

    Raises:
        UserError: there is none.
    """
    source = pair.split("-")[0]
    own = find_text(folder, VALID, pair)
    names = [own] if own else []
    names += sorted(str(path)[: -len(f".{source}.idx")] for path in Path(folder).glob(f"{VALID}.*.{source}.idx"))
    for name in names:
        if os.path.isfile(f"{name}.{source}.idx"):
            return f"{name}.{source}"
    raise UserError(
        f"--contrast-with source needs development text in {source}, which {folder} does not have: give "
        "--contrast-with routing or language"
    )
