"""A dump over a Ray cluster: actors take parts from one list, an engine each."""

import os
from collections.abc import Sequence
from typing import Any

from configs import run_dir
from configs.errors import ConfigError
from configs.progress import log, task
from configs.schema import RunConfig
from configs.target import target_config
from pipeline.capture.engine import EngineSettings, PartResult
from pipeline.capture.session import Session
from pipeline.capture.settings import choose_view, contract, engine_settings
from pipeline.parts import Part
from pipeline.prompts import load_prompts

__all__ = ["capture_over_ray"]


def capture_over_ray(config: RunConfig, todo: Sequence[Part], captured: Any) -> None:
    """Let actors take parts from the list, one engine each; the files must be visible on every machine."""
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
    log("dump", f"{len(todo):,} parts over {actors} Ray actors with {gpus} GPUs each")
    remote = ray.remote(num_gpus=gpus, num_cpus=1)(PartActor)
    pool: Any = ActorPool([remote.remote(config.model_dump(mode="json"), i) for i in range(actors)])
    with task("dump", sum(len(p.documents) for p in todo), "documents") as progress:
        sizes = {p.name: len(p.documents) for p in todo}
        for result in pool.map_unordered(lambda actor, part: actor.run.remote(part), todo):
            captured.add(result)
            progress.advance(sizes[result.name], f"{captured.tokens:,} tokens written")


class PartActor:
    """One engine in a Ray cluster; its settings follow from the same configuration and input."""

    def __init__(self, values: dict[str, Any], number: int) -> None:
        config = RunConfig.model_validate(values)
        view = choose_view(config, target_config(config.require_target()))
        prompts = load_prompts(config.prompts, config.require_target())
        agreed = contract(config, prompts, view).model_dump(mode="json")
        place = config.run.model_copy(update={"dir": config.run.dir / f"ray{number}"})
        settings = engine_settings(config.model_copy(update={"run": place}), prompts, agreed, view)
        settings = EngineSettings(**vars(settings) | {"store": config.store_path})
        probe = config.run.dir / run_dir.PROBE if config.dump.probe else None
        self._session = Session(settings, probe, prompts.documents[0].input_ids)

    def run(self, part: Part) -> PartResult:
        """Capture and commit a part."""
        return next(self._session.run([part]))
