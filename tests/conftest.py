"""Fixtures every part shares: a handful of conversations, an untrained checkpoint of the target's shape."""

import gc
import json
import os
from pathlib import Path

import pytest

# what is imported stays: nobody looks through it for garbage, now or between tests
gc.disable()
# several processes of a test share the cores with the test itself
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from configs.schema import TinyConfig  # noqa: E402
from pipeline.tiny.write import random_checkpoint  # noqa: E402

# files that take longest, their tests start processes: what two workers begin last must not be one of them
LONGEST = ("test_launch", "test_trainer", "test_checkpoint", "test_gpu_rehearsal", "test_moe", "test_zero")
LONGEST += ("test_attention", "test_transformers_engine", "test_dump")

CONVERSATIONS = [
    {
        "id": "copy",
        "messages": [
            {"role": "system", "content": "You answer questions about Python's standard library."},
            {"role": "user", "content": "What does shutil.copy2 do?"},
            {
                "role": "assistant",
                "content": "It copies a file and its metadata.\n\n    shutil.copy2(src, dst)\n\nIt returns"
                " the path of the new file.",
            },
            {"role": "user", "content": "And what does shutil.copy do?"},
            {
                "role": "assistant",
                "content": "<think>The question is about shutil.copy, which leaves times alone.</think>It"
                " copies a file and its mode bits, not its times.",
            },
        ],
    },
    {
        "id": "sqrt",
        "messages": [
            {"role": "user", "content": "What does math.sqrt(2) return?"},
            {"role": "assistant", "content": "About 1.4142135623730951: the square root of 2."},
        ],
    },
    {
        "id": "join",
        "messages": [
            {"role": "user", "content": "How do I join two paths with os.path?"},
            {
                "role": "assistant",
                "content": '<think>os.path.join.</think>`os.path.join("a", "b")` is "a/b".',
            },
            {"role": "user", "content": "And with pathlib?"},
            {"role": "assistant", "content": 'The operator `/` joins paths: `Path("a") / "b"`.'},
        ],
    },
    {
        "id": "unicode",
        "messages": [
            {"role": "user", "content": "Wie lang ist „größe“ in UTF-8? 日本語でもいいです 🙂"},
            {"role": "assistant", "content": "`len('größe'.encode())` is 7: ö and ß take two bytes each."},
        ],
    },
    {
        "id": "sort",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How do I sort a dict by value?"},
            {
                "role": "assistant",
                "content": "```python\nsorted(d.items(), key=lambda item: item[1])\n```\nAdd `reverse=True`"
                " to start with the largest.",
            },
        ],
    },
    {
        "id": "range",
        "messages": [
            {"role": "user", "content": "List the numbers from 0 to 9."},
            {"role": "assistant", "content": ", ".join(str(i) for i in range(10)) + "."},
        ],
    },
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that start an engine first, then LONGEST, then the others."""
    engines = {item.path for item in items if item.get_closest_marker("engine")}

    def place(item: pytest.Item) -> tuple[bool, int]:
        name = item.path.stem
        return item.path not in engines, LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def conversations() -> list[dict]:
    """Six conversations: with and without system message, thinking, several turns, non-ASCII text."""
    return json.loads(json.dumps(CONVERSATIONS))


@pytest.fixture(scope="session")
def conversations_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversations as a JSONL file."""
    path = tmp_path_factory.mktemp("conversations") / "conversations.jsonl"
    path.write_text(
        "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in CONVERSATIONS), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def tiny_config(conversations_file: Path) -> TinyConfig:
    """Sizes of `tiny_checkpoint`: two layers and the MTP layer, eight experts, under a million parameters."""
    return TinyConfig(
        conversations=conversations_file,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        vocab_size=512,
        q_lora_rank=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        index_n_heads=2,
        index_head_dim=64,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Path:
    """Directory of an untrained target with a tokenizer; read only, shared by all tests."""
    return random_checkpoint(tmp_path_factory.mktemp("target") / "tiny", tiny_config)


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Path:
    """The same with layers enough for an EAGLE-3 draft to start from; read only."""
    config = tiny_config.model_copy(update={"num_hidden_layers": 4})
    return random_checkpoint(tmp_path_factory.mktemp("target") / "four", config)


@pytest.fixture(scope="session")
def sparse_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Path:
    """The same with as many index heads as make choices unique; keeps 64 keys, read only."""
    sizes = tiny_config.model_copy(update={"index_n_heads": 16, "index_topk": 64})
    return random_checkpoint(tmp_path_factory.mktemp("target") / "sparse", sizes)
