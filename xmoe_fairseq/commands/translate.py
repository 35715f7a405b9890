"""Translates a test set in all directions of a model, or in some: ``xmoe translate``."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from ..checkpoints.shards import fingerprint
from ..common import guard, locks
from ..common.command_line import file_path
from ..common.directions import Direction
from ..common.outputs import writing
from ..common.run_folder import find_checkpoint, generated_folder
from ..errors import UserError
from ..evaluation.direction_scorer import read_benchmark
from ..evaluation.model_directions import Chosen, choose_directions, subset_name
from ..evaluation.perplexity import refuse_language_model
from ..evaluation.test_sets import MADE, check_made, read_made
from ..mt_benchmarks import Benchmark
from ..results.direction_sets import ZERO_SHOT
from ..results.folder import write_json
from ..stock_commands.generate import generate_file

logger = logging.getLogger(__name__)

HELP = """usage: xmoe translate DATA RUN [CHECKPOINT] [--subset SET] [--overwrite] [SRC-TGT ...] [-- OPTION ...]

Translates a test set in all directions of a model, or in some. Run again, it resumes where it stopped.

  DATA         folder made by xmoe prepare
  RUN          folder of the run; RUN/generate/SRC-TGT is written for each direction
  CHECKPOINT   default: checkpoint_best.pt of RUN/checkpoints or of RUN, or else checkpoint_last.pt
  --subset     valid, or a further set such as test1, which may lack references: RUN/generate-SET/SRC-TGT is written
  --overwrite  translates again what is finished; each old folder stays until the new one is complete
  SRC-TGT      directions, also zero-shot ones; default: those that the model was trained on, in the order of
               DATA/bin/lang_pairs.txt
  OPTION       more for fairseq-generate, such as --max-tokens 12000 --fp16

Beam and length penalty are those of the benchmark that DATA was prepared for, language tokens those that the model
was trained with. A folder under its final name is complete and is skipped; if it was translated with another
checkpoint or other options, that is an error.

Example: xmoe translate data/local runs/local en-ca ca-en -- --max-tokens 12000"""

# Seconds in which an interrupted program may end.
_PATIENCE = 2
# Options of fairseq-generate that the words before ``--`` decide.
_OURS = {
    "--gen-subset": "--subset before the --",
    "--results-path": "RUN",
    "--path": "CHECKPOINT",
    "--source-lang": "SRC-TGT",
    "--target-lang": "SRC-TGT",
}


@dataclass(frozen=True)
class Translation:
    """A test set of many directions, to be translated.

    Attributes:
        data: folder made by data_prep/prepare.sh.
        out: a folder is written for each direction.
        checkpoint: of the model.
        benchmark: that the data was prepared for.
        options: further words of ``fairseq-generate``.
        subset: ``test``, ``valid``, or a numbered one such as ``test1``.
        overwrite: whether finished directions are translated again.
    """

    data: Path
    out: Path
    checkpoint: Path
    benchmark: Benchmark
    options: Sequence[str]
    subset: str = "test"
    overwrite: bool = False

    def words(self, pair: Direction, results: Path) -> list[str]:
        """Returns the command for one direction."""
        source, target = pair.split("-")
        return [
            *("fairseq-generate", str(self.data / "bin"), "--gen-subset", self.subset),
            *("--user-dir", str(Path(__file__).parents[1]), "--task", f"multilingual_{self.benchmark.name}"),
            *("--source-lang", source, "--target-lang", target, "--path", str(self.checkpoint)),
            *("--bpe", "sentencepiece_bytes", "--sentencepiece-model", str(self.data / "bin" / "spm.model")),
            *("--beam", str(self.benchmark.beam), "--lenpen", str(self.benchmark.lenpen), "--max-tokens", "6000"),
            *("--num-workers", "0", "--results-path", str(results), *self.options),
        ]


def translate(translation: Translation, directions: Chosen) -> None:
    """Translates the directions that are not finished: a folder under its final name is complete.

    Raises:
        UserError: another program translates there, fairseq-generate failed, or a finished direction is of another
            checkpoint or of other options.
    """
    with locks.held(translation.out) as lock:
        finished = [] if translation.overwrite else [pair for pair in directions.pairs if _finished(translation, pair)]
        for pair in directions.pairs:
            mark = f" ({ZERO_SHOT}: the model was not trained on it)" if pair in directions.untrained else ""
            if pair in finished:
                print(f"== {pair}{mark}: translated before", flush=True)
            else:
                print(f"== {pair}{mark}", flush=True)
                _translate(translation, pair, lock)


def _finished(translation: Translation, pair: Direction) -> bool:
    """Returns whether a direction is translated, by the same checkpoint with the same options."""
    folder = translation.out / pair
    if not folder.exists():
        return False
    if not (folder / generate_file(translation.subset)).is_file():
        raise UserError(f"{folder} is there, but holds no translations: remove it, or give --overwrite")
    check_made(folder, translation.checkpoint, translation.options)
    if read_made(folder) is None:
        logger.warning(f"{folder} does not say which checkpoint it was translated with: whether it was this is unknown")
    return True


def _translate(translation: Translation, pair: Direction, lock: int) -> None:
    folder, part = translation.out / pair, translation.out / f"{pair}.part"
    old = translation.out / f"{pair}.old"
    with writing(translation.out):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    code = _run(translation.words(pair, part), lock)
    if code:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{pair} is not translated: fairseq-generate ended with code {code}, see above")
    made = {"file": str(translation.checkpoint), "checkpoint": fingerprint(str(translation.checkpoint))}
    write_json(part / MADE, {**made, "options": list(translation.options)})
    with writing(translation.out):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _run(words: list[str], lock: int) -> int | None:
    """Runs a program in a process that has imported what takes seconds to import, and returns its exit code."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fairseq_cli.generate", "xmoe_fairseq"])
    process = processes.Process(target=_generate, args=(words, reduction.DupFd(lock)))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:  # which the program hears as well
        process.join(_PATIENCE)
        process.kill()
        raise
    return process.exitcode


def _generate(words: list[str], lock: Any) -> None:
    """Is ``fairseq-generate``.

    Args:
        words: of the command.
        lock: a descriptor; the process holds it as well: if ``xmoe translate`` is killed, this may go on.
    """
    lock.detach()
    sys.argv = words
    logging.root.handlers.clear()  # fairseq-generate sets up its own
    from fairseq_cli import generate

    try:
        with guard.one_line():
            generate.cli_main()
    except KeyboardInterrupt as interrupt:
        raise guard.ending(interrupt) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the words of ``xmoe translate`` and does what they say.

    Raises:
        UserError: a word or a file is refused, or something could not be translated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words[: words.index("--")] if "--" in words else words):
        print(HELP)
        return
    end = words.index("--") if "--" in words else len(words)
    options, words = words[end + 1 :], words[:end]
    overwrite = _take(words, "--overwrite", 0) is not None
    subset = subset_name((_take(words, "--subset", 1) or ["test"])[0])
    if len(words) < 2:
        raise UserError("give DATA and RUN, the folders of the data and of the run; xmoe translate --help says more")
    for word in options:
        if (name := word.partition("=")[0]) in _OURS:
            raise UserError(f"{name} after the -- is refused: give {_OURS[name]}")
    data, run, *wanted = words
    named = file_path(wanted.pop(0)) if wanted and wanted[0].endswith(".pt") else None
    benchmark = read_benchmark(Path(data))
    checkpoint = named or find_checkpoint(Path(run))
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint {checkpoint}: train first, or give its path")
    refuse_language_model(
        checkpoint,
        "xmoe translate",
        "which translates nothing: fairseq-interactive --task language_modeling continues text",
    )
    directions = choose_directions(Path(data), checkpoint, subset, wanted)
    if os.pathsep in str(checkpoint):
        raise UserError(
            f"the path of {checkpoint} has a {os.pathsep!r}, where fairseq takes it for several checkpoints: give the "
            "folder or the file another name"
        )
    out = generated_folder(Path(run), subset)
    translation = Translation(Path(data), out, checkpoint, benchmark, options, subset, overwrite)
    translate(translation, directions)


def _take(words: list[str], option: str, values: int) -> list[str] | None:
    """Takes an option and its values out of the words; None if it is not among them."""
    if option not in words:
        return None
    place = words.index(option)
    taken = words[place : place + 1 + values]
    if len(taken) <= values:
        raise UserError(f"{option} needs a value, such as test1")
    del words[place : place + 1 + values]
    return taken[1:]


if __name__ == "__main__":
    main()
