"""The report: what it says, and how it looks in a browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from configs.files import write_json
from pipeline import report
from tests import browser

PROMPT = "Why is <script>alert(1)</script> & more escaped?"
GREEDY = {"requests": 8, "equal": 7, "ties": 1, "different": 0}


def rows(lengths: list[float], **more: str) -> list[dict[str, Any]]:
    """As evaluate and verify write acceptance, at two temperatures."""
    return [
        {"num_steps": K + 1, "temperature": t, "acceptance_length": length - t / 10}
        | {"low": length - t / 10 - 0.1, "high": length - t / 10 + 0.1, "tokens": 900, "documents": 8, **more}
        for t in (0.0, 1.0)
        for K, length in enumerate(lengths)
    ]


def draft(shares: list[float]) -> dict[str, Any]:
    lengths = [1 + sum(shares[: k + 1]) for k in range(len(shares))]
    return {
        "acceptance_length": lengths[-1],
        "acceptance_per_position": shares,
        "num_speculative_tokens": 2,
        "greedy": GREEDY,
        "by_num_steps": rows(lengths),
        "by_source": rows(lengths, source="code") + rows(lengths, source="a name of a source that is long"),
        "by_length": rows(lengths, length="1-256") + rows(lengths, length="257-512"),
    }


def tokens(*found: tuple[str, str]) -> list[dict[str, str]]:
    return [{"text": text, "kind": kind} for text, kind in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has everything a report can show."""
    run = tmp_path_factory.mktemp("report") / "run"
    run.mkdir()
    released, trained = draft([0.5, 0.25, 0.1]), draft([0.8, 0.7, 0.5])
    cost = {"parameters_read": 10**7, "head_parameters_read": 10**6, "bytes": 2**21}
    trained |= cost | {
        "speedup": [
            {"num_steps": K, "concurrency": n, "speedup": 1 + K / 10 - n / 40}
            for K in (1, 2, 3)
            for n in (1, 16)
        ]
    }
    slow = [{"num_steps": 1, "concurrency": 1, "speedup": 0.8}]
    released |= {"speedup": slow, "recommendation": "Serve without the released draft."}
    refused = tokens(("yes", "accepted"), ("\n", "rejected"), (" no", "own"))
    samples = [
        {"uid": "7", "source": "code", "prompt": PROMPT}
        | {"drafts": {"released": refused, "trained": tokens(("yes", "accepted"), (" no", "accepted"))}}
    ]
    drafts = {"released": released | cost, "trained": trained}
    said = {"drafts": drafts, "before": released, "after": trained, "samples": samples}
    write_json(run / "verify.json", said | {"recommendation": "Serve with 2 draft tokens."})
    choice = {"queries": 9, "mass_over_best": 0.91, "released_mass_over_best": 0.93, "recall": 0.7}
    rows_ = [{"length": "257-512", "step": step, "overlap": 0.8, **choice} for step in (1, 2)]
    trained["selection"] = {"by_length": rows_, "warning": "training has moved the choice"}
    for name, found in (("best", trained), ("released", released)):
        write_json(run / f"evaluate.{name}.json", found | {"format": 2, "tokens": 900, "documents": 8})
    speed = {"output_tokens_per_second": 1000.0, "mean_ms_per_token": 6.7, "ratio": 1.0}
    runs = [{"draft": d, "concurrency": n, **speed} for d in ("none", "/drafts/trained") for n in (1, 16)]
    runs[3] |= {"ratio": 1.75, "acceptance_length": 2.5}
    write_json(run / "serving.json", {"runs": runs, "num_prompts": 8})
    dump = {"captured_documents": 90, "rejected_documents": 2, "loop_share": 0.03, "seconds": 12.0}
    write_json(run / "dump.json", dump | {"loop_share_by_source": {"code": 0.0312, "given": None}})
    reasons = [{"reason": f"the answer has {n} tokens, too long"} for n in (600, 700)]
    (run / "rejects.jsonl").write_text("".join(json.dumps(reason) + "\n" for reason in reasons))
    lines = [
        {"step": step, "train/loss": 1 / step, "train/lr": 1e-4, "train/tokens": 100, "perf/tok_s": 50.0}
        | {"train/top1_pos1": 0.5, "train/top1_pos2": 0.4, "train/grad_norm": 1.0, "data/wait_frac": 0.25}
        | {"perf/forward_s": 0.5, "perf/backward_s": 0.6, "perf/optimizer_s": 0.2}
        | {"moe/max_over_mean": 1.5, "moe/idle_experts": step % 2, "evaluate/acceptance_length": 2.0}
        | {"evaluate/acceptance_1": 0.6, "evaluate/acceptance_2": 0.4}
        for step in range(1, 400)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = {"seconds": 60.0, "bytes": 2**20}
    write_json(
        run / "summary.json",
        {"stages": {"dump": cost, "train": cost}, "peak_rss_bytes": 2**30, "versions": {"torch": "2.13.0"}},
    )
    write_json(run / "config.dump.json", {"target": {"path": "/models/DeepSeek-V3.2"}})
    report.write(run)
    return run


@pytest.fixture(scope="module")
def text(whole: Path) -> str:
    return (whole / "report.html").read_text()


def test_the_headline_says_before_after_by_how_much_and_on_what(text):
    head = text[text.index("<header>") : text.index("</header>")]
    for said in ("1.75 → 2.50", "+43%", "2 draft tokens, greedy", "DeepSeek-V3.2", "8 held-out"):
        assert said in " ".join(head.split())
    assert "Serve with 2 draft tokens." in head
    assert "1.75 x" in head  # the best ratio over HTTP
    assert "/models" not in head


def test_the_speed_to_expect_is_shown_for_every_draft(text):
    for name in ("trained", "released"):
        assert f"<figcaption>Expected speed with the {name} draft" in text
    assert "<p>Serve without the released draft.</p>" in text


def test_tokens_are_marked_by_what_became_of_them(text):
    assert '<del class="rejected">⏎</del><span class="own"> no</span>' in text
    assert '<span class="accepted">yes</span><span class="accepted"> no</span>' in text
    assert "50% of 2 tokens drafted" in text
    assert "100% of 2 tokens drafted" in text


def test_text_of_others_is_no_markup(text):
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


def test_sources_are_told_apart(text):
    for cells in (("code", "3.1%"), ("greedy, 2", "1.75 (1.65 to 1.85)", "2.50 (2.40 to 2.60)")):
        row = Markup('<th scope="row">{}</th>').format(cells[0])
        assert row + Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells[1:]) in text
    assert "a name of a source that is long (8 documents), released: 1.75 (1.65 to 1.85)" in text


def test_speed_over_http_is_shown_for_each_draft_and_number_of_requests(text):
    assert (
        '<th scope="row">trained, 16 at a time</th><td>1,000.0</td><td>6.7</td><td>2.50</td><td>1.75' in text
    )
    assert "/drafts" not in text


def test_the_time_of_a_step_is_split(text):
    for part in ("waiting for the store: 500 ms (25%)", "backward: 600 ms (30%)", "the rest: 200 ms"):
        assert part in text


def test_what_sparse_attention_keeps_is_shown_with_its_warning(text):
    assert '<p class="warning">best: training has moved the choice</p>' in text
    assert '<th scope="row">257-512, 2</th><td>9</td><td>91%</td><td>93%</td><td>70%</td><td>80%' in text


def test_reasons_are_counted_without_their_numbers(text):
    assert '<th scope="row">the answer has … tokens, too long</th><td>2</td>' in text


def test_a_run_of_an_earlier_version_is_shown_without_what_it_lacks(tmp_path):
    shares = {"acceptance_length": 1.75, "acceptance_per_position": [0.5, 0.25]}
    better = {"acceptance_length": 2.0, "acceptance_per_position": [0.6, 0.4]}
    write_json(tmp_path / "verify.json", {"before": shares, "after": better})
    page = report.write(tmp_path).read_text()
    assert "1.75 → 2.00" in page
    # with one draft token, from the shares
    assert "draft tokens K 1: 1.60" in page
    for absent in ("Answers, token by token", "Which K to serve with", "Training", "None", "nan"):
        assert absent not in page


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Page]:
    program = browser.installed()
    if program is None:
        pytest.skip("no Chromium is installed: .ci/run installs one where it can")
    with browser.running(program) as page:
        yield page


# figures, and those that are not seen: without size, or beyond the edge of the window
FIGURES = """[...document.querySelectorAll('figure > svg, table')].map(e => {
  const box = e.getBoundingClientRect();
  const wide = e.tagName == 'svg' && box.right > document.documentElement.clientWidth;
  const name = e.getAttribute('aria-label') || e.innerText.slice(0, 40);
  return [name, box.width > 40 && box.height > 20 && !wide];
})"""
# texts whose colour is hard to tell from what is behind them: WCAG's contrast below 4.5
FAINT = """(() => {
  const rgb = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = colour => {
    const [r, g, b] = rgb(colour).slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, [, , , opaque = 1] = rgb(colour);
      if (opaque == 1) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const says = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
  const faint = e => {
    const style = getComputedStyle(e);
    const a = light(e instanceof SVGElement ? style.fill : style.color), b = light(behind(e));
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
  };
  const all = [...document.querySelectorAll('body *:not(desc, title)')];
  return all.filter(e => says(e) && faint(e)).map(e => e.outerHTML.slice(0, 120));
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_every_figure_is_seen_in_a_browser(tab, whole, width, dark):
    tab.open(whole / "report.html", width=width, dark=dark)
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    tab.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    figures = tab.value(FIGURES)
    assert len(figures) > 30
    assert [name for name, seen in figures if not seen] == []
    assert tab.value("document.documentElement.scrollWidth") <= width
    # letters of a figure, as they are shown
    height = "e => e.getBoundingClientRect().height"
    assert tab.value(f"Math.min(...[...document.querySelectorAll('svg .tick')].map({height}))") > 10
    assert tab.value(FAINT) == []
    assert tab.complaints() == []
    assert tab.fetched() == [(whole / "report.html").as_uri()]
