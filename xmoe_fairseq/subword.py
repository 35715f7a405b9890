"""Subwords that lose no character: SentencePiece with byte pieces, alone and as fairseq's ``--bpe``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece
from fairseq import file_utils
from fairseq.data import Dictionary
from fairseq.data.encoders import register_bpe
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

from .common.files import is_there
from .common.schema import read_json
from .errors import UserError

# Beside spm.model of an imported model: whether it has byte pieces.
VOCABULARY_RECORD = "vocabulary.json"
MODEL, DICTIONARY = "spm.model", "dict.txt"
# SentencePiece writes a space as this character, so it would read the character itself as a space.
META_SPACE = "\u2581"
# fairseq's <unk>, the last of its four special symbols.
UNKNOWN_ID = 3
# What fairseq may put among the pieces beside <unk>: it is no text.
FAIRSEQ_SYMBOL = re.compile(r"<s>|</s>|<pad>|__[A-Za-z][\w-]*__|madeupword\d+")
# With --lang-tok-style mbart, languages look like a piece of text, which it is only if the model has it.
_MBART_LANGUAGE = re.compile(r"\[[A-Za-z][\w-]*\]")
UNKNOWN = {"<unk>", "<<unk>>"}


def byte_pieces(character: str) -> list[str]:
    """Spells a character as byte pieces: ``<0xC2> <0xA0>`` for a no-break space."""
    return [f"<0x{byte:02X}>" for byte in character.encode()]


class Subword:
    """A SentencePiece model for which ``decode_pieces(encode_pieces(line)) == line`` holds for any line.

    A model that ``data_prep/prepare.sh`` did not learn may normalise text, as SentencePiece does by default. The model
    of another toolkit may lack byte pieces; then characters that it lacks become ``<unk>``.

    Args:
        model: the file ``spm.model`` that ``data_prep/prepare.sh`` wrote.
        dictionary: the ``dict.txt`` that goes with it, for the ids; by default one that has the pieces in the model's
            order.
        byte_fallback: whether a model without byte pieces is refused; by default unless `VOCABULARY_RECORD` beside
            it, which ``xmoe import`` writes, says that it has none.

    Attributes:
        ids: what each piece of the model has in the dictionary.
        byte_fallback: whether the model has byte pieces.

    Raises:
        UserError: the file is missing, no SentencePiece model, or one without byte pieces.
    """

    def __init__(
        self, model: str | Path, dictionary: str | Path | None = None, byte_fallback: bool | None = None
    ) -> None:
        if not Path(model).is_file():
            raise UserError(f"SentencePiece model {model}: no such file; give the spm.model of the prepared data")
        try:
            content = Path(model).read_bytes()
            # The content, since a path may be one that SentencePiece cannot be told; it takes an empty one for a model.
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content or b"none")
        except OSError as error:
            raise UserError(f"cannot read {model}: {error.strerror}") from error
        except (RuntimeError, ValueError) as error:  # of its own messages, some are not UTF-8
            raise UserError(
                f"{model} is not a SentencePiece model, or is damaged: get it again, or prepare the data again"
            ) from error
        self.byte_fallback: bool = self.processor.is_byte(self.processor.piece_to_id("<0x00>"))
        needed = records_bytes(Path(model)) if byte_fallback is None else byte_fallback
        if needed and not self.byte_fallback:
            raise UserError(
                f"{model} was trained without byte_fallback and would lose characters: "
                "use the spm.model of the prepared data, or --bpe sentencepiece"
            )
        self.ids = self._ids(dictionary)

    def _ids(self, dictionary: str | Path | None) -> list[int]:
        pieces = range(self.processor.get_piece_size())
        if dictionary is None:  # which has four special symbols before the pieces, where the model has three
            return [i + 1 for i in pieces]
        known = Dictionary.load(str(dictionary))
        return [known.index(self.processor.id_to_piece(i)) for i in pieces]

    def encode_pieces(self, line: str, enable_sampling: bool = False, alpha: float | None = None) -> list[str]:
        """Splits a line into pieces, none of which holds white space.

        Args:
            line: any text; what the vocabulary lacks becomes byte pieces, or stays for the dictionary to be
                ``<unk>``.
            enable_sampling: leave out merges at random (BPE dropout).
            alpha: how many merges to leave out, 0 to 1; SentencePiece's own value if not given.
        """
        stand_in = self._stand_in(line) if self.byte_fallback and META_SPACE in line else META_SPACE
        pieces = self.processor.encode(
            line.replace(META_SPACE, stand_in), out_type=str, enable_sampling=enable_sampling, alpha=alpha
        )
        if not self.byte_fallback:
            return [piece if piece.split() == [piece] else "<unk>" for piece in pieces]
        return pieces if stand_in == META_SPACE else _replace(pieces, byte_pieces(stand_in), byte_pieces(META_SPACE))

    def encode_ids(self, lines: Sequence[str]) -> list[list[int]]:
        """Encodes lines into the ids that their pieces have in the dictionary, without the end of sentence."""
        # One thread: for short lines, handing them to several costs more than it gains.
        encoded = self.processor.encode(list(lines), num_threads=1)
        for number, line in enumerate(lines):
            if META_SPACE in line:
                encoded[number] = self.processor.piece_to_id(self.encode_pieces(line))
        return [[self.ids[i] for i in ids] for ids in encoded]

    def decode_ids(self, lines: Iterable[Sequence[int]]) -> list[str]:
        """Joins the pieces of lines that `encode_ids` gives; an unknown token becomes "⁇".

        Raises:
            KeyError: an id is of no piece.
        """
        pieces = {one: i for i, one in enumerate(self.ids)} | {UNKNOWN_ID: self.processor.unk_id()}
        texts: list[str] = self.processor.decode([[pieces[i] for i in line] for line in lines])
        return texts

    def decode_pieces(self, pieces: Iterable[str]) -> str:
        """Joins pieces to text.

        Language tags and fairseq's other symbols are dropped, an unknown token becomes "⁇" between spaces,
        and bytes that are not UTF-8 become U+FFFD each.
        """
        text = ["<unk>" if piece in UNKNOWN else piece for piece in pieces if not self._is_symbol(piece)]
        return self.processor.decode(text) if text else ""

    def _is_symbol(self, piece: str) -> bool:
        if _MBART_LANGUAGE.fullmatch(piece):
            return bool(self.processor.piece_to_id(piece) == self.processor.unk_id())
        return FAIRSEQ_SYMBOL.fullmatch(piece) is not None

    def _stand_in(self, line: str) -> str:
        """Finds a private character that the line lacks and the vocabulary can only spell in bytes."""
        unknown = self.processor.unk_id()
        candidates = map(chr, chain(range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)))
        return next(c for c in candidates if c not in line and self.processor.piece_to_id(c) == unknown)


def vocabulary_files(folder: Path) -> tuple[str, ...]:
    """Names the files of a folder that make up its vocabulary, without the languages."""
    return (MODEL, DICTIONARY, *([VOCABULARY_RECORD] if is_there(folder / VOCABULARY_RECORD) else []))


def records_bytes(model: Path) -> bool:
    """Returns whether a SentencePiece model must have byte pieces: unless the record of an import says that it has
    none.

    Raises:
        UserError: the record is damaged.
    """
    record = model.with_name(VOCABULARY_RECORD)
    if not is_there(record):
        return True
    values = read_json(record, "import the model again")
    known = values.get("byte_fallback") if isinstance(values, dict) else None
    if not isinstance(known, bool):
        raise UserError(f"{record} must say whether byte_fallback is true or false: import the model again")
    return known


def _replace(pieces: list[str], old: list[str], new: list[str]) -> list[str]:
    """Replaces each run of ``old`` in ``pieces`` by ``new``."""
    # Joined pieces contain "<0xF3>" only as a byte piece: SentencePiece splits signs from digits in all other text.
    return " ".join(pieces).replace(" ".join(old), " ".join(new)).split(" ")


@register_bpe("sentencepiece_bytes", dataclass=SentencepieceConfig)
class SentencepieceBytes(SentencepieceBPE):
    """``--bpe sentencepiece_bytes``: fairseq's ``sentencepiece`` with the same options, but byte pieces are decoded.

    Raises:
        UserError: ``--sentencepiece-model`` is missing, not a model, or one without byte pieces.
    """

    def __init__(self, cfg: SentencepieceConfig) -> None:
        # Not the parent's: it fails with a traceback if the file is missing or damaged.
        try:
            model = file_utils.cached_path(cfg.sentencepiece_model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--sentencepiece-model {cfg.sentencepiece_model}: no such file; "
                "give the spm.model of the prepared data"
            ) from error
        self.subword = Subword(model)
        self.enable_sampling = cfg.sentencepiece_enable_sampling
        self.alpha = cfg.sentencepiece_alpha

    def encode(self, x: str) -> str:
        """Splits a line into pieces with a space between them."""
        return " ".join(self.subword.encode_pieces(x, self.enable_sampling, self.alpha))

    def decode(self, x: str) -> str:
        """Joins pieces to one line of text; a line end among the bytes becomes a space."""
        # Only U+0020 separates pieces; str.split() would also cut at white space inside a foreign piece.
        text = self.subword.decode_pieces(piece for piece in x.split(" ") if piece)
        return text.replace("\n", " ").replace("\r", " ")
