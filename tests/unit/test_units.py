"""A factor between two units is what UCUM says it is, or there is none."""

from __future__ import annotations

import subprocess
import sys
from math import isclose
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pint.errors import PintError

from worker.units import factor

pytestmark = pytest.mark.requirement("F10")

#: Worked out by hand from https://ucum.org/ucum, tables 1 to 23 (UCUM 2.2).
CONVERTED: Final = [
    ("mg/dL", "g/L", 0.01),
    ("mg/dL", "mg/L", 10.0),
    ("mg/L", "ug/mL", 1.0),
    ("ng/mL", "ug/L", 1.0),
    ("pg/mL", "ng/L", 1.0),
    ("g/dL", "g/L", 10.0),
    ("g%", "g/dL", 1.0),
    ("mg/dl", "mg/dL", 1.0),
    ("g.L-1", "g/L", 1.0),
    ("mmol/L", "umol/L", 1000.0),
    ("mol/m3", "mmol/L", 1.0),
    ("nmol/L", "pmol/mL", 1.0),
    ("10*3/uL", "10*9/L", 1.0),
    ("10*6/uL", "10*12/L", 1.0),
    ("10^9/L", "10*9/L", 1.0),
    ("{cells}/uL", "10*6/L", 1.0),
    ("{cells}/uL", "/uL", 1.0),
    ("10*3{RBC}/uL", "/nL", 1.0),
    ("/100{WBCs}", "%", 1.0),
    ("/mm3", "/uL", 1.0),
    ("%", "1", 0.01),
    ("[ppth]", "%", 0.1),
    ("[ppm]", "mg/kg", 1.0),
    ("L/L", "%", 100.0),
    ("mmol/mol", "%", 0.1),
    ("mg/g", "ug/mg", 1.0),
    ("U/L", "ukat/L", 1 / 60),
    ("U/L", "mU/mL", 1.0),
    ("U/L", "umol/min/L", 1.0),
    ("m[IU]/mL", "[IU]/L", 1.0),
    ("u[iU]/mL", "m[IU]/L", 1.0),
    ("meq/L", "eq/m3", 1.0),
    ("mosm/kg", "osm/t", 1.0),
    ("[CFU]/mL", "10*3.[CFU]/L", 1.0),
    ("mm[Hg]", "kPa", 0.133322),
    ("mm[Hg]", "mbar", 1.33322),
    ("cm[H2O]", "Pa", 98.0665),
    ("bar", "kPa", 100.0),
    ("atm", "Pa", 101325.0),
    ("fL", "um3", 1.0),
    ("mL/min", "L/h", 0.06),
    ("mL/min/{1.73_m2}", "mL/s/{1.73_m2}", 1 / 60),
    ("ng/mL{FEU}", "mg/L{FEU}", 0.001),
    ("{beats}/min", "Hz", 1 / 60),
    ("/min", "/h", 60.0),
    ("h", "min", 60.0),
    ("wk", "d", 7.0),
    ("a", "mo", 12.0),
    ("a", "d", 365.25),
    ("mo", "d", 30.4375),
    ("[in_i]", "cm", 2.54),
    ("[ft_i]", "[in_i]", 12.0),
    ("[lb_av]", "kg", 0.45359237),
    ("[oz_av]", "[lb_av]", 1 / 16),
    ("[stone_av]", "[lb_av]", 14.0),
    ("kg/m2", "g/cm2", 0.1),
    ("[pt_us]", "mL", 473.176473),
    ("[Cal]", "kJ", 4.184),
    ("mg/(24.h)", "mg/d", 1.0),
    ("ug/(8.h){shift}", "ug/(480.min){shift}", 1.0),
    ("µmol/L", "mmol/L", 0.001),
    ("μg/mL", "ug/mL", 1.0),
]

REFUSED: Final = [
    # a scale, not a multiple
    ("Cel", "[degF]"),
    ("Cel", "K"),
    ("[degF]", "K"),
    ("[pH]", "mol/L"),
    ("dB", "1"),
    ("Cel/h", "K/h"),
    # what the substance would have to tell
    ("mol", "g"),
    ("mmol/L", "mg/dL"),
    ("meq/L", "mmol/L"),
    ("mosm/kg", "mmol/kg"),
    ("mol", "10*23"),
    ("/L", "mol/L"),
    # an assay's own units (UCUM §24), a microscope's field
    ("[IU]/L", "U/L"),
    ("[IU]/L", "/L"),
    ("[IU]/mL", "[arb'U]/mL"),
    ("[CFU]/mL", "/mL"),
    ("[IU]", "1"),
    ("/[HPF]", "/[LPF]"),
    ("/[HPF]", "/uL"),
    ("/[HPF]", "1"),
    ("rad", "1"),
    # of another kind
    ("mg/dL", "mg/kg"),
    ("mL/min/{1.73_m2}", "mL/min/1.73.m2"),
    ("mg/24.h", "mg/d"),  # (mg/24)·h: operators go from left to right
    ("mL/min", "mL/min/{1.73_m2}"),
    ("ng/mL{FEU}", "ng/mL{DDU}"),
    ("%{hemoglobin}", "%"),
    # no UCUM, or not surely
    ("MG/DL", "mg/dL"),
    ("mcg/mL", "ug/mL"),
    ("mEq/L", "meq/L"),
    ("IU/L", "[IU]/L"),
    ("mmHg", "mm[Hg]"),
    ("K/uL", "10*3/uL"),
    ("x10E3/uL", "10*3/uL"),
    ("ML", "mL"),  # a megaliter, or the other variant's milliliter
    ("MU/L", "U/L"),
    ("mg / dL", "mg/dL"),
    ("mg/dL)", "mg/dL"),
    ("", "1"),
    ("ｍg/dL", "mg/dL"),
    ("10*0", "1"),
    ("10*99", "1"),
    ("m999999999", "m"),
    ("m" + ".m" * 30, "m31"),
    ("(" * 40 + "m", "m"),
    ("{", "1"),
    ("';DROP TABLE observation;--", "1"),
]
#: Its own definitions of the names that UCUM has too, or another precision; checked one by one against ucum-essence.xml.
READ_OTHERWISE_BY_PINT: Final = {
    *("'", "G", "Gb", "Mx", "Oe", "[Btu]", "[Btu_th]", "[Cal]", "[cft_i]", "[cyd_i]", "[didot]", "[in_br]", "[in_i'H2O]", "[in_i'Hg]"),
    *("[pnt_pr]", "[rd_br]", "a_t", "cal_[15]", "g%", "m[Hg]", "mo_s", "pc", "u"),
}
UNITS: Final = sorted({unit for pair in (*CONVERTED, *REFUSED) for unit in pair[:2]})


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """The tables are read at the first question: 0.4 s, longer than Hypothesis gives one example."""
    factor("mg/dL", "g/L")


@pytest.mark.parametrize(("unit", "wanted", "times"), CONVERTED)
def test_a_clinical_unit_is_converted_as_the_specification_says(unit: str, wanted: str, times: float) -> None:
    assert factor(unit, wanted) == pytest.approx(times, rel=1e-12)


@pytest.mark.parametrize(("unit", "wanted"), REFUSED)
def test_there_is_no_factor_where_none_holds_whatever_was_measured(unit: str, wanted: str) -> None:
    assert factor(unit, wanted) is None
    assert factor(wanted, unit) is None


def test_a_decimal_factor_is_the_decimal_itself_without_noise_of_binary_fractions() -> None:
    assert [factor("mg/dL", "g/L"), factor("g/L", "mg/dL"), factor("ug/dL", "mg/L")] == [0.01, 100.0, 0.01]


@given(st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_back_and_forth_is_one(unit: str, wanted: str) -> None:
    there, back = factor(unit, wanted), factor(wanted, unit)
    assert (there is None) == (back is None)
    if there is not None and back is not None:
        assert there > 0
        assert isclose(there * back, 1.0, rel_tol=1e-14)
    assert factor(unit, unit) == 1.0


def test_by_way_of_a_third_unit_is_the_same() -> None:
    units = sorted({unit for one in CONVERTED for unit in one[:2]})
    found = {(a, b): times for a in units for b in units if (times := factor(a, b)) is not None}
    chained = 0
    for (a, b), first in found.items():
        for c in units:
            if (second := found.get((b, c))) is not None:
                assert isclose(found[a, c], first * second, rel_tol=1e-14), (a, b, c)
                chained += 1
    assert chained > 500


@given(st.text(max_size=60), st.sampled_from(UNITS))
def test_any_text_for_a_unit_is_answered(text: str, wanted: str) -> None:
    times = factor(text, wanted)
    assert times is None or times > 0


@given(st.text(alphabet="mgLdu[]{}()/.*0123456789+-%IUHcells", max_size=48))
def test_text_that_looks_like_a_unit_is_answered_both_ways(text: str) -> None:
    there, back = factor(text, "g/L"), factor("g/L", text)
    assert (there is None) == (back is None)


def test_where_pint_reads_a_unit_as_the_specification_does_both_give_the_same_factor() -> None:
    """A second reader, for units that nobody works out by hand: some of its definitions are known to be others."""
    import ucumvert  # type: ignore[import-untyped]  # no py.typed
    from ucumvert import xml_util

    theirs, differ, compared = ucumvert.PintUcumRegistry(), set(), 0
    for unit in xml_util.get_units_with_full_definition():
        ours = factor(unit.code_cs, unit.defining_unit)
        if ours is None:
            continue
        compared += 1
        try:
            of = theirs.from_ucum(unit.defining_unit)
            is_same = isclose(theirs.from_ucum(unit.code_cs).to(of.units).magnitude / of.magnitude, ours, rel_tol=1e-9)
        except PintError:
            is_same = False
        if not is_same:
            differ.add(unit.code_cs)
    assert compared > 200
    assert differ <= READ_OTHERWISE_BY_PINT


def test_the_units_library_is_not_loaded_until_a_unit_is_converted() -> None:
    """The receiver converts nothing and must not pay 0.4 s for it."""
    code = (
        "import sys, worker.units, worker.inputs; assert not {'pint', 'lark', 'ucumvert'} & set(sys.modules); "
        "sys.exit(worker.units.factor('mg/dL', 'g/L') != 0.01)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
