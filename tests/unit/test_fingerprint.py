"""What an answer rests on, as hashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.fingerprint import code_digest


def program(root: Path) -> Path:
    """Two files that stand for a program."""
    for name in ("worker/a.py", "models/deep/b.py", "worker/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    return root


@pytest.mark.parametrize("change", ["worker/a.py", "models/deep/b.py", "models/new.py"])
def test_a_changed_or_added_file_of_code_is_another_program_and_a_text_is_none(tmp_path: Path, change: str) -> None:
    one, other, third = (program(tmp_path / name) for name in "abc")
    (other / change).write_text("x = 2\n")
    (third / "worker/README.md").write_text("x = 2\n")
    assert len(code_digest(one)) == 64
    assert code_digest(one) == code_digest(third)
    assert code_digest(one) != code_digest(other)


def test_a_file_that_moved_is_another_program(tmp_path: Path) -> None:
    one, other = program(tmp_path / "a"), program(tmp_path / "b")
    (other / "worker/a.py").rename(other / "worker/c.py")
    assert code_digest(one) != code_digest(other)
