"""Which pictures are copies, kind by kind: through the signatures that a run makes of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, sample, write_tar
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

import memfilter
from memfilter import Config, comparison, details
from memfilter.alignment import _means, _sums, align
from memfilter.comparison import FEATURES
from memfilter.signatures import Signer

SIGNER = Signer(Config.parse({"images": {"encoder": None}}))


def score(one: bytes, other: bytes) -> float:
    """Return the score of two image files, in either order the same but for rounding of the alignment."""
    shown = np.stack([comparison.planes(details.unpacked(SIGNER._image(data)["picture"])) for data in (one, other)])
    return float(comparison.compared(shown)[0])


def icon(colour: str, kind: int = 0) -> Image.Image:
    image = Image.new("RGB", (160, 160), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 140, 140), fill=colour, outline="black", width=4)
    draw.rectangle((60, 40, 100, 90), fill="white")
    if kind:
        draw.polygon([(50, 100), (110, 100), (80, 130)], fill="black")
    return image


def page(seed: int) -> Image.Image:
    """Return a page of text in one layout: every seed has its own words."""
    random = np.random.default_rng(seed)
    image = Image.new("L", (480, 640), "white")
    draw, face = ImageDraw.Draw(image), ImageFont.load_default(14)
    for line in range(28):
        words = ["".join(random.choice([*"abcdefghiklmnoprstuvw"], random.integers(2, 9))) for _ in range(10)]
        draw.text((40, 40 + 20 * line), " ".join(words)[:58], fill=20, font=face)
    return image


def bordered(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, 10, "black")


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((width // 16, height // 16, width - width // 16, height - height // 16))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "the same": lambda image: encoded(image, "PNG"),
    "JPEG at 60": lambda image: encoded(image, quality=60),
    "WebP": lambda image: encoded(image, "WEBP", quality=80),
    "half size": lambda image: encoded(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)),
    "border": lambda image: encoded(bordered(image), "PNG"),
}


DRAWN = {"icon": icon("crimson"), "other icon": icon("teal", 1), "page": page(1)}


@pytest.mark.parametrize(
    ("name", "kind"),
    # at half size, the words of a page are no longer seen
    [(name, kind) for name in DRAWN for kind in COPIES if (name, kind) != ("page", "half size")],
)
def test_copies_of_drawings_are_copies(name: str, kind: str) -> None:
    drawn = DRAWN[name]
    assert score(encoded(drawn, "PNG"), COPIES[kind](drawn)) >= comparison.THRESHOLD


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (icon("crimson"), icon("teal")),
        (icon("crimson"), icon("crimson", 1)),
        (page(1), page(2)),
        (icon("crimson", 1), ImageOps.mirror(icon("crimson", 1).rotate(20, fillcolor="white"))),
    ],
    ids=["recoloured icon", "another part", "another page", "turned and mirrored icon"],
)
def test_drawings_that_lie_on_each_other_are_no_copies(one: Image.Image, other: Image.Image) -> None:
    assert score(encoded(one, "PNG"), encoded(other, "PNG")) < comparison.THRESHOLD


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Image.Image]:
    with tarfile.open(shared_data / "photos" / "00002.tar") as tar:
        files = [f.read() for m in tar if m.name.endswith(".jpg") and (f := tar.extractfile(m))]
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files[:30]]


EDITS = {"recoloured": 0.65, "mirrored": 0.6, "brighter": 0.85, "grey": 0.85, "cropped": 0.85, "border": 0.85}
"""Least share that is found: recoloured or mirrored, a photo of something on plain ground may be a drawing."""


@pytest.mark.parametrize("edit", EDITS)
def test_a_recoloured_mirrored_or_cropped_photo_is_a_copy(edit: str, photos: list[Image.Image]) -> None:
    def edited(photo: Image.Image) -> Image.Image:
        if edit == "recoloured":
            hue, saturation, value = photo.convert("HSV").split()
            return Image.merge("HSV", (hue.point(lambda h: (h + 25) % 256), saturation, value)).convert("RGB")
        made = {"mirrored": ImageOps.mirror, "grey": ImageOps.grayscale, "cropped": cropped, "border": bordered}
        return ImageEnhance.Brightness(photo).enhance(1.2) if edit == "brighter" else made[edit](photo)

    found = [score(encoded(photo), encoded(edited(photo))) >= comparison.THRESHOLD for photo in photos]
    assert np.mean(found) >= EDITS[edit]


def test_photos_of_other_things_are_no_copies(photos: list[Image.Image]) -> None:
    files = [encoded(photo) for photo in photos]
    assert max(score(one, other) for one, other in pairwise(files)) < comparison.THRESHOLD


def test_a_score_does_not_depend_on_the_pairs_beside_it() -> None:
    files = [encoded(image, "PNG") for image in (icon("crimson"), icon("teal"), page(1), page(2))]
    shown = np.stack([comparison.planes(details.unpacked(SIGNER._image(data)["picture"])) for data in files])
    a, b = np.array([0, 0, 2, 1]), np.array([1, 2, 3, 3])
    together = comparison.features(shown, a, b, align(comparison.thumbnails(shown), a, b))
    for i in range(len(a)):
        one = comparison.features(
            shown, a[i : i + 1], b[i : i + 1], align(comparison.thumbnails(shown), a[i : i + 1], b[i : i + 1])
        )
        np.testing.assert_array_equal(one[0], together[i])
    assert together.shape == (4, len(FEATURES))
    assert np.isfinite(together).all()


def test_a_score_does_not_depend_on_what_was_compared_before_it() -> None:
    # the room that pictures are laid in is used again: a crop leaves some of it as it was
    whole = page(1)
    files = [encoded(image, "PNG") for image in (whole, whole.crop((150, 200, 400, 560)), icon("teal"), page(2))]
    shown = np.stack([comparison.planes(details.unpacked(SIGNER._image(data)["picture"])) for data in files])
    a, b = np.triu_indices(len(files), 1)
    aligned = align(comparison.thumbnails(shown), a, b)
    forwards = comparison.features(shown, a, b, aligned)
    order = np.arange(len(a))[::-1]
    np.testing.assert_array_equal(comparison.features(shown, a[order], b[order], aligned.of(order))[order], forwards)


def test_planes_and_thumbnails_are_the_weighted_sums_and_means_that_they_are_said_to_be() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    red, green, blue = np.moveaxis(picture.astype(np.float64), 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    found = comparison.planes(picture)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [luma, 0.564 * (blue - luma), 0.713 * (red - luma)], atol=1e-3)
    room = np.empty(comparison.SHAPE, np.float32)
    assert comparison.planes(picture, room) is room
    np.testing.assert_array_equal(room, found)
    means = luma.reshape(32, 4, 32, 4).mean((1, 3))
    assert np.abs(comparison.thumbnails(found[None])[0] - means).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(4, 5), (9, 16), (64, 47)])
@pytest.mark.parametrize("reach", [1, 2, 6])
def test_means_are_those_of_the_squares_around_each_pixel(shape: tuple[int, int], reach: int) -> None:
    picture = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    expected = [
        [picture[max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1].mean() for j in range(shape[1])]
        for i in range(shape[0])
    ]
    np.testing.assert_allclose(_means(_sums(picture), reach), expected, rtol=1e-5)


def test_more_difference_never_makes_a_pair_more_alike() -> None:
    rows = np.random.default_rng(0).uniform(0, 1, (500, len(FEATURES))).astype(np.float32) * 30
    for name, sign in (("unexplained", -1), ("cell_colour", -1), ("share_recoloured", -1), ("grain", 1), ("fine", 1)):
        more = rows.copy()
        more[:, FEATURES.index(name)] += 5
        assert (sign * (comparison.scores(more) - comparison.scores(rows)) >= -1e-6).all()


FLAGS = {
    "Netherlands": "- #ae1c28 #ffffff #21468b",
    "Hungary": "- #ce2939 #ffffff #477050",
    "Russia": "- #ffffff #0039a6 #d52b1e",
    "Bulgaria": "- #ffffff #00966e #d62612",
    "Germany": "- #000000 #dd0000 #ffce00",
    "Austria": "- #ed2939 #ffffff #ed2939",
    "Poland": "- #ffffff #dc143c",
    "Monaco": "- #ce1126 #ffffff",
    "Ukraine": "- #005bbb #ffd500",
    "France": "| #0055a4 #ffffff #ef4135",
    "Italy": "| #009246 #ffffff #ce2b37",
    "Ireland": "| #169b62 #ffffff #ff883e",
    "Belgium": "| #000000 #fae042 #ed2939",
    "Romania": "| #002b7f #fcd116 #ce1126",
    "Nigeria": "| #008751 #ffffff #008751",
    "Peru": "| #d91023 #ffffff #d91023",
}


def flag(country: str) -> Image.Image:
    across, *colours = FLAGS[country].split()
    image = Image.new("RGB", (300, 200))
    for i, colour in enumerate(colours):
        first, end = i / len(colours), (i + 1) / len(colours)
        box = (0, first * 200, 300, end * 200) if across == "-" else (first * 300, 0, end * 300, 200)
        image.paste(colour, (round(box[0]), round(box[1]), round(box[2]), round(box[3])))
    return image


@pytest.mark.parametrize("encoder", [None, "builtin"])
def test_flags_of_bands_are_different_and_their_copies_are_found(encoder: str | None, tmp_path: Path) -> None:
    members = []
    for country in FLAGS:
        members += sample(country, encoded(flag(country), "PNG"), f"the flag of {country}")
        members += sample(f"{country}-small", encoded(flag(country).resize((150, 100))), f"{country}, small")
    write_tar(tmp_path / "in" / "a.tar", members)
    run = memfilter.run([str(tmp_path / "in")], tmp_path / "out", Config.parse({"images": {"encoder": encoder}}), 1)
    rows = run.table().to_pylist()
    key = {row["uid"]: row["key"] for row in rows}
    found = {row["key"]: key.get(row["canonical_uid"]) for row in rows if row["action"] == "drop"}
    assert found.items() <= {f"{country}-small": country for country in FLAGS}.items()
    assert len(found) >= 14


def test_a_run_tells_what_it_compared_and_decides_again_without_the_pictures(tmp_path: Path) -> None:
    members = sample("a", encoded(icon("crimson"), "PNG"), "a") + sample("b", encoded(icon("crimson"), quality=60), "b")
    members += sample("c", encoded(icon("teal"), "PNG"), "c") + sample("d", encoded(page(1), "PNG"), "d")
    members += sample("e", encoded(page(2), "PNG"), "e") + sample("f", encoded(page(2), quality=60), "f")
    write_tar(tmp_path / "in" / "a.tar", members)
    run = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    rows = {row["key"]: row for row in run.table().to_pylist()}
    dropped = {key: row for key, row in rows.items() if row["action"] == "drop"}
    assert len(dropped) == 2
    assert all(row["match_score"] >= row["match_threshold"] == 0.5 for row in dropped.values())
    assert all(row["match_score"] is None is row["match_threshold"] for key, row in rows.items() if key not in dropped)

    (tmp_path / "in" / "a.tar").rename(tmp_path / "gone.tar")
    (tmp_path / "strict.yaml").write_text("images: {match_threshold: 0.999999}\noutput: {shards: false}")
    again = memfilter.rethreshold(tmp_path / "out", tmp_path / "strict.yaml").table().to_pylist()
    assert [row["action"] for row in again] == ["keep"] * 6


def test_pictures_that_pdq_does_not_hash_are_compared_by_their_best_copy(tmp_path: Path) -> None:
    ramp = np.linspace(60, 200, 400, dtype=np.uint8)[None, :, None].repeat(300, 0).repeat(3, 2)
    image, members = Image.fromarray(ramp), []
    for i, quality in enumerate((60, 95, 60, 95, 95)):
        members += sample(f"{i}", encoded(image, quality=quality), f"a ramp, number {i}")
    write_tar(tmp_path / "in" / "0.tar", members)
    run = memfilter.run([str(tmp_path / "in")], tmp_path / "out", Config.parse({"images": {"hash": "pdq"}}), 1)
    assert run.counts["read"] == 5
    assert run.counts["keep"] <= 2
