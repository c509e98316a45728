"""Write a trained MTP layer as a directory that servers load as a draft.

    layout          tensors                       config.json                        loads in
    nextn           model.layers.{N}.*            the target's, byte for byte        vLLM, sglang
    sglang-legacy   model.layers.0.*              num_hidden_layers 1, own class     sglang
    stitched        the whole target, layer N     the target's, byte for byte        vLLM, sglang, as the
                    replaced, the rest as links                                      target itself

N is the target's `num_hidden_layers`. Embedding and head are left out: servers take the target's. Each tensor
is stored in the dtype of the target's own layer; one that training left as it was keeps the target's bits.
vLLM gives a draft the target's quantisation, so a float8 target needs a float8 draft (`auto`). `layer61.json`
in the directory says what it was made from, which makes a second run a no-op.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from configs import run_dir
from configs.contract import require_trained_for, target_contract
from configs.errors import ConfigError, InputError
from configs.files import write_json
from configs.progress import count, log, task
from export import fp8
from export.card import model_card
from export.check import check, refuse_name
from export.checkpoint import INDEX, Checkpoint, mtp_prefix
from export.directory import copy_companions, require_free, save, weights_identity, write_once
from export.keymap import DROPPED, account, is_quantized, layer_shapes

__all__ = ["Entry", "Layout", "Plan", "Quantization", "check_place", "export", "prepare"]

Layout = Literal["nextn", "sglang-legacy", "stitched"]
Quantization = Literal["auto", "none", "fp8"]

# what a DeepSeek-V3.2 checkpoint says about its own float8 weights
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": list(fp8.BLOCK),
}
FILE_BYTES = 2 << 30


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its short name, name in the directory, shape, dtype, and whether in blocks."""

    name: str
    written: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    quantized: bool

    @property
    def scale(self) -> str:
        return f"{self.written.removesuffix('weight')}weight_scale_inv"

    def stored(self, block: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what is written, scales included, by name."""
        out = {self.written: (self.shape, self.dtype)}
        if self.quantized:
            out[self.scale] = (fp8.scale_shape(self.shape, block), torch.float32)
        return out

    def num_bytes(self, block: tuple[int, int]) -> int:
        """Bytes of what is written, scales included."""
        return sum(_num_bytes(*x) for x in self.stored(block).values())


@dataclass(frozen=True)
class Plan:
    """What an export will write; from headers alone.

    Attributes:
        entries: every tensor, in order.
        files: entries of each new file by its name.
        kept: stitched layout: names of the target's tensors each rewritten file keeps.
        links: stitched layout: files of the target that are linked.
        num_bytes: bytes of the new tensors.
        config: config.json of the directory; None for a byte-for-byte copy of the target's.
    """

    weights: Checkpoint
    target: Checkpoint
    directory: Path
    layout: Layout
    quantization: Literal["none", "fp8"]
    entries: tuple[Entry, ...]
    files: dict[str, tuple[Entry, ...]]
    num_bytes: int
    config: dict[str, Any] | None
    contract: dict[str, Any] | None
    draft: dict[str, Any] | None
    step: int | None
    metrics: dict[str, Any]
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)
    links: tuple[str, ...] = ()

    @property
    def power_of_two(self) -> bool:
        """Whether scales are powers of two: as the target's are, and by default."""
        return (self.target.quantization or FP8_CONFIG).get("scale_fmt") == "ue8m0"

    @property
    def sources(self) -> dict[str, Path]:
        """Directories that weights and target are read from."""
        return {"weights": self.weights.directory, "target": self.target.directory}

    @property
    def num_tensors(self) -> int:
        """Tensors of the layer as stored, scales included."""
        return sum(1 + e.quantized for e in self.entries)

    def describe(self) -> str:
        """The plan in one line."""
        what = "the released layer" if self.weights.directory == self.target.directory else "the layer"
        step = "" if self.step is None else f" of step {self.step:,}"
        form = "fp8" if self.quantization == "fp8" else "unquantised"
        links = f" and {count(len(self.links), 'link')}" if self.layout == "stitched" else ""
        return (
            f"{what}{step} as {self.layout}, {form}: {self.num_tensors:,} tensors,"
            f" {self.num_bytes / 1e9:,.3f} GB in {count(len(self.files), 'file')}{links}, to {self.directory}"
        )


def _weights(directory: Path, target: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
    """Open the layer's tensors and what is written beside them."""
    if directory == target.directory:
        return target, {}
    if (directory / run_dir.WEIGHTS).is_dir():
        directory = directory / run_dir.WEIGHTS
    weights = Checkpoint(directory, config=target.config)
    for place in (directory, directory.parent):
        if (place / run_dir.META).is_file():
            return weights, run_dir.read_meta(place)
    return weights, {}


def _scheme(target: Checkpoint, quantization: Quantization) -> Literal["none", "fp8"]:
    """Whether the draft is stored in float8 blocks."""
    config = target.quantization
    if quantization != "auto":
        return quantization
    if config is None:
        return "none"
    if config.get("quant_method") != "fp8" or not config.get("weight_block_size"):
        raise InputError(
            f"{target.directory} is quantised as {config.get('quant_method')!r}"
            f" with weight_block_size {config.get('weight_block_size')!r}; only fp8 in blocks can be written",
            'set export.quantization = "none" for a bfloat16 draft, which sglang serves beside any target;'
            " where it is given --quantization, with --speculative-draft-model-quantization unquant",
        )
    return "fp8"


def _pack(
    entries: tuple[Entry, ...], block: tuple[int, int], limit: int, stem: str
) -> dict[str, tuple[Entry, ...]]:
    """Cut the entries, in order, into files of at most `limit` bytes, larger tensors alone."""
    groups: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        size = entry.num_bytes(block)
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += size
    return {
        f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": tuple(group) for i, group in enumerate(groups, 1)
    }


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def prepare(
    weights_dir: Path | str,
    target_dir: Path | str,
    out_dir: Path | str,
    *,
    layout: Layout = "nextn",
    quantization: Quantization = "auto",
    file_bytes: int = FILE_BYTES,
) -> Plan:
    """Check every input by its headers and say what would be written; arguments and errors as `export`."""
    out = Path(out_dir).absolute()
    refuse_name(out)
    target = Checkpoint(Path(target_dir).absolute())
    if out.resolve() == target.directory.resolve():
        raise ConfigError(
            f"export.dir = {out} is the target itself",
            "set export.dir to a directory that does not exist yet",
        )
    target_names = target.mtp_names()
    weights, said = _weights(Path(weights_dir).absolute(), target)
    require_trained_for(said.get("contract"), target.directory, f"weights {weights.directory}")
    _check_layer(target, target_names, target)
    _check_layer(weights, weights.mtp_names(), target)

    scheme = _scheme(target, quantization)
    config = _config(target, layout, scheme)
    if layout == "stitched" and config is not None:
        raise ConfigError(
            f"export.quantization = {quantization!r} differs from the target's own, which the other layers"
            " of a stitched checkpoint keep",
            'set export.quantization = "auto", or export.layout = "nextn"',
        )
    entries = _entries(target, layout, scheme)
    kept, links = _rest(target) if layout == "stitched" else ({}, ())
    stem = f"model-layer{target.config['num_hidden_layers']}" if layout == "stitched" else "model"
    return Plan(
        weights=weights,
        target=target,
        directory=out,
        layout=layout,
        quantization=scheme,
        entries=entries,
        files=_pack(entries, target.block, file_bytes, stem),
        num_bytes=sum(e.num_bytes(target.block) for e in entries)
        + sum(_num_bytes(target.shape(n), target.dtype(n)) for names in kept.values() for n in names),
        config=config,
        contract=said.get("contract"),
        draft=said.get("draft"),
        step=said.get("step"),
        metrics=said.get("metrics") or {},
        kept=kept,
        links=links,
    )


def _check_layer(source: Checkpoint, names: Iterable[str], target: Checkpoint) -> None:
    """Check that `names` are exactly the tensors of one layer, in the shapes that the target's sizes give."""
    prefix, shapes = mtp_prefix(target.config), layer_shapes(target.config)
    expected = {prefix + name: shape for name, shape in shapes.items() if name not in DROPPED}
    scales = {source.scale_name(name) for name in names}
    plain = [name for name in names if name not in scales]
    account(plain, expected, str(source.directory), optional=[prefix + name for name in DROPPED])
    wrong = [
        f"{name.removeprefix(prefix)} has shape {source.shape(name)}, expected {shape}"
        for name, shape in expected.items()
        if source.shape(name) != shape
    ]
    if wrong:
        raise InputError(
            f"{source.directory} does not fit {target.directory}/config.json: {'; '.join(wrong[:3])}"
        )


def _entries(target: Checkpoint, layout: Layout, scheme: Literal["none", "fp8"]) -> tuple[Entry, ...]:
    """Every tensor to write, in the layer's order: the target's dtype, but for what the scheme changes."""
    prefix = mtp_prefix(target.config)
    entries = []
    for name, shape in layer_shapes(target.config).items():
        if name in DROPPED:
            continue
        in_target = target.scale_name(prefix + name) is not None
        quantized = scheme == "fp8" and (in_target or (target.quantization is None and is_quantized(name)))
        dtype = target.dtype(prefix + name)
        if quantized:
            dtype = torch.float8_e4m3fn
        elif in_target:
            dtype = torch.bfloat16
        written = f"model.layers.0.{name}" if layout == "sglang-legacy" else prefix + name
        entries.append(Entry(name, written, shape, dtype, quantized))
    return tuple(entries)


def _config(target: Checkpoint, layout: Layout, scheme: Literal["none", "fp8"]) -> dict[str, Any] | None:
    """config.json of the directory; None where it is the target's."""
    config = dict(target.config)
    if scheme == "none":
        config.pop("quantization_config", None)
    elif target.quantization is None:
        config["quantization_config"] = FP8_CONFIG
    if layout == "sglang-legacy":
        config |= {"num_hidden_layers": 1, "architectures": ["DeepseekV3ForCausalLMNextN"]}
    return None if config == target.config else config


def _rest(target: Checkpoint) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """What a stitched checkpoint takes from the target.

    Returns:
        Names of the tensors that each rewritten file keeps; files that can be linked.
    """
    prefix = mtp_prefix(target.config)
    replaced = {prefix + name for name in layer_shapes(target.config) if name not in DROPPED}
    replaced |= {scale for name in replaced if (scale := target.scale_name(name)) is not None}
    content: dict[str, list[str]] = {}
    for name in target.names:
        content.setdefault(target.file(name), []).append(name)
    kept: dict[str, tuple[str, ...]] = {}
    links: list[str] = []
    for file, held in content.items():
        # a server reads whole files, so a linked one must not hold the old layer
        if replaced.isdisjoint(held):
            links.append(file)
        elif rest := tuple(name for name in held if name not in replaced):
            # a file of this name would be taken for the whole checkpoint
            kept["model-rest.safetensors" if file == "model.safetensors" else file] = rest
    return kept, tuple(links)


def _identity(plan: Plan) -> dict[str, Any]:
    """What decides the bytes of an export."""
    identity: dict[str, Any] = {
        "format": 2,
        "layout": plan.layout,
        "quantization": plan.quantization,
        "target": target_contract(plan.target.directory).model_dump(mode="json", exclude={"path"}),
        "weights": "released",
    }
    if plan.weights.directory != plan.target.directory:
        identity["weights"] = weights_identity(plan.weights)
    return identity


def _convert(entry: Entry, plan: Plan) -> tuple[dict[str, torch.Tensor], dict[str, float] | None, bool]:
    """Make what is stored of one entry.

    Returns:
        The tensors by name; the rounding errors of a newly quantised one; whether the bits are the target's.

    Raises:
        InputError: the trained tensor holds a NaN or an infinity.
    """
    target, weights, name = plan.target, plan.weights, mtp_prefix(plan.target.config) + entry.name
    trained = weights.get(name)
    if not trained.isfinite().all():
        raise InputError(
            f"{weights.directory}: {name} holds NaN or infinite values",
            "training diverged before this checkpoint; export an earlier one",
        )
    scale = target.scale_name(name)
    same_form = entry.quantized == (scale is not None) and target.dtype(name) == entry.dtype
    # the released values, in the precision training kept them in
    if same_form and torch.equal(target.get(name).to(trained.dtype), trained):
        stored = {entry.written: target.get(name, raw=True)}
        if scale is not None:
            stored[entry.scale] = target.get(scale)
        return stored, None, True
    if not entry.quantized:
        return {entry.written: trained.to(entry.dtype).contiguous()}, None, False
    w8, scale_inv = fp8.quantize(trained, power_of_two=plan.power_of_two, block=target.block)
    error = fp8.dequantize(w8, scale_inv, block=target.block) - trained.float()
    norm = trained.float().norm().item()
    errors = {
        "max_abs": error.abs().max().item(),
        "relative_rms": error.norm().item() / norm if norm else 0.0,
    }
    return {entry.written: w8, entry.scale: scale_inv}, errors, False


def _summary(errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Rounding errors by kind of tensor, experts together."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, error in errors.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kinds.setdefault(kind, []).append(error)
    return {
        kind: {
            "tensors": len(found),
            "max_abs": max(e["max_abs"] for e in found),
            "mean_relative_rms": sum(e["relative_rms"] for e in found) / len(found),
            "worst_relative_rms": max(e["relative_rms"] for e in found),
        }
        for kind, found in kinds.items()
    }


def check_place(plan: Plan, *, replace: bool) -> None:
    """What `export` would refuse about the directory, found without reading a tensor."""
    identity = _identity(plan) if _is_ours(plan.weights) else {"layout": plan.layout}
    require_free(plan.directory, identity, plan.sources, replace=replace)


def _is_ours(weights: Checkpoint) -> bool:
    """Whether the hashes of the weights are known already."""
    return weights.directory.name == run_dir.WEIGHTS and (weights.directory.parent / run_dir.COMMIT).is_file()


def export(
    weights_dir: Path | str,
    target_dir: Path | str,
    out_dir: Path | str,
    *,
    layout: Layout = "nextn",
    quantization: Quantization = "auto",
    file_bytes: int = FILE_BYTES,
    replace: bool = False,
) -> dict[str, Any]:
    """Write a layer as a draft directory, published by one rename; memory is that of one file.

    Args:
        weights_dir: a training checkpoint or its `weights` (safetensors with checkpoint names, bfloat16 or
            float32, `layer61.json` beside), another export, or the target itself for its released layer.
        target_dir: the target checkpoint.
        out_dir: directory to write; an identical export in place is left as it is.
        layout: see the module's table.
        quantization: `auto` as the target's; `none` bfloat16; `fp8` in blocks of 128 x 128.
        file_bytes: most bytes of one file.
        replace: put it in the place of another or a damaged export in `out_dir`.

    Returns:
        `layer61.json` of the directory (identity, contracts, step, files, rounding errors, servers that load
        it), with `directory` and `reused`.

    Raises:
        InputError: a checkpoint is incomplete, of other sizes, not finite, or `out_dir` holds something else.
        ContractError: the weights were trained for another target.
        ConfigError: the path would mislead vLLM, or layout and quantisation exclude each other.
    """
    planned = prepare(
        weights_dir, target_dir, out_dir, layout=layout, quantization=quantization, file_bytes=file_bytes
    )
    manifest, reused = write_once(
        planned.directory,
        _identity(planned),
        lambda out: _write(planned, out),
        sources=planned.sources,
        replace=replace,
    )
    if reused:
        log("export", f"already done: {planned.directory} is this export, all its bytes are right")
    else:
        servers = " and ".join(manifest["servers"])
        log(
            "export",
            f"wrote {planned.directory}; every value is finite, names, shapes and quantisation are those that"
            f" {servers} load (by their loaders' rules, no server was started)",
        )
    return {**manifest, "directory": str(planned.directory), "reused": reused}


def _write(plan: Plan, directory: Path) -> dict[str, Any]:
    """Fill `directory` and return what its manifest says beside identity and files."""
    errors, weight_map, unchanged, files = _write_tensors(plan, directory)
    log("export", f"{unchanged:,} of {len(plan.entries):,} weights are as released and keep their bits")
    target = plan.target
    total = plan.num_bytes
    for file in plan.links:
        (directory / file).symlink_to((target.directory / file).resolve())
    for name in target.names:
        if target.file(name) in plan.links:
            weight_map[name] = target.file(name)
            total += _num_bytes(target.shape(name), target.dtype(name))
    write_json(
        directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    if plan.config is not None:
        write_json(directory / "config.json", plan.config)
    copy_companions(target.directory, directory)

    problems = check(directory, target.directory)
    servers = [server for server, found in problems.items() if not found]
    for server, found in problems.items():
        if found:
            log("export", f"{server} will not serve this draft: {found[0]}")
    if plan.draft is not None and not plan.draft["mask_position_0"]:
        log("export", "trained with train.mask_position_0 = false, as sglang serves; vLLM will accept less")
    if not servers:
        raise InputError(f"no server would load the export: {json.dumps(problems)}")
    fp8_errors = _summary(errors)
    for kind, e in sorted(fp8_errors.items(), key=lambda item: -item[1]["worst_relative_rms"]):
        log(
            "export",
            f"fp8 {kind}: {e['tensors']} tensors, relative error {e['mean_relative_rms']:.4f}"
            f" (worst {e['worst_relative_rms']:.4f}), largest {e['max_abs']:.3g}",
        )
    manifest = {
        "kind": "nextn",
        "contract": plan.contract,
        "draft": plan.draft,
        "step": plan.step,
        "weights": str(plan.weights.directory),
        "target": str(target.directory),
        "tensors": plan.num_tensors,
        "unchanged": unchanged,
        "bytes": plan.num_bytes,
        "servers": servers,
        "fp8_errors": fp8_errors,
        "files": files,
    }
    card = model_card(manifest, plan.metrics, target.config)
    (directory / "README.md").write_text(card, encoding="utf-8")
    return manifest


def _write_tensors(
    plan: Plan, directory: Path
) -> tuple[dict[str, dict[str, float]], dict[str, str], int, dict[str, Any]]:
    """Write the new files.

    Returns:
        Rounding errors of the newly quantised tensors; file of each name; entries with the released bits;
        sizes and checksums of the files.
    """
    files: dict[str, Any] = {}
    errors: dict[str, dict[str, float]] = {}
    weight_map: dict[str, str] = {}
    unchanged = 0
    with task("export", plan.num_bytes, "bytes") as progress:
        for file, entries in plan.files.items():
            tensors: dict[str, torch.Tensor] = {}
            for entry in entries:
                stored, error, same = _convert(entry, plan)
                unchanged += same
                if error is not None:
                    errors[entry.name] = error
                tensors |= stored
                progress.advance(sum(t.nbytes for t in stored.values()), entry.name)
            files[file] = save(directory / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
        for file, names in plan.kept.items():
            tensors = {name: plan.target.get(name, raw=True) for name in names}
            files[file] = save(directory / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
            progress.advance(sum(t.nbytes for t in tensors.values()), file)
    return errors, weight_map, unchanged, files
