"""The HTTP server: what a user starts, asks and reads."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ConfigError, InputError
from configs.files import write_json
from configs.load import load_config
from export import nextn
from pipeline import bench_serve
from pipeline.serve import arguments, figures, plan, running
from tests.test_children import free_port
from tests.test_verify import layer_of, simple_target


@pytest.fixture(scope="module")
def settings(
    tiny_checkpoint: Path, conversations_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A configuration with a draft that is right every time, beside a target whose own layer is not."""
    folder = tmp_path_factory.mktemp("serve")
    target = simple_target(tiny_checkpoint, folder / "target", rest=0, noise=0.5)
    perfect = simple_target(tiny_checkpoint, folder / "perfect", rest=0, noise=0)
    nextn.export(layer_of(perfect, folder / "weights"), target, folder / "nextn")
    write_json(
        folder / "config.json",
        {
            "run": {"dir": str(folder / "run")},
            "target": {"path": str(target)},
            "prompts": {"path": str(conversations_file), "held_out": 0.99},
            "export": {"dir": str(folder / "nextn")},
            "serve": {"port": free_port(), "every_seconds": 0.5, "vllm": {"max_num_seqs": 4}},
        },
    )
    return folder / "config.json"


@pytest.mark.engine
def test_a_chat_is_answered_with_accepted_drafts(settings, tmp_path):
    from openai import OpenAI

    port = json.loads(settings.read_text())["serve"]["port"]
    command = [sys.executable, "-m", "pipeline", "serve", str(settings)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)

    def text() -> str:
        return " ".join((tmp_path / "said").read_text().split())

    try:
        while "ready:" not in text():
            assert process.poll() is None, text()
            time.sleep(0.2)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        # at the second temperature what is sampled is what is most likely, if drafts are checked at it
        for number, temperature in enumerate((0, 0.001), 1):
            chat = client.chat.completions.create(
                model="target",
                messages=[{"role": "user", "content": "What does shutil.copy2 do?"}],
                temperature=temperature,
                max_tokens=41,
                extra_body={"ignore_eos": True},
            )
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 41
            counted = figures(f"http://127.0.0.1:{port}")
            # 1 token from the prompt, then 10 steps of 4
            steps = 10 * number
            assert (counted.tokens, counted.drafts, counted.accepted) == (41 * number, steps, (steps,) * 3)
        while text().count(" 1 answered") + 2 * text().count(" 2 answered") < 2:
            assert process.poll() is None, text()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
    assert "tokens/s | acceptance length 4.00 (100% 100% 100%)" in text()
    assert "2 requests, 82 tokens | acceptance length 4.00" in text()
    # what it says can be pasted
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in text()
    assert "vllm.entrypoints.openai.api_server --model" in text() or "vllm serve" in text()


def test_the_command_says_everything_that_the_server_is_told(settings):
    config = load_config(
        [settings], ["serve.vllm.enable_prefix_caching=false", "serve.num_speculative_tokens=5"]
    )
    words = arguments(config, "trained")

    def value(flag: str, words: list[str] = words) -> str:
        return words[words.index(flag) + 1]

    assert json.loads(value("--speculative-config"))["num_speculative_tokens"] == 5
    draft = Path(json.loads(value("--speculative-config"))["model"])
    for directory in (draft, Path(words[0])):
        assert json.loads((directory / "config.json").read_text())["model_type"] == "deepseek_v3"
    assert value("--served-model-name") == "target"
    assert value("--max-num-seqs") == "4"
    assert "--no-enable-prefix-caching" in words
    assert value("--max-model-len") == "2048"
    assert "--speculative-config" not in arguments(config, "none")
    assert "model" not in json.loads(value("--speculative-config", arguments(config, "released")))
    assert "not yet" not in plan(config)


def test_serve_refuses_what_cannot_be_served(settings, tmp_path):
    with pytest.raises(InputError, match="there is no draft at"):
        arguments(load_config([settings], ["serve.draft=absent"]), "absent")
    with pytest.raises(ConfigError, match="2,048 tokens up to which the V3 view"):
        arguments(load_config([settings], ["serve.vllm.max_model_len=4096"]), "none")
    misleading = load_config([settings], [f"run.dir={tmp_path / 'demo-eagle3'}"])
    for draft in ("released", "trained"):
        with pytest.raises(ConfigError, match=r"run\.dir = .* contains 'eagle'"):
            arguments(misleading, draft)
    assert "--speculative-config" not in arguments(misleading, "none")
    with pytest.raises(ConfigError, match=r"serve\.vllm\.port is decided by another setting"):
        load_config([settings], ["serve.vllm.port=1"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = load_config([settings], [f"serve.port={taken.getsockname()[1]}"])
        with pytest.raises(InputError, match="something listens on"), running(config, [], tmp_path / "log"):
            pass


@pytest.mark.engine
def test_bench_serve_measures_each_draft_at_each_concurrency(settings):
    changes = ["serve.bench_concurrency=[1, 2]", "serve.bench_conversations=4", "serve.bench_max_tokens=33"]
    config = load_config([settings], changes)
    result = bench_serve.run(config)
    runs = {(r["draft"], r["concurrency"]): r for r in result["runs"]}
    assert list(runs) == [("none", 1), ("none", 2), ("trained", 1), ("trained", 2)]
    for (draft, concurrency), found in runs.items():
        assert ("acceptance_length" in found) == (draft == "trained")
        plain = runs["none", concurrency]
        # greedy: the same answers, whoever drafts
        assert found["num_output_tokens"] == plain["num_output_tokens"] > 0
        assert found["ratio"] == found["output_tokens_per_second"] / plain["output_tokens_per_second"]
    assert runs["trained", 1]["acceptance_length"] == pytest.approx(4.0)
    written = json.loads((config.run.dir / "serving.json").read_text())
    assert written["runs"] == result["runs"]
    assert "versions" in written
