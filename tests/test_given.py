"""A run directory of whoever: what it names is not run, imported, contacted or read unless the caller names it too."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import test_finished
import test_generalisation
from click.testing import CliRunner
from conftest import encoded, picture, sample, words, write_tar
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from pipelines import write_pipeline
from test_encoders import OWN
from test_finished import PLAIN, RECORD, config, file_of, standing
from test_generalisation import Serve
from test_generality import write_wordnet
from test_remote import Server

import memfilter
from memfilter import Config, ConfigError, InputError, RunError, ShardError
from memfilter.attribution import explain
from memfilter.cli import cli
from memfilter.encoders.own import own_caption_encoder, own_encoder
from memfilter.store import read_sealed, write_sealed
from memfilter.tagging import own_tagger

finished, own, run, shards = test_finished.finished, test_finished.own, test_finished.run, test_finished.shards
serve = test_generalisation.serve


def forge(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the run.json of a run, whole and sealed as whoever hands it over can."""
    stored = read_sealed(out / "run.json")
    assert stored
    change(stored)
    write_sealed(out / "run.json", stored)


# -- commands and hosts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allow", [False, True])
def test_a_command_that_run_json_names_is_not_run(allow: bool, own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    command = f"pipe:touch {tmp_path}/ran; cat {folder}/a/00000.tar"

    def point(stored: dict[str, Any]) -> None:
        stored["shards"][0][1:] = [command, None, None]
        stored["config"]["input"]["allow_pipe"] = allow

    forge(out, point)
    before = standing(out)
    (out / "shards" / "a" / "00000.tar").unlink()  # it is to be made again
    with pytest.raises(ShardError, match=r"a/00000\.tar: where it lies, run\.json alone says; name it with --inputs"):
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    with pytest.raises(ShardError, match="name it with --inputs"):
        memfilter.generalise(out, workers=1)
    assert not (tmp_path / "ran").exists()
    assert {n: d for n, d in standing(out).items() if n.startswith("manifest")} == {
        n: d for n, d in before.items() if n.startswith("manifest")
    }
    if allow:
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1, trust=True)
        assert (tmp_path / "ran").exists()
    else:
        with pytest.raises(ShardError, match="a/00000"):
            memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1, trust=True)
        with pytest.raises(ConfigError, match=r"set input\.allow_pipe: true to allow it"):
            memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1, inputs=[command])
        assert not (tmp_path / "ran").exists()
        given = file_of(tmp_path, **RECORD, input={"allow_pipe": True})
        memfilter.rethreshold(out, given, workers=1, inputs=[command])
        assert (tmp_path / "ran").exists()
    assert memfilter.verify(out) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_host_that_run_json_names_is_not_contacted(shards: Path, server: Server, tmp_path: Path) -> None:
    shutil.copytree(shards, server.folder)
    out, pattern = tmp_path / "out", f"{server.url}/{{a/00000,a/00001,b/00002,b/00003}}.tar"
    memfilter.run([pattern], out, config(), workers=1)
    server.log.clear()
    less = file_of(tmp_path, policy={"image_duplicate": "mask", "caption_duplicate": "drop"})
    before = standing(out)
    with pytest.raises(ShardError, match=r"name it with --inputs PATTERNS, or give --trust; .*nothing was changed"):
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    memfilter.verify(out)
    memfilter.Manifest.load(out).table()
    assert server.log == []
    assert standing(out) == before
    memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1, inputs=[pattern])
    assert {name for _, name, _ in server.log} >= {"a/00001.tar", "b/00002.tar", "b/00003.tar"}
    memfilter.rethreshold(out, less, workers=1)  # what only removes is made of the filtered shards
    shown = CliRunner().invoke(cli, ["rethreshold", str(out), "--config", str(file_of(tmp_path, **RECORD)), "--trust"])
    assert shown.exit_code == 0
    memfilter.run([pattern], tmp_path / "fresh", config(**RECORD), workers=1)
    assert same_but_run_json(out, tmp_path / "fresh")


def test_a_run_asks_nobody_of_shards_that_it_has_no_longer(shards: Path, server: Server, tmp_path: Path) -> None:
    shutil.copytree(shards, server.folder)
    memfilter.run([f"{server.url}/a/{{00000,00001}}.tar"], tmp_path / "out", config(), workers=1)
    forge(tmp_path / "out", lambda stored: stored["shards"][1].__setitem__(1, f"{server.url}/other/00001.tar"))
    server.log.clear()
    memfilter.run([f"{server.url}/a/00000.tar"], tmp_path / "out", config(), workers=1, update=True)
    assert not [name for _, name, _ in server.log if name.startswith("other")]
    assert (tmp_path / "out" / "shards" / "00001.tar").exists()


class Probe(MemoryFileSystem):
    """A store that is noticed as soon as somebody makes one."""

    protocol = "probe"
    made = 0
    cachable = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Probe.made += 1


def test_a_root_that_run_json_names_reaches_no_store(own: tuple[Path, Path]) -> None:
    folder, out = own
    fsspec.register_implementation("probe", Probe, clobber=True)
    forge(out, lambda stored: stored.__setitem__("root", "probe://host/in"))
    with pytest.raises(InputError, match="not below the input root probe://host/in"):
        memfilter.run([str(folder)], out, config(), workers=1)
    assert Probe.made == 0


# -- other files of this machine --------------------------------------------------------------------------------------


def test_a_file_of_other_bytes_is_not_taken_for_a_shard(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    private = tmp_path / "private.tar"
    private.write_bytes((folder / "b" / "00003.tar").read_bytes())
    forge(out, lambda stored: stored["shards"][1].__setitem__(1, str(private)))
    before = standing(out)
    with pytest.raises(ShardError, match=r"a/00001\.tar: has (changed|[\d,]+ bytes, not .+); .*nothing was changed"):
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    assert standing(out) == before


def test_a_named_pipe_does_not_hold_the_command_up(own: tuple[Path, Path], tmp_path: Path) -> None:
    out = own[1]
    os.mkfifo(tmp_path / "fifo.tar")
    forge(out, lambda stored: stored["shards"][1].__setitem__(slice(1, 4), [str(tmp_path / "fifo.tar"), None, None]))
    with pytest.raises(ShardError, match=r"a/00001\.tar: is no file"):
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)


def test_inputs_that_have_moved_are_named_on_the_command_line(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    folder.rename(tmp_path / "moved")
    given = str(file_of(tmp_path, **RECORD))
    with pytest.raises(ShardError, match="bring the shard back"):
        memfilter.rethreshold(out, given, workers=1)
    with pytest.raises(InputError, match=r"^--inputs: none of these is a shard of "):
        memfilter.rethreshold(out, given, workers=1, inputs=[str(write_tar(tmp_path / "x.tar", []))])
    arguments = ["rethreshold", str(out), "--config", given, "--workers", "1"]
    places = ["--inputs", f"{tmp_path}/moved/a", "--inputs", f"{tmp_path}/moved/b/*.tar"]
    shown = CliRunner().invoke(cli, [*arguments, *places], catch_exceptions=False)
    assert shown.exit_code == 0
    assert memfilter.verify(out) == []
    memfilter.run([str(tmp_path / "moved")], tmp_path / "fresh", config(**RECORD), workers=1)
    assert same_but_run_json(out, tmp_path / "fresh")


@pytest.mark.parametrize("shard", [["a.tar"], [1, 2, 3, 4], "a.tar", ["a.tar", None, 3, 4], None])
def test_shards_that_are_none_are_one_line(shard: Any, run: Path, tmp_path: Path) -> None:
    forge(run, lambda stored: stored["shards"].__setitem__(0, shard))
    with pytest.raises(RunError, match=r"its run\.json is damaged") as caught:
        memfilter.rethreshold(run, file_of(tmp_path, **RECORD), workers=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", [3, {}, ["/"]])
def test_a_root_that_is_none_is_one_line(root: Any, run: Path, shards: Path) -> None:
    forge(run, lambda stored: stored.__setitem__("root", root))
    for call in (lambda: memfilter.run([str(shards)], run, config()), lambda: memfilter.Manifest.load(run)):
        with pytest.raises(RunError, match=r"run\.json: damaged, its root is no folder's name"):
            call()


# -- code -------------------------------------------------------------------------------------------------------------

ENCODERS = (
    OWN
    + """
import pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()

class Texts:
    dim, identity, similarity = 26, "letters-1", 0.95

    def encode(self, texts):
        rows = np.array([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts], np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

class Tags:
    identity = "tags-1"

    def tag(self, captions):
        from memfilter.tagging import Token
        return [[Token(word, "NOUN") for word in caption.split()] for caption in captions]
"""
)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of somebody's, and beside it, once it is imported, a file."""
    path = tmp_path / "modules" / f"given_{tmp_path.name}.py"
    path.parent.mkdir()
    path.write_text(ENCODERS)
    monkeypatch.syspath_prepend(path.parent)
    return path


def was_imported(code: Path) -> bool:
    """Whether the module was imported since this was asked last; it may be again."""
    sys.modules.pop(code.stem, None)
    for remembered in (own_encoder, own_caption_encoder, own_tagger):
        remembered.cache_clear()
    mark = code.with_suffix(".imported")
    found = mark.exists()
    mark.unlink(missing_ok=True)
    return found


def same_but_run_json(one: Path, other: Path) -> bool:
    trees = [{n: d for n, d in standing(folder).items() if n != "run.json"} for folder in (one, other)]
    return trees[0] == trees[1]


def captioned(folder: Path) -> Path:
    texts = ["a dog on a log", "a god on a gol", "two cats", "three birds", words(1), words(2)]
    members = [m for i, t in enumerate(texts) for m in sample(f"{i}", encoded(picture(i // 2, 90 + i, 80)), t)]
    write_tar(folder / "0.tar", members)
    return folder


def foreign(code: Path, **more: Any) -> dict[str, Any]:
    images = {"encoder": f"{code.stem}:Colours", "match_threshold": 0.3}
    captions = {"tiers": ["exact", "semantic"], "encoder": f"{code.stem}:Texts"}
    return {"images": {**images, **more.get("images", {})}, "captions": {**captions, **more.get("captions", {})}}


def test_code_that_run_json_names_is_not_imported(code: Path, tmp_path: Path) -> None:
    folder = captioned(tmp_path / "in")
    memfilter.run([str(folder)], tmp_path / "out", Config.parse(foreign(code)), workers=1)
    assert was_imported(code)
    other: dict[str, Any] = {"images": {"hash_radius": 0}, "policy": {"image_duplicate": "mask"}}
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, **other), workers=1)
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, images={"encoder_similarity": 0.99}), workers=1)
    memfilter.generalise(tmp_path / "out", workers=1)
    memfilter.verify(tmp_path / "out")
    assert not was_imported(code)
    values = foreign(code, images={"hash_radius": 0, "encoder_similarity": 0.99})
    memfilter.run([str(folder)], tmp_path / "fresh", Config.parse({**values, "policy": other["policy"]}), workers=1)
    memfilter.generalise(tmp_path / "fresh", workers=1)
    assert same_but_run_json(tmp_path / "out", tmp_path / "fresh")


def test_captions_that_need_their_encoder_again_need_its_name(code: Path, tmp_path: Path) -> None:
    folder = captioned(tmp_path / "in")
    memfilter.run([str(folder)], tmp_path / "out", Config.parse(foreign(code)), workers=1)
    was_imported(code)
    before = standing(tmp_path / "out")
    lower: dict[str, Any] = {"encoder_similarity": 0.7}
    with pytest.raises(ConfigError, match=r"^captions\.encoder = .*: is needed, and named by .* alone") as told:
        memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, captions=lower), workers=1)
    assert "\n" not in str(told.value)
    assert not was_imported(code)
    assert standing(tmp_path / "out") == before
    lower["encoder"] = f"{code.stem}:Texts"
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, captions=lower), workers=1)
    assert was_imported(code)
    memfilter.run([str(folder)], tmp_path / "fresh", Config.parse(foreign(code, captions=lower)), workers=1)
    assert same_but_run_json(tmp_path / "out", tmp_path / "fresh")


@pytest.mark.parametrize("recorded", [None, {"images": {"identity": 3}}, "builtin", [1]])
def test_a_run_that_has_recorded_nothing_needs_the_encoders_name(code: Path, recorded: Any, tmp_path: Path) -> None:
    folder = captioned(tmp_path / "in")
    memfilter.run([str(folder)], tmp_path / "out", Config.parse(foreign(code)), workers=1)
    forge(tmp_path / "out", lambda s: s.__setitem__("encoders", recorded) if recorded else s.pop("encoders"))
    memfilter.run([str(folder)], tmp_path / "out", Config.parse(foreign(code)), workers=1)
    forge(tmp_path / "out", lambda s: s.__setitem__("encoders", recorded) if recorded else s.pop("encoders"))
    was_imported(code)
    with pytest.raises(ConfigError, match=r"^images\.encoder = .* alone; name it in --config too, or give --trust"):
        memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, **RECORD), workers=1)
    assert not was_imported(code)
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, **RECORD, **foreign(code)), workers=1)
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, **RECORD), workers=1)  # now they are recorded
    forge(tmp_path / "out", lambda s: s.pop("encoders"))
    memfilter.rethreshold(tmp_path / "out", None, workers=1, trust=True)
    assert memfilter.verify(tmp_path / "out") == []


def test_another_encoder_than_that_of_the_signatures_is_refused_as_before(code: Path, tmp_path: Path) -> None:
    memfilter.run([str(captioned(tmp_path / "in"))], tmp_path / "out", Config.parse(foreign(code)), workers=1)
    with pytest.raises(ConfigError, match="no signatures under this configuration"):
        memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, images={"encoder": "builtin"}), workers=1)


def test_a_tagger_that_run_json_names_is_not_imported(code: Path, tmp_path: Path) -> None:
    folder, small = captioned(tmp_path / "in"), write_wordnet(tmp_path / "wordnet")
    general = {"tagger": f"{code.stem}:Tags", "wordnet": str(small)}
    memfilter.run([str(folder)], tmp_path / "out", config(generality=general), workers=1)
    assert was_imported(code)
    wordnet = Path(shutil.move(small, tmp_path / "gone"))
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, **RECORD), workers=1)
    with pytest.raises(ConfigError, match=r"^generality\.tagger = .* alone; name it in --config"):
        memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, generality={"abstraction": "reference"}), workers=1)
    half = {"tagger": general["tagger"], "abstraction": "reference"}
    with pytest.raises(ConfigError, match=r"^generality\.wordnet = .* alone; name it in --config"):
        memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, generality=half), workers=1)
    assert not was_imported(code)
    shutil.move(wordnet, small)
    memfilter.run([str(folder)], tmp_path / "fresh", config(**RECORD, generality=general), workers=1)
    assert same_but_run_json(tmp_path / "out", tmp_path / "fresh")


# -- models, and files of thresholds ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a run whose samples it scored."""
    folder = tmp_path_factory.mktemp("scored")
    model = write_pipeline(folder / "model")
    (folder / "ordinary.txt").write_text("a dog\na cat\na bird\n")
    threshold = {"false_positive_rate": 0.5, "reference": str(folder / "ordinary.txt")}
    values = config(magnitude={"model": str(model), "batch_size": 8, "threshold": threshold})
    memfilter.run([str(shards)], folder / "out", values, workers=1)
    return model, folder / "out"


def test_a_model_that_run_json_names_is_not_read(scored: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = scored[0], Path(shutil.copytree(scored[1], tmp_path / "out"))
    place = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    forge(out, lambda stored: stored["config"]["magnitude"].__setitem__("model", str(place)))
    forge(out, lambda stored: stored["model"].__setitem__(0, str(place)))
    more: dict[str, Any] = {"threshold": 0.5, "seeds": 2}
    with pytest.raises(ConfigError, match=r"^magnitude\.model: scores are needed that the run does not have") as told:
        memfilter.rethreshold(out, file_of(tmp_path, magnitude=more), workers=1)
    assert "\n" not in str(told.value)
    (place / "model_index.json").rename(place / "hidden")
    memfilter.rethreshold(out, file_of(tmp_path, magnitude={"threshold": 0.5}), workers=1)  # scores as they are
    with pytest.raises(ConfigError, match=r"^magnitude\.model = .* is needed, and named by"):
        memfilter.rethreshold(out, file_of(tmp_path, magnitude={"threshold": 0.5, "lora": "x"}), workers=1)
    more["model"] = str(model)
    memfilter.rethreshold(out, file_of(tmp_path, magnitude=more), workers=1)
    assert memfilter.Manifest.load(out).info["magnitude"]["seeds"] == 2


@pytest.mark.parametrize("key", [None, "model", "lora"])
def test_a_model_beside_the_one_that_is_configured_is_not_read(
    key: str | None, scored: tuple[Path, Path], tmp_path: Path
) -> None:
    """Where run.json tells two models, the caller has named one of them, or none, and its list of files another."""
    model, out = scored[0], Path(shutil.copytree(scored[1], tmp_path / "out"))
    place = Path(shutil.copytree(model, tmp_path / "elsewhere"))

    def point(stored: dict[str, Any]) -> None:
        stored["config"]["magnitude"].update(threshold=None, model=str(model) if key else None)
        stored["model"][4 if key == "lora" else 0] = str(place)
        stored["model"][2] = {}  # of other files, so that all scores are needed

    forge(out, point)
    before = standing(out)
    given = {"magnitude": {"model": str(model)}} if key else RECORD
    with pytest.raises(ConfigError, match=r"^magnitude\.model: scores are needed that the run does not have"):
        memfilter.rethreshold(out, file_of(tmp_path, **given), workers=1)
    assert standing(out) == before


def test_a_file_that_a_stored_threshold_names_is_not_read(scored: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(scored[1], tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"^magnitude\.threshold = .*ordinary\.txt.* alone; name it in --config"):
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1, trust=True)
    memfilter.rethreshold(out, file_of(tmp_path, magnitude={"threshold": 1e9}), workers=1)
    memfilter.rethreshold(out, file_of(tmp_path, policy={"image_duplicate": "mask"}), workers=1)  # a number is no file


def test_explain_takes_the_model_from_its_caller(scored: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = scored
    with pytest.raises(ConfigError, match=r"where its model model lies, run\.json alone says; say it with --model"):
        explain(out, "02", "a/00000.tar")
    named = explain(out, "02", "a/00000.tar", model=str(model))
    assert named["words"] == explain(out, "02", "a/00000.tar", trust=True)["words"]
    with_lora = Path(shutil.copytree(out, tmp_path / "out"))
    forge(with_lora, lambda stored: stored["model"].__setitem__(4, str(tmp_path / "x.safetensors")))
    with pytest.raises(ConfigError, match=r"where the parts of its model lie, run\.json alone says; give --trust"):
        explain(with_lora, "02", "a/00000.tar", model=str(model))


# -- endpoints --------------------------------------------------------------------------------------------------------


def test_an_endpoint_that_run_json_names_gets_neither_captions_nor_the_key(
    run: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    server = serve(lambda _: "an animal")
    forge(run, lambda s: s["config"]["generalise"].update(server.settings, image_count=1))
    for more in ([], ["--trust"]):
        shown = CliRunner().invoke(cli, ["generalise", str(run), "--workers", "1", *more], catch_exceptions=False)
        assert shown.exit_code == 0
    assert server.asked == []
    assert memfilter.Manifest.load(run).info["generalised"]["by"] == "rule"
    with pytest.raises(ConfigError, match="name the endpoint's model with --model"):
        memfilter.generalise(run, settings={"endpoint": server.settings["endpoint"]})
    assert server.asked == []
    memfilter.generalise(run, settings=server.settings)
    assert server.asked


def test_the_command_line_says_what_was_needed_in_one_line(code: Path, tmp_path: Path) -> None:
    memfilter.run([str(captioned(tmp_path / "in"))], tmp_path / "out", Config.parse(foreign(code)), workers=1)
    forge(tmp_path / "out", lambda s: s.pop("encoders"))
    command = [sys.executable, "-m", "memfilter", "rethreshold", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("memfilter: images.encoder = ")


# -- names ------------------------------------------------------------------------------------------------------------

OUTSIDE = ["a/../../../victim.tar", "../victim.tar", "C:/victim.tar", "a\\..\\..\\victim.tar", "//victim.tar"]


def everything(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@pytest.mark.parametrize("name", OUTSIDE[:4])
def test_what_a_store_lists_does_not_lead_out_of_the_run(name: str, tmp_path: Path) -> None:
    store = MemoryFileSystem()
    place = f"/{tmp_path.name}"
    data = write_tar(tmp_path / "x.tar", sample("0", encoded(picture(0)), "one")).read_bytes()
    for key in (f"{place}/in/b/0.tar", f"{place}/in/{name}"):
        store.store[key] = MemoryFile(store, key, data)
    before = everything(tmp_path)
    with pytest.raises(InputError, match=r"would lead out of the run directory; rename it"):
        memfilter.run([f"memory://{place}/in"], tmp_path / "runs" / "out", config(), workers=1)
    assert everything(tmp_path) == before


def test_what_a_web_server_lists_does_not_lead_out_of_the_run(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "x.tar", sample("0", encoded(picture(0)), "one")).read_bytes()

    class Listing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = b'<a href="a.tar">a</a> <a href="b/../../../victim.tar">b</a>'
            body = data if self.path.endswith(".tar") else page
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            """Write no log."""

    before = everything(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/deep/in"
        with pytest.raises(InputError, match=r"lead out of the run directory; rename it"):
            memfilter.run([f"{url}/**/*.tar", f"{url}/a.tar"], tmp_path / "runs" / "out", config(), workers=1)
        server.shutdown()
    assert everything(tmp_path) == before


def test_two_names_of_one_place_are_told_apart(tmp_path: Path) -> None:
    store, place = MemoryFileSystem(), f"/{tmp_path.name}"
    for key in (f"{place}/a/0.tar", f"{place}/a//0.tar", f"{place}/1.tar"):
        store.store[key] = MemoryFile(store, key, bytes(1024))
    with pytest.raises(InputError, match=r"have the same name"):
        memfilter.run([f"memory://{place}"], tmp_path / "out", config(), workers=1)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["shards", "files", "run.json"])
def test_a_stored_name_that_leads_out_is_refused(name: str, where: str, run: Path, tmp_path: Path) -> None:
    path = run / ("run.json" if where == "run.json" else "manifest/manifest.json")
    stored = read_sealed(path)
    assert stored
    if where == "files":
        stored["files"][name] = "0" * 32
    elif where == "shards":
        stored["shards"][0]["name"] = name
    else:
        stored["shards"][0][0] = name
    write_sealed(path, stored)
    with pytest.raises(RunError, match=r"which lies outside") as told:
        memfilter.rethreshold(run, None, workers=1) if where == "run.json" else memfilter.verify(run)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("damage", [None, 3, [3], [{}], [{"name": 3}]])
def test_a_manifest_of_no_shards_is_one_line(damage: Any, run: Path) -> None:
    stored = read_sealed(run / "manifest" / "manifest.json")
    assert stored
    write_sealed(run / "manifest" / "manifest.json", {**stored, "shards": damage})
    with pytest.raises(RunError, match=r"manifest\.json: damaged"):
        memfilter.verify(run)


@pytest.mark.parametrize("folder", ["signatures", "signatures/a", "manifest/parts", "edges", "shards", "shards/b"])
def test_a_folder_that_is_a_link_is_not_written_through(folder: str, run: Path, tmp_path: Path) -> None:
    (run / folder).rename(tmp_path / "elsewhere")
    (run / folder).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".0.tar.1.memfilter.tmp").touch()
    before = everything(tmp_path)
    with pytest.raises(RunError, match=rf"{folder}: is a link, which leads out of the run directory"):
        memfilter.rethreshold(run, file_of(tmp_path, **RECORD), workers=1)
    assert everything(tmp_path) - {"out/.lock", "config.yaml"} == before - {"out/.lock", "config.yaml"}
    if folder == "shards":  # on another disk, perhaps
        memfilter.rethreshold(run, file_of(tmp_path, **RECORD), workers=1, trust=True)
        assert memfilter.verify(run) == []


def test_a_lock_that_is_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    (run / ".lock").unlink(missing_ok=True)
    (tmp_path / "precious").write_text("mine")
    (run / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match=r"\.lock: is a link"):
        memfilter.rethreshold(run, None, workers=1)
    assert (tmp_path / "precious").read_text() == "mine"


NO_FILES = (
    *("run.json", "next/run.json", "manifest/manifest.json", "manifest/lookup.arrow", "edges/hash.parquet"),
    *("manifest/parts/a/00000.tar.parquet", "signatures/a/00000.tar.parquet"),
    *("shards/a/00000.tar", "shards/a/00000_stats.json"),
)
ALL_COMMANDS = """
import resource, sys, memfilter
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
folder, file, *runs = sys.argv[1:]
for out in runs:
    load = lambda: memfilter.Manifest.load(out)
    for call in (
        lambda: print(*memfilter.verify(out)),
        lambda: [load().row("a/00000.tar", "00"), load().weight("a/00000.tar", "00")],
        lambda: memfilter.rethreshold(out, file, workers=1),
        lambda: memfilter.run([folder], out, memfilter.Config.load(file), workers=1, update=True),
    ):
        try:
            call()
        except (memfilter.MemfilterError, OSError) as e:
            print(e)
"""


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_does_not_hold_a_command_up(kind: str, own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    runs = [Path(shutil.copytree(out, tmp_path / f"out-{i}")) for i in range(len(NO_FILES))]
    for run, name in zip(runs, NO_FILES, strict=True):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name) if kind == "pipe" else (run / name).symlink_to("/dev/zero")
    given = file_of(tmp_path, **PLAIN, **RECORD)
    command = [sys.executable, "-c", ALL_COMMANDS, str(folder), str(given), *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout.count("is no file") >= len(NO_FILES)
