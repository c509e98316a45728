"""The feature store, format 1: ragged bf16 hidden states in immutable Zarr v3 parts."""

from featurestore.layout import PartExistsError
from featurestore.loader import Batch, Loader
from featurestore.manifest import collect, drop, merge, publish, rebuild
from featurestore.order import steps_per_epoch
from featurestore.reader import Document, FeatureStore, open_store
from featurestore.writer import StoreWriter, part_exists

__all__ = [
    "Batch",
    "Document",
    "FeatureStore",
    "Loader",
    "PartExistsError",
    "StoreWriter",
    "collect",
    "drop",
    "merge",
    "open_store",
    "part_exists",
    "publish",
    "rebuild",
    "steps_per_epoch",
]
