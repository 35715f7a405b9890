"""Stage 2: learn one SentencePiece vocabulary for all languages and turn it into a fairseq dictionary."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from ..errors import UserError
from .io_utils import read_lines, write_lines
from .layout import Layout, lists

# Three special symbols and 256 bytes come first; below this hardly a letter gets its own piece.
LEAST_PIECES = 300
# More text than this makes learning slower, not the vocabulary better.
MOST_LINES = 2_000_000
# fairseq splits encoded text at any white space, so no piece may hold one: what is not a plain space is hidden here,
# never learnt, and later encoded as bytes. SentencePiece would skip lines that hold one of the last three.
UNLEARNABLE = re.compile("[^\\S ]|[\0\u2581\u2585]")
# <unk>, <s> and </s>, which a fairseq dictionary adds by itself.
SPECIAL_PIECES = 3


def write(
    raw: Path, lines: Mapping[str, int], layout: Layout, options: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Learns from the training text in ``raw`` and writes model, vocabulary, dictionary and language lists.

    Args:
        raw: the folder of stage 1.
        lines: its line counts.
        layout: its languages and texts.
        options: ``vocab_size``, ``sampling_temperature`` and ``seed``.
        folder: where to write.

    Returns:
        The number of pieces, and the lines of each language that were used.

    Raises:
        UserError: the text does not support that many pieces, or needs more.
    """
    texts = {code: {name: lines[name] for name in layout.training_texts(code)} for code in layout.languages}
    counts = {language: sum(of.values()) for language, of in texts.items()}
    used = sample_sizes(counts, MOST_LINES, options["sampling_temperature"])
    model = train(sample(raw, texts, used, options["seed"]), sum(used.values()), options["vocab_size"])
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    (folder / "spm.model").write_bytes(model)
    write_lines(folder / "spm.vocab", (f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}" for i in ids))
    # fairseq wants a count for each symbol and ignores it when the order is given.
    write_lines(folder / "dict.txt", (f"{processor.id_to_piece(i)} 100" for i in ids[SPECIAL_PIECES:]))
    for name, listed in lists(layout.directions).items():
        write_lines(folder / name, listed)
    return {"pieces": len(ids), "lines_used": used}


def sample_sizes(counts: Mapping[str, int], most: int, temperature: float) -> dict[str, int]:
    """Shares ``most`` lines among languages in proportion to ``count ** (1 / temperature)``, none above its count.

    What a small language lacks goes to the larger ones. All lines are taken if there are no more than ``most``.
    """
    if sum(counts.values()) <= most:
        return dict(counts)
    weights = {language: count ** (1 / temperature) for language, count in counts.items()}
    total, sizes = sum(weights.values()), {}
    for language in sorted(counts, key=counts.__getitem__):
        sizes[language] = min(counts[language], round(most * weights[language] / total))
        most -= sizes[language]
        total -= weights[language]
    return {language: sizes[language] for language in counts}


def sample(raw: Path, texts: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int], seed: int) -> Iterator[str]:
    """Yields the chosen number of training lines of each language in the order of the files, each line at most once.

    Every line of a language is equally likely to be chosen; no more than one line is held.

    Args:
        raw: the folder of the files.
        texts: for each language the lines of its texts, by their names without the language.
        sizes: the lines of each language to choose.
        seed: the same seed gives the same lines.
    """
    for side, wanted in sizes.items():
        rng = random.Random(f"{seed} {side}")
        left = sum(texts[side].values())
        for name in texts[side]:
            for line in read_lines(raw / f"{name}.{side}"):
                if rng.random() * left < wanted:
                    wanted -= 1
                    yield UNLEARNABLE.sub(" ", line)
                left -= 1


def train(text: Iterator[str], lines: int, vocab_size: int) -> bytes:
    """Learns byte-pair pieces that lose no character and returns the model file's content.

    Raises:
        UserError: the text does not support that many pieces, or needs more.
    """
    model = io.BytesIO()
    stopped: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_noting(tqdm(text, desc="spm: reading", total=lines, unit="line", disable=None), stopped),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            # What is given comes back: rare characters as bytes, nothing normalised, spaces kept.
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # Digit by digit, numbers never seen in training can still be copied.
            split_digits=True,
            # A longer line would be left out in silence.
            max_sentence_length=1 << 30,
            # One thread: the same text gives the same file.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if stopped:
            raise stopped[0] from None
        most = re.search(r"set it to a value <= (\d+)", str(error))
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if most:
            raise UserError(
                f"--vocab-size {vocab_size} is more than this text supports: give {most[1]} or less"
            ) from error
        if least:
            raise UserError(
                f"--vocab-size {vocab_size} is too small for the characters of this text: give {least[1]} or more"
            ) from error
        raise UserError(f"--vocab-size {vocab_size}: SentencePiece cannot learn from this text: {error}") from error
    return model.getvalue()


def _noting(text: Iterable[str], stopped: list[BaseException]) -> Iterator[str]:
    """Yields lines and keeps what stops their reading, such as Ctrl-C: SentencePiece turns all into its own error."""
    try:
        yield from text
    except BaseException as error:
        stopped.append(error)
        raise
