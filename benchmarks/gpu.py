"""Everything that awaits a GPU, in one go of at most nine minutes on one H200: `make gpu-rehearsal`.

    python3 -m benchmarks.gpu [PART ...] [--total 540] [--budget PART=SECONDS ...] [--tiny]

Needs torch >= 2.11, triton >= 3.6, numpy, safetensors, rich and pytest, on Python 3.11 or 3.12, and nothing
else: no model, no store, no installation of this package.

    kernels     tests of tests/kernels on the device; 256 experts at the real widths against torch, rows and
                logits beyond 2^31 elements included
    layer       the whole layer (hidden 7168, 256 experts, bf16, random weights) through the unroll and the
                loss, 6 steps of 8,192 tokens: ms of each part, utilisation, peak memory beside the plan's
    moe         the experts at the shapes of RESULTS.md and 3,700 tokens with a skewed router, beside torch's
    loss        the vocabulary loss, beside its matrix products
    attention   flex attention beside the plain form, head widths 192 and 128
    tune        tiles of the table beside others, nearest first, for the time that is left

Each part runs in a process of its own with a budget in seconds, and prints one JSON line as it ends, with
what it measured till then and, where it failed or was cut off, an error; the others go on. Values appear on
stderr as they are measured. Exits with 1 if a part has an error. `--tiny` is for a machine without a GPU:
small sizes that check the program, not the kernels.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from benchmarks import gate, head_loss, moe
from train.attention import attention_form, per_row
from train.cost import activation_bytes, device_tflops, model_flops, work
from train.dims import Dims
from train.kernels.loss_ref import head_loss_reference
from train.kernels.moe import moe as experts
from train.loss import head_loss as vocabulary_loss
from train.mtp import MTPLayer
from train.unroll import select, unroll

# as the trainer sets it; read when the device is first used
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

Emit = Callable[..., None]
# seven interpreters would import torch, triton and all of this again
FORK = multiprocessing.get_context("fork")
GIB = 2**30
TOTAL = 540
# seconds before the end of its budget at which a part that can stops by itself
MARGIN = 8
# sizes that stand in for the real ones with --tiny
TINY = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "vocab_size": 256,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "index_n_heads": 2,
}


class Place(NamedTuple):
    """Where a part runs."""

    device: torch.device
    tiny: bool
    ends: float
    """time.monotonic() when its budget is used up."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=std)


def milliseconds(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


def kernels(place: Place, emit: Emit) -> None:
    """Tests of the kernels, each file in a process of its own, while this one compares at real sizes."""
    few = {"test_moe.py": "one_token", "test_head_loss.py": "weight_zero and kl"}
    running = {}
    for name, names in few.items():
        command = gate.kernel_tests(name, *["-k", names] * place.tiny)
        running[name] = subprocess.Popen(
            command, **gate.KERNEL_TESTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    D, F, E = (64, 32, 16) if place.tiny else (7168, 2048, 256)
    failed = []
    # 135,168 tokens have 1.08 million rows: gate and up products of 2.2e9 elements, outputs of 7.8e9
    for tokens in (64, 96) if place.tiny else (8192, 135168):
        problem = moe.Problem(tokens, D, F, E, 8, 0.5)
        failed += attempt(emit, f"moe, {tokens} tokens", functools.partial(compare_experts, place, problem))
    rows, vocabulary = (256, 1000) if place.tiny else (17408, 129280)
    compare = functools.partial(compare_loss, place, rows, D, vocabulary)
    failed += attempt(emit, f"loss, a chunk of {rows} rows", compare)
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(place.ends - time.monotonic() - MARGIN, 0))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        green = process.returncode == 0
        emit(tests=name, passed=green, said=said.splitlines()[-1:] if green else said.splitlines()[-40:])
        failed += [] if green else [name]
    if failed:
        raise RuntimeError(f"red: {', '.join(failed)}")


def attempt(emit: Emit, name: str, work: Callable[[], dict[str, Any]]) -> list[str]:
    """Emit what a piece of a part finds; where it fails, its error, and return its name."""
    try:
        emit(case=name, **work())
    except (Exception, SystemExit) as error:
        emit(case=name, error=f"{type(error).__name__}: {error}"[:2000])
        return [name]
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return []


def compare_experts(place: Place, problem: moe.Problem) -> dict[str, Any]:
    """The experts, forward and backward, against float32: some tokens, some experts, the last ones included.

    Raises:
        SystemExit: something differs by more than 2 % of its size.
    """
    T, _, _, E, _, _ = problem
    t = moe.tensors(problem, place.dtype, place.device)
    inputs = (t.x, t.weights, t.w1, t.w3, t.w2)
    y = experts(t.x, t.ids, t.weights, t.w1, t.w3, t.w2)
    dx, dweights, *stacks = torch.autograd.grad(y, inputs, t.dy)

    def expert(x: Tensor, weight: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        return weight[:, None] * (nn.functional.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t()

    with torch.no_grad():
        some = torch.tensor([0, T // 2, T - 1], device=place.device)
    for token in some.tolist():
        x = t.x[token : token + 1].detach().float().requires_grad_()
        weights = t.weights[token].detach().clone().requires_grad_()
        total = sum(
            expert(x, weights[k : k + 1], *(w[e].detach().float() for w in (t.w1, t.w3, t.w2)))
            for k, e in enumerate(t.ids[token].tolist())
        )
        expected = torch.autograd.grad(total, (x, weights), t.dy[token : token + 1].float())
        found = (y[token : token + 1], dx[token : token + 1], dweights[token])
        gate.require_equal(f"token {token}", found, (total.detach(), *expected))
    load = t.ids.flatten().bincount(minlength=E)
    chosen = sorted({0, E // 2, E - 1, int(load.argmax()), int(load.argmin())})
    for e in chosen:
        token, slot = torch.where(t.ids == e)
        w = [stack[e].detach().float().requires_grad_() for stack in (t.w1, t.w3, t.w2)]
        out = expert(t.x[token].detach().float(), t.weights[token, slot].detach(), *w)
        expected = torch.autograd.grad(out, w, t.dy[token].float())
        gate.require_equal(f"expert {e}", tuple(stack[e] for stack in stacks), expected)
    if not all(bool(g.isfinite().all()) for g in (y, dx, dweights)):
        raise ValueError("some of y, dx, dweights is not finite")
    return {"experts": chosen, "tokens": some.tolist(), "elements": t.ids.numel() * problem.hidden}


def compare_loss(place: Place, rows: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """The loss with one chunk for all rows against the reference on the last ones.

    Raises:
        SystemExit: something differs by more than 2 % of its size.
    """
    torch.manual_seed(0)
    student = place.normal(rows, hidden).requires_grad_()
    teacher = (student.detach() + 0.5 * place.normal(rows, hidden)).to(place.dtype)
    head = place.normal(vocabulary, hidden, std=2 * hidden**-0.5)
    found = vocabulary_loss(student, teacher, head, "lk_lambda", chunk=rows)
    gradient = torch.autograd.grad(found.loss, student)[0]
    last = student.detach()[-128:].requires_grad_()
    total, _, overlap, per_token = head_loss_reference(last, teacher[-128:], head, "lk_lambda")
    expected = (overlap, per_token, torch.autograd.grad(total, last)[0])
    got = (found.overlap[-128:], found.per_token[-128:], gradient[-128:])
    gate.require_equal("the last rows", got, expected)
    return {"elements": rows * vocabulary}


def real_config(tiny: bool) -> dict[str, Any]:
    """Sizes of the released target."""
    config = json.loads((gate.ROOT / "configs" / "deepseek-v3.2.config.json").read_text())
    return config | (TINY if tiny else {})


def random_layer(place: Place, dims: Dims) -> MTPLayer:
    """The layer with its tables, of random values, router and indexer frozen as in training."""
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = MTPLayer(dims)
    layer = layer.to(place.dtype).to_empty(device=place.device)
    for name, p in layer.named_parameters():
        with torch.no_grad():
            p.fill_(1) if p.dim() == 1 else p.normal_(std=p.shape[-1] ** -0.5)
        p.requires_grad_(not name.startswith(("self_attn.indexer.", "mlp.gate.weight")))
    layer.mlp.gate.e_score_correction_bias = torch.zeros(dims.n_routed_experts, device=place.device)
    layer.embed_tokens = place.normal(dims.vocab_size, dims.hidden_size)
    layer.lm_head = place.normal(dims.vocab_size, dims.hidden_size, std=dims.hidden_size**-0.5)
    return layer


def documents(place: Place, tokens: int, length: int) -> Tensor:
    """Boundaries of documents of one length, the last one shorter; int32."""
    return torch.tensor([*range(0, tokens, length), tokens], dtype=torch.int32, device=place.device)


def layer(place: Place, emit: Emit) -> None:
    """Forward and backward of the whole layer, with an anchor at every place and at about half of them."""
    config = real_config(place.tiny)
    dims = Dims.from_config(config)
    tokens, length, steps, rounds = (96, 40, 3, 1) if place.tiny else (8192, 1100, 6, 5)
    module = random_layer(place, dims)
    emit(parameters=sum(p.numel() for p in module.parameters()))
    ids = torch.randint(dims.vocab_size, (tokens,), device=place.device)
    hidden = place.normal(tokens, dims.hidden_size)
    bounds = documents(place, tokens, length)
    row = torch.arange(tokens, device=place.device) - per_row(bounds[:-1], bounds, tokens)
    failed = []
    for share in (1.0, 0.45):
        # of real documents the answer is wanted, their last part
        mask = row >= length * (1 - share)
        run = functools.partial(train_step, config, module, ids, hidden, bounds, mask, steps, rounds)
        failed += attempt(emit, f"{share:.0%} of the tokens wanted", run)
        module.zero_grad(set_to_none=True)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def planned_gib(
    config: dict[str, Any], module: MTPLayer, tokens: int, anchors: int, steps: int, longest: int
) -> dict[str, float]:
    """What the plan of a run says of the two peaks, without what ZeRO and the documents hold."""
    size = module.lm_head.element_size()
    kept = sum(x.numel() for x in (*module.parameters(), module.embed_tokens, module.lm_head)) * size
    gradients = sum(p.numel() for p in module.parameters() if p.requires_grad) * size
    forward, left = activation_bytes(
        config, None, tokens=tokens, anchors=anchors, steps=steps, size=size, longest=longest
    )
    peaks = {"forward and loss": kept + forward, "backward": kept + gradients + left}
    return {name: round(found / GIB, 2) for name, found in peaks.items()}


def peak_gib() -> float | None:
    """Most memory since the last call; None on CPU, where torch does not count it."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return round(peak / GIB, 2)


def train_step(
    config: dict[str, Any],
    module: MTPLayer,
    ids: Tensor,
    hidden: Tensor,
    bounds: Tensor,
    mask: Tensor,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """Time and memory of forward, loss and backward, the first (which compiles) apart."""
    device, scored = ids.device, select(mask, bounds, steps)
    weights = scored.valid.float() / scored.valid.sum()
    taken: dict[str, list[float]] = {"forward": [], "loss": [], "backward": []}
    peaks: dict[str, float | None] = {}
    kept: dict[str, Tensor] = {}

    def forward() -> None:
        kept["states"] = unroll(module, ids, hidden, bounds, steps, anchors=scored.anchors)

    def loss() -> None:
        students, teacher = scored.students(kept.pop("states")), hidden[scored.teacher]
        kept["loss"] = vocabulary_loss(students, teacher, module.lm_head, "lk_lambda", weights).loss

    def backward() -> None:
        kept["loss"].backward()

    def step() -> None:
        module.zero_grad(set_to_none=True)
        peak_gib()
        for name, part in (("forward", forward), ("loss", loss), ("backward", backward)):
            if name == "backward":
                peaks["forward and loss"] = peak_gib()
            taken[name].append(gate.seconds(part, device))
        peaks["backward"] = peak_gib()

    for _ in range(rounds + 1):
        step()
    first = sum(seconds.pop(0) for seconds in taken.values())
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).norm()
    if not bool((kept["loss"] + norm).isfinite()):
        raise ValueError(f"loss {float(kept['loss'].detach())} with a gradient norm of {float(norm)}")
    total = sum(statistics.median(seconds) for seconds in taken.values())
    anchors, keys, predictions = map(int, work(bounds, scored).tolist())
    flops = model_flops(module, len(ids), anchors, keys, predictions, steps)
    rate = device_tflops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    del gradients
    return {
        "tokens": len(ids),
        "anchors": anchors,
        "steps": steps,
        "ms": {name: milliseconds(seconds) for name, seconds in taken.items()},
        "total_ms": round(total * 1e3, 1),
        "first_s": round(first, 1),
        "tokens_per_s": round(len(ids) / total),
        "model_tflops": round(flops / total / 1e12, 2),
        "mfu": round(flops / total / 1e12 / rate, 4) if rate else None,
        "peak_gib": peaks,
        "planned_gib": planned_gib(config, module, len(ids), anchors, steps, int(bounds.diff().max())),
        "loss": round(float(kept["loss"].detach()), 4),
        "gradient_norm": float(norm),
        "kernel_ms": device_times(step) if device.type == "cuda" else None,
    }


def device_times(step: Callable[[], None]) -> dict[str, float] | None:
    """Milliseconds of the 16 kernels of a step that take longest; None where the profiler cannot count."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
        events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
        return {event.key[:80]: round(event.self_device_time_total / 1e3, 2) for event in events[:16]}
    except RuntimeError:
        return None


def routed(place: Place, emit: Emit) -> None:
    """The experts beside their peers, most wanted shapes first."""
    problems = [moe.Problem(64, 64, 32, 8, 2, 0.5)] if place.tiny else [moe.GPU[i] for i in (0, 3, 2, 1)]
    rate = gate.matrix_rate(place.device, place.dtype, 128 if place.tiny else None)
    emit(large_product_tflops=round(rate, 1))
    failed = []
    for problem in problems:
        load = moe.choices(problem, place.device).flatten().bincount(minlength=problem.experts)
        emit(problem=problem, max_over_mean=round(float(load.max() / load.double().mean()), 2))
        run = functools.partial(moe.measure, problem, place.dtype, place.device, 1 if place.tiny else 5, rate)
        failed += attempt(emit, ",".join(map(str, problem)), run)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def loss(place: Place, emit: Emit) -> None:
    """The vocabulary loss."""
    failed = []
    for problem in [(64, 64, 256)] if place.tiny else head_loss.GPU:
        for name in ("kl", "lk_lambda"):
            run = functools.partial(
                head_loss.measure, problem, name, place.dtype, place.device, 1 if place.tiny else 5
            )
            failed += attempt(emit, f"{name} {','.join(map(str, problem))}", run)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def attention(place: Place, emit: Emit) -> None:
    """An unroll's attention, forward and backward, in the plain form and as one kernel."""
    dims = Dims.from_config(real_config(place.tiny))
    failed = []
    # of long documents the plain form cannot keep the scores of more steps
    for length, steps in ((20, 2),) if place.tiny else ((1100, 3), (4096, 1)):
        tokens = 48 if place.tiny else 8192
        run = functools.partial(attend, place, dims, tokens, length, steps)
        failed += attempt(emit, f"documents of {length}, {steps} steps", run)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def attend(place: Place, dims: Dims, tokens: int, length: int, steps: int) -> dict[str, Any]:
    """Time and memory of both forms, compared first; forward alone on CPU, where flex has no backward."""
    torch.manual_seed(0)
    backward = place.device.type == "cuda"
    heads, query = dims.num_attention_heads, dims.qk_nope_head_dim + dims.qk_rope_head_dim
    bounds = documents(place, tokens, length)
    anchors = torch.arange(tokens, device=place.device)
    keys = [place.normal(tokens, heads, query).requires_grad_(backward) for _ in range(steps)]
    values = [place.normal(tokens, heads, dims.v_head_dim).requires_grad_(backward) for _ in range(steps)]
    queries = [place.normal(tokens, heads, query).requires_grad_(backward) for _ in range(steps)]
    weight = place.normal(tokens, heads, dims.v_head_dim)

    def form(name: str) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            step = attention_form(name, anchors, bounds, keys[0], values[0], dims.softmax_scale)
            out = [step(q, (keys[s], values[s]) if s else None) for s, q in enumerate(queries)]
            inputs = (*queries, *keys, *values)
            if not backward:
                return tuple(out)
            return out[-1].detach(), *torch.autograd.grad(out, inputs, [weight] * steps)

        return run

    forms = {"flex": form("blocks"), "plain": form("documents")}
    first = gate.seconds(forms["flex"], place.device)
    gate.require_equal("flex attention", forms["flex"](), forms["plain"]())
    seconds = gate.in_turn(forms, 1 if place.tiny else 5, place.device)
    spans = bounds.diff().double()
    visible = float((spans * (spans + 1) / 2).sum())
    flops = (6 if backward else 2) * steps * visible * heads * (query + dims.v_head_dim)
    found: dict[str, Any] = {"widths": [query, dims.v_head_dim], "first_s": round(first, 1)}
    for name, taken in seconds.items():
        peak = gate.peak_bytes(forms[name], place.device)
        found[name] = {
            "ms": milliseconds(taken),
            "tflops": round(flops / statistics.median(taken) / 1e12, 2),
            "peak_gib": None if peak is None else round(peak / GIB, 2),
        }
    return found


def nearest_first(kernel: str) -> Iterator[tuple[str, Any]]:
    """Tiles of a kernel: the committed one, then others by how many of its sizes they change."""
    from benchmarks import tune

    committed = tune.tile_for(kernel, tune.TOKENS["short"] * tune.K / tune.E)
    tiles = dict.fromkeys((committed, *tune.candidates(kernel)))
    by_distance = sorted(tiles, key=lambda tile: sum(a != b for a, b in zip(tile, committed, strict=True)))
    return ((kernel, tile) for tile in by_distance)


def tiles(place: Place, emit: Emit) -> None:
    """Compile tiles in as many processes as there are cores, time those that are sound, till time is up.

    Without a GPU they are only compiled. Nothing is written into the table.
    """
    from benchmarks import tune

    names = ["gather_sum", "up_fwd"] if place.tiny else [*tune.PRODUCTS, "gather_sum", "loss_rows"]
    wanted = [
        pair
        for round_ in itertools.zip_longest(*(nearest_first(name) for name in names))
        for pair in round_
        if pair is not None
    ]
    if place.tiny:
        wanted = wanted[: len(names)]
    tokens = tune.TOKENS["short"]
    gpu = place.device.type == "cuda"
    problem = tune.Problem(tokens, place.device) if gpu else None
    times: dict[str, dict[Any, float]] = {name: {} for name in names}
    counts = {name: {"compiled": 0, "sound": 0} for name in names}
    pool = ProcessPoolExecutor(
        max(min((os.cpu_count() or 2) - 2, 14), 1), mp_context=multiprocessing.get_context("spawn")
    )
    # the order of the programs changes nothing in their code
    running = {
        pool.submit(tune.sound, name, tile._replace(group=8), tokens): (name, tile) for name, tile in wanted
    }
    while running and time.monotonic() < place.ends - MARGIN:
        done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            name, tile = running.pop(future)
            sound = future.result()
            counts[name]["compiled"] += 1
            counts[name]["sound"] += sound
            if sound and problem is not None and time.monotonic() < place.ends - MARGIN:
                try:
                    times[name][tile] = tune.milliseconds(name, tile, problem, place.device)
                except Exception as error:  # a launch may be refused in many ways; any of them rules it out
                    print(f"{name} {tuple(tile)}: {error}")
    pool.shutdown(wait=False, cancel_futures=True)
    for name in names:
        committed = next(tile for _, tile in nearest_first(name))
        fastest = sorted(times[name], key=times[name].__getitem__)[:3]
        emit(
            kernel=name,
            **counts[name],
            committed={"tile": committed, "ms": times[name].get(committed)},
            fastest=[{"tile": tile, "ms": times[name][tile]} for tile in fastest],
            left=sum(other == name for other, _ in running.values()),
        )


PARTS: dict[str, tuple[Callable[[Place, Emit], None], int]] = {
    "kernels": (kernels, 130),
    "layer": (layer, 150),
    "moe": (routed, 80),
    "loss": (loss, 45),
    "attention": (attention, 60),
    "tune": (tiles, TOTAL),
}
"""What each part runs, and its budget in seconds; the last takes what is left."""


def machine(place: Place, emit: Emit) -> None:
    """Device, versions and commit.

    Raises:
        RuntimeError: there is no GPU, and sizes for one are asked for.
    """
    if not place.tiny and place.device.type != "cuda":
        raise RuntimeError("no GPU is visible; --tiny checks the program without one")
    emit(**gate.describe(place.device))


def inside(run: Callable[[Place, Emit], None], ends: float, tiny: bool, rows: Connection) -> NoReturn:
    """Run a part in this process: its rows into the pipe, whatever it prints on stderr."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)

    def emit(**row: Any) -> None:
        rows.send_bytes(json.dumps(row).encode())

    code = 0
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run(Place(device, tiny, ends), emit)
    except (Exception, SystemExit) as error:
        emit(error=f"{type(error).__name__}: {error}"[:2000])
        code = 1
    sys.stderr.flush()
    # compilers that are still at work would be waited for
    os._exit(code)


def run_part(name: str, run: Callable[[Place, Emit], None], seconds: float, tiny: bool) -> dict[str, Any]:
    """Run a part in a process of its own, with all that it starts; returns its line.

    The process is a fork of this one, which has imported everything and must not have touched the GPU.
    """
    began, cut = time.monotonic(), threading.Event()
    rows, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=inside, args=(run, began + seconds, tiny, theirs))
    process.start()
    theirs.close()

    def stop() -> None:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.ident, signal.SIGKILL)

    def cut_off() -> None:
        cut.set()
        stop()

    timer = threading.Timer(seconds, cut_off)
    timer.start()
    measured, error = [], None
    try:
        with contextlib.suppress(EOFError):
            while True:
                line = rows.recv_bytes().decode()
                print(f"{name}: {line}", file=sys.stderr, flush=True)
                row = json.loads(line)
                if row.keys() == {"error"}:
                    error = row["error"]
                else:
                    measured.append(row)
        process.join()
    finally:
        timer.cancel()
        stop()
        # a fork copies no thread but its own
        timer.join()
    if cut.is_set():
        error = f"cut off after {seconds:.3g} s"
    elif process.exitcode and error is None:
        error = f"ended with {process.exitcode}"
    found = {"part": name, "seconds": round(time.monotonic() - began, 1), "measured": measured}
    return found | ({"error": error} if error else {})


def budget(text: str) -> tuple[str, float]:
    """PART=SECONDS of the command line. Raises ValueError if it is something else."""
    name, _, seconds = text.partition("=")
    if name not in PARTS:
        raise ValueError(text)
    return name, float(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all parts")
    parser.add_argument("--budget", nargs="+", type=budget, default=[], metavar="PART=SECONDS")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a machine without a GPU")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    # ended from outside, it takes the part that runs with it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began, budgets, failed = time.monotonic(), dict(arguments.budget), False
    described = run_part("machine", machine, 60, arguments.tiny)
    if "error" in described:
        parser.error(described["error"])
    print(json.dumps({"part": "machine", **described["measured"][0]}), flush=True)
    for name, (run, seconds) in PARTS.items():
        if arguments.parts and name not in arguments.parts:
            continue
        left = arguments.total - (time.monotonic() - began)
        if left < 1:
            line: dict[str, Any] = {"part": name, "seconds": 0.0, "measured": [], "error": "no time was left"}
        else:
            line = run_part(name, run, min(budgets.get(name, seconds), left), arguments.tiny)
        failed |= "error" in line
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
