"""Whether the images and the record may be of one person: birth date, sex and name, where ID and issuer agree already.

::

    PN or XPN ─▶ groups ─▶ family | given ─▶ words without title, particle, case, accent ─▶ by script: no word in common?

A contradiction is told, not a difference. Names are written in many ways, change with marriage, are swapped, cut and left out; so they
contradict only where both are known whole, in one script, and neither a family nor a given name agrees. What the check lets pass
by that (siblings, a spouse) its neighbors must find. Not here: the normalization of patient IDs (record_feeds.py).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from worker.domain import Patient

#: Letters that have no decomposition in Unicode, as they are written without them.
_LETTERS: Final = str.maketrans(
    {"ß": "ss", "ø": "o", "æ": "ae", "œ": "oe", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ħ": "h", "ı": "i", "ə": "a"}
    | {"ى": "ي", "ة": "ه", "ـ": "", "ک": "ك", "ی": "ي"}
    | {chr(code): chr(code + 0x60) for code in range(0x3041, 0x3097)}  # hiragana as katakana
)
#: Müller, Mueller, Muller; Aagaard, Ågård. Both sides are read so: it is no matter that Michael becomes Michal.
_DIGRAPHS: Final = re.compile(r"(?<=[aou])e|(?<=a)a")
#: Not written by some, and never a letter that parts two names.
_APOSTROPHES: Final = re.compile("['`´\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}]")
#: Scripts that write a given name by its first letter.
_WITH_INITIALS: Final = frozenset({"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN"})
#: Scripts that put family and given name together, with nothing between.
_UNSPACED: Final = frozenset({"CJK", "HANGUL", "KATAKANA"})

# Words below are as `_parts` leaves them, particles and placeholders without the digraphs too.
_PARTICLES: Final = frozenset(
    "a af al av bin bint da das de del della den der di do dos du e el i ibn la las le les los of san st t te ten ter thi van vom von y "  # noqa: SIM905  a hundred quotes say no more
    "zu zum zur".split()
)
_TITLES: Final = frozenset(
    "dipl dr dres fr frau herr hr ii iii ing iv jr lic md med mag mevr miss mlle mme mr mrs ms mw phd prof sig sir sr".split()  # noqa: SIM905
)
_PLACEHOLDERS: Final = frozenset(
    "anon anonym anonymised anonymized anonymous anonymus baby babyboy babygirl boy deidentified dummy girl newborn nn noname nobody none "  # noqa: SIM905
    "null patient pseudonym removed test unbekannt unk unknown unnamed".split()
)
_ONLY_X: Final = frozenset("x")
#: What may be looked at, and how one says that several of it differ.
_MANY: Final = {"name": "names", "birth_date": "birth dates", "sex": "sexes"}


def disagreement(images: Patient, record: Patient, *, must_agree: Sequence[str]) -> str:
    """In what the two contradict each other, as a sentence without a word of either; '' if in nothing.

    ``must_agree``: those of "name", "birth_date" and "sex" that are looked at. What either does not say contradicts nothing.
    """
    differ = [_MANY[part] for part in contradictions(images, record, must_agree=must_agree)]
    if not differ:
        return ""
    said = " and ".join(filter(None, (", ".join(differ[:-1]), differ[-1])))
    return f"The {said} of the images and of the patient's record differ."


def contradictions(one: Patient, other: Patient, *, must_agree: Sequence[str]) -> list[str]:
    """Those parts of `must_agree` in which the two contradict each other."""
    differ = {
        "name": lambda: _names_differ(one, other),
        "birth_date": lambda: bool(one.birth_date and other.birth_date and one.birth_date[:8] != other.birth_date[:8]),
        "sex": lambda: {one.sex, other.sex} == {"F", "M"},
    }
    return [part for part in _MANY if part in must_agree and differ[part]()]


def says_the_same(one: Patient, other: Patient, parts: Iterable[str]) -> bool:
    """Whether both say the very same of each of these parts, but for case, accents, titles and order.

    More than not to contradict: Trauma Alpha is not Trauma Bravo, and Unknown Male 17 not Unknown Male 18.
    """
    said = {
        "name": lambda: bool(_spelled(one.name) & _spelled(other.name)),
        "birth_date": lambda: bool(one.birth_date) and one.birth_date[:8] == other.birth_date[:8],
        "sex": lambda: bool(one.sex) and one.sex == other.sex,
    }
    return all(said[part]() for part in parts)


def _spelled(name: str) -> set[frozenset[str]]:
    """Of each group of a name all its words, numbers too."""
    return {frozenset(_parts(group)) - _TITLES for group in name.split("=")} - {frozenset[str]()}


@dataclass(frozen=True, slots=True)
class _Name:
    """One person's name in one script; of an undivided name every word may be of either kind. ``joined`` has no gaps."""

    family: frozenset[str]
    given: frozenset[str]
    joined: frozenset[str]
    is_divided: bool

    @property
    def is_whole(self) -> bool:
        return bool(self.family and self.given)


def _names_differ(images: Patient, record: Patient) -> bool:
    ids = frozenset().union(*(_identifiers(one.key.patient_id) for one in (images, record)))
    ours, theirs = _by_script(images.name, ids), _by_script(record.name, ids)
    pairs = [(script, one, other) for script in ours.keys() & theirs.keys() for one in ours[script] for other in theirs[script]]
    if any(_agree(one, other, script) for script, one, other in pairs):
        return False
    return any(one.is_whole and other.is_whole for _, one, other in pairs)


def _agree(one: _Name, other: _Name, script: str) -> bool:
    """Whether any part of the names is the same, the family name of one as the given name of the other too."""
    if one.family & other.family or one.joined & other.joined:
        return True
    shared = (one.family | one.given) & (other.family | other.given)
    if script not in _WITH_INITIALS:
        return bool(shared) or (script in _UNSPACED and (_begins(one, other) or _begins(other, one)))
    if any(len(word) > 1 for word in shared):
        return True
    return any(a.startswith(b) or b.startswith(a) for a in one.given for b in other.given if 1 in (len(a), len(b)))


def _begins(one: _Name, other: _Name) -> bool:
    """Whether an undivided name begins with the other's family name, or, both being undivided, with the same character."""
    if one.is_divided:
        return False
    starts = other.family if other.is_divided else {word[0] for word in other.joined}
    return any(word.startswith(start) for word in one.joined for start in starts)


def _by_script(name: str, ids: Collection[str]) -> dict[str, list[_Name]]:
    """The names of a PN's groups (PS3.5 §6.2.1: alphabetic, ideographic, phonetic) by the script they turn out to be in."""
    found: dict[str, list[_Name]] = {}
    for group in name.split("="):
        if "".join(_parts(group)) in ids:
            continue
        family, *rest = [_words(part, ids) for part in group.split("^")[:3]]
        given = [word for words in rest for word in words]
        for script in dict.fromkeys(_script(word) for word in (*family, *given)):
            found.setdefault(script, []).append(_name(_of(script, family), _of(script, given), script))
    return found


def _name(family: list[str], given: list[str], script: str) -> _Name:
    gapless = ("".join(words) for words in (family, given, (*family, *given), (*given, *family)))
    joined = frozenset(word for word in gapless if len(word) > 1)
    # One word alone is a family name, and the given one not known; but not where nobody puts a gap between them.
    if not given and (len(_bare(family)) > 1 or (script in _UNSPACED and len(family[0]) > 1)):
        words = frozenset(_bare(family))
        return _Name(words, words, joined, is_divided=False)
    return _Name(frozenset(_bare(family)), frozenset(_bare(given)), joined, is_divided=bool(given))


def _bare(words: Sequence[str]) -> list[str]:
    """Without particles, if a name is left: there are people who are called Van or Do."""
    return [word for word in words if word not in _PARTICLES] or list(words)


def _of(script: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if _script(word) == script]


def _script(word: str) -> str:
    return unicodedata.name(word[0], "").partition(" ")[0].replace("HIRAGANA", "KATAKANA")


def _words(text: str, ids: Collection[str] = ()) -> list[str]:
    """The words of a name that say something of it, folded: no titles, placeholders, numbers or identifiers."""
    parts = [part for part in _parts(text) if part not in _TITLES]
    if "".join(parts) in ids:
        return []
    # A system that numbers its namesakes writes Miller2; 024E7871 is no name.
    found = (re.fullmatch(r"\d{0,2}(\D{3,})\d{0,2}|(\D+)", part) for part in parts if part not in ids)
    words = (_DIGRAPHS.sub("", one[1] or one[2]) for one in found if one)
    return [word for word in words if word not in _PLACEHOLDERS and not {*word} <= _ONLY_X]


def _identifiers(patient_id: str) -> frozenset[str]:
    """A patient ID as a name may hold it: whole, or its parts that are numbers."""
    parts = _parts(patient_id)
    return frozenset({"".join(parts), *(part for part in parts if any(map(str.isdigit, part)))})


def _parts(text: str) -> list[str]:
    """Runs of letters and digits, without case, accents, width and the letters that some keyboards lack."""
    text = unicodedata.normalize("NFKD", _APOSTROPHES.sub("", text)).casefold()
    bare = "".join(letter for letter in text if not unicodedata.category(letter).startswith("M")).translate(_LETTERS)
    # Korean syllables come apart like accents do, and one is one letter of a name.
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", bare))
