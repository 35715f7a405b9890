"""No character is lost between text, pieces, ids and text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from fairseq.data import Dictionary
from fairseq.data.encoders import build_bpe
from fairseq.tokenizer import tokenize_line
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xmoe_fairseq.data_prep import learn_spm
from xmoe_fairseq.data_prep.io_utils import write_pairs
from xmoe_fairseq.data_prep.layout import centred
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.subword import VOCABULARY_RECORD, Subword

# What SentencePiece, fairseq or Python's str methods treat as something else than text.
TRAPS = [
    *"\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000",
    *"\0\u2581\u2585\u2047\ufeff\u200b\ufffd\U000f0000\U0010ffff",
    *(
        "<unk>",
        "<<unk>>",
        "<s>",
        "</s>",
        "<pad>",
        "__ca__",
        "<0x41>",
        "madeupword0000",
        "#fairseq:overwrite",
        "______",
        "  ",
    ),
]
TEXT = st.lists(st.text(max_size=8) | st.sampled_from(TRAPS)).map("".join)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary learnt from text in which every trap is frequent."""
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("spm")
    words = ["the", "cat", "and", "the", "dog", "saw", "12", "birds", "on", "the", "house"]
    lines = [f"{words[i % 10]} {TRAPS[i % len(TRAPS)] * 3} {words[i % 7]}{trap}x " for i in range(60) for trap in TRAPS]
    pairs = ((line, line.upper() + " ñandú 猫") for line in lines)
    count = write_pairs(raw / "train.en-xx", ("en", "xx"), pairs)
    options = {"vocab_size": 635, "sampling_temperature": 1.0, "seed": 1}
    learn_spm.write(raw, {"train.en-xx": count}, centred("en", ["xx"]), options, folder)
    return folder


@pytest.fixture(scope="module")
def subword(spm: Path) -> Subword:
    return Subword(spm / "spm.model")


@pytest.fixture(scope="module")
def dictionary(spm: Path) -> Dictionary:
    return Dictionary.load(str(spm / "dict.txt"))


def bpe(model: Path | str, sampling: bool = False) -> Any:
    options = {"sentencepiece_enable_sampling": sampling, "sentencepiece_alpha": 0.5 if sampling else None}
    return build_bpe(argparse.Namespace(bpe="sentencepiece_bytes", sentencepiece_model=str(model), **options))


@given(line=TEXT)
@example(line="".join(TRAPS))
@example(line="\u2581\u2581 \u2581\U000f0000")
@example(line="  two  spaces  ")
@example(line="")
@settings(deadline=None, max_examples=300)
def test_any_text_comes_back(subword: Subword, dictionary: Dictionary, line: str) -> None:
    pieces = subword.encode_pieces(line)
    assert subword.decode_pieces(pieces) == line
    assert tokenize_line(" ".join(pieces)) == pieces
    stock = dictionary.encode_line(" ".join(pieces), add_if_not_exist=False, append_eos=False).tolist()
    assert subword.encode_ids(["before", line, "after"])[1] == stock
    assert dictionary.unk() not in stock


@given(line=TEXT.filter(lambda text: not set("\r\n") & set(text)))
@settings(deadline=None)
def test_fairseq_option_round_trip_with_dropout(spm: Path, line: str) -> None:
    coder = bpe(spm / "spm.model", sampling=True)
    assert coder.decode(coder.encode(line)) == line


def test_dictionary_is_the_vocabulary_in_order(subword: Subword, dictionary: Dictionary, spm: Path) -> None:
    pieces = [subword.processor.id_to_piece(i) for i in range(3, subword.processor.get_piece_size())]
    assert dictionary.symbols[dictionary.nspecial :] == pieces
    assert dictionary.indices[pieces[0]] == 3 + 1
    assert not any(character.isspace() for piece in pieces for character in piece)
    assert not set(pieces) & {"<pad>", "__ca__", "madeupword0000", "<s>", "</s>", "<unk>"}
    vocabulary = (spm / "spm.vocab").read_text(encoding="utf-8").split("\n")
    assert [line.split("\t")[0] for line in vocabulary[3:-1]] == pieces


def test_model_output_of_all_kinds_stays_one_line(spm: Path) -> None:
    coder = bpe(spm / "spm.model")
    assert coder.decode("__ca__ ▁the <pad> <<unk>> ▁cat </s>") == "the ⁇  cat"
    assert coder.decode("a <0x0A> b <0x0D> c") == "a b c"
    assert coder.decode("<0xE4> <0xBD> a") == "\ufffd\ufffda"
    assert coder.decode("<unk>").strip() == "⁇"
    assert coder.decode("__ca__") == coder.decode("") == ""
    assert coder.decode("__pt-BR__ [zh-Hans] ▁the") == "the"
    assert not coder.is_beginning_of_word("a") and coder.is_beginning_of_word("▁a")


def no_bytes_model(path: Path) -> Path:
    text = iter(["the cat and the dog"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(path.with_suffix("")), vocab_size=14, minloglevel=2
    )
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"not a model", "not a SentencePiece model"), (b"train", "without byte_fallback")],
)
def test_unusable_model_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "spm.model"
    if content == b"train":
        no_bytes_model(path)
    elif content is not None:
        path.write_bytes(content)
    for load in (Subword, bpe):
        with pytest.raises(UserError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value.code) and str(path) in str(caught.value.code)


def test_a_record_admits_a_model_without_bytes(tmp_path: Path) -> None:
    """As ``xmoe import`` writes it: what the model lacks is for the dictionary to be ``<unk>``."""
    path = no_bytes_model(tmp_path / "spm.model")
    record = path.with_name(VOCABULARY_RECORD)
    record.write_text('{"byte_fallback": false}')
    subword = Subword(path)
    assert not subword.byte_fallback
    assert subword.decode_pieces(subword.encode_pieces("the dog")) == "the dog"
    for line in ("the ▁ dog", "a\u00a0✓", "the\u2028dog", "\n"):
        pieces = subword.encode_pieces(line)
        assert all(piece.split() == [piece] for piece in pieces)
        assert subword.encode_ids([line]) == [[subword.ids[subword.processor.piece_to_id(one)] for one in pieces]]
    assert bpe(path).decode("▁ <unk> d").split() == ["⁇", "d"]
    record.write_text('{"byte_fallback": true}')
    with pytest.raises(UserError, match="without byte_fallback"):
        Subword(path)
    for damaged in ("{}", "[]", '{"byte_fallback": 0}', "{"):
        record.write_text(damaged)
        with pytest.raises(UserError, match="import the model again"):
            Subword(path)
