"""Files from which `transformers` builds a tokenizer with the numbers of a data folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..subword import MODEL, Subword
from .source import SPECIAL
from .transformers_vocabulary import M2M_LANGUAGES

_SENTENCEPIECE = "sentencepiece.bpe.model"
# Symbols that M2M-100's tokenizer has after the languages.
_M2M_SPARE = 8
# Codes that no text contains, which NLLB's tokenizer takes as they are.
_NLLB_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


def write(symbols: Sequence[str], languages: Mapping[str, int], data: Path, folder: Path) -> dict[str, str] | None:
    """Writes the files of a tokenizer, if one of `transformers` has these numbers.

    Args:
        symbols: of the model, in their order.
        languages: the number of each language's token.
        data: folder with the SentencePiece model.
        folder: to write.

    Returns:
        By language what ``src_lang`` must be; None if no tokenizer fits.
    """
    model = data / MODEL
    if not model.is_file():
        return None
    shutil.copyfile(model, folder / _SENTENCEPIECE)
    processor = Subword(model, byte_fallback=False).processor
    pieces = [processor.id_to_piece(one) for one in range(len(SPECIAL) - 1, processor.get_piece_size())]
    if list(symbols[len(SPECIAL) : len(SPECIAL) + len(pieces)]) == pieces:
        return _write_nllb(symbols, languages, len(SPECIAL) + len(pieces), folder)
    if _is_m2m(symbols, languages):
        return _write_m2m(symbols, languages, folder)
    return None


def _write_nllb(symbols: Sequence[str], languages: Mapping[str, int], first: int, folder: Path) -> dict[str, str]:
    """Writes a tokenizer of NLLB-200, with every symbol after the pieces as an added token."""
    names = {code: code if _NLLB_CODE.fullmatch(code) else symbols[number] for code, number in languages.items()}
    tokens = dict(enumerate(SPECIAL)) | {number: symbols[number] for number in range(first, len(symbols))}
    tokens |= {number: names[code] for code, number in languages.items()}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    spoken = list(names.values())
    config = {
        "tokenizer_class": "NllbTokenizer",
        "added_tokens_decoder": {str(number): {"content": token, **flags} for number, token in sorted(tokens.items())},
        "additional_special_tokens": spoken,
        "mask_token": None,
        "src_lang": spoken[0],
        "tgt_lang": spoken[-1],
    }
    _write_json(folder / "tokenizer_config.json", config)
    return names


def _is_m2m(symbols: Sequence[str], languages: Mapping[str, int]) -> bool:
    """Whether the languages are those of M2M-100 and follow the pieces, with room for what its tokenizer adds."""
    first = len(symbols) - len(M2M_LANGUAGES) - _M2M_SPARE
    return languages == {code: first + number for number, code in enumerate(M2M_LANGUAGES)}


def _write_m2m(symbols: Sequence[str], languages: Mapping[str, int], folder: Path) -> dict[str, str]:
    """Writes a tokenizer of M2M-100, which numbers the languages after the symbols of its file."""
    pieces = symbols[: min(languages.values())]
    _write_json(folder / "vocab.json", {symbol: number for number, symbol in enumerate(pieces)})
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "M2M100Tokenizer", "language_codes": "m2m100"})
    return {code: code for code in languages}


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
