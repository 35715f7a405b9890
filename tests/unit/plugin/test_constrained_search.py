"""Constraints at the longest length of a translation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary

from xmoe_fairseq.tasks.decoding import ConstrainedSearch


@pytest.mark.parametrize(("finished", "best"), [((False, True), 1), ((True, False), 0), ((False, False), 0)])
def test_at_the_longest_length_a_translation_with_all_constraints_wins(finished: tuple[bool, bool], best: int) -> None:
    dictionary = Dictionary()
    for word in "abc":
        dictionary.add_symbol(word)
    search = ConstrainedSearch(dictionary, "ordered")
    search.constraint_states = [[SimpleNamespace(finished=one) for one in finished]]
    lprobs = torch.full((1, 2, len(dictionary)), -torch.inf)
    lprobs[:, :, dictionary.eos()] = -1.0
    scores = torch.tensor([[[-1.0, -2.0], [-3.0, -9.0]]])  # the first is the likelier one
    found, tokens, beams = search.step(2, lprobs, scores)[:3]
    assert int(tokens[0, 0]) == dictionary.eos() and int(beams[0, 0]) == best
    assert found[0].isfinite().sum() == (1 if any(finished) else 2)
