"""What the tries need: a toy corpus, models trained on it with and without the plugin, and each command's own words."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OURS, STOCK = "with the plugin", "stock"
_LANGUAGES = ("en", "xx", "yy")
_MODEL = (
    "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 "
    "--encoder-layers 2 --decoder-layers 2 --encoder-attention-heads 2 --decoder-attention-heads 2"
)
_TASK = {
    OURS: f"--user-dir {ROOT / 'xmoe_fairseq'} --task multilingual_local",
    # Our defaults, which differ, and what our task reads from the data folder.
    STOCK: "--task translation_multi_simple_epoch --encoder-langtok tgt --sampling-method temperature "
    "--langs en,xx,yy --fixed-dictionary {dictionary} --lang-pairs en-xx,xx-en,en-yy,yy-en",
}
_BILINGUAL = "--task translation --source-lang en --target-lang xx"
_TRAIN = {
    OURS: f"{{data}} {_TASK[OURS]} --arch xmoe_transformer_tiny --moe-num-experts 4 --moe-interval 1 "
    "--criterion threshold_routing_cross_entropy",
    STOCK: f"{{data}} {_TASK[STOCK]} --arch transformer --criterion label_smoothed_cross_entropy --dropout 0.1",
}
_UPDATES = (
    f"{_MODEL} --label-smoothing 0.1 --optimizer adam --lr 0.005 --max-tokens 600 --num-workers 0 --cpu --max-epoch 2 "
    "--log-format json --log-interval 1 --save-dir save"
)
_SEARCH = "--cpu --path {checkpoint} --beam 2 --num-workers 0"
_PLUGIN = {OURS: f"--user-dir {ROOT / 'xmoe_fairseq'} ", STOCK: ""}


class Scene:
    """The files of all tries in a folder, by the names that ``values.VALUES`` uses."""

    def __init__(self, folder: Path, side: str) -> None:
        self.folder, self.side = folder, side
        self.files = {name: folder / name for name in (
            *("text", "dictionary", "languages", "pairs", "weights", "hypotheses", "replacements", "embeddings"),
            *("monolingual", "quantization", "typed"),
        )} | {"data": folder / "bin", "spm": folder / "spm.model"}  # fmt: skip
        for name in ("checkpoint", "begun", "language_model"):
            self.files[name] = folder / name / "checkpoint_last.pt"

    def words(self, text: str) -> list[str]:
        """Splits a command line and fills in the names of files."""

        def fill(found: re.Match[str]) -> str:
            return str(self.files.get(found[1], found[0]))

        return [re.sub(r"\{(\w+)\}", fill, word) for word in shlex.split(text)]

    def base(self, command: str) -> str:
        """Returns the words with which a command works, to which a try adds an option."""
        side = self.side
        task, plugin = _TASK[side], _PLUGIN[side]
        return {
            "fairseq-train": f"{_TRAIN[side]} {_UPDATES}",
            "fairseq-generate": f"{{data}} {task} {_SEARCH} --source-lang en --target-lang xx --batch-size 10",
            "fairseq-interactive": f"{{data}} {task} {_SEARCH} --source-lang en --target-lang xx --input {{typed}}",
            "fairseq-validate": f"{{data}} {task} --cpu --path {{checkpoint}} --max-tokens 300 --num-workers 0 "
            "--log-format json",
            "fairseq-eval-lm": f"{{monolingual}} {plugin}--cpu --path {{language_model}} --max-tokens 300 "
            "--num-workers 0 --tokens-per-sample 64",
            "fairseq-preprocess": f"{plugin}--source-lang en --target-lang xx --trainpref {{text}} --destdir out",
            "fairseq-score": "--sys {hypotheses} --ref {text}.xx",
        }[command]

    def line(self, command: str, words: str) -> list[str]:
        """Returns the words of a try.

        Args:
            command: of fairseq.
            words: beside those of `base`; ``{bilingual}`` is stock fairseq's task for one direction, on its side.
        """
        base = self.base(command)
        if self.side == STOCK and (words.startswith("{bilingual}") or _BILINGUAL in words):
            base = base.replace(_TASK[STOCK], _BILINGUAL)
        return self.words(f"{base} {words.removeprefix('{bilingual}')}")

    def make_data(self) -> None:
        """Writes the corpus and all other files but the models; imports the plugin."""
        sys.path.insert(0, str(ROOT / "tests/support"))
        from helpers import write_toy_data

        data = write_toy_data(self.files["data"], _LANGUAGES[1:], lines=30, symbols=30)
        symbols = [line.split()[0] for line in (data / "dict.txt").read_text().splitlines()]
        for name in ("dictionary", *(f"bin/dict.{language}.txt" for language in _LANGUAGES)):
            (self.folder / name).write_text((data / "dict.txt").read_text())
        lines = [[symbols[(7 * n + word * (n % 5 + 1)) % 30] for word in range(2 + n % 7)] for n in range(30)]
        text = "".join(f"{' '.join(line)}\n" for line in lines)
        for suffix in ("en", "xx"):
            (self.folder / f"text.{suffix}").write_text(text)
        (self.folder / "text.align").write_text("".join(f"{' '.join('0-0' for _ in line[:1])}\n" for line in lines))
        self.files["typed"].write_text("".join(text.splitlines(keepends=True)[4:9]))
        self.files["hypotheses"].write_text("".join(f"{' '.join(reversed(line)).upper()}\n" for line in lines))
        self.files["languages"].write_text("".join(f"{language}\n" for language in _LANGUAGES))
        self.files["pairs"].write_text("en-xx,xx-en")
        weights = {"main:en-xx": 0.7, "main:xx-en": 0.1, "main:en-yy": 0.1, "main:yy-en": 0.1}
        self.files["weights"].write_text(json.dumps(weights))
        self.files["replacements"].write_text("".join(f"{symbol} {symbol.upper()}\n" for symbol in symbols))
        vectors = "".join(f"{symbol} {' '.join(['0.1'] * 16)}\n" for symbol in symbols)
        self.files["embeddings"].write_text(f"{len(symbols)} 16\n{vectors}")
        self.files["quantization"].write_text("")
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            input=str(self.folder / "text.en"), model_prefix=str(self.folder / "spm"), vocab_size=40, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip

    def preparations(self) -> dict[str, tuple[str, str]]:
        """Returns the commands that make the models: folder, command, words."""
        train = f"{self.base('fairseq-train')} --no-epoch-checkpoints"
        folder = str(self.folder)
        model = (
            "--task language_modeling --arch transformer_lm --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 "
            "--decoder-layers 1 --decoder-attention-heads 2 --optimizer adam --lr 0.005 --max-tokens 300 --cpu "
            "--tokens-per-sample 64 --num-workers 0 --max-epoch 2 --sample-break-mode eos --no-epoch-checkpoints"
        )
        return {
            "monolingual": (
                "fairseq-preprocess",
                "--only-source --srcdict {dictionary} --trainpref {text}.en --validpref {text}.en "
                "--testpref {text}.en --destdir {monolingual}",
            ),
            "checkpoint": ("fairseq-train", f"{train} --max-epoch 15 --save-dir {folder}/checkpoint"),
            "begun": ("fairseq-train", f"{train} --max-epoch 1 --save-dir {folder}/begun"),
            "language_model": (
                "fairseq-train",
                f"{{monolingual}} {_PLUGIN[self.side]}{model} --save-dir {folder}/language_model",
            ),
        }
