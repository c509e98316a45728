# ruff: noqa: RUF001  (the bars of the special tokens are the full-width ones, as released)
"""Conversations to token ids, as the target's server writes them.

Templates write DeepSeek's format, in which an answer stands behind `<｜Assistant｜>`, or behind results of
its tool calls, and one mark that says whether reasoning follows, up to the end token. A text is cut at these
marks, which are tokens of their own, into what the target reads and what it writes.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs.contract import Template
from configs.errors import InputError
from configs.files import sha256_json
from configs.target import target_config
from pipeline.conversations import END_THINK, THINK, Conversation

__all__ = ["Renderer", "tokenizer_sha256"]

ASSISTANT = "<｜Assistant｜>"
OPENING = re.compile(f"{ASSISTANT}(?:{THINK}|{END_THINK})?")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# part of the template's hash: raise it when the same template would give other tokens
RENDERING = 1


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
    """Turns conversations into token ids, with the tokenizer and chat template of a target.

    The template is the tokenizer's own; the released DeepSeek-V3.2 has none, and for it the serving engine's
    encoding is used (vllm/tokenizers/deepseek_v32_encoding.py), which also writes tools, tool calls, their
    results and the developer role. What a Jinja template leaves out of its text is a reason to reject.

    Attributes:
        think, end_think: token ids of the marks; None where the tokenizer has none.
        stop_ids: the end token.

    Raises:
        InputError: the directory has no usable tokenizer, no template, or another format than DeepSeek's.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import TokenizersBackend

        self.tokenizer_sha256 = tokenizer_sha256(directory)
        try:
            # the class vLLM takes for DeepSeek-V3.2: it uses tokenizer.json as it is; said in so many words,
            # or it warns of a fault that tokenizers of another family once had
            self._tokenizer = TokenizersBackend.from_pretrained(str(directory), fix_mistral_regex=False)
        except Exception as error:
            raise InputError(
                f"the tokenizer of {directory} cannot be loaded: {error}", "copy the tokenizer's files again"
            ) from None
        self._encoding: Any = None
        text = self._tokenizer.chat_template
        if isinstance(text, str):
            self.template = Template(name="jinja", sha256=sha256_json([RENDERING, text]))
        else:
            self._encoding = _released_encoding(directory)
            source = inspect.getsource(self._encoding)
            self.template = Template(name="deepseek_v32", sha256=sha256_json([RENDERING, source]))
        vocabulary = self._tokenizer.get_vocab()
        if ASSISTANT not in vocabulary or self._tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer of {directory} has no token {ASSISTANT} or no end token",
                "only DeepSeek's chat format is known",
            )
        self.think, self.end_think = (vocabulary.get(mark) for mark in (THINK, END_THINK))
        self.stop_ids = (int(self._tokenizer.eos_token_id),)
        self.vocab_size = int(target_config(directory)["vocab_size"])
        self._eos = str(self._tokenizer.eos_token)
        control = set(self._tokenizer.get_added_vocab()) | set(self._tokenizer.all_special_tokens)
        control -= {THINK, END_THINK}
        self._control = re.compile("|".join(map(re.escape, sorted(control))))

    @cached_property
    def longest_token(self) -> int:
        """Most bytes that one token stands for: text longer than so many times its tokens cannot be."""
        # in a byte-level vocabulary each character stands for one byte
        return max(len(token.encode()) for token in self._tokenizer.get_vocab())

    def segments(self, conversation: Conversation, thinking: bool, generate: bool) -> list[str]:
        """A conversation as the target sees it, cut where answers begin and end.

        Args:
            conversation: its messages and tools.
            thinking: whether the answers to the last question begin with reasoning.
            generate: stop where an answer to the last message begins.

        Returns:
            Texts read and written in turn, the first one read; an answer ends with its end token.

        Raises:
            ValueError: the conversation cannot be written, or not as a whole.
        """
        messages = conversation.messages
        for i, message in enumerate(messages, 1):
            self._refuse_control_tokens(f"message {i}", message)
        self._refuse_control_tokens("a tool", conversation.tools)
        if self._encoding is not None:
            return self._encode(conversation, thinking)
        return self._fill_in(conversation, thinking, generate)

    def _refuse_control_tokens(self, where: str, value: Any) -> None:
        """Refuse text that would pass for the template's own marks."""
        for text in _texts(value):
            found = self._control.search(text)
            if found:
                raise ValueError(f"{where} contains the control token {found[0]!r}")

    def _encode(self, conversation: Conversation, thinking: bool) -> list[str]:
        """The released encoding, message by message."""
        encoding = self._encoding
        mode = "thinking" if thinking else "chat"
        messages: list[dict[str, Any]] = []
        if conversation.tools:
            # where vLLM's server puts them
            messages.append({"role": "system", "tools": list(conversation.tools)})
        for message in conversation.messages:
            reasoning, mark, content = message["content"].rpartition(END_THINK)
            if message["role"] == "assistant" and mark and reasoning.startswith(THINK):
                message = {**message, "content": content, "reasoning": reasoning.removeprefix(THINK)}
            messages.append(message)
        last = encoding.find_last_user_index(messages)
        if thinking:
            if any(m["role"] == "developer" for m in messages[:last]):
                raise ValueError(
                    "with reasoning, the released encoding leaves out a developer message before the last"
                    " question"
                )
            for message in messages[last + 1 :]:
                answers = message["role"] == "assistant"
                if answers and not message.get("reasoning") and not message.get("tool_calls"):
                    raise ValueError("an answer to the last question has no reasoning, and others have")
            messages = encoding.drop_thinking_messages(messages, last)
        found = [encoding.bos_token]
        for i, message in enumerate(messages):
            try:
                piece = encoding.render_message(i, messages, mode, last)
            except Exception as error:
                raise ValueError(
                    f"the released encoding cannot write it: {type(error).__name__}: {_short(error)}"
                ) from None
            if (message["role"] == "assistant") == (len(found) % 2 == 1):
                found.append(piece)
            else:
                found[-1] += piece
        return found

    def _fill_in(self, conversation: Conversation, thinking: bool, generate: bool) -> list[str]:
        """The Jinja template of the tokenizer."""
        messages, tools = list(conversation.messages), list(conversation.tools)
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=generate,
                thinking=thinking,
            )
        except Exception as error:
            # a template may refuse a conversation in any way it likes
            raise ValueError(f"the chat template cannot write it: {_short(error)}") from None
        assert isinstance(text, str)
        missing = _left_out(text, messages, tools)
        if missing:
            raise ValueError(f"the chat template leaves out {missing}")
        found, at = [], 0
        for mark in OPENING.finditer(text):
            end = text.find(self._eos, mark.end())
            if end < 0 and generate:
                break
            end = end + len(self._eos) if end >= 0 else len(text)
            found += [text[at : mark.end()], text[mark.end() : end]]
            at = end
        if generate or at < len(text):
            found.append(text[at:])
        answers = sum(m["role"] == "assistant" for m in messages)
        if not generate and len(found) // 2 != answers:
            raise ValueError(f"the chat template writes {answers} answers, and {len(found) // 2} were found")
        return found

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32 [T]."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [np.asarray(ids, np.uint32) for ids in encoded["input_ids"]]


def _texts(value: Any) -> Iterator[str]:
    """Every text within a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _left_out(text: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    """What of a conversation is not in its text; reasoning may be, as servers drop it from earlier turns."""
    for i, message in enumerate(messages, 1):
        if message["content"].rpartition(END_THINK)[2].strip() not in text:
            return f"the content of message {i} ({message['role']})"
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if not _holds(text, [function["name"], function["arguments"]]):
                return f"a tool call of message {i}"
        for key in ("tools", "response_format"):
            if not _holds(text, message.get(key)):
                return f"the {key} of message {i}"
    return "" if all(_holds(text, tool["function"]) for tool in tools) else "tools"


def _holds(text: str, value: Any) -> bool:
    """Whether every text within a JSON value stands in `text`, as it is or as JSON writes it."""
    return all(
        part in text or any(json.dumps(part, ensure_ascii=a)[1:-1] in text for a in (False, True))
        for part in _texts(value)
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "…"


def _released_encoding(directory: Path) -> Any:
    """The module of vLLM that encodes DeepSeek-V3.2's messages."""
    kind = target_config(directory).get("model_type")
    if kind != "deepseek_v32":
        raise InputError(
            f"the tokenizer of {directory} has no chat template, and none is known for {kind}",
            "add chat_template to tokenizer_config.json",
        )
    from vllm.tokenizers import deepseek_v32_encoding

    return deepseek_v32_encoding
