"""The probe: one document whose states every start of an engine must compute as the first start did."""

import io
import zipfile
from pathlib import Path

import numpy as np

from configs.errors import CaptureError, InputError
from configs.files import atomic_write, sha256_json
from pipeline.capture.process import Capture

__all__ = ["check_states", "compare_with_first_start", "row_errors"]

PROBE_TOKENS = 256
# of the rows of two computations of one document: bf16 rounding moves each by less than one in a hundred; a
# token whose router chooses another expert may go anywhere, and takes those that attend to it a little along
PROBE_MEDIAN = 2**-6
PROBE_FAR, PROBE_FAR_SHARE = 0.1, 0.1


def compare_with_first_start(capture: Capture, path: Path, ids: np.ndarray) -> None:
    """Compute one document's states and compare them with those of the first start, kept at `path`.

    Args:
        capture: the engine.
        path: npz file, written where it is missing or was made under another contract.
        ids: uint32 [T], the document; its first PROBE_TOKENS tokens are used.

    Raises:
        CaptureError: they are not the same up to rounding.
        InputError: the file is damaged.
    """
    ids = ids[:PROBE_TOKENS]
    key = sha256_json(
        {k: v for k, v in capture.settings.contract.items() if k != "target"} | {"ids": ids.tolist()}
    )
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
            check_states(now, first, capture.settings.log)
            return
    buffer = io.BytesIO()
    np.savez(buffer, states=now, ids=ids, key=np.array(key))
    atomic_write(path, buffer.getvalue())


def check_states(now: np.ndarray, first: np.ndarray, where: str) -> None:
    """Compare two computations of one document, bf16 bits as uint16 [T, S, D], row by row.

    Raises:
        CaptureError: the shapes differ, or more than rounding and a few router choices do.
    """
    hint = f"the engine or its checkpoint has changed since the first start; see {where}, or use a new run"
    if now.shape != first.shape:
        raise CaptureError(f"the probe document has states {now.shape}, the first start {first.shape}", hint)
    error = row_errors(now, first)
    median, far = float(np.median(error)), float((error > PROBE_FAR).mean())
    if not (median <= PROBE_MEDIAN and far <= PROBE_FAR_SHARE):
        raise CaptureError(
            f"the states of the probe document differ from those of the first start: median relative error"
            f" {median:.3g} (at most {PROBE_MEDIAN:.3g}), {far:.0%} of the tokens above {PROBE_FAR:g}"
            f" (at most {PROBE_FAR_SHARE:.0%})",
            hint,
        )


def row_errors(now: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Relative differences [T] of the states of each token, bf16 bits as uint16 [T, S, D], to `first`."""
    a, b = (_floats(x).reshape(len(x), -1) for x in (now, first))
    return np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-20)


def _floats(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32: they are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
