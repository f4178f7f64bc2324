"""What `--dry-run` says before a fit."""

import numpy as np
import pytest

import rotsparse as rs
from rotsparse.fit.default_method import default_method
from rotsparse.runs.estimate import Phase, estimated, in_words, phases, product_rate, table


def block(d, hidden):
    return rs.MLP(np.ones((hidden, d), np.float32), None, np.ones((d, hidden), np.float32), None, activation="gelu")


def test_the_work_of_the_steps_is_that_of_the_formula():
    method = rs.Then(rs.Anneal(steps=100, batch_size=4), rs.Each(rs.Anneal(steps=30, batch_size=None)))
    found = phases(block(10, 20), 50, 7, method, restarts=3, control=False)
    examples, staying = 2 * 10 * 10 * (20 + 10 + 10), 2 * 10 * 10**3
    assert found[0] == Phase("Anneal, 100 steps of 4", 3 * 100 * (4 * examples + staying), found[0].reach)
    assert found[2] == Phase("Anneal, 30 steps of 50", 3 * 30 * (50 * examples + staying), found[2].reach)
    assert found[-1].name == "comparison, 15 bases on 7 examples"


def test_every_stage_is_planned():
    names = [name for name, *_ in default_method().planned]
    assert names == ["Anneal", "Anneal from hints"]
    assert rs.BestOf(rs.Anneal(steps=3), rs.WithMeasure(rs.L4(), rs.Riemannian(steps=5))).planned == [
        ("Anneal", 3, 16),
        ("Riemannian", 5, None),
    ]


def test_a_control_and_restarts_are_counted():
    layer, x = block(12, 20), np.zeros((30, 12), np.float32)
    of = lambda control, **fit: sum(p.flops for p in estimated(layer, x, x, fit, control=control)[0])  # noqa: E731
    assert of(True) > of(False) > 0
    assert of(False, restarts=2) > 1.5 * of(False)


@pytest.mark.parametrize(("d", "steps", "examples"), [(64, 4000, 16), (768, 1014, 8), (2048, 500, 8)])
def test_wide_layers_take_fewer_steps_by_default(d, steps, examples):
    w = np.broadcast_to(np.float32(1), (4 * d, d))  # takes no memory
    layer = rs.MLP(w, None, w.T, None, activation="gelu")
    assert default_method(layer).planned[0] == ("Anneal", steps, examples)
    assert default_method(layer, steps=70).planned[0] == ("Anneal", 70, 16)


def test_the_table_adds_up_the_times():
    found = [Phase("one", 2e12, 0.5), Phase("two", 1e12, 1.0)]
    shown = table(found, 1e12, 2.5e9)
    assert shown.title == "about 2.5 GB of memory; products run at 1000 GFLOP/s here"
    assert list(shown.columns[2].cells) == ["4 s", "1 s", "5 s"]


def test_durations_are_in_the_unit_that_people_use():
    assert [in_words(s) for s in (0.123, 89, 91, 5399, 7200)] == ["0.12 s", "89 s", "1.5 min", "90 min", "2 h"]


def test_the_rate_of_this_machine_is_measured():
    assert product_rate(64) > 1e6
