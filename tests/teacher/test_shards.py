"""Stored outputs are read from their own folder, for their own rows, undamaged."""

import shutil

import numpy as np
import pyarrow as pa
import pytest

from configs.schema import LabError
from tasks.pronounce import Pronounce
from teacher.shards import read_shard
from tests.helpers import edited, train_tiny


def test_a_damaged_shard_stops_the_training_that_needs_it(copy, capsys):
    with edited(copy / "manifest.json") as manifest:
        del manifest["stages"]["students/distilled/seed-0"]
    shard = next((copy / "outputs" / "data-logits").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert train_tiny(copy.parent) == 2
    assert "is damaged; move" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../stolen.arrow", "/etc/passwd", "link.arrow"])
def test_outputs_never_leave_their_folder(name, copy, tmp_path):
    from teacher.shards import Outputs

    folder = copy / "outputs" / "data-logits"
    with edited(folder / "provenance.json") as provenance:
        (shard, digest), *_ = provenance["shards"].items()
        shutil.copy(folder / shard, folder.parent / "stolen.arrow")
        (folder / "link.arrow").symlink_to(folder.parent / "stolen.arrow")
        provenance["shards"] = {name: digest}
    with pytest.raises(LabError, match="is not a file of this folder"):
        Outputs(folder)


def test_a_batch_of_other_rows_never_gets_these_outputs(tiny_run):
    from models.rows import collate
    from teacher.shards import Outputs

    outputs = Outputs(tiny_run / "outputs" / "data-logits")
    other = Pronounce(limit=300).rows("train")
    with pytest.raises(ValueError, match="not built from the rows"):
        outputs.signal(collate(other, np.arange(5), 0))
    shuffled = outputs.shuffled(0)
    assert np.array_equal(outputs.source, np.arange(len(outputs.rows)))  # unchanged
    assert not np.array_equal(shuffled.source, outputs.source[: len(shuffled.rows)])


@pytest.mark.parametrize("what", ["whole", "in two chunks", "with a null", "with short lists"])
def test_a_shard_is_one_chunk_of_large_lists_without_nulls(what, tmp_path):
    """Only the first chunk would be read, and a null as if it were a number."""
    lists = pa.list_(pa.uint8()) if what == "with short lists" else pa.large_list(pa.uint8())
    table = pa.table({
        "id": pa.array([1, None if what == "with a null" else 2], pa.int64()),
        "prompt_length": pa.array([1, 1], pa.int32()),
        "tokens": pa.array([[1, 2], [1, 2, 3]], lists),
        "log_probs": pa.array([[0.0], [0.0]], pa.large_list(pa.float16())),
    })  # fmt: skip
    file = tmp_path / "shard"
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1 if what == "in two chunks" else None)
    if what == "whole":
        assert len(read_shard(file, ["tokens", "log_probs"])) == 2
    else:
        with pytest.raises(LabError, match="is not a shard of outputs"):
            read_shard(file, ["tokens", "log_probs"])
