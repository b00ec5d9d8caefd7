"""Samples whose members, names, captions or json are malformed or odd, by kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hostile import (
    JSON,
    LEFT_OUT,
    SAMPLES,
    STAYS,
    Planted,
    Random,
    between,
    block,
    cut,
    long_name,
    member,
    of_files,
    one_of,
    pax,
    photo,
    seed_of,
)
from tars import mended, patched

Plant = Callable[[Random, str], Planted]


def sample_kind(plant: Plant) -> Plant:
    """Enter a function as a kind of samples."""
    SAMPLES[plant.__name__] = plant
    return plant


def caption(random: Random) -> bytes:
    return f"a caption, number {seed_of(random)}".encode()


# -- kinds of members -------------------------------------------------------------------------------------------------

SPECIAL = {b"1": "hard_link", b"2": "symbolic_link", b"3": "character_device", b"4": "block_device", b"6": "fifo"}

for _type, _name in {**SPECIAL, b"Z": "member_of_no_known_type"}.items():

    def _special(random: Random, key: str, type: bytes = _type) -> Planted:
        image, text = f"{key}.jpg", f"{key}.txt"
        members = [member(image, kind=type), member(text, caption(random))]
        if random.random() < 0.5:
            members = [member(image, photo(random)), member(one_of(random, [text, f"{key}.json"]), kind=type)]
        return Planted([(m, 0) for m in members], [(key, "unsupported_member")])

    SAMPLES[_name] = _special


@sample_kind
def link_of_another_suffix(random: Random, key: str) -> Planted:
    link = member(f"{key}.{one_of(random, ['mp3', 'npy', 'cls'])}", kind=one_of(random, [b"1", b"2", b"6"]))
    return Planted([(member(f"{key}.jpg", photo(random)), 0), (link, 0)], [(key, "good")])


@sample_kind
def links_out_of_the_folder(random: Random, key: str) -> Planted:
    target = one_of(random, [b"/etc/passwd", b"../" * between(random, 1, 9) + b"escaped"])
    link = mended(patched(block(f"{key}.jpg", kind=b"2"), 157, target), 0)
    text = member(f"{key}.txt", caption(random))
    return Planted([(link, 0), (text, 0)], [(key, "unsupported_member")])


@sample_kind
def folder_under_the_key(random: Random, key: str) -> Planted:
    name = one_of(random, [f"{key}.jpg", f"{key}.jpg/", f"{key}/", f"{key}"])
    folder = member(name, kind=b"0" if name.endswith("/") and random.random() < 0.5 else b"5")
    return Planted([(folder, LEFT_OUT), (member(f"{key}.txt", caption(random)), 0)], [(key, "no_image")])


@sample_kind
def member_types_of_plain_files(random: Random, key: str) -> Planted:
    kinds = [b"0", b"\0", b"7"]
    files = {"jpg": photo(random), "txt": caption(random)}
    members = [(member(f"{key}.{s}", data, one_of(random, kinds)), 0) for s, data in files.items()]
    return Planted(members, [(key, "good")])


@sample_kind
def sparse_by_gnu(random: Random, key: str) -> Planted:
    data = photo(random)
    numbers = b"".join(b"%011o\0" % n for n in (0, len(data)))
    head = patched(block(f"{key}.jpg", len(data), b"S"), 257, b"ustar  \0")
    extended = random.random() < 0.5
    head = patched(head, 386, numbers + bytes(72) + bytes([extended]) + b"%011o\0" % (len(data) * 9))
    body = bytes(512) * extended + data + bytes(-len(data) % 512)
    return Planted([(mended(head, 0) + body, 0)], [(key, "unsupported_member")])


for _version in ("0.0", "0.1", "1.0"):

    def _sparse(random: Random, key: str, version: str = _version) -> Planted:
        data = photo(random)
        size = str(9 * len(data))
        if version == "0.0":
            head = pax(GNU__sparse__size=size, GNU__sparse__numblocks="1", GNU__sparse__offset="0")
        elif version == "0.1":
            head = pax(GNU__sparse__size=size, GNU__sparse__map=f"0,{len(data)}", GNU__sparse__name=f"{key}.jpg")
        else:
            records = {"major": "1", "minor": "0", "name": f"{key}.jpg", "realsize": size}
            head = pax(**{f"GNU__sparse__{k}": v for k, v in records.items()})
            data = f"1\n0\n{len(data)}\n".encode().ljust(512, b"\0") + data
        name = f"{key}.jpg" if version == "0.0" else f"GNUSparseFile.{between(random, 1, 99)}/other"
        sparse = head + member(name, data)
        return Planted([(sparse, 0), (member(f"{key}.txt", caption(random)), 0)], [(key, "unsupported_member")])

    SAMPLES[f"sparse_by_pax_{_version}"] = _sparse


# -- names ------------------------------------------------------------------------------------------------------------


def named(random: Random, name: bytes, printed: str, outcome: str = "good") -> Planted:
    """Return a sample of an image and a caption under this name, by a pax header where it needs one."""
    members = []
    for suffix, data in ((b".jpg", photo(random)), (b".txt", caption(random))):
        full = name + suffix
        short = len(full) <= 100 and b"\0" not in full
        members.append(((b"" if short else pax(path=full)) + member(full if short else "x", data), 0))
    return Planted(members, [(printed, outcome)])


@sample_kind
def long_name_by_pax(random: Random, key: str) -> Planted:
    key = f"{key}/" * between(random, 12, 80) + "é" * between(random, 1, 99)
    return named(random, key.encode(), key)


@sample_kind
def long_name_by_gnu(random: Random, key: str) -> Planted:
    key += "f" * between(random, 100, 5000)
    image = long_name(f"{key}.jpg".encode()) + member("cut", photo(random))
    link = long_name(b"some/where", b"K") + long_name(f"{key}.mp4".encode()) + member("cut", kind=b"2")
    return Planted([(image, 0), (link, 0)], [(key, "good")])


@sample_kind
def name_of_a_megabyte(random: Random, key: str) -> Planted:
    name = (key + "/" * between(random, 500_000, 1_000_000)).encode()
    return Planted([(long_name(name) + member("cut", photo(random)), LEFT_OUT)], [])


@sample_kind
def name_in_two_fields(random: Random, key: str) -> Planted:
    prefix = "p/" * between(random, 1, 70) + "p"
    return Planted([(member(f"{key}.jpg", photo(random), prefix=prefix.encode()), 0)], [(f"{prefix}/{key}", "good")])


@sample_kind
def absolute_name(random: Random, key: str) -> Planted:
    name = one_of(random, ["/tmp/escaped/", "/", "//", "C:\\escaped\\"]) + key
    return named(random, name.encode(), name)


@sample_kind
def name_that_climbs(random: Random, key: str) -> Planted:
    name = "../" * between(random, 1, 12) + one_of(random, ["escaped/", "", "a/../../escaped/"]) + key
    return named(random, name.encode(), name)


@sample_kind
def name_that_is_not_utf_8(random: Random, key: str) -> Planted:
    raw = bytes(random.integers(0x80, 0xC0, between(random, 1, 40), "u1"))
    return named(random, key.encode() + raw, key + "".join(f"\\x{b:02x}" for b in raw))


@sample_kind
def name_with_control_characters(random: Random, key: str) -> Planted:
    name = key + "".join(
        one_of(random, list("\n\r\t\x1b[31m\x07\x7f\u202e\u2028")) for _ in range(between(random, 1, 20))
    )
    return named(random, name.encode(), name)


@sample_kind
def name_with_a_nul(random: Random, key: str) -> Planted:
    name = f"{key}\0{between(random, 0, 999)}"
    return named(random, name.encode(), name)


@sample_kind
def name_that_ends_at_a_nul(random: Random, key: str) -> Planted:
    return Planted([(member(f"{key}.jpg\0.txt{between(random, 0, 99)}", photo(random)), 0)], [(key, "good")])


@sample_kind
def empty_name(random: Random, key: str) -> Planted:
    head = one_of(random, [b"", pax(path=""), long_name(b"")])
    return Planted([(head + member("", photo(random)), LEFT_OUT)], [])


@sample_kind
def names_of_no_sample(random: Random, key: str) -> Planted:
    names = [key, f".{key}.jpg", f"__{key}__", f"__{key}__/a.jpg", "..", ".", "/", f"d.ir/{key}", "...jpg"]
    members = [member(one_of(random, names), photo(random)) for _ in range(between(random, 1, 5))]
    return Planted([(m, LEFT_OUT) for m in members], [])


@sample_kind
def dotfile_in_a_folder(random: Random, key: str) -> Planted:
    # webdataset takes the folder for the key
    return Planted([(member(f"{key}/.jpg", photo(random)), 0)], [(f"{key}/", "good")])


@sample_kind
def nested_dots(random: Random, key: str) -> Planted:
    inner = ".".join(one_of(random, ["tar", "gz", "0", "", "jpg"]) for _ in range(between(random, 1, 9)))
    return Planted([(member(f"{key}.{inner}.jpg", photo(random)), 0)], [(key, "no_image")])


@sample_kind
def upper_case_suffixes(random: Random, key: str) -> Planted:
    image, text = one_of(random, ["JPG", "Jpeg", "jPG"]), one_of(random, ["TXT", "Txt"])
    return of_files(key, {image: photo(random), text: caption(random)})


@sample_kind
def keys_that_differ_in_case(random: Random, key: str) -> Planted:
    keys = [key, key.upper(), key.capitalize()]
    return Planted([(member(f"{k}.jpg", photo(random)), i) for i, k in enumerate(keys)], [(k, "good") for k in keys])


@sample_kind
def keys_that_differ_in_composition(random: Random, key: str) -> Planted:
    keys = [f"{key}{c}{between(random, 0, 99)}" for c in ("é", "e\u0301")]
    return Planted([(member(f"{k}.jpg", photo(random)), i) for i, k in enumerate(keys)], [(k, "good") for k in keys])


# -- headers ----------------------------------------------------------------------------------------------------------


@sample_kind
def huge_extension_headers(random: Random, key: str) -> Planted:
    heads = b"".join(pax(comment=b"c" * between(random, 1, 900_000)) for _ in range(between(random, 1, 4)))
    return Planted([(heads + member(f"{key}.jpg", photo(random)), 0)], [(key, "good")])


@sample_kind
def global_pax_header(random: Random, key: str) -> Planted:
    about = pax(b"g", comment=f"{seed_of(random)}", mtime="1.5", uname="ü")
    return Planted([(about, STAYS), (member(f"{key}.jpg", photo(random)), 0)], [(key, "good")])


@sample_kind
def header_fields_that_nobody_reads(random: Random, key: str) -> Planted:
    head = block(f"{key}.jpg", len(data := photo(random)))
    for at, size in ((100, 8), (108, 8), (116, 8), (136, 12), (265, 64), (329, 16)):
        if random.random() < 0.6:
            head = patched(head, at, random.bytes(size))
    return Planted([(mended(head, 0) + data + bytes(-len(data) % 512), 0)], [(key, "good")])


@sample_kind
def header_without_its_magic(random: Random, key: str) -> Planted:
    data = photo(random)
    head = mended(
        patched(block(f"{key}.jpg", len(data)), 257, one_of(random, [bytes(8), b"ustar  \0", b"USTAR\0zz"])), 0
    )
    return Planted([(head + data + bytes(-len(data) % 512), 0)], [(key, "good")])


@sample_kind
def size_in_an_odd_notation(random: Random, key: str) -> Planted:
    size = len(data := photo(random))
    ways = [b"\x80" + size.to_bytes(11, "big"), b"%o" % size, b"%11o " % size, b"%012o" % size]
    head = mended(patched(block(f"{key}.jpg"), 124, one_of(random, ways).ljust(12, b"\0")), 0)
    return Planted([(head + data + bytes(-size % 512), 0)], [(key, "good")])


@sample_kind
def size_by_pax(random: Random, key: str) -> Planted:
    data = photo(random)
    head = pax(size=str(len(data))) + block(f"{key}.jpg", between(random, 0, 8**11 - 1))
    return Planted([(head + data + bytes(-len(data) % 512), 0)], [(key, "good")])


@sample_kind
def padding_that_is_not_zero(random: Random, key: str) -> Planted:
    data = photo(random) + b"\0"
    padded = block(f"{key}.jpg", len(data)) + data + random.bytes(-len(data) % 512)
    return Planted([(padded, 0)], [(key, "good")])


# -- how members make samples -----------------------------------------------------------------------------------------


@sample_kind
def many_empty_members_of_one_key(random: Random, key: str) -> Planted:
    members = [(block(f"{key}.{i}"), 0) for i in range(between(random, 100, 3000))]
    return Planted([*members, (member(f"{key}.txt", caption(random)), 0)], [(key, "no_image")])


@sample_kind
def many_empty_samples(random: Random, key: str) -> Planted:
    suffix, outcome = one_of(random, [("jpg", "empty_image"), ("txt", "no_image"), ("bin", "no_image")])
    keys = [f"{key}-{i}" for i in range(between(random, 100, 1500))]
    return Planted([(block(f"{k}.{suffix}"), i) for i, k in enumerate(keys)], [(k, outcome) for k in keys])


@sample_kind
def one_header_over_and_over(random: Random, key: str) -> Planted:
    times = between(random, 2, 2000)
    return Planted([(block(f"{key}.jpg"), i) for i in range(times)], [(key, "repeated_key")] * times)


@sample_kind
def key_repeated(random: Random, key: str) -> Planted:
    times = between(random, 2, 6)
    members = []
    for i in range(times):
        members += [(member(f"{key}.jpg", photo(random)), i), (member(f"{key}.txt", caption(random)), i)]
    return Planted(members, [(key, "repeated_key")] * times)


@sample_kind
def key_comes_back(random: Random, key: str) -> Planted:
    keys = [key, *(f"{key}-{i}" for i in range(between(random, 1, 4))), key]
    rows = [(k, "repeated_key" if k == key else "good") for k in keys]
    return Planted([(member(f"{k}.jpg", photo(random)), i) for i, k in enumerate(keys)], rows)


@sample_kind
def keys_interleaved(random: Random, key: str) -> Planted:
    keys = [f"{key}-{i}" for i in range(between(random, 2, 5))]
    files = [(k, "jpg", photo(random)) for k in keys] + [(k, "txt", caption(random)) for k in keys]
    members = [(member(f"{k}.{s}", data), i) for i, (k, s, data) in enumerate(files)]
    return Planted(members, [(k, "repeated_key") for k, _, _ in files])


@sample_kind
def suffix_twice(random: Random, key: str) -> Planted:
    suffixes = one_of(random, [("jpg", "jpg"), ("jpg", "JPG"), ("txt", "jpg", "txt")])
    row = [0, 1] if len(suffixes) == 2 else [0, 0, 1]
    members = [(member(f"{key}.{s}", photo(random)), n) for s, n in zip(suffixes, row, strict=True)]
    return Planted(members, [(key, "repeated_key")] * 2)


@sample_kind
def two_images(random: Random, key: str) -> Planted:
    second = one_of(random, [photo(random, "PNG"), b"", b"no image"])  # the first is the sample's
    return of_files(key, {"jpg": photo(random), "png": second, "txt": caption(random)})


@sample_kind
def first_of_two_images_damaged(random: Random, key: str) -> Planted:
    files = {"jpg": cut(random, photo(random)), "png": photo(random, "PNG"), "txt": caption(random)}
    return of_files(key, files, "unreadable_image")


@sample_kind
def no_image(random: Random, key: str) -> Planted:
    suffix = one_of(random, ["txt", "json", "mp4", "cls", "", "jpg2", "jpg "])
    return of_files(key, {suffix: b'{"caption": "%s"}' % caption(random)}, "no_image")


# -- captions ---------------------------------------------------------------------------------------------------------


def captioned(text: Callable[[Random], bytes], outcome: str = "good", suffix: str = "txt") -> Plant:
    """Return a kind of samples whose text member is this."""
    return lambda random, key: of_files(key, {"jpg": photo(random), suffix: text(random)}, outcome)


def utf_16(random: Random) -> bytes:
    return b"\xff\xfe" + caption(random).decode().encode("utf-16-le")


def marks(random: Random) -> bytes:
    return ("z" + "\u0301\u0323" * between(random, 10_000, 300_000) + str(seed_of(random))).encode()


CAPTIONS: dict[str, tuple[str, Callable[[Random], bytes]]] = {
    "caption_invalid_utf_8": ("bad_caption", lambda r: caption(r) + bytes([between(r, 0x80, 0xBF)])),
    "caption_latin_1": ("bad_caption", lambda r: "Müller, Fuß, café ".encode("latin-1") + caption(r)),
    "caption_utf_16": ("bad_caption", utf_16),
    "caption_cut_inside_a_character": ("bad_caption", lambda r: caption(r) + "図".encode()[: between(r, 1, 2)]),
    "caption_overlong_or_surrogate_bytes": (
        "bad_caption",
        lambda r: one_of(r, [b"\xc0\xaf", b"\xed\xa0\x80"]) + caption(r),
    ),
    "caption_with_nul": ("good", lambda r: caption(r) + bytes(between(r, 1, 99)) + b"b"),
    "caption_with_control_characters": ("good", lambda r: caption(r) + bytes(r.integers(1, 32, 50, "u1"))),
    "caption_of_10_MB": ("good", lambda r: caption(r) + b" word" * between(r, 1_900_000, 2_100_000)),
    "caption_over_16_MiB": ("too_many_bytes", lambda r: b"a" * between(r, 16 * 2**20 + 1, 18 * 2**20)),
    "caption_over_max_bytes": ("too_many_bytes", lambda r: b"a" * between(r, 18 * 2**20 + 1, 19 * 2**20)),
    "caption_empty": ("good", lambda r: b""),
    "caption_white_space": (
        "good",
        lambda r: "".join(one_of(r, list(" \t\n\r\u3000\u2028")) for _ in range(9)).encode(),
    ),
    "caption_right_to_left": ("good", lambda r: "\u202eשלום עולם مرحبا ".encode() + caption(r)),
    "caption_with_bom": ("good", lambda r: b"\xef\xbb\xbf" + caption(r)),
    "caption_of_combining_marks": ("good", marks),
    "caption_that_expands": ("good", lambda r: ("\ufdfa" * between(r, 1000, 50_000)).encode() + caption(r)),
    "caption_of_emoji_and_joiners": ("good", lambda r: "👩‍👧🇩🇪\u200d\ufe0f".encode() * between(r, 1, 99) + caption(r)),
}

for _name, (_outcome, _text) in CAPTIONS.items():
    SAMPLES[_name] = captioned(_text, _outcome)


# -- json -------------------------------------------------------------------------------------------------------------


def nested(random: Random) -> bytes:
    depth = between(random, 101, 200_000)
    opening, closing = one_of(random, [(b"[", b"]"), (b'{"a":', b"}")])
    return b'{"a":' + opening * depth + b"1" + (closing * depth if random.random() < 0.5 else b"") + b"}"


def brackets_in_text(random: Random) -> bytes:
    return json.dumps({"a": '\\"[{' * between(random, 100, 9999), "b": [[]] * 200}).encode()


JSONS: dict[str, tuple[str, Callable[[Random], bytes]]] = {
    "json_empty": ("bad_json", lambda r: one_of(r, [b"", b" ", b"\n"])),
    "json_cut": (
        "bad_json",
        lambda r: cut(r, json.dumps({"caption": "a", "n": list(range(between(r, 9, 99)))}).encode()),
    ),
    "json_of_words": ("bad_json", lambda r: caption(r)),
    "json_python": ("bad_json", lambda r: b"{'a': %d, 'b': None}" % between(r, 0, 999)),
    "json_nested_deep": ("bad_json", nested),
    "json_invalid_utf_8": ("bad_json", lambda r: b'{"a": "' + bytes([between(r, 0x80, 0xBF)]) + b'"}'),
    "json_number_of_5000_digits": ("bad_json", lambda r: b'{"a": ' + b"9" * between(r, 4301, 9999) + b"}"),
    "json_over_16_MiB": ("too_many_bytes", lambda r: b"{}" + b" " * between(r, 16 * 2**20, 18 * 2**20 - 2)),
    "json_is_a_list": ("good", lambda r: json.dumps([{"caption": "a"}] * between(r, 0, 9)).encode()),
    "json_is_a_number": ("good", lambda r: b"%d" % between(r, -99, 99)),
    "json_with_nan": ("good", lambda r: b'{"a": NaN, "b": -Infinity, "c": 1e%d}' % between(r, 300, 999)),
    "json_huge_int": ("good", lambda r: b'{"a": -%s}' % (b"9" * between(r, 20, 4300))),
    "json_duplicate_keys": ("good", lambda r: b'{"a": 1, "a": %d, "captions": [], "captions": 3}' % between(r, 0, 99)),
    "json_with_bom": ("good", lambda r: b"\xef\xbb\xbf" + b'{"a": %d}' % between(r, 0, 99)),
    "json_utf_16": ("good", lambda r: json.dumps({"a": between(r, 0, 99)}).encode(one_of(r, ["utf-16", "utf-32-le"]))),
    "json_brackets_in_text": ("good", brackets_in_text),
    "json_captions_of_another_type": (
        "good",
        lambda r: json.dumps({"captions": one_of(r, [3, "a", {"a": "b"}, [1, 2], ["a", None], None, True])}).encode(),
    ),
    "json_captions_with_a_lone_surrogate": (
        "bad_caption",
        lambda r: b'{"captions": ["\\ud8%02x"]}' % between(r, 0, 255),
    ),
    "json_surrogate_elsewhere": ("good", lambda r: b'{"url": "\\ud8%02x"}' % between(r, 0, 255)),
}

for _name, (_outcome, _text) in JSONS.items():
    SAMPLES[_name] = captioned(_text, _outcome, "json")

# -- the caption and the uid in the json ------------------------------------------------------------------------------


def uid(random: Random) -> str:
    return random.bytes(16).hex()


def fields(fill: Callable[[Random], Any], outcome: str) -> Plant:
    """Return a kind of samples whose json holds this beside a caption and a uid."""

    def plant(random: Random, key: str) -> Planted:
        values = {"caption": caption(random).decode(), "uid": uid(random)} | fill(random)
        text = json.dumps({k: v for k, v in values.items() if v is not ...}).encode()
        return of_files(key, {"jpg": photo(random), "json": text}, outcome)

    return plant


FIELDS: dict[str, tuple[str, Callable[[Random], Any]]] = {
    "field_caption_of_another_type": (
        "bad_caption",
        lambda r: {"caption": one_of(r, [0, 3, 1.5, True, False, [], ["a"], {}, {"a": "b"}])},
    ),
    "field_caption_with_a_lone_surrogate": ("bad_caption", lambda r: {"caption": "a \udc80" + "b" * between(r, 0, 99)}),
    "field_caption_missing": ("good", lambda r: {"caption": one_of(r, [..., None, ""])}),
    "field_uid_missing": ("bad_uid", lambda r: {"uid": one_of(r, [..., None])}),
    "field_uid_of_another_type": ("bad_uid", lambda r: {"uid": one_of(r, [3, 1.5, True, [], {}, 2**128])}),
    "field_uid_of_another_length": ("bad_uid", lambda r: {"uid": uid(r)[: 2 * between(r, 0, 15)] * one_of(r, [1, 3])}),
    "field_uid_of_other_letters": ("bad_uid", lambda r: {"uid": uid(r)[:-1] + one_of(r, list("gz\u0660\ud800 é"))}),
}

for _name, (_outcome, _fill) in FIELDS.items():
    SAMPLES[_name] = fields(_fill, _outcome)
    JSON.add(_name)


@sample_kind
def field_json_of_another_type(random: Random, key: str) -> Planted:
    text = one_of(random, [b"[]", b"3", b'"a"', b"null", b"true", b"[{}]"])
    return of_files(key, {"jpg": photo(random), "json": text}, "bad_json")


@sample_kind
def field_json_missing(random: Random, key: str) -> Planted:
    return of_files(key, {"jpg": photo(random), "txt": caption(random)}, "bad_uid")


JSON |= {"field_json_of_another_type", "field_json_missing"}
