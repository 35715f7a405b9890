"""Translates the test sets of all directions, or of some, with a trained model. Run again, it goes on where it stopped.

.. code-block:: bash

    python -m xmoe_fairseq.evaluation.translate DATA RUN [CHECKPOINT] [SRC-TGT ...] [-- OPTION ...]

``scripts/translate.sh`` says what the words mean.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import locks
from ..benchmarks import Benchmark
from ..checkpoints.shards import fingerprint
from ..errors import UserError
from .outputs import writing
from .result_folder import write_json
from .score_job import choose_pairs, known_pairs, read_benchmark
from .test_sets import MADE, Made, check_made


@dataclass(frozen=True)
class Translation:
    """A test set of many directions, to be translated.

    Attributes:
        data: folder made by data_prep/prepare.sh.
        out: a folder is written for each direction.
        checkpoint: of the model.
        benchmark: that the data was prepared for.
        options: further words of ``fairseq-generate``.
    """

    data: Path
    out: Path
    checkpoint: Path
    benchmark: Benchmark
    options: Sequence[str]

    def words(self, pair: str, results: Path) -> list[str]:
        """Gives the command for one direction."""
        source, target = pair.split("-")
        return [
            *(sys.executable, "-m", "fairseq_cli.generate", str(self.data / "bin")),
            *("--user-dir", str(Path(__file__).parents[1]), "--task", f"multilingual_{self.benchmark.name}"),
            *("--source-lang", source, "--target-lang", target, "--path", str(self.checkpoint)),
            *("--bpe", "sentencepiece_bytes", "--sentencepiece-model", str(self.data / "bin" / "spm.model")),
            *("--beam", str(self.benchmark.beam), "--lenpen", str(self.benchmark.lenpen), "--max-tokens", "6000"),
            *("--num-workers", "0", "--results-path", str(results), *self.options),
        ]


def translate(translation: Translation, pairs: Sequence[str]) -> None:
    """Translates the directions that are not finished: a folder under its final name is complete.

    Raises:
        UserError: another program translates there, fairseq-generate failed, or a finished direction is of another
            checkpoint.
    """
    made = Made(str(translation.checkpoint), fingerprint(str(translation.checkpoint)), translation.options)
    with locks.held(translation.out) as lock:
        for pair in pairs:
            folder, part = translation.out / pair, translation.out / f"{pair}.part"
            if folder.exists():
                check_made(folder, translation.checkpoint)
                print(f"== {pair}: translated before", flush=True)
                continue
            print(f"== {pair}", flush=True)
            with writing(translation.out):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
            # The program holds the lock as well: where this one is killed, it may go on.
            words = translation.words(pair, part)
            code = subprocess.run(words, stdin=subprocess.DEVNULL, pass_fds=(lock,), check=False).returncode
            if code:
                raise UserError(f"{pair} is not translated: fairseq-generate ended with code {code}, see above")
            write_json(part / MADE, {"file": made.file, "checkpoint": made.checkpoint, "options": list(made.options)})
            with writing(translation.out):
                part.rename(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the words of ``scripts/translate.sh`` and does what they say.

    Raises:
        UserError: a word or a file is refused, or something could not be translated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, words = words[end + 1 :], words[:end]
    if len(words) < 2:
        raise UserError("give DATA and RUN, the folders of the data and of the run; scripts/translate.sh says more")
    data, run, *wanted = words
    checkpoint = Path(run) / "checkpoints" / "checkpoint_best.pt"
    if wanted and wanted[0].endswith(".pt"):
        checkpoint, wanted = Path(wanted[0]), wanted[1:]
    benchmark = read_benchmark(Path(data))
    pairs = choose_pairs(known_pairs(Path(data)), wanted)
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint {checkpoint}: train first, or give its path")
    if os.pathsep in str(checkpoint):
        raise UserError(
            f"the path of {checkpoint} has a {os.pathsep!r}, where fairseq takes it for several checkpoints: give the "
            "folder or the file another name"
        )
    translate(Translation(Path(data), Path(run) / "generate", checkpoint, benchmark, options), pairs)


if __name__ == "__main__":
    main()
