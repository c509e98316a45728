"""A million documents: `python -m benchmarks.million [--documents N] [--jsonl]`.

Writes documents of 100 ready tokens, Parquet or JSONL, and plans them: every one is read, checked and
numbered. Runs without an engine. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.provenance import versions
from configs.schema import PromptsConfig, TinyConfig

TOKENS = 100
ROWS = 50_000


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


def measure_plan(path: Path, target: Path, count: int) -> dict[str, Any]:
    """Read, check and number every document; seconds of the wall and of this process, largest memory."""
    from pipeline.prompts import load_prompts

    config = PromptsConfig(path=path, answers="given", max_length=TOKENS, max_answer_tokens=1)
    started, busy = time.monotonic(), time.process_time()
    prompts = load_prompts(config, target)
    assert len(prompts.documents) == count
    return {
        "documents": count,
        "plan_seconds": round(time.monotonic() - started, 2),
        "plan_cpu_seconds": round(time.process_time() - busy, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--jsonl", action="store_true", help="JSONL in place of Parquet")
    arguments = parser.parse_args()
    from pipeline.tiny.write import random_checkpoint

    with tempfile.TemporaryDirectory(prefix="layer61-million-") as folder:
        tiny = TinyConfig()
        target = random_checkpoint(Path(folder) / "target", tiny)
        path = Path(folder) / ("documents.jsonl" if arguments.jsonl else "documents.parquet")
        write_documents(path, arguments.documents, 512)
        result = measure_plan(path, target, arguments.documents)
        result["input_bytes"] = path.stat().st_size
    table = Table("", "measured", title=f"{arguments.documents:,} documents of {TOKENS} tokens")
    for name, value in result.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    print(json.dumps({"benchmark": "million", **result, "versions": versions()}))


if __name__ == "__main__":
    main()
