"""Figures that the README and other texts take from result files: each stands there as its file has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def throughput() -> list[str]:
    found = result("throughput")
    ours = ["memfilter digest + hash + caption", "memfilter with the embedding"]
    peers = ["imagededup encode_images", "imagededup encode_image in a loop"]
    fast, loop = ([f"{found['times_faster'][f'{one}, against {peer}']:.1f}" for one in ours] for peer in peers)
    ms = [f"{found['milliseconds_per_image'][name]:.1f}" for name in (*peers, *ours)]
    return [
        f"is {fast[0]} times faster, and {fast[1]} times with the embedding",
        f"it is {loop[0]} and {loop[1]} times.",
        f"medians of the times are {ms[0]} and {ms[1]} ms an image, and {ms[2]} and {ms[3]} ms",
    ]


def demo() -> list[str]:
    found = result("demo_model")
    over, of = found["held_out_specific_over_threshold"], found["held_out_specific"]
    assert found["held_out_ordinary_over_threshold"] == 0
    return [
        f"{over} of {of} specific ones do ({over / of:.1%}) and none of {found['held_out_ordinary']} ordinary ones",
        f"magnitude over {found['threshold']:.2f}",
    ]


def lookups() -> list[str]:
    found = result("lookup")
    rates, dictionary = found["1 worker"][0]["keys_per_second"], found["dictionary"]
    one, batches, own = (
        round(rates["clock"], -3)
        for rates in (rates["attach, in order"], rates["batches, in order"], dictionary["keys_per_second"]["in order"])
    )
    most = max(worker["private_mib"] for worker in found["1 worker"] + found["2 workers"])
    return [
        f"under {int(most) + 1} MiB each",
        f"takes {dictionary['private_mib'] / 1024:.1f} GiB in each and {dictionary['seconds_to_load']:.0f} s to load",
        f"{own:,} keys a second in the order of the shards",
        f"the manifest gives {one:,} and in batches of 1,000 {batches:,}",
    ]


def hash_join() -> list[str]:
    found = result("hash_join")["pdq_1M_radius_31"]
    return [
        f"in {found['seconds']:.1f} s, where faiss's flat index would take {found['faiss_flat_seconds']:,.0f} s "
        "(extrapolated from 500 queries)",
        f"finds {found['recall_by_distance']['31']:.3f} of the pairs at distance 31",
    ]


def main_job() -> list[str]:
    found = result("main_job")
    copies = sum(kind["found"] for kind in found["kinds"].values())
    return [f"it finds {copies}. In {found['false_groups']} groups"]


def scale() -> list[str]:
    ms, costs, sizes = (
        result("throughput")["milliseconds_per_image"],
        result("scale")["core_microseconds_a_sample"],
        result("scale")["bytes_a_sample"],
    )
    heavy = result("heavy_group")
    pair = heavy["a_verified_pair"]
    read = ms["memfilter with the embedding"]
    part = sizes["signature part without embedding"]
    steps = [f"{costs[name]:.2f}" for name in ("load", "captions", "grouping", "decisions", "manifest")]
    grouping = costs["load"] + costs["grouping"] + costs["decisions"]
    return [
        f"| {ms['memfilter digest + hash + caption']:.2f} ms ({read:.2f} ms) |",
        f"| {read * 1e8 / 3.6e6:.0f} | N x {read:.2f} ms |",
        f"| {part / 1e3:.1f} kB, {(part + 512) / 1e3:.1f} kB |",
        f"| {', '.join(steps)} µs |",
        f"N x {grouping:.1f} µs | {sizes['memory'] / 10:.0f} GB of memory",
        f"| {sizes['memory']} B |",
        f"**{23.5 * 2**30 / sizes['memory'] / 1e6:.0f}M samples**",
        f"| {pair['copies']['ms']:.2f} ms, {pair['others_as_a_run_does']['ms']:.2f} ms |",
        f"took {heavy['seconds']:.0f} s and {heavy['peak_mib']} MiB, and {heavy['pairs_judged']:,} pairs were compared",
    ]


def calibration() -> list[str]:
    (limit,) = (g["threshold"] for g in result("calibrate_descriptor")["by_gain"] if g["gain"] == 0.9)
    row = (ROOT / "benchmarks" / "results" / "copy_detection.md").read_text().split("| memfilter, as it decides |")[1]
    measured = row.split("|")[4].strip()
    return [f"is over {limit} for one pair", f"one false edge in 10^7 needs {measured} "]


CLAIMS = {
    "README.md": [throughput, demo, lookups, hash_join, main_job],
    "benchmarks/scale.md": [scale],
    "memfilter/encoders/README.md": [calibration],
}


@pytest.mark.parametrize("name", CLAIMS)
def test_figures_are_those_of_their_files(name: str) -> None:
    text = " ".join((ROOT / name).read_text().split())
    missing = [claim for claims in CLAIMS[name] for claim in claims() if claim not in text]
    assert missing == []
