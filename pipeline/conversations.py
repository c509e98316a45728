"""Conversations as they lie in files: which files, which lines or rows, and what each of them says.

A file is JSONL, plain or compressed (gzip, zstd, bzip2, lz4, xz; known by its first bytes), or Parquet with
the same names as columns. A line or row is one of

    {"messages": [{"role", "content"}, ...]}            OpenAI's form, with tools and tool calls
    {"conversations": [{"from", "value"}, ...]}         ShareGPT's form
    {"input_ids": [...], "loss_mask": [...]}            tokens, and 1 where one counts for the loss

and may carry `id` (shown in messages), `source` (a label; the file's name where there is none) and `tools`.
An answer may begin with its reasoning, as `<think>...</think>` in its content or as `reasoning_content`.
What cannot be kept is a reason to reject a conversation; nothing of it is dropped in silence.
"""

import glob
import hashlib
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from configs.errors import InputError
from configs.held_out import is_held_out

__all__ = [
    "END_THINK",
    "THINK",
    "Conversation",
    "Place",
    "ReadyTokens",
    "Reject",
    "find_files",
    "held_out_lines",
    "input_exists",
    "read_conversations",
    "require_conversations",
]

THINK, END_THINK = "<think>", "</think>"
# first bytes of a compressed file, and pyarrow's name of the codec
CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
XZ, PARQUET, ZIP = b"\xfd7zXZ", b"PAR1", b"PK\x03\x04"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
COLUMNS = ("id", "source", "messages", "conversations", "input_ids", "loss_mask", "tools", "functions")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool")
# keys of a message that say something no chat format of ours can write
UNKNOWN_KEYS = ("function_call", "refusal", "audio", "prefix")
# a line may hold that much for each token of the longest document: escapes, earlier reasoning, other keys
BYTES_PER_TOKEN = 1024
LEAST_BYTES = 1 << 20
JSON_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}


@dataclass(frozen=True)
class Place:
    """Where a conversation stands: file, line or row from 1, its `id` and its `source`."""

    file: str
    line: int
    name: str
    source: str


@dataclass(frozen=True)
class Reject:
    """A conversation that is left out, and why."""

    file: str
    line: int
    name: str
    reason: str


@dataclass(frozen=True)
class Conversation:
    """A conversation that parses.

    Attributes:
        place: where it stands.
        content: SHA-256 of all messages and tools as they stand in the file.
        messages: role, content and, of answers, tool_calls; reasoning stands in the content as
            `<think>...</think>`. A last answer that the target is to write again is left out.
        tools: function definitions in OpenAI's form.
        thinking: an answer to the last question begins with reasoning.
    """

    place: Place
    content: bytes
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    thinking: bool

    @property
    def group(self) -> int:
        """The upper half of the uids of its documents."""
        return int.from_bytes(self.content[:4], "big")


@dataclass(frozen=True, eq=False)
class ReadyTokens:
    """A document that is tokenised already: input_ids int64 [T], loss_mask bool [T]."""

    place: Place
    content: bytes
    input_ids: np.ndarray
    loss_mask: np.ndarray


def find_files(path: Path | Sequence[Path] | None) -> list[Path]:
    """The files of `prompts.path`: a path, a pattern like `data/*.jsonl.gz`, or a list of either.

    Raises:
        InputError: nothing is set, or a path or pattern names no file.
    """
    hint = "set prompts.path to a file of conversations, a pattern, or a list of them"
    if not path:
        raise InputError("prompts.path is not set", hint)
    found: list[Path] = []
    for one in (path,) if isinstance(path, (str, Path)) else path:
        matches = (
            [Path(one)] if Path(one).exists() else sorted(map(Path, glob.glob(str(one), recursive=True)))
        )
        if not matches:
            raise InputError(f"there is no file of conversations {Path(one).absolute()}", hint)
        found += matches
    for file in found:
        if file.is_dir():
            raise InputError(f"{file} is a directory", f'name the files in it, as "{file}/*.jsonl"')
    return list(dict.fromkeys(found))


def input_exists(path: Path | Sequence[Path] | None) -> bool:
    """Whether every part of `prompts.path` names something on this machine."""
    paths = (path,) if isinstance(path, (str, Path)) else path or ()
    return bool(paths) and all(Path(p).exists() or glob.glob(str(p), recursive=True) for p in paths)


def read_conversations(
    path: Path, answers: str = "target", max_length: int | None = None
) -> Iterator[Conversation | ReadyTokens | Reject]:
    """Parse a file, one line or row at a time; blank lines are skipped.

    Args:
        path: the file.
        answers: `target` and `every`: a last answer is dropped; `given`: there must be one.
        max_length: tokens of the longest document; lines that are far beyond it are not parsed.

    Raises:
        InputError: the file is missing, cannot be read, or is of another kind.
    """
    file, default = str(path), Path(path).name
    for line, record in _records(Path(path), max_length):
        if isinstance(record, str):
            yield Reject(file, line, "", record)
            continue
        name = ""
        try:
            name, source = _label(record, "id"), _label(record, "source") or default
            place = Place(file, line, name, source)
            if isinstance(record, dict) and record.get("input_ids") is not None:
                yield _ready(place, record, answers)
            else:
                yield _conversation(place, record, answers)
        except ValueError as error:
            yield Reject(file, line, name, str(error))


def _label(record: Any, key: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    return "" if value is None else str(value).encode(errors="replace").decode()


def _records(path: Path, max_length: int | None) -> Iterator[tuple[int, Any]]:
    """Line or row number and what it holds; text in its place says why that one is unusable."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            file.seek(0)
            if start.startswith(PARQUET):
                yield from _rows(path)
                return
            if start.startswith(ZIP) or start.startswith(UTF16):
                kind = "a zip archive" if start.startswith(ZIP) else "UTF-16 text"
                raise InputError(f"{path} is {kind}", "unpack it or write it as UTF-8: one object a line")
            most = max(LEAST_BYTES, BYTES_PER_TOKEN * max_length) if max_length else None
            yield from _lines(path, _decompressed(file, start), most)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(
            f"cannot read the conversations {path}: {getattr(error, 'strerror', None) or error}",
            "set prompts.path, or tiny.conversations, to a JSONL or Parquet file of conversations",
        ) from None


def _decompressed(file: BinaryIO, start: bytes) -> Any:
    """The file's text as a buffered stream."""
    if start.startswith(XZ):
        return lzma.open(file)
    for magic, codec in CODECS.items():
        if start.startswith(magic):
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(file, codec), 1 << 20)
    return file


def _lines(path: Path, stream: Any, most: int | None) -> Iterator[tuple[int, Any]]:
    number = 0
    while data := stream.readline(-1 if most is None else most + 1):
        number += 1
        if most is not None and len(data) > most:
            size = len(data)
            while not data.endswith(b"\n") and (data := stream.readline(most)):
                size += len(data)
            yield number, f"too long: {size:,} bytes, and prompts.max_length leaves room for {most:,} at most"
            continue
        if not data.strip():
            continue
        if number == 1 and data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise InputError(
                f"{path} is one JSON array, expected one object a line",
                f"write it as lines, for example with: jq -c '.[]' {path} > conversations.jsonl",
            )
        try:
            yield number, json.loads(data.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield number, f"not UTF-8: byte {error.start + 1} of the line"
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error.msg} at column {error.colno}"
        except RecursionError:
            yield number, "its lists and objects are nested too deeply"
        except ValueError:  # the only other one is Python's bound of digits
            yield number, "it holds a number of more than 4,300 digits"


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        columns = [c for c in COLUMNS if c in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            values = [_column(array) for array in batch.columns]
            for row in zip(*values, strict=True):
                number += 1
                yield number, dict(zip(batch.schema.names, row, strict=True))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is damaged near row {number + 1}: {error}", "write the file again"
        ) from None
    if not columns:
        raise InputError(
            f"{path} has none of the columns {', '.join(COLUMNS[2:5])}", "name a file of conversations"
        )


def _column(array: Any) -> Sequence[Any]:
    """The rows of a column; lists of integers stay arrays."""
    from pyarrow import types

    kind = array.type
    of_integers = (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type)
    if of_integers and not array.null_count and not array.values.null_count:
        values = array.values.to_numpy()
        return [values[a:b] for a, b in pairwise(array.offsets.to_numpy())]
    return array.to_pylist()


def _ready(place: Place, record: dict[str, Any], answers: str) -> ReadyTokens:
    if answers != "given":
        raise ValueError(f'it holds ready input_ids, and prompts.answers is "{answers}", not "given"')
    ids, mask = (_integers(record, key) for key in ("input_ids", "loss_mask"))
    if len(ids) != len(mask):
        raise ValueError(f"it has {len(ids)} input_ids and {len(mask)} values of loss_mask")
    if not len(ids):
        raise ValueError("the conversation is empty")
    largest = mask.max()
    if mask.min() < 0 or largest > 1:
        raise ValueError("loss_mask holds other values than 0 and 1")
    if not largest:
        raise ValueError("no token counts for the loss: loss_mask is 0 everywhere")
    counts = mask.astype(bool)
    content = hashlib.sha256(ids.tobytes() + counts.tobytes()).digest()
    return ReadyTokens(place, content, ids, counts)


def _integers(record: dict[str, Any], key: str) -> np.ndarray:
    """A key's list as int64 [T]."""
    value = record.get(key)
    if value is None:
        raise ValueError(f"input_ids without {key}" if key == "loss_mask" else f"{key} is missing")
    try:
        array = np.asarray(value)
        if array.ndim == 1 and (array.dtype.kind in "iub" or not len(array)):
            return array.astype(np.int64)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{key} is no list of whole numbers")


def _conversation(place: Place, record: Any, answers: str) -> Conversation:
    """Check one record. Raises ValueError: it is no conversation; the message says what was expected."""
    given = _messages(record)
    if not given:
        raise ValueError("the conversation is empty")
    tools = _tools(record.get("tools"), "tools")
    if record.get("functions"):
        raise ValueError('it has "functions", which no chat format writes any more; expected "tools"')
    messages = [_message(i, message) for i, message in enumerate(given, 1)]
    _check_order(messages)
    text = json.dumps([messages, tools], ensure_ascii=False, separators=(",", ":"))
    try:
        content = hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError:
        raise ValueError("a name or an argument holds half of a surrogate pair, which is no text") from None
    last_question = max(i for i, m in enumerate(messages) if m["role"] in ("user", "developer"))
    rest = messages[last_question + 1 :]
    thinking = any(m["role"] == "assistant" and m["content"].startswith(THINK) for m in rest)
    answered = messages[-1]["role"] == "assistant"
    if answers == "given" and not answered:
        raise ValueError('the last message is no answer, and prompts.answers is "given"')
    if answers != "given" and answered:
        messages.pop()
    if answers == "every" and any(m["role"] == "tool" for m in messages):
        raise ValueError(
            'it holds results of tools, which answer the calls of the file: prompts.answers = "every" would'
            ' write other calls; use "target" or "given"'
        )
    return Conversation(place, content, tuple(messages), tuple(tools), thinking)


def _messages(record: Any) -> list[Any]:
    """The messages of a record, ShareGPT's brought to role and content."""
    if isinstance(record, dict):
        if isinstance(record.get("messages"), list):
            return record["messages"]
        if isinstance(record.get("conversations"), list):
            found = []
            for message in record["conversations"]:
                if isinstance(message, dict) and "from" in message:
                    role = message["from"]
                    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
                    message = {"role": role, "content": message.get("value")}
                found.append(message)
            return found
    raise ValueError('expected an object with a list "messages" or "conversations", or "input_ids"')


def _message(number: int, message: Any) -> dict[str, Any]:
    """One message: role, content, and what else a chat format can write."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {_kind(message)}, expected an object")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(
            f"message {number} has the unknown role {role!r}, expected one of {', '.join(ROLES)}"
        )
    for key in UNKNOWN_KEYS:
        if message.get(key):
            raise ValueError(f"message {number} has {key!r}, which no chat format writes")
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise ValueError(f"message {number} ({role}) has tool_calls, which only an answer has")
    content = _text(number, message.get("content"), optional=bool(calls))
    found = {"role": role, "content": content}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        if role != "assistant" or not isinstance(reasoning, str):
            raise ValueError(f"the reasoning of message {number} ({role}) is no text of an answer")
        if END_THINK in reasoning or content.startswith(THINK):
            raise ValueError(f"message {number} has its reasoning twice, or {END_THINK} within it")
        found["content"] = f"{THINK}{reasoning}{END_THINK}{content}"
    elif role == "assistant" and content.startswith(THINK) and END_THINK not in content:
        raise ValueError(f"message {number} (assistant) opens {THINK} and does not close it")
    if not found["content"].strip() and not calls and role != "tool":
        raise ValueError(f"message {number} ({role}) is empty")
    try:
        found["content"].encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"message {number} ({role}) holds half of a surrogate pair, which is no text"
        ) from None
    if calls:
        found["tool_calls"] = _tool_calls(number, calls)
    for key in ("tools", "response_format"):
        if message.get(key):
            if role not in ("system", "developer"):
                raise ValueError(f"message {number} ({role}) has {key}, expected only of system or developer")
            found[key] = _tools(message[key], f"message {number}") if key == "tools" else message[key]
    return found


def _text(number: int, content: Any, *, optional: bool) -> str:
    """Content as text; the text parts of a list are joined by line ends, as vLLM joins them."""
    if content is None and optional:
        return ""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else "text"
            text = part.get("text") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(text, str):
                raise ValueError(f"message {number} has a part of type {kind!r}, expected text alone")
            texts.append(text)
        return "\n".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} is {_kind(content)}, expected text")
    return content


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except ValueError:
            raise ValueError(f"the tools of {where} are no JSON") from None
    if not value:
        return []
    for tool in value if isinstance(value, list) else [None]:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('a tool is not of the form {"type": "function", "function": {"name": ...}}')
    return value


def _tool_calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects."""
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'a tool call of message {number} is not {{"function": {{"name": ..., "arguments": ...}}}}'
            )
        arguments = function.get("arguments")
        try:
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of a tool call of message {number} are no JSON object")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _check_order(messages: Sequence[dict[str, Any]]) -> None:
    """A system message first, if any; then questions and answers in turn, tool results behind their calls."""
    calls = results = 0
    before = None
    for i, message in enumerate(messages, 1):
        role = message["role"]
        expected: tuple[str, ...]
        if calls:
            expected = ("tool",) if results < calls else ("assistant",)
        elif before in ("user", "developer"):
            expected = ("assistant", "user") if before == "developer" else ("assistant",)
        else:
            expected = ("user", "developer", "system")[: 3 if before is None else 2]
        if role not in expected:
            wanted = "a tool's result" if expected == ("tool",) else " or ".join(expected)
            raise ValueError(f"message {i} is from {role}, expected {wanted}")
        if role == "tool":
            results += 1
        else:
            calls, results = len(message.get("tool_calls", ())), 0
        before = role
    if before == "tool" and results < calls:
        raise ValueError(f"{calls - results} of {calls} tool calls have no result")
    if not any(m["role"] in ("user", "developer") for m in messages):
        raise ValueError("there is no message from user")


def _kind(value: Any) -> str:
    return "missing" if value is None else JSON_TYPES.get(type(value), type(value).__name__)


def require_conversations(path: Path) -> list[Conversation]:
    """Every conversation of a file that must hold nothing else, with its answers.

    Raises:
        InputError: the file cannot be read, is empty, or a line is not a conversation; names the line.
    """
    found: list[Conversation] = []
    for item in read_conversations(path, "given"):
        if not isinstance(item, Conversation):
            reason = item.reason if isinstance(item, Reject) else "it holds tokens, expected text"
            line = item.line if isinstance(item, Reject) else item.place.line
            raise InputError(
                f"{path}:{line}: {reason}", "correct the line, or set tiny.conversations to another file"
            )
        found.append(item)
    if not found:
        raise InputError(f"{path} holds no conversation", "set tiny.conversations to another file")
    return found


def held_out_lines(path: Path, share: float, seed: int) -> set[int]:
    """Lines, from 1, of the conversations of a file that this share and seed keep from training."""
    found = (c for c in read_conversations(path, "given") if isinstance(c, Conversation))
    return {c.place.line for c in found if is_held_out(c.group, share, seed)}
