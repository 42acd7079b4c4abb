"""Prompt lists of all kinds are read alike, and refused by file and line."""

import json
import logging
from pathlib import Path

import pytest

from mitune.denoiser.opening.models import Model
from mitune.errors import MituneError
from mitune.prompts.lists import check_prompts, load_prompts
from tests.tiny import tiny_sd

BENCHMARK = Path(__file__).parents[2] / "shared" / "data" / "t2i_compbench"
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\xa0"  # that str.splitlines takes for the ends of lines


def load(tmp_path, content, name="p.txt", **options):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_prompts(str(file), **options)


def texts(*arguments, **options):
    return [listed.text for listed in load(*arguments, **options)]


class TestText:
    def test_tail_after_a_tab_is_dropped(self, tmp_path):
        loaded = load(tmp_path, "a red bench\tcolor\na blue bowl\r\n".encode("utf-8-sig"), "color_val_seen.txt")
        assert [p.text for p in loaded] == ["a red bench", "a blue bowl"]
        assert {(p.category, p.split) for p in loaded} == {("color", "seen")}

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("character", SEPARATORS)
    def test_lines(self, tmp_path, end, character):
        prompts = [f"one{character}prompt", "another"]
        assert texts(tmp_path, end.join(prompts) + end) == prompts
        table = "prompt" + end + end.join(prompts)
        assert texts(tmp_path, table, "p.csv") == texts(tmp_path, table, "p.tsv") == prompts
        objects = end.join(json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts)
        assert texts(tmp_path, objects, "p.jsonl") == prompts

    def test_blank_lines_at_the_end(self, tmp_path):
        assert texts(tmp_path, "a cat\n\n  \n") == ["a cat"]

    @pytest.mark.parametrize(
        "prompt",
        [
            '"Hello", said the dog',
            "{a cat} in braces",
            "[a photo] of a cat",
            "prompt: a cat",
            "text, blurry, watermark",
            "a caption, a text, and a prompt",
            "un café à Ωmega 🦊",
        ],
    )
    def test_prompts_that_look_like_something_else(self, tmp_path, prompt):
        assert texts(tmp_path, f"{prompt}\na dog\n") == [prompt, "a dog"]

    def test_repeats_are_dropped_with_a_word(self, tmp_path, caplog):
        assert texts(tmp_path, "a cat\na dog\na cat\na dog \na cat\n") == ["a cat", "a dog"]
        assert "p.txt:3 repeats" in caplog.text
        assert "p.txt:1; 3 such repeats are left out." in caplog.text


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": 'a photo of two "cows", one black'},
]
WANTED = [("a photo of a bench", "single_object"), ('a photo of two "cows", one black', "counting")]
LINES = "\n".join(map(json.dumps, GENEVAL))
QUOTED = '"a photo of two ""cows"", one black"'
TSV = 'Prompt\tCategory\tChallenge\tNote\na photo of a bench\tsingle_object\tBasic\t\n"Hi" on a sign\tIllustrations\n'


class TestStructured:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("evaluation_metadata.jsonl", LINES),
            ("metadata.txt", LINES + "\n"),
            ("metadata.json", LINES),
            ("list.json", json.dumps(GENEVAL)),
            ("list.txt", json.dumps(GENEVAL, indent=2)),
            ("bench.csv", f"Prompts,Category\na photo of a bench,single_object\n{QUOTED},counting\n"),
            ("bench.txt", f"id;Caption;tag\r\n1;a photo of a bench;single_object\r\n2;{QUOTED};counting\r\n"),
            ("bench.tsv", f"Category\tPrompt\nsingle_object\ta photo of a bench\ncounting\t{QUOTED}\n"),
            ("bench_no_ending", f"prompt\ttag\na photo of a bench\tsingle_object\n{QUOTED}\tcounting"),
        ],
    )
    def test_kinds(self, tmp_path, caplog, name, content):
        caplog.set_level(logging.WARNING)
        loaded = load(tmp_path, content, name)
        assert [(p.text, p.category) for p in loaded] == WANTED
        assert "--prompt-field names another one" in caplog.text

    def test_quotes_of_a_prompt_in_a_tsv(self, tmp_path):
        """As in PartiPrompts, whose cells are not quoted."""
        assert texts(tmp_path, TSV, "PartiPrompts.tsv") == ["a photo of a bench", '"Hi" on a sign']

    def test_texts_in_json(self, tmp_path, caplog):
        assert texts(tmp_path, '["a cat", "a dog"]', "p.json") == ["a cat", "a dog"]
        assert texts(tmp_path, '"a cat"\n"a dog"\n', "p.jsonl") == ["a cat", "a dog"]
        assert not caplog.text

    def test_a_cell_of_several_lines(self, tmp_path):
        assert texts(tmp_path, 'prompt\n"a cat\nand a dog"\na bird\n', "p.csv") == ["a cat\nand a dog", "a bird"]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("p.csv", "prompt,revised\na cat,a fat cat\n"), ("p.jsonl", '{"prompt": "a cat", "revised": "a fat cat"}\n')],
    )
    def test_a_field_by_name(self, tmp_path, caplog, name, content):
        assert texts(tmp_path, content, name, field="revised") == ["a fat cat"]
        assert not caplog.text
        with pytest.raises(MituneError, match=r"1: no field or column 'Revised'.*prompt_field\): 'prompt', 'revised'"):
            load(tmp_path, content, name, field="Revised")

    @pytest.mark.parametrize(
        ("name", "content", "sentence"),
        [
            ("p.jsonl", LINES + "\na photo of a cat\n", r"p\.jsonl:3: no JSON"),
            (
                "p.jsonl",
                LINES + '\n{"tag": "x"}\n\n{"prompt": 3}\n[]',
                r":3: no text in.*'prompt'.*; .*:4: the line is",
            ),
            ("p.json", '["a cat", "", 3]', r"p\.json, entry 2: the line is blank.*; .*entry 3: no text"),
            ("p.json", '{"prompts": {"a": 1}}', r"p\.json:1: none of the fields"),
            ("p.json", '{\n"prompts": ["a"]\n}', "holds no JSON list"),
            ("p.json", "a cat\n", "holds no JSON list"),
            ("p.txt", 'a cat\n{"prompt": "a dog"}\n', r"p\.txt:2: JSON among plain text"),
            ("p.txt", '"a cat, asleep",animal\n"a dog",animal\n', "every line begins with a text in quotes"),
            ("p.txt", '"a cat"\n', "every line begins with a text in quotes"),
            ("p.csv", "a cat\na dog\n", r"p\.csv:1: none of the fields or columns.*--prompt-field.*'a cat'"),
            ("p.csv", "prompt,tag\na cat, asleep,animal\na dog,animal\n", r":2: 3 columns under a header of 2"),
            ("p.csv", 'prompt,tag\n"a cat,animal\na dog,animal\n', r"p\.csv:2: quotes that do not fit"),
            ("p.csv", 'prompt,tag\n"Hi" on a sign,x\na dog,animal\n', r"p\.csv:2: quotes that do not fit"),
            ("p.csv", "tag,prompt\nanimal\n", r"p\.csv:2: no column 'prompt'"),
            ("p.csv", "prompt,tag\n", "holds no prompt"),
        ],
    )
    def test_bad_ones(self, tmp_path, name, content, sentence):
        with pytest.raises(MituneError, match=sentence):
            load(tmp_path, content, name)


class TestLabels:
    """Category and split come of columns or fields, of T2I-CompBench's way of naming its files, and of nothing else."""

    @pytest.mark.parametrize(
        ("name", "labels"),
        [
            ("color_val_unseen.txt", ("color", "unseen")),
            ("3d_spatial_val.txt", ("3d_spatial", "")),
            ("color_train.txt", ("color", "")),
            ("never_seen.txt", ("", "")),
            ("color_val_seen.md", ("", "")),
            ("prompts.txt", ("", "")),
        ],
    )
    def test_names(self, tmp_path, name, labels):
        (prompt,) = load(tmp_path, "a cat\n", name)
        assert (prompt.category, prompt.split) == labels

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("p.csv", "Split,prompt,Tag\nunseen,a cat,animal\n"),
            ("color_val_seen.txt", '{"prompt": "a cat", "category": "animal", "split": "unseen"}\n'),
        ],
    )
    def test_columns_and_fields(self, tmp_path, name, content):
        (prompt,) = load(tmp_path, content, name)
        assert (prompt.category, prompt.split) == ("animal", "unseen")


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"", "holds no prompt"),
            (b"\n \n\t\n", "holds no prompt"),
            (b"\xef\xbb\xbf", "holds no prompt"),
            (b"a cat\n\na dog\n", r"p\.txt:2: the line is blank"),
            (b"a cat\n\tanimal\n", r"p\.txt:2: the line is blank"),
            (b"a cat\n\xff\xfe\n", r"p\.txt:2: not UTF-8"),
            ("a café\n".encode("latin-1"), r"p\.txt:1: not UTF-8"),
            ("a cat\n".encode("utf-16"), "in UTF-16; save it in UTF-8"),
            ("a cat\n".encode("utf-16-le"), r"p\.txt:1: the control character U\+0000"),
            (b"a cat\na \x1b[31mred\x1b[0m dog\n", r"p\.txt:2: the control character U\+001B"),
        ],
    )
    def test_bad_files(self, tmp_path, content, sentence):
        with pytest.raises(MituneError, match=sentence):
            load(tmp_path, content)

    def test_half_a_character(self, tmp_path):
        with pytest.raises(MituneError, match=r"1: half of a surrogate pair \(0xd83e\)"):
            load(tmp_path, '{"prompt": "a \\ud83e fox"}', "p.jsonl")
        assert texts(tmp_path, '{"prompt": "a \\ud83e\\udd8a fox"}', "p.jsonl") == ["a 🦊 fox"]

    def test_all_bad_lines_at_once(self, tmp_path):
        with pytest.raises(MituneError) as caught:
            load(tmp_path, b"a cat\n\n\xff\n" + b"red " * 30 + b"\n\x00\n", model=Model(tiny_sd(), {}, "tiny"))
        message = str(caught.value)
        assert [f"p.txt:{n}:" in message for n in range(1, 6)] == [False, True, True, True, True]
        assert "p.txt:4: 32 tokens, but a call of this model reads 24; shorten the text" in message
        assert "\n" not in message

    def test_no_more_than_ten(self, tmp_path):
        with pytest.raises(MituneError, match=r"p\.txt:11: the line is blank; delete it; and 5 more\.$"):
            load(tmp_path, "a cat" + "\n" * 16 + "a dog")

    def test_missing_file_and_unknown_list(self, tmp_path):
        for absent in (tmp_path / "no.txt", tmp_path):
            with pytest.raises(MituneError, match="There is no prompt file"):
                load_prompts(str(absent))
        with pytest.raises(MituneError, match="There is no prompt list 'shapes:colour'"):
            load_prompts("shapes:colour")
        with pytest.raises(MituneError, match="categories: color"):
            load_prompts("shapes:train/colour")


def test_prompts_without_a_file(caplog):
    model = Model(tiny_sd(), {}, "tiny")
    assert check_prompts(["a red ball", "?!", "a red ball"], model) == ["a red ball", "?!"]
    assert "prompt 3 repeats prompt 1; 1 such repeats are left out." in caplog.text
    with pytest.raises(MituneError, match=r"^prompt 2: the line is blank; delete it; prompt 3: 32 tokens, but"):
        check_prompts(["a", "", "red " * 30], model)


@pytest.mark.skipif(not BENCHMARK.is_dir(), reason="the lists of T2I-CompBench are not beside the repository")
def test_the_lists_of_the_benchmark():
    files = [file for file in sorted(BENCHMARK.glob("*.txt")) if file.stem != "LICENSE"]
    assert len(files) == 37
    for file in files:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        assert [listed.text for listed in load_prompts(str(file))] == list(dict.fromkeys(lines))
