"""Dumps as a GPU machine runs them: tensor-parallel ranks, cached prefixes, prompts in pieces, S3.

Each store is compared with transformers in float32, by the measure that every start of an engine must pass.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer

from configs.load import load_config
from configs.schema import RunConfig
from featurestore import open_store
from pipeline.capture.probe import check_states
from pipeline.dump import run
from pipeline.prompts import load_prompts
from tests.test_capture import spread_router

pytestmark = pytest.mark.engine

COUNT, ANSWER = 12, 24


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_checkpoint) -> Path:
    return spread_router(tiny_checkpoint, tmp_path_factory.mktemp("modes") / "target")


@pytest.fixture
def config(tmp_path, target) -> RunConfig:
    """Questions that share a long beginning, which the target answers."""
    rules = "You answer questions about numbers. " + " ".join(f"Rule {i}: be brief." for i in range(24))
    file = tmp_path / "c.jsonl"
    with open(file, "w") as lines:
        for i in range(COUNT):
            asked = [{"role": "system", "content": rules}, {"role": "user", "content": f"What is {i} + 5?"}]
            lines.write(json.dumps({"messages": [*asked, {"role": "assistant", "content": "Known."}]}) + "\n")
    values = {"run.dir": tmp_path / "run", "target.path": target, "prompts.path": file}
    values |= {"prompts.max_length": 512, "prompts.max_answer_tokens": ANSWER, "dump.block_documents": 4}
    return load_config([], [f"{key}={value}" for key, value in values.items()])


def with_dump(config: RunConfig, **values) -> RunConfig:
    return config.model_copy(update={"dump": config.dump.model_copy(update=values)})


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://127.0.0.1:{1}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="features")
    yield "s3://features/store"
    server.stop()


def assert_states_are_the_references(path: str, config: RunConfig) -> None:
    """Every document of the input is there, answered, and its states are those of transformers."""
    from transformers import DeepseekV3ForCausalLM

    store = open_store(path)
    assert store.verify() == []
    asked = {d.uid: d for d in load_prompts(config.prompts, config.target.path).documents}
    assert len(asked) == COUNT
    assert {document.uid for document in store} == asked.keys()
    model = DeepseekV3ForCausalLM.from_pretrained(config.target.path, dtype=torch.float32).eval()
    for document in store:
        prompt = asked[document.uid].input_ids.astype(np.int64)
        assert np.array_equal(document.input_ids[: len(prompt)], prompt)
        assert len(prompt) > 200, "no piece of a prompt is left to the next step"
        assert len(prompt) < len(document.input_ids) <= len(prompt) + ANSWER
        with torch.no_grad():
            expected_TD = model.model(document.input_ids[None].long()).last_hidden_state[0]
        expected = expected_TD[:, None].bfloat16().view(torch.uint16).numpy()
        check_states(document.hidden.view(torch.uint16).numpy(), expected, "the engine's log")


def test_two_tensor_parallel_ranks_write_every_state_into_s3(config, bucket):
    both = with_dump(config, tensor_parallel_size=2, store=bucket)
    summary = run(both)
    assert (summary["documents"], summary["store"]) == (COUNT, bucket)
    assert_states_are_the_references(bucket, both)
    # nothing is left to do for a second start: no engine, the same manifest
    log = (both.run.dir / "engine.1-of-1.log").stat().st_size
    assert run(both)["manifest"] == summary["manifest"]
    assert (both.run.dir / "engine.1-of-1.log").stat().st_size == log


def test_cached_prefixes_and_prompts_in_pieces_leave_no_state_out(config, monkeypatch):
    # on CPU vLLM offers neither with the attention of the target's own kind
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    vllm = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 96}
    vllm |= {"max_num_seqs": 8, "kv_cache_memory_bytes": 4 << 20}
    small = with_dump(config, vllm=vllm, queue_bytes=1 << 16)
    # nor can it sample by seed there: where a prompt goes on in the next step it turns the generator back,
    # which a generator on CPU does not know
    small = small.model_copy(update={"prompts": small.prompts.model_copy(update={"temperature": 0.0})})
    run(small)
    log = (small.run.dir / "engine.1-of-1.log").read_text()
    assert "enable_prefix_caching=True" in log
    assert "enable_chunked_prefill=True" in log
    assert_states_are_the_references(small.store_path, small)
