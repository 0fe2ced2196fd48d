"""A bundle is read strictly: what is not understood is an error, what was changed is found out."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from models.bundle import Bundle, InvalidBundleError, check_writable, settle
from models.spec import Code
from tests.unit import small_bundle


def temperatures(ill: float, rare: float) -> dict[str, dict[str, float]]:
    return {"ill": {"temperature": ill}, "rare": {"temperature": rare}}


SHIPPED = Path(__file__).parents[2] / "models" / "bundles"


@pytest.mark.parametrize("name", ["phantom", "cxr-severity", "brain-dementia"])
def test_a_shipped_bundle_is_whole_and_its_weights_hash_to_what_it_says(name: str) -> None:
    bundle = Bundle.read(SHIPPED / name)
    assert bundle.name == name
    assert bundle.weights_path.stat().st_size < 4_000_000
    assert len(bundle.tensors()) > 20
    assert bundle.research_use
    for file in ("LICENSE", "README.md"):
        assert (SHIPPED / name / file).stat().st_size > 200


def test_reading_metadata_and_verifying_weights_does_not_import_torch() -> None:
    """The receiver asks a bundle what series it needs; torch would cost it a second and a gigabyte."""
    code = (
        "import sys; from pathlib import Path; from models.bundle import Bundle; "
        f"Bundle.read(Path({str(SHIPPED / 'phantom')!r})); "
        "sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0


def test_every_value_arrives_as_its_type(tmp_path: Path) -> None:
    bundle = Bundle.read(small_bundle.write(tmp_path), verify=False)
    assert bundle.procedure == Code("25045-6", "LN", "CT unspecified body region")
    assert bundle.record.values[0].conversions == {"mg/dL": 10.0}
    assert bundle.record.values[1].plausible == (6.5, 8.0)
    assert bundle.findings[1].negative_below is None
    assert bundle.images[0].spacing_mm == (2.0, 2.0, 3.0)
    assert bundle.modalities == ("image", "values", "text")


def test_a_finding_is_critical_only_where_its_bundle_says_so(tmp_path: Path) -> None:
    said = small_bundle.TOML.replace('name = "rare"\n', 'name = "rare"\ncritical = true\n')
    bundle = Bundle.read(small_bundle.write(tmp_path, said), verify=False)
    assert [finding.critical for finding in bundle.findings] == [False, True]
    with pytest.raises(InvalidBundleError, match="critical"):
        Bundle.read(small_bundle.write(tmp_path / "other", said.replace("critical = true", 'critical = "yes"')), verify=False)


WAITLESS = "wait_s = 0\nlook_back_h = 24\n\n[[record.values]]\nneed = "


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("look_back_h = 24", "look_back_h = 24\nlook_forward_h = 2", "unknown key 'look_forward_h'"),
        ("wait_s = 1\n", "", "key 'wait_s' is missing"),
        ("wait_s = 1\n", 'wait_s = "1"\n', "record.*wait_s: float is expected"),
        ("wait_s = 1\n", "wait_s = true\n", "wait_s: float is expected"),
        ("wait_s = 1\n", "wait_s = -1\n", "wait_s must be finite and not negative"),
        (
            "wait_s = 1\nlook_back_h = 24\n\n[[record.values]]\n",
            f"{WAITLESS}'wanted'\n",
            "wait_s must be above 0 where something is wanted",
        ),
        ('name = "note"\n', 'name = "note"\nneed = "required"\nattribute = "StudyDescription"\n', "need belongs to the record"),
        ('name = "note"\n', 'name = "note"\nneed = "urgent"\n', "need"),
        ('"mg/dL" = 10.0', '"mg/dL" = 0.0', "conversions must be above 0"),
        ('kind = "volume"', 'kind = "film"', "kind"),
        ("plausible = [6.5, 8]", "plausible = [6.5]", "2 entries are expected, found 1"),
        ("plausible = [6.5, 8]", "plausible = [8, 6.5]", r"plausible must be \[low, high\]"),
        ("plausible = [0.01, 1000]", "plausible = [0, 1000]", "above 0 for a log transform"),
        ('["ILL", "99TEST", "Ill"]', '["ILL"]', "a code is"),
        ("threshold = 0.6", "threshold = 1.6", "threshold must lie"),
        ("negative_below = 0.4", "negative_below = 0.7", "must not exceed threshold"),
        ('name = "rare"', 'name = "ill"', "names must differ"),
        ("heads = 2", "heads = 3", "divide by heads"),
        ("size = [12, 10, 8]", "size = [12, 10]", "images image: size needs"),
        ("window_hu = [-1000, 400]\n", "", "spacing_mm and window_hu"),
        ('file = "weights.safetensors"', 'file = "../weights.safetensors"', "plain file name"),
        ('name = "image"', 'name = "words"', "none of the record's modalities"),
        ('name = "image"', 'name = "image"\nlike = "other"', "like must name an earlier image"),
        ('name = "image"', 'name = "image"\nrequired = false', "one must be required"),
        ("width = 16", 'width = 16\nfusion = "single:sound"', "'sound' is none of image, values, text"),
        ("width = 16", 'width = 16\ntext = "bert"', "network.bert must name a folder"),
        ("[bundle]", "[bundel]", r"no \[bundle\] table"),
        ("[bundle]", "[bundle", "cannot be read"),
        ("heads = 2", "heads = 0", r"network\.heads must lie from 1"),
        ("words = 12", "words = 0", r"network\.words must lie from 1"),
        ("buckets = 64", "buckets = 1", r"network\.buckets must lie from 2"),
        ("wait_s = 1\n", "wait_s = nan\n", r"record\.wait_s must be finite"),
        ("look_back_h = 24", "look_back_h = -1", r"record\.look_back_h must be finite and not negative"),
        ("temperature = 1.0", "temperature = inf", "temperature must be positive and finite"),
        ("size = [12, 10, 8]", "size = [12, 0, 8]", "size needs"),
        ("spacing_mm = [2, 2, 3]", "spacing_mm = [2, 2, -3]", "spacing_mm must be positive"),
        ("window_hu = [-1000, 400]", "window_hu = [400, -1000]", "window_hu must be finite and increase"),
        ("epochs = 3", "epochs = 0", r"training\.epochs must lie from 1"),
        ("batch = 8", "batch = 8\naverage = 1.0", r"training\.average must lie from 0"),
        ("batch = 8", "batch = 8\nvalidation = 0.0", r"training\.validation must lie"),
        ("learning_rate = 0.01", "learning_rate = nan", r"training\.learning_rate must lie"),
        ('file = "weights.safetensors"', 'file = "bundle.toml"', r"ends in \.safetensors"),
        ("width = 16", f"width = {10**400}", "at most 64 bits"),
        ("wait_s = 1\n", f"wait_s = {10**400}\n", "at most 64 bits"),
        ("wait_s = 1\n", f"wait_s = {'9' * 5000}\n", "cannot be read"),
        ("authors = [", f"limits = {'[' * 3000}{']' * 3000}\nauthors = [", "cannot be read"),
        ("authors = [", f"limits = {'[' * 60}{']' * 60}\nauthors = [", "str is expected"),
        ("width = 16", 'width = 16\ntext = "bert"\nbert = "/usr"', "network.bert must name a folder"),
    ],
)
def test_a_mistake_in_the_metadata_is_refused_by_name(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in small_bundle.TOML
    folder = small_bundle.write(tmp_path, small_bundle.TOML.replace(old, new, 1))
    with pytest.raises(InvalidBundleError, match=says) as caught:
        Bundle.read(folder, verify=False)
    assert "bundle.toml" in str(caught.value)


def test_what_is_required_needs_no_waiting_time_and_what_is_wanted_does(tmp_path: Path) -> None:
    old = "wait_s = 1\nlook_back_h = 24\n\n[[record.values]]\n"
    assert old in small_bundle.TOML
    required = small_bundle.write(tmp_path / "a", small_bundle.TOML.replace(old, f"{WAITLESS}'required'\n"))
    wanted = small_bundle.write(tmp_path / "b", small_bundle.TOML.replace(old, f"{old}need = 'wanted'\n"))
    assert [Bundle.read(one, verify=False).record.values[0].need for one in (required, wanted)] == ["required", "wanted"]


def test_weights_that_were_changed_or_removed_are_refused(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path)
    with pytest.raises(InvalidBundleError, match=r"has no weights\.safetensors"):
        Bundle.read(folder)
    (folder / "weights.safetensors").write_bytes(b"one")
    settle(folder, temperatures(1, 1), sha256=hashlib.sha256(b"one").hexdigest())
    (folder / "weights.safetensors").write_bytes(b"two")
    with pytest.raises(InvalidBundleError, match="has sha256"):
        Bundle.read(folder)


def test_the_digest_changes_with_metadata_and_with_weights(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path)
    digests = {Bundle.read(folder, verify=False).digest}
    for raw in (b"one", b"two"):
        (folder / "weights.safetensors").write_bytes(raw)
        sha256 = hashlib.sha256(raw).hexdigest()
        digests.add(settle(folder, temperatures(1, 1), sha256=sha256).digest)
    (folder / "bundle.toml").write_text((folder / "bundle.toml").read_text("utf-8").replace("0.6", "0.65"), "utf-8")
    digests.add(Bundle.read(folder).digest)
    assert len(digests) == 4


def test_settling_new_weights_keeps_comments_and_sets_each_findings_temperature(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path, "# a comment\n" + small_bundle.TOML)
    (folder / "weights.safetensors").write_bytes(b"w")
    bundle = settle(folder, temperatures(1.5, 0.5), sha256=hashlib.sha256(b"w").hexdigest())
    assert [f.temperature for f in bundle.findings] == [1.5, 0.5]
    assert (folder / "bundle.toml").read_text("utf-8").startswith("# a comment")


def test_numbers_that_a_finding_did_not_have_are_written_below_its_threshold(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path)
    bundle = settle(folder, {"rare": {"negative_below": 0.25, "alpha": 0.1}})
    assert [(f.negative_below, f.alpha) for f in bundle.findings] == [(0.4, 0.0), (0.25, 0.1)]


def test_weights_in_another_format_are_never_opened(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path)
    raw = pickle.dumps({"a": 1})
    (folder / "weights.safetensors").write_bytes(raw)
    bundle = settle(folder, {}, sha256=hashlib.sha256(raw).hexdigest())
    with pytest.raises(InvalidBundleError, match=r"weights\.safetensors of bundle small is no safetensors file"):
        bundle.tensors()


def test_the_digest_changes_with_the_files_of_a_language_model(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path, small_bundle.TOML.replace("width = 16", 'width = 16\ntext = "bert"\nbert = "bert"'))
    (folder / "bert").mkdir()
    digests = set()
    for words in ("[PAD]", "[PAD]\nfever"):
        (folder / "bert" / "vocab.txt").write_text(words, "utf-8")
        digests.add(Bundle.read(folder, verify=False).digest)
    assert len(digests) == 2


def test_another_language_model_than_that_of_the_training_is_refused(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path, small_bundle.TOML.replace("width = 16", 'width = 16\ntext = "bert"\nbert = "bert"'))
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("[PAD]", "utf-8")
    raw = b"weights"
    (folder / "weights.safetensors").write_bytes(raw)
    for _ in range(2):  # trained again, the line is not written twice
        bundle = settle(folder, {}, sha256=hashlib.sha256(raw).hexdigest())
    assert Bundle.read(folder).weights.bert_sha256 == bundle.weights.bert_sha256 != ""
    (folder / "bert" / "vocab.txt").write_text("[PAD]\nfever", "utf-8")
    with pytest.raises(InvalidBundleError, match=r"bert of bundle small has sha256 .*bert_sha256"):
        Bundle.read(folder)


@pytest.mark.parametrize("top", ["weights = 3", 'network = "x"', "record = [1]"])
def test_a_table_that_is_none_is_refused_by_name(tmp_path: Path, top: str) -> None:
    rest = small_bundle.TOML.split(f"[{top.split()[0]}]")[0]
    with pytest.raises(InvalidBundleError, match=r"bundle\.toml"):
        Bundle.read(small_bundle.write(tmp_path, f"{top}\n{rest}"), verify=False)


def test_a_folder_outside_the_bundle_is_not_even_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_bundle.write(tmp_path, small_bundle.TOML.replace("width = 16", 'width = 16\ntext = "bert"\nbert = "/usr"'))
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("a foreign folder is read"))
    with pytest.raises(InvalidBundleError, match=r"network\.bert"):
        Bundle.read(folder, verify=False)


@pytest.mark.parametrize("link", ["bert", "bert/vocab.txt", "bert/deep"])
def test_a_link_that_leads_out_of_a_language_model_is_refused(tmp_path: Path, link: str) -> None:
    folder = small_bundle.write(tmp_path / "small", small_bundle.TOML.replace("width = 16", 'width = 16\ntext = "bert"\nbert = "bert"'))
    (tmp_path / "other").mkdir()
    if link != "bert":
        (folder / "bert").mkdir()
    (folder / link).symlink_to(tmp_path / "other")
    with pytest.raises(InvalidBundleError, match="a link that leads out"):
        Bundle.read(folder, verify=False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threshold = 0.6", "threshold=0.6"),
        ("temperature = 1.0", "temperature=1.0"),
        ("temperature = 1.0", "  temperature = 1.0  # of the site"),
        ("[[findings]]", "  [[ findings ]]"),
        ("threshold = 0.6\nnegative_below = 0.4\ntemperature = 1.0", "\tthreshold = 0.6\n\tnegative_below = 0.4"),
        ('sha256 = ""', "  sha256=''  # none yet"),
        ("quality_statement =", 'learned_from = """\ntemperature = 1.0\n"""\nquality_statement ='),
        ("epochs = 3\nbatch = 8\n", "epochs = 3\nbatch = 8\n# temperature = 4\n"),
    ],
)
def test_numbers_are_written_however_the_file_spells_its_lines(tmp_path: Path, old: str, new: str) -> None:
    assert old in small_bundle.TOML
    folder = small_bundle.write(tmp_path, small_bundle.TOML.replace(old, new))
    (folder / "weights.safetensors").write_bytes(b"w")
    check_writable(folder)
    bundle = settle(
        folder, {"ill": {"threshold": 0.7, "temperature": 1.5}, "rare": {"alpha": 0.1}}, sha256=hashlib.sha256(b"w").hexdigest()
    )
    assert bundle == Bundle.read(folder)
    assert [(f.threshold, f.temperature, f.alpha) for f in bundle.findings] == [(0.7, 1.5, 0.0), (0.5, 1.0, 0.1)]
    assert (folder / "bundle.toml").read_text("utf-8").count("#") == new.count("#") * small_bundle.TOML.count(old)


ARRAY = small_bundle.TOML[small_bundle.TOML.index("[[findings]]") : small_bundle.TOML.index("[network]")]
ILL = "{name = 'ill', code = ['ILL', 'L', 'Ill'], threshold = 0.6}"


@pytest.mark.parametrize(
    "toml",
    [
        small_bundle.TOML.replace("temperature = 1.0", '"temperature" = 1.0'),
        small_bundle.TOML.replace("quality_statement =", 'learned_from = """\n[[findings]]\nthreshold = 1\n"""\nquality_statement ='),
        f"findings = [{ILL}]\n" + small_bundle.TOML.replace(ARRAY, ""),
        "weights = {file = 'weights.safetensors', sha256 = ''}\n" + small_bundle.TOML[: small_bundle.TOML.index("[weights]")],
    ],
)
def test_a_file_that_cannot_be_changed_for_certain_is_left_as_it_is_and_found_before_a_training(tmp_path: Path, toml: str) -> None:
    folder = small_bundle.write(tmp_path, toml)
    (folder / "weights.safetensors").write_bytes(b"w")
    for change in (lambda: check_writable(folder), lambda: settle(folder, {"ill": {"temperature": 2.0}}, sha256="0" * 64)):
        with pytest.raises(InvalidBundleError, match="left as it is"):
            change()
    assert (folder / "bundle.toml").read_text("utf-8") == toml
    assert not (folder / "bundle.part").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_number_that_no_bundle_may_hold_is_not_written(tmp_path: Path, value: float) -> None:
    folder = small_bundle.write(tmp_path)
    with pytest.raises(InvalidBundleError):
        settle(folder, {"ill": {"temperature": value}})
    assert (folder / "bundle.toml").read_text("utf-8") == small_bundle.TOML


def test_a_folder_that_is_no_bundle_is_named_whole(tmp_path: Path) -> None:
    """A relative path is relative to the configuration's file: only the whole one shows where was looked."""
    with pytest.raises(InvalidBundleError, match=f"{tmp_path}/absent/bundle.toml cannot be read: No such file or directory"):
        Bundle.read(tmp_path / "absent")
