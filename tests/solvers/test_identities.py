"""Solvers that are one under several names; and the page of docs that shows their tables is what the code makes."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from jaxdiff.schedules import make_process
from jaxdiff.solvers import deis, dpm_multistep, make_grid, make_table, unipc

GRIDS = [
    make_grid(make_process("linear"), 9),
    make_grid(make_process("edm"), 9, "karras"),
    make_grid(make_process("flow"), 9, final="sigma_min"),
]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(np.abs(b).max(), 1))


@pytest.mark.parametrize("grid", GRIDS, ids=["linear", "edm", "flow"])
@pytest.mark.parametrize("frame", ["noise", "flow"])
def test_one_method_of_several_names(grid, frame):
    grid = replace(grid, process=grid.process._replace(frame=frame))
    assert_same(make_table("euler", grid), make_table("ddim", grid))
    assert_same(make_table("euler_ancestral", grid), make_table("ddim", grid, eta=1.0))
    assert_same(make_table("ddpm", grid), make_table("ddim", grid, eta=1.0))
    for name in ("dpmpp_2m", "dpm_2m", "dpmpp_2s", "dpm_2s"):
        assert_same(make_table(name, grid, order=1), make_table("ddim", grid))
    assert_same(make_table("unipc", grid, order=1, corrector=False), make_table("ddim", grid))
    assert_same(make_table("deis", grid, order=1), make_table("ddim", grid))
    assert_same(make_table("lms", grid, order=1), make_table("ddim", grid))
    assert_same(unipc(grid, 2, corrector=False), dpm_multistep(grid, 2))
    assert_same(unipc(grid, 3, corrector=False), dpm_multistep(grid, 3))


@pytest.mark.parametrize("grid", GRIDS[:2], ids=["linear", "edm"])
def test_deis_is_dpm_solver_with_exact_integrals(grid):
    assert_same(deis(grid, 2), dpm_multistep(grid, 2, predict="eps", rule="heun"))
    assert_same(deis(grid, 3), dpm_multistep(grid, 3, predict="eps", rule="heun"))


def test_the_page_of_tables_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_tables

    text = make_tables.PAGE.read_text()
    assert make_tables.page(text) == text, "run docs/make_tables.py"
    sys.modules.pop("make_tables")
