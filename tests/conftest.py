"""Small real inputs that the tests share: images, tars and shards with a known truth."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from memfilter import Manifest

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos and captions; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared photos and captions are not here")
    return SHARED_DATA


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: several that wait for one another on a busy machine take many times as long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(seed: int) -> str:
    """Return a caption of five made-up words: unlike that of any other seed in every tier."""
    draw = random.Random(f"caption {seed}")
    return " ".join("".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)) for _ in range(5))


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """Return a picture of smooth random shapes: unlike that of any other seed, and stable under re-encoding."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def scene(seed: int, side: int = 256) -> Image.Image:
    """Return a grey picture with shapes of all sizes, like a photo's, unlike that of any other seed."""
    random = np.random.default_rng(seed)
    picture = Image.fromarray(random.integers(60, 200, (4, 4), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for size in np.geomspace(120, 10, 60):
        x, y = random.integers(-20, side, 2)
        width, height = size * random.uniform(0.4, 1, 2)
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + width, y + height), fill=int(random.integers(256)))
    return picture


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    """Return the image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 92} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """Write a tar of these members, in order, without the clock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, image: bytes | None, caption: str | None = None, **more: bytes) -> list[tuple[str, bytes]]:
    """Return the members of one sample."""
    members = [] if image is None else [(f"{key}.jpg", image)]
    if caption is not None:
        members.append((f"{key}.txt", caption.encode()))
    return members + [(f"{key}.{suffix}", data) for suffix, data in more.items()]


@pytest.fixture(scope="session")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two shards of eight samples; of the second, three repeat pictures of the first and are masked, one is broken."""
    import memfilter

    folder = tmp_path_factory.mktemp("masked")
    pictures = [*range(12), 0, 1, 2]
    # of two equal pictures the one with the longer caption is kept: the first
    captions = ["a " + "very " * (20 - i) + "small picture" for i in range(len(pictures))]
    members = [
        m for i, p in enumerate(pictures) for m in sample(f"{i:02}", encoded(picture(p)), captions[i], json=b"{}")
    ]
    members += sample("broken", b"\xff\xd8\xff", "no picture", json=b"{}")
    write_tar(folder / "data" / "00000.tar", members[:24])
    write_tar(folder / "data" / "00001.tar", members[24:])
    config = memfilter.Config.parse({"images": {"encoder": None}, "policy": {"image_duplicate": "mask"}})
    return memfilter.run([str(folder / "data")], folder / "run", config, workers=1)
