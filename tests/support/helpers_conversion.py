"""Small random models of `transformers`, and what they compute, for the tests of import and export."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbTokenizer,
)

TEXT = ("the cat sat on the mat", "a dog ran to the house", "we see many small houses", "bon dia a tothom", "una casa")
SENTENCES = {
    "eng_Latn": ["the cat sat on the mat", "we see", "a dog and a cat"],
    "cat_Latn": ["bon dia", "una casa a tothom"],
}
TARGETS = ("fra_Latn", "zho_Hans")
DIM, PIECES, LONGEST, UPDATES = 32, 60, 40, 30
SIZES = {
    **{"d_model": DIM, "encoder_layers": 4, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.3},
}


@dataclass(frozen=True)
class Theirs:
    """A model of `transformers` in a folder.

    Attributes:
        folder: as ``save_pretrained`` writes it.
        model: in evaluation.
        tokenizer: of NLLB-200, with its 202 languages.
    """

    folder: Path
    model: Any
    tokenizer: Any

    def batch(self, source: str) -> dict[str, Tensor]:
        """Encodes the sentences of a language, with padding."""
        self.tokenizer.src_lang = source
        return dict(self.tokenizer(SENTENCES[source], return_tensors="pt", padding=True))

    def prefixes(self, source: str, target: str) -> Tensor:
        """Random translations of different lengths: (B, 7)."""
        rows = len(SENTENCES[source])
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(4, PIECES, (rows, 7), generator=generator)
        tokens[:, 0], tokens[:, 1] = 2, self.token(target)
        for row in range(rows):
            tokens[row, 7 - row :] = 1
        return tokens

    def token(self, language: str) -> int:
        """Returns the number of a language's token."""
        return int(self.tokenizer.convert_tokens_to_ids(language))

    @torch.no_grad()
    def logits(self, source: str, target: str) -> tuple[Tensor, Tensor]:
        """Returns the encoder's output, (B, L, d), and the logits of `prefixes`, (B, 7, V)."""
        batch, tokens = self.batch(source), self.prefixes(source, target)
        out = self.model(**batch, decoder_input_ids=tokens, decoder_attention_mask=tokens.ne(1).long())
        return out.encoder_last_hidden_state, out.logits

    def translations(self, source: str, target: str, beam: int) -> list[list[int]]:
        """Searches without length penalty, for only fairseq counts the probability of the forced first token."""
        found = self.model.generate(
            **self.batch(source),
            **{"forced_bos_token_id": self.token(target), "forced_eos_token_id": 2, "max_new_tokens": LONGEST + 1},
            **{"num_beams": beam, "do_sample": False, "suppress_tokens": [1]},  # fairseq never takes padding
            **({"length_penalty": 0.0, "early_stopping": True} if beam > 1 else {}),
        )
        return [row[row.ne(1)][1:].tolist() for row in found]


def sentencepiece_model(path: Path) -> Path:
    """Learns a SentencePiece model as NLLB-200's, without byte pieces."""
    learnt = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=learnt,
        **{"vocab_size": PIECES, "model_type": "bpe", "character_coverage": 1.0, "minloglevel": 2},
    )
    path.write_bytes(learnt.getvalue())
    return path


def make(folder: Path, moe: bool) -> Theirs:
    """Makes a small model whose translations end by themselves, and differ in length.

    Args:
        folder: to write.
        moe: whether every second layer has 6 experts.
    """
    torch.manual_seed(3)
    folder.mkdir()
    tokenizer = NllbTokenizer(vocab_file=str(sentencepiece_model(folder / "learnt.model")))
    entries = len(tokenizer) + 3
    model: Any = (
        NllbMoeForConditionalGeneration(
            NllbMoeConfig(
                vocab_size=entries,
                **SIZES | {"decoder_attention_heads": 2},
                num_experts=6,
                encoder_sparse_step=2,
                decoder_sparse_step=2,
            )
        )
        if moe
        else M2M100ForConditionalGeneration(M2M100Config(vocab_size=entries, **SIZES))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # all biases are 0 and all norms 1 at the start
            if "bias" in name or "norm" in name:
                parameter += torch.randn_like(parameter) * 0.1
    made = Theirs(folder, model.eval(), tokenizer)
    _learn(made)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return made


def m2m(folder: Path) -> Any:
    """Makes a model of random numbers with a tokenizer of M2M-100, and returns the tokenizer."""
    folder.mkdir()
    model = sentencepiece_model(folder / "learnt.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(number) for number in reversed(range(3, PIECES))]
    numbers = {piece: number for number, piece in enumerate(("<s>", "<pad>", "</s>", "<unk>", *pieces))}
    (folder / "learnt.json").write_text(json.dumps(numbers))
    tokenizer = M2M100Tokenizer(vocab_file=str(folder / "learnt.json"), spm_file=str(model))
    entries = len(numbers) + 100 + 8
    M2M100ForConditionalGeneration(M2M100Config(vocab_size=entries, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _learn(made: Theirs) -> None:
    """Teaches a model the sentences backwards, so that its translations end, and differ in length."""
    pairs = [(made.batch(source), _labels(made, source, target)) for source in SENTENCES for target in TARGETS]
    optimizer = torch.optim.Adam(made.model.parameters(), lr=0.005)
    for _ in range(UPDATES):
        for batch, labels in pairs:
            made.model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _labels(made: Theirs, source: str, target: str) -> Tensor:
    """Returns the token of the target, each sentence backwards, and its end: (B, L), -100 for padding."""
    rows = [[made.token(target), *reversed([one for one in row if one > 3][1:]), 2] for row in _rows(made, source)]
    longest = max(map(len, rows))
    return torch.tensor([row + [-100] * (longest - len(row)) for row in rows])


def _rows(made: Theirs, source: str) -> list[list[int]]:
    rows: list[list[int]] = made.batch(source)["input_ids"].tolist()
    return rows
