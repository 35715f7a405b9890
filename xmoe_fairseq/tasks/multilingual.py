"""One task for each benchmark: all directions of its data in one model."""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
import dataclasses
import logging
import math
import os
from argparse import ArgumentParser, Namespace
from functools import cached_property
from typing import Any, ClassVar, Optional

import numpy as np
from fairseq import file_utils
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import II, OmegaConf

from ..common import identity
from ..common.directions import Direction, read_option
from ..common.identity import DataIdentity
from ..errors import UserError
from ..mt_benchmarks import BENCHMARKS, Benchmark
from .batching import PooledOrder
from .contrast import ContrastConfig, check_contrast, contrastive
from .data_folder import check_split, count_symbols, find_text, list_splits, read_groups, read_languages, read_trained
from .data_manager import VALID, DataManager, split_name
from .data_parts import check_alike, home, read_folders
from .eval_bleu import EvalBleuConfig, TranslatesDevelopmentSets, check_options
from .extra_data import check_extra, read_extra
from .lengths import Fitting, Whole, check_batch_sizes, nothing
from .stock_options import stock_dataclass, stock_namespace

logger = logging.getLogger(__name__)

# These follow from the data folder, which is made for one benchmark.
_FROM_DATA = ("data", "langs", "lang_dict", "source_dict", "target_dict", "fixed_dictionary")
StockOptions: Any = stock_dataclass(
    "StockMultilingualOptions",
    leave_out=_FROM_DATA,
    defaults={"encoder_langtok": "tgt", "sampling_method": "temperature"},
)


@dataclasses.dataclass
class MultilingualConfig(EvalBleuConfig, ContrastConfig, StockOptions):
    """Options of ``multilingual_*``: those of stock ``translation_multi_simple_epoch`` that the data leaves open."""

    data: str = dataclasses.field(
        default="???",
        metadata={
            "help": "folder bin/ made by data_prep/prepare.sh; or several, PART0:PART1, one for each epoch in turn"
        },
    )
    batch_pool_size: int = dataclasses.field(
        default=8192,
        metadata={
            "help": "training batches are cut from pools of this many random sentences, each sorted by length; "
            "1 or more, or 0 to sort the whole corpus by length as stock fairseq does"
        },
    )
    valid_lines: int = dataclasses.field(
        default=0,
        metadata={
            "help": "lines of each development set that validation reads while training, the first ones; 0 for all. "
            "--valid-subset valid,valid@high,valid@low also logs the loss of the languages of these groups"
        },
    )
    seed: int = II("common.seed")
    train_subset: str = II("dataset.train_subset")
    dataset_impl: Optional[str] = II("dataset.dataset_impl")


class MultilingualTask(TranslatesDevelopmentSets, TranslationMultiSimpleEpochTask):
    """All directions of a benchmark, or of the user's own data, in one model.

    Languages, their order, the dictionary and the directions come from the data folder, which must have
    been made for this benchmark; everything else is stock ``translation_multi_simple_epoch``.
    """

    benchmark: ClassVar[Benchmark]

    def __init__(self, args: Namespace, langs: list[str], dicts: Any, training: bool) -> None:
        super().__init__(args, langs, dicts, training)
        if not training:  # stock takes a name such as en-pt-BR apart at each hyphen
            self.lang_pairs = self.eval_lang_pairs = self.model_lang_pairs = [
                Direction(args.source_lang, args.target_lang)
            ]
            self.source_langs, self.target_langs = [args.source_lang], [args.target_lang]
        # Stock setup_data_manager names its class; what it made so far is only options.
        self.data_manager = DataManager(args, self.lang_pairs, langs, dicts, self.sampling_method)
        self.measures_loss = self.translates_all = False
        self.longest_source = math.inf
        # Generation translates every line.
        self.data_manager.lines_of = {VALID: args.valid_lines} if training else {}
        if training:  # what is damaged is said now, and not when the first checkpoint is written
            _ = self.identity

    @cached_property
    def identity(self) -> DataIdentity:
        """What the numbers of its tokens stand for."""
        return identity.of_folder(self.folder)

    @property
    def folder(self) -> str:
        """The data folder; of several the first, of parts the one that they are in."""
        return home(self.data_manager.folders[0])

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the task."""
        kept = {identity.KEY: self.identity.as_plain(), identity.PAIRS: [str(pair) for pair in self.lang_pairs]}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what a checkpoint kept of its task.

        Raises:
            UserError: it was trained with another dictionary.
        """
        super().load_state_dict(state_dict)
        self.identity = identity.check_trained_on(state_dict, self.identity)

    def build_bpe(self, args: Any) -> Any:
        """Builds what splits and joins text.

        Raises:
            UserError: ``--sentencepiece-model`` is of other data.
        """
        bpe = super().build_bpe(args)
        model = getattr(args, "sentencepiece_model", None)
        if model is not None:
            identity.check_model(file_utils.cached_path(model), self.identity)
        return bpe

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Adds the options of the task's dataclass; the stock task would add those it fixes too."""
        super(TranslationMultiSimpleEpochTask, cls).add_args(parser)

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "MultilingualTask":
        """Builds the task from its options.

        Raises:
            UserError: the data folder is missing, incomplete, or made for other languages.
        """
        args = stock_namespace(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
        folders = read_folders(args.data)
        languages, *_ = [read_languages(folder, cls.benchmark) for folder in folders]
        dictionary = os.path.join(folders[0], "dict.txt")
        for name, least in (
            ("batch_pool_size", 0),
            ("valid_lines", 0),
            ("max_source_positions", 1),
            ("max_target_positions", 1),
        ):
            if getattr(args, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(args, name)} is out of range: it must be at least {least}")
        if args.dataset_impl not in (None, "mmap"):
            raise UserError(
                f"--dataset-impl {args.dataset_impl} does not go with the tasks multilingual_*: the text that "
                "data_prep/prepare.sh and fairseq-preprocess write is memory-mapped (mmap); leave it out"
            )
        check_options(args, home(folders[0]))
        check_contrast(args)
        read_extra(args, languages)
        if not 0 < args.sampling_temperature < math.inf:
            raise UserError(f"--sampling-temperature {args.sampling_temperature} is out of range: it must be above 0")
        args.langs = languages
        args.source_dict = args.target_dict = dictionary
        listed = (read_trained(folder, cls.benchmark, languages) for folder in folders)
        known = list(dict.fromkeys(direction for trained in listed for direction in trained))
        if args.lang_pairs:
            known = read_option(args.lang_pairs, languages, f"the data in {args.data}", known)
        args.lang_pairs = known
        cls._check_languages(args)
        if len(folders) > 1:
            check_alike(folders)
            if args.virtual_epoch_size is not None:
                raise UserError(
                    "--virtual-epoch-size does not go with several data folders, of which each is an epoch: prepare "
                    "more of them with data_prep/prepare.sh --parts"
                )
        args.data = os.pathsep.join(folders)
        return super().setup_task(args, **kwargs)

    @classmethod
    def _check_languages(cls, args: Namespace) -> None:
        chosen = [args.source_lang, args.target_lang]
        if chosen == [None, None]:
            return
        if None in chosen:
            raise UserError("--source-lang and --target-lang go together: give both or none")
        if unknown := [code for code in chosen if code not in args.langs]:
            raise UserError(f"the data in {args.data} has no language {unknown[0]}: it has {', '.join(args.langs)}")
        if args.source_lang == args.target_lang:
            raise UserError(f"--source-lang and --target-lang are both {args.source_lang}: give two languages")

    @classmethod
    def load_dictionary(cls, filename: str) -> Any:
        """Loads the dictionary.

        Raises:
            UserError: it is damaged.
        """
        count_symbols(filename)
        return super().load_dictionary(filename)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Loads a split of the task's directions that have it; ``valid@high`` takes those of one group of languages.

        Raises:
            UserError: a file is missing, empty, damaged, or its two sides differ in length; no direction has the split;
                the group is unknown or none of its languages is trained.
        """
        if split in self.datasets and not self.has_sharded_data(split):
            return  # what is trained and validated, which stock fairseq cannot load twice
        name, group = split_name(split)
        wanted = self._directions_of(split, group) if group is not None else list(self.lang_pairs)
        if name != self.args.train_subset:
            wanted = self._with_text(split, name, wanted)
        self.data_manager.directions_of[split] = wanted
        if split not in self.datasets:
            self._check_files(name, wanted, combine)
        super().load_dataset(split, epoch, combine, **kwargs)

    def _check_files(self, name: str, wanted: list[Direction], combine: bool) -> None:
        """Checks the files of all folders before the first of them is read, not when its epoch comes."""
        manager = self.data_manager
        places = {pair: manager.folders_of(name, pair) or manager.folders[:1] for pair in wanted}
        for folder in manager.folders:
            if pairs := [pair for pair in wanted if folder in places[pair]]:
                check_split(folder, name, pairs, combine, references=self.training or self.measures_loss)
        if name == self.args.train_subset:
            check_extra(self.args, manager.extra, name, combine)

    def _with_text(self, split: str, name: str, pairs: list[Direction]) -> list[Direction]:
        folder = self.data_manager.folders[0]
        there = [pair for pair in pairs if find_text(folder, name, pair)]
        if not there:
            raise UserError(
                f"{folder} has no {name} text of {', '.join(pairs[:8])}: its splits are "
                f"{', '.join(list_splits(folder))}"
            )
        if lacking := [pair for pair in pairs if pair not in there]:
            logger.warning(f"{split} leaves out what has no text in it: {', '.join(lacking)}")
        return there

    def _directions_of(self, split: str, group: str) -> list[Direction]:
        groups = read_groups(self.folder, self.benchmark)
        if group not in groups:
            raise UserError(f"there is no group {group!r} for the subset {split}: choose from {', '.join(groups)}")
        found = [pair for pair in self.lang_pairs if not set(groups[group]).isdisjoint(pair.split("-"))]
        if not found:
            raise UserError(f"the subset {split} is empty: none of {', '.join(self.lang_pairs[:8])} is of that group")
        return found

    def _is_trained_on(self, dataset: Any) -> bool:
        return self.training and dataset is self.datasets.get(self.args.train_subset)

    def create_batch_sampler_func(
        self, max_positions: Any, ignore_invalid_inputs: bool, max_tokens: Any, *args: Any, seed: int = 1, **kwargs: Any
    ) -> Any:
        """Lets training batches be cut from pools of random sentences, see ``--batch-pool-size``, and decides what
        happens to sentences that are too long: a translation is empty, training and validation leave them out."""
        stock = super().create_batch_sampler_func(
            max_positions, ignore_invalid_inputs, max_tokens, *args, seed=seed, **kwargs
        )
        translates_all = self.translates_all

        def make_batches(dataset: Any, epoch: int) -> Any:
            name = next((split for split, known in self.datasets.items() if known is dataset), None)
            if self._is_trained_on(dataset):
                if self.args.batch_pool_size:
                    dataset = PooledOrder(dataset, self.args.batch_pool_size, seed, epoch)
                return stock(Fitting(dataset, str(name)), epoch)
            wanted = self.data_manager.directions_of.get(name, []) if name else []
            directions = [pair for pair in self.lang_pairs if pair in wanted]
            if not translates_all:
                return stock(Fitting(dataset, str(name), directions), epoch)
            longest = max_positions[0] if max_positions else math.inf
            # Who types a line waits for an answer to it.
            whole = Whole(dataset, name or "the input", directions, longest, None if name else max_tokens)
            self.longest_source = whole.longest
            return stock(whole, epoch)

        return make_batches

    def get_batch_iterator(
        self, dataset: Any, max_tokens: Optional[int] = None, max_sentences: Optional[int] = None, **kwargs: Any
    ) -> Any:
        """Makes batches; outside of training no sentence is left out but those that are too long for the model.

        Raises:
            UserError: a sentence is longer than a batch may be, or no sentence is left.
        """
        check_batch_sizes(max_tokens, max_sentences, kwargs.get("required_batch_size_multiple", 1))
        if not self._is_trained_on(dataset):
            # Who asks for it may leave sentences out of a translation, too.
            self.translates_all = not (self.training or self.measures_loss or kwargs.get("ignore_invalid_inputs"))
            kwargs["ignore_invalid_inputs"] = True
        return super().get_batch_iterator(dataset, max_tokens, max_sentences, **kwargs)

    def build_criterion(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the criterion, which measures nothing of sentences that are too long."""
        self.measures_loss = True
        return super().build_criterion(*args, **kwargs)

    def build_dataset_for_inference(self, src_tokens: Any, src_lengths: Any, constraints: Any = None) -> Any:
        """Makes a dataset of sentences that are typed in."""
        dataset = super().build_dataset_for_inference(src_tokens, src_lengths, constraints=constraints)
        if not self.args.lang_tok_replacing_bos_eos:
            # With the language token, which stock fairseq forgets to count.
            dataset.src_sizes = dataset.sizes = np.array(dataset.src.sizes)
        return dataset

    def build_generator(self, models: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        """Builds the search, by contrast where ``--contrast-beta`` is given.

        Raises:
            UserError: the contrast does not go with the models or the search.
        """
        if not self.args.contrast_beta or self.args.target_lang is None:  # without one, the search is refused
            return super().build_generator(models, args, *more, **kwargs)
        ensemble = contrastive(self, models, args, kwargs.get("prefix_allowed_tokens_fn"))
        generator = super().build_generator(ensemble, args, *more, **kwargs)
        ensemble.plain_prefixes(generator)
        return generator

    def inference_step(self, generator: Any, models: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """Translates a batch; one of sentences that are too long to nothing."""
        sources = sample["net_input"]["src_tokens"]
        if sources.size(1) > self.longest_source:
            return nothing(sources, self.target_dictionary.eos())
        return super().inference_step(generator, models, sample, *args, **kwargs)


def _register(benchmark: Benchmark) -> type[MultilingualTask]:
    stock = MultilingualConfig.__dataclass_fields__
    config = dataclasses.make_dataclass(
        f"multilingual_{benchmark.name}_config",
        [
            (name, kind, dataclasses.field(default=getattr(benchmark, name), metadata=stock[name].metadata))
            for name, kind in (("sampling_temperature", float), ("valid_lines", int))
        ],
        bases=(MultilingualConfig,),
    )
    name = f"multilingual_{benchmark.name}"
    task = type(name, (MultilingualTask,), {"benchmark": benchmark, "__doc__": MultilingualTask.__doc__})
    return register_task(name, dataclass=config)(task)


TASKS = {name: _register(benchmark) for name, benchmark in BENCHMARKS.items()}
