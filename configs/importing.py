"""How large libraries are imported."""

import contextlib
import gc
import sys
from collections.abc import Iterator

__all__ = ["importing"]


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keep the collector of garbage from looking through what is imported inside, now and later.

    It would find next to nothing, and take two fifths of the time in which a rank starts.
    """
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        # not for imports that were done already: what else is there may become garbage
        if len(sys.modules) > before:
            gc.freeze()
        if enabled:
            gc.enable()
