"""Pictures are read as a viewer shows them, and broken ones are refused by name."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mitune.errors import MituneError
from mitune.files.images import as_shown, on_grid, read_picture

RED, GRAY = (255, 0, 0), (128, 128, 128)


def scene(width=24, height=16):
    """(height, width, 3): a corner that is red, one that is gray, the rest a ramp of blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 2] = np.linspace(0, 200, width).astype(np.uint8)
    pixels[:4, :8] = RED
    pixels[-4:, -8:] = GRAY
    return Image.fromarray(pixels)


def saved(image, file, **options):
    image.save(file, **options)
    return np.asarray(read_picture(file)).astype(int)


class TestAsShown:
    @pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tiff", "a.ppm"])
    def test_plain(self, tmp_path, name):
        assert (saved(scene(), tmp_path / name, **({"lossless": True} if "webp" in name else {})) == scene()).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
    def test_turned(self, tmp_path, name, orientation):
        """EXIF says by which turn the stored picture becomes the one that is meant."""
        turns = [
            None,
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_90,  # of the meant one gives what is stored, to be turned by 270
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_270,
        ]
        turn = turns[orientation - 1]
        stored = scene() if turn is None else scene().transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = saved(stored, tmp_path / name, exif=exif, **({"quality": 95} if name != "a.tiff" else {}))
        assert shown.shape == (16, 24, 3)
        assert abs(shown - np.asarray(scene())).mean() < 12

    @pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
    def test_transparency_is_on_white(self, tmp_path, name):
        colors = scene().convert("RGBA")
        alpha = np.full((16, 24), 255, dtype=np.uint8)
        alpha[:4, :8], alpha[-4:, -8:] = 0, 128
        colors.putalpha(Image.fromarray(alpha))
        shown = saved(colors, tmp_path / name, **({"lossless": True} if "webp" in name else {}))
        assert (shown[:4, :8] == 255).all()
        assert abs(shown[-4:, -8:] - (128 * 128 + 255 * 127) / 255).max() <= 1
        assert (shown[6:10] == np.asarray(scene())[6:10]).all()

    @pytest.mark.parametrize("mode", ["LA", "P", "P, table", "RGB", "L", "1"])
    def test_other_transparency(self, tmp_path, mode):
        """A gray channel beside alpha; a palette with one clear color, or a table; one clear color of RGB and gray."""
        if mode == "LA":
            picture, options = Image.merge("LA", [Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 0)]), {}
        elif mode.startswith("P"):
            picture = Image.new("P", (4, 4), 1)
            picture.putpalette([0, 0, 0, 0, 0, 255])
            options = {"transparency": b"\xff\x00" if "table" in mode else 1}
        else:
            picture = Image.new(mode, (4, 4), 0)
            options = {"transparency": (0, 0, 0) if mode == "RGB" else 0}
        assert (saved(picture, tmp_path / "a.png", **options) == 255).all()

    def test_gif(self, tmp_path):
        """The first frame, and its clear pixels on white."""
        frames = [Image.new("P", (4, 4), index) for index in (1, 0)]
        for frame in frames:
            frame.putpalette([0, 0, 0, 0, 0, 255])
        frames[0].putpixel((0, 0), 0)
        shown = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:], transparency=0)
        assert shown[0, 0].tolist() == [255, 255, 255]
        assert shown[1, 1].tolist() == [0, 0, 255]

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("name", ["a.png", "a.tiff"])
    def test_16_bit_gray(self, tmp_path, name, order):
        values = np.linspace(0, 65535, 24 * 16).round().astype(np.uint16).reshape(16, 24)
        picture = Image.frombytes("I;16" if order == "<" else "I;16B", (24, 16), values.astype(f"{order}u2").tobytes())
        shown = saved(picture if name == "a.tiff" else Image.fromarray(values), tmp_path / name)
        expected = (values / 257).round()[..., None].repeat(3, axis=2)
        assert (shown == expected).all()
        assert (np.asarray(as_shown(Image.fromarray(values.astype(np.int32)))) == expected).all()

    def test_ordinary_gray_and_bilevel(self, tmp_path):
        gray = scene().convert("L")
        assert (saved(gray, tmp_path / "a.png") == np.asarray(gray)[..., None]).all()
        black_and_white = gray.convert("1")
        assert set(saved(black_and_white, tmp_path / "b.png").flatten().tolist()) == {0, 255}

    @pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
    def test_cmyk(self, tmp_path, name):
        """Pillow writes JPEGs of CMYK inverted, as Adobe does."""
        shown = saved(scene().convert("CMYK"), tmp_path / name, **({"quality": 95} if name == "a.jpg" else {}))
        assert abs(shown - np.asarray(scene())).mean() < 6
        assert abs(shown[-2, -2] - GRAY).max() < 8

    @pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX", "RGBa", "La", "PA"])
    def test_other_modes(self, mode):
        way = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode, "RGB")
        shown = as_shown(scene().convert(way).convert(mode))
        wanted = scene().convert("L").convert("RGB") if mode == "La" else scene()
        assert abs(np.asarray(shown).astype(int) - np.asarray(wanted)).mean() < 12

    def test_again_it_changes_nothing(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        colors = scene().convert("RGBA")
        colors.putalpha(100)
        colors.save(tmp_path / "a.png", exif=exif)
        once = read_picture(tmp_path / "a.png")
        assert once.size == (16, 24)
        assert np.array_equal(as_shown(once), once)

    @pytest.mark.parametrize("mode", ["F", "LAB"])
    def test_unknown_whites(self, mode):
        with pytest.raises(MituneError, match=f"Pillow's mode {mode} does not say what is white"):
            as_shown(Image.new(mode, (4, 4)))
        with pytest.raises(MituneError, match="32 bits a pixel does not say what is white"):
            as_shown(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))

    def test_no_pixels(self):
        with pytest.raises(MituneError, match="0 × 4 pixels has none"):
            as_shown(Image.new("RGB", (0, 4)))


def png(width, height):
    """A PNG that says a size, with hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def content(name):
    import io

    buffer = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(buffer, name)
    return buffer.getvalue()


BROKEN = {
    "empty.png": (b"", r"\(it is empty\)"),
    "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "cannot identify"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "cannot identify"),
    "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
    "large.png": (png(12000, 12000), "has more than 89,478,485 pixels; make it smaller"),
    "bomb.png": (png(60000, 60000), "has more than 89,478,485 pixels; make it smaller"),
    "none.png": (png(0, 4), "cannot be read as a picture"),
    "short.png": (png(64, 64), "cannot be read as a picture"),
    **{
        f"cut.{kind}": (content(kind)[:-700], "cannot be read as a pic")
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(BROKEN[name][0])
    with pytest.raises(MituneError, match=BROKEN[name][1]) as caught:
        read_picture(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_garbled_files(tmp_path, kind):
    """Whatever a decoder stumbles over is told in a sentence, or the picture is read."""
    rng, whole = np.random.default_rng(1), content(kind)
    for _ in range(30):
        garbled = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), 6):
            garbled[place] = rng.integers(256)
        (tmp_path / "a").write_bytes(garbled)
        try:
            assert read_picture(tmp_path / "a").mode == "RGB"
        except MituneError as error:
            assert str(tmp_path / "a") in str(error)


class TestSizes:
    def test_grid(self):
        assert on_grid([scene()], 8)[0].size == (24, 16)
        cut = on_grid([scene(31, 17), scene(31, 17)], 8)
        assert [image.size for image in cut] == [(24, 16)] * 2

    @pytest.mark.parametrize("size", [(1, 1), (7, 64), (64, 1)])
    def test_too_small(self, size):
        with pytest.raises(MituneError, match=f"{size[0]} × {size[1]} pixels; the smallest .* has 8 × 8"):
            on_grid([Image.new("RGB", size)], 8)

    def test_unequal(self):
        with pytest.raises(MituneError, match="differ in size"):
            on_grid([scene(), scene(32, 32)], 8)
