"""The table of options for users says what the dataclasses say: every option, its default and its choices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig
from helpers import ROOT

from xmoe_fairseq.config import FlatTransformerConfig, MoETransformerConfig
from xmoe_fairseq.criterions.threshold_routing import ThresholdRoutingCrossEntropyConfig
from xmoe_fairseq.tasks.multilingual import MultilingualConfig

HEADER = "| option | default | meaning |"


def own_options(config: type, stock: type) -> dict[str, Any]:
    """Lists the options that stock fairseq does not have, by their names on the command line."""
    known = {field.name for field in dataclasses.fields(stock)}
    fields = [field for field in dataclasses.fields(config) if field.name not in known]
    return {"--" + field.name.replace("_", "-"): field for field in fields}


OPTIONS = own_options(MoETransformerConfig, FlatTransformerConfig) | own_options(
    ThresholdRoutingCrossEntropyConfig, LabelSmoothedCrossEntropyCriterionConfig
)
# Options of tasks have pages of their own; the table may name some of them.
ALL = OPTIONS | {"--" + field.name.replace("_", "-"): field for field in dataclasses.fields(MultilingualConfig)}


def rows() -> Iterator[tuple[list[str], str, str]]:
    """Gives the options, the defaults and the whole text of each row."""
    lines = iter((ROOT / "README.md").read_text().splitlines())
    assert HEADER in lines and next(lines).startswith("|---")
    for line in lines:
        if not line.startswith("|"):
            return
        options, defaults, _ = [cell.strip() for cell in line.split("|")[1:-1]]
        yield re.findall(r"`(--[a-z-]+)`", options), defaults, line


ROWS = list(rows())


def shown(value: Any) -> str:
    """Writes a default as the table does."""
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, str):
        return f"`{value}`" if value else ""
    return f"{value:g}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[0]))
def test_a_row_has_the_defaults_and_the_choices_of_its_options(row: tuple[list[str], str, str]) -> None:
    options, defaults, text = row
    assert options and set(options) <= ALL.keys()
    assert defaults == ", ".join(shown(ALL[option].default) for option in options)
    for option in options:
        kind = ALL[option].type
        choices = [choice.value for choice in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
        assert [choice for choice in choices if f"`{choice}`" not in text] == [], option


def test_every_option_of_models_and_losses_is_in_the_table() -> None:
    named = {name for _, _, text in ROWS for name in re.findall(r"`(--[a-z-]+)[ `]", text)}
    assert OPTIONS.keys() - named == set()
    assert len(ROWS) > 20 and "--moe-threshold" in OPTIONS and "--moe-cmr-budget" in OPTIONS
