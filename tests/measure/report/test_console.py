"""Results in a terminal."""

import json

import pytest

from measure.report.console import print_result
from measure.report.tables import is_current, models_table, more_tables
from tests.helpers import ROOT

FILES = sorted((ROOT / "results").glob("*.json"))
RESULTS = [file for file in FILES if is_current(json.loads(file.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_result_fits_the_terminal_and_loses_no_cell(file, width, monkeypatch, capsys):
    result = json.loads(file.read_text(encoding="utf-8"))
    monkeypatch.setenv("COLUMNS", str(width))
    print_result(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    shown = {cell.strip() for line in lines if line.startswith("|") for cell in line.split("|")}
    for _, _, rows in [models_table(result, interval=True), *more_tables(result)]:
        assert {part for row in rows for cell in row for part in cell.split("; ")} <= shown
