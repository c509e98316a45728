"""Every stage through the command line, on a target small enough to be trained in seconds."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featurestore import open_store
from pipeline.serve import figures
from tests.test_children import free_port

pytestmark = pytest.mark.engine

SMALL = [
    "tiny.hidden_size=64",
    "tiny.num_hidden_layers=2",
    "tiny.num_attention_heads=2",
    "tiny.intermediate_size=128",
    "tiny.moe_intermediate_size=32",
    "tiny.n_routed_experts=8",
    "tiny.num_experts_per_tok=2",
    "tiny.q_lora_rank=32",
    "tiny.vocab_size=1024",
    "tiny.sequence_length=256",
    "tiny.train_tokens=12_000",
    "prompts.limit=40",
    "prompts.held_out=0.3",
    "prompts.max_answer_tokens=24",
    # three steps say something about greedy answers alone
    "prompts.temperature=0",
    "prompts.max_loop_share=1",
    "prompts.max_loop_share=1",  # so little trained it says little else
    "dump.block_documents=16",
    "train.max_steps=3",
    "train.tokens_per_rank=1024",
    "verify.max_tokens=24",
]


def demo(root: Path, file: str = "configs/tiny.toml") -> subprocess.CompletedProcess[str]:
    places = [f"run.dir={root / 'run'}", f"target.path={root / 'target'}"]
    command = [sys.executable, "-m", "pipeline", "demo", file, *places, *SMALL]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def stamps(*directories: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for d in directories for p in sorted(d.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    done = demo(root)
    assert done.returncode == 0, done.stderr
    return root, done


def test_demo_leaves_a_summary_of_every_stage(finished):
    root, done = finished
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert f"{summary['loop_share']:.2%}" in done.stderr
    for side in ("before", "after"):
        found = summary[side]
        assert 1 <= found["acceptance_length"] <= 4
        assert 1 <= found["offline_acceptance_length"] <= 4
        for measured in (found, found["sampled"], found["offline"], *found["by_num_steps"]):
            assert measured["low"] <= measured["acceptance_length"] <= measured["high"]
        positions = found["acceptance_per_position"]
        assert len(positions) == 3
        assert 1 + sum(positions) == pytest.approx(found["acceptance_length"])
        assert positions == sorted(positions, reverse=True)
    assert set(summary["stages"]) == {"target", "dump", "train", "evaluate", "export", "verify"}
    assert all(stage["seconds"] > 0 and stage["bytes"] > 0 for stage in summary["stages"].values())
    assert summary["peak_rss_bytes"] > 2**28
    assert summary["versions"]["torch"].startswith("2.13.0")
    greedy = summary["greedy"]
    assert greedy["equal"] + greedy["ties"] + greedy["different"] == greedy["requests"] > 0


def test_store_holds_the_targets_answers(finished):
    root, _ = finished
    store = open_store(root / "run" / "store")
    # a small vocabulary makes some conversations too long
    rejected = (root / "run" / "rejects.jsonl").read_text().splitlines()
    assert all("too long" in line for line in rejected)
    assert len(store) + len(rejected) == 40
    assert 0 < store.held_out.sum() < len(store)
    assert store.verify() == []
    for document in (store[0], store[len(store) - 1]):
        assert document.hidden.shape == (len(document.input_ids), 1, 64)
        assert document.hidden.isfinite().all()
        assert document.loss_mask.any()
        assert not document.loss_mask[:2].any()


def test_training_improves_what_it_trains_on(finished):
    root, _ = finished
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_second_start_recomputes_nothing(finished):
    root, _ = finished
    kept = (root / "target", root / "run" / "store", root / "run" / "checkpoints", root / "run" / "nextn")
    before = stamps(*kept)
    first = json.loads((root / "run" / "summary.json").read_text())
    again = demo(root)
    assert again.returncode == 0, again.stderr
    assert stamps(*kept) == before
    second = json.loads((root / "run" / "summary.json").read_text())
    for side in ("before", "after"):
        assert second[side] == first[side]


def test_what_the_demo_leaves_is_served_and_its_drafts_are_accepted(finished):
    from openai import OpenAI

    root, _ = finished
    port = free_port()
    command = [sys.executable, "-m", "pipeline", "serve", "configs/tiny.toml", f"run.dir={root / 'run'}"]
    command += [f"target.path={root / 'target'}", *SMALL, f"serve.port={port}"]
    with open(root / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        while "ready:" not in (root / "said").read_text():
            assert process.poll() is None, (root / "said").read_text()
            time.sleep(0.2)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        chat = client.chat.completions.create(
            model="target",
            messages=[{"role": "user", "content": "What does shutil.copy2 do?"}],
            temperature=0,
            max_tokens=200,
            extra_body={"ignore_eos": True},
        )
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 200
        assert chat.choices[0].message.content
        counted = figures(f"http://127.0.0.1:{port}")
        assert counted.drafts > 0
        assert sum(counted.accepted) > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
    assert "acceptance length" in (root / "said").read_text()


def test_report_is_one_page_without_links(finished):
    root, _ = finished
    command = [sys.executable, "-m", "pipeline", "report", str(root / "run")]
    subprocess.run(command, check=True, capture_output=True)
    page = (root / "run" / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "tokens a step" in page
    assert "<script" not in page
    assert 'src="' not in page


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo-sparse")
    done = demo(root, "configs/tiny-sparse.toml")
    assert done.returncode == 0, done.stderr
    return root, done


def test_sparse_demo_trains_on_documents_beyond_index_topk_and_says_why_none_is_served(sparse):
    root, done = sparse
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert set(summary["stages"]) == {"target", "dump", "train", "evaluate", "export"}
    for side in ("before", "after"):
        assert summary[side]["acceptance_length"] is None
        offline = summary[side]["offline"]
        assert 1 + sum(offline["acceptance_per_position"]) == pytest.approx(offline["acceptance_length"])
    assert "index_topk = 64" in summary["not_served"]
    assert "verify is left out" in " ".join(done.stderr.split())
    store = open_store(root / "run" / "store")
    assert store.contract["engine"]["name"] == "transformers"
    assert (store.length > 64).mean() > 0.5
    draft = json.loads((root / "run" / "nextn" / "layer61.json").read_text())["draft"]
    assert draft["attention"] == "sparse"
