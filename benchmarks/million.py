"""A million documents: `python -m benchmarks.million [--documents N] [--messages]`.

Writes documents of 100 ready tokens, as Parquet and as JSONL, and plans them: every one is read, checked and
numbered. With `--messages` also questions and answers of about as many tokens, which are rendered and
tokenised. Then a generator feeds the writers of a dump with states of 16 values, and what a dump does at its
start and at its end is timed: find what is left to do, in the parts alone and in a published store, and
publish. Runs without an engine. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from configs.progress import log
from configs.provenance import versions
from configs.schema import PromptsConfig, TinyConfig

TOKENS = 100
WIDTH = 16
PART, OPEN_PARTS = 256, 3  # documents of a part, parts at a time
ROWS = 50_000
LETTERS = 170  # of a question, and of an answer: about 100 tokens in all


def write_documents(path: Path, count: int, vocab_size: int) -> None:
    """Ready tokens in `count` documents, Parquet or JSONL by the name of the file; the second half counts."""
    import pyarrow
    from pyarrow import parquet

    random = np.random.default_rng(0)
    mask = np.arange(TOKENS) >= TOKENS // 2
    schema = pyarrow.schema(
        [("input_ids", pyarrow.list_(pyarrow.uint32())), ("loss_mask", pyarrow.list_(pyarrow.uint8()))]
    )
    writer = parquet.ParquetWriter(path, schema) if path.suffix == ".parquet" else None
    with open(path, "a") as lines:
        for start in range(0, count, ROWS):
            rows = min(ROWS, count - start)
            ids = random.integers(0, vocab_size, (rows, TOKENS), np.uint32)
            if writer is None:
                text = mask.astype(int).tolist()
                for row in ids.tolist():
                    lines.write(json.dumps({"input_ids": row, "loss_mask": text}) + "\n")
                continue
            offsets = np.arange(rows + 1, dtype=np.int32) * TOKENS
            columns = [
                pyarrow.ListArray.from_arrays(offsets, values.reshape(-1))
                for values in (ids, np.broadcast_to(mask.astype(np.uint8), ids.shape))
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    if writer is not None:
        writer.close()


def write_messages(path: Path, count: int) -> None:
    """`count` questions and answers, cut from the sample conversations."""
    from pipeline.conversations import Conversation, read_conversations

    found = read_conversations(Path("data/conversations.jsonl"), "given")
    text = "\n".join(m["content"] for c in found if isinstance(c, Conversation) for m in c.messages)
    text = text.replace("<think>", "").replace("</think>", "")
    starts = np.random.default_rng(2).integers(0, len(text) - 2 * LETTERS, count)
    with open(path, "w") as lines:
        for i, start in enumerate(starts.tolist()):
            question, answer = text[start : start + LETTERS], text[start + LETTERS : start + 2 * LETTERS]
            messages = [{"role": "user", "content": f"{i}: {question}"}]
            messages.append({"role": "assistant", "content": answer})
            lines.write(json.dumps({"messages": messages}) + "\n")


def measure_plan(path: Path, target: Path, count: int) -> dict[str, Any]:
    """Read, check and number every document; seconds of the wall and of this process, largest memory."""
    from pipeline.prompts import load_prompts

    longest = 4 * TOKENS if path.stem == "messages" else TOKENS
    config = PromptsConfig(path=path, answers="given", max_length=longest, max_answer_tokens=1)
    started, busy = time.monotonic(), time.process_time()
    prompts = load_prompts(config, target)
    assert len(prompts.documents) == count
    return {
        "input_bytes": path.stat().st_size,
        "tokens": prompts.tokens,
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(time.process_time() - busy, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_plans(folder: Path, count: int, messages: bool) -> dict[str, Any]:
    """Plan the same number of documents of each kind, each in a process of its own."""
    from pipeline.tiny.write import random_checkpoint

    target = random_checkpoint(folder / "target", TinyConfig())
    result: dict[str, Any] = {}
    for name in ("tokens.parquet", "tokens.jsonl", *["messages.jsonl"] * messages):
        path = folder / name
        if path.stem == "messages":
            write_messages(path, count)
        else:
            write_documents(path, count, 512)
        log("bench", f"planning {name}")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            found = process.submit(measure_plan, path, target, count).result()
        result |= {f"plan {name}: {key}": value for key, value in found.items()}
        path.unlink()
    return result


def measure_store(folder: Path, uids: np.ndarray) -> dict[str, Any]:
    """Write the parts of all documents but the last one, publish them, and find out what is left to do."""
    from featurestore import held_documents, publish
    from pipeline.capture.writers import Writers

    store = str(folder / "store")
    contract = {"states": [{"site": "post_norm", "layer": 1}], "target": {"hidden_size": WIDTH}}
    writers = Writers(2, 1 << 28)
    ids, spans = list(range(TOKENS)), ((TOKENS // 2, TOKENS),)
    states = torch.zeros(TOKENS, 1, WIDTH, dtype=torch.bfloat16)
    started = time.monotonic()
    written, opened = uids[:-1].tolist(), []
    for start in range(0, len(written), PART):
        name = f"part-{start // PART:06d}"
        writers.open(name, store, contract, "none")
        for uid in written[start : start + PART]:
            fields = {"uid": uid, "spans": spans, "source": "generated", "held_out": False, "written": False}
            writers.submit(name, fields, ids, states)
        opened.append((name, len(written[start : start + PART])))
        if len(opened) == OPEN_PARTS:
            _finish(writers, *opened.pop(0))
    for name, count in opened:
        _finish(writers, name, count)
    result: dict[str, Any] = {"parts": -(-len(written) // PART)}
    result["write_seconds"] = round(time.monotonic() - started, 2)

    def left() -> float:
        started = time.monotonic()
        held, rejected = held_documents(store)
        assert not rejected
        assert np.flatnonzero(~np.isin(uids, held)).tolist() == [len(uids) - 1]
        return round(time.monotonic() - started, 2)

    result["resume_unpublished_seconds"] = left()
    started = time.monotonic()
    manifest = publish(store, uids, only=True)
    result["publish_seconds"] = round(time.monotonic() - started, 2)
    assert manifest["input"] == {"documents": len(uids), "there": len(uids) - 1, "rejected": 0}
    result["resume_seconds"] = left()
    started = time.monotonic()
    fewer = publish(store, uids[10:], only=True)
    result["publish_without_ten_seconds"] = round(time.monotonic() - started, 2)
    assert fewer["totals"]["documents"] == len(uids) - 11
    return result


def _finish(writers: Any, name: str, count: int) -> None:
    """Commit a part whose documents were all submitted."""
    while writers.state(name, count) is None:
        time.sleep(1e-3)
    writers.commit(name, {})
    while (state := writers.state(name, count)) is None:
        time.sleep(1e-3)
    assert state["committed"], state["error"]
    writers.close(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--messages", action="store_true", help="plan text as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="layer61-million-") as folder:
        result = measure_plans(Path(folder), arguments.documents, arguments.messages)
        uids = np.unique(np.random.default_rng(1).integers(0, 1 << 63, arguments.documents, np.uint64))
        result |= measure_store(Path(folder), uids)
        result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table = Table("", "measured", title=f"{arguments.documents:,} documents of {TOKENS} tokens")
    for name, value in result.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    print(
        json.dumps(
            {"benchmark": "million", "documents": arguments.documents, **result, "versions": versions()}
        )
    )


if __name__ == "__main__":
    main()
