"""The table of times that explain looks up: a part for each instruction set, written without losing the others."""

import json

from benchmarks.speed_table import MEASURED, add, cases, render

HERE = {"cpu": "A", "torch": "2", "date": "2026-11-27T10:00"}
FIGURES = {"linear int8 1x16": {"fxquant": 2.0, "float": 1.0}}


def test_an_instruction_sets_figures_join_those_of_the_same_machine_and_day():
    before = {"avx2": {"machine": {**HERE, "date": "2026-11-27T09:00"}, "rows": {"lstm int8 1x16": {}}}}
    found = add(before, "avx2", HERE, FIGURES)["avx2"]
    assert set(found["rows"]) == {"lstm int8 1x16", "linear int8 1x16"}
    assert found["machine"] == HERE
    assert "FXQUANT_ISA=avx2" in found["command"]


def test_they_replace_those_of_another_machine_or_day_and_leave_other_instruction_sets():
    old = {"machine": {**HERE, "cpu": "B"}, "rows": {"lstm int8 1x16": {}}}
    found = add({"avx2": old, "amx": old}, "avx2", HERE, FIGURES)
    assert list(found) == ["amx", "avx2"]
    assert found["avx2"]["rows"] == FIGURES
    assert found["amx"] == old


def test_the_file_has_a_line_for_each_figure_and_reads_as_it_was_written():
    tables = add({}, "avx2", HERE, FIGURES | {"lstm int8 1x16": {"fxquant": 2.0, "float": 1.0}})
    assert json.loads(render(tables)) == tables
    assert sum('"fxquant"' in line for line in render(tables).splitlines()) == 2


def test_every_measured_operator_has_calls_of_both_sides():
    for name in MEASURED:
        case, calls = next(iter(cases([name])))
        assert case == f"{name} {case.split()[1]} 1x16"
        assert set(calls) == {"fxquant", "float"}
        for call in calls.values():
            call()
