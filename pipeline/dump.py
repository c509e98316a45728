"""Stage one: conversations to stored states.

The documents are captured block by block (`pipeline.blocks`), and a block that is committed needs no other
record than its part: a run that was killed, a second run, and another machine all see in the store what is
done.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs import run_dir
from configs.contract import require_same
from configs.held_out import is_held_out, uid_group
from configs.lock import hold
from configs.progress import log, task
from configs.schema import RunConfig
from configs.target import target_config
from export.checkpoint import Checkpoint
from featurestore import part_exists, publish
from featurestore.objects import open_objects
from featurestore.writer import read_root
from pipeline.blocks import Block, blocks, share
from pipeline.capture.engine import EngineSettings
from pipeline.capture.process import CLOSE_SECONDS
from pipeline.capture.session import Session
from pipeline.capture.settings import check_aux_layers, choose_view, contract, engine_settings
from pipeline.conversations import input_exists
from pipeline.prompts import NoConversationsError, Prompts, load_prompts, write_rejects
from pipeline.ray_actors import capture_over_ray

__all__ = ["DumpPlan", "plan", "run"]


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
        left = f"{self.documents:,} documents ({self.held_out:,} held out of training), {tokens}"
        out = f"{self.rejects:,} conversations rejected, {self.duplicates:,} duplicates"
        return f"{each}\n{left}; {out}\n{self.blocks:,} blocks, {self.done:,} done, {self.mine:,} to do here"


def _held_out(config: RunConfig, prompts: Prompts) -> int:
    groups = uid_group(prompts.documents.uids)
    return int(is_held_out(groups, config.prompts.held_out, config.run.seed).sum())


def _size(size: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, (len(str(int(size))) - 1) // 3)
    return f"{size / 1000**power:.3g} {units[power]}"


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
    found = blocks(config, prompts)
    objects = open_objects(config.store_path)
    done = {b.name for b in found if part_exists(objects, b.name)}
    return DumpPlan(
        bytes_per_token=per_token,
        documents=len(prompts.documents),
        held_out=_held_out(config, prompts),
        tokens=prompts.tokens,
        most_tokens=prompts.most_tokens,
        rejects=len(prompts.rejects),
        duplicates=prompts.duplicates,
        blocks=len(found),
        done=len(done),
        mine=sum(b.name not in done for b in share(config, found)),
        view=view,
        store=config.store_path,
    )


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
    target_dir = config.require_target()
    target = target_config(target_dir)
    view = choose_view(config, target)
    check_aux_layers(config, target)
    rejects = config.run.dir / run_dir.REJECTS
    try:
        prompts = load_prompts(config.prompts, target_dir)
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
        what = f"store {objects.url} and target {target_dir}"
        hint = "dump into another store (dump.store), or use the target of this one"
        require_same(root["contract"], agreed, what, hint=hint)
    mine = share(config, blocks(config, prompts))
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
                capture_over_ray(config, todo, captured)
            else:
                settings = engine_settings(config, prompts, agreed, view)
                _capture_here(config, settings, mine, todo, prompts.documents[0].input_ids, captured)
    manifest = publish(objects)
    totals = manifest["totals"]
    return {
        "seconds": round(time.monotonic() - started, 2),
        "engine_start_seconds": round(captured["start"], 2),
        "documents": totals["documents"],
        "held_out": _held_out(config, prompts),
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


def _capture_here(
    config: RunConfig,
    settings: EngineSettings,
    mine: Sequence[Block],
    todo: Sequence[Block],
    probe_ids: np.ndarray,
    captured: dict[str, Any],
) -> None:
    log("dump", f"starting vLLM, its log is {settings.log}")
    session = Session(settings, config.run.dir / run_dir.PROBE if config.dump.probe else None, probe_ids)
    total = sum(len(b.documents) for b in mine)
    done = total - sum(len(b.documents) for b in todo)
    try:
        with task("dump", total, "documents", start=done) as progress:
            for block in todo:
                end = progress.done + len(block.documents)

                def advance(tokens: int, end: float = end) -> None:
                    rate = captured["tokens"] / max(time.monotonic() - session.ready, 1e-3)
                    # a block that is tried again finishes some documents twice
                    one = int(progress.done < end)
                    progress.advance(one, f"{rate:,.0f} tokens/s" if captured["tokens"] else "")

                result = session.run(block, advance)
                captured["tokens"] += result.tokens if result else 0
                progress.advance(end - progress.done, f"{captured['tokens']:,} tokens written")
        session.close(CLOSE_SECONDS)
    finally:
        captured["start"] = session.start_seconds
        session.close()
