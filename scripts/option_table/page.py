"""The page docs/stock_options.md: what came of each option, and how many there are of each kind."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from .plan import Row
from .scene import OURS, STOCK
from .tries import Outcome

WORKS, REFUSED, LIKEWISE, NOT_OURS = "works", "refused", "fails in stock too", "does not concern us"
FAILS, DIFFERS, UNKNOWN = "fails", "differs", "not tried yet"
STATES = (WORKS, REFUSED, LIKEWISE, NOT_OURS, FAILS, DIFFERS, UNKNOWN)
_SHOWN = 160
_PACKAGES = ("fairseq-fixed", "torch", "numpy", "sacrebleu")

# Where an option changes something on one side only, by a regular expression over the try, and why that is right.
KNOWN_DIFFERENCES: dict[str, str] = {
    "fairseq-train --criterion label_smoothed_cross_entropy": "stock is tried with it always",
    "fairseq-train --checkpoint-activations": "the numbers stay the same, as they do not in stock",
    "fairseq-generate --max-tokens 80": "changes the order of the lines; in stock, both batches have 8 sentences",
    "fairseq-generate --required-batch-size-multiple 1": "always 1 here, so that no sentence is left out",
    "fairseq-generate --no-repeat-ngram-size 1": "stock compares with what is behind the last token, on a CPU",
    "fairseq-validate --(memory-efficient-)?fp16.*": "changes last digits of the routers' figures, which stock has not",
    "fairseq-validate --(truncate-source|encoder-langtok src|decoder-langtok)": "stock keeps the checkpoint's value",
}

_HEAD = """# The options of stock fairseq

Every option of stock fairseq's commands, read from its own parsers and tried one after the other on a toy corpus: with
this plugin (`--task multilingual_local`, `--arch xmoe_transformer_tiny` with experts in every layer) and beside it
without (`--task translation_multi_simple_epoch`, `--arch transformer`, and `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`,
without which stock fairseq cannot read its own checkpoints today). `python scripts/stock_options.py` writes this page;
{versions}; one process, on a CPU.

- **works**: the command ends well, and the option changes what is trained, said or written if it does so in stock
  fairseq, and only then; a remark names an error that stock fairseq ends with instead;
- **refused**: one line says what is wrong, and nothing is written;
- **fails in stock too**: here in one line, there in a traceback; the remark has the error;
- **does not concern us**: not tried, for the reason in the remark;
- **fails**, **differs**: faults of this plugin.

Words in braces are files: `{{checkpoint}}` is a model trained by the same side, `{{data}}` the data folder,
`{{dictionary}}` its dictionary.
"""


class State(NamedTuple):
    name: str
    remark: str


def state_of(row: Row, known: Mapping[str, Mapping[str, Outcome]]) -> State:
    """Returns what came of a row.

    Args:
        row: of the table.
        known: the outcomes of both sides, by command and words.
    """
    if row.why_not is not None:
        return State(NOT_OURS, row.why_not)
    key, base = f"{row.option.command} {row.words}", f"{row.option.command} {row.base}".strip()
    if any(words not in known[side] for words in (key, base) for side in (OURS, STOCK)):
        return State(UNKNOWN, "")
    ours, stock = (known[side][key] for side in (OURS, STOCK))
    there = f"stock: {_clean(stock.said)}"
    if ours.refused:
        return State(REFUSED, _clean(ours.said))
    if not ours.works:
        return State(FAILS if stock.works else LIKEWISE, _clean(ours.said) if stock.works else there)
    if not stock.works:
        return State(WORKS, there)
    changes, changed = (known[side][key].did != known[side][base].did for side in (OURS, STOCK))
    if changes == changed:
        return State(WORKS, "" if changes else "changes nothing, as in stock")
    remark = next((why for pattern, why in KNOWN_DIFFERENCES.items() if re.fullmatch(pattern, key)), None)
    if remark is not None:
        return State(WORKS, remark)
    return State(DIFFERS, "changes nothing here" if changed else "changes nothing in stock")


def page(rows: Sequence[Row], known: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Writes the page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    states = [(row, state_of(row, known)) for row in rows]
    lines = [_HEAD.format(versions=versions), *_counts(states)]
    for command, of_command in groupby(states, lambda one: one[0].option.command):
        lines += ["", f"## {command}"]
        for group, members in groupby(of_command, lambda one: one[0].option.group):
            lines += ["", f"### {command}: {group}", "", "| option | value | state | remark |", "|---|---|---|---|"]
            lines += [_line(row, state) for row, state in members]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row], known: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Counts the states in a line."""
    counts = Counter(state_of(row, known).name for row in rows)
    return ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])


def _counts(states: Sequence[tuple[Row, State]]) -> Iterator[str]:
    yield f"| command | options | {' | '.join(STATES)} |"
    yield f"|---|{'---:|' * (len(STATES) + 1)}"
    commands = {row.option.command: None for row, _ in states}
    for command in (*commands, "all"):
        mine = [(row, state) for row, state in states if command in ("all", row.option.command)]
        counts = Counter(state.name for _, state in mine)
        options = {row.option[:3] for row, _ in mine}
        yield f"| {command} | {len(options)} | {' | '.join(str(counts[name]) for name in STATES)} |"
    yield ""
    yield "An option with several values counts once for each in the columns of the states."


def _line(row: Row, state: State) -> str:
    needs = f" (with `{row.base}`)" if row.base else ""
    value = f"`{row.value}`" if row.value else ""
    return f"| `{row.option.name}` | {_cell(value + needs)} | {state.name} | {_cell(state.remark)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _clean(said: str) -> str:
    """Leaves out of a line what is of this machine and this run."""
    text = re.sub(r"^xmoe_fairseq: error: ", "", said)
    text = re.sub(r"; \S*\.log has the details|: check the options and the data", "", text)
    text = re.sub(r"/\S*/(stock|with_the_plugin)/", "", text)
    text = re.sub(r"/\S*/(site-packages|xmoe_fairseq)/", "", text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
