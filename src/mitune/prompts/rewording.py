"""Prompts in plain English that differ from a given one in a single respect, by rules on its words.

The rules know a few tables and no grammar: attributes swapped or exchanged, relations turned, other numbers, objects
exchanged or left out. They cover prompts like those of T2I-CompBench; where none applies, there is no other prompt. A
prompt with an object left out says less, where all others say something else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

ATTRIBUTES = {
    "color": "red green blue yellow purple orange brown pink black white gray grey silver gold golden beige",
    "texture": "wooden metallic metal plastic rubber leather fabric glass fluffy stone smooth rough soft hard",
    "shape": "round circular square oval rectangular triangular pentagonal hexagonal octagonal diamond crescent "
    "teardrop oblong cubic spherical cylindrical conical pyramidal",
    "size": "big small large little tall short long thin thick narrow wide huge tiny",
}
TURNED = {
    "on the left of": "on the right of", "on the right of": "on the left of",
    "to the left of": "to the right of", "to the right of": "to the left of",
    "on the top of": "on the bottom of", "on the bottom of": "on the top of",
    "on top of": "underneath", "underneath": "on top of", "beneath": "above",
    "above": "below", "below": "above", "inside": "outside", "outside": "inside",
    "in front of": "behind", "behind": "in front of", "hidden by": "in front of",
}  # fmt: skip
BESIDE = ("next to", "on the side of", "on side of", "beside", "near")  # without an opposite
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Objects are exchanged within a line, for the next that is no kind of what it replaces.
OBJECTS = (
    "man woman boy girl",
    "cat dog rabbit horse sheep cow pig elephant giraffe bear lion mouse bird frog chicken turtle duck fish butterfly",
    "chair table sofa couch desk bed bench lamp candle clock vase mirror television refrigerator microwave",
    "car bicycle bus motorcycle train truck boat airplane",
    "apple banana orange pear peach tomato bread cookie pizza cake",
    "cup plate bottle bowl knife spoon fork",
    "hat bag shirt backpack shoe suitcase dress wallet jacket umbrella",
    "book phone guitar computer camera",
    "flower tree",
    "ball kite balloon",
)
SAME = {
    "grey": "gray", "golden": "gold", "metal": "metallic", "large": "big", "huge": "big", "little": "small",
    "tiny": "small", "circular": "round", "oblong": "oval", "couch": "sofa",
}  # fmt: skip
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "knife": "knives", "leaf": "leaves", "shelf": "shelves", "loaf": "loaves",
    "wolf": "wolves", "bus": "buses", "cookie": "cookies", "sheep": "sheep", "fish": "fish",
    "deer": "deer", "shrimp": "shrimp",
}  # fmt: skip
SINGULAR = {plural: noun for noun, plural in IRREGULAR.items()}

_FAMILY = {word: family for family, words in ATTRIBUTES.items() for word in words.split()}
_KIN = {word: line.split() for line in OBJECTS for word in line.split()}
_ARTICLES = ("a", "an", "the")
_NO_NOUN = {*_ARTICLES, "and", "or", "but", "of", "in", "on", "at", "to", "by", "with", "from", "is", "are", "was"}
_RELATION = re.compile(r"\b(" + "|".join(sorted((*TURNED, *BESIDE), key=len, reverse=True)) + r")\b")
_LONGEST_OBJECT = 5  # words of an object that can be left out
_EXCHANGES = 4  # objects that one is exchanged for, the first of them in `rewordings`


def rewordings(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of every other prompt that the rules find; repeats are possible."""
    yield from _attributes(text)
    yield from _relations(text)
    yield from _numbers(text)
    yield from _left_out(text)
    yield from _objects(text)


def widenings(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of prompts that ask for one more of an object, for further other objects in place of one, or for
    one beside all that is there; repeats are possible."""
    words = _Words(text)
    singulars = [singular(word) for word in words.lower]
    places = [i for i, noun in enumerate(singulars) if noun in _KIN]
    for i in places:
        start = next(j for j in range(i - 1, -2, -1) if j < 0 or words.lower[j] not in _FAMILY)
        if start >= 0 and words.lower[start] in ("a", "an", "one"):
            # The number last: a noun that follows its article at once sets that right for itself.
            yield "one more", words.changed({i: plural(singulars[i]), start: NUMBERS[1]})
        yield from _exchanged(words, i, singulars, slice(1, _EXCHANGES))
    if places and not _RELATION.search(text):
        noun = singulars[places[-1]]
        other = _next(noun, _KIN[noun], singulars)
        body = text.rstrip(".")
        yield "object added", f"{body} and a{'n' if other[0] in 'aeiou' else ''} {other}" + text[len(body) :]


def plural(noun: str) -> str:
    """By the common rules of English and a few exceptions."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun) or noun in ("tomato", "potato"):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def singular(noun: str) -> str:
    """The inverse of `plural`."""
    if noun in SINGULAR:
        return SINGULAR[noun]
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if re.search(r"(ss|x|z|ch|sh|to)es$", noun):
        return noun[:-2]
    return noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else noun


class _Words:
    """The words of a text, and the text again with some of them changed."""

    def __init__(self, text: str) -> None:
        self._pieces = re.split(r"([^\w'’-]+)", text)  # word, what stands between, word, …
        self.lower = [word.lower() for word in self._pieces[::2]]

    def followed_by_word(self, i: int) -> bool:
        """Whether a word that may be a noun comes next, without punctuation between."""
        return i + 1 < len(self.lower) and self._pieces[2 * i + 1] == " " and self.lower[i + 1] not in _NO_NOUN

    def changed(self, changes: Mapping[int, str]) -> str:
        pieces = list(self._pieces)
        for i, word in changes.items():
            pieces[2 * i] = word.capitalize() if pieces[2 * i][:1].isupper() else word
            if i and self.lower[i - 1] in ("a", "an"):
                article = pieces[2 * i - 2]
                pieces[2 * i - 2] = article[0] + ("n" if word[0] in "aeiou" else "")
        return "".join(pieces)


def _attributes(text: str) -> Iterator[tuple[str, str]]:
    words = _Words(text)
    places = [i for i, word in enumerate(words.lower) if word in _FAMILY and words.followed_by_word(i)]
    for i, j in itertools.combinations(places, 2):
        first, second = words.lower[i], words.lower[j]
        if _FAMILY[first] == _FAMILY[second] and _meaning(first) != _meaning(second):
            yield f"{_FAMILY[first]} swapped", words.changed({i: second, j: first})
    for i in places:
        family = _FAMILY[words.lower[i]]
        yield f"{family} exchanged", words.changed({i: _next(words.lower[i], ATTRIBUTES[family].split(), words.lower)})


def _relations(text: str) -> Iterator[tuple[str, str]]:
    for match in _RELATION.finditer(text):
        if match[0] in TURNED:
            yield "relation turned", text[: match.start()] + TURNED[match[0]] + text[match.end() :]


def _numbers(text: str) -> Iterator[tuple[str, str]]:
    words = _Words(text)
    for i, word in enumerate(words.lower):
        if word not in NUMBERS or not words.followed_by_word(i):
            continue
        noun = next((j for j in range(i + 1, len(words.lower)) if words.lower[j] not in _FAMILY), i + 1)
        for count in (NUMBERS.index(word), NUMBERS.index(word) + 2):
            if not 1 <= count <= len(NUMBERS):
                continue
            changes = {i: NUMBERS[count - 1]}
            if word == "one":
                changes[noun] = plural(words.lower[noun])
            elif count == 1:
                changes[noun] = singular(words.lower[noun])
            yield "count changed", words.changed(changes)


def _left_out(text: str) -> Iterator[tuple[str, str]]:
    """Of a list of objects, or of two in a relation, all but one."""
    body = text.rstrip(".")
    relations = _RELATION.findall(body)
    parts = [part.strip() for part in re.split(r",\s*and |,\s*| and ", body)]
    if len(relations) == 1:
        parts = [part.strip() for part in body.split(relations[0])]
    elif relations or len(parts) < 2:
        return
    if all(_is_object(part) for part in parts[:-1]) and _starts_object(parts[-1]):
        for i, part in enumerate(parts):
            if _is_object(part):
                *head, last = parts[:i] + parts[i + 1 :]
                rest = f"{', '.join(head)} and {last}" if head else last
                capital = rest[0].upper() if text[0].isupper() else rest[0]
                yield "object dropped", capital + rest[1:] + text[len(body) :]


def _starts_object(part: str) -> bool:
    first = part.lower().split(" ")[0]
    return first in (*_ARTICLES, *NUMBERS) or first in _FAMILY


def _is_object(part: str) -> bool:
    words = part.lower().split(" ")
    return _starts_object(part) and 1 < len(words) <= _LONGEST_OBJECT and not _NO_NOUN & set(words[1:])


def _objects(text: str) -> Iterator[tuple[str, str]]:
    words = _Words(text)
    singulars = [singular(word) for word in words.lower]
    for i, noun in enumerate(singulars):
        if noun in _KIN:
            yield from _exchanged(words, i, singulars, slice(1))


def _exchanged(words: _Words, i: int, singulars: list[str], which: slice) -> Iterator[tuple[str, str]]:
    """The object at place i exchanged for `which` of those that may take its place."""
    noun = singulars[i]
    several = words.lower[i] != noun or (i > 0 and words.lower[i - 1] in NUMBERS[1:])  # "two sheep"
    for other in _others(noun, _KIN[noun], singulars)[which]:
        yield "object exchanged", words.changed({i: plural(other) if several else other})


def _next(word: str, known: list[str], taken: list[str]) -> str:
    return _others(word, known, taken)[0]


def _others(word: str, known: list[str], taken: list[str]) -> list[str]:
    """Those from `word` on, and round to it again, that say something else than it and all that is taken: a fixed
    order, spread over the table. Where none is left, the one before it."""
    start, meanings = known.index(word), {_meaning(other) for other in (word, *taken)}
    others = [other for other in (*known[start:], *known[:start]) if _meaning(other) not in meanings]
    return others or [known[start - 1]]


def _meaning(word: str) -> str:
    return SAME.get(word, word)
