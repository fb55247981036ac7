"""The benchmarks' arithmetic, and one small real run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benches import __main__ as benches
from benches import machines, measure, stats

if TYPE_CHECKING:
    from pathlib import Path


def test_ratios_are_such_that_higher_is_better() -> None:
    two, four = (lambda: 2.0), (lambda: 4.0)
    assert measure.compare("r", "1/s", four, two, "limit", 0.9, 3).ratio == 2
    assert measure.compare("d", "s", two, four, "peer", 1.0, 3).ratio == 2


def test_measurements_alternate_and_the_first_pair_does_not_count() -> None:
    order: list[str] = []
    values = {"a": iter([100.0, 1, 2, 9]), "b": iter([100.0, 3, 4, 5])}

    def one(which: str) -> float:
        order.append(which)
        return next(values[which])

    assert measure.alternate(lambda: one("a"), lambda: one("b"), 3) == (2, 4)
    assert "".join(order) == "abababab"


def test_report_is_a_table_and_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCH_JSON", str(tmp_path / "bench.json"))
    measure.report([measure.Result("name", 2.0, "ms", 4.0, "limit", 2.0, 1.0, 5)])
    (line,) = json.loads((tmp_path / "bench.json").read_text())
    assert set(line) == {"name", "value", "unit", "baseline", "baseline_name", "ratio", "goal", "runs"}
    assert "name" in capsys.readouterr().out


def test_what_cannot_be_measured_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> measure.Benchmark:
        raise measure.UnmeasurableError("no QEMU")

    monkeypatch.setattr(benches, "BENCHMARKS", {"x": refuse})
    assert benches.main(["x"]) == 0
    assert benches.main(["y"]) == 2
    assert "x is left out: no QEMU" in capsys.readouterr().err


def test_each_benchmark_is_listed_with_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert benches.main(["--list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == list(benches.BENCHMARKS)
    assert all(what.endswith(".") for _, what in lines)


@pytest.mark.kvm
def test_small_real_run_gives_figures() -> None:
    for result in [
        *machines.pio_exits(10, 1),
        *machines.lives(2, 1),
        *machines.runs_again(2, 1),
        *stats.counted_exits(10, 1),
    ]:
        assert result.value > 0
        assert result.baseline > 0
