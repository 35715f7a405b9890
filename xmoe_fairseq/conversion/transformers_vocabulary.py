"""Reads the vocabulary of a folder of `transformers`: pieces, tokens of languages, and what else has a number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.schema import read_json
from ..errors import UserError
from ..subword import Subword
from .source import SPECIAL, Vocabulary

_AGAIN = "get the folder again"
_SENTENCEPIECE = "sentencepiece.bpe.model"
# Of M2M-100, in the order of their tokens, which follow the pieces; not every folder lists them.
M2M_LANGUAGES = tuple(
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy "
    "id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru "
    "sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu".split()
)
# M2M-100 spells the token of a language like fairseq; NLLB-200 writes the code alone.
_LANGUAGE = re.compile(r"__([A-Za-z][\w-]*)__|([a-z]{2,3}_[A-Z][a-z]{3})")


def read_vocabulary(folder: Path, kind: str, entries: int) -> Vocabulary:
    """Reads a vocabulary; numbers without a symbol get one that no text has.

    Args:
        folder: of the model.
        kind: ``model_type`` of the model.
        entries: rows of its embeddings.

    Raises:
        UserError: a file is missing or damaged, or a number is beyond the rows.
    """
    model = folder / _SENTENCEPIECE
    if not model.is_file():
        raise UserError(f"{folder} has no {_SENTENCEPIECE}, the SentencePiece model of its tokenizer: {_AGAIN}")
    symbols = _pieces(folder, model)
    listed = dict(_added(folder, symbols))
    languages = {number: code for number, token in listed.items() if (code := language(token))}
    symbols |= {number: f"__{code}__" for number, code in languages.items()}
    if beyond := [number for number in symbols if number >= entries]:
        raise UserError(
            f"{folder}: the symbol {symbols[beyond[0]][:40]!r} has the number {beyond[0]}, but vocab_size is {entries}"
        )
    unnamed = iter(number for number in range(entries) if number not in symbols)
    symbols |= {number: f"madeupword{count:04d}" for count, number in enumerate(unnamed)}
    return Vocabulary(
        tuple(symbols[number] for number in range(entries)),
        tuple(languages[number] for number in sorted(languages)),
        model,
    )


def language(token: str) -> str | None:
    """Returns the code of the language that a token stands for; None if it stands for none."""
    found = _LANGUAGE.fullmatch(token)
    return (found[1] or found[2]) if found else None


def _pieces(folder: Path, model: Path) -> dict[int, str]:
    """Numbers the pieces of text: by ``vocab.json`` (M2M-100), or by the SentencePiece model (NLLB-200)."""
    path = folder / "vocab.json"
    if path.is_file():
        numbers = read_json(path, _AGAIN)
        if not isinstance(numbers, dict) or not all(type(one) is int and one >= 0 for one in numbers.values()):
            raise UserError(f"{path} must have a number for each piece: {_AGAIN}")
        if len(set(numbers.values())) < len(numbers):
            raise UserError(f"{path} gives two pieces one number: {_AGAIN}")
        return {number: piece for piece, number in numbers.items()}
    processor = Subword(model, byte_fallback=False).processor
    # The model has <unk>, <s> and </s> before its pieces, fairseq's dictionaries four special symbols.
    pieces = range(len(SPECIAL) - 1, processor.get_piece_size())
    return dict(enumerate(SPECIAL)) | {number + 1: processor.id_to_piece(number) for number in pieces}


def _added(folder: Path, pieces: dict[int, str]) -> Iterator[tuple[int, str]]:
    """Yields the tokens beside the pieces with their numbers.

    Args:
        folder: of the model.
        pieces: by number; after them begin the tokens that a file lists without numbers.
    """
    lists = (*_lists(folder, len(pieces)), list(pieces.items()), _m2m(folder, len(pieces)))
    found = next((listed for listed in lists if any(map(_is_language, listed))), None)
    if found is None:
        raise UserError(f"{folder}: no file of its tokenizer lists tokens of languages: {_AGAIN}")
    for number, token in found:
        if type(number) is not int or number < 0 or not isinstance(token, str):
            raise UserError(f"{folder}: the tokenizer's token {str(token)[:40]!r} has the number {str(number)[:20]}")
        yield number, token


def _lists(folder: Path, first: int) -> Iterator[list[tuple[Any, Any]]]:
    """Yields what each file of a tokenizer lists: numbers and tokens."""
    fast = _object(folder / "tokenizer.json").get("added_tokens")
    if isinstance(fast, list):
        yield [(one.get("id"), one.get("content")) for one in fast if isinstance(one, dict)]
    configured = _object(folder / "tokenizer_config.json")
    decoder = configured.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        yield [(_whole(number), _content(token)) for number, token in decoder.items()]
    yield [(number, token) for token, number in _object(folder / "added_tokens.json").items()]
    for holder in (_object(folder / "special_tokens_map.json"), configured):
        listed = holder.get("additional_special_tokens")
        if isinstance(listed, list):
            yield list(enumerate((_content(token) for token in listed), start=first))


def _m2m(folder: Path, first: int) -> list[tuple[Any, Any]]:
    """Returns the tokens that the tokenizer of M2M-100 has in its code; none for another tokenizer."""
    named = _object(folder / "tokenizer_config.json").get("tokenizer_class") == "M2M100Tokenizer"
    return list(enumerate((f"__{code}__" for code in M2M_LANGUAGES), start=first)) if named else []


def _is_language(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[1], str) and language(entry[1]) is not None


def _object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no file."""
    values = read_json(path, _AGAIN) if path.exists() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a JSON object: {_AGAIN}")
    return values


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 10 else None
