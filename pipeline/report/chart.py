"""Figures of the report: SVG whose colours the page's style sheet decides, for light and dark alike.

A figure is drawn 360 units wide and shown between 300 and 480 pixels wide, so that its text can be read on
a phone and on a screen. What a colour tells apart, a marker or a dash tells apart too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

__all__ = ["Series", "bars", "lines", "number", "parts", "percent", "ranges"]

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 40
# a curve of more points is drawn as means of neighbours; several in one figure, of more neighbours
MOST_POINTS, MOST_POINTS_OF_SEVERAL = 240, 60
# curves of fewer points show them
MOST_MARKERS = 24
# classes of the style sheet: these two mean the same draft in every figure
MEANING = {"released": "s0", "before": "s0", "trained": "s1", "after": "s1", "best": "s1"}
OTHERS = ("s2", "s3", "s4", "s5", "s6", "s7")


@dataclass(frozen=True)
class Series:
    """What one curve or one colour of bars shows; a point is (x, y) or (x, y, low, high)."""

    name: str
    points: Sequence[tuple[float, ...]] = field(default_factory=list)


def number(value: float) -> str:
    """A whole number whole, another with three digits that count, as 12,300 or 0.123."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits < 6 else f"{value:.1e}"


def percent(value: float) -> str:
    """A share in percent, with decimals where it is small."""
    digits = 0 if value == 0 or abs(value) >= 0.0995 else 1 if abs(value) >= 0.00995 else 2
    return f"{value:.{digits}%}"


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def _ticks_text(ticks: Sequence[float], text: Callable[[float], str] | None) -> list[str]:
    """One number of decimals for a whole axis."""
    if text is percent:
        decimals = next((d for d in (0, 1, 2) if len({f"{t:.{d}%}" for t in ticks}) == len(ticks)), 3)
        return [f"{t:.{decimals}%}" for t in ticks]
    if text is not None:
        return [text(tick) for tick in ticks]
    top = max(abs(t) for t in ticks)
    if top and (top < 1e-3 or top >= 1e7):
        return [f"{t:.1e}".replace("e-0", "e-").replace("e+0", "e") if t else "0" for t in ticks]
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{t:,.{decimals}f}" for t in ticks]


def _classes(names: Sequence[str]) -> dict[str, str]:
    """A class for each series: the same for the same draft everywhere, all different within a figure."""
    found = {name: MEANING[name] for name in names if name in MEANING}
    left = [c for c in OTHERS if c not in found.values()]
    if not found and len(names) <= 2:
        left = ["s1", "s2"]
    for name in names:
        if name not in found:
            found[name] = left.pop(0) if left else OTHERS[-1]
    return {name: found[name] for name in names}


def _marker(style: str, x: float, y: float, says: str) -> Markup:
    """A point; its text is shown where a mouse rests on it."""
    shapes = {
        "s0": '<circle class="point hollow {c}" cx="{x:.1f}" cy="{y:.1f}" r="3.4">',
        "s1": '<circle class="point {c}" cx="{x:.1f}" cy="{y:.1f}" r="3.4">',
        "s2": '<path class="point {c}" d="M{x:.1f} {y:.1f}m-3 -3h6v6h-6z">',
        "s3": '<path class="point {c}" d="M{x:.1f} {y:.1f}m0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z">',
        "s4": '<path class="point {c}" d="M{x:.1f} {y:.1f}m0 -4l3.8 6.6h-7.6z">',
        "s5": '<path class="point {c}" d="M{x:.1f} {y:.1f}m0 4l3.8 -6.6h-7.6z">',
        "s6": '<path class="point hollow {c}" d="M{x:.1f} {y:.1f}m-3 -3h6v6h-6z">',
    }
    shape = Markup(shapes.get(style, shapes["s1"])).format(c=style, x=x, y=y)
    return shape + Markup("<title>{}</title></{}>").format(says, "circle" if "<circle" in shape else "path")


def _swatch(style: str, filled: bool) -> Markup:
    """What stands beside a name in the legend."""
    body = (
        Markup('<rect class="bar {}" x="4" y="1" width="18" height="10"/>').format(style)
        if filled
        else Markup('<path class="line {}" d="M0 6h26"/>').format(style) + _marker(style, 13, 6, "")
    )
    return Markup('<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true">{}</svg>').format(body)


def _figure(
    title: str, says: str, body: Markup, legend: Mapping[str, str], filled: bool, height: float = HEIGHT
) -> Markup:
    """A drawing with its title, its legend and a description for those who do not see it."""
    names = Markup("").join(
        Markup("<li>{}{}</li>").format(_swatch(style, filled), name) for name, style in legend.items()
    )
    return Markup(
        '<figure><figcaption>{title}</figcaption><svg role="img" viewBox="0 0 {width} {height:.0f}"'
        ' aria-label="{title}. {says}"><desc>{says}</desc>{body}</svg>{legend}</figure>\n'
    ).format(
        title=title,
        says=says,
        width=WIDTH,
        height=height,
        body=body,
        legend=Markup('<ul class="legend">{}</ul>').format(names) if len(legend) > 1 else "",
    )


def _frame(
    ticks_y: Sequence[float], texts_y: Sequence[str], y_of: Callable[[float], float], x: str, y: str
) -> Markup:
    """Grid, marks of the vertical axis and the names of both."""
    grid = Markup("").join(
        Markup(
            '<path class="grid" d="M{} {:.1f}H{}"/><text class="tick" x="{}" y="{:.1f}" text-anchor="end">'
            "{}</text>"
        ).format(LEFT, y_of(t), WIDTH - RIGHT, LEFT - 6, y_of(t) + 4, text)
        for t, text in zip(ticks_y, texts_y, strict=True)
    )
    return grid + Markup(
        '<text class="axis" x="4" y="12">{}</text><text class="axis" x="{}" y="{}" text-anchor="middle">'
        "{}</text>"
    ).format(y, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x)


def _tick_x(place: float, text: str) -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        place, HEIGHT - BOTTOM + 16, text
    )


def _thinned(points: Sequence[tuple[float, ...]], most: int) -> list[tuple[float, ...]]:
    """At most so many points: means of neighbours."""
    every = math.ceil(len(points) / most)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


def lines(
    title: str,
    x: str,
    y: str,
    series: Sequence[Series],
    *,
    text: Callable[[float], str] | None = None,
    from_zero: bool = False,
    whole: bool = False,
) -> Markup:
    """Curves over a number; empty where there is no point.

    Args:
        title: of the figure.
        x, y: what the axes show, with units.
        series: points with an interval get a band.
        text: writes a value of y.
        from_zero: let the vertical axis begin at zero.
        whole: every x is a whole number that gets a mark of its own.
    """
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    most = MOST_POINTS if len(series) == 1 else MOST_POINTS_OF_SEVERAL
    thinned = {s.name: _thinned(s.points, most) for s in series}
    thin = any(len(thinned[s.name]) < len(s.points) for s in series)
    all_points = [p for points in thinned.values() for p in points]
    xs = [p[0] for p in all_points]
    ys = [value for p in all_points for value in p[1:]] + [0.0] * from_zero
    ticks_y = _ticks(min(ys), max(ys))
    ticks_x = sorted(set(xs)) if whole else _ticks(min(xs), max(xs))
    left, right = min(xs), max(xs)
    if not whole and 0 < left < 0.05 * right:
        left = 0.0
    pad = 14 if whole else 0

    def x_of(value: float) -> float:
        share = (value - left) / (right - left) if right > left else 0.5
        return LEFT + pad + share * (WIDTH - RIGHT - LEFT - 2 * pad)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (value - ticks_y[0]) / (ticks_y[-1] - ticks_y[0]) * (HEIGHT - BOTTOM - TOP)

    def curve(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x_of(a):.1f},{y_of(b):.1f}" for a, b in points)

    styles = _classes([s.name for s in series])
    write = text or number
    body = _frame(ticks_y, _ticks_text(ticks_y, text), y_of, x, y)
    marks = [t for t in ticks_x if left <= t <= right]
    body += Markup("").join(
        _tick_x(x_of(t), s)
        for t, s in zip(
            marks, _ticks_text(marks, None) if len(marks) > 1 else [number(t) for t in marks], strict=True
        )
    )
    for name, points in thinned.items():
        if all(len(p) == 4 for p in points):
            band = [(p[0], p[3]) for p in points] + [(p[0], p[2]) for p in reversed(points)]
            body += Markup('<polygon class="band {}" points="{}"/>').format(styles[name], curve(band))
    for name, points in thinned.items():
        body += Markup('<polyline class="line {}" points="{}"/>').format(
            styles[name], curve([(p[0], p[1]) for p in points])
        )
        if len(points) <= MOST_MARKERS:
            for p in points:
                span = f" ({write(p[2])} to {write(p[3])})" if len(p) == 4 else ""
                says = f"{name}, {x} {number(p[0])}: {write(p[1])}{span}"
                body += _marker(styles[name], x_of(p[0]), y_of(p[1]), says)
    says = "; ".join(
        f"{s.name} from {write(s.points[0][1])} at {number(s.points[0][0])}"
        f" to {write(s.points[-1][1])} at {number(s.points[-1][0])}"
        for s in series
    )
    note = " Each point is the mean of several neighbours." if thin else ""
    return _figure(title, f"{y} over {x}: {says}.{note}", body, styles, filled=False)


def bars(
    title: str,
    x: str,
    y: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    text: Callable[[float], str] = number,
) -> Markup:
    """Bars from zero, side by side for each group; None leaves a place empty.

    Args:
        title: of the figure.
        x, y: what the axes show, with units.
        groups: names of the places on the horizontal axis.
        series: for each colour a value for each group.
        text: writes a value.
    """
    values = [value for column in series.values() for value in column if value is not None]
    if not values:
        return Markup("")
    ticks = _ticks(0.0, max(values) * 1.08)  # room for the number above

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - value / ticks[-1] * (HEIGHT - BOTTOM - TOP)

    styles = _classes(list(series))
    body = _frame(ticks, _ticks_text(ticks, text if text is percent else None), y_of, x, y)
    room = (WIDTH - RIGHT - LEFT) / len(groups)
    width = min(34.0, room * 0.8 / len(series))
    for place, group in enumerate(groups):
        middle = LEFT + room * (place + 0.5)
        body += _tick_x(middle, group)
        for number_, (name, column) in enumerate(series.items()):
            value = column[place]
            if value is None:
                continue
            at = middle + (number_ - len(series) / 2) * width
            body += Markup(
                '<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title>'
                "</rect>"
            ).format(
                styles[name],
                at + 1,
                y_of(value),
                width - 2,
                max(0.0, y_of(0) - y_of(value)),
                f"{name}, {x} {group}: {text(value)}",
            )
            if width >= 22:
                body += Markup(
                    '<text class="value" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>'
                ).format(at + width / 2, y_of(value) - 4, text(value))
    says = "; ".join(
        f"{name} " + ", ".join("none" if v is None else text(v) for v in column)
        for name, column in series.items()
    )
    return _figure(title, f"{y} by {x} ({', '.join(groups)}): {says}.", body, styles, filled=True)


def ranges(
    title: str,
    x: str,
    rows: Sequence[tuple[str, Mapping[str, tuple[float, ...]]]],
    *,
    text: Callable[[float], str] = number,
) -> Markup:
    """A row for each name: values of several drafts as points, with their intervals.

    Args:
        title: of the figure.
        x: what the horizontal axis shows, with its unit.
        rows: name, and for each draft (value,) or (value, low, high).
        text: writes a value.
    """
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    values = [v for _, row in rows for point in row.values() for v in point]
    if not values:
        return Markup("")
    ticks = _ticks(min(values), max(values))
    step, top = 20 + 12 * len(names), 8
    height = top + step * len(rows) + BOTTOM
    styles = _classes(names)

    def x_of(value: float) -> float:
        return 14 + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - 28)

    bottom = height - BOTTOM
    body = Markup("").join(
        Markup(
            '<path class="grid" d="M{0:.1f} {1}V{2:.1f}"/><text class="tick" x="{0:.1f}" y="{3:.1f}"'
            ' text-anchor="middle">{4}</text>'
        ).format(x_of(t), top, bottom, bottom + 16, s)
        for t, s in zip(ticks, _ticks_text(ticks, text if text is percent else None), strict=True)
    )
    body += Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        WIDTH / 2, height - 5, x
    )
    for place, (label, row) in enumerate(rows):
        y = top + step * place + 14
        body += Markup('<text class="label" x="14" y="{}">{}</text>').format(y, _short(label, 48))
        for number_, name in enumerate(names):
            if name not in row:
                continue
            value, at = row[name], y + 12 * (number_ + 1)
            span = ""
            if len(value) == 3:
                body += Markup('<path class="span {}" d="M{:.1f} {}H{:.1f}"/>').format(
                    styles[name], x_of(value[1]), at, x_of(value[2])
                )
                span = f" ({text(value[1])} to {text(value[2])})"
            body += _marker(styles[name], x_of(value[0]), at, f"{label}, {name}: {text(value[0])}{span}")
    says = "; ".join(
        f"{label}: " + ", ".join(f"{name} {text(value[0])}" for name, value in row.items())
        for label, row in rows
    )
    return _figure(title, f"{x}. {says}.", body, styles, filled=False, height=height)


def parts(title: str, says: str, shares: Mapping[str, float], text: Callable[[float], str]) -> Markup:
    """One bar cut into parts of a whole, each with its name and value; empty where all are zero.

    Args:
        title: of the figure.
        says: what the whole is.
        shares: value of each part.
        text: writes a value.
    """
    total = sum(shares.values())
    if total <= 0:
        return Markup("")
    styles = dict(zip(shares, ("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s0"), strict=False))
    body, at = Markup(""), 4.0
    for name, value in shares.items():
        width = value / total * (WIDTH - 8)
        body += Markup(
            '<rect class="bar {}" x="{:.1f}" y="6" width="{:.1f}" height="26"><title>{}</title></rect>'
        ).format(styles.get(name, "s0"), at, max(0.0, width - 1), f"{name}: {text(value)}")
        at += width
    legend = {
        f"{name}: {text(value)} ({percent(value / total)})": styles.get(name, "s0")
        for name, value in shares.items()
    }
    return _figure(title, f"{says}: {', '.join(legend)}.", body, legend, filled=True, height=40)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
