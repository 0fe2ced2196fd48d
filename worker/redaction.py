"""Free text without names, numbers and dates, before it is printed, logged or cached.

::

    text ─▶ links ─▶ titles with their names ─▶ the patient's own names ─▶ dates, times, telephone numbers, numbers ─┐
      ▲                                                                                              changed: again ─┘

This lowers what a glance at a screen or a stolen cache tells. It is no de-identification (PS3.15 Annex E, HIPAA §164.514), and does
not claim to be: what stays is, among others,

* names of others without a title before them, one-letter initials, nicknames, a name broken by a hyphen at a line's end,
* places, professions, rare diagnoses, ages up to 99, months without a day or year, times told in words,
* numbers of one or two digits, and any number before a unit of measure ("120 mg/dL"), even where it is none,
* identifiers in which no three digits follow each other.

More goes than must: a word that holds one of the patient's names ("Stein" in "Gallenstein"), German nouns after "Frau Huber",
values of three digits without a unit. Each pass is linear in the text: no rule can look back over what another has read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

_PLACEHOLDER: Final = r"\[(?:name|date|time|number|link|withheld)\]"
#: Characters that are not seen but part a word (Unicode category Cf): "Hu\u00adber" reads "Huber".
_UNSEEN: Final = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
#: Letters of any script with the marks that belong to them; `\w` would end an Indic word at its first vowel sign.
_LETTER: Final = (
    r"[A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u1fff\u2c00-\u2dff\u3005-\u3007\u3040-\uff0f\uff21-\U0010ffff]"
)
_WORD: Final = re.compile(rf"{_PLACEHOLDER}|{_LETTER}++")
#: Scripts written without spaces: a name is sought inside the line, not as a word.
_UNSPACED: Final = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
#: A name this long counts inside longer words too; a shorter one would empty a text ("Ott" in "Notting").
_LONG: Final = 4
#: A text that people wrote settles in three.
_PASSES: Final = 8

_LINK: Final = re.compile(r"(?i:\b(?:https?|ftp|file|mailto|tel)://?\S++|\bmailto:\S++|\bwww\.\S++)|(?<![\w.+%-])[\w.+%-]++@[\w.-]++")

# Of a possessive group no turn may fail where it has matched a repeat: Python before 3.11.5 (Debian 12 has 3.11.2) goes on from there, as
# if it had not (github.com/python/cpython issue 106052). So each turn asks first, or has no repeat in it.
_CAPITALIZED: Final = r"(?:[A-ZÀ-ÖØ-ÞĀ-ſΑ-ΩЀ-Я][^\W\d_]*+(?:(?=['’.-][^\W\d_])['’.-][^\W\d_]++)*+\.?)"
_PARTICLE: Final = r"(?:(?:von|vom|van|de|der|den|del|della|di|da|dos|la|le|el|al|bin|ibn|zu|zur|ten|ter)(?=\s)\s{1,3})"
_TITLED: Final = re.compile(
    r"(?<![^\W_])((?:(?:Dr|DR|dr|Drs|Prof|PROF|prof|Professor|Doctor|Doktor|Mr|Mrs|Ms|Mx|Miss|Herrn|Herr|HERR|Frau|FRAU|Fräulein|Nurse"
    r"|Schwester|Pfleger|Sir|Madame|Mme|Monsieur|(?:Hr|Fr|Dipl|med|rer|nat|phil|h\.c|h\. c)(?=\.))\b\.?\s{0,3}){1,6}+)"
    rf"{_PARTICLE}{{0,3}}+{_CAPITALIZED}(?:\s{{1,3}}{_PARTICLE}{{0,3}}+{_CAPITALIZED}){{0,2}}"
)

_MONTH: Final = (
    r"(?i:jan(?:uary|uar)?|jän(?:ner)?|feb(?:ruary|ruar|er)?|mar(?:ch)?|märz?|mrz|apr(?:il)?|may|mai|jun[ei]?|jul[yi]?|aug(?:ust)?"
    r"|sept?(?:ember)?|o[ck]t(?:ober)?|nov(?:ember)?|de[cz](?:ember)?)(?![^\W\d_])\.?"
)
_CLOCK: Final = r"(?:[01]?\d|2[0-3])(?:[:.][0-5]\d)(?::[0-5]\d(?:[.,]\d{1,9}+)?)?"
_DATE: Final = (
    # 2020-01-31, with a time and zone behind it
    rf"\d{{4}}\s?[-./‐-–]\s?\d{{1,2}}\s?[-./‐-–]\s?\d{{1,2}}(?:[T ]{_CLOCK})?(?:\s?Z|\s?[+-]\d{{2}}:?\d{{2}})?(?!\d)"
    # 31.01.2020, 01/31/20, 31. 1. 2020
    r"|\d{1,2}\s?[-./‐-–]\s?\d{1,2}\s?[-./‐-–]\s?(?:\d{4}|\d{2})(?!\d)"
    # 31.01., of this year; "38.5." is a temperature at a sentence's end
    r"|(?:0?[1-9]|[12]\d|3[01])\.\s?(?:0[1-9]|1[0-2])\.(?!\d)"
    # 31 Jan 2020, 31st of January, 31. Januar
    rf"|\d{{1,2}}(?:st|nd|rd|th|\.)?\s?(?:of\s)?-?{_MONTH}(?:[\s,-]{{0,2}}'?(?:\d{{4}}|\d{{2}})(?![\d.,]*\d))?"
    # 01/2020
    r"|(?:0?[1-9]|1[0-2])\s?[/.-]\s?(?:19|20)\d{2}(?!\d)"
)
#: January 31, 2020; January 2020; it begins with a letter, all others with a digit.
_SPELLED: Final = rf"(?<![^\W_]){_MONTH}[\s-]{{0,2}}(?:\d{{1,2}}(?:st|nd|rd|th)?(?!\d)(?:[\s,]{{1,2}}\d{{4}}(?!\d))?|'?\d{{4}}(?!\d))"
_TIME: Final = (
    rf"{_CLOCK.replace('[:.]', ':')}(?!\d)(?:\s?(?i:[ap]\.?m\b\.?|uhr\b|h\b))?"
    r"|\d{1,2}(?:[.:]\d{2})?\s?(?i:uhr\b|[ap]\.?m\b\.?)|\d{1,2}h\d{2}(?!\d)"
)

#: UCUM's and the ward's units; of one letter only after up to three digits, since "1984 m" is a man.
_BASE: Final = (
    r"(?:mm\s?\[?Hg\]?|cm\s?H2O|[kmMcdµμunpfGT]?(?:mol|[oO]sm|Eq|IU|IE|U|Gy|Sv|Bq|Pa|Hz|kat|cal|bar|Da|W|J|V|g|L|l|m)|°\s?[CF]|°|%|‰|HU|HE|bpm|min|ms|sec"
    r"|Torr|ppm|ppb|mval|Gpt|Tpt|Ch|Fr|cps|cells?|copies|days?|hours?|minutes?|Tagen?|Tage|Stunden?|Minuten?|[sdh])"
)
_UNIT: Final = (
    rf"(?:\s?[x×*]\s?10\s?[\^*]?\s?\d{{1,2}}|\s10[\^*]\d{{1,2}})?(?:\s?{_BASE}(?:[²³]|\^?[23](?!\d))?(?![^\W_])(?:\s?[/·]\s?(?:1[.,]73\s?)?{_BASE}"
    rf"(?:[²³]|\^?[23](?!\d))?(?![^\W_])){{0,3}}|\s?/\s?{_BASE}(?:[²³]|\^?[23](?!\d))?(?![^\W_]))"
)
_SINGLE: Final = re.compile(r"\d{4,}\s?[mlLsdhVWJ](?![^\W_/])")
_AMOUNT: Final = r"\d{1,6}+(?:[.,]\d{1,6}+)?"
_VALUE: Final = rf"{_AMOUNT}(?:\s?[-–/x×]\s?{_AMOUNT}){{0,2}}{_UNIT}"

#: A network address, a UID.
_DOTTED: Final = r"\d++(?:(?=\.\d)\.\d++){3,}+"
#: A digit with at most two signs before it.
_SIGN: Final = r"[ \t\u00a0()/.‐-–-]"
_FURTHER: Final = rf"(?:\d|{_SIGN}\d|{_SIGN}{_SIGN}\d)"
#: Seven digits and more.
_PHONE: Final = rf"\d{_FURTHER}{{6,}}+"
_NUMBER: Final = r"\d++(?:(?=[.,]\d)[.,]\d++)*+"
_NUMBERS: Final = re.compile(
    rf"(?P<spelled>{_SPELLED})"
    rf"|(?<!\d)(?:(?P<dotted>{_DOTTED})|(?P<date>{_DATE})|(?P<time>{_TIME})|(?P<value>{_VALUE})|\+?\(?(?P<phone>{_PHONE})|(?P<number>{_NUMBER}))"
    rf"|(?P<lead>[+(]{{1,2}}+\d{_FURTHER}{{6,}}+)"
)

#: A result that the sender wrote as a text, whole: a comparator, a number or powers of ten, or two of them.
_MEASURED: Final = re.compile(
    r"\s{0,3}[<>≤≥=~]{0,2}\s?(?:[+-]?[0-9]{1,4}(?:[.,][0-9]{1,4})?[eE][+-]?[0-9]{1,4}|[0-9]{1,3}(?:[.,][0-9]{1,3})?\s?[/-]\s?[0-9]{1,3}(?:[.,][0-9]{1,3})?"
    r"|[0-9]\s?:\s?[0-9]{1,5}|[+-]?[0-9]{1,4}(?:[.,][0-9]{1,2})?)\s{0,3}"
)

#: What a PN's words may be without being a name.
_NO_NAMES: Final = frozenset(re.findall(r"\w+", "dr drs prof professor med mr mrs ms mx miss herr frau phd md jr sr dipl"))
_PARTICLES: Final = frozenset(
    re.findall(r"\w+", "von vom van de der den del della di da do dos du la le el al bin ibn zu zur y e und ten ter")
)
_PLAIN: Final = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "æ": "ae", "œ": "oe", "þ": "th", "ı": "i", "ħ": "h"})
_UMLAUTS: Final = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe"})


@dataclass(frozen=True, slots=True)
class _Names:
    """A patient's name parts, folded: `whole` words, `long` ones that count inside others, `unspaced` of scripts without spaces."""

    whole: frozenset[str]
    long: tuple[str, ...]
    unspaced: re.Pattern[str] | None


def redact(text: str, *, names: Collection[str] = ()) -> str:
    """Return `text` with [name], [date], [time], [number] and [link] in place of what may say who or when.

    Parameters
    ----------
    names
        The patient's names as DICOM writes them (PN, PS3.5 §6.2: ``Family^Given^Middle``), all that were ever told. Their parts of two
        letters and more go wherever they stand, whatever their case and accents ("MUELLER" for "Müller"), but for titles and particles.

    Returns
    -------
    str
        Redacted once more it stays the same. "[withheld]" for a text made so that each pass uncovers more.
    """
    sought = _names(tuple(sorted(set(names))))
    text = _UNSEEN.sub("", text)
    for _ in range(_PASSES):
        if (after := _pass(text, sought)) == text:
            return text
        text = after
    return "[withheld]"


def redact_value(text: str, *, names: Collection[str] = ()) -> str:
    """As `redact`, but a text that is one measured value and nothing else stays: ">1e400", "1:1280", "120/80".

    A year and a day and month look like values ("1933", "24.02"), and alone say nothing of who; a date, a telephone number or an
    ID of five digits does not look like one.
    """
    return text if _MEASURED.fullmatch(text) else redact(text, names=names)


def _pass(text: str, names: _Names) -> str:
    text = _LINK.sub("[link]", text)
    text = _TITLED.sub(r"\1[name]", text)
    if names.unspaced:
        text = names.unspaced.sub("[name]", text)
    if names.whole:
        text = _WORD.sub(lambda found: _named(found[0], names), text)
    return _NUMBERS.sub(_numbered, text)


def _numbered(found: re.Match[str]) -> str:
    kind = found.lastgroup
    if kind in ("spelled", "date"):
        return "[date]"
    if kind == "time":
        return "[time]"
    if kind == "value" and not _SINGLE.match(found[0]):
        return found[0]
    if kind == "number" and max(map(len, re.split("[.,]", found[0]))) < 3 and found[0].count(".") + found[0].count(",") < 2:
        return found[0]
    return "[number]" if kind != "value" else re.sub(r"\d{3,}+", "[number]", found[0])


# --- names


def _names(told: Sequence[str]) -> _Names:
    """The parts of PN strings that are sought."""
    words: set[str] = set()
    for name in told:
        for group in name.split("="):
            for component in group.split("^")[:3]:  # prefix and suffix are titles
                parts = [part for part in _WORD.findall(_UNSEEN.sub("", component)) if not part.startswith("[")]
                words |= {part for part in parts if len(parts) == 1 or fold(part) not in _PARTICLES}
    unspaced = {word for word in words if _UNSPACED.search(word)}
    folded = {form for word in words - unspaced for form in _forms(word) if len(form) > 1 and form not in _NO_NAMES}
    pattern = "|".join(re.escape(word) for word in sorted(unspaced, key=len, reverse=True))
    long = tuple(sorted(form for form in folded if len(form) >= _LONG))
    return _Names(frozenset(folded), long, re.compile(pattern) if pattern else None)


def _forms(word: str) -> set[str]:
    """How a name may be spelled, folded: Müller, Muller, Mueller."""
    lower = unicodedata.normalize("NFC", word.casefold())
    forms = {fold(lower), fold(lower.translate(_UMLAUTS))}
    for double, single in (("ae", "a"), ("oe", "o"), ("ue", "u"), ("aa", "a")):
        forms |= {form.replace(double, single) for form in tuple(forms) if len(form) > _LONG}
    return forms


@lru_cache(maxsize=4096)
def fold(word: str) -> str:
    """A word without case, accents and width: what two spellings of one name share."""
    split = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", word).casefold())
    return "".join(char for char in split if not unicodedata.combining(char)).translate(_PLAIN)


def _named(word: str, names: _Names) -> str:
    if word.startswith("["):
        return word
    folded = fold(word) if len(word) < 100 else fold.__wrapped__(word)
    is_name = folded in names.whole or folded.removesuffix("s") in names.whole or any(part in folded for part in names.long)
    return "[name]" if is_name else word
