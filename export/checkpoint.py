"""Reading a safetensors checkpoint directory: names, shapes and dtypes from headers, one tensor at a time."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import InputError
from configs.files import read_json
from configs.target import require_directory, target_config
from export import fp8

__all__ = ["INDEX", "Checkpoint", "mtp_prefix"]

INDEX = "model.safetensors.index.json"
SCALE = "weight_scale_inv"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def mtp_prefix(config: Mapping[str, Any]) -> str:
    """Name prefix of the MTP layer, which follows the backbone's layers: `model.layers.61.` for V3.2."""
    return f"model.layers.{config['num_hidden_layers']}."


class Checkpoint:
    """A directory of safetensors files, with `model.safetensors.index.json` or without.

    Nothing is read but headers until a tensor is asked for; files are mapped, not loaded.

    Args:
        directory: the checkpoint.
        config: the model configuration of a directory that has no `config.json` of its own.

    Attributes:
        directory: where it lies, absolute.
        config: `config.json` as a dict.
        names: every tensor name, in the order of the files.

    Raises:
        InputError: the directory, its `config.json` or a file its index names is missing or unreadable.
    """

    def __init__(self, directory: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.directory = require_directory(Path(directory).absolute())
        self.config: dict[str, Any] = target_config(self.directory) if config is None else dict(config)
        self._file_of = self._locate()
        self.names: tuple[str, ...] = tuple(self._file_of)
        self._handle = functools.cache(self._open)

    def _locate(self) -> dict[str, str]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                weight_map = dict(read_json(index)["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index} is not an index of safetensors files: {error!r}") from None
            if not weight_map:
                raise InputError(f"{index} names no tensors")
            missing = sorted(f for f in set(weight_map.values()) if not (self.directory / f).is_file())
            if missing:
                raise InputError(
                    f"{index} names files that are missing, {len(missing)}: {', '.join(missing[:3])}",
                    "the copy or download is incomplete; fetch these files again",
                )
            return weight_map
        files = sorted(p.name for p in self.directory.glob("*.safetensors"))
        if not files:
            raise InputError(f"{self.directory} is not a checkpoint: it holds no *.safetensors file")
        file_of: dict[str, str] = {}
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 - a handle is no mapping
                if name in file_of:
                    raise InputError(f"{self.directory} has {name} in {file_of[name]} and in {file}")
                file_of[name] = file
        return file_of

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.directory / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.directory / file} is not a complete safetensors file: {error}",
                "the copy or download is incomplete; fetch this file again",
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def _find(self, name: str) -> Any:
        if name not in self._file_of:
            raise InputError(f"checkpoint {self.directory} has no tensor {name}")
        return self._handle(self._file_of[name])

    def _header(self, name: str) -> Any:
        try:
            return self._find(name).get_slice(name)
        except SafetensorError:
            raise InputError(
                f"{self.directory / self._file_of[name]} has no tensor {name}, though the index says so"
            ) from None

    def file(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        self._find(name)
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._header(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the file's header."""
        return DTYPES[self._header(name).get_dtype()]

    def scale_name(self, name: str) -> str | None:
        """Name of the block scales of a quantised weight; None for a tensor stored as it is."""
        if not name.endswith(".weight"):
            return None
        scale = f"{name.removesuffix('weight')}{SCALE}"
        return scale if scale in self._file_of else None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config`, or None for a checkpoint that is not quantised."""
        return self.config.get("quantization_config")

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a quantisation block."""
        rows, columns = (self.quantization or {}).get("weight_block_size") or fp8.BLOCK
        return rows, columns

    def get(self, name: str, *, dtype: torch.dtype | None = None, raw: bool = False) -> torch.Tensor:
        """Read one tensor.

        Args:
            name: name in the checkpoint.
            dtype: dtype to return; by default the stored one, float32 for a quantised weight.
            raw: return the stored bits: float8 without its scales.

        Raises:
            InputError: there is no such tensor.
        """
        self._header(name)  # one clear error where index and file differ
        tensor = self._find(name).get_tensor(name)
        scale = None if raw else self.scale_name(name)
        if scale is not None:
            tensor = fp8.dequantize(tensor, self.get(scale), block=self.block)
        return tensor if dtype is None else tensor.to(dtype)

    def mtp_names(self) -> tuple[str, ...]:
        """Names of the MTP layer's tensors, scales, embedding and head copies included.

        Raises:
            InputError: the checkpoint has no MTP layer.
        """
        layers = self.config.get("num_hidden_layers")
        if not isinstance(layers, int):
            raise InputError(f"{self.directory}/config.json has no num_hidden_layers")
        prefix = mtp_prefix(self.config)
        names = tuple(name for name in self.names if name.startswith(prefix))
        if f"{prefix}eh_proj.weight" not in names and "model.layers.0.eh_proj.weight" in self:
            raise InputError(
                f"{self.directory} has its layer as model.layers.0, as an export of layout sglang-legacy",
                "name an export of layout nextn, or the checkpoint that it was made from",
            )
        if f"{prefix}eh_proj.weight" not in names:
            raise InputError(
                f"{self.directory} has no MTP layer: no tensor {prefix}eh_proj.weight after"
                f" {layers} backbone layers",
                "use a checkpoint that kept its multi-token-prediction layer; conversions often drop it",
            )
        return names
