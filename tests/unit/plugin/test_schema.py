"""Dataclasses from plain values: what is of the right form comes back, and everything else is named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmoe_fairseq.common.schema import build
from xmoe_fairseq.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
    share: float
    count: int
    kind: Literal["a", "b"]
    parts: Sequence[Inner]
    by_name: Mapping[str, float | None]
    known: bool = True
    note: str | None = None
    more: Any = None


VALUES: dict[str, Any] = {
    "share": 1,
    "count": 3,
    "kind": "b",
    "parts": [{"name": "x", "numbers": [1, 2]}],
    "by_name": {"en-ca": 0.5, "ca-en": None},
    "note": "n",
}


def test_values_of_the_right_form_come_back() -> None:
    made = build(Outer, VALUES, "f.json", "delete it")
    assert made == Outer(1.0, 3, "b", [Inner("x", (1, 2))], {"en-ca": 0.5, "ca-en": None}, note="n")
    assert isinstance(made.share, float)
    assert build(Outer, json.loads(json.dumps(dataclasses.asdict(made))), "f.json", "delete it") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "x"}, "share is 'x', it must be a number"),
        ({"share": math.nan}, "share is nan, it must be a finite number"),
        ({"share": 10**400}, "share is 1000"),
        ({"share": True}, "share is True, it must be a number"),
        ({"count": 2.0}, "count is 2.0, it must be a whole number"),
        ({"count": 2**63}, "it must be a whole number of 64 bits"),
        ({"count": 10**5000}, "count is a number of too many digits"),
        ({"kind": "c"}, "kind is 'c', it must be one of a, b"),
        ({"parts": {}}, "parts is {}, it must be a list"),
        ({"parts": [5]}, "parts[0] is 5, it must be an object of names and values"),
        ({"parts": [{"name": "x"}]}, "parts[0].numbers is missing"),
        ({"parts": [{"name": "x", "numbers": [1, "2"]}]}, "parts[0].numbers[1] is '2', it must be a whole number"),
        ({"by_name": {"en-ca": "x"}}, "by_name.en-ca is 'x', it must be a number"),
        ({"by_name": {5: 1.0}}, "by_name is 5, it must be a name"),
        ({"nots": 1}, "'nots' is unknown, did you mean note?"),
        ({"note": ["long"] * 99}, "'long', 'long', ..."),
    ],
)
def test_the_first_wrong_place_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(
        UserError, match=r"^xmoe_fairseq: error: f.json does not have the right form: .*; delete it$"
    ) as error:
        build(Outer, VALUES | change, "f.json", "delete it")
    assert re.search(re.escape(message.removesuffix("...")), error.value.message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(VALUES)) | st.text(max_size=3), inner)
    ),
    max_leaves=8,
)


@given(JSON, st.sampled_from([*VALUES, ""]))
def test_any_value_is_built_or_refused_in_one_line(value: Any, name: str) -> None:
    try:
        build(Outer, VALUES | {name: value} if name else value, "f.json", "delete it")
    except UserError as error:
        assert "\n" not in error.message
