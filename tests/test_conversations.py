"""Conversations as they lie in files: every form gives the same documents; what cannot be kept is named."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from configs.errors import InputError
from configs.schema import PromptsConfig
from pipeline.conversations import Conversation, ReadyTokens, Reject, find_files, read_conversations
from pipeline.prompts import load_prompts


def lines(items: list[dict]) -> bytes:
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in items).encode()


def talk(*contents: str, **more) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **more}


def read(tmp_path: Path, *items, **settings) -> list:
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines(list(items)))
    return list(read_conversations(path, **settings))


def reasons(tmp_path: Path, *items, **settings) -> list[str]:
    return [x.reason if isinstance(x, Reject) else "" for x in read(tmp_path, *items, **settings)]


COMPRESSED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
    # two gzip files one behind the other are one, as gzip itself has it
    "two": lambda data: gzip.compress(data[:500]) + gzip.compress(data[500:]),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_files_are_read_whatever_their_name(kind, tmp_path, conversations):
    plain, packed = tmp_path / "plain.jsonl", tmp_path / "packed.jsonl"
    plain.write_bytes(lines(conversations))
    packed.write_bytes(COMPRESSED[kind](plain.read_bytes()))
    contents = [[c.content for c in read_conversations(p)] for p in (plain, packed)]
    assert contents[0] == contents[1]
    assert len(contents[0]) == len(conversations)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_a_cut_compressed_file_is_one_clear_error(kind, tmp_path, conversations):
    path = tmp_path / "c.jsonl"
    data = COMPRESSED[kind](lines(conversations))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"c\.jsonl"):
        list(read_conversations(path))


def test_parquet_gives_the_documents_of_jsonl(tmp_path, conversations, tiny_checkpoint):
    with_tools = [c | {"source": "docs", "unused": i} for i, c in enumerate(conversations)]
    (tmp_path / "c.jsonl").write_bytes(lines(with_tools))
    parquet.write_table(pyarrow.Table.from_pylist(with_tools), tmp_path / "c.parquet")
    found = [
        load_prompts(PromptsConfig(path=tmp_path / name), tiny_checkpoint).documents
        for name in ("c.jsonl", "c.parquet")
    ]
    for a, b in zip(*found, strict=True):
        assert (a.uid, a.name, a.line, a.source) == (b.uid, b.name, b.line, b.source)
        assert a.input_ids.tolist() == b.input_ids.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"messages": []}]', "one JSON array, expected one object a line"),
        (b"PK\x03\x04rest", "a zip archive"),
        ('{"messages": []}'.encode("utf-16"), "UTF-16"),
        (b"PAR1 and no more", "damaged"),
    ],
)
def test_other_kinds_of_files_are_refused_with_a_way_out(content, message, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_conversations(path))
    assert caught.value.hint


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="none of the columns messages, conversations, input_ids"):
        list(read_conversations(tmp_path / "c.parquet"))


def test_paths_are_a_file_a_pattern_or_a_list(tmp_path, tiny_checkpoint):
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        (tmp_path / name).write_bytes(lines([talk(f"{name} {i}", "x") for i in range(3)]))
    names = [p.name for p in find_files(tmp_path / "?.jsonl")]
    assert names == ["a.jsonl", "b.jsonl"]
    assert [p.name for p in find_files([tmp_path / "c[1].jsonl", tmp_path / "*.jsonl"])] == [
        "c[1].jsonl",
        "a.jsonl",
        "b.jsonl",
    ]
    for bad, message in (
        (tmp_path / "d*.jsonl", r"d\*\.jsonl"),
        (tmp_path, "is a directory"),
        (None, "not set"),
    ):
        with pytest.raises(InputError, match=message):
            find_files(bad)
    config = PromptsConfig(path=(tmp_path / "b.jsonl", tmp_path / "a.jsonl"), limit=4)
    documents = load_prompts(config, tiny_checkpoint).documents
    assert [(Path(d.file).name, d.line, d.source) for d in documents] == [
        ("b.jsonl", 1, "b.jsonl"),
        ("b.jsonl", 2, "b.jsonl"),
        ("b.jsonl", 3, "b.jsonl"),
        ("a.jsonl", 1, "a.jsonl"),
    ]


def test_sharegpt_is_the_same_conversation(tmp_path):
    shared = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hello?"},
            {"from": "gpt", "value": "Yes."},
        ]
    }
    plain = talk("Hello?", "Yes.")
    plain["messages"].insert(0, {"role": "system", "content": "Be brief."})
    a, b = read(tmp_path, shared, plain)
    assert a.content == b.content
    assert a.messages == b.messages
    (reason,) = reasons(tmp_path, {"conversations": [{"from": "function_call", "value": "{}"}]})
    assert "unknown role 'function_call'" in reason


def test_parts_and_reasoning_are_the_same_conversation_as_their_text(tmp_path):
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there?"}]
    apart = {
        "messages": [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "Short."},
        ]
    }
    within = talk("Hello\nthere?", "<think>Short.</think>Yes.")
    a, b = read(tmp_path, apart, within)
    assert a.content == b.content
    assert a.thinking
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    (reason,) = reasons(tmp_path, {"messages": [image]})
    assert reason == "message 1 has a part of type 'image_url', expected text alone"


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def asked(*messages: dict, **more) -> dict:
    return {"messages": [{"role": "user", "content": "1 + 1?"}, *messages], **more}


def call(*calls: dict, **more) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


RESULT = {"role": "tool", "content": "2", "tool_call_id": "1"}
LAST = {"role": "assistant", "content": "2."}

BAD = [
    (asked(call(CALL), LAST), "message 3 is from assistant, expected a tool's result"),
    (asked(call(CALL, CALL), RESULT), "1 of 2 tool calls have no result"),
    (
        asked(call(CALL), RESULT, {"role": "user", "content": "x"}),
        "message 4 is from user, expected assistant",
    ),
    (asked(LAST, RESULT), "message 3 is from tool, expected user or developer"),
    (asked(call({"function": {"name": "add", "arguments": "{"}})), "arguments of a tool call of message 2"),
    (asked(call({"name": "add"})), "a tool call of message 2 is not"),
    (asked({"role": "assistant", "content": "x", "function_call": {"name": "f"}}), "'function_call'"),
    (asked(LAST, functions=[{"name": "f"}]), 'it has "functions"'),
    (asked(LAST, tools=[{"name": "f"}]), "a tool is not of the form"),
    (asked(LAST, tools="{"), "the tools of tools are no JSON"),
    (
        asked({"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "c"}),
        "reasoning twice",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "reasoning_content": "c"}]},
        "reasoning of message 1 (user)",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "message 1 (user) has tool_calls",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "content of message 1 is missing"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1]}, 'prompts.answers is "target", not "given"'),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_what_cannot_be_kept_is_a_reason_to_reject(record, reason, tmp_path):
    (found,) = reasons(tmp_path, record)
    assert reason in found


def test_every_answer_cannot_be_written_again_where_tools_answered_the_old_ones(tmp_path):
    record = asked(call(CALL), RESULT, LAST, tools=[TOOL])
    assert isinstance(read(tmp_path, record)[0], Conversation)
    assert isinstance(read(tmp_path, record, answers="given")[0], Conversation)
    (reason,) = reasons(tmp_path, record, answers="every")
    assert "results of tools" in reason


READY = [
    ({"input_ids": [1, 2, 3], "loss_mask": [0, 1]}, "3 input_ids and 2 values of loss_mask"),
    ({"input_ids": [1, 2]}, "input_ids without loss_mask"),
    ({"input_ids": [], "loss_mask": []}, "the conversation is empty"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "other values than 0 and 1"),
    ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "0 everywhere"),
    ({"input_ids": [1.5, 2], "loss_mask": [0, 1]}, "input_ids is no list of whole numbers"),
    ({"input_ids": [[1], [2]], "loss_mask": [0, 1]}, "input_ids is no list of whole numbers"),
    ({"input_ids": [1, 10**30], "loss_mask": [0, 1]}, "input_ids is no list of whole numbers"),
    ({"input_ids": "12", "loss_mask": [0, 1]}, "input_ids is no list of whole numbers"),
    ({"input_ids": [1, 99999], "loss_mask": [0, 1]}, "the target's are 0 to"),
    ({"input_ids": [-1, 2], "loss_mask": [0, 1]}, "the target's are 0 to"),
    ({"input_ids": [1] * 65, "loss_mask": [1] * 65}, "too long: 65 tokens, prompts.max_length is 64"),
]


def test_ready_tokens_are_taken_as_they_are_or_rejected(tmp_path, tiny_checkpoint):
    good = {"id": "g", "input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 1, 0, 1], "source": "mine"}
    (tmp_path / "c.jsonl").write_bytes(lines([good, *(bad for bad, _ in READY)]))
    config = PromptsConfig(
        path=tmp_path / "c.jsonl", answers="given", max_length=64, max_answer_tokens=8, thinking="off"
    )
    prompts = load_prompts(config, tiny_checkpoint)
    (document,) = prompts.documents
    assert document.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert document.input_ids.dtype == np.uint32
    assert document.spans == ((1, 3), (4, 5))
    assert (document.answer_tokens, document.name, document.source) == (0, "g", "mine")
    for reject, (_, reason) in zip(prompts.rejects, READY, strict=True):
        assert reason in reject.reason
    # the same as columns of whole numbers, and under another mask another document
    table = pyarrow.table(
        {"input_ids": [[5, 6, 7, 8, 9]] * 2, "loss_mask": [[0, 1, 1, 0, 1], [0, 1, 1, 1, 1]]}
    )
    parquet.write_table(table, tmp_path / "c.parquet")
    first, second = load_prompts(
        config.model_copy(update={"path": tmp_path / "c.parquet"}), tiny_checkpoint
    ).documents
    assert first.uid == document.uid
    assert first.input_ids.tolist() == document.input_ids.tolist()
    assert second.uid != document.uid
    assert isinstance(next(read_conversations(tmp_path / "c.parquet", "given")), ReadyTokens)


def test_a_line_far_too_long_is_left_out_unparsed_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "c.jsonl"
    with open(path, "wb") as file:
        file.write(lines([talk("a")]) + b'{"messages": [' + b"x" * (40 << 20) + b"\n" + lines([talk("b")]))
    found = list(read_conversations(path, max_length=2048))
    assert [type(x) for x in found] == [Conversation, Reject, Conversation]
    assert found[1].reason.startswith("too long: 41,943,0")
    assert (found[1].line, found[2].place.line) == (2, 3)


def test_text_that_cannot_fit_is_rejected_before_it_is_tokenised(tmp_path, tiny_checkpoint, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines([talk("word " * 100_000, "x"), talk("Hello?", "Yes.")]))
    config = PromptsConfig(path=path, max_length=64, max_answer_tokens=8)
    (reject,) = load_prompts(config, tiny_checkpoint).rejects
    assert reject.reason.startswith("too long: 500,0")
    assert "bytes of text" in reject.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number of more than 4,300 digits"),
        (b'\xff{"messages": []}', "not UTF-8: byte 1 of the line"),
    ],
)
def test_reasons_are_in_words_of_the_input_not_of_python(line, reason, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(line + b"\n")
    (found,) = read_conversations(path)
    assert reason in found.reason
