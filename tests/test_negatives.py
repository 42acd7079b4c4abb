"""Hard negatives: no scene fits one of the shapes world's; others differ in one respect; files are read strictly."""

import json
import random
from pathlib import Path

import pytest

from mitune.errors import MituneError
from mitune.prompts.negatives import hard_negatives, load_negatives, wider_negatives
from mitune.prompts.rewording import IRREGULAR, NUMBERS, OBJECTS, plural, singular
from mitune.worlds.base import Negative
from mitune.worlds.shapes.grammar import CATEGORIES, parse
from mitune.worlds.shapes.negatives import shapes_negatives
from mitune.worlds.shapes.negatives import wider_negatives as shapes_wider
from mitune.worlds.shapes.prompts import prompt_list
from mitune.worlds.shapes.scene import parts, sample_scene

LISTS = Path(__file__).parents[2] / "shared" / "data" / "t2i_compbench"


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_scene_fits_a_negative(category):
    rng = random.Random(0)
    for listed in prompt_list(category):
        scene = sample_scene(parse(listed.text), rng)
        negatives = shapes_negatives(listed.text)
        assert len({n.prompt for n in negatives}) == len(negatives)
        for negative in negatives:
            assert not all(met for _, met in parts(scene, parse(negative.prompt))), (listed.text, negative)


def test_kinds_follow_the_prompt():
    kinds = {n.kind for n in shapes_negatives("a red circle to the left of a blue square")}
    assert {"color swapped", "relation turned", "object exchanged"} <= kinds
    counts = [n.prompt for n in shapes_negatives("five red circles") if n.kind == "count changed"]
    assert counts == ["four red circles", "six red circles"]


@pytest.mark.parametrize(
    ("prompt", "kind", "expected"),
    [
        ("a red apple and a green bag", "color swapped", ["a green apple and a red bag"]),
        ("a red apple and a green bag", "object dropped", ["a green bag", "a red apple"]),
        ("The wooden desk and glass lamp.", "texture swapped", ["The glass desk and wooden lamp."]),
        ("an oval mirror and a square table", "shape swapped", ["a square mirror and an oval table"]),
        ("a big dog and a small cat", "size swapped", ["a small dog and a big cat"]),
        ("a big dog and a large cat", "size swapped", []),
        ("a brown cat and an orange", "color swapped", []),  # a fruit
        ("a black and white cat and a red chair", "color swapped", ["a black and red cat and a white chair"]),
        ("a cup on the left of a cat", "relation turned", ["a cup on the right of a cat"]),
        ("a cup on the top of a cat", "relation turned", ["a cup on the bottom of a cat"]),
        ("a bee in front of a bag", "relation turned", ["a bee behind a bag"]),
        ("a bee hidden by a bag", "relation turned", ["a bee in front of a bag"]),
        ("a cup near a cat", "relation turned", []),
        ("a cup near a cat", "object dropped", ["a cat", "a cup"]),
        ("three cats", "count changed", ["two cats", "four cats"]),
        ("one mouse", "count changed", ["two mice"]),
        ("two knives and a cup", "count changed", ["one knife and a cup", "three knives and a cup"]),
        ("one red berry", "count changed", ["two red berries"]),
        ("ten dogs", "count changed", ["nine dogs"]),
        ("one of them", "count changed", []),
        ("two sheep", "object exchanged", ["two cows"]),
        ("a dog on a sofa", "object exchanged", ["a rabbit on a sofa", "a dog on a desk"]),
        ("a car and a truck", "object exchanged", ["a bicycle and a truck", "a car and a boat"]),
        ("a boat near an orange", "object exchanged", ["an airplane near an orange", "a boat near a pear"]),
    ],
)
def test_rewordings(prompt, kind, expected):
    assert [negative.prompt for negative in hard_negatives(prompt) if negative.kind == kind] == expected


def test_no_rule_no_negative():
    assert hard_negatives("Love, as seen by the sea.") == []


def test_source_of_negatives():
    """The user's own come first, then the exact ones of the shapes world, then those of the words."""
    own = {"a red circle": [Negative("a ring", "own")], "a red cat": []}
    assert hard_negatives("a red circle", own) == own["a red circle"]
    assert hard_negatives("a red cat", own) == []
    assert hard_negatives("a blue circle", own) == shapes_negatives("a blue circle")
    assert Negative("a green cat and a dog", "color exchanged") in hard_negatives("a red cat and a dog", own)


@pytest.mark.parametrize(
    ("prompt", "kind", "expected"),
    [
        (
            "a red apple and a green bag",
            "one more",
            ["two red apples and a green bag", "a red apple and two green bags"],
        ),
        ("An orange", "one more", ["Two oranges"]),
        ("one mouse on a bed", "one more", ["one mouse on two beds"]),  # two mice are a hard negative
        ("two cats", "one more", []),  # as three cats are
        ("a cat", "object exchanged", ["a rabbit", "a horse", "a sheep"]),  # a dog is a hard negative
        ("two sheep", "object exchanged", ["two pigs", "two elephants", "two giraffes"]),
        ("A cup.", "object added", ["A cup and a plate."]),
        ("a red cat and a dog", "object added", ["a red cat and a dog and a rabbit"]),
        ("a cup near a cat", "object added", []),
        ("a vase", "object added", ["a vase and a mirror"]),
        ("Love, as seen by the sea.", "object added", []),
    ],
)
def test_widenings(prompt, kind, expected):
    assert [negative.prompt for negative in wider_negatives(prompt) if negative.kind == kind] == expected


def test_source_of_wider_negatives():
    """Those of the shapes world, or of the words; none beside the user's own, and none that is a hard one."""
    assert wider_negatives("a red circle") == shapes_wider("a red circle")
    assert wider_negatives("a red circle", {"a red circle": [Negative("a ring", "own")]}) == []
    for prompt in ("a red circle", "one red cat and a dog"):
        hard, wider = ({n.prompt for n in of(prompt)} for of in (hard_negatives, wider_negatives))
        assert wider and not wider & hard


def test_singular_undoes_plural():
    nouns = {*IRREGULAR, *" ".join(OBJECTS).split(), "box", "church", "berry", "glass", "goose", "tie"}
    assert {noun: singular(plural(noun)) for noun in nouns} == {noun: noun for noun in nouns}
    assert plural("box") == "boxes"
    assert plural("berry") == "berries"


@pytest.mark.parametrize(
    ("category", "share"),
    [("color", 0.99), ("shape", 0.99), ("texture", 0.99), ("spatial", 0.99), ("3d_spatial", 0.99), ("numeracy", 0.99),
     ("complex", 0.75), ("non_spatial", 0.4)],
)  # fmt: skip
def test_prompt_lists(category, share):
    """How many of T2I-CompBench's prompts have a negative; each is another prompt, and none comes twice."""
    if not LISTS.is_dir():
        pytest.skip(f"the prompt lists of T2I-CompBench are not in {LISTS}")
    lines = (LISTS / f"{category}_val.txt").read_text(encoding="utf-8").splitlines()
    prompts = [line.split("\t")[0].strip() for line in lines if line.strip()]
    found = {prompt: [negative.prompt for negative in hard_negatives(prompt)] for prompt in prompts}
    for prompt, negatives in found.items():
        assert prompt not in negatives
        assert len(set(negatives)) == len(negatives)
    assert sum(map(bool, found.values())) / len(found) >= share


def test_numbers_stay_in_the_table():
    for i, number in enumerate(NUMBERS):
        noun = "cats" if i else "cat"
        counts = [n.prompt.split()[0] for n in hard_negatives(f"{number} {noun}") if n.kind == "count changed"]
        assert counts == list(NUMBERS[max(0, i - 1) : i] + NUMBERS[i + 1 : i + 2])


def test_own_file(tmp_path):
    file = tmp_path / "negatives.jsonl"
    lines = [{"prompt": "a cat", "negatives": ["a dog", "two cats"]}, {"prompt": "the sea", "negatives": []}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    own = load_negatives(file)
    assert own == {"a cat": [Negative("a dog", "own"), Negative("two cats", "own")], "the sea": []}


GOOD = b'{"prompt": "a cat", "negatives": ["a dog"]}\n'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (GOOD + b"a dog\n", ":2: no JSON"),
        (GOOD + b"\n" + GOOD, ":2: no JSON"),
        (GOOD + GOOD, ":2: 'a cat' stands in an earlier line"),
        (b'["a cat"]\n', ":1: not an object with the keys"),
        (b'{"prompt": "a cat"}\n', ":1: not an object with the keys"),
        (b'{"prompt": "a cat", "negatives": [], "kind": "own"}\n', ":1: not an object with the keys"),
        (b'{"prompt": " ", "negatives": ["a dog"]}\n', ":1: the prompt must be a text"),
        (b'{"prompt": "a cat", "negatives": "a dog"}\n', ":1: the negatives must be a list"),
        (b'{"prompt": "a cat", "negatives": ["a dog", 3]}\n', ":1: the negatives must be a list"),
        (b'{"prompt": "a cat", "negatives": ["a dog", ""]}\n', ":1: the negatives must be a list"),
        (b'{"prompt": "a cat", "negatives": ["a dog", "a dog"]}\n', ":1: 'a cat' has a negative twice"),
        (b'{"prompt": "a cat", "negatives": ["a cat"]}\n', ":1: 'a cat' is among its own negatives"),
        (GOOD + b'{"prompt": "caf\xe9", "negatives": []}\n', ":2: not UTF-8"),
    ],
)
def test_bad_file(tmp_path, content, sentence):
    file = tmp_path / "negatives.jsonl"
    file.write_bytes(content)
    with pytest.raises(MituneError) as caught:
        load_negatives(file)
    assert str(file) in str(caught.value)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_absent_file(tmp_path):
    with pytest.raises(MituneError, match="There is no file"):
        load_negatives(tmp_path / "absent.jsonl")
