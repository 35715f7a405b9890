"""What stock fairseq lacks when it translates, above all with multilingual tasks, from which ours are derived."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

from fairseq import utils
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from ..errors import UserError
from ..tasks import decoding
from .registry import Group

GROUP = Group("Translation")

# What fairseq's parser gives for an option without its value.
_NO_FILE = "@@ "


@GROUP.patch(TranslationMultiSimpleEpochTask, "build_dataset_for_inference", "self src_tokens src_lengths constraints")
def build_dataset_for_inference(
    stock: Any, task: Any, src_tokens: Any, src_lengths: Any, constraints: Any = None
) -> Any:
    """Multilingual tasks carry the constraints of each sentence to the search, as stock `translation` does."""
    dataset = stock(task, src_tokens, src_lengths)
    decoding.pairs(dataset).constraints = constraints
    return dataset


@GROUP.patch(TranslationMultiSimpleEpochTask, "build_generator", "self models args seq_gen_cls extra_gen_cls_kwargs")
def build_generator(
    stock: Any,
    task: Any,
    models: Any,
    args: Any,
    seq_gen_cls: Any = None,
    extra_gen_cls_kwargs: dict[str, Any] | None = None,
    prefix_allowed_tokens_fn: Any = None,
) -> Any:
    """The search of multilingual tasks gets what stock's other tasks give it: the tokens that a prefix allows, and a
    language model that need not know the tokens of languages. Without `--source-lang` and `--target-lang`, stock mixes
    the sentences of all directions under the same numbers; this is refused."""
    if task.args.target_lang is None:
        raise UserError(
            f"give the direction to translate by --source-lang and --target-lang: {', '.join(task.lang_pairs[:8])}"
        )
    if prefix_allowed_tokens_fn is not None:
        args = Namespace(**dict(args), prefix_allowed_tokens_fn=prefix_allowed_tokens_fn)
    extra = dict(extra_gen_cls_kwargs or {})
    if extra.get("lm_model") is not None:
        extra["lm_model"] = decoding.knowing_languages(extra["lm_model"], task)
    return stock(task, models, args, seq_gen_cls, extra)


@GROUP.patch(
    TranslationMultiSimpleEpochTask, "inference_step", "self generator models sample prefix_tokens constraints"
)
def inference_step(
    stock: Any,
    task: Any,
    generator: Any,
    models: Any,
    sample: Any,
    prefix_tokens: Any = None,
    constraints: Any = None,
) -> Any:
    """If `--lang-tok-replacing-bos-eos` is given, stock multilingual tasks drop the constraints on their way to the
    search. A source without text has an empty translation; a model makes words of it."""
    search = generator
    if constraints is not None and task.args.lang_tok_replacing_bos_eos:
        generate = functools.partial(generator.generate, constraints=constraints)
        search = Namespace(generate=generate, search=generator.search)
    translations = stock(task, search, models, sample, prefix_tokens, constraints)
    return decoding.without_text(task, generator, sample, translations)


@GROUP.patch(
    FairseqTask, "build_generator", "self models args seq_gen_cls extra_gen_cls_kwargs prefix_allowed_tokens_fn"
)
def build_any_generator(stock: Any, task: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock's search with constraints ends in tracebacks, and `--no-repeat-ngram-size` compares with what is behind the
    last token, without a GPU."""
    return decoding.mended_search(stock(task, *args, **kwargs), task)


@GROUP.patch(utils, "replace_unk", "hypo_str src_str alignment align_dict unk")
def replace_unk(stock: Any, hypo_str: str, src_str: str, alignment: Any, align_dict: Any, unk: str) -> str:
    """Stock replaces unknown words by an alignment in a form that it no longer has: now they are pairs of places in the
    source and in the translation, whose first token may be a language's."""
    words = hypo_str.split()
    if unk not in words:
        return hypo_str
    if not len(alignment) or len(alignment[0]) != 2:
        raise UserError("--replace-unk needs an alignment: add --print-alignment hard")
    sources = {int(target): int(source) for source, target in alignment}
    before = max(max(sources) + 1 - len(words), 0)
    end = len(src_str.split())  # the place of the end of the sentence
    places = [sources.get(number + before, end) for number in range(len(words))]
    replaced: str = stock(hypo_str, src_str, places, align_dict, unk)
    return replaced


@GROUP.patch(utils, "load_align_dict", "replace_unk")
def load_align_dict(stock: Any, replace_unk: Any) -> Any:
    """`--replace-unk` alone copies the source's words; stock looks for a file of the name `@@`."""
    return stock(True if replace_unk == _NO_FILE else replace_unk)
