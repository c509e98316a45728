"""`layer61 serve`: vLLM's own OpenAI-compatible server with target and draft, and what it counts."""

import contextlib
import json
import shlex
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from configs import run_dir
from configs.errors import ConfigError, InputError, Layer61Error
from configs.progress import log
from configs.schema import RunConfig
from configs.target import target_config
from export.check import refuse_name
from export.checkpoint import Checkpoint
from pipeline import child
from pipeline.speculation import (
    CPU_ENGINE,
    draft_directory,
    draft_path,
    is_eagle3,
    refuse_draft_name,
    require_draft,
    speculative_config,
    view_of,
)
from pipeline.view import make_view

__all__ = ["Figures", "arguments", "figures", "plan", "ready", "run", "running", "served_name", "url"]

# a server that is asked to end has this long to finish what it has begun, and some more to free its memory
DRAIN_SECONDS = 3
END_SECONDS = DRAIN_SECONDS + 5.0
# while the engine starts, a line so often
WAITING_SECONDS = 60.0


@dataclass(frozen=True)
class Figures:
    """What a server has counted since it started; `running` and `waiting` are as of now."""

    running: int = 0
    waiting: int = 0
    requests: int = 0
    tokens: int = 0
    drafts: int = 0
    accepted: tuple[int, ...] = ()

    def since(self, earlier: "Figures") -> "Figures":
        """The counts of the time between."""
        before = earlier.accepted or (0,) * len(self.accepted)
        return Figures(
            self.running,
            self.waiting,
            self.requests - earlier.requests,
            self.tokens - earlier.tokens,
            self.drafts - earlier.drafts,
            tuple(a - b for a, b in zip(self.accepted, before, strict=True)),
        )

    def acceptance(self) -> str:
        """Acceptance length and, by position, the share accepted; empty where nothing was drafted."""
        if not self.drafts:
            return ""
        positions = " ".join(f"{a / self.drafts:.0%}" for a in self.accepted)
        return f" | acceptance length {1 + sum(self.accepted) / self.drafts:.2f} ({positions})"


def arguments(config: RunConfig, draft: str) -> list[str]:
    """The arguments of `vllm serve`, model first; writes the views that the machine needs.

    Args:
        config: `target`, `dump` (tensor_parallel_size, view) and `serve` count.
        draft: as `serve.draft`.

    Raises:
        ConfigError: the path of the draft, or of its view, would mislead vLLM, or the view is not exact for
            `max_model_len`.
        InputError: the target has no MTP layer, or the draft does not load beside it.
    """
    settings, target = config.serve, config.require_target()
    directory = draft_directory(config, draft)
    if draft != "none":
        require_draft(
            Checkpoint(target), directory, view_of(config.dump.view), config.dump.tensor_parallel_size
        )
    options: dict[str, Any] = {} if torch.cuda.is_available() else dict(CPU_ENGINE)
    options |= {"host": settings.host, "port": settings.port, "served_model_name": served_name(config)}
    options["shutdown_timeout"] = DRAIN_SECONDS
    model, draft_dir = target.absolute(), directory and directory.absolute()
    if view_of(config.dump.view) == "v3":
        folder = config.run.dir / run_dir.SERVE_WORK
        model = make_view(target, folder / "target")
        if directory is not None:
            draft_dir = make_view(directory, folder / "draft")
        if model != target.absolute():
            if draft != "none" and not (directory and is_eagle3(directory)):
                # an MTP draft lies in one of the views, whose paths vLLM reads as well
                refuse_name(config.run.dir, "run.dir")
            exact = target_config(target)["index_topk"]
            # by the target's type, which the view changes, vLLM would choose the way to render a chat
            options |= {"tokenizer_mode": "deepseek_v32", "max_model_len": exact}
            if _longest(config) > exact:
                raise ConfigError(
                    f"serve.vllm.max_model_len = {settings.vllm['max_model_len']:,} is more than the"
                    f" {exact:,} tokens up to which the V3 view equals sparse attention",
                    "lower it, or set dump.view=native on a machine with a GPU",
                )
    options |= settings.vllm
    options["tensor_parallel_size"] = config.dump.tensor_parallel_size
    if draft != "none":
        options["speculative_config"] = speculative_config(draft_dir, settings.num_speculative_tokens)
    return [str(model), *(word for name, value in options.items() for word in _option(name, value))]


def _option(name: str, value: Any) -> list[str]:
    """A setting of `[serve.vllm]` as command-line arguments of vLLM."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", json.dumps(value)]
    return [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]


def _longest(config: RunConfig) -> int:
    """`serve.vllm.max_model_len`; 0 where it is not set. Raises ConfigError where it is no whole number."""
    longest = config.serve.vllm.get("max_model_len", 0)
    if not isinstance(longest, int):
        raise ConfigError(f"serve.vllm.max_model_len = {longest!r}: expected a whole number of tokens")
    return longest


def served_name(config: RunConfig) -> str:
    """The model's name in requests; the first one where `serve.vllm` gives it several."""
    name = config.serve.vllm.get("served_model_name") or config.require_target().absolute().name
    return str(name[0] if isinstance(name, list | tuple) else name)


def url(config: RunConfig) -> str:
    """Where this machine reaches the server."""
    host = config.serve.host
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{config.serve.port}"


def _serve(words: list[str], log_file: str) -> None:
    """Body of the server's process."""
    child.enter(log_file)
    # what `vllm serve` runs; that command itself knows no package but the one for CUDA
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm serve", "--model", *words]
    main()


@contextlib.contextmanager
def running(config: RunConfig, words: list[str], log_file: Path) -> Iterator[BaseProcess]:
    """A server from when it answers; it and its engine end with the context.

    Args:
        config: host and port.
        words: from `arguments`.
        log_file: everything the server prints.

    Raises:
        InputError: something else listens on the port.
        Layer61Error: the server ended before it answered; names its log.
    """
    place = url(config).removeprefix("http://").rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((place[0], int(place[2])), 1):
        raise InputError(
            f"something listens on {place[0]}:{place[2]} already", "set serve.port to a free one"
        )
    log_file.parent.mkdir(parents=True, exist_ok=True)
    started = said = time.monotonic()
    ranks = config.dump.tensor_parallel_size
    environment = child.SERVED | child.share_cores(ranks)
    process = child.start(_serve, (words, str(log_file.absolute())), "layer61-server", environment)
    try:
        while not _answers(f"{url(config)}/health"):
            if wait([process.sentinel], 0.5):
                raise _ended(log_file)
            if time.monotonic() - said >= WAITING_SECONDS:
                said = time.monotonic()
                log("serve", f"still starting after {said - started:.0f} s, log in {log_file}")
        yield process
    finally:
        child.end(process, grace_s=END_SECONDS)


def _answers(place: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(place, timeout=5):
        return True
    return False


def _ended(log_file: Path) -> Layer61Error:
    return Layer61Error(f"the server ended: {child.last_error(log_file)}", f"see {log_file}")


def figures(place: str, timeout_s: float = 10) -> Figures:
    """What the server at this URL has counted, from its /metrics. Raises OSError where it does not answer."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{place}/metrics", timeout=timeout_s) as answer:
        text = answer.read().decode()
    totals: dict[str, int] = {}
    accepted: dict[int, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0) + int(sample.value)
            if sample.name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
                position = int(sample.labels["position"])
                accepted[position] = accepted.get(position, 0) + int(sample.value)
    return Figures(
        totals.get("vllm:num_requests_running", 0),
        totals.get("vllm:num_requests_waiting", 0),
        totals.get("vllm:request_success_total", 0),
        totals.get("vllm:generation_tokens_total", 0),
        totals.get("vllm:spec_decode_num_drafts_total", 0),
        tuple(accepted[position] for position in sorted(accepted)),
    )


def _explain(config: RunConfig) -> None:
    """Say where the server is and how to ask it."""
    place, model = url(config), served_name(config)
    body = {"model": model, "messages": [{"role": "user", "content": "What does shutil.copy2 do?"}]}
    log("serve", f"ready: {place}/v1, model {model}")
    log(
        "serve",
        f"curl {place}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
    )
    log(
        "serve",
        f"""python -c 'from openai import OpenAI
client = OpenAI(base_url="{place}/v1", api_key="none")
chat = client.chat.completions.create({", ".join(f"{k}={json.dumps(v)}" for k, v in body.items())})
print(chat.choices[0].message.content)'""",
    )


def _watch(config: RunConfig, process: BaseProcess, log_file: Path) -> None:
    """Print one line every few seconds while something happens, until the server ends."""
    first = last = figures(url(config))
    asked = time.monotonic()
    try:
        while not wait([process.sentinel], config.serve.every_seconds):
            try:
                now = figures(url(config))
            except OSError:
                continue
            took, asked = time.monotonic() - asked, time.monotonic()
            new, last = now.since(last), now
            if new.running or new.waiting or new.requests or new.tokens:
                log(
                    "serve",
                    f"{new.running} running, {new.waiting} waiting, {new.requests} answered |"
                    f" {new.tokens / took:,.0f} tokens/s{new.acceptance()}",
                )
    finally:
        with contextlib.suppress(OSError):  # what came since the last line; it may have ended
            last = figures(url(config), timeout_s=2)
        total = last.since(first)
        log("serve", f"{total.requests:,} requests, {total.tokens:,} tokens{total.acceptance()}")
    raise _ended(log_file)


def plan(config: RunConfig) -> str:
    """One line: what `layer61 serve` will serve, and where.

    Raises:
        ConfigError: no target is set, or the draft's path would mislead vLLM.
    """
    config.require_target()
    _longest(config)
    directory = draft_path(config, config.serve.draft)
    if directory is not None:
        refuse_draft_name(config, directory)
    what = {"none": "without a draft", "released": "with the released layer"}.get(
        config.serve.draft, f"with the draft {directory}"
    )
    return (
        f"serve {config.target.path} {what} on {config.serve.host}:{config.serve.port}"
        + (
            f", {config.serve.num_speculative_tokens} draft tokens a step"
            if config.serve.draft != "none"
            else ""
        )
        + (f"; not yet: there is no {directory}" if directory is not None and not directory.exists() else "")
    )


def ready(config: RunConfig) -> None:
    """Raises what `run` would: InputError where there is no draft."""
    draft_directory(config, config.serve.draft)


def run(config: RunConfig) -> None:
    """`layer61 serve`: serve until a signal comes or the server ends.

    Raises:
        InputError: there is no export yet, or something else listens on the port.
        ConfigError: as `arguments`.
        Layer61Error: the server ended.
    """
    words = arguments(config, config.serve.draft)
    log_file = config.run.dir / run_dir.SERVE_WORK / "server.log"
    program = ["vllm", "serve"]
    if not torch.cuda.is_available():
        program = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    log("serve", shlex.join([*program, *words]))
    log("serve", f"starting vLLM, log in {log_file}")
    with running(config, words, log_file) as process:
        _explain(config)
        _watch(config, process, log_file)
