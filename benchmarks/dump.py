"""Speed of stage one: `python -m benchmarks.dump [--quick] [--target DIR]`.

Capture on and off: an engine with our connector takes the sample conversations into a store, and the same
engine without it answers the same prompts through `LLM.generate`; at hidden size 256 the target writes the
answers, at 7,168 (two layers, few experts) they are given, so that a token costs little and its state much.
Both engines are there all the time and take turns, the one that was second going first in the next round; a
figure is the median over rounds. The first two do not count, for at first the engine's memory grows. A round
ends when its last states are on disk; what of it comes after the engine's last step, which a dump of hours
has only once, is printed as the drain. At 7,168, where most is written, rounds are three times as long.

How busy the engine is: answers of mixed length, one part at a time, several, and everything at once.

All of it takes about ten minutes. Prints a table and, as its last line, one JSON object.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.progress import log
from configs.provenance import versions
from configs.schema import DumpConfig, PromptsConfig, RunConfig, TinyConfig
from configs.target import target_config
from pipeline import child
from pipeline.capture.engine import EngineSettings, PartResult
from pipeline.capture.process import CPU_ENVIRONMENT, ENVIRONMENT
from pipeline.capture.session import Session
from pipeline.capture.settings import contract
from pipeline.parts import Part
from pipeline.prompts import Document, Prompts, load_prompts
from pipeline.view import make_view

LENGTH, ANSWER = 512, 128
SEQUENCES = 32  # of the engine whose occupancy is measured; a part has as many documents
PART = DumpConfig().block_documents  # documents of a part where capture is on
WIDE = {"hidden_size": 7168, "num_hidden_layers": 2, "n_routed_experts": 8, "moe_intermediate_size": 64}
WIDE |= {
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "intermediate_size": 256,
    "vocab_size": 1024,
}
WARM_UP = 2  # rounds
GOALS = {
    "answers_on_off": 0.97,
    "given_7168_on_off": 0.95,
    "busy_vs_all_at_once": 0.95,
    "busy_vs_barrier": 1.2,
}


def settings(target: Path, folder: Path, prompts: Prompts, sequences: int) -> EngineSettings:
    """What the engine is told; the view it serves is made in `folder`."""
    config = RunConfig.model_validate(
        {
            "run": {"dir": folder},
            "target": {"path": target},
            "prompts": {"max_length": LENGTH, "max_answer_tokens": ANSWER},
        }
    )
    folder.mkdir(exist_ok=True)
    return EngineSettings(
        model=str(make_view(target, folder / "view")),
        tensor_parallel_size=1,
        seed=0,
        turns=prompts.turns,
        store=str(folder / "store"),
        contract=contract(config, prompts, "v3").model_dump(mode="json"),
        compression="none",
        writer_threads=2,
        queue_bytes=1 << 30,
        log=str(folder / "engine.log"),
        vllm={"max_num_seqs": sequences},
    )


def plain(engine: EngineSettings, connection: Any) -> None:
    """The same work without states: body of a process."""
    child.enter(engine.log.replace("engine", "plain"))
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=engine.model,
        max_model_len=LENGTH + 2,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **engine.vllm,
    )

    def answer(batch: list[Document]) -> int:
        prompts = [TokensPrompt(prompt_token_ids=d.input_ids.tolist()) for d in batch]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max(d.answer_tokens, 1),
                stop_token_ids=list(engine.turns.stop_ids),
                detokenize=False,
            )
            for d in batch
        ]
        found = llm.generate(prompts, sampling, use_tqdm=False)
        written = sum(len(o.outputs[0].token_ids) for o in found) if batch[0].answer_tokens else 0
        return sum(len(o.prompt_token_ids or ()) for o in found) + written

    with contextlib.suppress(EOFError):
        while True:
            batch = connection.recv()
            started = time.monotonic()
            connection.send((answer(batch), time.monotonic() - started))


class Both:
    """An engine that captures and one that does not, of one target."""

    def __init__(self, engine: EngineSettings) -> None:
        import multiprocessing

        self._session = Session(engine, None, np.zeros(0, np.uint32))
        self._ours, theirs = multiprocessing.Pipe()
        self._plain = child.start(plain, (engine, theirs), "plain", ENVIRONMENT | CPU_ENVIRONMENT)
        theirs.close()
        self._rounds = 0

    def capture(self, documents: Sequence[Document]) -> tuple[list[PartResult], float, float]:
        """Take the documents in parts that are all open at once.

        Returns:
            what came of them, the seconds it took, and how many of those came after the engine's last step.
        """
        self._rounds += 1
        parts = [
            Part(f"round-{self._rounds}-{i}", tuple(documents[i : i + PART]))
            for i in range(0, len(documents), PART)
        ]
        self._session.settings = replace(self._session.settings, open_parts=len(parts))
        started = computed = time.monotonic()

        def progress(documents: int, tokens: int) -> None:
            nonlocal computed
            computed = time.monotonic()

        results = list(self._session.run(parts, progress))
        ended = time.monotonic()
        for directory in Path(self._session.settings.store, "parts").iterdir():
            shutil.rmtree(directory)
        return results, ended - started, ended - computed

    def generate(self, documents: Sequence[Document]) -> tuple[int, float]:
        """Answer them without states: tokens and seconds."""
        self._ours.send(list(documents))
        return self._ours.recv()

    def close(self) -> None:
        """End both."""
        self._ours.close()
        child.end(self._plain, wait_s=5)
        self._session.close(5)


def on_off(engine: EngineSettings, documents: Sequence[Document], seconds: float) -> dict[str, float]:
    """Tokens a second with and without capture, and the median of their ratio over rounds.

    Args:
        engine: of both.
        documents: what each takes in a round.
        seconds: rounds go on until then.
    """
    both = Both(engine)
    on, off, lasted, drained, busy, megabytes = [], [], [], [], [], []
    try:
        for _ in range(WARM_UP):
            both.capture(documents)
            both.generate(documents)
        end = time.monotonic() + seconds
        while not on or time.monotonic() < end:
            if len(on) % 2:
                tokens, without = both.generate(documents)
            results, taken, drain = both.capture(documents)
            if len(on) % 2 == 0:
                tokens, without = both.generate(documents)
            on.append(sum(r.tokens for r in results) / taken)
            off.append(tokens / without)
            lasted.append(taken)
            drained.append(drain)
            busy.append(sum(r.writer_seconds for r in results) / taken)
            megabytes.append(sum(r.bytes for r in results) / taken / 1e6)
            log("bench", f"round {len(on)}: {on[-1]:,.0f} tokens/s with capture, {off[-1]:,.0f} without")
    finally:
        both.close()
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    return {
        "tokens_per_second_on": round(statistics.median(on), 1),
        "tokens_per_second_off": round(statistics.median(off), 1),
        "on_off": round(statistics.median(ratios), 4),
        "on_off_least": round(min(ratios), 4),
        "on_off_most": round(max(ratios), 4),
        "rounds": len(on),
        "round_seconds": round(statistics.median(lasted), 2),
        "drain_seconds": round(statistics.median(drained), 3),
        "state_mb_per_second": round(statistics.median(megabytes), 2),
        "writers_busy": round(statistics.median(busy), 4),
    }


def mixed(documents: Sequence[Document], uid: int) -> list[Document]:
    """The documents with answers of lengths as of chats: log-normal, cut at the longest."""
    lengths = np.random.default_rng(0).lognormal(3.6, 0.9, len(documents))
    return [
        replace(d, uid=uid + i, input_ids=d.input_ids[:48], spans=((48, None),), answer_tokens=int(n))
        for i, (d, n) in enumerate(zip(documents, np.clip(lengths, 5, ANSWER), strict=True))
    ]


def occupancy(engine: EngineSettings, documents: Sequence[Document]) -> dict[str, float]:
    """Share of the engine's sequences kept busy, by how many parts are taken at a time."""
    engine = replace(engine, turns=replace(engine.turns, stop_ids=()))  # every answer has its length
    session = Session(engine, None, np.zeros(0, np.uint32))
    found = {}
    try:
        for name, open_parts, size in (
            ("one part at a time", 1, SEQUENCES),
            ("three parts", 3, SEQUENCES),
            ("everything at once", 1, len(documents)),
        ):
            session.settings = replace(engine, open_parts=open_parts)
            chosen = mixed(documents, len(found) << 40)
            results = list(_run(session, chosen, size))
            found[name] = round(sum(r.busy for r in results) / sum(r.steps for r in results), 4)
    finally:
        session.close(5)
    return found


def _run(session: Session, documents: Sequence[Document], size: int) -> Iterator[PartResult]:
    """Take the documents in parts of `size`."""
    waiting = len(documents)

    def parts() -> Iterator[Part]:
        nonlocal waiting
        for i in range(0, len(documents), size):
            waiting -= len(documents[i : i + size])
            yield Part(f"busy-{documents[i].uid}", tuple(documents[i : i + size]))

    return session.run(parts(), later=lambda: waiting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer conversations, one round")
    parser.add_argument("--target", type=Path, help="a target directory; an untrained tiny one by default")
    arguments = parser.parse_args()
    count, seconds = (32, 0) if arguments.quick else (96, 120)
    folder = Path(tempfile.mkdtemp(prefix="layer61-bench-"))
    results: dict[str, Any] = {}
    try:
        from pipeline.tiny.write import random_checkpoint

        narrow = arguments.target or random_checkpoint(folder / "target", TinyConfig())
        wide = random_checkpoint(folder / "wide", TinyConfig.model_validate(WIDE))
        asked = PromptsConfig(
            path=Path("data/conversations.jsonl"),
            max_length=LENGTH,
            max_answer_tokens=ANSWER,
            limit=3 * count,
            temperature=0,
        )
        prompts = load_prompts(asked, narrow)
        engine = settings(narrow, folder / "answers", prompts, 128)
        results["answers"] = on_off(engine, prompts.documents[:count], seconds)
        engine = settings(narrow, folder / "busy", prompts, SEQUENCES)
        mix = [d for d in prompts.documents if len(d.input_ids) >= 48][: 2 * count]
        results["busy"] = occupancy(engine, mix)
        prompts = load_prompts(asked.model_copy(update={"answers": "given"}), wide)
        engine = settings(wide, folder / "given", prompts, 128)
        results["given, hidden size 7168"] = on_off(engine, prompts.documents, 2 * seconds)
        hidden = target_config(narrow)["hidden_size"]
    finally:
        shutil.rmtree(folder)
    busy = results["busy"]
    measured = {
        "answers_on_off": results["answers"]["on_off"],
        "given_7168_on_off": results["given, hidden size 7168"]["on_off"],
        "busy_vs_all_at_once": round(busy["three parts"] / busy["everything at once"], 4),
        "busy_vs_barrier": round(busy["three parts"] / busy["one part at a time"], 4),
    }
    table = Table(title=f"{count} conversations, hidden size {hidden} and 7168", title_justify="left")
    for column in ("", "measured", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in results.items():
        for key, value in row.items():
            table.add_row(f"{name}: {key}", f"{value:,}", "")
    for name, value in measured.items():
        table.add_row(name, f"{value:.3f}", f">= {GOALS[name]}")
    Console().print(table)
    last = {"benchmark": "dump", "hidden_size": hidden, "results": results, **measured}
    print(json.dumps({**last, "cores": len(os.sched_getaffinity(0)), "versions": versions()}))


if __name__ == "__main__":
    main()
