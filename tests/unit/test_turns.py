"""Programs that take turns in the benchmarks."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ROOT
from turns import Program, take_turns

# Says when it began and ended each piece of work, on the clock that all processes share, and then waits long enough to
# be stopped before the next one, however busy the machine is.
WORKER = """
import time
while True:
    start = time.monotonic()
    while time.monotonic() - start < 0.05: pass
    print("done", start, time.monotonic(), flush=True)
    time.sleep(0.2)
"""


def test_one_program_at_a_time_and_as_often_as_asked() -> None:
    commands = {name: [sys.executable, "-c", WORKER] for name in "ab"}
    rounds: list[int] = []
    turns = take_turns(commands, "done", 1, 3, lambda taken: rounds.append(len(taken["b"])))
    assert rounds == [1, 2, 3]
    assert {name: len(of) for name, of in turns.items()} == {"a": 3, "b": 3}
    assert all(seconds > 0.04 for of in turns.values() for seconds, _ in of)
    work = sorted(tuple(map(float, line.split()[1:])) for of in turns.values() for _, line in of)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(work))


def test_a_turn_lasts_as_long_as_its_work() -> None:
    slow = WORKER.replace("0.05", "0.25")
    turns = take_turns({"fast": [sys.executable, "-c", WORKER], "slow": [sys.executable, "-c", slow]}, "done", 1, 3)
    for of in turns.values():
        for seconds, line in of:
            start, end = map(float, line.split()[1:])
            assert seconds > end - start - 0.01
    # A busy machine makes both turns longer.
    fast, slower = (min(seconds for seconds, _ in turns[name]) for name in ("fast", "slow"))
    assert slower > 0.24 and fast < slower


def test_a_program_that_ends_is_an_error_with_what_it_said() -> None:
    with pytest.raises(SystemExit, match=r"ended too early.*\nno such data"):
        take_turns({"a": [sys.executable, "-c", "print('no such data')"]}, "done", 1, 1)


def test_programs_are_ended() -> None:
    program = Program([sys.executable, "-c", WORKER])
    program.until("done")
    program.close()
    assert program._process.returncode == -9


def test_none_is_left_where_the_measurement_is_told_to_end(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    waits = f"import os, time; open({str(told)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    code = f"from turns import take_turns; take_turns({{'a': [{sys.executable!r}, '-c', {waits!r}]}}, 'done', 1, 1)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    measurement = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    while not (told.is_file() and told.read_text().endswith(" ")):
        assert measurement.poll() is None
        time.sleep(0.05)
    measurement.terminate()
    assert measurement.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
