"""Options that are written as Python are read as literals, whoever asks fairseq to evaluate them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fairseq
import pytest
from fairseq import utils
from hypothesis import given, settings
from hypothesis import strategies as st

import xmoe_fairseq  # noqa: F401  (installs the reader)
from xmoe_fairseq.common.literals import literal
from xmoe_fairseq.errors import UserError

GOOD = {
    "(0.9, 0.98)": (0.9, 0.98),
    "[(512, 3)] * 2 + [(1024, 3)]": [(512, 3), (512, 3), (1024, 3)],
    " 1e-3 ": 1e-3,
    "-5": -5,
    "1024 * 4": 4096,
    "True": True,
    "None": None,
    "{'main': ('src', None)}": {"main": ("src", None)},
    "{1, 2}": {1, 2},
    "[]": [],
}


@pytest.mark.parametrize(("text", "value"), GOOD.items(), ids=GOOD)
def test_values_are_read_as_eval_reads_them(text: str, value: Any) -> None:
    assert literal(text) == value == eval(text.strip())


@pytest.mark.parametrize(
    "text",
    [
        "[__import__('os').mkdir('{marker}'), None][1]",
        "__import__('os').mkdir('{marker}')",
        "(lambda: open('{marker}', 'w'))()",
        "[open('{marker}', 'w') for _ in (1,)]",
        "f\"{{open('{marker}', 'w')}}\"",
        "().__class__.__base__.__subclasses__()",
        "2 ** 9999999999",
        "[0] * 10 ** 12",
        "[0] * 999999999999",
        "'x' * 999999999999",
        "[[[[0] * 999] * 999] * 999] * 999",
        "1 / 0",
        "{{**{{}}}}",
        "(",
        "",
        "[" * 5000,
        "1\n+ x",
    ],
)
def test_all_else_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a literal") as error:
        literal(text.replace("{{", "\0").replace("{marker}", str(tmp_path / "ran")).replace("\0", "{"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4)))
@settings(max_examples=30, deadline=None)
def test_what_repr_writes_is_read(value: Any) -> None:
    assert literal(repr(value)) == value


@given(st.text(alphabet="()[]{},.:*+-'\"0123456789abc_=lambda ", max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_text_does_more_than_be_read_or_refused(text: str) -> None:
    try:
        literal(text)
    except UserError as error:
        assert "is not a literal" in error.message


def test_every_module_of_fairseq_that_evaluates_has_the_reader() -> None:
    root = Path(fairseq.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        calls = re.search(r"(?<![\w.])(?<!def )eval\(", path.read_text())
        if calls and not name.startswith("fairseq.examples"):
            found.append(name)
            module = __import__(name, fromlist=["_"])
            assert module.eval is literal, name
    assert len(found) > 15


def test_fairseqs_parsers_of_options_do_not_run_them(tmp_path: Path) -> None:
    code = f"[__import__('os').mkdir('{tmp_path / 'ran'}'), None][1]"
    for parse in (utils.eval_str_list, utils.eval_str_dict, utils.eval_bool):
        with pytest.raises(UserError, match="is not a literal"):
            parse(code)
    assert not (tmp_path / "ran").exists()
    assert utils.eval_str_list("[1, 2]", int) == [1, 2] and utils.eval_bool(True) is False
