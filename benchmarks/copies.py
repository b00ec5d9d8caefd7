"""Edited copies of small grey photos, many at a time, for training the descriptor."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, grid_sample, interpolate

Grey = npt.NDArray[np.uint8]
Random = np.random.Generator


def edited(photos: Grey, random: Random, crowd: float) -> tuple[Grey, Grey, npt.NDArray[np.int64]]:
    """Return a light and a strong edit of each photo, and the places of the other photos in the strong ones, or -1.

    `crowd` says how often edits of levels, overlays, blur, noise and compression come on top of others, 1 for often.
    """
    x = torch.from_numpy(photos).float()
    n = len(x)
    light = _rendered(x, random, strength=0.25 * (random.random(n) < 0.6))
    light = _levels(light, random, _choose(n, 0.4, random), 0.5)
    light = _compressed(light, random, _choose(n, 0.3, random), 50, 95)

    strong = _rendered(x, random, strength=np.ones(n))
    strong, other = _collage(strong, random, _choose(n, 0.13, random))
    strong = _overlaid(strong, random, crowd)
    strong = _levels(strong, random, _choose(n, 0.5 * crowd, random), 1.0)
    strong = _softened(strong, random, crowd)
    strong = _compressed(strong, random, _choose(n, 0.35 * crowd, random), 4, 50)
    return light, strong, other


def _choose(n: int, share: float, random: Random) -> npt.NDArray[np.int64]:
    return np.flatnonzero(random.random(n) < share)


def _rendered(x: Tensor, random: Random, strength: npt.NDArray[np.float64]) -> Tensor:
    """Crop, widen with a border, stretch, turn, mirror and tilt, in one sampling; `strength` 0 leaves it as it is."""
    n = len(x)
    on = strength > 0
    # the half-width and half-height of the window that is taken, 1 for the whole photo
    size = np.ones((n, 2))
    crop = on & (random.random(n) < 0.55)
    area = 1 - strength * (1 - random.uniform(0.3, 1.0, n))
    aspect = np.exp(random.uniform(-0.35, 0.35, n) * strength)
    taken = np.minimum(np.sqrt(area)[:, None] * np.stack([aspect, 1 / aspect], 1), 1.0)
    size[crop] = taken[crop]
    wide = on & ~crop & (random.random(n) < 0.6)
    border = 1 + strength[:, None] * random.uniform(0, 0.7, (n, 2)) * (random.random((n, 2)) < 0.7)
    size[wide] = border[wide]
    centre = random.uniform(-1, 1, (n, 2)) * np.abs(1 - size)
    centre[wide] *= random.random(wide.sum())[:, None] < 0.6
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)[None] * size[:, None]
    angle = np.deg2rad(random.uniform(-20, 20, n)) * strength * (random.random(n) < 0.3)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(n, 2, 2)
    corners = np.einsum("nij,nkj->nki", turn, corners) + centre[:, None]
    tilt = random.normal(0, 0.08, (n, 4, 2)) * strength[:, None, None] * (random.random(n) < 0.2)[:, None, None]
    corners = corners + tilt
    mirror = (strength > 0.5) & (random.random(n) < 0.4)
    corners[mirror] = corners[mirror][:, [1, 0, 3, 2]]
    # bilinear between the corners
    side = x.shape[-1]
    u = (np.arange(side) + 0.5) / side
    weights = np.stack([np.outer(1 - u, 1 - u), np.outer(1 - u, u), np.outer(u, u), np.outer(u, 1 - u)], 0)
    grid = np.einsum("nkc,kyx->nyxc", corners, weights).astype(np.float32)
    # narrow first what will shrink, or it would alias
    shrinks = torch.from_numpy(size.max(1) > 1.35)
    source = x[:, None].clone()
    source[shrinks] = conv2d(source[shrinks], _gaussian(0.6), padding="same") if shrinks.any() else source[shrinks]
    taken_pixels = grid_sample(source, torch.from_numpy(grid), "bilinear", "border", align_corners=False)[:, 0]
    outside = torch.from_numpy((np.abs(grid) > 1).any(-1))
    return torch.where(
        outside & torch.from_numpy(random.random(n) < 0.93)[:, None, None], _ground(x, random), taken_pixels
    )


def _ground(x: Tensor, random: Random) -> Tensor:
    """Return what a border shows: one level, mostly black or white, another photo, or noise."""
    n = len(x)
    level = np.where(random.random(n) < 0.5, random.choice([0.0, 255.0], n), random.uniform(0, 255, n))
    ground = torch.from_numpy(level.astype(np.float32))[:, None, None].expand_as(x).clone()
    noisy = _choose(n, 0.1, random)
    ground[noisy] += torch.from_numpy(random.normal(0, 30, (len(noisy), *x.shape[1:])).astype(np.float32))
    photo = _choose(n, 0.15, random)
    blurred = conv2d(x[(photo + 7) % n][:, None], _gaussian(3.0), padding="same")[:, 0]
    ground[photo] = blurred
    return ground


def _collage(x: Tensor, random: Random, chosen: npt.NDArray[np.int64]) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Put these photos on one half of a canvas and another photo on the other half."""
    n, side = len(x), x.shape[-1]
    other = np.full(n, -1, np.int64)
    other[chosen] = (chosen + random.integers(1, n, len(chosen))) % n
    result = x.clone()
    half = side // 2
    squeezed = avg_pool2d(x[:, None], (1, 2))[:, 0]  # (n, side, half)
    for i in chosen.tolist():
        mine, theirs = squeezed[i], squeezed[other[i]]
        if random.random() < 0.3:  # the middle of each, in its own proportions
            mine, theirs = x[i][:, half // 2 : half // 2 + half], x[other[i]][:, half // 2 : half // 2 + half]
        pair = [mine, theirs] if random.random() < 0.5 else [theirs, mine]
        canvas = torch.cat(pair, 1)
        if random.random() < 0.5:
            tall = avg_pool2d(torch.stack([x[i], x[other[i]]])[:, None], (2, 1))[:, 0]
            canvas = torch.cat([tall[0], tall[1]] if random.random() < 0.5 else [tall[1], tall[0]], 0)
        result[i] = canvas
    return result, other


@lru_cache(1)
def _lettering() -> Tensor:
    """Return a bank of lines of text, (N, 16, 64) from 0 to 1."""
    random = np.random.default_rng(5)
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,!?@&%"]
    bank = []
    for _ in range(400):
        text = "".join(random.choice(letters, random.integers(2, 24)))
        picture = Image.new("L", (256, 64))
        font = ImageFont.load_default(float(random.uniform(18, 60)))
        ImageDraw.Draw(picture).text((random.integers(-10, 60), random.integers(-8, 20)), text, 255, font=font)
        bank.append(np.asarray(picture.resize((64, 16), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(bank)).float() / 255


def _overlaid(x: Tensor, random: Random, crowd: float) -> Tensor:
    """Lay bars with text, bare text, patches of other photos and plain shapes over some of them."""
    x = x.clone()
    n, side = len(x), x.shape[-1]
    bank = _lettering()
    for i in _choose(n, 0.35 * crowd, random).tolist():
        for _ in range(random.integers(1, 3)):
            height, width = int(random.integers(5, 20)), int(random.integers(24, side + 1))
            line = bank[random.integers(len(bank))]
            line = interpolate(line[None, None], (height, width), mode="area")[0, 0]
            top, left = int(random.integers(side - height + 1)), int(random.integers(side - width + 1))
            if random.random() < 0.5:
                top = int(random.choice([0, side - height]))
            ink, paper = random.uniform(0, 255, 2)
            if random.random() < 0.6:
                ink, paper = random.permutation([255.0, 0.0])
            place = x[i, top : top + height, left : left + width]
            if random.random() < 0.6:  # on a bar
                clear = random.choice([1.0, 1.0, 0.6])
                place.mul_(1 - clear).add_(clear * paper)
            place.mul_(1 - line).add_(line * ink)
    for i in _choose(n, 0.25 * crowd, random).tolist():
        height, width = (int(v) for v in random.integers(8, 30, 2))
        top, left = int(random.integers(side - height + 1)), int(random.integers(side - width + 1))
        place = x[i, top : top + height, left : left + width]
        kind = random.random()
        if kind < 0.4:
            place.fill_(float(random.uniform(0, 255)))
        elif kind < 0.75:
            patch = x[random.integers(n)][None, None]
            place.copy_(interpolate(patch, (height, width), mode="area")[0, 0])
        else:
            y, z = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
            place[torch.from_numpy(y * y + z * z < 1)] = float(random.uniform(0, 255))
    return x


def _levels(x: Tensor, random: Random, chosen: npt.NDArray[np.int64], strength: float) -> Tensor:
    """Change brightness, contrast and gamma of these, now and then to few levels, or with a gradient or a vignette."""
    x = x.clone()
    k = len(chosen)
    y = x[chosen].clamp(0, 255) / 255

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(random.uniform(low, high, k).astype(np.float32))[:, None, None]

    y = y ** torch.exp(draw(-0.6, 0.6) * strength)
    y = (y - 0.5) * torch.exp(draw(-0.6, 0.5) * strength) + 0.5 + draw(-0.18, 0.18) * strength
    ramp = torch.linspace(-1, 1, x.shape[-1])
    lit = torch.from_numpy(random.random(k) < 0.15 * strength)[:, None, None]
    y = torch.where(lit, y * (1 + 0.5 * (draw(-1, 1) * ramp[None, None] + draw(-1, 1) * ramp[None, :, None])), y)
    few = torch.from_numpy(random.random(k) < 0.08 * strength)[:, None, None]
    steps = draw(2, 6).round()
    y = torch.where(few, (y.clamp(0, 1) * steps).round() / steps, y)
    x[chosen] = y.clamp(0, 1) * 255
    return x


def _gaussian(sigma: float) -> Tensor:
    reach = max(1, round(2.5 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma * sigma))
    line = line / line.sum()
    return torch.outer(line, line)[None, None]


def _softened(x: Tensor, random: Random, crowd: float) -> Tensor:
    """Blur, sharpen, coarsen or speckle some of them."""
    x = x.clone()
    n, side = len(x), x.shape[-1]
    for sigma in (0.6, 1.0, 1.6, 2.2):
        chosen = _choose(n, 0.07 * crowd, random)
        if len(chosen):
            x[chosen] = conv2d(x[chosen][:, None], _gaussian(sigma), padding="same")[:, 0]
    chosen = _choose(n, 0.06 * crowd, random)
    if len(chosen):
        soft = conv2d(x[chosen][:, None], _gaussian(1.0), padding="same")[:, 0]
        x[chosen] = x[chosen] + float(random.uniform(0.5, 2.5)) * (x[chosen] - soft)
    for coarse in (16, 24, 32):
        chosen = _choose(n, 0.03 * crowd, random)
        if len(chosen):
            mode = "nearest" if random.random() < 0.5 else "bilinear"
            x[chosen] = interpolate(
                interpolate(x[chosen][:, None], (coarse, coarse), mode="area"), (side, side), mode=mode
            )[:, 0]
    chosen = _choose(n, 0.15 * crowd, random)
    noise = random.normal(0, 1, (len(chosen), side, side)) * random.uniform(3, 35, len(chosen))[:, None, None]
    x[chosen] += torch.from_numpy(noise.astype(np.float32))
    return x


def _compressed(x: Tensor, random: Random, chosen: npt.NDArray[np.int64], low: int, high: int) -> Grey:
    pixels = x.round().clamp(0, 255).to(torch.uint8).numpy()
    for i in chosen.tolist():
        data = simplejpeg.encode_jpeg(pixels[i][:, :, None].copy(), int(random.integers(low, high)), "GRAY")
        pixels[i] = simplejpeg.decode_jpeg(data, "GRAY")[:, :, 0]
    return pixels
