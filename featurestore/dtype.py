"""`bfloat16` for zarr-python, shown to numpy as its uint16 bits.

zarr-python has no bfloat16 of its own. The bit form needs no further package, keeps the compiled codec
pipelines usable, preserves NaN payloads and -0.0, and becomes `torch.bfloat16` by a view. zarr 3.1 never
loads data types declared as entry points, so importing this module registers the type.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

__all__ = ["BFloat16Bits"]


@dataclass(frozen=True, kw_only=True)
class BFloat16Bits(ZDType, HasEndianness, HasItemSize):  # type: ignore[type-arg]
    """Zarr data type `bfloat16`; numpy arrays of it hold uint16 bit patterns, and so do its scalars."""

    dtype_cls: ClassVar[Any] = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[Any] = "bfloat16"
    item_size: ClassVar[int] = 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> "BFloat16Bits":
        raise DataTypeValidationError("uint16 stays uint16; name bfloat16 explicitly")

    @classmethod
    def _from_json_v2(cls, data: Any) -> "BFloat16Bits":
        raise DataTypeValidationError("bfloat16 exists in Zarr format 3 only")

    @classmethod
    def _from_json_v3(cls, data: Any) -> "BFloat16Bits":
        if data == "bfloat16":
            return cls()
        raise DataTypeValidationError(f"{data!r} is not bfloat16")

    def to_native_dtype(self) -> Any:
        return np.dtype("<u2" if self.endianness == "little" else ">u2")

    def to_json(self, zarr_format: int) -> Any:
        return "bfloat16"

    def _check_scalar(self, data: Any) -> bool:
        return isinstance(data, int | np.integer)

    def cast_scalar(self, data: Any) -> Any:
        return np.uint16(data)

    def default_scalar(self) -> Any:
        return np.uint16(0)

    def to_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        value = struct.unpack("<f", struct.pack("<I", int(data) << 16))[0]
        return value if math.isfinite(value) else f"0x{int(data):04x}"

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        if isinstance(data, str):
            return np.uint16(int(data, 16))
        return np.uint16(np.float32(data).view(np.uint32) >> 16)


data_type_registry.register("bfloat16", BFloat16Bits)
