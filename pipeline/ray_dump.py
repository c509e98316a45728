"""A dump over a Ray cluster: engines take parts from one list, and one that dies is replaced.

The driver reads the input, hands out the parts and publishes the store; an actor holds one engine and knows
nothing else. An engine always has one part more than it works at, so that it never waits for the driver. Run
directory, target and a local store must lie on a file system that every node shares, which is checked before
an engine is started.

An engine keeps to as few nodes as it needs: to one where one node has the GPUs it takes, else vLLM spreads
its ranks over several (its Ray executor, which packs them). On a cluster without GPUs each node gets one
engine.
"""

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import CaptureError, ConfigError, describe, revive
from configs.progress import log
from configs.provenance import engine_version
from pipeline.capture.engine import EngineSettings, PartResult
from pipeline.capture.process import CLOSE_SECONDS
from pipeline.capture.session import Session
from pipeline.parts import Part

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["Place", "RaySession", "cluster", "has_gpus", "places"]

# deaths of an engine that commits no part in between, and of engines over one part
MOST_DEATHS = 3
# how often to say what is waited for
SAY_SECONDS = 30.0


@dataclass(frozen=True)
class Place:
    """Where an engine goes: on `node` (id), or wherever one node, or with `spans` several, has `gpus`."""

    gpus: int
    node: str | None = None
    spans: bool = False

    def __str__(self) -> str:
        if self.spans:
            return f"{self.gpus} GPUs, on as few nodes as hold them"
        if not self.gpus:
            return f"a core of node {self.node}"
        return f"{self.gpus} GPUs of one node" if self.gpus > 1 else "a GPU of one node"


def places(nodes: dict[str, int], tensor_parallel_size: int) -> list[Place]:
    """A place for each engine that a cluster can hold at once.

    Args:
        nodes: GPUs of each node, by its id.
        tensor_parallel_size: GPUs of an engine.

    Raises:
        ConfigError: all GPUs together are too few for one engine.
    """
    need, total = tensor_parallel_size, sum(nodes.values())
    if not total:
        return [Place(0, node) for node in nodes]
    if fitting := sum(gpus // need for gpus in nodes.values()):
        return [Place(need)] * fitting
    if total < need:
        raise ConfigError(
            f"the Ray cluster has {total} GPUs, and an engine takes dump.tensor_parallel_size = {need}",
            "add nodes to the cluster, or set dump.tensor_parallel_size to less",
        )
    return [Place(need, spans=True)] * (total // need)


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, else one that runs on this machine, else one of this machine alone.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at that address.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "dump.ray is set and Ray is not installed",
            "pip install 'layer61[ray]', or set dump.worker = 'k/n' on each machine",
        ) from None
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    # Ray prints what actors print, and its own warnings, where results belong
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS"), logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster: {error}", "start one with `ray start`, or unset dump.ray"
            ) from None
        signal.signal(signal.SIGTERM, before)  # Ray ends the process at once; ours says what is saved
        try:
            yield
        finally:
            ray.shutdown()


def _nodes() -> dict[str, int]:
    import ray

    return {n["NodeID"]: int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]}


def has_gpus() -> bool:
    """Whether any node of the cluster has a GPU."""
    return any(_nodes().values())


class RaySession:
    """As many engines as the cluster holds, where `Session` has one; the same calls.

    Args:
        settings: those of every engine, paths absolute; each gets a log of its own.
        probe, probe_ids: as in `Session`; `probe` absolute.
    """

    def __init__(self, settings: EngineSettings, probe: Path | None, probe_ids: np.ndarray) -> None:
        self.settings, self._probe, self._probe_ids = settings, probe, probe_ids
        self._engines: list[Engine] = []
        self.ready = time.monotonic()

    @property
    def start_seconds(self) -> float:
        """Of the slowest start."""
        return max((engine.start_seconds for engine in self._engines), default=0.0)

    def run(
        self,
        parts: Iterable[Part],
        progress: Callable[[int, int], None] = lambda documents, tokens: None,
        later: Callable[[], int] = lambda: 0,
    ) -> Iterator[PartResult]:
        """As `Session.run`, but that `progress` is not called: what is done is known a part at a time.

        Raises:
            ConfigError: the cluster is too small for an engine, or its nodes do not share what they must.
            CaptureError, StoreError: as `Session.run`; or engines keep dying.
        """
        nodes = _nodes()
        found = places(nodes, self.settings.tensor_parallel_size)
        _check_nodes(nodes, self.settings)
        source = iter(parts)
        left = deque(islice(source, len(found)))
        for number, place in enumerate(found[: len(left)], 1):
            settings = _settings(self.settings, number, place)
            self._engines.append(Engine(number, place, settings, self._probe, self._probe_ids))
        many = f"{len(self._engines)} engines on {len(nodes)} nodes"
        log("dump", f"starting {many}, each takes {found[0]}")
        yield from self._hand_out(left, source, later)

    def _hand_out(
        self, left: deque[Part], source: Iterator[Part], later: Callable[[], int]
    ) -> Iterator[PartResult]:
        """Keep every engine supplied until all parts are done; those of one that dies are left again."""
        import ray
        from ray.exceptions import RayError

        lost, more = Counter[str](), True
        # what is on its way from each engine: that it has its place, and then one answer after the other
        answers: dict[Any, Engine] = {engine.place(): engine for engine in self._engines}
        ready: list[Any]
        while more or left or any(engine.taken for engine in self._engines):
            for engine in self._engines:
                # one more than it has open, so that the next is at hand when one is done
                while engine.runs and len(engine.taken) <= self.settings.open_parts:
                    part = left.popleft() if left else next(source, None)
                    if part is None:
                        more = False
                        break
                    engine.give(part, later())
            if not answers:
                raise CaptureError("every engine was given up", "see the lines above and the engines' logs")
            ready, _ = ray.wait(list(answers), timeout=SAY_SECONDS)
            if not ready:
                _say_what_is_waited_for([engine for engine in answers.values() if not engine.runs])
            for answer in ready:
                engine = answers.pop(answer)
                try:
                    said = ray.get(next(answer) if engine.runs else answer)
                except RayError as error:
                    left.extendleft(reversed(engine.taken.values()))
                    lost.update(list(engine.taken))
                    _replace_or_give_up(engine, error)
                    if (worst := lost.most_common(1)) and worst[0][1] == MOST_DEATHS:
                        raise CaptureError(
                            f"part {worst[0][0]} took {MOST_DEATHS} engines with it",
                            f"see {engine.settings.log}; the same command tries again",
                        ) from None
                    if engine.is_wanted:
                        answers[engine.place()] = engine
                    continue
                if isinstance(said, PartResult):
                    del engine.taken[said.name]
                    engine.deaths = 0
                    yield said
                elif "error" in said:
                    raise revive(said["error"], CaptureError)
                elif "seconds" in said:
                    if not self.start_seconds:
                        self.ready = time.monotonic()
                    engine.start_seconds = max(engine.start_seconds, said["seconds"])
                    log("dump", f"engine {engine.number} is ready after {said['seconds']:.0f} s")
                else:
                    log(
                        "dump",
                        f"engine {engine.number} starts on {said['address']}, see {engine.settings.log}",
                    )
                    answer = engine.run()
                answers[answer] = engine

    def close(self, patience_s: float = 0) -> None:
        """End the engines, with time to clear up after themselves where nothing went wrong."""
        import ray

        if patience_s:
            closing = [engine.close() for engine in self._engines if engine.runs]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=patience_s)
        for engine in self._engines:
            engine.end()


def _settings(settings: EngineSettings, number: int, place: Place) -> EngineSettings:
    log_file = Path(settings.log)
    vllm = settings.vllm | ({"distributed_executor_backend": "ray"} if place.spans else {})
    return replace(settings, log=str(log_file.with_name(f"{log_file.stem}.ray-{number}.log")), vllm=vllm)


def _replace_or_give_up(engine: "Engine", error: Exception) -> None:
    """End what is left of an engine whose process, or node, or the way to it is gone."""
    first, *_ = str(error).strip().splitlines() or [""]
    log("dump", f"engine {engine.number} is lost ({type(error).__name__}: {first})")
    engine.end()
    engine.deaths += 1
    engine.is_wanted = engine.deaths < MOST_DEATHS and engine.may_return()
    if not engine.is_wanted:
        log("dump", f"engine {engine.number} is given up; its place was {engine.where}")


def _say_what_is_waited_for(engines: Sequence["Engine"]) -> None:
    import ray

    if engines:
        free, total = ray.available_resources(), ray.cluster_resources()
        have = ", ".join(f"{free.get(k, 0):.0f} of {total.get(k, 0):.0f} {k}s" for k in ("CPU", "GPU"))
        log("dump", f"{len(engines)} engines wait for {engines[0].where} each, or start there; free: {have}")


class Engine:
    """The driver's side of one engine: where it is, what it was given, and the actor that holds it.

    Args:
        number: from 1 on.
        where: its place.
        settings, probe, probe_ids: as in `Session`.
    """

    def __init__(
        self, number: int, where: Place, settings: EngineSettings, probe: Path | None, probe_ids: np.ndarray
    ) -> None:
        self.number, self.where, self.settings = number, where, settings
        self.taken: dict[str, Part] = {}
        self.runs = False
        self.deaths = 0  # since a part of it was committed
        self.is_wanted = True
        self.start_seconds = 0.0
        self._session = (settings, probe, probe_ids)
        self._actor: Any = None
        self._group: Any = None

    def place(self) -> "ObjectRef":
        """Ask the cluster for a place and put an actor there; the answer comes once it is there."""
        import ray
        from ray.util import placement_group
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        # beside `run`, which lasts as long as the engine, parts are handed over and the end is asked for
        options: dict[str, Any] = {"num_cpus": 1, "max_concurrency": 3}
        if self.where.spans:
            # vLLM's executor reserves the GPUs; its workers on other nodes must know that this is a capture
            options["runtime_env"] = {
                "env_vars": {
                    "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
                    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                    "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "LAYER61_",
                }
            }
        elif self.where.gpus:
            self._group = placement_group([{"CPU": 1, "GPU": self.where.gpus}], strategy="STRICT_PACK")
            options["num_gpus"] = self.where.gpus
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        else:
            assert self.where.node is not None
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.where.node, soft=False)
        threads = os.environ.get("OMP_NUM_THREADS")
        actor: Any = ray.remote(EngineActor)
        self._actor = actor.options(**options).remote(*self._session, threads)
        return self._actor.address.remote()

    def may_return(self) -> bool:
        """Whether its node is still there, where it belongs to one."""
        return self.where.node is None or self.where.node in _nodes()

    def run(self) -> Any:
        """Start the engine; the stream of its answers."""
        self.runs = True
        return self._actor.run.remote()

    def give(self, part: Part, later: int) -> None:
        """Hand a part over; `later` documents are still to come."""
        self.taken[part.name] = part
        self._actor.give.remote(part, later)

    def close(self) -> "ObjectRef":
        """Ask the engine to end; the answer comes once it has."""
        return self._actor.close.remote()

    def end(self) -> None:
        """End the actor, and with it the engine; give its place back."""
        import ray
        from ray.util import remove_placement_group

        self.taken, self.runs = {}, False
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


class Inbox:
    """Parts that were handed over; it runs dry and is filled again."""

    def __init__(self) -> None:
        self._parts: deque[Part] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.later = 0

    def put(self, part: Part, later: int) -> None:
        with self._changed:
            self._parts.append(part)
            self.later = later
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self) -> bool:
        """Wait for a part; False once there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._closed)
            return bool(self._parts)

    def __iter__(self) -> "Inbox":
        return self

    def __next__(self) -> Part:
        """The next part that is there now. Raises StopIteration where none is, though one may come later."""
        with self._changed:
            if not self._parts:
                raise StopIteration
            return self._parts.popleft()


class EngineActor:
    """The cluster's side of one engine. Errors come back as data, by `describe`."""

    def __init__(
        self, settings: EngineSettings, probe: Path | None, probe_ids: np.ndarray, threads: str | None
    ) -> None:
        # Ray sets one thread where nothing was set; the engine is to choose by itself
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        self._session = Session(settings, probe, probe_ids)
        self._inbox = Inbox()
        self._ended = threading.Event()

    def address(self) -> dict[str, Any]:
        """Where the engine will run."""
        import ray

        return {"address": ray.util.get_node_ip_address()}

    def give(self, part: Part, later: int) -> None:
        """Put a part into the inbox."""
        self._inbox.put(part, later)

    def run(self) -> Iterator[Any]:
        """Start the engine, then capture what comes into the inbox; yields each part that is committed."""
        try:
            yield {"seconds": self._session.start()}
            while self._inbox.wait():
                yield from self._session.run(self._inbox, later=lambda: self._inbox.later)
            self._session.close(CLOSE_SECONDS)
        except Exception as error:
            yield {"error": describe(error)}
        finally:
            self._ended.set()

    def close(self) -> None:
        """Capture what is in the inbox, then end the engine."""
        self._inbox.close()
        self._ended.wait()


def _check_nodes(nodes: dict[str, int], settings: EngineSettings) -> None:
    """Refuse nodes that do not see the run directory, the target and a local store as this machine does."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    directories = [Path(settings.log).parent, *([] if "://" in settings.store else [Path(settings.store)])]
    marks = [directory / f".seen-by-ray-{secrets.token_hex(8)}" for directory in directories]
    expected = _seen(Path(settings.model), [], settings.engine)
    try:
        for mark in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        look: Any = ray.remote(_seen)
        answers = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": there}
            answers[node] = look.options(**options).remote(Path(settings.model), marks, settings.engine)
        for node, asked in answers.items():
            try:
                answer = ray.get(asked)
            except RayError as error:
                raise ConfigError(
                    f"node {node} of the Ray cluster cannot take part: {error}",
                    "install the same locked environment on every node",
                ) from None
            where = f"node {answer['address']}"
            unseen = [mark.parent for mark, there in zip(marks, answer["marks"], strict=True) if not there]
            if answer["files"] != expected["files"]:
                unseen.append(Path(settings.model))
            if unseen:
                raise ConfigError(
                    f"{where} does not see {unseen[0]} as this machine does",
                    "run.dir, target.path and a local dump.store must lie on a file system they all share",
                )
            if answer["version"] != expected["version"]:
                raise ConfigError(
                    f"{where} has {settings.engine} {answer['version']}, this machine {expected['version']}",
                    "install the same locked environment on every node",
                )
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def _seen(model: Path, marks: Sequence[Path], engine: str) -> dict[str, Any]:
    """What a node sees: names and sizes of the target's files, the marks, the version of its engine."""
    import ray

    files = {p.name: p.stat().st_size for p in model.iterdir() if p.is_file()} if model.is_dir() else {}
    return {
        "address": ray.util.get_node_ip_address(),
        "files": files,
        "marks": [mark.exists() for mark in marks],
        "version": engine_version(engine),
    }
