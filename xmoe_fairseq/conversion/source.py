"""What `xmoe import` reads of a model, in whatever form it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .names import Expert
from .safetensors import File

# fairseq's special symbols, which have the first numbers of every dictionary.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_MOST_POSITIONS = 2**20


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a model in the order of their numbers.

    Attributes:
        symbols: all of them, `SPECIAL` first; tokens of languages as fairseq spells them, ``__eng_Latn__``.
        languages: their codes, in the order of their tokens.
        sentencepiece: the model that splits text; None if the source has none.
    """

    symbols: tuple[str, ...]
    languages: tuple[str, ...]
    sentencepiece: Path | None

    def __post_init__(self) -> None:
        if self.symbols[: len(SPECIAL)] != SPECIAL:
            raise UserError(
                f"the first symbols of the vocabulary are {', '.join(self.symbols[:4])}, they must be "
                f"{', '.join(SPECIAL)}: only vocabularies of M2M-100 and NLLB are read"
            )
        if len(self.languages) < 2:
            raise UserError(f"the vocabulary has {len(self.languages)} tokens of languages, a model needs two or more")
        seen: set[str] = set()
        for number, symbol in enumerate(self.symbols):
            if symbol in seen or not symbol or any(one in symbol for one in " \r\n"):
                raise UserError(f"symbol {number} of the vocabulary, {symbol[:60]!r}, is empty, twice there or broken")
            seen.add(symbol)


@dataclass
class Parameters:
    """The tensors of a model by the names of this package; their bytes are read when they are used.

    Attributes:
        plain: all but those of experts; tied ones once.
        experts: by the name of a stacked tensor, the parts of the experts by number, as the other code stores them.
        files: that they are in, as far as `forget` concerns them.
    """

    plain: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    files: list[File] = field(default_factory=list)

    def add(self, place: str | Expert | None, tensor: Tensor) -> None:
        """Takes a tensor for a place that `names` returns; of tied ones, which are stored several times, the first.

        Raises:
            UserError: two tensors have one place and different numbers.
        """
        if isinstance(place, Expert):
            self.experts.setdefault(place.name, {})[place.number] = tensor.t() if place.transposed else tensor
        elif place is not None and not _same(self.plain.setdefault(place, tensor), tensor):
            raise UserError(f"{place} is stored twice, with different numbers: untied embeddings are not read")

    def forget(self) -> None:
        """Gives back the memory of bytes that were used."""
        for file in self.files:
            file.forget()

    def parts(self) -> Iterator[Tensor]:
        """Yields all tensors of experts."""
        return (part for parts in self.experts.values() for part in parts.values())

    def check_experts(self, wanted: int) -> None:
        """Makes sure that every layer has its experts.

        Raises:
            UserError: one is missing, or there are too many, or two differ in shape or type.
        """
        for name, parts in self.experts.items():
            lacking = next((number for number in range(wanted) if number not in parts), None)
            if len(parts) != wanted or lacking is not None:
                raise UserError(
                    f"{name} has {len(parts)} experts, the model has {wanted}"
                    + (f": expert {lacking} is missing; get all files of the model" if lacking is not None else "")
                )
            if len({(part.shape, part.dtype) for part in parts.values()}) > 1:
                raise UserError(f"the experts of {name} differ in shape or type: get the files again")


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


@dataclass(frozen=True)
class Source:
    """A model that is imported.

    Attributes:
        kind: what it is, in a few words.
        words: the options of ``fairseq-train`` that build it.
        parameters: its tensors.
        vocabulary: its symbols.
        notes: lines for the user on what differs.
    """

    kind: str
    words: tuple[str, ...]
    parameters: Parameters
    vocabulary: Vocabulary
    notes: tuple[str, ...] = ()


def check_positions(number: int, name: str, path: Path) -> None:
    """Refuses a number of positions for which whoever loads the model has no memory.

    Raises:
        UserError: names it.
    """
    if number > _MOST_POSITIONS:
        raise UserError(
            f"{path}: {name} is {number}, and a table of so many rows is made whenever the model is loaded: "
            f"use at most {_MOST_POSITIONS}"
        )


def words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Spells options as words of the command line; True is a flag, None and False leave an option out."""

    def spelled() -> Iterable[str]:
        for name, value in options.items():
            if value is None or value is False:
                continue
            flag = "--" + name.replace("_", "-")
            yield flag if value is True else f"{flag}={value}"

    return tuple(spelled())
