"""Figures read from logs that fairseq wrote, and where curves of them are drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from xmoe_fairseq.criterions.threshold_routing import LOSSES
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.render.report_curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Figure, draw, number
from xmoe_fairseq.results.training_log import EPOCH, INNER, Training, find_logs, read_training

# 20 updates, then started again for 10 more, with --log-interval 5 --validate-interval-updates 10.
LOGS = Path(__file__).parents[2] / "logs"


def training(*paths: Path) -> Training:
    found = read_training(paths)
    assert found is not None
    return found


def line(update: int, loss: float, **more: float) -> str:
    """A line of ``--log-format simple`` in a ``--log-file``."""
    pairs = {"loss": loss, **more, "num_updates": update}
    return f"epoch 001:  {update:5d} / 1000 {', '.join(f'{name}={value:g}' for name, value in pairs.items())}\n"


def valid(update: int, loss: float, subset: str = "valid") -> str:
    return f"epoch 001 | valid on '{subset}' subset | loss {loss:g} | num_updates {update}\n"


def losses(found: Training, subset: str) -> dict[int, float]:
    return {update: values["loss"] for update, values in found.subsets.get(subset, {}).items()}


@pytest.mark.parametrize(("kind", "words_a_second"), [("simple", 3126.5), ("json", 3186.3)])
@pytest.mark.parametrize("dated", [True, False])
def test_lines_of_fairseq(kind: str, words_a_second: float, dated: bool, tmp_path: Path) -> None:
    text = (LOGS / f"{kind}.log").read_text()
    if not dated:  # as in --log-file
        text = "".join(f"{line.split(' | ', 3)[3]}\n" for line in text.splitlines())
    (tmp_path / "log").write_text(text)
    found = training(tmp_path / "log")
    assert losses(found, INNER) == {5: 5.843, 10: 5.407, 15: 5.205, 20: 5.397, 25: 5.35, 30: 5.3}
    assert losses(found, "valid") == {10: 5.36, 20: 5.31, 23: 5.294, 30: 5.285}
    assert losses(found, EPOCH) == {20: 5.47, 23: 5.455, 30: 5.312}
    first, checked = found.train[5], found.valid["valid"][10]
    assert (first["ppl"], first["lr"], first["gnorm"], first["wps"]) == (55.92, 0.002, 1.746, words_a_second)
    assert (first["enc_experts"], first["dec_experts"], first["enc_load_cv"]) == (6.908, 6.96, 1.224)
    assert (first["enc_balance_loss"], first["dec_balance_loss"]) == (1.3727, 1.4942)
    assert (checked["ppl"], checked["dec_load_cv"]) == (39.81, 2.62)
    assert (found.updates, found.restarts) == (30, [23])


def test_terminal_with_a_progress_bar() -> None:
    found = training(LOGS / "terminal.log")
    # The last figures come when the bar has been drawn for the last time.
    assert losses(found, INNER) == {5: 5.843, 10: 5.407, 15: 5.205}
    assert losses(found, "valid") == {10: 5.36, 20: 5.31}
    assert losses(found, EPOCH) == {20: 5.47}
    assert (found.train[10]["ppl"], found.train[15]["enc_experts"]) == (41.07, 6.999)


def test_bars_cut_off_by_a_narrow_terminal_leave_whole_epochs() -> None:
    found = training(LOGS / "narrow_terminal.log")
    assert losses(found, "valid") == {10: 5.36, 20: 5.31}
    assert list(found.train) == [20] and found.train == found.subsets[EPOCH]


def test_what_a_restart_threw_away_is_forgotten(tmp_path: Path) -> None:
    before = [line(100, 5), valid(100, 5.5), line(200, 4), line(300, 3.5), valid(300, 3.6)]
    after = [line(200, 4.1), line(250, 3.9), valid(250, 3.8)]
    (tmp_path / "log").write_text("".join([*before, *after]))
    found = training(tmp_path / "log")
    assert losses(found, INNER) == {100: 5, 200: 4.1, 250: 3.9}
    assert losses(found, "valid") == {100: 5.5, 250: 3.8}
    assert (found.updates, found.restarts) == (250, [200])


def test_several_logs_in_any_order_and_copies(tmp_path: Path) -> None:
    (tmp_path / "b.log").write_text(line(100, 5) + line(200, 4) + valid(200, 4.2))
    (tmp_path / "a.log").write_text(line(300, 3) + valid(300, 3.2))
    (tmp_path / "copy.log").write_text((tmp_path / "b.log").read_text())
    found = training(*(tmp_path / name for name in ("a.log", "b.log", "copy.log")))
    assert losses(found, INNER) == {100: 5, 200: 4, 300: 3}
    assert losses(found, "valid") == {200: 4.2, 300: 3.2}
    assert found.restarts == []


def test_cut_off_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        "".join([line(5, 4), "epoch 001:     7 / 23 loss=3.1, num_upd{'_name': None, 'common': {}}\n"]).encode()
        + b'\xff\xfe junk\n{"epoch": 1, "update": 0.2, "lo\nepoch 001 | loss nonsense | num_updates\n'
        + line(10, math.nan).encode()
        + line(15, 3).rstrip("\n").encode()[:-1]  # killed while it wrote "num_updates=1"
    )
    found = training(tmp_path / "log")
    assert list(found.train) == [5, 10] and math.isnan(found.train[10]["loss"])


def test_logs_are_found_and_wrong_ones_named(tmp_path: Path) -> None:
    assert find_logs(tmp_path) == [] and read_training([]) is None
    (tmp_path / "checkpoints").mkdir()
    for name, text in (("train.log", line(1, 2)), ("checkpoints/x.log", valid(3, 4)), ("generate.log", "S-1\tno\n")):
        (tmp_path / name).write_text(text)
    assert find_logs(tmp_path) == [tmp_path / "checkpoints/x.log", tmp_path / "train.log"]
    with pytest.raises(UserError, match=r"generate.log holds no figures of fairseq-train"):
        read_training([tmp_path / "generate.log"])
    with pytest.raises(UserError, match=r"cannot read the log .*none.log: No such file"):
        read_training([tmp_path / "none.log"])


# --- curves ----------------------------------------------------------------------------------------------------------


def figure(found: Training, title: str) -> Figure:
    return next(one for one in draw(found) if one.title == title)


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in path.removeprefix("M").split(" "))]


def test_curves_go_through_the_values(tmp_path: Path) -> None:
    ppl = {0: 1000.0, 50: 10.0, 100: 1.0}
    text = "".join(line(u, 2, ppl=p, enc_experts=3, dec_experts=4, enc_rc=1, wps=5e4 + u) for u, p in ppl.items())
    (tmp_path / "log").write_text(text + "epoch 001 | valid on 'valid' subset | ppl 100 | num_updates 100\n")
    found = training(tmp_path / "log")
    assert [one.title for one in draw(found)] == ["Perplexity", "Loss", "Experts a token", "Words a second"]
    drawn = figure(found, "Perplexity")
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    train, checked = drawn.lines
    assert drawn.log and (train.label, checked.label) == ("training", "valid")
    # On a logarithmic axis, 10 is one third of the way from 1 to 1000, and 100 two thirds.
    middle = bottom + (TOP - bottom) / 3
    assert places(train.path) == [(LEFT, TOP), ((LEFT + right) / 2, pytest.approx(middle, abs=0.05)), (right, bottom)]
    assert places(checked.path) == [(right, pytest.approx(bottom + (TOP - bottom) * 2 / 3, abs=0.05))] * 2  # a dot
    assert [tick.label for tick in drawn.y_ticks] == ["1", "10", "100", "1000"]
    assert [tick.label for tick in drawn.x_ticks] == ["0", "50", "100"]
    assert "training: 1000 after 0 updates, 1 after 100" in drawn.description


def test_long_courses_are_averaged_in_few_points(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(line(u, u / 100) for u in range(1, 1601)))
    (drawn,) = draw(training(tmp_path / "log"))
    points = places(drawn.lines[0].path)
    assert len(points) == 160
    assert drawn.lines[0].first == (1, 0.01) and drawn.lines[0].last == (1600, 16)
    slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
    assert all(y == pytest.approx(points[0][1] + slope * (x - points[0][0]), abs=0.2) for x, y in points)


def test_values_without_a_place_and_constant_figures(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        line(1, 2, gnorm=0, lr=0.1, enc_first_dropped=0, enc_rc=1.5) + line(2, math.inf, gnorm=5, lr=0.1, enc_rc=1)
    )
    found = draw(training(tmp_path / "log"))
    assert [one.title for one in found] == [
        "Loss", "Strata a token (requested capacity)", "Learning rate", "Gradient norm"
    ]  # fmt: skip
    for one in found:
        for x, y in (place for curve in one.lines for place in places(curve.path)):
            assert LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM


def test_every_loss_of_the_routers_has_a_figure(tmp_path: Path) -> None:
    values = {f"{stack}_{name}": value for name in LOSSES for stack, value in (("enc", 1.5), ("dec", 0.5))}
    (tmp_path / "log").write_text(line(1, 2, **values) + line(2, 2, **values))
    drawn = [one for one in draw(training(tmp_path / "log")) if one.title != "Loss"]
    assert len(drawn) == len(LOSSES)
    assert all([one.last[1] for one in figure.lines] == [1.5, 0.5] for figure in drawn)
    (tmp_path / "log").write_text(line(1, 2, **dict.fromkeys(values, 0.0)))
    assert [one.title for one in draw(training(tmp_path / "log"))] == ["Loss"]


def test_restarts_are_marked(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line(0, 5) + line(60, 4) + line(50, 4.5) + line(100, 3))
    drawn = figure(training(tmp_path / "log"), "Loss")
    assert drawn.restarts == [(LEFT + WIDTH - RIGHT) / 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2e-5, "2e-05"), (0.034, "0.034"), (1318, "1318"), (12345, "12.3k"), (1.3184e6, "1.32M")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
