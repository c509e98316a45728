"""The feature store, format 1: ragged bf16 hidden states in immutable Zarr v3 parts."""

from featurestore.check import Problem, Report, render_report, verify
from featurestore.loader import Batch, Loader
from featurestore.manifest import collect, drop, held_documents, merge, publish, rebuild
from featurestore.order import steps_per_epoch
from featurestore.reader import Document, FeatureStore, open_store
from featurestore.summary import info, render_info, render_show, show
from featurestore.writer import StoreWriter, part_exists

__all__ = [
    "Batch",
    "Document",
    "FeatureStore",
    "Loader",
    "Problem",
    "Report",
    "StoreWriter",
    "collect",
    "drop",
    "held_documents",
    "info",
    "merge",
    "open_store",
    "part_exists",
    "publish",
    "rebuild",
    "render_info",
    "render_report",
    "render_show",
    "show",
    "steps_per_epoch",
    "verify",
]
