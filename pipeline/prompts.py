# ruff: noqa: RUF001  (the bars of the special tokens are the full-width ones, as released)
"""Conversations in a JSONL file to documents: token ids, loss mask, and a number that stays the same.

A line is {"messages": [{"role", "content"}, ...]}: an optional system message, then user and assistant in
turn. An answer may begin with its reasoning, `<think>...</think>`. Other keys are kept out of the text; `id`
is shown in messages.

With `answers = "given"` the answers of the file are the text and all of them count for the loss. With
`answers = "target"` the last answer is dropped, the prompt ends where an answer begins, and the target writes
one; then only what it wrote counts, for the answers before it are someone else's words.

Templates write DeepSeek's format, in which an answer stands between `<｜Assistant｜>`, one mark that says
whether reasoning follows, and the end token. The end token counts for the loss: a target has to produce it.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from configs.contract import Template
from configs.errors import InputError
from configs.files import atomic_write, sha256_json
from configs.schema import PromptsConfig

__all__ = [
    "Conversation",
    "Document",
    "NoConversationsError",
    "Prompts",
    "Reject",
    "Renderer",
    "held_out_lines",
    "load_prompts",
    "read_conversations",
    "require_conversations",
    "tokenizer_sha256",
    "write_rejects",
]

ROLES = ("system", "user", "assistant")
ASSISTANT, THINK, END_THINK = "<｜Assistant｜>", "<think>", "</think>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# raise it when the same conversation, tokenizer and template would give other tokens or another mask
RENDERING = 1


@dataclass(frozen=True)
class Conversation:
    """A line that parses: `messages` alternate, `thinking` says whether the last answer has reasoning."""

    line: int
    name: str
    messages: tuple[dict[str, str], ...]
    thinking: bool


@dataclass(frozen=True)
class Reject:
    """A line that is left out, and why."""

    file: str
    line: int
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Document:
    """What one conversation asks of the engine.

    Attributes:
        uid: 64-bit number, a hash of content, tokenizer, template and the kind of answers.
        input_ids: uint32 [T]; the prompt where the target answers, else everything.
        spans: token ranges [start, stop) that count for the loss; stop None where the target writes the end.
        answer_tokens: most tokens the target may write; 0 where the answers are given.
        held_out: kept from training.
        name, line, source: where it comes from: its `id`, its line, the file's name.
    """

    uid: int
    input_ids: np.ndarray
    spans: tuple[tuple[int, int | None], ...]
    answer_tokens: int
    held_out: bool
    name: str
    line: int
    source: str


@dataclass(frozen=True, eq=False)
class Prompts:
    """The documents of a file in its order, what was left out, and what turns text into tokens."""

    documents: tuple[Document, ...]
    rejects: tuple[Reject, ...]
    duplicates: int
    tokenizer_sha256: str
    template: Template
    stop_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are there before the target writes."""
        return sum(len(d.input_ids) for d in self.documents)

    @property
    def most_tokens(self) -> int:
        """Tokens if every answer is as long as it may be."""
        return sum(len(d.input_ids) + d.answer_tokens for d in self.documents)


def _check(record: Any, answers: str) -> tuple[tuple[dict[str, str], ...], bool]:
    """Messages of one parsed line, without the answer the target will write, and whether that one reasons.

    Raises:
        ValueError: it is not a conversation; the message says what was expected.
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError('expected an object with a list "messages"')
    if not record["messages"]:
        raise ValueError("the conversation is empty")
    messages = []
    for i, message in enumerate(record["messages"], 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is a {type(message).__name__}, expected an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i} has the unknown role {role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"the content of message {i} is a {type(content).__name__}, expected text")
        if not content.strip():
            raise ValueError(f"message {i} ({role}) is empty")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"message {i} ({role}) holds half of a surrogate pair, which is not text"
            ) from None
        messages.append({"role": role, "content": content})
    first = 1 if messages[0]["role"] == "system" else 0
    for i, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise ValueError(f"message {first + i + 1} is from {message['role']}, expected {expected}")
    answered = messages[-1]["role"] == "assistant"
    thinking = answered and messages[-1]["content"].startswith(THINK)
    if thinking and END_THINK not in messages[-1]["content"]:
        raise ValueError(f"the last answer opens {THINK} and does not close it")
    if answers == "target" and answered:
        messages.pop()
    elif answers == "given" and not answered:
        raise ValueError('the last message is not an answer, and prompts.answers is "given"')
    if not any(m["role"] == "user" for m in messages):
        raise ValueError("there is no message from user")
    return tuple(messages), thinking


def read_conversations(
    path: Path, answers: str = "target", limit: int | None = None
) -> Iterator[Conversation | Reject]:
    """Parse a JSONL file line by line; blank lines are skipped.

    Args:
        path: the file.
        answers: `target`: a last answer is dropped; `given`: there must be one.
        limit: stop after so many conversations.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"cannot read the conversations {path}: {error.strerror}",
            "set prompts.path, or tiny.conversations, to a JSONL file of conversations",
        ) from None
    found = 0
    with file:
        for number, data in enumerate(file, 1):
            if not data.strip():
                continue
            name = ""
            try:
                record = json.loads(data.decode("utf-8-sig" if number == 1 else "utf-8"))
                name = str(record.get("id", "")) if isinstance(record, dict) else ""
                name = name.encode(errors="replace").decode()
                messages, thinking = _check(record, answers)
            except UnicodeDecodeError as error:
                yield Reject(str(path), number, name, f"not UTF-8: byte {error.start} of the line")
            except json.JSONDecodeError as error:
                reason = f"not JSON: {error.msg} at column {error.colno}"
                yield Reject(str(path), number, name, reason)
            except (ValueError, RecursionError) as error:
                yield Reject(str(path), number, name, str(error) or type(error).__name__)
            else:
                found += 1
                yield Conversation(number, name, messages, thinking)
                if found == limit:
                    return


def require_conversations(path: Path) -> list[Conversation]:
    """Every conversation of a file that must hold nothing else, with its answers.

    Raises:
        InputError: the file cannot be read, is empty, or a line is not a conversation; names the line.
    """
    found: list[Conversation] = []
    for item in read_conversations(path, "given"):
        if isinstance(item, Reject):
            raise InputError(
                f"{path}:{item.line}: {item.reason}",
                "correct the line, or set tiny.conversations to another file",
            )
        found.append(item)
    if not found:
        raise InputError(f"{path} holds no conversation", "set tiny.conversations to another file")
    return found


def tokenizer_sha256(directory: Path) -> str:
    """Hash of the tokenizer's files, by name and bytes.

    Raises:
        InputError: there is no tokenizer.json.
    """
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError:
            if name == TOKENIZER_FILES[0]:
                raise InputError(
                    f"{directory} has no {name}", "set target.path to a checkpoint with its tokenizer"
                ) from None
            continue
        digest.update(json.dumps([name, len(data)]).encode() + data)
    return digest.hexdigest()


class Renderer:
    """Turns messages into token ids and loss spans, with the tokenizer and chat template of a target.

    The template is the tokenizer's own; the released DeepSeek-V3.2 has none, and for it the serving engine's
    encoding is used (vllm/tokenizers/deepseek_v32_encoding.py).

    Raises:
        InputError: the directory has no usable tokenizer, no template, or another format than DeepSeek's.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer_sha256 = tokenizer_sha256(directory)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(directory))
        except Exception as error:
            raise InputError(
                f"the tokenizer of {directory} cannot be loaded: {error}", "copy the tokenizer's files again"
            ) from None
        self._encode: Any = None
        text = self._tokenizer.chat_template
        if isinstance(text, str):
            self.template = Template(name="jinja", sha256=sha256_json([RENDERING, text]))
        else:
            self._encode = _released_encoding(directory)
            source = inspect.getsource(inspect.getmodule(self._encode))  # type: ignore[arg-type]
            self.template = Template(name="deepseek_v32", sha256=sha256_json([RENDERING, source]))
        vocabulary = self._tokenizer.get_vocab()
        if ASSISTANT not in vocabulary or self._tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer of {directory} has no token {ASSISTANT} or no end token",
                "only DeepSeek's chat format is known",
            )
        self._assistant = vocabulary[ASSISTANT]
        self._marks = [vocabulary[t] for t in (THINK, END_THINK) if t in vocabulary]
        self.stop_ids = (int(self._tokenizer.eos_token_id),)
        control = set(self._tokenizer.get_added_vocab()) | set(self._tokenizer.all_special_tokens)
        control -= {THINK, END_THINK}
        self._control = re.compile("|".join(map(re.escape, sorted(control))))

    def check(self, messages: Sequence[dict[str, str]]) -> None:
        """Refuse text that would pass for the template's own marks. Raises ValueError naming the message."""
        for i, message in enumerate(messages, 1):
            found = self._control.search(message["content"])
            if found:
                raise ValueError(f"message {i} contains the control token {found[0]!r}")

    def text(self, messages: Sequence[dict[str, str]], thinking: bool, generate: bool) -> str:
        """A conversation as the target sees it; with `generate` up to the place where an answer begins."""
        if self._encode is None:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate, thinking=thinking
            )
            assert isinstance(text, str)
            return text
        split = []
        for message in messages:
            reasoning, mark, content = message["content"].rpartition(END_THINK)
            if message["role"] == "assistant" and mark:
                split.append(
                    {"role": "assistant", "content": content, "reasoning": reasoning.removeprefix(THINK)}
                )
            else:
                split.append(message)
        return self._encode(split, thinking_mode="thinking" if thinking else "chat")

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32 [T]."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [np.asarray(ids, np.uint32) for ids in encoded["input_ids"]]

    def spans(self, ids: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Token ranges [start, stop) of the answers, each with its end token."""
        stops = np.flatnonzero(np.isin(ids, self.stop_ids))
        found = []
        for start in np.flatnonzero(ids == self._assistant) + 1:
            if start < len(ids) and ids[start] in self._marks:
                start += 1
            later = stops[stops >= start]
            found.append((int(start), int(later[0]) + 1 if len(later) else len(ids)))
        return tuple((a, b) for a, b in found if a < b)


def _released_encoding(directory: Path) -> Any:
    from configs.target import target_config

    kind = target_config(directory).get("model_type")
    if kind != "deepseek_v32":
        raise InputError(
            f"the tokenizer of {directory} has no chat template, and none is known for {kind}",
            "add chat_template to tokenizer_config.json",
        )
    from vllm.tokenizers.deepseek_v32_encoding import encode_messages

    return encode_messages


def _number(*parts: Any) -> int:
    """A 64-bit hash of JSON values."""
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _content(conversation: Conversation, config: PromptsConfig) -> int:
    return _number(config.answers, conversation.messages, conversation.thinking)


def _is_held_out(content: int, config: PromptsConfig, seed: int) -> bool:
    return _number("held out", seed, content) < config.held_out * 2**64


def held_out_lines(config: PromptsConfig, seed: int) -> set[int]:
    """Lines, from 1, of the conversations of `prompts.path` that are kept from training."""
    assert config.path is not None
    return {
        item.line
        for item in read_conversations(config.path, config.answers, config.limit)
        if not isinstance(item, Reject) and _is_held_out(_content(item, config), config, seed)
    }


BATCH = 1024  # conversations tokenised at a time


def load_prompts(config: PromptsConfig, target: Path, seed: int) -> Prompts:
    """Read, check, render and number every conversation of `prompts.path`.

    Conversations that would become the same document are used once. Reading the same unchanged file again in
    one process gives the same object.

    Raises:
        InputError: no path, no such file, or no tokenizer at the target.
        NoConversationsError: nothing in the file is usable.
    """
    if config.path is None:
        raise InputError("prompts.path is not set", "set it to a JSONL file of conversations")
    try:
        state = config.path.stat()
    except OSError as error:
        raise InputError(
            f"there is no file of conversations {config.path}: {error.strerror}",
            "set prompts.path to a JSONL file of conversations",
        ) from None
    return _load(config, Path(target), seed, (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=1)
def _load(config: PromptsConfig, target: Path, seed: int, _state: tuple[int, int]) -> Prompts:
    assert config.path is not None
    renderer = Renderer(target)
    rejects: list[Reject] = []
    documents: list[Document] = []
    seen: set[int] = set()
    duplicates = 0
    batch: list[tuple[Conversation, str, int]] = []

    def flush() -> None:
        for (conversation, _, content), ids in zip(
            batch, renderer.ids([t for _, t, _ in batch]), strict=True
        ):
            document = _document(config, renderer, conversation, ids, content, seed)
            (rejects if isinstance(document, Reject) else documents).append(document)  # type: ignore[arg-type]
        batch.clear()

    for item in read_conversations(config.path, config.answers, config.limit):
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        content = _content(item, config)
        if content in seen:
            duplicates += 1
            continue
        try:
            renderer.check(item.messages)
            text = renderer.text(item.messages, item.thinking, config.answers == "target")
        except Exception as error:
            # a template may raise anything
            rejects.append(Reject(str(config.path), item.line, item.name, str(error) or type(error).__name__))
            continue
        seen.add(content)
        batch.append((item, text, content))
        if len(batch) == BATCH:
            flush()
    flush()
    rejects.sort(key=lambda r: r.line)
    if not documents:
        raise NoConversationsError(config.path, rejects)
    return Prompts(
        tuple(documents),
        tuple(rejects),
        duplicates,
        renderer.tokenizer_sha256,
        renderer.template,
        renderer.stop_ids,
    )


def _document(
    config: PromptsConfig,
    renderer: Renderer,
    conversation: Conversation,
    ids: np.ndarray,
    content: int,
    seed: int,
) -> Document | Reject:
    file, limit = str(config.path), config.max_length
    room = limit - len(ids)
    if room < (1 if config.answers == "target" else 0):
        reason = f"too long: {len(ids)} tokens, prompts.max_length is {limit}"
        if config.answers == "target":
            reason += " with the answer"
        return Reject(file, conversation.line, conversation.name, reason)
    spans: tuple[tuple[int, int | None], ...] = ((len(ids), None),)
    if config.answers == "given":
        spans = renderer.spans(ids)
        if not spans:
            return Reject(file, conversation.line, conversation.name, "the rendered text has no answer")
    return Document(
        uid=_number(content, renderer.tokenizer_sha256, renderer.template.sha256),
        input_ids=ids,
        spans=spans,
        answer_tokens=min(config.max_answer_tokens, room) if config.answers == "target" else 0,
        held_out=_is_held_out(content, config, seed),
        name=conversation.name,
        line=conversation.line,
        source=Path(file).name,
    )


class NoConversationsError(InputError):
    """Every line of the input is rejected; `rejects` says why."""

    def __init__(self, path: Path, rejects: Sequence[Reject]) -> None:
        first = f"; the first: line {rejects[0].line}: {rejects[0].reason}" if rejects else ""
        super().__init__(
            f"{path} holds no usable conversation ({len(rejects)} rejected{first})",
            'expected lines like {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
        self.rejects = tuple(rejects)


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Publish the rejected lines as JSONL: file, line, id and reason."""
    lines = (
        json.dumps({"file": r.file, "line": r.line, "id": r.name, "reason": r.reason}, ensure_ascii=False)
        for r in rejects
    )
    atomic_write(path, "".join(line + "\n" for line in lines))
