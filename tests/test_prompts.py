"""Prompt files are refused by file and line."""

import pytest

from mitune.errors import MituneError
from mitune.prompts import load_prompts


def test_tail_after_a_tab_is_dropped(tmp_path):
    file = tmp_path / "color_val_seen.txt"
    file.write_bytes("a red bench\tcolor\na blue bowl\r\n".encode("utf-8-sig"))
    loaded = load_prompts(str(file))
    assert [p.text for p in loaded] == ["a red bench", "a blue bowl"]
    assert {(p.category, p.split) for p in loaded} == {("color", "seen")}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no prompt"),
        (b"\n\n", "holds no prompt"),
        (b"a cat\n\na dog\n", r"p\.txt:2: the line is blank"),
        (b"a cat\na dog\na cat\n", r"p\.txt:3: 'a cat' stands in line 1 already"),
        (b"a cat\n\xff\xfe\n", r"p\.txt:2: not UTF-8"),
    ],
)
def test_bad_files(tmp_path, content, sentence):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(MituneError, match=sentence):
        load_prompts(str(file))


def test_missing_file_and_unknown_list(tmp_path):
    with pytest.raises(MituneError, match="There is no prompt file"):
        load_prompts(str(tmp_path / "no.txt"))
    with pytest.raises(MituneError, match="There is no prompt list 'shapes:colour'"):
        load_prompts("shapes:colour")
    with pytest.raises(MituneError, match="categories: color"):
        load_prompts("shapes:train/colour")
