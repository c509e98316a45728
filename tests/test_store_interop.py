"""Other readers open a store unchanged and see the same bits."""

import numpy as np
import pytest
import torch
import zarr

from featurestore import open_store, publish
from featurestore.dtype import BFloat16Bits
from tests.documents import make, write

MADE = [make(uid, length, 2, 48) for uid, length in enumerate([1, 70, 200, 64])]
HIDDEN = torch.cat([d.hidden for d in MADE]).view(torch.uint16).numpy()
IDS = torch.cat([d.input_ids for d in MADE]).numpy()
MASK = torch.cat([d.loss_mask for d in MADE]).numpy()


@pytest.fixture(params=["none", "zstd"])
def part(request, tmp_path):
    write(tmp_path, MADE, part="p", compression=request.param)
    publish(tmp_path)
    return tmp_path / "parts/p"


def test_zarr_python_reads_a_part(part) -> None:
    group = zarr.open_group(part, mode="r")
    assert isinstance(group["hidden"].metadata.dtype, BFloat16Bits)
    assert np.array_equal(group["hidden"][:], HIDDEN)
    assert np.array_equal(group["hidden"][60:75, 1], HIDDEN[60:75, 1])
    assert np.array_equal(group["input_ids"][:], IDS)
    assert np.array_equal(group["loss_mask"][:], MASK)
    assert group["sample_uid"][:].tolist() == [d.uid for d in MADE]
    assert len(group["sample_crc32c"][:]) == len(MADE) + 1
    assert group["sample_offset"][:].tolist() == [0, 1, 71, 271, 335]
    assert group.metadata.consolidated_metadata is not None


def test_zarr_python_reads_the_index(part) -> None:
    store = open_store(part.parent.parent)
    index = zarr.open_group(part.parent.parent / store.manifest["index"]["path"], mode="r")
    assert index["uid"][:].tolist() == store.uid.tolist()
    assert index["length"][:].tolist() == store.length.tolist()
    root = zarr.open_group(part.parent.parent, mode="r")
    assert root.attrs["hidden_store"]["schema"] == 1


def test_zarrs_reads_strictly(part) -> None:
    settings = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(settings):
        group = zarr.open_group(part, mode="r")
        assert "Zarrs" in type(group["hidden"].async_array.codec_pipeline).__name__
        assert np.array_equal(group["hidden"][:], HIDDEN)
        assert np.array_equal(group["hidden"][63:65], HIDDEN[63:65])
        assert np.array_equal(group["input_ids"][:], IDS)


def test_tensorstore_reads_bfloat16(part) -> None:
    import tensorstore

    for name, expected in (("hidden", HIDDEN), ("input_ids", IDS), ("loss_mask", MASK)):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(part / name)}}
        array = tensorstore.open(spec, open=True).result()
        values = array.read().result()
        if name == "hidden":
            assert array.dtype.name == "bfloat16"
            values = values.view(np.uint16)
        assert np.array_equal(values, expected)


def test_xarray_opens_a_part(part) -> None:
    import xarray

    data = xarray.open_zarr(part, consolidated=True)
    assert data["hidden"].dims == ("token", "state", "channel")
    assert np.array_equal(data["hidden"].values, HIDDEN)
    assert np.array_equal(data["input_ids"].values, IDS)


def test_zarr_python_writes_the_type_we_read(tmp_path) -> None:
    import tensorstore

    bits = np.array([0, 0x8000, 0x7FC1, 0xFF80, 0x3F80], np.uint16)
    array = zarr.create_array(
        tmp_path,
        shape=(5,),
        chunks=(2,),
        dtype=BFloat16Bits(),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = bits
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path)}}
    assert np.array_equal(tensorstore.open(spec).result().read().result().view(np.uint16), bits)
    again = zarr.open_array(tmp_path, mode="r")
    assert np.array_equal(again[:], bits)
    dtype = BFloat16Bits()
    for scalar in bits:
        text = dtype.to_json_scalar(scalar, zarr_format=3)
        assert dtype.from_json_scalar(text, zarr_format=3) == scalar
