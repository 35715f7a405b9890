"""``xmoe import`` beside `transformers`: the same logits, the speed of decoding, and memory.

python benchmarks/imported.py               some minutes on a CPU
python benchmarks/imported.py --quick       small models, about two minutes

A dense M2M-100 and an NLLB-200 MoE model of random numbers are made and imported. Both programs translate the same
sentences with the same weights in turns, and every translation has the same number of tokens. Memory is the highest
resident size of a process that imports, without that of one that imports a tiny model; files that are mapped count.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from programs import ROOT
from rows import Row, finish, parser, ratio, seconds
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbTokenizer,
)

from xmoe_fairseq import hub

# d, feed-forward, heads, layers of either stack, rows of the embeddings, experts in every second layer.
TINY, QUICK, FULL = (32, 48, 2, 2, 300, 4), (128, 512, 4, 2, 8000, 8), (512, 2048, 8, 6, 64000, 16)
SENTENCES, SOURCE, TARGET, PIECES = 16, "eng_Latn", "fra_Latn", 24
TEXT = ("the cat sat on the mat", "a dog ran to the house", "we see many small houses", "bon dia a tothom", "una casa")
MEMORY = """
import sys
from pathlib import Path
from xmoe_fairseq.cli import main
main(sys.argv[1:])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def make(folder: Path, sizes: tuple[int, ...], moe: bool) -> Any:
    """Writes a model of random numbers as `transformers` stores it, and returns it with its tokenizer."""
    dim, hidden, heads, layers, rows, experts = sizes
    folder.mkdir()
    learnt = io.BytesIO()
    options: dict[str, Any] = {"vocab_size": 60, "model_type": "bpe", "character_coverage": 1.0, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 20), model_writer=learnt, **options)
    (folder / "learnt.model").write_bytes(learnt.getvalue())
    tokenizer = NllbTokenizer(vocab_file=str(folder / "learnt.model"))
    config: dict[str, Any] = {"vocab_size": rows, "d_model": dim, "init_std": 0.1}
    for stack in ("encoder", "decoder"):
        config |= {f"{stack}_layers": layers, f"{stack}_ffn_dim": hidden, f"{stack}_attention_heads": heads}
        config |= {f"{stack}_sparse_step": 2} if moe else {}
    torch.manual_seed(1)
    model: Any = (
        NllbMoeForConditionalGeneration(NllbMoeConfig(**config, num_experts=experts))
        if moe
        else M2M100ForConditionalGeneration(M2M100Config(**config))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def imports(source: Path, out: Path, *words: str) -> float:
    """Imports a model in a process of its own and returns its highest resident size in MiB."""
    command = [sys.executable, "-c", MEMORY, "import", str(source), "--out", str(out), "--quiet", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1]) / 1024


def logits(kind: str, theirs: Any, ours: Any, batch: dict[str, torch.Tensor]) -> list[Row]:
    """Compares the logits for random translations."""
    tokens = torch.randint(4, 60, (SENTENCES, 12), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 2
    sources = batch["input_ids"]
    with torch.no_grad():
        wanted = theirs(**batch, decoder_input_ids=tokens).logits
        found, _ = ours.models[0](sources, sources.ne(1).sum(1), tokens)
    largest, logit = float((found - wanted).abs().max()), float(wanted.abs().max())
    print(f"{kind}: largest difference of logits {largest:.1e}, largest logit {logit:.1f}", file=sys.stderr)
    return [
        ratio(f"logits, {kind}, largest difference / 1e-6", [largest], [1e-6]),
        ratio(f"logits, {kind}, largest difference / 1e-6 of the largest logit", [largest], [1e-6 * logit], "<= 10"),
    ]


def searches(theirs: Any, tokenizer: Any, ours: Any, beam: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Returns what translates the same sentences into as many tokens, by program."""
    tokenizer.src_lang = SOURCE
    sentences = [" ".join(TEXT[(one + step) % len(TEXT)] for step in range(3)) for one in range(SENTENCES)]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    sources = [ours.encode(sentence) for sentence in sentences]
    first = {"forced_bos_token_id": int(tokenizer.convert_tokens_to_ids(TARGET)), "forced_eos_token_id": 2}
    lengths = {"min_new_tokens": PIECES, "max_new_tokens": PIECES}

    def transformers() -> list[list[int]]:
        with torch.no_grad():
            found = theirs.generate(**batch, **first, **lengths, num_beams=beam, do_sample=False)
        return [row[1:].tolist() for row in found]  # without the start

    def fairseq() -> list[list[int]]:
        steps = {"beam": beam, "min_len": PIECES - 1, "max_len_a": 0, "max_len_b": PIECES - 1}
        found = ours.generate(sources, source_lang=SOURCE, target_lang=TARGET, **steps)
        return [one[0]["tokens"].tolist() for one in found]

    return {"transformers": transformers, "fairseq": fairseq}


def speed(kind: str, beam: int, runs: dict[str, Callable[[], list[list[int]]]], rounds: int) -> Row:
    """Compares the time of decoding.

    Raises:
        SystemExit: the programs translate into different numbers of tokens.
    """
    theirs, ours = runs["transformers"](), runs["fairseq"]()
    if {len(one) for one in theirs + ours} != {PIECES}:
        raise SystemExit(f"{kind}, beam {beam}: not every translation has {PIECES} tokens")
    equal = sum(one == other for one, other in zip(theirs, ours, strict=True))
    print(f"{kind}, beam {beam}: {equal} of {SENTENCES} translations are equal", file=sys.stderr)
    times = seconds(runs, rounds)
    label = f"decoding, {kind}, beam {beam}, sentences/s, fairseq / transformers"
    return ratio(label, times["transformers"], times["fairseq"], ">= 0.8")


def measure(kind: str, args: argparse.Namespace, base: float, folder: Path) -> list[Row]:
    """Compares one kind of model."""
    sizes = QUICK if args.quick else FULL
    source = folder / kind
    theirs, tokenizer = make(source, sizes, kind == "moe")
    size = sum(path.stat().st_size for path in source.glob("model*.safetensors")) / 2**20
    peak = imports(source, folder / f"{kind}-out") - base
    print(f"{kind}: {size:.0f} MiB, import takes {peak:.0f} MiB at most beside Python", file=sys.stderr)
    rows = [ratio(f"import, {kind}, peak memory / size of the model", [peak], [size], "<= 1.1")]
    if kind == "moe":
        peak = imports(source, folder / "shards", "--shards", str(sizes[-1])) - base
        print(f"{kind}, a shard per expert: {peak:.0f} MiB", file=sys.stderr)
        rows.append(ratio("import, moe, --shards, peak memory / size of the model", [peak], [size], "<= 1.1"))
    ours = hub.from_pretrained(str(folder / f"{kind}-out"), "checkpoint.pt", str(folder / f"{kind}-out" / "bin")).eval()
    tokenizer.src_lang = SOURCE
    batch = dict(tokenizer([TEXT[one % 5] for one in range(SENTENCES)], return_tensors="pt", padding=True))
    rows += logits(kind, theirs, ours, batch)
    for beam in (1, 5):
        rounds = 3 if args.quick else args.rounds
        rows.append(speed(kind, beam, searches(theirs, tokenizer, ours, beam), rounds))
    return rows


def main() -> None:
    """Measures, prints and writes."""
    options = parser("xmoe import and decoding beside transformers")
    options.add_argument("--rounds", type=int, default=10, help="batches of each program")
    args = options.parse_args()
    if args.device != "cpu":
        options.error(f"--device {args.device}: this benchmark runs on a CPU")
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "tiny", TINY, True)
        base = imports(folder / "tiny", folder / "tiny-out")
        finish([row for kind in ("dense", "moe") for row in measure(kind, args, base, folder)], args)


if __name__ == "__main__":
    main()
