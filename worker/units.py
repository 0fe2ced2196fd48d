"""How many of one unit another is: UCUM read with the specification's own tables, in exact fractions.

::

    factor("mg/dL", "g/L") = 0.01        factor("U/L", "[IU]/L") = None        factor("Cel", "[degF]") = None

A factor is given only where it holds for whatever was measured. None is the answer for units of different kinds, for scales with an
offset or a logarithm (Cel, [pH], dB), for what is no UCUM ("mcg/mL", "MG/DL": nothing is guessed), and, stricter than UCUM, between
amounts that only a look at the substance could compare: moles, equivalents, osmoles and counts; every arbitrary unit (UCUM §24) and
every microscope's field is a kind of its own. Annotations have no meaning to UCUM, but a D-dimer in FEU is twice one in DDU: they
must be the same, but for those that name what the code names anyway (`_COUNTED`).

Grammar and tables (ucum-essence.xml, UCUM 2.2) come with ucumvert (MIT), loaded at the first question. Its bridge to pint is not
used: measured on every unit of the tables, 24 of 259 differ from the specification ([Cal] by 1000, [Btu], m[Hg]), every arbitrary unit
is 1, an equivalent is a mole, and fractions are floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lark import Lark, Token, Tree

#: The parser's time grows with the cube of the length, and units come from messages. The longest of UCUM's examples has 20 characters.
_MAX_CHARACTERS: Final = 48
#: No unit of any practice has a greater one; ten to the power of millions would stop us.
_MAX_EXPONENT: Final = 30
#: Numbers to UCUM; any other unit without a dimension is a kind of its own: an angle's, a field's, somebody's assay's.
_NUMBERS: Final = frozenset({"10*", "10^", "[pi]"})
#: Defined as moles or 6·10²³, which is so for one substance only.
_AMOUNTS: Final = frozenset({"mol", "eq", "osm"})
#: Annotations that say what the code of the result says anyway.
_COUNTED: Final = frozenset(
    {"#", "beat", "breath", "cell", "copy", "copies", "count", "event", "inr", "number", "platelet", "ratio", "rbc", "score", "wbc"}
)
_NOT_LETTERS_OF_CASE: Final = re.compile(r"\{[^}]*\}|\[[^\]]*\]")
_ANNOTATION: Final = re.compile(r"\{[^}]*\}")
#: MICRO SIGN and GREEK SMALL LETTER MU; to UCUM it is u.
_MICRO: Final = str.maketrans({"\N{MICRO SIGN}": "u", "\N{GREEK SMALL LETTER MU}": "u"})


class _Refused(Exception):
    """The unit has no factor."""


@dataclass(frozen=True, slots=True)
class _Measure:
    """A unit as `size` times powers of units that nothing else is compared with."""

    size: Fraction
    powers: frozenset[tuple[str, int]] = frozenset()
    notes: frozenset[str] = frozenset()

    def times(self, other: _Measure, sign: int = 1) -> _Measure:
        powers = dict(self.powers)
        for kind, power in other.powers:
            powers[kind] = powers.get(kind, 0) + sign * power
        return _Measure(self.size * other.size**sign, frozenset((k, p) for k, p in powers.items() if p), self.notes | other.notes)

    def to_the(self, exponent: int) -> _Measure:
        if abs(exponent) > _MAX_EXPONENT:
            raise _Refused
        return _Measure(self.size**exponent, frozenset((kind, power * exponent) for kind, power in self.powers), self.notes)


@lru_cache(maxsize=4096)
def factor(unit: str, wanted: str) -> float | None:
    """By what a number in `unit` is multiplied to be in `wanted` (both UCUM, case-sensitive); None if nothing positive and exact is.

    The same text is the same unit, whatever it means: 1.
    """
    unit, wanted = unit.strip().translate(_MICRO), wanted.strip().translate(_MICRO)
    if unit == wanted:
        return 1.0
    try:
        have, want = _measure(unit), _measure(wanted)
        if (have.powers, have.notes) != (want.powers, want.notes):
            return None
        return float(have.size / want.size) or None
    except (_Refused, OverflowError):
        return None


def readable(unit: str) -> str:
    """`unit` as an error may repeat it: a unit of UCUM without the words of its annotations, else nothing of what a sender wrote."""
    try:
        _measure(unit.strip().translate(_MICRO))
    except _Refused:
        return "a unit that is not UCUM" if unit.strip() else "no unit"
    return _ANNOTATION.sub("{}", unit.strip())


@dataclass(frozen=True, slots=True)
class _Tables:
    """`atoms` by code: number and the unit it is of; no special units, which have no number."""

    prefixes: Mapping[str, Fraction]
    base: frozenset[str]
    atoms: Mapping[str, tuple[Fraction, str]]


@cache
def _tables() -> _Tables:
    from ucumvert import xml_util  # type: ignore[import-untyped]  # no py.typed

    prefixes = {
        one.attrib["Code"]: Fraction(value.attrib["value"])
        for one in xml_util.root.findall(".//{*}prefix")
        for value in one.findall("{*}value")
    }
    atoms = {
        one.code_cs: (Fraction(str(one.conversion_factor)), one.defining_unit)
        for one in xml_util.get_units_with_full_definition()
        if not one.is_special
    }
    return _Tables(prefixes, frozenset(xml_util.get_base_units()), atoms)


@cache
def _parser() -> Lark:
    from ucumvert.parser import get_ucum_parser  # type: ignore[import-untyped]  # no py.typed

    parser: Lark = get_ucum_parser()
    return parser


@lru_cache(maxsize=4096)
def _measure(unit: str) -> _Measure:
    from lark.exceptions import LarkError

    if len(unit) > _MAX_CHARACTERS or not unit.isascii():
        raise _Refused
    # Without its brackets: "ML" is a megaliter, or a milliliter of UCUM's other variant, which has no small letters.
    has_case = (bare := _NOT_LETTERS_OF_CASE.sub("", unit)) != bare.upper()
    try:
        tree = _parser().parse(unit)
    except LarkError:
        raise _Refused from None
    return _of(tree, has_case=has_case)


def _of(node: Tree[Token] | Token, *, has_case: bool) -> _Measure:
    """What a rule of the grammar, or an annotation, stands for."""
    if isinstance(node, str):
        note = node.strip("{}").casefold()
        return _Measure(Fraction(1), notes=frozenset() if {note, note.removesuffix("s")} & _COUNTED else frozenset({note}))
    parts = node.children
    if node.data == "simple_unit":
        *prefix, atom = map(str, parts)
        if prefix and not has_case:
            raise _Refused
        return _Measure(_tables().prefixes[prefix[0]]).times(_atom(atom)) if prefix else _atom(atom)
    if node.data == "annotatable":
        return _of(parts[0], has_case=has_case).to_the(int(str(parts[1])))
    product, sign = _Measure(Fraction(1)), 1
    for part in parts:
        if part in ("/", "."):
            sign = -1 if part == "/" else 1
        else:
            product = product.times(_of(part, has_case=has_case), sign)
    return product


@cache
def _atom(code: str) -> _Measure:
    """A unit without a prefix, or a whole number."""
    if code.isdigit():
        return _Measure(Fraction(int(code)))
    tables = _tables()
    if code in tables.base or code in _AMOUNTS:
        return _Measure(Fraction(1), frozenset({(code, 1)}))
    if code not in tables.atoms:
        raise _Refused
    size, of = tables.atoms[code]
    if of == "1" and code not in _NUMBERS:
        # [LPF] is 100, [HPF] 1: of nothing that the other is of.
        return _Measure(Fraction(1), frozenset({(code, 1)}))
    return _Measure(size).times(_measure(of))
