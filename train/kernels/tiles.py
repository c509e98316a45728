"""Tile sizes of the Triton kernels by place and shape class.

`python -m benchmarks.tune` measures on a GPU and rewrites the entries of `sm90` in this file. No kernel is
tuned at run time. The products have tiles for bfloat16 on sm_90 alone; elsewhere `moe` takes another backend.

Shape classes: `short`, at most 512 rows an expert on average, `long`, more.
"""

from typing import NamedTuple

__all__ = ["TABLE", "Tile"]


class Tile(NamedTuple):
    """Sizes of one program's work."""

    m: int
    """Rows of the result."""
    n: int
    """Columns of the result."""
    k: int
    """Step of the contraction."""
    group: int
    """Row tiles that share their column tiles in the L2 cache."""
    warps: int
    stages: int
    part: int = 0
    """Columns that the epilogue of down_bwd works on at a time; more need more registers."""

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments that every kernel over matrices takes."""
        return {
            "BM": self.m,
            "BN": self.n,
            "BK": self.k,
            "GROUP": self.group,
        }


TABLE: dict[tuple[str, str], dict[str, Tile]] = {
    ("interpreter", "any"): {
        "up_fwd": Tile(16, 32, 32, 2, 4, 1),
        "down_fwd": Tile(16, 32, 32, 2, 4, 1),
        "down_bwd": Tile(16, 32, 32, 2, 4, 1, 16),
        "up_bwd": Tile(16, 32, 32, 2, 4, 1),
        "weight_grad": Tile(32, 64, 16, 2, 4, 1),
        "gather_sum": Tile(1, 32, 1, 1, 4, 1),
        "loss_rows": Tile(1, 256, 1, 1, 4, 1),
    },
    ("sm90", "any"): {
        "gather_sum": Tile(1, 1024, 1, 1, 4, 1),
        "loss_rows": Tile(1, 4096, 1, 1, 8, 1),
    },
    ("sm90", "short"): {
        "up_fwd": Tile(128, 128, 64, 8, 8, 4),
        "down_fwd": Tile(128, 256, 64, 8, 8, 4),
        "down_bwd": Tile(128, 256, 64, 8, 8, 4, 16),
        "up_bwd": Tile(128, 256, 64, 8, 8, 4),
        "weight_grad": Tile(128, 128, 64, 8, 4, 3),
    },
    ("sm90", "long"): {
        "up_fwd": Tile(128, 128, 64, 8, 8, 4),
        "down_fwd": Tile(128, 256, 64, 8, 8, 4),
        "down_bwd": Tile(128, 256, 64, 8, 8, 4, 16),
        "up_bwd": Tile(128, 256, 64, 8, 8, 4),
        "weight_grad": Tile(128, 256, 64, 8, 8, 4),
    },
}
