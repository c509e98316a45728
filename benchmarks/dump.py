"""Speed of stage one: `python -m benchmarks.dump [--quick] [--target DIR]`.

One engine with our connector answers the sample conversations into a store, and reads given ones; the same
engine without it answers the same prompts through `LLM.generate`. Each in a process of its own, one warm-up
block first. Prints a table and, as its last line, one JSON object.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.provenance import versions
from configs.schema import PromptsConfig, RunConfig, TinyConfig
from configs.target import target_config
from pipeline.capture.engine import EngineSettings
from pipeline.capture.process import ENVIRONMENT, Capture
from pipeline.capture.settings import contract
from pipeline.prompts import Document, load_prompts
from pipeline.view import make_view

LENGTH, ANSWER = 512, 128


def settings(target: Path, view: Path, folder: Path, prompts: Any) -> EngineSettings:
    config = RunConfig.model_validate(
        {
            "run": {"dir": folder},
            "target": {"path": target},
            "prompts": {"max_length": LENGTH, "max_answer_tokens": ANSWER},
        }
    )
    return EngineSettings(
        model=str(view),
        max_length=LENGTH,
        tensor_parallel_size=1,
        seed=0,
        stop_ids=prompts.stop_ids,
        store=str(folder / "store"),
        contract=contract(config, prompts, "v3").model_dump(mode="json"),
        compression="none",
        writer_threads=2,
        queue_bytes=1 << 30,
        log=str(folder / "engine.log"),
        vllm={},
    )


def plain(engine: EngineSettings, warm: list[Document], documents: list[Document], connection: Any) -> None:
    """The same work without states: body of a process."""
    output = os.open(engine.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=engine.model,
        max_model_len=LENGTH + 2,
        max_num_seqs=128,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def answer(batch: list[Document]) -> int:
        prompts = [TokensPrompt(prompt_token_ids=d.input_ids.tolist()) for d in batch]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=d.answer_tokens,
                stop_token_ids=list(engine.stop_ids),
                detokenize=False,
            )
            for d in batch
        ]
        found = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(o.prompt_token_ids or ()) + len(o.outputs[0].token_ids) for o in found)

    answer(warm)
    started = time.monotonic()
    tokens = answer(documents)
    connection.send((tokens, time.monotonic() - started))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 conversations instead of 256")
    parser.add_argument("--target", type=Path, help="a target directory; an untrained tiny one by default")
    arguments = parser.parse_args()
    count, warm = (64, 8) if arguments.quick else (256, 32)
    results: dict[str, dict[str, float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="layer61-bench-"))
    try:
        target = arguments.target
        if target is None:
            from pipeline.tiny.write import random_checkpoint

            target = random_checkpoint(folder / "target", TinyConfig())
        view = make_view(target, folder / "view")
        config = PromptsConfig(
            path=Path("data/conversations.jsonl"),
            max_length=LENGTH,
            max_answer_tokens=ANSWER,
            limit=count + warm + 64,
        )
        asked = load_prompts(config, target)
        given = load_prompts(config.model_copy(update={"answers": "given"}), target)
        engine = settings(target, view, folder, asked)
        with Capture(engine) as capture:
            for name, prompts in (("capture, target answers", asked), ("capture, answers given", given)):
                documents = list(prompts.documents[: count + warm])
                capture.run_block(f"{prompts is asked}-warm", documents[count:])
                result = capture.run_block(f"{prompts is asked}", documents[:count])
                results[name] = {
                    "tokens": result.tokens,
                    "bytes": result.bytes,
                    "seconds": result.seconds,
                    "writer_seconds": result.writer_seconds,
                }
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        os.environ |= {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
        documents = list(asked.documents[: count + warm])
        process = context.Process(
            target=plain,
            args=(
                replace(engine, log=str(folder / "plain.log")),
                documents[count:],
                documents[:count],
                theirs,
            ),
        )
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            tokens, seconds = ours.recv()
            results["no capture, target answers"] = {"tokens": tokens, "seconds": seconds}
        process.join()
        hidden = target_config(target)["hidden_size"]
    finally:
        shutil.rmtree(folder)
    table = Table(title=f"{count} conversations, hidden size {hidden}", title_justify="left")
    for column in ("", "tokens/s", "MB/s", "writers busy"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in results.items():
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        speed = f"{row['bytes'] / row['seconds'] / 1e6:.2f}" if "bytes" in row else "-"
        busy = f"{row['writer_seconds'] / row['seconds']:.1%}" if "writer_seconds" in row else "-"
        table.add_row(name, f"{row['tokens_per_second']:,.0f}", speed, busy)
    Console().print(table)
    print(
        json.dumps({"benchmark": "dump", "hidden_size": hidden, "results": results, "versions": versions()})
    )


if __name__ == "__main__":
    main()
