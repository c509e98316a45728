"""Offline acceptance beside vLLM's, on the same text: `python -m benchmarks.acceptance [--draft DIR]`.

One engine answers the held-out conversations, every turn of them, with 1 to K draft tokens a step, greedy
and, twice, sampled. What it wrote is captured as it stands, and the offline evaluator says from the stored
states how much of the drafts it would have accepted; verify's estimates from the numbers it serves stand
beside both.

Prints a table and, as its last line, one JSON object; fails where the two differ by more than the bound, or
where one lies outside the other's interval.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.dump import settings
from configs.acceptance import tables
from configs.held_out import is_held_out, uid_group
from configs.provenance import versions
from configs.schema import PromptsConfig, TrainConfig
from configs.target import target_config
from featurestore import FeatureStore, open_store, publish
from pipeline.capture.session import Session
from pipeline.measure import measure
from pipeline.parts import Part
from pipeline.prompts import Document, Prompts, load_prompts
from pipeline.replay import served_counts
from pipeline.verify import answer_room, engine_arguments, job_of, speculating
from pipeline.view import make_view
from train import evaluate
from train.draft import Draft
from train.model import load_layer

BOUNDS = {0: 0.03, 1: 0.05}  # by temperature
LENGTH, ANSWER, SEQUENCES = 512, 256, 128
HELD_OUT = 0.08  # of the conversations; the demo's target was not trained on these
SAMPLES = 2  # sampled answers are shorter
SERVED = 3  # what verify serves beside the greatest number


def questions(target: Path) -> tuple[Prompts, list[list[int]]]:
    """Every turn of the held-out conversations up to where its answer begins."""
    config = PromptsConfig(path=Path("data/conversations.jsonl"), answers="given", max_length=LENGTH)
    prompts = load_prompts(config, target)
    documents = prompts.documents
    chosen = np.flatnonzero(is_held_out(uid_group(documents.uids), HELD_OUT, 0))
    asked = [
        documents[int(i)].input_ids[:start].tolist()
        for i in chosen
        for start, _ in documents[int(i)].spans
        if start <= LENGTH - ANSWER
    ]
    return prompts, asked


def serve(
    target: Path, draft: Path | None, asked: list[list[int]], num_steps_max: int, folder: Path
) -> dict[str, Any]:
    """What one engine answers with 1 to `num_steps_max` draft tokens, as `pipeline.measure.measure`."""
    config = target_config(target)
    job = job_of(asked, config, answer_room(asked, config, ANSWER, "v3"))
    views = [make_view(p, folder / f"view-{n}") for n, p in enumerate((target, draft)) if p is not None]
    engine = engine_arguments(job, config, 1, {"max_num_seqs": SEQUENCES}) | {"model": str(views[0])}
    engine |= speculating(views[1] if draft else None, num_steps_max)
    rounds = list(range(1, num_steps_max + 1))
    asks = {"rounds": rounds, "temperature": 1, "top_p": 1, "samples": SAMPLES, "marked": 0, "logits": None}
    return measure("draft", {**job, **asks, "engine": engine, "log": str(folder / "engine.log")})


class Text:
    """Served answers as documents, the same one only once.

    Args:
        asked: the prompts.
    """

    def __init__(self, asked: list[list[int]]) -> None:
        self._asked = asked
        self._uids: dict[tuple[int, ...], int] = {}
        self.documents: list[Document] = []

    def add(self, outputs: list[list[int]]) -> list[int]:
        """Uids of the prompts with these answers."""
        found = []
        for prompt, answer in zip(itertools.cycle(self._asked), outputs, strict=False):
            key = (len(prompt), *prompt, *answer)
            if key not in self._uids:
                uid = self._uids[key] = len(self._uids) + 1 << 32
                ids = np.array(prompt + answer, np.uint32)
                spans = ((len(prompt), len(ids)),)
                line = len(self.documents)
                self.documents.append(Document(uid, ids, spans, 0, str(uid), line, "served", "served"))
            found.append(self._uids[key])
        return found


def capture(target: Path, prompts: Prompts, documents: list[Document], folder: Path) -> FeatureStore:
    """The target's states of these texts, through the engine of stage one."""
    engine = settings(target, folder, prompts, SEQUENCES)
    session = Session(engine, None, np.zeros(0, np.uint32))
    try:
        rejected = [result for result in session.run([Part("served", tuple(documents))]) if result.bad]
    finally:
        session.close(20)
    assert not rejected, rejected
    publish(engine.store)
    return open_store(engine.store)


def offline(
    target: Path, draft: Path | None, store: FeatureStore, uids: list[int], drafts: int, temperature: int
) -> dict[str, Any]:
    """The evaluator's figure of these documents at one number of draft tokens."""
    layer = load_layer(target, weights=draft, dtype=torch.float32)
    place = {int(uid): number for number, uid in enumerate(store.uid)}
    found = evaluate.measure(
        Draft(layer, TrainConfig(dtype="float32")),
        store,
        np.array([place[uid] for uid in uids]),
        drafts,
        text_temperature=1,
        aux_layers=layer.aux_layers,
        tokens_per_batch=4096,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rows = ((row["num_steps"], row["temperature"], row) for row in found["by_num_steps"])
    return next(row for k, t, row in rows if (k, t) == (drafts, temperature))


def compare(
    name: str, target: Path, draft: Path | None, args: argparse.Namespace, folder: Path
) -> list[dict]:
    """An entry for each number of draft tokens and temperature: served, offline, estimated."""
    folder.mkdir()
    prompts, asked = questions(target)
    asked = asked[: args.turns]
    served = serve(target, draft, asked, args.num_steps, folder)
    text, found = Text(asked), []
    kinds = {0: "greedy", 1: "sampled"}
    uids = {
        (r["num_steps"], t): text.add(r[kind]["outputs"])
        for r in served["rounds"]
        for t, kind in kinds.items()
    }
    store = capture(target, prompts, text.documents, folder / "capture")
    for temperature, kind in kinds.items():
        answers = {r["num_steps"]: r[kind] for r in served["rounds"]}
        counts = served_counts(answers, args.num_steps)
        few = {k: answers[k] for k in {min(SERVED, args.num_steps), args.num_steps}}
        tokens = np.array([[len(a) for a in r[kind]["outputs"]] for r in served["rounds"]])
        labels = [tokens[0], [""] * tokens.shape[1], [1] * tokens.shape[1]]
        rows, estimated = (
            tables(c[:, None], [temperature], *labels)["by_num_steps"]
            for c in (counts, served_counts(few, args.num_steps))
        )
        for row, estimate in zip(rows, estimated, strict=True):
            drafts = row["num_steps"]
            ours = offline(target, draft, store, uids[drafts, temperature], drafts, temperature)
            difference = ours["acceptance_length"] - row["acceptance_length"]
            inside = (
                row["low"] <= ours["acceptance_length"] <= row["high"]
                and ours["low"] <= row["acceptance_length"] <= ours["high"]
            )
            found.append(
                {
                    "draft": name,
                    "num_steps": drafts,
                    "temperature": temperature,
                    "tokens": int(tokens[drafts - 1].sum()),
                    "documents": tokens.shape[1],
                    "vllm": {k: row[k] for k in ("acceptance_length", "low", "high")},
                    "offline": {k: ours[k] for k in ("acceptance_length", "low", "high")},
                    "difference": difference,
                    "estimated_by_verify": estimate["acceptance_length"],
                    "met": abs(difference) <= BOUNDS[temperature] and inside,
                }
            )
    return found


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Acceptance length: vLLM, and offline on the text it wrote", title_justify="left")
    for column in (
        "draft",
        "temperature",
        "draft tokens",
        "vLLM",
        "offline",
        "difference",
        "verify's estimate",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        both = [
            f"{x['acceptance_length']:.3f} ({x['low']:.3f} to {x['high']:.3f})"
            for x in (row["vllm"], row["offline"])
        ]
        said = f"{row['difference']:+.3f}{'' if row['met'] else ' !'}"
        table.add_row(
            row["draft"],
            str(row["temperature"]),
            str(row["num_steps"]),
            *both,
            said,
            f"{row['estimated_by_verify']:.3f}",
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("runs/tiny-target"))
    parser.add_argument(
        "--draft", type=Path, help="a trained draft's export, measured beside the released layer"
    )
    parser.add_argument("--num-steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=20_000, help="answer tokens of each text, at least")
    parser.add_argument("--turns", type=int, help="answer only so many; all by default")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="layer61-acceptance-") as folder:
        for name, draft in {"released": None, "trained": args.draft}.items():
            if name == "released" or draft is not None:
                rows += compare(name, args.target, draft, args, Path(folder) / name)
    show(rows)
    fewest = min(row["tokens"] for row in rows)
    met = all(row["met"] for row in rows) and fewest >= args.tokens
    print(json.dumps({"goals_met": met, "fewest_tokens": fewest, "rows": rows, "versions": versions()}))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
