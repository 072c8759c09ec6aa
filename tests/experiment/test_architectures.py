"""The table of architectures in docs/."""

import pytest
import transformers

from experiment.architectures import ARCHITECTURES, COLUMNS, TABLE, in_its_own_process, page
from models.probe import PROBES


def test_the_table_is_of_these_probes_and_this_version_of_transformers():
    text = TABLE.read_text("utf-8")
    assert f"transformers {transformers.__version__}." in text
    assert set(COLUMNS) == {"build", "seed", *PROBES}
    assert all(f"- **{column}**: {meaning}\n" in text for column, meaning in COLUMNS.items())
    assert f"| build | seed | {' | '.join(PROBES)} |" in text
    assert all(f"| {name} |" in text for name in ARCHITECTURES)
    assert len(ARCHITECTURES) >= 40


def test_an_architecture_that_ends_its_process_is_only_refused(monkeypatch):
    monkeypatch.setattr("experiment.architectures.SECONDS", 0.01)
    assert in_its_own_process("llama") == {"build": "takes over 0.01 s"}


@pytest.mark.slow
def test_the_table_says_what_the_probes_find():
    assert TABLE.read_text("utf-8") == page({n: in_its_own_process(n) for n in ARCHITECTURES})
