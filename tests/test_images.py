"""Decoding against imagededup's own, upright pictures, damaged bytes and bombs."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import imagededup.methods
import numpy as np
import numpy.typing as npt
import pytest
from conftest import encoded, picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from memfilter.config import Config
from memfilter.details import SIDE, content, resized
from memfilter.images import HASH_SIDE, BadImage, Decoded, are_plain, decode, look, thumbnail
from memfilter.records import BAD_CODES, THUMBNAIL_SIDE
from memfilter.signatures import Signer, hasher

MAX_PIXELS = 178_956_970
METHODS = {"phash": "PHash", "dhash": "DHash", "ahash": "AHash", "whash": "WHash"}
BOTH = pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])


def opened(data: bytes, full: bool) -> Decoded:
    return decode(data, full, MAX_PIXELS)


def small(data: bytes, full: bool) -> npt.NDArray[np.int64]:
    return thumbnail(opened(data, full).pixels).astype(np.int64)


def fault(data: bytes, full: bool, max_pixels: int = MAX_PIXELS) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode(data, full, max_pixels)
    assert caught.value.code in BAD_CODES
    return caught.value


@cache
def photos(shard: Path) -> list[bytes]:
    with tarfile.open(shard) as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def real(shared_data: Path) -> list[bytes]:
    return photos(shared_data / "photos" / "00000.tar")


# -- the pixels that imagededup hashes --------------------------------------------------------------------------------

TRANSPARENT = {"RGBA", "LA"}


def form(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in a mode; where that has an alpha channel, with a transparent half."""
    image = image.convert(mode)
    if mode in TRANSPARENT:
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (0, 0, image.width // 2, image.height))
        image.putalpha(alpha)
    return image


FORMS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg-rgb": lambda i: encoded(form(i, "RGB")),
    "jpeg-grey": lambda i: encoded(form(i, "L")),
    "jpeg-cmyk": lambda i: encoded(form(i, "CMYK")),
    "jpeg-progressive": lambda i: encoded(i, progressive=True),
    "jpeg-444": lambda i: encoded(i, subsampling=0),
    "png-rgb": lambda i: encoded(form(i, "RGB"), "PNG"),
    "png-grey": lambda i: encoded(form(i, "L"), "PNG"),
    "png-1-bit": lambda i: encoded(form(i, "1"), "PNG"),
    "png-palette": lambda i: encoded(form(i, "P"), "PNG"),
    "png-palette-with-a-transparent-colour": lambda i: encoded(i.quantize(16), "PNG", transparency=3),
    "png-rgba": lambda i: encoded(form(i, "RGBA"), "PNG"),
    "png-grey-alpha": lambda i: encoded(form(i, "LA"), "PNG"),
    "png-16-bit": lambda i: encoded(sixteen_bit(i), "PNG"),
    "webp": lambda i: encoded(form(i, "RGB"), "WEBP"),
    "webp-rgba": lambda i: encoded(form(i, "RGBA"), "WEBP", lossless=True),
    "gif": lambda i: encoded(form(i, "P"), "GIF"),
    "gif-animated": lambda i: encoded(i, "GIF", save_all=True, append_images=[picture(77), picture(78)]),
    "bmp": lambda i: encoded(form(i, "RGB"), "BMP"),
    "ppm": lambda i: encoded(form(i, "RGB"), "PPM"),
    "tiff": lambda i: encoded(form(i, "RGB"), "TIFF"),
    "tiff-cmyk": lambda i: encoded(form(i, "CMYK"), "TIFF"),
    "mpo": lambda i: encoded(i, "MPO", save_all=True, append_images=[picture(77)]),
}


OWN = ("png-palette-with-a-transparent-colour", "png-rgba", "png-grey-alpha", "png-16-bit", "webp-rgba")
"""Kinds that imagededup drops the alpha channel of or cuts off at 255: their full decode is none of its."""
ITS = [kind for kind in FORMS if kind not in OWN]


def sixteen_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def own_hash(method: str, data: bytes, folder: Path) -> str:
    """Return the hash that imagededup makes of the file itself."""
    path = folder / "image"
    path.write_bytes(data)
    found = getattr(imagededup.methods, METHODS[method])(verbose=False).encode_image(image_file=str(path))
    assert found is not None
    return str(found)


@cache
def signer(method: str, decode: str) -> Signer:
    return Signer(Config.parse({"images": {"hash": method, "decode": decode, "encoder": None}}))


def our_hash(method: str, data: bytes, decode: str = "full") -> str:
    """Return the hash that stands in the signatures."""
    row = {"uid": bytes(16), "index": 0, "key": "0"} | signer(method, decode)._image(data)
    return f"{signer(method, decode).table([row])['hash'][0].as_py():016x}"


@pytest.mark.parametrize("method", METHODS)
def test_a_fast_decode_has_the_bits_that_imagededup_gives_its_pixels(method: str, real: list[bytes]) -> None:
    for data in real[::4]:
        pixels = decode(data, False, MAX_PIXELS, colour=SIDE).pixels
        given = thumbnail(pixels) if method == "phash" else pixels
        assert our_hash(method, data, "fast") == hasher(method).encode_image(image_array=given)


@pytest.mark.parametrize("kind", ITS)
@pytest.mark.parametrize("method", METHODS)
def test_a_full_decode_has_imagededups_own_hash_bits(method: str, kind: str, tmp_path: Path) -> None:
    for seed in range(2):
        data = FORMS[kind](picture(seed, 131 + 60 * seed, 97))
        assert our_hash(method, data) == own_hash(method, data, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_decode_of_a_photo_has_imagededups_own_hash_bits(method: str, real: list[bytes], tmp_path: Path) -> None:
    for data in real[::4]:
        assert our_hash(method, data) == own_hash(method, data, tmp_path)


@pytest.mark.parametrize("kind", ITS)
def test_a_full_decode_of_a_photo_in_any_form_has_imagededups_own_hash_bits(
    kind: str, real: list[bytes], tmp_path: Path
) -> None:
    photo = Image.open(io.BytesIO(real[0])).convert("RGB")
    data = FORMS[kind](photo.resize((photo.width // 2, photo.height // 2)))
    for method in METHODS:
        assert our_hash(method, data) == own_hash(method, data, tmp_path)


@pytest.mark.parametrize("kind", FORMS)
def test_both_decodes_report_the_size_of_the_file_and_show_the_same_picture(kind: str) -> None:
    data = FORMS[kind](picture(3, 500, 301))
    fast, full = opened(data, full=False), opened(data, full=True)
    assert (fast.width, fast.height) == (full.width, full.height) == (500, 301)
    assert full.pixels.shape == (301, 500, 3)
    assert fast.pixels.ndim == 2
    assert min(fast.pixels.shape) >= HASH_SIDE
    assert fast.pixels.dtype == full.pixels.dtype == np.uint8
    assert np.abs(small(data, full=False) - small(data, full=True)).mean() < 2


@pytest.mark.parametrize("kind", ["jpeg-rgb", "jpeg-grey", "jpeg-cmyk", "jpeg-progressive", "mpo"])
def test_a_fast_decode_of_a_large_jpeg_stops_at_the_size_that_its_comparison_needs(kind: str) -> None:
    data = FORMS[kind](picture(4, 800, 600))
    for side in (HASH_SIDE, 64, 100):
        assert side <= min(decode(data, False, MAX_PIXELS, side).pixels.shape) <= 3 * side


@pytest.mark.parametrize(("side", "within_four_bits"), [(HASH_SIDE, 90), (64, 99)])
def test_a_fast_decode_hardly_moves_the_perceptual_hash_of_a_photo(
    side: int, within_four_bits: int, real: list[bytes]
) -> None:
    phash = hasher("phash")

    def bits(data: bytes) -> int:
        fast = thumbnail(decode(data, False, MAX_PIXELS, side).pixels)
        full = opened(data, full=True).pixels
        return (
            int(phash.encode_image(image_array=fast), 16) ^ int(phash.encode_image(image_array=full), 16)
        ).bit_count()

    moved = [bits(data) for data in real]
    assert len(moved) == 100
    assert sum(m <= 4 for m in moved) >= within_four_bits
    assert max(moved) <= 8


def test_a_fast_decode_of_a_16_bit_png_shows_the_picture_of_its_8_bit_form() -> None:
    grey = picture(5).convert("L")
    eight, sixteen = encoded(grey, "PNG"), encoded(sixteen_bit(grey), "PNG")
    assert np.abs(small(sixteen, full=False) - small(eight, full=False)).max() <= 1


@BOTH
def test_an_animated_gif_shows_its_first_frame(full: bool) -> None:
    first, later = picture(6).quantize(64), [picture(seed).quantize(64) for seed in (7, 8)]
    animated = encoded(first, "GIF", save_all=True, append_images=later, duration=40)
    np.testing.assert_array_equal(small(animated, full), small(encoded(first, "GIF"), full))


# -- upright ----------------------------------------------------------------------------------------------------------

T = Image.Transpose
# of each EXIF orientation, what turns the upright picture into the stored one
STORED = {
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}
LOSSLESS: dict[str, dict[str, object]] = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def stored(upright: Image.Image, orientation: int, format: str, **options: object) -> bytes:
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(upright if turn is None else upright.transpose(turn), format, exif=exif, **options)


@BOTH
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", LOSSLESS)
def test_a_turned_picture_is_the_upright_one(format: str, orientation: int, full: bool) -> None:
    upright = picture(9, 144, 96)
    data = stored(upright, orientation, format, **LOSSLESS[format])
    decoded = opened(data, full)
    assert (decoded.width, decoded.height) == (144, 96)
    np.testing.assert_array_equal(small(data, full), small(encoded(upright, "PNG"), full))


@BOTH
@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_jpeg_is_the_upright_one(orientation: int, full: bool) -> None:
    upright = picture(9, 640, 480)
    data = stored(upright, orientation, "JPEG")
    decoded = opened(data, full)
    assert (decoded.width, decoded.height) == (640, 480)
    # another block order compresses a little differently; a wrong turn differs by tens of grey levels
    assert np.abs(small(data, full) - small(encoded(upright), full)).mean() < 1.5


@pytest.mark.parametrize("orientation", [o for o in STORED if o != 1])
def test_turns_of_the_picture_used_here_are_unlike_one_another(orientation: int) -> None:
    upright = picture(9, 96, 96)
    turned = upright.transpose(STORED[orientation])
    assert np.abs(small(encoded(upright), full=True) - small(encoded(turned), full=True)).mean() > 20


@BOTH
@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int, full: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    decoded = opened(encoded(picture(9, 144, 96), exif=exif), full)
    assert (decoded.width, decoded.height) == (144, 96)


# -- damaged and hostile bytes ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["jpeg-rgb", "jpeg-progressive", "jpeg-cmyk", "png-rgb", "png-palette", "webp", "gif"])
def test_a_truncated_image_is_unreadable(kind: str, share: float, full: bool) -> None:
    data = FORMS[kind](picture(10, 320, 240))
    assert opened(data, full).width == 320
    assert fault(data[: int(share * len(data))], full).code == "unreadable_image"


@BOTH
@pytest.mark.parametrize("missing", [1, 2, 30])
def test_a_jpeg_that_misses_its_last_bytes_is_unreadable(missing: int, full: bool) -> None:
    assert fault(encoded(picture(10, 320, 240))[:-missing], full).code == "unreadable_image"


@BOTH
def test_a_truncated_photo_is_unreadable(real: list[bytes], full: bool) -> None:
    assert {fault(data[: len(data) // 2], full).code for data in real[:20]} == {"unreadable_image"}


@BOTH
def test_no_bytes_are_an_empty_image(full: bool) -> None:
    found = fault(b"", full)
    assert (found.code, found.detail) == ("empty_image", "the image member has 0 bytes")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
GARBAGE = {
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "svg": SVG,
    "zeros": bytes(4096),
    "random": np.random.default_rng(0).bytes(4096),
    "random-behind-a-jpeg-marker": b"\xff\xd8\xff" + np.random.default_rng(1).bytes(4096),
    "random-behind-a-png-marker": b"\x89PNG\r\n\x1a\n" + np.random.default_rng(2).bytes(4096),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "one-byte": b"\xff",
}


@BOTH
@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_image_is_unreadable_for_a_cause_that_is_the_same_in_every_run(kind: str, full: bool) -> None:
    found = fault(GARBAGE[kind], full)
    assert found.code == "unreadable_image"
    assert found.detail
    assert " at 0x" not in found.detail
    assert "\n" not in found.detail
    assert "KeyError" not in found.detail  # a defect of the decoder, not of the bytes


def damaged(data: bytes, places: list[tuple[float, int]]) -> bytes:
    """Return the bytes with these values at these places, 0 the first and 1 the last."""
    changed = bytearray(data)
    for place, value in places:
        changed[int(place * (len(data) - 1))] = value
    return bytes(changed)


def assert_is_an_image_or_a_bad_one(data: bytes, full: bool) -> None:
    try:
        decoded = decode(data, full, 10_000_000)
    except BadImage as e:
        bad = e
    else:
        assert decoded.width * decoded.height <= 10_000_000
        assert thumbnail(decoded.pixels).shape == (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        return
    assert bad.code in ("unreadable_image", "too_many_pixels")
    assert " at 0x" not in bad.detail


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["jpeg-rgb", "jpeg-grey", "png-palette", "gif", "webp", "tiff"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    full=st.booleans(),
)
def test_damage_anywhere_gives_an_image_or_a_bad_one_and_no_other_error(
    kind: str, places: list[tuple[float, int]], full: bool
) -> None:
    assert_is_an_image_or_a_bad_one(damaged(FORMS[kind](picture(11, 64, 48)), places), full)


@settings(max_examples=150, deadline=None)
@given(
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    full=st.booleans(),
)
@example([(0.02, 0)], False)
def test_damage_to_the_metadata_of_a_jpeg_gives_an_image_or_a_bad_one_and_no_other_error(
    places: list[tuple[float, int]], full: bool
) -> None:
    data = stored(picture(11, 64, 48), 6, "JPEG")
    metadata = data.index(b"Exif") + 60
    assert_is_an_image_or_a_bad_one(damaged(data[:metadata], places) + data[metadata:], full)


@BOTH
@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 14])
def test_a_jpeg_whose_metadata_are_cut_short_is_an_image_or_a_bad_one(length: int, full: bool) -> None:
    plain = encoded(picture(11, 64, 48))
    body = (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03")[: 6 + length]
    assert_is_an_image_or_a_bad_one(plain[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body + plain[2:], full)


def png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG with this header and hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def jpeg(width: int, height: int) -> bytes:
    """Return a small JPEG whose header claims this size."""
    data = encoded(picture(0))
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def gif(width: int, height: int) -> bytes:
    data = encoded(picture(0).quantize(16), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def bmp(width: int, height: int) -> bytes:
    data = encoded(picture(0), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


@BOTH
@pytest.mark.parametrize("claim", [png, jpeg, gif, bmp])
def test_a_header_that_claims_3_600_000_000_pixels_is_refused_before_they_are_decoded(
    claim: Callable[[int, int], bytes], full: bool
) -> None:
    data = claim(60_000, 60_000)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = fault(data, full)
    assert found.code == "too_many_pixels"
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB; the pixels are 10 GB


@BOTH
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_max_pixels_is_the_largest_number_of_pixels_that_is_decoded(format: str, full: bool) -> None:
    data = encoded(picture(12, 100, 80), format)
    assert decode(data, full, 8000).width == 100
    found = fault(data, full, 7999)
    assert (found.code, found.detail) == ("too_many_pixels", "100x80 is over input.max_pixels = 7,999")


def grey_tiff(width: int, height: int, data: bytes, **more: int) -> bytes:
    """Return a grey TIFF with deflated data, in tiles if their sides are given as `t322` and `t323`."""
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1} | {int(k[1:]): v for k, v in more.items()}
    tags |= {324: -1, 325: len(data)} if "t322" in more else {273: -1, 278: height, 279: len(data)}
    place = 10 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", t, 4, 1, place if v < 0 else v) for t, v in sorted(tags.items())]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


@BOTH
def test_a_tile_of_a_tiff_counts_as_the_pixels_that_it_decodes_to(full: bool) -> None:
    data = zlib.compress(bytes(4096))
    assert opened(grey_tiff(64, 64, data, t322=64, t323=64), full).width == 64
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = fault(grey_tiff(64, 64, zlib.compress(bytes(2**20)), t322=2**15, t323=2**15), full)
    assert (found.code, found.detail) == ("too_many_pixels", "32768x32768 is over input.max_pixels = 178,956,970")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB; the tile is 1 GB


@BOTH
def test_a_damaged_tiff_prints_nothing(full: bool, capfd: pytest.CaptureFixture[str]) -> None:
    packed = zlib.compress(bytes(4096))[:20]
    assert fault(grey_tiff(512, 512, packed, t322=512, t323=512), full).code == "unreadable_image"
    assert capfd.readouterr() == ("", "")


def test_a_tiff_is_decoded_where_standard_error_is_closed() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); from test_images import *; "
    code += "print(opened(grey_tiff(64, 64, zlib.compress(bytes(4096))), False).width)"
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.stdout, done.returncode) == ("64\n", 0)


def bmp_by_run_lengths(width: int, height: int, body: bytes) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 256)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + info + bytes(range(256)) * 4 + body


SLOW = {
    "bmp": lambda side: bmp_by_run_lengths(side, side, b"\x01\x05\0\0" * side + b"\0\x01"),
    "plain-ppm": lambda side: b"P2\n%d %d\n255\n" % (side, side) + b"7 " * side**2,
    "ppm-of-100-levels": lambda side: b"P5\n%d %d\n99\n" % (side, side) + bytes(side**2),
}


@BOTH
@pytest.mark.parametrize("kind", SLOW)
def test_what_pillow_decodes_in_python_is_held_to_fewer_pixels(kind: str, full: bool) -> None:
    assert opened(SLOW[kind](50), full).width == 50
    start = time.perf_counter()
    found = fault(SLOW[kind](4100), full)
    assert found.code == "too_many_pixels"
    assert "4100x4100 is over the 16,777,216 that are decoded of" in found.detail
    assert time.perf_counter() - start < 1


@BOTH
def test_a_jpeg_of_a_thousand_scans_is_refused_before_they_are_decoded(full: bool) -> None:
    data = encoded(picture(0, 2000, 1500), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert opened(data[:-2] + scan * 20 + data[-2:], full).width == 2000
    start = time.perf_counter()
    found = fault(data[:-2] + scan * 1000 + data[-2:], full)
    assert (found.code, found.detail) == (
        "unreadable_image",
        "the JPEG has more than 100 scans, each over all its pixels",
    )
    assert time.perf_counter() - start < 1


@BOTH
@pytest.mark.parametrize("where", ["behind", "metadata"])
def test_only_the_scans_of_the_jpeg_itself_are_counted(where: str, full: bool) -> None:
    data, noise = encoded(picture(0)), b"\xff\xda" * 1000
    segment = b"\xff\xe5" + struct.pack(">H", 2 + len(noise)) + noise
    assert opened(data + noise if where == "behind" else data[:2] + segment + data[2:], full).width == 96


OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, "tests")
from test_images import decode, png
data = png(13_000, 13_000)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 100 * 2**20,) * 2)
try:
    decode(data, sys.argv[1] == "True", 178_956_970)
except MemoryError:
    print("out of memory")
"""


@BOTH
def test_that_memory_is_short_is_no_fault_of_the_image(full: bool) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(full)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("out of memory\n", 0), done.stderr


# -- odd sizes --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (30_000, 1), (1, 30_000), (7, 5000)])
def test_an_image_of_any_shape_has_a_thumbnail_and_hashes(size: tuple[int, int], format: str, full: bool) -> None:
    decoded = opened(encoded(picture(13).resize(size), format), full)
    assert (decoded.width, decoded.height) == size
    assert thumbnail(decoded.pixels).shape == (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    for method in METHODS:
        assert 0 <= int(hasher(method).encode_image(image_array=decoded.pixels), 16) < 2**64


@pytest.mark.parametrize("side", [1, 8, 32, 64])
def test_a_thumbnail_of_grey_pixels_equals_that_of_the_same_in_rgb(side: int) -> None:
    grey = np.asarray(picture(14, 300, 200).convert("L"))
    np.testing.assert_array_equal(thumbnail(grey, side), thumbnail(np.repeat(grey[:, :, None], 3, axis=2), side))


# -- blank ------------------------------------------------------------------------------------------------------------

Thumbnail = npt.NDArray[np.uint8]


def flat(level: int) -> Thumbnail:
    return np.full((32, 32), level, np.uint8)


def noise(deviation: float, level: int = 128) -> Thumbnail:
    random = np.random.default_rng(0)
    return np.clip(level + deviation * random.standard_normal((32, 32)), 0, 255).astype(np.uint8)


def is_blank(small: Thumbnail) -> bool:
    return content(resized(np.repeat(small[:, :, None], 3, axis=2), SIDE)) is None


def specks(count: int) -> Thumbnail:
    image = flat(255)
    image.ravel()[np.random.default_rng(1).choice(1024, count, replace=False)] = 0
    return image


@pytest.mark.parametrize("small", [flat(0), flat(128), flat(255), noise(0.5), noise(2)])
def test_flat_and_near_flat_images_are_blank(small: Thumbnail) -> None:
    assert is_blank(small)


@pytest.mark.parametrize(
    "small",
    [noise(10), noise(60), specks(1), specks(40), specks(512), np.arange(1024).reshape(32, 32).astype(np.uint8)],
)
def test_noise_and_gradients_are_not_blank(small: Thumbnail) -> None:
    assert not is_blank(small)


def test_neither_pictures_nor_a_placeholder_are_blank() -> None:
    assert not any(is_blank(thumbnail(np.asarray(picture(seed)))) for seed in range(50))
    placeholder = Image.new("RGB", (400, 400), "white")
    ImageDraw.Draw(placeholder).text((150, 190), "image not available", fill="black")
    assert not is_blank(thumbnail(np.asarray(placeholder)))


def test_photos_are_not_blank(real: list[bytes]) -> None:
    assert sum(is_blank(thumbnail(opened(data, full=False).pixels)) for data in real) == 0


# -- plain ------------------------------------------------------------------------------------------------------------


def lettering(ground: int, ink: int, side: int) -> Thumbnail:
    image = Image.new("L", (side, side), ground)
    draw = ImageDraw.Draw(image)
    draw.rectangle((4, 4, side - 5, side - 5), outline=ink, width=2)
    draw.text((side // 8, side // 2), "IMAGE NOT AVAILABLE", fill=ink, font_size=side // 14)
    return thumbnail(np.asarray(image))


@pytest.mark.parametrize(("ground", "ink"), [(255, 120), (238, 150), (0, 255), (200, 60)])
@pytest.mark.parametrize("side", [150, 300, 500])
def test_lettering_on_one_ground_is_plain(ground: int, ink: int, side: int) -> None:
    plain = are_plain(np.stack([lettering(ground, ink, side), flat(3), noise(60)]))
    assert plain.tolist() == [True, True, False]


def test_pictures_and_nearly_all_photos_are_not_plain(real: list[bytes]) -> None:
    assert not are_plain(np.stack([thumbnail(np.asarray(picture(seed))) for seed in range(50)])).any()
    photos = np.stack([thumbnail(opened(data, full=False).pixels) for data in real])
    assert are_plain(photos).mean() <= 0.02


def test_a_look_holds_the_mean_levels_of_its_cells() -> None:
    small = np.kron(np.arange(64).reshape(8, 8), np.ones((4, 4))).astype(np.uint8)
    small[0, 0] = 16  # one pixel of the first cell's sixteen
    assert look(small, np.full((4, 4, 3), [0, 0, 255], np.uint8)) == bytes([1, *range(1, 64), 255, 107])
