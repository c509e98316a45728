"""Conversations to documents: token ids, loss mask, and a number that stays the same.

With `answers = "given"` the answers of the file are the text and all of them count for the loss. With
`answers = "target"` the last answer is dropped, the prompt ends where an answer begins, and the target writes
one; then only what it wrote counts, for the answers before it are someone else's words. With
`answers = "every"` the target writes each answer in turn, in the context that a server would have at that
turn: the questions of the file and its own earlier answers.

The end token of an answer counts for the loss: a target has to produce it.
"""

import hashlib
import json
import struct
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from configs.contract import Template
from configs.errors import InputError
from configs.files import atomic_write
from configs.progress import log
from configs.schema import PromptsConfig
from pipeline.conversations import (
    Conversation,
    Place,
    ReadyTokens,
    Reject,
    find_files,
    read_conversations,
)
from pipeline.render import Renderer

__all__ = [
    "Document",
    "Documents",
    "NoConversationsError",
    "Prompts",
    "Turns",
    "load_prompts",
    "next_turn",
    "write_rejects",
]

# part of every uid: raise it when uids would mean something else
UIDS = 2
BATCH = 1024  # conversations tokenised at a time
SAY_SECONDS = 10
Spans = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, eq=False, slots=True)
class Document:
    """What one conversation asks of the engine.

    Attributes:
        uid: 64 bits. The upper 32 are a hash of the conversation as it stands in the file (its group, see
            configs/held_out.py); the lower ones of that and of all that decides the document's tokens.
        input_ids: uint32 [T]; the prompt where the target answers, else everything.
        spans: token ranges [start, stop) that count for the loss; stop None where the target writes the end.
        answer_tokens: most tokens the target may write now; 0 where the answers are given.
        name, line, source, file: its `id`, its line or row, its label, and the file it comes from.
        turns: uint32 [T_k] each: what is read behind each answer but the last, up to where the next one
            begins; only with `answers = "every"`.
        turn_uids: uids of the documents that the later turns become, one for each of `turns`, where the
            template drops earlier reasoning and so each turn is a document of its own. Empty where the whole
            conversation is one document. A conversation may end before its last turn: it is done when its
            first document is.
    """

    uid: int
    input_ids: np.ndarray
    spans: Spans
    answer_tokens: int
    name: str
    line: int
    source: str
    file: str
    turns: tuple[np.ndarray, ...] = ()
    turn_uids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Turns:
    """How one turn of a conversation leads to the next: marks, end tokens and bounds in tokens."""

    think: int | None
    end_think: int | None
    stop_ids: tuple[int, ...]
    max_length: int
    max_answer_tokens: int


def next_turn(document: Document, answer: Sequence[int], turns: Turns) -> Document | None:
    """The document after the target has answered, ready to be answered again.

    Its prompt is the earlier one, the answer, and the next question. With reasoning, the answer stands there
    as a server shows it to the target at a later turn: without what comes before `</think>`.

    Args:
        document: what was answered.
        answer: the tokens that the target wrote, its end token included.
        turns: of the same prompts.

    Returns:
        None after the last turn, and where the conversation ends early: the answer has no end, its reasoning
        has none, or there is no room for another answer.
    """
    if not document.turns or not len(answer) or answer[-1] not in turns.stop_ids:
        return None
    written = np.asarray(answer, np.uint32)
    prompt, spans, uid = document.input_ids, document.spans[:-1], document.uid
    if document.turn_uids:
        ends = np.flatnonzero(written == turns.end_think)
        if not len(ends) or prompt[-1] != turns.think:
            return None
        written = written[int(ends[0]) :]
        prompt, spans, uid = prompt[:-1], (), document.turn_uids[0]
    else:
        spans = (*spans, (len(prompt), len(prompt) + len(written)))
    ids = np.concatenate([prompt, written, document.turns[0]])
    room = turns.max_length - len(ids)
    if room < 1:
        return None
    return replace(
        document,
        uid=uid,
        input_ids=ids,
        spans=(*spans, (len(ids), None)),
        answer_tokens=min(turns.max_answer_tokens, room),
        turns=document.turns[1:],
        turn_uids=document.turn_uids[1:],
    )


class _Rows:
    """Arrays of different lengths in one flat buffer, so that a million of them are not a million objects."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.flat = bytearray()
        self._ends = array("q")

    def append(self, row: bytes) -> None:
        """Add the bytes of a row."""
        self.flat += row
        self._ends.append(len(self.flat))

    def __getitem__(self, i: int) -> np.ndarray:
        start = self._ends[i - 1] if i else 0
        return np.frombuffer(self.flat, self.dtype, (self._ends[i] - start) // self.dtype.itemsize, start)

    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(np.frombuffer(self._ends, np.int64), prepend=0) // self.dtype.itemsize


class Documents(Sequence[Document]):
    """Documents in their order, kept as flat arrays: a million of 100 tokens take about 0.6 GB.

    Attributes:
        uids: uint64 [N].
        lengths: int64 [N], tokens that are there before the target writes.
        most_tokens: int64 [N], tokens if every answer is as long as it may be.
    """

    def __init__(self, max_length: int, max_answer_tokens: int) -> None:
        self._bounds = max_length, max_answer_tokens
        self._ids, self._spans, self._names = _Rows(np.uint32), _Rows(np.int32), _Rows(np.uint8)
        # the pieces of all turns one behind the other, the length of each, and the uids
        self._turns, self._pieces, self._turn_uids = _Rows(np.uint32), _Rows(np.int32), _Rows(np.uint64)
        self._labels: dict[str, int] = {}
        # uid, what the document is, room for an answer, line, file, source
        self._fixed = bytearray()
        self._kept: np.ndarray | None = None

    def append(self, document: Document, same: int) -> None:
        """Add a document; `same` is equal for documents that ask the same of the engine."""
        d = document
        self._ids.append(d.input_ids.tobytes())
        self._spans.append(array("i", [-1 if x is None else x for span in d.spans for x in span]).tobytes())
        self._names.append(d.name.encode())
        self._turns.append(b"".join(t.tobytes() for t in d.turns))
        self._pieces.append(array("i", map(len, d.turns)).tobytes())
        self._turn_uids.append(array("Q", d.turn_uids).tobytes())
        file, source = (self._labels.setdefault(x, len(self._labels)) for x in (d.file, d.source))
        self._fixed += struct.pack("=6Q", d.uid, same, d.answer_tokens, d.line, file, source)

    def finish(self) -> int:
        """Leave out documents that ask the same as another one; how many they are.

        Of equal ones that with the smallest uid stays, so that the choice does not follow from their order.
        """
        fixed = np.frombuffer(self._fixed, np.uint64).reshape(-1, 6)
        order = np.lexsort((np.arange(len(fixed)), fixed[:, 0], fixed[:, 1]))
        same = fixed[order, 1]
        first = np.ones(len(order), bool)
        first[1:] = same[1:] != same[:-1]
        self._kept = np.sort(order[first])
        self._rows = fixed[self._kept]
        self._names_of = list(self._labels)
        self.uids = np.ascontiguousarray(self._rows[:, 0])
        self.lengths = self._ids.lengths()[self._kept]
        answers = self._rows[:, 2].astype(np.int64)
        longest, answer = self._bounds
        later = (self._turns.lengths() + answer * self._pieces.lengths())[self._kept]
        # with reasoning each turn is a document, which is no longer than the longest one
        chains = self._turn_uids.lengths()[self._kept]
        whole = self.lengths + answers + later
        self.most_tokens = np.where(
            chains > 0, np.minimum(self.lengths + answers, longest) + chains * longest, whole
        )
        self.most_tokens = np.where(chains > 0, self.most_tokens, np.minimum(whole, longest))
        return len(order) - len(self._kept)

    @property
    def later_uids(self) -> np.ndarray:
        """uids of the documents that later turns become, uint64, in no order."""
        return np.frombuffer(self._turn_uids.flat, np.uint64)

    def places(self, uids: np.ndarray) -> list[tuple[int, int]]:
        """Where documents with one of the uids, or with one among those of their later turns, stand.

        Args:
            uids: uint64, in any order; others are no error.

        Returns:
            (place, uid) of each, in order of places.
        """
        assert self._kept is not None
        found = [(int(i), int(self.uids[i])) for i in np.flatnonzero(np.isin(self.uids, uids))]
        later = self.later_uids
        hits = np.flatnonzero(np.isin(later, uids))
        rows = np.searchsorted(np.cumsum(self._turn_uids.lengths()), hits, side="right")
        for row, hit in zip(rows.tolist(), hits.tolist(), strict=True):
            i = int(np.searchsorted(self._kept, row))
            if i < len(self) and self._kept[i] == row:  # else it is left out, for another asks the same
                found.append((i, int(later[hit])))
        return sorted(found)

    def __len__(self) -> int:
        return 0 if self._kept is None else len(self._kept)

    @overload
    def __getitem__(self, i: int) -> Document: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Document, ...]: ...
    def __getitem__(self, i: int | slice) -> Document | tuple[Document, ...]:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        assert self._kept is not None
        row = int(self._kept[i])
        uid, _, answer_tokens, line, file, source = self._rows[i].tolist()
        spans = self._spans[row].reshape(-1, 2).tolist()
        pieces = self._pieces[row]
        return Document(
            uid=uid,
            input_ids=self._ids[row],
            spans=tuple((a, None if b < 0 else b) for a, b in spans),
            answer_tokens=answer_tokens,
            name=self._names[row].tobytes().decode(),
            line=line,
            source=self._names_of[source],
            file=self._names_of[file],
            turns=tuple(np.split(self._turns[row], np.cumsum(pieces)[:-1])) if len(pieces) else (),
            turn_uids=tuple(self._turn_uids[row].tolist()),
        )

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class Prompts:
    """The documents of the input in its order, what was left out, and what turns text into tokens."""

    documents: Documents
    rejects: tuple[Reject, ...]
    duplicates: int
    tokenizer_sha256: str
    template: Template
    turns: Turns

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self.turns.stop_ids

    @property
    def tokens(self) -> int:
        """Tokens that are there before the target writes."""
        return int(self.documents.lengths.sum())

    @property
    def most_tokens(self) -> int:
        """Tokens if every answer is as long as it may be."""
        return int(self.documents.most_tokens.sum())


def load_prompts(config: PromptsConfig, target: Path) -> Prompts:
    """Read, check, render and number every conversation of `prompts.path`.

    Conversations that would become the same document are used once. Reading the same unchanged files again in
    one process gives the same object.

    Raises:
        InputError: no path, no such file, or no tokenizer at the target.
        NoConversationsError: nothing in the files is usable.
    """
    files = find_files(config.path)
    state = tuple((str(f), s.st_mtime_ns, s.st_size) for f, s in ((f, f.stat()) for f in files))
    return _load(config, Path(target), state)


@lru_cache(maxsize=1)
def _load(config: PromptsConfig, target: Path, state: tuple[tuple[str, int, int], ...]) -> Prompts:
    builder = _Builder(config, Renderer(target))
    files = [Path(name) for name, _, _ in state]
    for file in files:
        for item in read_conversations(file, config.answers, config.max_length):
            builder.add(item)
            if builder.found == config.limit:
                break
        builder.flush()
        if builder.found == config.limit:
            break
    order = {str(file): i for i, file in enumerate(files)}
    rejects = sorted(builder.rejects, key=lambda r: (order[r.file], r.line))
    duplicates = builder.documents.finish()
    if not len(builder.documents):
        raise NoConversationsError(files, rejects)
    renderer = builder.renderer
    return Prompts(
        builder.documents,
        tuple(rejects),
        duplicates,
        renderer.tokenizer_sha256,
        renderer.template,
        builder.turns,
    )


@dataclass(frozen=True)
class _Text:
    """A conversation as text: pieces read and written in turn."""

    conversation: Conversation
    thinking: bool
    segments: list[str]


class _Builder:
    """Turns what the readers give into documents and rejects, a batch at a time."""

    def __init__(self, config: PromptsConfig, renderer: Renderer) -> None:
        self.config, self.renderer = config, renderer
        self.turns = Turns(
            renderer.think,
            renderer.end_think,
            renderer.stop_ids,
            config.max_length,
            config.max_answer_tokens,
        )
        self.documents = Documents(config.max_length, config.max_answer_tokens)
        self.rejects: list[Reject] = []
        self.found = 0
        self._batch: list[_Text] = []
        self._read, self._kept, self._said = 0, 0, time.monotonic()
        # top_p does nothing where the most likely token is taken
        self._sampling = (config.temperature, config.top_p) if config.temperature else (0, None)

    def add(self, item: Conversation | ReadyTokens | Reject) -> None:
        self._read += 1
        if time.monotonic() - self._said > SAY_SECONDS:
            self._said = time.monotonic()
            log("prompts", f"{self._read:,} conversations read, {len(self.rejects):,} rejected so far")
        if isinstance(item, Reject):
            self.rejects.append(item)
            return
        self.found += 1
        try:
            if isinstance(item, ReadyTokens):
                self._add_ready(item)
            else:
                self._batch += self._texts(item)
        except ValueError as error:
            self._reject(item.place, str(error))
        if len(self._batch) >= BATCH:
            self.flush()

    def _reject(self, place: Place, reason: str) -> None:
        self.rejects.append(Reject(place.file, place.line, place.name, reason))

    def _texts(self, conversation: Conversation) -> list[_Text]:
        """The texts of a conversation, one for each way to answer it. Raises ValueError: it is unusable."""
        config, renderer = self.config, self.renderer
        generate = config.answers != "given"
        wanted = {"auto": [conversation.thinking], "on": [True], "off": [False], "both": [False, True]}
        found = []
        for thinking in wanted[config.thinking]:
            if not generate and thinking != conversation.thinking:
                has = "reasons" if conversation.thinking else "does not reason"
                raise ValueError(f'the last answer {has}, and prompts.thinking is "{config.thinking}"')
            segments = renderer.segments(conversation, thinking, generate)
            size = sum(len(s.encode()) for s in segments[: 1 if config.answers == "every" else None])
            most = config.max_length * renderer.longest_token
            if size > most:
                raise ValueError(
                    f"too long: {size:,} bytes of text, more than prompts.max_length = {config.max_length}"
                    " tokens can be"
                )
            found.append(_Text(conversation, thinking, segments))
        return found

    def flush(self) -> None:
        """Tokenise the texts that wait."""
        texts = [segment for text in self._batch for segment in text.segments]
        ids = iter(self.renderer.ids(texts))
        for text in self._batch:
            try:
                self._add_tokens(text, [next(ids) for _ in text.segments])
            except ValueError as error:
                self._reject(text.conversation.place, str(error))
        self._batch.clear()

    def _add_tokens(self, text: _Text, pieces: list[np.ndarray]) -> None:
        """Make a document of the pieces read and written in turn."""
        config, conversation = self.config, text.conversation
        turns: list[np.ndarray] = []
        spans: list[tuple[int, int | None]] = []
        if config.answers == "every":
            ids, *turns = pieces[::2]
        else:
            ids = np.concatenate(pieces)
        if config.answers == "given":
            ends = np.cumsum([len(p) for p in pieces]).tolist()
            spans = [(ends[i - 1], ends[i]) for i in range(1, len(pieces), 2) if ends[i] > ends[i - 1]]
            if not spans:
                raise ValueError("the rendered text has no answer")
            self._require_room(len(ids), 0)
            self._append(conversation.place, conversation.content, ids, tuple(spans), 0, ["given"])
            return
        prompts = [ids, *turns]
        if text.thinking:
            think, end_think = self.renderer.think, self.renderer.end_think
            if prompts[-1][-1] != think:
                raise ValueError("the chat template has no way to ask for reasoning")
            # only the last question's mark is rendered as one that asks
            if any(p[-1] != end_think for p in prompts[:-1]):
                raise ValueError("the chat template marks earlier answers in a way that is not known")
            prompts = [np.append(p[:-1], np.uint32(think)) for p in prompts]
        ids, *turns = prompts
        room = self._require_room(len(ids), 1)
        answer_tokens = min(config.max_answer_tokens, room)
        settings: list[Any] = [config.answers, *self._sampling, self.renderer.stop_ids, answer_tokens]
        if turns:
            settings += [config.max_length, config.max_answer_tokens, text.thinking]
        self._append(
            conversation.place,
            conversation.content,
            ids,
            ((len(ids), None),),
            answer_tokens,
            settings,
            tuple(turns),
            text.thinking,
        )

    def _add_ready(self, item: ReadyTokens) -> None:
        ids, vocabulary = item.input_ids, self.renderer.vocab_size
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(
                f"input_ids from {ids.min()} to {ids.max()}, the target's are 0 to {vocabulary - 1}"
            )
        self._require_room(len(ids), 0)
        mask = item.loss_mask
        edges = (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist()
        edges = [0] * bool(mask[0]) + edges + [len(mask)] * bool(mask[-1])
        spans = tuple(zip(edges[::2], edges[1::2], strict=True))
        self._append(item.place, item.content, ids.astype(np.uint32), spans, 0, ["given"])

    def _require_room(self, length: int, least: int) -> int:
        room = self.config.max_length - length
        if room < least:
            reason = f"too long: {length:,} tokens, prompts.max_length is {self.config.max_length:,}"
            raise ValueError(reason + (" with the answer" if least else ""))
        return room

    def _append(
        self,
        place: Place,
        content: bytes,
        ids: np.ndarray,
        spans: Spans,
        answer_tokens: int,
        settings: list[Any],
        turns: tuple[np.ndarray, ...] = (),
        thinking: bool = False,
    ) -> None:
        shape = [len(ids), spans if answer_tokens == 0 else None, [len(t) for t in turns]]
        # of numbers, text and None, which Python writes in one way
        asked = hashlib.sha256(repr((UIDS, settings, shape)).encode())
        for piece in (ids, *turns):
            asked.update(piece.astype("<u4", copy=False).tobytes())
        same = asked.digest()

        def uid(turn: int) -> int:
            lower = hashlib.sha256(content + same + bytes([turn & 255, turn >> 8])).digest()[:4]
            return int.from_bytes(content[:4] + lower, "big")

        document = Document(
            uid=uid(0),
            input_ids=ids,
            spans=spans,
            answer_tokens=answer_tokens,
            name=place.name,
            line=place.line,
            source=place.source,
            file=place.file,
            turns=turns,
            turn_uids=tuple(uid(k) for k in range(1, len(turns) + 1)) if thinking else (),
        )
        self.documents.append(document, int.from_bytes(same[:8], "big"))


class NoConversationsError(InputError):
    """Every line of the input is rejected; `rejects` says why."""

    def __init__(self, files: Sequence[Path], rejects: Sequence[Reject]) -> None:
        what = str(files[0]) if len(files) == 1 else f"none of {len(files)} files"
        first = f"; the first: {_place(rejects[0], files)}: {rejects[0].reason}" if rejects else ""
        holds = "holds no" if len(files) == 1 else "holds a"
        super().__init__(
            f"{what} {holds} usable conversation ({len(rejects)} rejected{first})",
            'expected lines like {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
        self.rejects = tuple(rejects)


def _place(reject: Reject, files: Sequence[Path]) -> str:
    return f"line {reject.line}" if len(files) == 1 else f"{reject.file} line {reject.line}"


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Publish the rejected lines as JSONL: file, line, id and reason."""
    lines = (
        json.dumps({"file": r.file, "line": r.line, "id": r.name, "reason": r.reason}, ensure_ascii=False)
        for r in rejects
    )
    atomic_write(path, "".join(line + "\n" for line in lines))
