"""A short name or module:attribute becomes an object that fits; whatever goes wrong is one sentence with the remedy."""

import sys
from dataclasses import dataclass
from typing import Protocol

import pytest

from mitune.errors import MituneError
from mitune.resolver import Row, Table


class Shape(Protocol):
    corners: int

    def area(self) -> float: ...


class Scaled(Protocol):
    def scale(self, factor: float, origin: float) -> None: ...


@dataclass(frozen=True)
class Square:
    side: float = 1.0
    corners: int = 4

    def area(self) -> float:
        return self.side**2


SHAPES: Table[Shape] = Table(
    "shape",
    Shape,
    {
        "square": Row("four corners", Square()),
        "lazy-square": Row("imported when it is needed", "tests.test_resolver:Square"),
        "absent": Row("never imported", "no.such.module:Thing"),
    },
    may_fit=(Scaled,),
)
MINE = """
class Triangle:
    corners = 3
    def area(self): return 0.5
class Line:
    corners = 2
class Sized(Triangle):
    def __init__(self, size): self.size = size
class shapes:
    triangle = Triangle()
number = 3
class Unknown(Triangle):
    def area(self, unit): return 0.5
class Fixed(Triangle):
    area = 0.5
class Mirrored(Triangle):
    @staticmethod
    def scale(factor): return None
class Growing(Triangle):
    def scale(self, factor, *_, reason="none"): return None
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with a file of one's own, which Python finds there only because the resolver looks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "my_shapes.py").write_text(MINE)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_import.py").write_text("import nothing_of_that_name")
    yield tmp_path
    for name in ("my_shapes", "my_broken", "my_import"):
        sys.modules.pop(name, None)


def test_short_names():
    assert SHAPES.resolve("square").area() == SHAPES.resolve("lazy-square").area() == 1
    assert SHAPES.resolve("lazy-square", 3.0).area() == 9
    assert SHAPES.summaries()["absent"] == "never imported"


@pytest.mark.parametrize("name", ["my_shapes:Triangle", "my_shapes:shapes.triangle"])
def test_a_file_in_the_current_folder(name):
    assert SHAPES.resolve(name).corners == 3


def test_a_file_of_ones_own_hides_no_library(folder):
    (folder / "json.py").write_text("raise RuntimeError")
    assert Table("function", object, {}).resolve("json:dumps")([1]) == "[1]"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sqare", r"Unknown shape 'sqare' \(did you mean square.*\); `mitune list shapes` shows all, and your own is"),
        ("xyz", r"Unknown shape 'xyz'; `mitune list shapes` shows all"),
        ("my_shapes", "Unknown shape 'my_shapes'; .*e.g. mine:my_shape for my_shape in a file mine.py here"),
        ("my_shape:Triangle", r"needs the module my_shape \(there is none in /.* or installed\)"),
        ("absent", r"no\.such\.module:Thing needs the module no\.such\.module \(there is none"),
        ("my_broken:Triangle", r"needs the module my_broken \(ZeroDivisionError: division by zero\)"),
        ("my_import:Triangle", r"my_import \(ModuleNotFoundError: No module named 'nothing_of_that_name'\)"),
        ("my_shapes:Triangel", r"/my_shapes\.py has no Triangel \(did you mean Triangle .*\?\); define it there"),
        ("my_shapes:Line", r"The shape my_shapes:Line lacks area; add what tests\.test_resolver\.Shape asks for"),
        ("my_shapes:Unknown", r"has Unknown\.area\(unit\) \(/.*/my_shapes\.py:13\), which is called with \(\); let it"),
        ("my_shapes:Fixed", r"has area = 0\.5, which is called with \(\); let it take these"),
        ("my_shapes:Mirrored", r"has Mirrored\.scale\(factor\) \(.*\), which is called with \(factor, origin\); let"),
        ("my_shapes:number", "The shape my_shapes:number lacks area, corners; "),
        ("my_shapes:Sized", r"my_shapes:Sized cannot be made \(TypeError: .*'size'\); its class is called with no arg"),
    ],
)
def test_mistakes_are_one_sentence(name, sentence):
    with pytest.raises(MituneError, match=sentence) as caught:
        SHAPES.resolve(name)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_what_takes_the_arguments_fits_whatever_they_are_called():
    assert SHAPES.resolve("my_shapes:Growing").area() == 0.5
    assert SHAPES.fitting("a square", Square(2.0)).area() == 4


def test_a_class_in_place_of_a_protocol():
    table: Table[Square] = Table("square", Square, {})
    assert table.resolve("tests.test_resolver:Square") == Square()
    with pytest.raises(
        MituneError, match="The square my_shapes:number is of the type int; it must be a tests.test_resolver.Square"
    ):
        table.resolve("my_shapes:number")
