"""The picture of a run: its curves are those of the log, and every point is inside the axes."""
import json
import math
import xml.etree.ElementTree as ET

import pytest

import train
from config import configure
from formats.run_folder import find_own_files
from test_train import data         # noqa: F401
from train_base import TINY
from training import plot

SVG = "{http://www.w3.org/2000/svg}"


def points_of(text):
    """The polylines of a picture as lists of pixels."""
    return [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
            for line in ET.fromstring(text).iter(f"{SVG}polyline")]


def test_a_curve_is_a_linear_map_of_the_log(tmp_path):
    """Equal differences stay equal; later is right, lower is down; NaN and other rows are left out.
    """
    rows = [{"step": s, "loss": 5 - s / 10} for s in range(1, 21)]
    rows += [{"step": 21, "loss": None}, {"step": 10, "val_loss": 4.5}, {"step": 20, "val_loss": 4}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot.draw_losses(tmp_path / "log.jsonl", tmp_path / "loss.svg")
    text = (tmp_path / "loss.svg").read_text()
    loss, val = points_of(text)
    assert len(loss) == 20 and len(val) == 2
    steps = {round(b[0] - a[0], 0) for a, b in zip(loss, loss[1:])}
    falls = {round(b[1] - a[1], 0) for a, b in zip(loss, loss[1:])}
    assert len(steps) <= 2 and min(steps) > 0 and len(falls) <= 2 and min(falls) > 0
    # the validation points lie where the training loss of the same value does
    assert val[0] == pytest.approx((loss[9][0], loss[4][1]), abs=0.2)
    for u, v in (*loss, *val):
        assert plot.LEFT <= u <= plot.WIDTH - plot.RIGHT
        assert plot.TOP <= v <= plot.HEIGHT - plot.BOTTOM
    assert "validation, 4.000" in text and "training, each step, 3.000" in text


@pytest.mark.parametrize("low, high", [(0, 1), (3.1, 3.2), (0, 20000), (-1, 1), (1e-6, 2e-6)])
def test_ticks_are_round_and_inside(low, high):
    ticks = plot.choose_ticks(low, high)
    assert 2 <= len(ticks) <= 12 and low <= min(ticks) and max(ticks) <= high + 1e-9
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5, 10)


def test_a_run_draws_its_picture_when_asked_and_owns_it(data, tmp_path):           # noqa: F811
    out = tmp_path / "out"
    flags = [f"--dataset={data}", f"--out_dir={out}", *TINY, "--max_iters=4", "--eval_interval=2"]
    train.main(configure(train.Config, [*flags, "--plot=1"]))
    assert len(points_of((out / "loss.svg").read_text())) == 2
    assert out / "loss.svg" in find_own_files(out)


def test_thousands_of_steps_are_thinned_out():
    points = plot.thin_out([(s, 2.0) for s in range(10_000)])
    assert len(points) <= plot.MOST and points[0][0] < 20 and points[-1][0] > 9980
