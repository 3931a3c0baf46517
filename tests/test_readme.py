"""What README says can be run as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_one_after_another():
    pytest.importorskip("diffusers")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) == 13
    assert names["images"].shape == (4, 3, 16, 16)
    assert names["record"].values.shape == (10, 4, 3, 16, 16)
    assert names["bits"].terms.shape == (1, 1000)


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@", README)


def test_linked_files_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
