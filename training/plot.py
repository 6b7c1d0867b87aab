"""Draw the loss of a run as a picture: an SVG file, which browsers and GitHub show.

    draw_losses(Path("out/demo/log.jsonl"), Path("out/demo/loss.svg"))      # or --plot=1 in any run

By hand, so that no package is needed: a picture is a few hundred bytes of text per curve.
"""
from __future__ import annotations

import html
import json
import math
from pathlib import Path

from config import refuse_to_run
from formats import atomic

WIDTH, HEIGHT = 640, 360                # of the picture, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 44       # margins around the axes
CURVES = {"loss": ("#9ecae1", "training, each step"), "val_loss": ("#d62728", "validation")}
MOST = 400                              # points of a curve: more could not be told apart

Points = list[tuple[float, float]]


def read_curves(log: Path) -> dict[str, Points]:
    """Return name -> [(step, loss), ...] of the curves in a log.jsonl, without what is not finite.
    """
    curves: dict[str, Points] = {name: [] for name in CURVES}
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, points in curves.items():
            if isinstance(row.get(name), (int, float)):
                points.append((row["step"], row[name]))
    return {name: points for name, points in curves.items() if points}


def thin_out(points: Points) -> Points:
    """Return at most MOST points: the mean of each of as many stretches of the curve."""
    size = math.ceil(len(points) / MOST)
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
            for part in parts]


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def draw_svg(curves: dict[str, Points], title: str) -> str:
    """Return an SVG picture of curves over steps, with axes and a legend."""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    left, right = 0.0, max(xs)
    low, high = min(ys), max(ys)
    pad = 0.05 * (high - low or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        """Step and loss -> pixels from the left and from the top."""
        across = (x - left) / (right - left or 1.0)
        up = (y - low + pad) / (high - low + 2 * pad)
        return (LEFT + across * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="20" font-size="14">{html.escape(title)}</text>']
    for y in choose_ticks(low - pad, high + pad):
        _, v = place(left, y)
        out.append(f'<path d="M{LEFT} {v:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>'
                   f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in choose_ticks(left, right):
        u, _ = place(x, low)
        out.append(f'<text x="{u:.1f}" y="{HEIGHT - BOTTOM + 18}" '
                   f'text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    for k, (name, points) in enumerate(curves.items()):
        color, label = CURVES[name]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in thin_out(points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        top = TOP + 14 + 18 * k
        out.append(f'<path d="M{WIDTH - 190} {top - 4}h24" stroke="{color}" stroke-width="2"/>'
                   f'<text x="{WIDTH - 160}" y="{top}">{label}, {points[-1][1]:.3f}</text>')
    return "\n".join([*out, "</svg>", ""])


def draw_losses(log: Path, picture: Path) -> None:
    """Draw the losses of a log.jsonl; nothing where it has none yet."""
    curves = read_curves(log)
    if curves:
        text = draw_svg(curves, f"{log.parent}: loss in nats per token")
        atomic.write_text(picture, text, picture.with_suffix(".tmp"))


if __name__ == "__main__":
    refuse_to_run()
