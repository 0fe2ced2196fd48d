"""Two names of one person never stop a study; two persons under one ID do."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Final

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.domain import Patient, PatientKey
from worker.identity import disagreement
from worker.intake import hl7, mllp

pytestmark = pytest.mark.requirement("F4")

EVERYTHING: Final = ("birth_date", "sex", "name")

ONE_PERSON: Final = [
    # written otherwise
    ("Miller^John", "MILLER^JOHN"),
    ("Müller^Jürgen", "Mueller^Juergen"),
    ("Müller^Jürgen", "MULLER^JURGEN"),
    ("Mueller^Juergen", "Muller^Jurgen"),
    ("Groß^Anna", "GROSS^ANNA"),
    ("Ågård^Søren", "Aagaard^Soeren"),
    ("Łukasz^Wałęsa", "Lukasz^Walesa"),
    ("Núñez^José", "NUNEZ^JOSE"),
    ("N\u0303u\u0301nez^Jose", "Ñúnez^José"),
    ("ＭＩＬＬＥＲ^ＪＯＨＮ", "Miller^John"),
    ("O'Brien^Pat", "OBRIEN^PAT"),
    ("O’Brien^Pat", "O BRIEN^PAT"),
    ("Miller2^John", "Miller^John"),
    ("ŞAHİN^IŞIL", "Şahin^Işıl"),
    # cut, turned or grown
    ("Miller^J", "Miller^John"),
    ("Miller^J.", "Smith^John"),
    ("Miller^Eva Maria", "Miller^Eva"),
    ("Miller^Eva^Maria", "Schulz^Maria"),
    ("Miller^Hans-Peter", "Miller^Peter"),
    ("Miller^John", "John^Miller"),
    ("Miller John", "Miller^John"),
    ("John Miller", "Miller^John"),
    ("Miller^John", "Miller^Mary"),
    ("Miller-Schulz^Eva", "Schulz^Petra"),
    ("Miller^Eva", "Schulz^Eva"),
    ("van der Berg^Jan", "Vanderberg^Jan"),
    ("van der Berg^Jan", "Berg^Piet"),
    ("García Márquez^Ana", "Garcia^Luis"),
    ("Miller^John^^Dr.^Jr", "Miller^John"),
    ("Prof. Dr. Miller^John", "Miller^John"),
    # not told, or by nobody's name
    ("", "Miller^John"),
    ("^", "Miller^John"),
    ("^^^^", "Miller^John"),
    ("Miller", "Schulz^Eva"),
    ("^Eva", "Schulz^John"),
    ("ANONYMOUS", "Miller^John"),
    ("Anonymized^Patient", "Miller^John"),
    ("Unknown^Unknown", "Miller^John"),
    ("X" * 4 + "^" + "X" * 2, "Miller^John"),
    ("Schulz^Baby Boy", "Miller^Tom"),
    ("4711", "Miller^John"),
    ("T-0815", "Miller^John"),
    ("Case^T-0815", "Miller^John"),
    ("Case^D3FB252E", "Miller^John"),
    # several scripts
    ("Yamada^Tarou=山田^太郎=やまだ^たろう", "山田^太郎"),
    ("Yamada^Tarou=山田^太郎=やまだ^たろう", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
    ("Yamada^Tarou=山田^太郎", "Suzuki^Hanako=山田^太郎"),
    ("山田太郎", "山田^太郎"),
    ("山田太郎", "山田花子"),
    ("Hong^Gildong=洪^吉洞=홍^길동", "홍길동"),
    ("王小明", "王^小明"),
    ("Wang^XiaoMing=王^小明", "王"),
    ("Иванов^Пётр", "ИВАНОВ^ПЕТР"),
    ("Петрова^Анна", "Иванова^А"),
    ("Παπαδόπουλος^Γιώργος", "ΠΑΠΑΔΟΠΟΥΛΟΣ^ΓΙΩΡΓΟΣ"),
    ("حَسَن^أحمد", "حسن^احمد"),
    # nothing to compare
    ("山田^太郎", "Suzuki^Hanako"),
    ("Иванов^Пётр", "Miller^John"),
]

TWO_PERSONS: Final = [
    ("Miller^John", "Schulz^Eva"),
    ("Miller^John^Paul", "Schulz^Eva^Maria"),
    ("Miller^J", "Schulz^Eva"),
    ("Miller^S", "Schulz^Eva"),  # an initial stands for a given name
    ("Miller John", "Schulz^Eva"),
    ("MILLER JOHN", "SCHULZ EVA"),
    ("Miller^Dr. John", "Schulz^Dr. Eva"),
    ("van der Berg^Jan", "van der Meer^Eva"),
    ("Nguyen^Thi Hoa", "Tran^Thi Lan"),
    ("Miller^John^^^Jr", "Schulz^Eva^^^Jr"),
    ("Müller^Jürgen", "Möller^Bernd"),
    ("O'Brien^Pat", "O'Neill^Sean"),
    ("Yamada^Tarou=山田^太郎", "Suzuki^Hanako=鈴木^花子"),
    ("山田^太郎", "鈴木^花子"),
    ("山田太郎", "鈴木花子"),
    ("山田太郎", "Suzuki^Hanako=鈴木^花子"),
    ("やまだ^たろう", "スズキ^ハナコ"),
    ("홍^길동", "김^철수"),
    ("Иванов^Пётр", "Смирнова^Анна"),
    ("Παπαδόπουλος^Γιώργος", "Νικολάου^Ελένη"),
    ("حسن^أحمد", "سالم^فاطمة"),
    ("כהן^דוד", "לוי^שרה"),
]

PAIRS: Final = [*((*pair, False) for pair in ONE_PERSON), *((*pair, True) for pair in TWO_PERSONS)]


def patient(name: str = "", birth_date: str = "", sex: str = "", patient_id: str = "T-0815") -> Patient:
    return Patient(PatientKey("TEST", patient_id), name, birth_date, sex)


def differ(one: str, other: str) -> bool:
    return disagreement(patient(one), patient(other), must_agree=EVERYTHING) != ""


@pytest.mark.parametrize(("one", "other"), ONE_PERSON)
def test_what_one_person_may_be_called_is_no_conflict(one: str, other: str) -> None:
    assert not differ(one, other)


@pytest.mark.parametrize(("one", "other"), TWO_PERSONS)
def test_names_without_a_common_part_are_a_conflict(one: str, other: str) -> None:
    assert differ(one, other)


parts = st.sampled_from(
    ["Miller", "Müller-Groß", "van Berg", "John", "Eva Maria", "J", "A", "Dr.", "X", "山田", "太郎", "たろう", "홍", "Иванов", "", "7"]
)
names = st.one_of(
    st.lists(st.lists(parts, max_size=5).map("^".join), max_size=3).map("=".join),
    st.sampled_from(sorted({name for one, other in (*ONE_PERSON, *TWO_PERSONS) for name in (one, other)})),
    st.text(max_size=20),
)


@given(names, names)
def test_it_does_not_matter_which_name_is_whose(one: str, other: str) -> None:
    assert differ(one, other) == differ(other, one)


@given(names)
def test_nobody_contradicts_themselves_or_somebody_without_a_name(name: str) -> None:
    assert not differ(name, name)
    assert not differ(name, "")


@given(st.sampled_from(PAIRS), st.sampled_from(["Dr.", "Prof. Dr.", "Mrs", "Herr"]), st.sampled_from([0, 1, 3, 4]), st.booleans())
def test_a_title_changes_nothing(pair: tuple[str, str, bool], title: str, component: int, is_first: bool) -> None:
    *sides, expected = pair
    assert isinstance(sides[0], str)
    name, other = sides if is_first else sides[::-1]
    alphabetic, *groups = str(name).split("=")
    found = alphabetic.split("^")
    found += [""] * (component + 1 - len(found))
    found[component] = f"{title} {found[component]}".strip()
    assert differ("=".join(["^".join(found), *groups]), str(other)) == expected


@given(st.sampled_from(PAIRS), st.sampled_from([str.upper, str.lower, str.title, lambda name: name + "==", lambda name: f" {name} "]))
def test_case_space_and_empty_groups_change_nothing(pair: tuple[str, str, bool], write: object) -> None:
    assert callable(write)
    assert differ(write(pair[0]), pair[1]) == pair[2]


def test_a_name_that_is_the_identifier_is_no_name_but_letters_of_an_identifier_are_not_taken_for_it() -> None:
    images = patient("T-0815^X1", patient_id="T-0815")
    assert disagreement(images, patient("Miller^John", patient_id="MRN9"), must_agree=EVERYTHING) == ""
    images, record = patient("Miller^John", patient_id="Miller-12"), patient("Schulz^Eva", patient_id="Miller-12")
    assert disagreement(images, record, must_agree=EVERYTHING) != ""


@pytest.mark.parametrize(
    ("images", "record", "said"),
    [
        (("", "19560304", ""), ("", "19560305", ""), "The birth dates of"),
        (("", "19560304", ""), ("", "19560304120000", ""), ""),
        (("", "19560304", ""), ("", "", ""), ""),
        (("", "", "F"), ("", "", "M"), "The sexes of"),
        (("", "", "F"), ("", "", "O"), ""),
        (("", "", "F"), ("", "", ""), ""),
        (("Miller^John", "", ""), ("Schulz^Eva", "", ""), "The names of"),
        (("Miller^John", "19560304", "M"), ("Schulz^Eva", "19560304", "F"), "The names and sexes of"),
        (("Miller^John", "19560304", "M"), ("Schulz^Eva", "19990101", "F"), "The names, birth dates and sexes of"),
    ],
)
def test_the_sentence_says_what_differs_and_nothing_of_the_patient(
    images: tuple[str, str, str], record: tuple[str, str, str], said: str
) -> None:
    sentence = disagreement(patient(*images), patient(*record), must_agree=EVERYTHING)
    assert sentence == (f"{said} the images and of the patient's record differ." if said else "")


def test_only_what_the_site_wants_to_agree_is_looked_at() -> None:
    one, other = patient("Miller^John", "19560304", "M"), patient("Schulz^Eva", "19990101", "F")
    assert disagreement(one, other, must_agree=()) == ""
    assert disagreement(one, other, must_agree=("sex",)) == "The sexes of the images and of the patient's record differ."
    assert "names" in disagreement(one, other, must_agree=("name",))


def test_no_real_study_contradicts_its_own_record(shared: Path) -> None:
    """188 studies of 54 patients against the demographics of their HL7 messages; a false stop costs a patient the report."""
    folder = shared / "data" / "cxr-severity"
    records = {}
    for path in sorted((folder / "hl7").glob("*.hl7")):
        message = next(iter(mllp.split_messages(path.read_bytes())))
        update = hl7.parse(message, zone=UTC, issuers={}).update
        assert update is not None
        records[update.patient.key.patient_id] = update.patient
    studies = 0
    for path in sorted((folder / "dicom").rglob("*.dcm")):
        ds = pydicom.dcmread(path, specific_tags=["PatientName", "PatientID", "PatientBirthDate", "PatientSex"], stop_before_pixels=True)
        images = Patient(PatientKey("MHH", ds.PatientID), str(ds.PatientName), ds.get("PatientBirthDate", ""), ds.get("PatientSex", ""))
        assert images.name
        assert disagreement(images, records[images.key.patient_id], must_agree=EVERYTHING) == ""
        studies += 1
    assert (studies, len(records)) == (188, 54)
