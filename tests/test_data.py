"""The sample conversations: valid, varied, and written again by the same Python."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "data" / "conversations.jsonl"
# the interpreter whose documentation the committed file quotes
WRITTEN_BY = re.findall(r"written by Python (3\.\d+\.\d+)", (ROOT / "data" / "README.md").read_text())


@pytest.fixture(scope="module")
def sample() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def regenerate(path: Path) -> bytes:
    command = [sys.executable, "-m", "data.make_conversations", "--output", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


def test_conversations_are_well_formed(sample: list[dict]) -> None:
    assert len({c["id"] for c in sample}) == len(sample)
    for c in sample:
        roles = [m["role"] for m in c["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2), c["id"]
        assert len(turns) >= 2, c["id"]
        for m in c["messages"]:
            assert set(m) == {"role", "content"}
            assert m["content"].strip() == m["content"] != "", c["id"]
            think = m["content"].count("<think>"), m["content"].count("</think>")
            if m["role"] == "assistant" and think != (0, 0):
                assert think == (1, 1), c["id"]
                assert re.match(r"<think>.+?</think>\S", m["content"], re.DOTALL), c["id"]
            else:
                assert think == (0, 0), c["id"]


def test_conversations_are_many_and_varied(sample: list[dict]) -> None:
    assert len(sample) >= 500
    turns = [sum(m["role"] == "user" for m in c["messages"]) for c in sample]
    assert max(turns) >= 4
    assert sum(t >= 2 for t in turns) > len(sample) / 3
    thinking = sum(c["messages"][-1]["content"].startswith("<think>") for c in sample)
    assert len(sample) / 10 < thinking < len(sample) / 2
    assert any(c["messages"][0]["role"] == "system" for c in sample)
    answers = {m["content"] for c in sample for m in c["messages"] if m["role"] == "assistant"}
    assert len(answers) > len(sample)


def test_conversations_name_nobody_and_no_machine(sample: list[dict]) -> None:
    text = "\n".join(m["content"] for c in sample for m in c["messages"])
    assert not re.search(r"\w@\w+\.\w|https?://|0x[0-9a-f]{8,}|/root/|/home/|site-packages", text)


def test_the_script_writes_the_same_file_again(tmp_path: Path) -> None:
    written = regenerate(tmp_path / "first.jsonl")
    assert regenerate(tmp_path / "second.jsonl") == written
    # another Python documents itself in other words
    if [sys.version.split()[0]] == WRITTEN_BY and sys.platform == "linux":
        assert written == FILE.read_bytes()
