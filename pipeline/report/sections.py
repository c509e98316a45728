"""The sections of the report; each is empty where the run holds nothing for it."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from configs.provenance import collect
from pipeline.report.chart import Series, bars, lines, parts, percent, ranges
from pipeline.report.page import details, join, paragraph, table, tiles
from pipeline.report.results import Acceptance, Draft, Results, last_part

__all__ = ["SECTIONS", "head"]

BEFORE, AFTER = "released", "trained"
KINDS = ("accepted", "rejected", "own")
# rows of a figure by source
MOST_GROUPS = 16
LEGEND = (
    ("accepted", "a drafted token that the target took: it cost no step of its own"),
    ("rejected", "a drafted token that the target refused"),
    ("own", "the target's own token, one each step"),
)


def _figures(*found: Markup) -> Markup:
    """Figures side by side where there is room."""
    return Markup('<div class="figures">{}</div>\n').format(join(found)) if any(found) else Markup("")


def _decoding(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _span(found: Acceptance) -> str:
    if found.low is None or found.high is None:
        return f"{found.length:.2f}"
    return f"{found.length:.2f} ({found.low:.2f} to {found.high:.2f})"


def _pair(results: Results) -> tuple[Draft | None, Draft | None, str]:
    """The released and the trained draft, as served where that was measured, else offline; and how."""
    served, offline = results.served, results.offline
    how = "served in vLLM" if served else "offline, from the stored states"
    found, wanted = (served, (AFTER,)) if served else (offline, ("best", "last"))
    after = next((found[name] for name in wanted if name in found), None)
    after = after or next((draft for name, draft in found.items() if name != BEFORE), found.get(BEFORE))
    before = found.get(BEFORE)
    return (before if before is not after else None), after, how


def _setting(results: Results, section: str, key: str) -> Any:
    """A setting of the run, of whichever verb noted it."""
    for text in results.settings.values():
        try:
            return json.loads(text)[section][key]
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _drafts(draft: Draft) -> int:
    """Draft tokens K of the headline: what was served, not the most that was measured."""
    return int(draft.found.get("num_speculative_tokens") or len(draft.positions))


def _headline(draft: Draft, num_steps: int) -> Acceptance:
    found = draft.at(num_steps, 0.0)
    return found or Acceptance(num_steps, 0.0, 1 + sum(draft.positions[:num_steps]))


def head(results: Results) -> Markup:
    """The headline: before, after, by how much, on what."""
    before, after, how = _pair(results)
    run = Markup('<p class="run">layer61, {}</p>').format(results.run)
    if after is None:
        return run + Markup("<h1>No acceptance measured yet</h1>") + _progress(results)
    K = _drafts(after)
    new, old = _headline(after, K), before and _headline(before, K)
    if old:
        gain = new.length / old.length - 1
        title = Markup('{} → {} tokens a step <span class="by{}">{}</span>').format(
            f"{old.length:.2f}", f"{new.length:.2f}", "" if gain >= 0 else " less", f"{gain:+.0%}"
        )
        spans = f" Intervals: {_span(old)} before, {_span(new)} after." if new.low is not None else ""
        ours = after.name in (AFTER, "best", "last")
        which = f"released layer before, {'trained draft' if ours else after.name} after"
    else:
        title, which, spans = Markup("{} tokens a step").format(_span(new)), f"draft: {after.name}", ""
    on = _on_what(results, after, new)
    said = (
        f"Acceptance length, the tokens that a step of the target yields on average: {which}; {K} draft"
        f" tokens, greedy decoding, {how}{on}.{spans}"
    )
    advice = results.verification.get("recommendation")
    return (
        run
        + Markup("<h1>{}</h1>").format(title)
        + paragraph(said)
        + (paragraph(str(advice), "advice") if advice else Markup(""))
        + tiles(_highlights(results, before, after))
    )


def _on_what(results: Results, after: Draft, new: Acceptance) -> str:
    documents = new.documents or after.found.get("documents") or results.verification.get("num_prompts")
    target = _setting(results, "target", "path")
    parts_ = [f", target {last_part(target)}" if target else ""]
    parts_ += [f", {documents:,} held-out conversations" if documents else ""]
    source = _setting(results, "prompts", "path")
    if isinstance(source, str):
        parts_ += [f" of {last_part(source)}"]
    return "".join(parts_)


def _progress(results: Results) -> Markup:
    """What a training run that was not evaluated says for itself."""
    losses = [
        (row["step"], row["train/loss"]) for row in results.metrics if row.get("train/loss") is not None
    ]
    if not losses:
        return Markup("")
    return paragraph(f"Trained for {losses[-1][0]:,} steps, loss {losses[0][1]:.3f} to {losses[-1][1]:.3f}.")


def _highlights(results: Results, before: Draft | None, after: Draft) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    greedy = after.found.get("greedy")
    if greedy:
        differ = greedy["different"]
        found.append(
            (
                "unchanged" if differ == 0 else f"{differ} differ",
                "greedy output with the draft",
                f"{greedy['equal']} of {greedy['requests']} equal, {greedy['ties']} diverge at a tie",
            )
        )
    runs = results.serving.get("runs", [])
    best = max((r for r in runs if r["draft"] != runs[0]["draft"]), key=lambda r: r["ratio"], default=None)
    if best:
        one = f"{best['draft']} over {runs[0]['draft']}, {best['concurrency']} at a time"
        found.append((f"{best['ratio']:.2f} x", "tokens a second over HTTP", one))
    K = _drafts(after)
    for temperature in sorted({a.temperature for a in after.by_num_steps} - {0.0}):
        new, old = after.at(K, temperature), before and before.at(K, temperature)
        if new:
            value = f"{old.length:.2f} → {new.length:.2f}" if old else f"{new.length:.2f}"
            found.append((value, f"at temperature {temperature:g}", f"tokens a step, {K} draft tokens"))
    name = next((n for n in ("best", "last") if n in results.offline), None)
    if name and results.served:
        new_offline, old_offline = results.offline[name], results.offline.get(BEFORE)
        old_text = f"{old_offline.found['acceptance_length']:.2f} → " if old_offline else ""
        value = f"{old_text}{new_offline.found['acceptance_length']:.2f}"
        tokens = new_offline.found.get("tokens")
        found.append(
            (value, "offline evaluator", f"on {tokens:,} stored tokens" if tokens else "stored answers")
        )
    return found


def _by_steps(drafts: Iterable[Draft], where: str) -> list[Markup]:
    """The K curve, a figure for each temperature."""
    drafts = list(drafts)
    temperatures = sorted({a.temperature for d in drafts for a in d.by_num_steps})
    return [
        lines(
            f"Acceptance length by draft tokens, {where}, {_decoding(t)}",
            "draft tokens K",
            "tokens a step",
            [
                Series(
                    d.name,
                    sorted((float(a.num_steps), *a.point) for a in d.by_num_steps if a.temperature == t),
                )
                for d in drafts
            ],
            text=lambda value: f"{value:.2f}",
            whole=True,
        )
        for t in temperatures
    ]


def _steps_table(drafts: Iterable[Draft], where: str) -> Markup:
    drafts = list(drafts)
    keys = sorted({(a.temperature, a.num_steps) for d in drafts for a in d.by_num_steps})
    rows = [
        [f"{_decoding(t)}, {K}", *(_span(found) if (found := d.at(K, t)) else None for d in drafts)]
        for t, K in keys
    ]
    return table(
        f"Acceptance length, {where}, by draft tokens", ["decoding, K", *(d.name for d in drafts)], rows
    )


def _positions(drafts: Sequence[Draft], where: str) -> Markup:
    width = max((len(d.positions) for d in drafts), default=0)
    return bars(
        f"Accepted by draft position, {where}, greedy",
        "draft position",
        "share of drafts",
        [str(k + 1) for k in range(width)],
        {d.name: [*d.positions, *[None] * (width - len(d.positions))] for d in drafts},
        text=percent,
    )


def acceptance(results: Results) -> Markup:
    """The K curve and positions, served and offline."""
    pieces: list[Markup] = []
    for drafts, where in ((results.served, "served in vLLM"), (results.offline, "offline")):
        each = list(drafts.values())
        if each:
            pieces += [
                _figures(*_by_steps(each, where), _positions(each, where)),
                details(f"The figures, {where}", _steps_table(each, where)),
            ]
    pieces.append(_costs(results.served.values()))
    if pieces and any(a.low is not None for d in results.served.values() for a in d.by_num_steps):
        pieces.insert(0, paragraph("Bands hold 95 % of bootstrap samples of conversations.", "note"))
    return join(pieces)


def _costs(drafts: Iterable[Draft]) -> Markup:
    """What each draft costs a server."""
    keys = (
        ("parameters read for a draft token", "parameters_read", 1e6, "M"),
        ("of them in the head", "head_parameters_read", 1e6, "M"),
        ("size of the draft", "bytes", 2**20, "MiB"),
    )
    there = [d for d in drafts if all(key in d.found for _, key, _, _ in keys)]
    rows = [[name, *(f"{d.found[key] / unit:,.1f} {sign}" for d in there)] for name, key, unit, sign in keys]
    return table("What a draft costs a server", ["", *(d.name for d in there)], rows if there else [])


def _grouped(drafts: Iterable[Draft], key: str, title: str, num_steps: int) -> list[Markup]:
    """A figure for each temperature: a row for each source or length, with K draft tokens."""
    found = {d.name: getattr(d, key) for d in drafts}
    figures = []
    for temperature in sorted({a.temperature for rows in found.values() for a in rows}):
        here = {n: [a for a in rows if a.temperature == temperature] for n, rows in found.items()}
        Ks = {a.num_steps for rows in here.values() for a in rows}
        K = num_steps if num_steps in Ks else max(Ks)
        sizes: dict[str, int] = {}
        values: dict[str, dict[str, tuple[float, ...]]] = {}
        for name, all_ in here.items():
            for a in (a for a in all_ if a.num_steps == K):
                values.setdefault(a.group, {})[name] = a.point
                sizes[a.group] = max(sizes.get(a.group, 0), a.documents or 0)
        if len(values) < 2:
            continue  # the whole says the same
        kept = sorted(values, key=lambda group: -sizes[group])[:MOST_GROUPS]
        rows = [
            (f"{group} ({sizes[group]:,} documents)" if sizes[group] else group, values[group])
            for group in values
            if group in kept
        ]
        most = f", the {len(kept)} largest of {len(values)}" if len(kept) < len(values) else ""
        name = f"{title}, {K} draft tokens, {_decoding(temperature)}{most}"
        figures.append(ranges(name, "tokens a step", rows, text=lambda value: f"{value:.2f}"))
    return figures


def kinds(results: Results) -> Markup:
    """By source and by length."""
    after = _pair(results)[1]
    K = _drafts(after) if after else 0
    return _figures(
        *(
            figure
            for drafts, where in ((results.served, "served"), (results.offline, "offline"))
            for key, what in (("by_source", "By source"), ("by_length", "By length of the document"))
            for figure in _grouped(drafts.values(), key, f"{what}, {where}", K)
        )
    )


def speedup(results: Results) -> Markup:
    """Expected speed for each K of every draft, and what to serve with; the headline's draft first."""
    after = _pair(results)[1]
    drafts = {d.name: d for d in (after, *results.served.values()) if d and d.found.get("speedup")}
    return (
        join(
            paragraph(str(said), "" if place else "advice")
            for place, draft in enumerate(drafts.values())
            if (said := draft.found.get("recommendation"))
        )
        + _figures(*(_speed(draft) for draft in drafts.values()))
        + details("The figures", join(_speed_table(draft) for draft in drafts.values()))
    )


def _speed(draft: Draft) -> Markup:
    rows = draft.found["speedup"]
    series = [
        Series(
            f"{n:,} request{'s' if n != 1 else ''} at a time",
            sorted((float(r["num_steps"]), float(r["speedup"])) for r in rows if r["concurrency"] == n),
        )
        for n in sorted({row["concurrency"] for row in rows})
    ]
    return lines(
        f"Expected speed with the {draft.name} draft, over decoding without one",
        "draft tokens K",
        "times as fast",
        series,
        text=lambda value: f"{value:.2f}",
        whole=True,
    )


def _speed_table(draft: Draft) -> Markup:
    rows = draft.found["speedup"]
    Ks = sorted({r["num_steps"] for r in rows})
    by_place = {(r["concurrency"], r["num_steps"]): f"{r['speedup']:.2f}" for r in rows}
    cells = [
        [f"{n:,} at a time", *(by_place.get((n, K)) for K in Ks)]
        for n in sorted({row["concurrency"] for row in rows})
    ]
    title = f"Times as fast as without a draft, {draft.name}"
    return table(title, ["", *(f"K = {K}" for K in Ks)], cells)


def serving(results: Results) -> Markup:
    """Speed over HTTP, by `bench-serve`."""
    runs = results.serving.get("runs", [])
    if not runs:
        return Markup("")
    drafts = list(dict.fromkeys(r["draft"] for r in runs))
    places = list(dict.fromkeys(r["concurrency"] for r in runs))
    by_place = {(r["draft"], r["concurrency"]): r for r in runs}

    def column(draft: str, key: str) -> list[float | None]:
        return [by_place.get((draft, n), {}).get(key) for n in places]

    figures = [
        bars(title, "requests at a time", y, [f"{n:,}" for n in places], {d: column(d, key) for d in drafts})
        for title, y, key in (
            ("Speed over HTTP", "tokens a second", "output_tokens_per_second"),
            ("Time for a token, of one request", "milliseconds", "mean_ms_per_token"),
        )
    ]
    rows = [
        [
            f"{r['draft']}, {r['concurrency']} at a time",
            f"{r['output_tokens_per_second']:,.1f}",
            f"{r['mean_ms_per_token']:.1f}",
            f"{r['acceptance_length']:.2f}" if "acceptance_length" in r else None,
            f"{r['ratio']:.2f}",
        ]
        for r in runs
    ]
    header = ["draft", "tokens a second", "ms a token", "acceptance length", f"x {drafts[0]}"]
    number_ = results.serving.get("num_prompts")
    note = f"By vLLM's own serving benchmark, greedy, {number_:,} held-out conversations." if number_ else ""
    return paragraph(note, "note") + _figures(*figures) + table("Speed over HTTP", header, rows)


def _marked(tokens: Sequence[dict[str, str]]) -> Markup:
    """An answer, each token in the mark of what became of it."""
    pieces = []
    for token in tokens:
        kind = token["kind"] if token["kind"] in KINDS else "own"
        text = token["text"] or "◌"  # part of a letter that a later token completes
        if kind == "rejected":
            # white space that is struck out would not be seen
            text = text.replace("\n", "⏎").replace("\t", "⇥")
            text = text.replace(" ", "␣") if not text.strip() else text
        name = "del" if kind == "rejected" else "span"
        pieces.append(Markup('<{0} class="{1}">{2}</{0}>').format(Markup(name), kind, text))
    return join(pieces)


def answers(results: Results) -> Markup:
    """Held-out answers with each token marked, before beside after."""
    samples = results.verification.get("samples") or []
    if not samples:
        return Markup("")
    legend = Markup('<ul class="marks">{}</ul>').format(
        join(Markup('<li><span class="{0}">{0}</span> {1}</li>').format(kind, says) for kind, says in LEGEND)
    )
    pieces = [
        paragraph(
            "Held-out answers as the server wrote them, greedy. A refused token stands before the one that"
            " the target put in its place."
        )
        + legend
    ]
    for place, sample in enumerate(samples):
        sides = []
        for name, tokens in sample["drafts"].items():
            counts = {kind: sum(t["kind"] == kind for t in tokens) for kind in KINDS}
            written = counts["accepted"] + counts["own"]
            share = f"{counts['accepted'] / written:.0%} of {written:,} tokens drafted" if written else ""
            sides.append(
                Markup(
                    '<div class="side"><h4>{} <span>{}</span></h4><p class="answer" tabindex="0">{}</p></div>'
                ).format(name, share, _marked(tokens))
            )
        source = f" ({sample['source']})" if sample.get("source") else ""
        pieces.append(
            Markup(
                '<h3>Conversation {}{}</h3><p class="prompt" tabindex="0">{}</p><div class="sides">{}</div>\n'
            ).format(place + 1, source, sample["prompt"], join(sides))
        )
    return join(pieces)


def _curves(rows: list[dict[str, Any]], title: str, y: str, names: dict[str, str], **options: Any) -> Markup:
    """One figure of some metrics over optimizer steps; empty where none of them was recorded."""
    series = [
        Series(label, [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)])
        for name, label in names.items()
    ]
    return lines(title, "optimizer step", y, series, **options)


def _numbered(rows: list[dict[str, Any]], prefix: str) -> dict[str, str]:
    """Metrics of this prefix that end in a number, by it."""
    ends = {name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)}
    return {f"{prefix}{end}": end for end in sorted((e for e in ends if e.isdigit()), key=int)}


def training(results: Results) -> Markup:
    """Loss, agreement, acceptance, learning rate, load of the experts, speed."""
    rows = results.metrics
    if not rows:
        return Markup("")
    top1 = {k: f"draft step {n}" for k, n in _numbered(rows, "train/top1_pos").items()}
    position = {k: f"position {n}" for k, n in _numbered(rows, "evaluate/acceptance_").items()}
    idle = [row["moe/idle_experts"] for row in rows if "moe/idle_experts" in row]
    skipped = max((row.get("train/skipped_steps") or 0 for row in rows), default=0)
    notes = []
    if idle and not any(idle):
        notes.append("Every expert was used in every step.")
    if skipped:
        notes.append(f"{skipped} steps were skipped, for their gradients were not all finite.")
    return _figures(
        _curves(rows, "Loss", "loss a prediction", {"train/loss": "loss"}),
        _curves(
            rows,
            "Draft and target agree on the most likely token",
            "share of predictions",
            top1,
            text=percent,
        ),
        _curves(
            rows,
            "Acceptance length on held-out documents, offline",
            "tokens a step",
            {"evaluate/acceptance_length": "acceptance length"},
            text=lambda value: f"{value:.2f}",
        ),
        _curves(
            rows,
            "Accepted by position on held-out documents, offline",
            "share of drafts",
            position,
            text=percent,
        ),
        _curves(rows, "Learning rate", "learning rate", {"train/lr": "learning rate"}, from_zero=True),
        _curves(rows, "Gradient norm, before clipping", "norm", {"train/grad_norm": "norm"}, from_zero=True),
        _curves(
            rows,
            "Load of the experts: the busiest one over the mean",
            "times the mean",
            {"moe/max_over_mean": "busiest expert"},
        ),
        _curves(rows, "Experts without a token in a step", "experts", {"moe/idle_experts": "idle"})
        if any(idle)
        else Markup(""),
        _curves(rows, "Speed", "tokens a second", {"perf/tok_s": "tokens a second"}, from_zero=True),
        _split(rows),
    ) + (paragraph(" ".join(notes), "note") if notes else Markup(""))


def _timed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that say how long they took."""
    keys = ("perf/tok_s", "train/tokens", "data/wait_frac")
    return [
        row for row in rows if all(isinstance(row.get(k), int | float) for k in keys) and row[keys[0]] > 0
    ]


SPLIT = {"forward": "forward", "backward": "backward", "optimizer": "optimizer and exchange"}


def _split(rows: list[dict[str, Any]]) -> Markup:
    """Where the time of the steps went, all steps together."""
    steps = _timed(rows)
    if not steps:
        return Markup("")
    seconds = [row["train/tokens"] / row["perf/tok_s"] for row in steps]
    waited = sum(row["data/wait_frac"] * s for row, s in zip(steps, seconds, strict=True))
    shares = {"waiting for the store": waited}
    for part, label in SPLIT.items():
        if spent := sum(row.get(f"perf/{part}_s", 0.0) for row in steps):
            shares[label] = spent
    total = sum(seconds)
    shares["the rest" if len(shares) > 1 else "computing"] = max(0.0, total - sum(shares.values()))
    return parts(
        "Where the time of a step goes",
        f"{len(steps):,} steps, {_duration(total)} in all",
        shares,
        lambda s: _duration(s / len(steps)),
    )


def selection(results: Results) -> Markup:
    """How good the sparse attention's choice of keys is, and how far training has moved it."""
    pieces = []
    for name, draft in results.offline.items():
        found = draft.found.get("selection") or {}
        rows = found.get("by_length", [])
        if not rows:
            continue
        if found.get("warning"):
            pieces.append(paragraph(f"{name}: {found['warning']}", "warning"))
        lengths = list(dict.fromkeys(row["length"] for row in rows))

        def curves(key: str, rows: list[dict[str, Any]] = rows, lengths: list[str] = lengths) -> list[Series]:
            return [
                Series(f"{n} tokens", [(row["step"], row[key]) for row in rows if row["length"] == n])
                for n in lengths
            ]

        pieces.append(
            _figures(
                *(
                    lines(f"{title} ({name})", "draft step", y, curves(key), text=percent, whole=True)
                    for key, title, y in (
                        ("mass_over_best", "Attention that the kept keys hold", "of the best choice's"),
                        ("recall", "Best keys that are kept", "share of keys"),
                        ("overlap", "Keys that the released layer keeps too", "share of keys"),
                    )
                )
            )
        )
        header = ["length, draft step", "queries", "mass over best", "released", "recall", "overlap"]
        cells = [
            [f"{row['length']}, {row['step']}", f"{row['queries']:,}"]
            + [percent(row[k]) for k in ("mass_over_best", "released_mass_over_best", "recall", "overlap")]
            for row in rows
        ]
        pieces.append(details(f"The figures, {name}", table(f"Choice of keys, {name}", header, cells)))
    if pieces:
        said = (
            "The indexer keeps a fixed number of keys for each query of a long document. Mass is the"
            " attention's own weight on them, best that on equally many of its largest places."
        )
        pieces.insert(0, paragraph(said, "note"))
    return join(pieces)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes / 60:.1f} h"


def _size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def data(results: Results) -> Markup:
    """What was captured, kept and rejected; loops in the answers."""
    pieces: list[Markup] = []
    if held := results.held_out:
        apart, rest = held["held_out_documents"], held["training_documents"]
        pieces.append(paragraph(f"{apart:,} documents are held out, {rest:,} are trained on."))
    names = (
        ("captured_documents", "captured"),
        ("kept_documents", "kept of an earlier start"),
        ("rejected_documents", "rejected"),
        ("captured_tokens", "tokens captured"),
    )
    rows = [
        [
            "all" if len(results.dumps) == 1 else file.removesuffix(".json"),
            *(f"{one[key]:,}" if isinstance(one.get(key), int) else None for key, _ in names),
            percent(one["loop_share"]) if isinstance(one.get("loop_share"), float) else None,
            percent(one["occupancy"]) if isinstance(one.get("occupancy"), float) else None,
        ]
        for file, one in results.dumps.items()
    ]
    header = ["documents", *(name for _, name in names), "answers in loops", "engine busy"]
    pieces.append(table("Conversations of the last start", header, rows))
    loops = [
        [source, percent(share)]
        for one in results.dumps.values()
        for source, share in (one.get("loop_share_by_source") or {}).items()
        if share is not None
    ]
    pieces.append(table("Tokens of answers that go round in circles", ["source", "share"], loops))
    reasons = [[reason, f"{n:,}"] for reason, n in results.rejects.most_common(12)]
    pieces.append(table("Why conversations were left out", ["reason", "conversations"], reasons))
    return join(pieces)


def stages(results: Results) -> Markup:
    """Time and bytes of each stage."""
    found = results.summary.get("stages", {})
    note = ""
    if not found:
        steps = _timed(results.metrics)
        found = {
            file.removesuffix(".json"): {"seconds": one["seconds"], "bytes": one.get("bytes", 0)}
            for file, one in results.dumps.items()
            if "seconds" in one
        }
        if steps:
            seconds = sum(row["train/tokens"] / row["perf/tok_s"] for row in steps)
            found["train"] = {"seconds": seconds, "bytes": 0}
        note = "Of a dump its last start; of training the steps alone." if found else ""
    if not found:
        return Markup("")
    total = sum(one["seconds"] for one in found.values())
    rows = [
        [name, _duration(one["seconds"]), _size(one["bytes"]) if one["bytes"] else None]
        for name, one in found.items()
    ]
    rows.append(["all", _duration(total), None])
    if peak := results.summary.get("peak_rss_bytes"):
        note = f"At most {_size(peak)} of memory at a time, all processes together."
    return (
        (paragraph(note, "note") if note else Markup(""))
        + _figures(
            parts(
                "Time by stage",
                f"{_duration(total)} in all",
                {name: one["seconds"] for name, one in found.items()},
                _duration,
            )
        )
        + table("Stages", ["stage", "time", "on disk"], rows)
    )


def environment(results: Results) -> Markup:
    """Settings, versions, hardware."""
    found = next((one for one in (results.summary, results.serving) if one.get("versions")), None)
    where = "" if found else ", where this page was made"
    found = found or collect()
    gpus = Counter(found.get("gpus") or [])
    found = found | {"gpus": ", ".join(f"{n} x {name}" for name, n in gpus.items())}
    machine = [
        [name, str(found[key])]
        for key, name in (
            ("gpus", "GPUs"),
            ("machine", "processor"),
            ("cpu_count", "cores"),
            ("system", "system"),
            ("commit", "commit"),
            ("time", "finished"),
        )
        if found.get(key)
    ]
    versions = [[name, version] for name, version in found["versions"].items()]
    return (
        table(f"Machine{where}", ["", ""], machine)
        + table(f"Versions{where}", ["package", "version"], versions)
        + join(
            details(name, Markup('<pre tabindex="0">{}</pre>').format(text))
            for name, text in results.settings.items()
        )
    )


SECTIONS = (
    ("acceptance", "Acceptance", acceptance),
    ("kinds", "Kinds of text", kinds),
    ("speed", "Which K to serve with", speedup),
    ("answers", "Answers, token by token", answers),
    ("http", "Over HTTP", serving),
    ("training", "Training", training),
    ("selection", "Sparse attention's choice", selection),
    ("data", "The data", data),
    ("stages", "Stages", stages),
    ("settings", "Settings, versions, machine", environment),
)
