"""Memory of `xmoe score` and `xmoe compare`: 200,000 lines per direction take less than 2 GiB."""

from __future__ import annotations

import pytest
from helpers_commands import CONTEXT
from helpers_load import measure

# What 200,000 lines may take beyond Python and the libraries, which take less than 600 MiB.
MIB_OF_ONE_LINE = (2048 - 600) / 200_000


@pytest.mark.parametrize("command", ["score", "compare"])
def test_memory_is_that_of_the_text(command: str, few: int = 500, many: int = 10_000) -> None:
    """sacreBLEU alone takes 10 GiB and 18 GiB for 200,000 lines, hence 0.5 and 0.9 GiB for 10,000."""
    peaks = []
    for lines in (few, many):
        with CONTEXT.Pool(1) as pool:
            peaks.append(pool.apply(measure, (command, lines, 1, 200))["peak"])
    assert peaks[1] - peaks[0] < MIB_OF_ONE_LINE * (many - few)
