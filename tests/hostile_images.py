"""Images that are malformed or odd, by kind: bytes, the outcome expected of them, and the suffix they go by."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from conftest import encoded, picture
from hostile import MAX_BYTES, SAMPLES, Planted, Random, between, cut, of_files, one_of, photo, seed_of
from PIL import Image

Maker = Callable[[Random], bytes]

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}


def image_kind(outcome: str, suffix: str = "jpg", name: str = "") -> Callable[[Maker], Maker]:
    """Enter a maker of images as a kind of samples that have this outcome."""

    def enter(make: Maker) -> Maker:
        def plant(random: Random, key: str) -> Planted:
            return of_files(
                key, {suffix: make(random), "txt": f"an image of {key} {seed_of(random)}".encode()}, outcome
            )

        SAMPLES[name or make.__name__] = plant
        return make

    return enter


# -- damaged ----------------------------------------------------------------------------------------------------------

for _suffix, _format in FORMATS.items():

    def _cut_image(random: Random, format: str = _format) -> bytes:
        return cut(random, photo(random, format))

    image_kind("unreadable_image", _suffix, f"{_suffix}_cut")(_cut_image)


@image_kind("unreadable_image")
def progressive_jpeg_cut(random: Random) -> bytes:
    return cut(random, photo(random, progressive=True))


@image_kind("empty_image")
def image_empty(random: Random) -> bytes:
    return b""


@image_kind("unreadable_image")
def image_of_few_bytes(random: Random) -> bytes:
    return photo(random, one_of(random, list(FORMATS.values())))[: between(random, 1, 11)]


@image_kind("unreadable_image")
def image_is_text(random: Random) -> bytes:
    return b"no image, but text. " * between(random, 1, 500)


@image_kind("unreadable_image")
def image_is_an_html_error_page(random: Random) -> bytes:
    status = between(random, 400, 599)
    return f"<!DOCTYPE html>\n<html><head><title>{status}</title></head><body>Error {status}</body></html>".encode()


@image_kind("unreadable_image")
def image_is_json(random: Random) -> bytes:
    return json.dumps({"error": {"code": between(random, 400, 599), "message": "AccessDenied"}}).encode()


@image_kind("unreadable_image", "png")
def image_is_svg(random: Random) -> bytes:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{between(random, 1, 999)}"><!ENTITY a "&a;&a;"></svg>'.encode()
    )


@image_kind("unreadable_image")
def image_is_noise(random: Random) -> bytes:
    return b"\x00" + random.bytes(between(random, 1, 5000))


@image_kind("unreadable_image")
def image_is_noise_behind_a_signature(random: Random) -> bytes:
    signatures = (
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0\0\x02\xff\xc0",
        b"RIFF\xff\0\0\0WEBPVP8 ",
        b"II*\0\x08\0\0\0\xff\xff",
    )
    return bytes(one_of(random, signatures)) + random.bytes(between(random, 20, 3000))


@image_kind("unreadable_image")
def image_of_a_format_that_is_not_read(random: Random) -> bytes:
    if random.random() < 0.5:
        return encoded(picture(seed_of(random), 64, 64), one_of(random, ["ICO", "TGA", "PCX", "SGI", "DDS", "PDF"]))
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(a) run\n" * between(random, 1, 20)


@image_kind("unreadable_image")
def jpeg_with_bogus_huffman_tables(random: Random) -> bytes:
    data = photo(random)
    table = data.index(b"\xff\xc4") + 5
    return data[:table] + bytes([between(random, 200, 255)]) * 16 + data[table + 16 :]


@image_kind("unreadable_image")
def jpeg_of_an_unsupported_process(random: Random) -> bytes:
    data = photo(random)
    frame = data.index(b"\xff\xc0")
    return data[: frame + 1] + bytes([one_of(random, [0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF])]) + data[frame + 2 :]


@image_kind("good|unreadable_image")  # as libjpeg was built; any bytes are an arithmetic code of something
def jpeg_arithmetic_coded(random: Random) -> bytes:
    data = photo(random)
    frame = data.index(b"\xff\xc0")
    return data[: frame + 1] + b"\xc9" + data[frame + 2 :]


def readable_by_pillow(data: bytes) -> bool:
    """Tell what Pillow itself makes of an image."""
    try:
        Image.open(io.BytesIO(data), formats=list(FORMATS.values())).load()
    except Exception:
        return False
    return True


def jpeg_with_flipped_bytes(random: Random, key: str) -> Planted:
    data = bytearray(photo(random, progressive=bool(random.random() < 0.3)))
    for _ in range(between(random, 1, 4)):
        data[between(random, data.index(b"\xff\xda"), len(data) - 3)] = between(random, 0, 255)
    outcome = "good" if readable_by_pillow(bytes(data)) else "unreadable_image"
    return of_files(key, {"jpg": bytes(data), "txt": f"flipped {key}".encode()}, outcome)


SAMPLES["jpeg_with_flipped_bytes"] = jpeg_with_flipped_bytes


# -- two things at once -----------------------------------------------------------------------------------------------


@image_kind("good")
def jpeg_and_zip(random: Random) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("inner.txt", random.bytes(between(random, 1, 900)))
    return photo(random) + packed.getvalue()


@image_kind("good", "gif")
def gif_and_script(random: Random) -> bytes:
    return photo(random, "GIF") + b"*/=1;alert(%d);//" % between(random, 0, 9999)


@image_kind("unreadable_image")
def html_before_a_jpeg(random: Random) -> bytes:
    return b"<html><script>alert(%d)</script>" % between(random, 0, 9999) + photo(random)


@image_kind("good")
def image_with_trailing_garbage(random: Random) -> bytes:
    return photo(random, one_of(random, ["JPEG", "PNG"])) + random.bytes(between(random, 1, 5000))


@image_kind("good")
def jpeg_behind_a_jpeg(random: Random) -> bytes:
    return photo(random) + photo(random) * between(random, 1, 3)


# -- bombs ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge(random: Random, limit: int) -> tuple[int, int]:
    """Return width and height of more than 179 million pixels, each up to the limit."""
    width = between(random, 200_000_000 // limit, limit)
    return width, between(random, 200_000_000 // width, limit)


@image_kind("too_many_pixels", "png")
def png_bomb(random: Random) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *huge(random, 100_000), 8, one_of(random, [0, 2, 6]), 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")


@image_kind("too_many_pixels")
def jpeg_bomb(random: Random) -> bytes:
    data = photo(random, progressive=bool(random.random() < 0.5))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: frame + 5] + struct.pack(">HH", *huge(random, 65_000)) + data[frame + 9 :]


@image_kind("too_many_pixels", "gif")
def gif_bomb(random: Random) -> bytes:
    data = photo(random, "GIF")
    return data[:6] + struct.pack("<HH", *huge(random, 65_000)) + data[10:]


@image_kind("too_many_pixels", "bmp")
def bmp_bomb(random: Random) -> bytes:
    data = photo(random, "BMP")
    return data[:18] + struct.pack("<ii", *huge(random, 100_000)) + data[26:]


@image_kind("too_many_pixels", "webp")
def webp_bomb(random: Random) -> bytes:
    data = photo(random, "WEBP", lossless=True)
    width, height = huge(random, 16_383)
    return data[:21] + struct.pack("<I", (width - 1) | (height - 1) << 14) + data[25:]


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes) -> bytes:
    """Return a TIFF with these tags (type, count, value) and its data; the value -1 is the data's place."""
    place = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", t, k, n, place if v < 0 else v) for t, (k, n, v) in sorted(tags.items())]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


def grey_tiff(width: int, height: int, compression: int = 1) -> dict[int, tuple[int, int, int]]:
    """Return the tags of a grey TIFF, but for where its data are."""
    short = {258: 8, 259: compression, 262: 1, 277: 1}
    return {256: (4, 1, width), 257: (4, 1, height), **{tag: (3, 1, value) for tag, value in short.items()}}


@image_kind("too_many_pixels", "tiff")
def tiff_bomb(random: Random) -> bytes:
    width, height = huge(random, 100_000)
    return tiff({**grey_tiff(width, height), 273: (4, 1, -1), 278: (4, 1, height), 279: (4, 1, 9999)}, bytes(9999))


@image_kind("too_many_pixels", "tiff")
def tiff_of_one_huge_tile(random: Random) -> bytes:
    data = zlib.compress(bytes(100_000))
    side = 16 * between(random, 1000, 2000)
    tile = {322: (4, 1, side), 323: (4, 1, side), 324: (4, 1, -1), 325: (4, 1, len(data))}
    return tiff({**grey_tiff(64, between(random, 60, 99), 8), **tile}, data)


def bmp_rle(width: int, height: int, body: bytes) -> bytes:
    """Return a run-length coded BMP of 256 greys."""
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 256)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + info + palette + body


@image_kind("too_many_pixels", "bmp")
def bmp_bomb_by_run_lengths(random: Random) -> bytes:
    height = between(random, 5000, 13_000)
    return bmp_rle(between(random, 5000, 13_000), height, b"\x01\x05\0\0" * height + b"\0\x01")


@image_kind("good", "bmp")
def bmp_by_run_lengths(random: Random) -> bytes:
    rows = random.integers(1, 255, (between(random, 30, 60), 40))
    return bmp_rle(
        40, len(rows), b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in rows.tolist()) + b"\0\x01"
    )


@image_kind("too_many_pixels", "ppm")
def ppm_of_many_words(random: Random) -> bytes:
    return b"P%d\n%d 9000\n255\n" % (one_of(random, [2, 3]), between(random, 5000, 9000)) + b"7 " * 9999


@image_kind("unreadable_image")
def jpeg_of_a_thousand_scans(random: Random) -> bytes:
    data = encoded(picture(seed_of(random), 800, 600), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * between(random, 200, 2000) + data[-2:]


@image_kind("good")
def jpeg_with_a_thousand_scans_behind_it(random: Random) -> bytes:
    return photo(random) + b"\xff\xda" * between(random, 200, 2000)


for _kind, _head in {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}.items():

    def _text_bomb(random: Random, kind: bytes = _kind, head: bytes = _head) -> bytes:
        data = photo(random, "PNG")
        return data[:33] + chunk(kind, head + zlib.compress(bytes(between(random, 2, 24) << 20))) + data[33:]

    image_kind("unreadable_image", "png", f"png_{_kind.decode()}_bomb")(_text_bomb)


@image_kind("good", "png")
def png_with_much_text(random: Random) -> bytes:
    data = photo(random, "PNG")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(between(random, 9, 999_999))))
    return data[:33] + chunk(b"tEXt", b"Comment\0" + random.bytes(99)) * between(random, 1, 500) + text + data[33:]


def image_over_max_bytes(random: Random, key: str) -> Planted:
    data = photo(random, "PNG") + bytes(MAX_BYTES + between(random, 0, 99_999))
    return of_files(key, {"png": data, "txt": b"a large image"}, "too_many_bytes")


SAMPLES["image_over_max_bytes"] = image_over_max_bytes


# -- odd, and good ----------------------------------------------------------------------------------------------------


def in_mode(random: Random, mode: str) -> Image.Image:
    """Return a picture in a mode; where that has an alpha channel, with a transparent part."""
    image = picture(seed_of(random), between(random, 60, 99), between(random, 60, 99)).convert(mode)
    if mode in ("RGBA", "LA"):
        alpha = Image.new("L", image.size, 255)
        alpha.paste(between(random, 0, 200), (0, 0, image.width // 2, image.height))
        image.putalpha(alpha)
    return image


ODD: dict[str, tuple[str, Maker]] = {
    "jpeg_cmyk": ("jpg", lambda r: encoded(in_mode(r, "CMYK"))),
    "jpeg_grey": ("jpg", lambda r: encoded(in_mode(r, "L"))),
    "jpeg_progressive": ("jpg", lambda r: photo(r, progressive=True)),
    "png_16_bit": ("png", lambda r: encoded(sixteen_bit(r), "PNG")),
    "png_palette": ("png", lambda r: encoded(in_mode(r, "P"), "PNG", transparency=between(r, 0, 9))),
    "png_alpha": ("png", lambda r: encoded(in_mode(r, "RGBA"), "PNG")),
    "png_grey_and_alpha": ("png", lambda r: encoded(in_mode(r, "LA"), "PNG")),
    "png_1_bit": ("png", lambda r: encoded(in_mode(r, "1"), "PNG")),
    "png_animated": ("png", lambda r: animated(r, "PNG", "RGB")),
    "gif_animated": ("gif", lambda r: animated(r, "GIF", "P")),
    "webp_animated": ("webp", lambda r: animated(r, "WEBP", "RGB")),
    "webp_alpha": ("webp", lambda r: encoded(in_mode(r, "RGBA"), "WEBP")),
    "png_palette_of_alphas": (
        "png",
        lambda r: encoded(in_mode(r, "P"), "PNG", transparency=r.bytes(between(r, 2, 256))),
    ),
    "png_colour_key": ("png", lambda r: encoded(in_mode(r, "RGB"), "PNG", transparency=(1, 2, 3))),
    "tiff_float": ("tiff", lambda r: encoded(in_mode(r, "F"), "TIFF")),
    "tiff_float_not_a_number": ("tiff", lambda r: encoded(no_numbers(r), "TIFF")),
    "tiff_int32": ("tiff", lambda r: encoded(Image.fromarray(r.integers(-(2**31), 2**31, (50, 60), np.int32)), "TIFF")),
    "tiff_lab": ("tif", lambda r: encoded(lab(r), "TIFF", compression=one_of(r, [None, "tiff_lzw", "tiff_deflate"]))),
    "tiff_cmyk": ("tif", lambda r: encoded(in_mode(r, "CMYK"), "TIFF", compression="tiff_lzw")),
    "mpo": ("jpg", lambda r: animated(r, "MPO", "RGB")),
    "image_1x1": ("png", lambda r: sized(r, 1, 1)),
    "image_30000x1": ("png", lambda r: sized(r, 30_000, between(r, 1, 3))),
    "image_1x30000": ("png", lambda r: sized(r, between(r, 1, 3), 30_000)),
    "image_of_one_colour": (
        "png",
        lambda r: encoded(Image.new("RGB", (70, 70), tuple(r.integers(0, 256, 3).tolist())), "PNG"),
    ),
}


def animated(random: Random, format: str, mode: str) -> bytes:
    first, *more = (picture(seed_of(random), 64, 64).convert(mode) for _ in range(between(random, 2, 4)))
    return encoded(first, format, save_all=True, append_images=more)


def sixteen_bit(random: Random) -> Image.Image:
    return Image.fromarray(np.asarray(in_mode(random, "L")).astype(np.uint16) * between(random, 200, 257))


def lab(random: Random) -> Image.Image:
    image = in_mode(random, "RGB")
    return Image.frombytes("LAB", image.size, image.tobytes())


def no_numbers(random: Random) -> Image.Image:
    noise = np.frombuffer(random.bytes(4 * 50 * 60), np.float32).reshape(50, 60)  # one in 256 is NaN
    return Image.fromarray(np.where(random.random((50, 60)) < 0.1, np.float32(np.inf), noise))


def sized(random: Random, width: int, height: int) -> bytes:
    return encoded(picture(seed_of(random)).resize((width, height)), one_of(random, ["PNG", "JPEG", "BMP"]))


for _name, (_suffix, _make) in ODD.items():
    image_kind("good", _suffix, _name)(_make)


@image_kind("good", "jpg")
def image_with_the_suffix_of_another_format(random: Random) -> bytes:
    return photo(random, one_of(random, ["PNG", "WEBP", "GIF", "BMP", "TIFF"]))


T = Image.Transpose
STORED = {
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}
"""Of each EXIF orientation, what turns the upright picture into the stored one."""


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


for _orientation, _turn in STORED.items():

    def _turned(random: Random, key: str, orientation: int = _orientation, turn: Any = _turn) -> Planted:
        upright = picture(seed_of(random), between(random, 60, 120), between(random, 60, 120))
        format, options = one_of(random, [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
        data = encoded(upright.transpose(turn), format, exif=exif_of(orientation), **options)
        files = {format.lower(): data, "txt": f"turned, {key} {seed_of(random)}".encode()}
        return of_files(key, files, upright=encoded(upright, "PNG"))

    SAMPLES[f"exif_orientation_{_orientation}"] = _turned


@image_kind("good")
def exif_damaged(random: Random) -> bytes:
    data = bytearray(photo(random, exif=exif_of(between(random, 0, 70))))
    start = data.index(b"Exif")
    for _ in range(between(random, 1, 12)):
        data[start + between(random, 6, 31)] = between(random, 0, 255)
    return bytes(data)


@image_kind("good")
def exif_of_noise(random: Random) -> bytes:
    data, body = photo(random), b"Exif\0\0" + random.bytes(between(random, 0, 60_000))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body + data[2:]


@image_kind("good", "png")
def exif_of_noise_in_a_png(random: Random) -> bytes:
    data = photo(random, "PNG")
    return (
        data[:33] + chunk(b"eXIf", one_of(random, [b"", b"II*\0", b"MM\0*\0\0\0\x08"]) + random.bytes(300)) + data[33:]
    )
