"""Stored outputs are read from their own folder, for their own rows, undamaged."""

import shutil

import numpy as np
import pytest

from tasks.pronounce import Pronounce
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
    from configs.schema import LabError
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
