"""Stage one: conversations to stored states.

What is left to do are the documents of the input that no committed part of the store holds
(`pipeline.parts`), so nothing but the store says what is done: a run that was killed, a second run, and
another machine all find it there.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import cuda

from configs import run_dir
from configs.contract import other_provenance, require_same
from configs.errors import BadStatesError
from configs.files import write_json
from configs.held_out import is_held_out, uid_group
from configs.lock import hold
from configs.progress import count, log, task
from configs.provenance import engine_version
from configs.schema import RunConfig
from configs.target import target_config
from export.checkpoint import Checkpoint
from featurestore import held_documents, publish
from featurestore.objects import Objects, open_objects
from featurestore.writer import committed_parts, read_root
from pipeline.capture.engine import EngineSettings, PartResult
from pipeline.capture.process import CLOSE_SECONDS
from pipeline.capture.session import Session
from pipeline.capture.settings import check_aux_layers, choose_view, contract, engine_settings
from pipeline.conversations import Reject, input_exists
from pipeline.parts import Part, cut, own_share
from pipeline.prompts import NoConversationsError, Prompts, load_prompts, write_rejects
from pipeline.ray_dump import RaySession, cluster, has_gpus

__all__ = ["Captured", "DumpPlan", "plan", "run"]


@dataclass(frozen=True)
class DumpPlan:
    """What a dump will do; `str()` gives the lines for a person.

    Attributes:
        bytes_per_token: of states, ids and mask, before any compression.
        documents, held_out: of the whole input; None where it, or the target, is not on this machine.
        tokens, most_tokens: without the answers the target will write, and with the longest ones.
        rejects, duplicates: conversations left out.
        done: documents that the store holds, or has found to be bad.
        mine: documents still to do by this worker, in so many `parts`.
        view: how the engine sees the target.
        store: where the states go.
        missing: in words, what is not on this machine or cannot be used.
        reasons: why conversations are rejected, the most frequent first, and how many for each.
    """

    bytes_per_token: int
    documents: int | None
    held_out: int
    tokens: int
    most_tokens: int
    rejects: int
    duplicates: int
    done: int
    mine: int
    parts: int
    view: str
    store: str
    missing: str = ""
    reasons: tuple[tuple[str, int], ...] = ()

    @property
    def most_bytes(self) -> int:
        """Size of the store if every answer is as long as it may be."""
        return self.most_tokens * self.bytes_per_token

    def __str__(self) -> str:
        view = "" if self.view == "native" else ", through a V3 view of the target"
        # beside the states, an id of four bytes and a mask of one
        states = self.bytes_per_token - 5
        each = f"{self.bytes_per_token:,} bytes a token{view}, {states:,} of them states, into {self.store}"
        if self.documents is None:
            size = _size(self.bytes_per_token * 10**6)
            return f"{each}\n{self.missing}; a million tokens take {size}"
        if self.tokens == self.most_tokens:
            tokens = f"{self.tokens:,} tokens, {_size(self.most_bytes)}"
        else:
            tokens = (
                f"{self.tokens:,} tokens of prompts, at most {self.most_tokens:,} with the answers the target"
                f" writes, at most {_size(self.most_bytes)}"
            )
        left = f"{count(self.documents, 'document')} ({self.held_out:,} held out of training), {tokens}"
        out = f"{count(self.rejects, 'conversation')} rejected, {count(self.duplicates, 'duplicate')}"
        parts = count(self.parts, "part")
        todo = f"{count(self.done, 'document')} done, {self.mine:,} to do here, in {parts}"
        why = "".join(f"\n  {number:,} rejected: {reason}" for reason, number in self.reasons)
        return f"{each}\n{left}; {out}{why}\n{todo}"


def _held_out(config: RunConfig, prompts: Prompts) -> int:
    groups = uid_group(prompts.documents.uids)
    return int(is_held_out(groups, config.prompts.held_out, config.run.seed).sum())


def _size(size: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, (len(str(int(size))) - 1) // 3)
    return f"{size / 1000**power:.3g} {units[power]}"


@dataclass(frozen=True)
class Work:
    """What is left of a dump.

    Attributes:
        mine: places of this worker's documents.
        left: those of them still to do.
        done: how many documents of the input need no more work.
        rejected: documents that the store has found to be bad, by uid, and why.
    """

    mine: np.ndarray
    left: np.ndarray
    done: int
    rejected: dict[int, str]


def _work(config: RunConfig, prompts: Prompts, objects: Objects, there: bool) -> Work:
    uids = prompts.documents.uids
    held, rejected = held_documents(objects) if there else (np.zeros(0, np.uint64), {})
    done = np.isin(uids, np.union1d(held, np.fromiter(rejected, np.uint64, len(rejected))))
    mine = own_share(uids, config.dump.worker)
    return Work(mine, mine[~done[mine]], int(done.sum()), rejected)


def plan(config: RunConfig) -> DumpPlan:
    """Count what a dump will do; loads no model and writes nothing.

    Raises:
        ConfigError: settings that cannot work. InputError: a file that is there cannot be used.
    """
    target_dir = config.require_target()
    target = target_config(target_dir, planning=True)
    # planned for the machine it will run on: the native view asks for a GPU there, not here
    view = choose_view(config, target, gpu=config.dump.view == "native" or None)
    check_aux_layers(config, target)
    per_token = 2 * target["hidden_size"] * (1 + len(config.dump.aux_layers)) + 4 + 1
    empty = DumpPlan(per_token, None, 0, 0, 0, 0, 0, 0, 0, 0, view, config.store_path)
    there = {"prompts.path": input_exists(config.prompts.path), "target.path": target_dir.exists()}
    for name, path in (("prompts.path", config.prompts.path), ("target.path", target_dir)):
        if not there[name]:
            return DumpPlan(**vars(empty) | {"missing": f"{name} ({path}) is not on this machine"})
    Checkpoint(target_dir).mtp_names()  # states of a target without the layer are of no use
    try:
        prompts = load_prompts(config.prompts, target_dir)
    except NoConversationsError as error:  # raised again by the run, once the rejects are written
        return DumpPlan(**vars(empty) | {"missing": error.message})
    objects = open_objects(config.store_path)
    work = _work(config, prompts, objects, read_root(objects) is not None)
    return DumpPlan(
        bytes_per_token=per_token,
        documents=len(prompts.documents),
        held_out=_held_out(config, prompts),
        tokens=prompts.tokens,
        most_tokens=prompts.most_tokens,
        rejects=len(prompts.rejects),
        duplicates=prompts.duplicates,
        done=work.done,
        mine=len(work.left),
        parts=-(-len(work.left) // config.dump.block_documents),
        view=view,
        store=config.store_path,
        reasons=tuple(Counter(r.reason for r in prompts.rejects).most_common(3)),
    )


@dataclass
class Captured:
    """What a run has captured so far, summed over its parts; `there` documents others had committed first,
    or an engine that died before it could say so.
    """

    parts: int = 0
    documents: int = 0
    there: int = 0
    tokens: int = 0
    bad: int = 0
    rejected: dict[int, str] = field(default_factory=dict)
    loops: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: int = 0
    busy: float = 0.0
    start_seconds: float = 0.0

    def add(self, part: PartResult) -> None:
        """Count a part that is done."""
        self.parts += not part.there
        self.documents += part.documents
        self.tokens += part.tokens
        self.bad += part.bad
        self.rejected |= part.rejected
        for source, (found, tokens) in part.loops.items():
            before = self.loops.get(source, (0, 0))
            self.loops[source] = before[0] + found, before[1] + tokens
        self.steps += part.steps
        self.busy += part.busy

    @property
    def occupancy(self) -> float | None:
        """Share of the engine's sequences that were kept busy, mean over its steps."""
        return round(self.busy / self.steps, 4) if self.steps else None

    def loop_share(self, source: str | None = None) -> float | None:
        """Share of the answers' tokens that are in loops, of one source or of all."""
        chosen = self.loops.values() if source is None else [self.loops[source]]
        found, tokens = (sum(x[i] for x in chosen) for i in (0, 1))
        return round(found / tokens, 4) if tokens else None


def run(config: RunConfig) -> dict[str, Any]:
    """Capture every document of the input that the store does not hold, then publish the store.

    Leaves the figures of this run in RUN/dump.json.

    Returns:
        those figures: seconds, engine_start_seconds; documents, held_out, tokens, loss_tokens and bytes of
        the store as published; captured_documents, captured_tokens, kept_documents, rejected_documents of
        this run; occupancy, loop_share; rejects, duplicates of the input; missing_documents of the input;
        store, manifest.

    Raises:
        ConfigError, InputError: settings or input cannot be used.
        ContractError: the store holds states of another meaning.
        CaptureError: the engine failed twice, its states are not those of the first start, or too many of
            them are bad.
        StoreError: the store cannot be written.
    """
    if not config.dump.ray:
        return _run(config, cuda.is_available())
    with cluster():
        return _run(config, has_gpus())


def _run(config: RunConfig, gpu: bool) -> dict[str, Any]:
    started = time.monotonic()
    engine_version(config.dump.engine)  # refused before a million conversations are read
    target_dir = config.require_target()
    target = target_config(target_dir)
    view = choose_view(config, target, gpu=gpu)
    check_aux_layers(config, target)
    rejects = config.run.dir / run_dir.REJECTS
    try:
        prompts = load_prompts(config.prompts, target_dir)
    except NoConversationsError as error:
        write_rejects(rejects, error.rejects)
        raise
    _write_rejects(config, prompts, {})
    if prompts.rejects:
        first = prompts.rejects[0]
        out = f"{count(len(prompts.rejects), 'conversation')} rejected, see {rejects}"
        log("dump", f"{out}; the first: line {first.line}: {first.reason}")
    agreed = contract(config, prompts, view).model_dump(mode="json")
    objects = open_objects(config.store_path)
    root = read_root(objects)
    if root is not None:
        what = f"store {objects.url} and target {target_dir}"
        hint = "dump into another store (dump.store), or use the target of this one"
        require_same(root["contract"], agreed, what, hint=hint)
        for difference in other_provenance(agreed, root["contract"]):
            log("dump", f"warning: this store began with other settings: {difference}")
    work = _work(config, prompts, objects, root is not None)
    _write_rejects(config, prompts, work.rejected)
    kept = len(work.mine) - len(work.left)
    if kept:
        log("dump", f"{kept:,} of {len(work.mine):,} documents are in the store already: kept")
    captured = Captured()
    begun = run_dir.begun_parts(config.run.dir, config.dump.worker)
    if len(work.left) or begun.exists():
        lock = run_dir.dump_lock(config.run.dir, config.dump.worker)
        hint = "wait for it, or give each machine its own dump.worker = 'k/n'"
        with hold(lock, "another dump with the same dump.worker", hint):
            _remove_begun(objects, begun)
            if len(work.left):
                parts = cut(prompts.documents, work.left, config.dump.block_documents)
                settings = engine_settings(config, prompts.turns, agreed, view, gpu=gpu)
                _capture(config, settings, parts, prompts, work, captured)
        _write_rejects(config, prompts, work.rejected | captured.rejected)
    return _finish(config, prompts, objects, kept, captured, started)


def _finish(
    config: RunConfig, prompts: Prompts, objects: Objects, kept: int, captured: Captured, started: float
) -> dict[str, Any]:
    """Publish, and write down what was done."""
    documents = prompts.documents
    manifest = publish(
        objects, documents.uids, later=documents.later_uids, only=config.dump.publish == "input"
    )
    totals, there = manifest["totals"], manifest["input"]
    missing = there["documents"] - there["there"] - there["rejected"]
    if missing:
        log("dump", f"{missing:,} of {there['documents']:,} documents of the input are not in the store yet")
    if captured.occupancy is not None:
        loops = "" if captured.loop_share() is None else f", {captured.loop_share():.1%} of answers in loops"
        log("dump", f"the engine's sequences were busy {captured.occupancy:.1%} of the time{loops}")
    result = {
        "format": 1,
        "seconds": round(time.monotonic() - started, 2),
        "engine_start_seconds": round(captured.start_seconds, 2),
        "documents": totals["documents"],
        "held_out": _held_out(config, prompts),
        "tokens": totals["tokens"],
        "loss_tokens": totals["loss_tokens"],
        "bytes": totals["bytes"],
        "captured_documents": captured.documents,
        "captured_tokens": captured.tokens,
        "kept_documents": kept + captured.there,
        "rejected_documents": len(captured.rejected),
        "missing_documents": missing,
        "occupancy": captured.occupancy,
        "loop_share": captured.loop_share(),
        "loop_share_by_source": {s: captured.loop_share(s) for s in sorted(captured.loops)},
        "rejects": len(prompts.rejects),
        "duplicates": prompts.duplicates,
        "store": config.store_path,
        "manifest": manifest["version"],
    }
    write_json(run_dir.dump_figures(config.run.dir, config.dump.worker), result)
    return result


def _write_rejects(config: RunConfig, prompts: Prompts, rejected: dict[int, str]) -> None:
    """Write down the conversations that are no documents, then those whose documents are bad."""
    bad = np.fromiter(rejected, np.uint64, len(rejected))
    found = []
    for i, uid in prompts.documents.places(bad):
        document = prompts.documents[i]
        found.append(Reject(document.file, document.line, document.name, rejected[uid]))
    write_rejects(config.run.dir / run_dir.REJECTS, [*prompts.rejects, *found])


def _leftovers(objects: Objects) -> dict[str, list[str]]:
    """Directories of parts that were not committed, by the name of the part."""
    committed = set(committed_parts(objects, bad=[]).values())
    found: dict[str, list[str]] = {}
    for directory in objects.directories("parts"):
        name, dot, _ = directory.partition(".")
        if dot and f"parts/{directory}" not in committed:
            found.setdefault(name, []).append(f"parts/{directory}")
    return found


def _remove_begun(objects: Objects, begun: Path) -> None:
    """Remove what a killed run was writing.

    Its parts may never come again: what is left to do may be cut in another way by now.
    """
    names = begun.read_text().split() if begun.exists() else []
    for name, directories in _leftovers(objects).items() if names else ():
        for directory in directories if name in names else ():
            objects.delete(directory)
    begun.unlink(missing_ok=True)


def _capture(
    config: RunConfig,
    settings: EngineSettings,
    parts: Iterator[Part],
    prompts: Prompts,
    work: Work,
    captured: Captured,
) -> None:
    probe = (config.run.dir / run_dir.PROBE).absolute() if config.dump.probe else None
    engines = RaySession if config.dump.ray else Session
    session = engines(settings, probe, prompts.documents[0].input_ids)
    if not config.dump.ray:
        slower = "vLLM" if settings.engine == "vllm" else "transformers, which is slower than vLLM"
        log("dump", f"starting {slower}, see {settings.log}")
    objects = open_objects(config.store_path)
    begun = run_dir.begun_parts(config.run.dir, config.dump.worker)
    leftovers = _leftovers(objects)
    waiting = len(work.left)
    names: set[str] = set()
    taken: dict[str, int] = {}  # documents of a part

    def handed_out() -> Iterator[Part]:
        nonlocal waiting
        for part in parts:
            # of a part that nobody else works on: this run directory is locked
            for directory in leftovers.get(part.name, ()):
                objects.delete(directory)
            with open(begun, "a") as file:
                file.write(part.name + "\n")
            waiting -= len(part.documents)
            names.add(part.name)
            taken[part.name] = len(part.documents)
            yield part

    total, kept = len(work.mine), len(work.mine) - len(work.left)
    try:
        with task("dump", total, "documents", start=kept) as progress:
            committed = [0, 0]  # documents and tokens
            ahead = [0, 0]  # of parts that are not: what an engine that dies had done counts until then

            def show() -> None:
                rate = (committed[1] + ahead[1]) / max(time.monotonic() - session.ready, 1e-3)
                done = min(kept + committed[0] + ahead[0], total)
                progress.advance(max(done - progress.done, 0), f"{rate:,.0f} tokens/s")

            def advance(documents: int, tokens: int) -> None:
                ahead[:] = ahead[0] + documents, ahead[1] + tokens
                show()

            for result in session.run(handed_out(), advance, lambda: waiting):
                captured.add(result)
                documents = taken.pop(result.name)
                captured.there += documents if result.there else 0
                committed[:] = committed[0] + documents, committed[1] + result.tokens
                ahead[:] = max(ahead[0] - documents, 0), max(ahead[1] - result.tokens, 0)
                show()
        if captured.bad and not captured.documents:
            raise BadStatesError(
                f"none of {captured.bad:,} documents came back whole; one of them:"
                f" {next(iter(captured.rejected.values()))}",
                f"see {settings.log}",
            )
        session.close(CLOSE_SECONDS)
        for name, directories in _leftovers(objects).items():  # of engines that died on the way
            for directory in directories if name in names else ():
                objects.delete(directory)
        begun.unlink(missing_ok=True)
    finally:
        captured.start_seconds = session.start_seconds
        session.close()
