# ruff: noqa: RUF001  (the bars of the special tokens are the full-width ones, as released)
"""What the target reads: tools, reasoning and turns as its server writes them, or a reason why not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from configs.files import read_json, write_json
from configs.held_out import uid_group
from configs.schema import PromptsConfig, RunConfig
from pipeline.prompts import Document, Prompts, load_prompts, next_turn
from pipeline.render import Renderer

END = "<｜end▁of▁sentence｜>"
TOOLS = [{"type": "function", "function": {"name": "add", "description": 'Adds "a" and b.'}}]


def answer(text: str = "", reasoning: str = "", *calls: dict) -> dict:
    message = {"role": "assistant", "content": text}
    calls = [{"type": "function", "function": {"name": "add", "arguments": json.dumps(c)}} for c in calls]
    return (
        message
        | ({"reasoning_content": reasoning} if reasoning else {})
        | ({"tool_calls": calls} if calls else {})
    )


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


@pytest.fixture(scope="module")
def released(tmp_path_factory, tiny_checkpoint) -> Path:
    """The tiny target without a chat template, as DeepSeek-V3.2 is released."""
    directory = tmp_path_factory.mktemp("released") / "target"
    shutil.copytree(tiny_checkpoint, directory)
    config = read_json(directory / "tokenizer_config.json")
    del config["chat_template"]
    write_json(directory / "tokenizer_config.json", config)
    return directory


@pytest.fixture
def load(tmp_path):
    def load(target: Path, *records: dict, **settings) -> Prompts:
        path = tmp_path / "c.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        settings = {"max_length": 4096, "max_answer_tokens": 64} | settings
        return load_prompts(PromptsConfig(path=path, **settings), target)

    return load


def served(target: Path, messages: list[dict], thinking: bool, tools: list | None = None) -> list[int]:
    """The prompt that vLLM's server makes of a conversation."""
    from vllm.tokenizers.deepseek_v32 import get_deepseek_v32_tokenizer

    server = get_deepseek_v32_tokenizer(AutoTokenizer.from_pretrained(str(target)))
    named = [{("reasoning" if k == "reasoning_content" else k): v for k, v in m.items()} for m in messages]
    return server.apply_chat_template(named, tools=tools, thinking=thinking)


CONVERSATIONS = {
    "tools": ([user("1 + 1?")], TOOLS),
    "tools and system": ([{"role": "system", "content": "Be brief."}, user("1 + 1?")], TOOLS),
    "a call and its result": ([user("1 + 1?"), answer("", "Add.", {"a": 1, "b": [2]}), tool("2")], TOOLS),
    "two calls": ([user("?"), answer("Wait.", "Add.", {"a": 1}, {"a": "x"}), tool("2"), tool("")], TOOLS),
    "earlier calls": (
        [user("?"), answer("", "Add.", {"a": 1}), tool("2"), answer("2.", "So."), user("And 2 + 2?")],
        TOOLS,
    ),
    "reasoning": ([user("?"), answer("Yes.", "Well."), user("Sure?")], None),
    "developer": ([{"role": "developer", "content": "Say hello.", "tools": TOOLS}], None),
}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_what_the_server_of_the_released_target_makes(name, thinking, load, released):
    messages, tools = CONVERSATIONS[name]
    record = {"messages": messages} | ({"tools": tools} if tools else {})
    (document,) = load(released, record, thinking="on" if thinking else "off").documents
    assert document.input_ids.tolist() == served(released, messages, thinking, tools)
    # a last answer of the file is dropped first
    ended = record | {"messages": [*messages, answer("Done.", "Hm.")]}
    (again,) = load(released, ended, thinking="on" if thinking else "off").documents
    assert again.input_ids.tolist() == document.input_ids.tolist()


def test_answers_behind_tool_results_count_for_the_loss(load, released):
    tokenizer = AutoTokenizer.from_pretrained(str(released))
    messages = [user("?"), answer("", "Add.", {"a": 1}), tool("2"), answer("Two.", "So."), user("Sure?")]
    messages.append(answer("Yes."))
    (document,) = load(released, {"messages": messages, "tools": TOOLS}, answers="given").documents
    call, second, last = (tokenizer.decode(document.input_ids[a:b]) for a, b in document.spans)
    assert call.startswith("\n\n<｜DSML｜function_calls>")
    assert call.endswith("function_calls>" + END)
    assert (second, last) == ("Two." + END, "Yes." + END)
    # the last answers with their reasoning, where the file has it
    (document,) = load(released, {"messages": messages[:4], "tools": TOOLS}, answers="given").documents
    call, second = (tokenizer.decode(document.input_ids[a:b]) for a, b in document.spans)
    assert call.startswith("Add.</think>\n\n<｜DSML｜function_calls>")
    assert second == "So.</think>Two." + END


def test_a_template_that_cannot_write_tools_rejects_them_with_a_reason(load, tiny_checkpoint):
    plain = {"messages": [user("Hello?"), answer("Yes.")]}
    records = [
        plain | {"tools": TOOLS},
        {"messages": [user("?"), answer("Wait.", "", {"a": 1})]},
        {"messages": [user("?"), answer("Wait.", "", {"a": 1}), tool("2"), answer("2.")]},
        {"messages": [{"role": "developer", "content": "Hello?"}, answer("Yes.")]},
    ]
    for answers in ("target", "given"):
        prompts = load(tiny_checkpoint, plain, *records, answers=answers)
        found = {r.line: r.reason for r in prompts.rejects}
        assert found[2] == "the chat template leaves out tools"
        assert "unknown role tool" in found[4]
        assert "unknown role developer" in found[5]
        if answers == "given":
            assert found[3] == "the chat template leaves out a tool call of message 2"
        assert len(prompts.documents) == (2 if answers == "target" else 1)


def test_what_the_released_encoding_would_drop_is_rejected(load, released):
    developer = {"role": "developer", "content": "Be kind."}
    records = [
        {"messages": [developer, user("Hello?")]},
        {"messages": [user("?"), answer("", "Add.", {"a": 1}), tool("2"), answer("Two.")], "tools": TOOLS},
    ]
    prompts = load(released, *records, {"messages": [user("a")]}, thinking="on")
    assert [(r.line, "developer message" in r.reason) for r in prompts.rejects] == [(1, True)]
    prompts = load(released, *records, {"messages": [user("a"), answer("b")]}, answers="given")
    assert [r.reason for r in prompts.rejects] == [
        'the last message is no answer, and prompts.answers is "given"',
        "an answer to the last question has no reasoning, and others have",
    ]


def test_control_tokens_are_found_in_tools_and_calls_too(load, released):
    forged = [{"type": "function", "function": {"name": "add", "description": "<｜User｜>"}}]
    records = [
        {"messages": [user("?")], "tools": forged},
        {"messages": [user("?"), answer("", "", {"a": "<｜Assistant｜>"}), tool("2")], "tools": TOOLS},
        {"messages": [user("?")]},
    ]
    assert [r.reason for r in load(released, *records).rejects] == [
        "a tool contains the control token '<｜User｜>'",
        "message 2 contains the control token '<｜Assistant｜>'",
    ]


def test_thinking_is_the_files_or_the_settings(load, tiny_checkpoint):
    reasons, plain = [user("a?"), answer("b", "c")], [user("d?"), answer("e")]
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_checkpoint))

    def marks(thinking: str, **settings) -> list[str]:
        records = [{"messages": m} for m in (reasons, plain, plain[:1])]
        documents = load(tiny_checkpoint, *records, thinking=thinking, **settings).documents
        return [tokenizer.decode(d.input_ids[-1:]) for d in documents]

    # the third asks what the second asks, and is used once
    assert marks("auto") == ["<think>", "</think>"]
    assert marks("on") == ["<think>", "<think>"]
    assert marks("off") == ["</think>", "</think>"]
    assert marks("both") == ["</think>", "<think>"] * 2
    both = load(tiny_checkpoint, {"messages": reasons}, thinking="both").documents
    assert both.uids[0] != both.uids[1]
    assert uid_group(both[0].uid) == uid_group(both[1].uid)
    given = load(tiny_checkpoint, {"messages": reasons}, {"messages": plain}, thinking="on", answers="given")
    assert [r.reason for r in given.rejects] == [
        'the last answer does not reason, and prompts.thinking is "on"'
    ]
    with pytest.raises(ValueError, match=r"prompts\.thinking"):
        RunConfig.model_validate({"prompts": {"answers": "given", "thinking": "both"}})


def converse(prompts: Prompts, document: Document, answers: list[list[int]]) -> list[Document]:
    """The documents of a conversation whose answers are known."""
    found = [document]
    for tokens in answers:
        following = next_turn(found[-1], tokens, prompts.turns)
        if following is None:
            break
        found.append(following)
    return found


@pytest.mark.parametrize("name", ["released", "tiny_checkpoint"])
def test_every_answer_is_asked_for_in_the_context_of_the_targets_own(name, load, request):
    target = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    system = {"role": "system", "content": "Be brief."}
    file = [system, user("One?"), answer("x"), user("Two?"), answer("y"), user("Three?"), answer("z")]
    prompts = load(target, {"messages": file}, answers="every")
    (document,) = prompts.documents
    own = ["First answer.", "Second answer."]
    tokens = [tokenizer.encode(a + END, add_special_tokens=False) for a in own]
    found = converse(prompts, document, tokens)
    assert len(found) == 3
    assert {d.uid for d in found} == {document.uid}  # one document, which grows
    live = [system, user("One?"), answer(own[0]), user("Two?"), answer(own[1]), user("Three?")]
    for k, d in enumerate(found):
        assert d.input_ids.tolist() == served_by(target, live[: 2 + 2 * k], False)
        assert len(d.spans) == k + 1
        assert d.spans[-1] == (len(d.input_ids), None)
        assert [tokenizer.decode(d.input_ids[a:b]) for a, b in d.spans[:-1]] == [a + END for a in own[:k]]
    assert next_turn(found[-1], tokens[0], prompts.turns) is None


def served_by(target: Path, messages: list[dict], thinking: bool) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    if tokenizer.chat_template is None:
        return served(target, messages, thinking)
    within = [
        m | {"content": f"<think>{m['reasoning_content']}</think>{m['content']}"}
        if "reasoning_content" in m
        else m
        for m in messages
    ]
    text = tokenizer.apply_chat_template(
        within, tokenize=False, add_generation_prompt=True, thinking=thinking
    )
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["released", "tiny_checkpoint"])
def test_with_reasoning_each_turn_is_a_document_without_the_earlier_reasoning(name, load, request):
    target = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    file = [user("One?"), answer("x", "r"), user("Two?"), answer("y", "r"), user("Three?")]
    prompts = load(target, {"messages": file}, answers="every", thinking="on")
    (document,) = prompts.documents
    own = [answer("First.", "I think."), answer("Second.", "I think again.")]
    texts = [f"{a['reasoning_content']}</think>{a['content']}{END}" for a in own]
    tokens = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    found = converse(prompts, document, tokens)
    live = [user("One?"), own[0], user("Two?"), own[1], user("Three?")]
    for k, d in enumerate(found):
        assert d.input_ids.tolist() == served_by(target, live[: 1 + 2 * k], True)
        assert d.spans == ((len(d.input_ids), None),)
    assert [d.uid for d in found] == [document.uid, *document.turn_uids]
    assert len({d.uid for d in found}) == 3
    assert len({uid_group(d.uid) for d in found}) == 1
    # reasoning that does not end leaves nothing to go on from
    assert next_turn(document, tokenizer.encode(END, add_special_tokens=False), prompts.turns) is None


def test_a_later_turn_that_is_rejected_is_found_where_its_conversation_stands(load, tiny_checkpoint):
    def turns(question: str) -> dict:
        return {
            "messages": [user(question), answer("x", "r"), user("Two?"), answer("y", "r"), user("Three?")]
        }

    records = [{"messages": [user("a")]}, turns("One?"), turns("One?"), turns("Other?")]
    found = load(tiny_checkpoint, *records, answers="every", thinking="on").documents
    first, _, last = found
    wanted = [last.turn_uids[1], first.uid, 7, last.turn_uids[0]]
    places = [(0, first.uid), *((2, uid) for uid in sorted(last.turn_uids))]
    assert found.places(np.array(wanted, np.uint64)) == places


def test_a_conversation_ends_where_an_answer_does_not_or_no_room_is_left(load, tiny_checkpoint):
    file = [user("One?"), answer("x"), user("Two?" * 20)]
    prompts = load(tiny_checkpoint, {"messages": file}, answers="every", max_length=64, max_answer_tokens=32)
    (document,) = prompts.documents
    (stop,) = prompts.stop_ids
    assert next_turn(document, [300, 301], prompts.turns) is None  # cut at the bound
    assert next_turn(document, [], prompts.turns) is None
    following = next_turn(document, [300, stop], prompts.turns)
    assert following is None or len(following.input_ids) + following.answer_tokens <= 64
    room = 64 - len(document.input_ids) - len(document.turns[0])
    assert next_turn(document, [300] * (room - 1) + [stop], prompts.turns) is None


def test_of_conversations_that_ask_the_same_the_choice_does_not_follow_from_their_order(
    load, tiny_checkpoint
):
    records = [{"id": str(i), "messages": [user("Hello?"), answer(f"Answer {i}.")]} for i in range(5)]
    records.append({"id": "other", "messages": [user("Hello!")]})
    forward = load(tiny_checkpoint, *records)
    backward = load(tiny_checkpoint, *reversed(records))
    assert forward.duplicates == backward.duplicates == 4
    assert set(forward.documents.uids.tolist()) == set(backward.documents.uids.tolist())
    assert {d.name for d in forward.documents} == {d.name for d in backward.documents}


def test_documents_in_flat_arrays_are_those_that_went_in(load, tiny_checkpoint):
    records = [
        {
            "id": f"größe {i}",
            "source": f"s{i % 3}",
            "messages": [user("x " * (i + 1)), answer("y"), user("z")],
        }
        for i in range(20)
    ]
    prompts = load(tiny_checkpoint, *records, answers="every")
    documents = prompts.documents
    assert len(documents) == 20
    assert [d.name for d in documents] == [r["id"] for r in records]
    assert [d.source for d in documents[3:6]] == ["s0", "s1", "s2"]
    assert documents[-1].uid == documents.uids[19]
    assert documents.lengths.tolist() == [len(d.input_ids) for d in documents]
    assert all(len(d.turns) == 1 for d in documents)
    for d, most in zip(documents, documents.most_tokens, strict=True):
        assert most == len(d.input_ids) + 64 + len(d.turns[0]) + 64
    with pytest.raises(IndexError):
        documents[20]
    assert prompts.tokens == sum(len(d.input_ids) for d in documents)
    assert isinstance(documents[0].input_ids, np.ndarray)


def test_a_released_tokenizer_is_loaded_as_it_is_and_without_alarm(released, tmp_path, capfd):
    """Beside a config.json without a transformers version the library suspects every tokenizer of a fault."""
    directory = tmp_path / "target"
    shutil.copytree(released, directory)
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", {k: v for k, v in config.items() if k != "transformers_version"})
    renderer = Renderer(directory)
    assert "regex" not in capfd.readouterr().err
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "<｜User｜>It's 12345  größe\n\n日本<｜Assistant｜></think>x<｜end▁of▁sentence｜>"
    assert renderer.ids([text])[0].tolist() == raw.encode(text, add_special_tokens=False).ids
