"""Passwords, signatures and keys reach no file, no message and no log; control codes no message and no log."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_finished
import test_generalisation
from click.testing import CliRunner
from conftest import encoded, picture, sample, write_tar
from test_finished import RECORD, config, file_of
from test_generalisation import Serve
from test_given import forge
from test_remote import Server

import memfilter
from memfilter import Config, ConfigError, Manifest, MemfilterError, ModelError, OnlineFilter, ShardError
from memfilter.cli import cli
from memfilter.errors import shown, without_secrets
from memfilter.records import Shard
from memfilter.rewriters import Endpoint
from memfilter.source import open_shard
from memfilter.store import read_sealed, write_sealed

shards, finished, run = test_finished.shards, test_finished.finished, test_finished.run
serve = test_generalisation.serve

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:s3cr3t@host:80/a/0.tar?X-Sig=s3cr3t&x=1", "https://host:80/a/0.tar"),
        ("https://me:s3@cr3t@host/0.tar", "https://host/0.tar"),
        ("403, url='https://host/0.tar?sig=s3cr3t', at 3", "403, url='https://host/0.tar', at 3"),
        ("GET /a/0.tar?sig=s3cr3t failed", "GET /a/0.tar failed"),
        ("sftp://me:s3cr3t@host/0.tar", "sftp://host/0.tar"),
        ("abfs://box@account.dfs.core.windows.net/0.tar", "abfs://box@account.dfs.core.windows.net/0.tar"),
        ("github://me:repository@main/0.tar", "github://me:repository@main/0.tar"),
        ("hf://datasets/me/set@main/0.tar", "hf://datasets/me/set@main/0.tar"),
        ("/data/why?.tar, me@host", "/data/why?.tar, me@host"),
        ("s3://bucket/a#1.tar", "s3://bucket/a#1.tar"),
    ],
)
def test_a_url_is_told_without_userinfo_and_query(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
    assert str(MemfilterError(text)) == expected


@pytest.mark.parametrize("part", ["a-", "a.", "a://", "a://a", "?a", "@a://", '?a="'])
def test_a_long_name_takes_no_long_time(part: str) -> None:
    text, started = part * 200_000 + "?@", time.process_time()
    without_secrets(text)
    assert time.process_time() - started < 5


def test_of_a_command_the_program_and_the_shard_are_told() -> None:
    assert shown("pipe:cat b.tar") == "pipe:cat b.tar"
    told = shown(f"pipe:curl -H 'Authorization: Bearer {SECRET}' 'https://me:{SECRET}@host/0.tar?sig={SECRET}'")
    assert told == "pipe:curl … https://host/0.tar"
    assert shown(f"pipe:KEY={SECRET} fetch 0.tar") == "pipe:… … 0.tar"
    assert shown(f"pipe:echo {SECRET}") == "pipe:echo …"


@pytest.fixture
def server(tmp_path: Path, shards: Path) -> Iterator[Server]:
    shutil.copytree(shards, tmp_path / "served")
    with Server(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def signed(server: Server, *names: str, signature: str = SECRET) -> list[str]:
    host = server.url.removeprefix("http://")
    return [f"http://me:{SECRET}@{host}/{name}?X-Amz-Signature={signature}" for name in names]


def holding(folder: Path, secret: str = SECRET) -> list[str]:
    """Files that hold the secret, or are named by it."""
    return [
        str(p) for p in folder.rglob("*") if secret in p.name or (p.is_file() and secret.encode() in p.read_bytes())
    ]


NAMES = ("a/00000.tar", "a/00001.tar", "b/00002.tar", "b/00003.tar")


def test_signed_urls_are_stored_without_their_signature(server: Server, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    memfilter.run(signed(server, *NAMES), out, config(), workers=1)
    assert holding(out) == []
    server.log.clear()
    memfilter.run(signed(server, *NAMES, signature="another"), out, config(), workers=1)
    assert not [name for method, name, _ in server.log if method == "GET" and name.endswith(".tar")]
    given = file_of(tmp_path, **RECORD)
    memfilter.rethreshold(out, given, workers=1, inputs=signed(server, *NAMES, signature="third"))
    assert holding(out) == holding(out, "third") == []
    assert memfilter.verify(out) == []
    # the manifest knows a shard by whichever signature it comes with
    manifest = Manifest.load(out)
    assert manifest.shard_of(signed(server, NAMES[0], signature="fourth")[0]) == NAMES[0]
    memfilter.run([str(shards)], tmp_path / "local", config(**RECORD), workers=1)
    assert Manifest.load(tmp_path / "local").info["digest"] == manifest.info["digest"]


def test_a_run_of_before_whose_root_has_a_password_goes_on(server: Server, tmp_path: Path) -> None:
    memfilter.run(signed(server, *NAMES), tmp_path / "out", config(), workers=1)
    forge(tmp_path / "out", lambda s: s.__setitem__("root", s["root"].replace("://", f"://me:{SECRET}@")))
    memfilter.run(signed(server, *NAMES), tmp_path / "out", config(), workers=1)
    assert holding(tmp_path / "out") == []


@pytest.mark.parametrize("status", [403, 404, 500])
@pytest.mark.parametrize("methods", ["heads gets", "gets"])
def test_a_store_that_refuses_is_told_without_the_signature(
    status: int, methods: str, server: Server, tmp_path: Path
) -> None:
    for method in methods.split():
        getattr(server, method)["a/00000.tar"] = itertools.repeat(("status", status))
    command = [sys.executable, "-m", "memfilter", "-v", "run", *signed(server, *NAMES), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "00000.tar" in done.stderr
    assert SECRET not in done.stderr + done.stdout
    assert not (tmp_path / "out").exists() or holding(tmp_path / "out") == []


def test_names_that_clash_or_lie_elsewhere_are_told_without_secrets(server: Server, tmp_path: Path) -> None:
    place = signed(server, "a/00000.tar")
    for patterns, root in ((place, f"http://me:{SECRET}@elsewhere/"), ([*place, f"{place[0]}&x=1"], None)):
        with pytest.raises(MemfilterError) as told:
            memfilter.run(patterns, tmp_path / "out", config(input={"root": root}), workers=1)
        assert SECRET not in str(told.value)


def test_a_command_is_for_its_owners_eyes(shards: Path, tmp_path: Path) -> None:
    urls = [f"pipe:KEY={SECRET} cat {shards / name}" for name in NAMES]
    wanted = config(input={"allow_pipe": True})
    memfilter.run(urls, tmp_path / "out", wanted, workers=1)
    memfilter.run([str(shards)], tmp_path / "open", config(), workers=1)
    mode = stat.S_IMODE((tmp_path / "open" / "run.json").stat().st_mode)
    assert mode & 0o044
    assert stat.S_IMODE((tmp_path / "out" / "run.json").stat().st_mode) == 0o600
    assert holding(tmp_path / "out") == [str(tmp_path / "out" / "run.json")]
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, **RECORD), workers=1, trust=True)
    assert stat.S_IMODE((tmp_path / "out" / "run.json").stat().st_mode) == 0o600
    memfilter.run([str(shards)], tmp_path / "out", config(**RECORD), workers=1)
    assert stat.S_IMODE((tmp_path / "out" / "run.json").stat().st_mode) == mode


def test_a_command_that_fails_is_told_without_its_words() -> None:
    shard = Shard("x.tar", f"pipe:KEY={SECRET} false x.tar", None)
    with (
        pytest.raises(ShardError, match=r"the command ended with exit code 1: pipe:… … x\.tar$"),
        open_shard(shard) as m,
    ):
        list(m)
    with pytest.raises(ConfigError) as told:
        memfilter.run([f"pipe:curl -H {SECRET} x.tar"], "out", config())
    assert SECRET not in str(told.value)


def test_a_loader_tells_of_unknown_samples_without_the_signature(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = Manifest.load(run)
    stranger: dict[str, Any] = {"__url__": f"https://me:{SECRET}@host/x.tar?sig={SECRET}", "__key__": "0"}
    with pytest.raises(KeyError) as told:
        list(manifest.attach()([stranger]))
    piped = {**stranger, "__url__": f"pipe:curl -H {SECRET} x.tar"}
    with pytest.raises(KeyError) as also:
        list(manifest.attach()([piped]))
    with caplog.at_level(logging.INFO):
        list(manifest.attach(missing="keep")([stranger, piped]))
    assert SECRET not in f"{told.value}{also.value}{caplog.text}"
    assert "passed with weight 1" in caplog.text


def test_an_endpoints_password_and_key_reach_nothing(
    run: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = serve(lambda _: (401, f'{{"error": {{"message": "wrong key {SECRET}"}}}}'.encode()))
    endpoint = server.settings["endpoint"].replace("://", f"://me:{SECRET}@")
    settings = {"endpoint": endpoint, "model": "small", "joint_count": None, "image_count": 1}
    with pytest.raises(ModelError, match="check OPENAI_API_KEY") as told:
        memfilter.generalise(run, settings=settings)
    server.reply = lambda _: "an animal"
    command = [sys.executable, "-m", "memfilter", "-v", "generalise", str(run), "--endpoint", endpoint]
    command += ["--model", "small", "--config", str(file_of(tmp_path, generalise={"image_count": 1}))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0
    assert server.asked
    assert SECRET not in f"{told.value}{done.stderr}{done.stdout}"
    assert holding(run) == []
    with pytest.raises(ConfigError) as wrong:
        Config.parse({"generalise": {"endpoint": f"ftp://me:{SECRET}@host"}})
    assert SECRET not in str(wrong.value)


def test_answers_are_an_endpoints_by_whichever_password_it_was_asked() -> None:
    endpoints = [Endpoint(f"https://{who}host/v1", "small", 1.0, 1) for who in (f"me:{SECRET}@", "me:other@", "")]
    assert len({endpoint.identity for endpoint in endpoints}) == 1


def test_a_picture_of_no_secret_is_as_it_was(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "in" / "what?x=1.tar", sample("0", encoded(picture(0)), "one"))
    assert memfilter.run([str(shard)], tmp_path / "out", config(), workers=1).shards == ["what?x=1.tar"]
    memfilter.rethreshold(tmp_path / "out", file_of(tmp_path, **RECORD), workers=1)
    assert memfilter.verify(tmp_path / "out") == []


# -- control codes ----------------------------------------------------------------------------------------------------

CODES = "a\x1b[31m\x9bK\u202e\r\n\x07b"


def test_keys_of_an_online_filter_reach_a_log_without_control_codes(caplog: pytest.LogCaptureFixture) -> None:
    stream = [{"__url__": f"{CODES}.tar", "__key__": CODES, "jpg": b"\xff\xd8\xff", "txt": b"x"}]
    with caplog.at_level(logging.WARNING):
        assert [s["loss_weight"] for s in OnlineFilter()(stream)] in ([], [0.0])
    (told,) = [record.getMessage() for record in caplog.records if "left out as bad" in record.getMessage()]
    assert told.isprintable()
    with pytest.raises(ConfigError) as wrong:
        list(OnlineFilter()([{**stream[0], "jpg": 3}]))
    assert str(wrong.value).isprintable()
    piped = {**stream[0], "__url__": f"pipe:curl -H {SECRET} x.tar", "__key__": "1"}
    for odd in ({"jpg": 3}, {"__key__": 3}):
        with pytest.raises(ConfigError, match=r"x\.tar/\d: its") as wrong:
            list(OnlineFilter()([{**piped, **odd}]))
        assert SECRET not in str(wrong.value)
    with caplog.at_level(logging.WARNING):
        list(OnlineFilter()([piped]))
    assert "pipe:curl … x.tar/1: left out as bad" in caplog.text
    assert SECRET not in caplog.text


def test_a_loaders_warnings_have_no_control_codes(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    stranger = {"__url__": f"/x/{CODES}.tar", "__key__": CODES}
    with caplog.at_level(logging.WARNING):
        list(Manifest.load(run).attach(missing="keep")([stranger]))
    assert caplog.records
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_what_a_manifest_tells_is_printed_without_control_codes(run: Path, tmp_path: Path) -> None:
    stored = read_sealed(run / "manifest" / "manifest.json")
    assert stored
    stored["files"][CODES] = "0" * 32
    write_sealed(run / "manifest" / "manifest.json", stored)
    done = CliRunner().invoke(cli, ["verify", str(run)])
    assert isinstance(done.exception, MemfilterError)
    assert "cannot be read" in str(done.exception)
    assert all(line.isprintable() for line in str(done.exception).split("\n"))
    write_tar(tmp_path / "in" / "0.tar", sample("0", encoded(picture(0)), "one"))
    memfilter.run([str(tmp_path / "in")], tmp_path / "own", config(), workers=1)
    forge(tmp_path / "own", lambda s: s["shards"].append([f"{CODES}.tar", "/nowhere", 1, "1"]))
    with pytest.raises(MemfilterError) as told:
        memfilter.rethreshold(tmp_path / "own", workers=1)
    assert str(told.value).isprintable()


def test_what_a_run_directory_tells_of_encoders_and_counts_is_printed_without_control_codes(
    run: Path, tmp_path: Path
) -> None:
    """Where whoever wrote it sealed it, and where a log tells it."""
    stored = read_sealed(run / "manifest" / "manifest.json")
    assert stored
    stored["counts"]["read"] = CODES
    write_sealed(run / "manifest" / "manifest.json", stored)
    arguments = ["export", str(run), "--to", "keys", "--out", str(tmp_path / "keys")]
    assert_printable(arguments)
    out = tmp_path / "own"
    write_tar(tmp_path / "in" / "0.tar", sample("0", encoded(picture(0)), "one"))
    memfilter.run([str(tmp_path / "in")], out, Config(), workers=1)

    def point(stored: dict[str, Any]) -> None:
        stored["config"]["images"]["encoder"] = CODES
        stored["encoders"]["images"]["similarity"] = None

    forge(out, point)
    shown = assert_printable(["-v", "rethreshold", str(out), "--workers", "1"])
    assert "the cosine of its copies was never measured" in shown.stderr


def assert_printable(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memfilter", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(line.isprintable() for line in (done.stdout + done.stderr).replace("\r", "\n").split("\n"))
    return done
