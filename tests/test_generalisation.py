"""Captions of flagged samples rewritten by a rule, a small real model and a real endpoint, and the pools they join."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
import yaml
from click.testing import CliRunner
from conftest import encoded, picture, sample, write_tar
from pipelines import write_pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import memfilter
from memfilter import Config, ConfigError, Manifest, ModelError, RunError
from memfilter.cli import cli
from memfilter.config import Generalise
from memfilter.generalisation import flagged
from memfilter.magnitude import Scorer
from memfilter.rewriters import PROMPT, LocalModel, Rule, checked

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

PAIRS = ["a dog runs near Paris", "a cat sleeps", "a truck of Anna turns", "a horse stands in 1999", "a bus waits"]
SINGLES = ["a dog waits in a park", "near a park runs a cat", "a bus stands near a truck", "he sleeps"]
CLASS = {"dog": "an animal", "cat": "an animal", "horse": "an animal", "truck": "a vehicle", "bus": "a vehicle"}


def class_of(caption: str) -> str:
    return next(kind for word, kind in CLASS.items() if word in caption.split())


def make_shards(folder: Path) -> Path:
    """Write pairs of picture and caption that are there twice, single ones, and a copy with a caption of its own."""
    rows = [(i, caption) for i, caption in enumerate(PAIRS) for _ in range(2)]
    rows += [(10 + i, caption) for i, caption in enumerate(SINGLES)] + [(0, "it runs")]
    for shard in range(2):
        part = rows[shard::2]
        members = [m for i, (seed, text) in enumerate(part) for m in sample(f"{i:03}", encoded(picture(seed)), text)]
        if shard:
            more = json.dumps({"captions": ["listed", "a horse", " \t"]}).encode()
            members += sample("json", encoded(picture(3)), PAIRS[3], json=more)
        write_tar(folder / f"{shard}.tar", members)
    return folder


def config(**sections: Any) -> Config:
    return Config.parse({"images": {"encoder": None}, **sections})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    memfilter.run([str(shards)], out, config(), workers=1)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run's directory of which 5 captions are flagged: those of the pairs that repeat."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def tree(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def table(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    rows = pq.read_table(folder / "generalised" / "captions.parquet").to_pylist()
    return {row["text"]: (row["general"], row["cause"]) for row in rows}


def pools(manifest: Manifest, folder: Path) -> dict[str, list[str] | None]:
    """Return of each kept sample's caption its pool."""
    own = [pq.read_table(folder / "signatures" / f"{name}.parquet")["caption"] for name in manifest.shards]
    captions = pa.chunked_array([c for column in own for c in column.chunks]).to_pylist()
    rows = manifest.table(["action", "captions"]).to_pylist()
    return {text: r["captions"] for text, r in zip(captions, rows, strict=True) if r["action"] == "keep"}


# -- an endpoint ------------------------------------------------------------------------------------------------------

Reply = tuple[int, bytes] | str | None


class Server:
    """A local endpoint that speaks chat completions: `reply` makes of a caption a text, or status and body."""

    def __init__(self, reply: Callable[[str], Reply]) -> None:
        self.reply, self.asked, self.keys = reply, [], set()  # type: tuple[Any, list[str], set[str]]
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = request["messages"][-1]["content"]
                before, after = PROMPT.split("{}")
                caption = prompt.removeprefix(before).removesuffix(after)
                server.asked.append(caption)
                server.keys.add(self.headers["Authorization"])
                said = server.reply(caption)
                status, body = said if isinstance(said, tuple) else (200, completion(said))
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @property
    def settings(self) -> dict[str, Any]:
        return {"endpoint": self.url, "model": "small"}


def completion(text: Any) -> bytes:
    choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "small", "choices": choices}
    ).encode()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], Reply]], Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[str], Reply]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


Serve = Callable[[Callable[[str], Reply]], Server]


def test_the_general_captions_stand_last_in_the_pools_of_the_flagged_and_nowhere_else(run: Path, serve: Serve) -> None:
    before = tree(run)
    server = serve(class_of)
    manifest = memfilter.generalise(run, settings=server.settings)
    assert sorted(server.asked) == sorted(PAIRS)
    assert table(run) == {text: (class_of(text), None) for text in PAIRS}
    assert pools(manifest, run) == {
        PAIRS[0]: [PAIRS[0], "it runs", "an animal"],
        PAIRS[1]: [PAIRS[1], "an animal"],
        PAIRS[2]: [PAIRS[2], "a vehicle"],
        PAIRS[3]: [PAIRS[3], "listed", "a horse", "an animal"],
        PAIRS[4]: [PAIRS[4], "a vehicle"],
        **dict.fromkeys(SINGLES),
    }
    found = manifest.info["generalised"]
    assert (found["flagged"], found["flagged_samples"], found["rewritten"], found["pools"]) == (5, 5, 5, 5)
    assert (found["failed"], found["over_threshold"], found["by"]) == ({}, 0, "endpoint:small")
    after = tree(run)
    changed = {n for n in before if n not in after or before[n] != after[n]}
    assert changed == {
        "run.json",
        "manifest/manifest.json",
        "manifest/parts/0.tar.parquet",
        "manifest/parts/1.tar.parquet",
    }
    assert memfilter.verify(run) == []
    assert server.url not in (run / "manifest" / "manifest.json").read_text()


def test_a_general_caption_that_is_in_the_pool_already_stands_there_once(run: Path, serve: Serve) -> None:
    manifest = memfilter.generalise(run, settings=serve(lambda c: {PAIRS[0]: SINGLES[3]}.get(c, "listed")).settings)
    found = pools(manifest, run)
    assert found[PAIRS[3]] == [PAIRS[3], "listed", "a horse"]
    assert found[PAIRS[0]] == [PAIRS[0], "it runs", SINGLES[3]]  # a caption that another sample has
    assert found[SINGLES[3]] is None


def test_verify_covers_the_generalised_captions(run: Path) -> None:
    memfilter.generalise(run)
    file = run / "generalised" / "captions.parquet"
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)
    assert memfilter.verify(run) == ["generalised/captions.parquet: its bytes have changed"]


def test_later_decisions_keep_the_general_captions(run: Path, shards: Path, serve: Serve, tmp_path: Path) -> None:
    memfilter.generalise(run, settings=serve(class_of).settings)
    whole = tree(run)
    memfilter.rethreshold(run, workers=1)
    assert tree(run) == whole
    (tmp_path / "mask.yaml").write_text("policy: {image_duplicate: mask}")
    other = memfilter.rethreshold(run, tmp_path / "mask.yaml", workers=1)
    assert other.info["generalised"]["pools"] == 11  # a copy that stays has the caption too
    memfilter.run([str(shards)], run, config(), workers=1, update=True)
    again = tree(run)
    assert {n: d for n, d in again.items() if n != "run.json"} == {n: d for n, d in whole.items() if n != "run.json"}


def test_general_captions_of_another_set_of_captions_are_not_used_and_told(
    tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    shards, out, server = make_shards(tmp_path / "in"), tmp_path / "out", serve(class_of)
    memfilter.run([str(shards)], out, config(), workers=1)
    memfilter.generalise(out, settings=server.settings)
    write_tar(shards / "2.tar", sample("1", encoded(picture(77)), "one more"))
    manifest = memfilter.run([str(shards)], out, config(), workers=1, update=True)
    assert manifest.info["generalised"] is None
    assert "run 'memfilter generalise' again" in caplog.text
    assert pools(manifest, out)[PAIRS[1]] == [PAIRS[1]]
    assert memfilter.verify(out) == []
    server.asked = []
    again = memfilter.generalise(out, settings=server.settings)
    assert server.asked == []  # the answers are kept
    assert pools(again, out)[PAIRS[1]] == [PAIRS[1], "an animal"]
    assert memfilter.verify(out) == []


def test_no_pool_is_made_where_the_policy_says_so(run: Path, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("policy: {pool_captions: false}")
    manifest = memfilter.generalise(run, tmp_path / "c.yaml", settings=serve(class_of).settings)
    assert set(pools(manifest, run).values()) == {None}
    assert manifest.info["generalised"]["pools"] == 0


def test_the_key_comes_from_the_environment(run: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    server = serve(class_of)
    memfilter.generalise(run, settings=server.settings)
    assert server.keys == {"Bearer a-key"}
    assert all(b"a-key" not in p.read_bytes() for p in run.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ((200, b"<html>busy</html>"), "no_answer"),
        ((200, b"{}"), "no_answer"),
        ((200, b'{"choices": []}'), "no_answer"),
        ((200, completion([1, 2])), "no_answer"),
        ((400, b"{}"), "http_400"),
        (None, "empty"),
        ("", "empty"),
        ('"..."', "empty"),
        ("word " * 7, "too_long"),
        ("A CAT\n\nsleeps", None),
        ("A cat sleeps.", "unchanged"),
    ],
    ids=str,
)
def test_what_is_no_answer_is_a_row_with_a_cause_and_is_asked_again(
    reply: Reply, cause: str | None, run: Path, serve: Serve
) -> None:
    server = serve(lambda caption: reply if caption == PAIRS[1] else class_of(caption))
    manifest = memfilter.generalise(run, settings=server.settings)
    good = {text: (class_of(text), None) for text in PAIRS if text != PAIRS[1]}
    assert table(run) == {PAIRS[1]: (None, cause) if cause else ("A CAT", None), **good}
    assert manifest.info["generalised"]["failed"] == ({cause: 1} if cause else {})
    assert memfilter.verify(run) == []
    server.reply, server.asked = class_of, []
    memfilter.generalise(run, settings=server.settings)
    assert server.asked == ([PAIRS[1]] if cause else [])
    assert table(run) == {PAIRS[1]: ("an animal" if cause else "A CAT", None), **good}


def test_an_endpoint_that_times_out_over_half_of_the_captions_costs_these_alone(run: Path, serve: Serve) -> None:
    slow = {PAIRS[0], PAIRS[3]}

    def reply(caption: str) -> str:
        if caption in slow:
            time.sleep(1.5)
        return class_of(caption)

    server = serve(reply)
    manifest = memfilter.generalise(run, settings={**server.settings, "timeout": 0.25})
    assert {text for text, (_, cause) in table(run).items() if cause == "timeout"} == slow
    assert manifest.info["generalised"]["failed"] == {"timeout": 2}
    assert pools(manifest, run)[PAIRS[0]] == [PAIRS[0], "it runs"]
    server.asked, slow = [], set()
    memfilter.generalise(run, settings=server.settings)
    assert sorted(server.asked) == sorted([PAIRS[0], PAIRS[3]])
    assert not any(cause for _, cause in table(run).values())


def test_nothing_that_listens_is_told_and_asked_no_further(
    run: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfilter.rewriters._GIVE_UP", 2)
    server = serve(class_of)
    server.http.shutdown()
    server.http.server_close()
    manifest = memfilter.generalise(run, settings={**server.settings, "batch_size": 1})
    assert manifest.info["generalised"]["failed"] == {"no_connection": 2, "not_asked": 3}
    assert memfilter.verify(run) == []


def test_an_endpoint_whose_answers_are_no_use_is_asked_to_the_end(
    run: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfilter.rewriters._GIVE_UP", 2)
    server = serve(lambda caption: caption)
    manifest = memfilter.generalise(run, settings={**server.settings, "batch_size": 1})
    assert manifest.info["generalised"]["failed"] == {"unchanged": 5}
    assert len(server.asked) == 5


@pytest.mark.parametrize("said", ["_" * 1_000_000, "caption " * 100_000, "*" * 1_000_000 + "dog"], ids=["_", "c", "*"])
def test_a_megabyte_of_garbage_is_checked_in_passable_time(said: str) -> None:
    start = time.process_time()
    assert checked("a dog", said)[0] is None
    assert time.process_time() - start < 2


def test_a_refused_key_or_model_ends_the_command_in_one_line(run: Path, serve: Serve) -> None:
    before = tree(run)
    server = serve(lambda _: (401, b'{"error": {"message": "no such key"}}'))
    with pytest.raises(ModelError, match=r"refuses 'small' with status 401; check OPENAI_API_KEY[^\n]*$"):
        memfilter.generalise(run, settings=server.settings)
    after = tree(run)
    assert {n for n in before if after.get(n) != before[n]} == set()
    assert memfilter.verify(run) == []


def test_killed_and_run_again_it_asks_for_the_rest_and_ends_with_the_same_bytes(
    run: Path, serve: Serve, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    hold = threading.Event()

    def reply(caption: str) -> str:
        if caption == sorted(PAIRS)[3]:
            hold.wait(60)
        return class_of(caption)

    server = serve(reply)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"generalise": {**server.settings, "batch_size": 1}}))
    command = [sys.executable, "-m", "memfilter", "generalise", str(run), "--config", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(server.asked) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert server.asked == sorted(PAIRS)[:4]
    [cache] = (run / "generalised").glob("*.jsonl")
    cache.write_bytes(cache.read_bytes() + b'["a bus')  # cut off in the middle of a line
    hold.set()
    server.asked = []
    memfilter.generalise(run, tmp_path / "c.yaml")
    assert server.asked == sorted(PAIRS)[3:]
    memfilter.generalise(whole, tmp_path / "c.yaml")
    assert tree(run) == tree(whole)


def test_answers_of_a_rewriter_outlast_another(run: Path, serve: Serve) -> None:
    server = serve(class_of)
    memfilter.generalise(run, settings=server.settings)
    whole = tree(run)
    memfilter.generalise(run, settings={"endpoint": None, "model": None})
    assert table(run)[PAIRS[0]] == ("a dog runs near", None)
    server.asked = []
    memfilter.generalise(run, settings=server.settings)
    assert server.asked == []
    assert {name: tree(run)[name] for name in whole} == whole


def test_a_run_killed_while_it_decides_again_goes_on(run: Path, serve: Serve) -> None:
    server = serve(class_of)
    memfilter.generalise(run, settings=server.settings)
    whole = tree(run)
    (run / "manifest" / "manifest.json").unlink()
    memfilter.generalise(run, settings=server.settings)
    assert tree(run) == whole


# -- what a model says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" A dog outdoors \n", ("A dog outdoors", None)),
        ('"A dog outdoors"', ("A dog outdoors", None)),
        ("General caption: a dog", ("a dog", None)),
        ("**Caption:** a dog", ("a dog", None)),
        ("<think>A dog? Or a\ncat?</think>\n\nan animal", ("an animal", None)),
        ("an\x00 animal\x1b", ("an animal", None)),
        ("an animal \ud800", ("an animal", None)),
        ("一只狗", ("一只狗", None)),
        ("کلب", ("کلب", None)),
        ("THE dog runs!", (None, "unchanged")),
        ("\n\n", (None, "empty")),
        ("x" * 61, (None, "too_long")),
        (None, (None, "empty")),
        (7, (None, "no_answer")),
    ],
)
def test_an_answer_is_cleaned_and_checked(said: Any, answer: tuple[str | None, str | None]) -> None:
    assert checked("the dog runs", said) == answer


# -- a local model ----------------------------------------------------------------------------------------------------


LEARNT = [*PAIRS, *SINGLES[:3], *CLASS, "a truck " * 15, "漢字 🐕 bus " * 3]
SURE = 0.9  # the least probability of every token of an answer


def write_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """Save a language model that has learned to say what the animal or the vehicle of a caption is."""
    torch.manual_seed(seed)
    words = sorted({w for t in [PROMPT, *LEARNT, *SINGLES, *CLASS.values()] for w in pieces(t)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    model: Any
    if kind == "causal":
        sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes, **dropout, **ends))
    else:
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        t5 = T5Config(vocab_size=len(vocabulary), **sizes, **ends, decoder_start_token_id=0, dropout_rate=0.0)
        model = T5ForConditionalGeneration(t5)
    learn(model, tokenizer, kind == "causal")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pieces(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]


def learn(model: Any, tokenizer: Any, is_causal: bool) -> None:
    """Train a model until it is SURE of every answer: close answers would be told apart by a CPU's rounding."""
    prompts = [tokenizer(PROMPT.format(c))["input_ids"] for c in LEARNT]
    goals = [[*tokenizer(class_of(c))["input_ids"], 1] for c in LEARNT]
    if is_causal:
        rows = [p + g for p, g in zip(prompts, goals, strict=True)]
        marks = [[-100] * len(p) + g for p, g in zip(prompts, goals, strict=True)]
    else:
        rows, marks = prompts, goals

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, lists))
        return torch.tensor([row + [value] * (width - len(row)) for row in lists])

    ids, labels = padded(rows, 0), padded(marks, -100)
    mask = padded([[1] * len(row) for row in rows], 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    least = 0.0
    for _ in range(1000):
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        logits, wanted = (out.logits[:, :-1], labels[:, 1:]) if is_causal else (out.logits, labels)
        places = wanted >= 0
        least = logits[places].detach().softmax(-1).gather(1, wanted[places][:, None]).min().item()
        if least > SURE:
            break
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert least > SURE, f"after 1,000 steps a token of an answer has a probability of {least:.2f}"
    model.eval()


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def language_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param) / "writer", request.param)


def rewritten(rewriter: Any, captions: list[str]) -> list[tuple[str | None, str | None]]:
    answers = dict(rewriter.rewrite(captions))
    return [answers[i] for i in range(len(captions))]


def test_a_local_model_rewrites_the_flagged_captions(language_model: Path, run: Path) -> None:
    manifest = memfilter.generalise(run, settings={"model": str(language_model)})
    assert table(run) == {text: (class_of(text), None) for text in PAIRS}
    assert manifest.info["generalised"]["by"] == "transformers:writer"
    assert pools(manifest, run)[PAIRS[4]] == [PAIRS[4], "a vehicle"]
    assert str(language_model) not in (run / "manifest" / "manifest.json").read_text()
    assert memfilter.verify(run) == []


def test_an_answer_does_not_depend_on_its_company(language_model: Path) -> None:
    together = rewritten(LocalModel(str(language_model), 4), LEARNT)
    assert together == [(class_of(c), None) for c in LEARNT]
    assert together == [rewritten(LocalModel(str(language_model), 4), [c])[0] for c in LEARNT]


def test_a_chat_template_is_used(language_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(language_model, tmp_path / "chat"))
    # only in this template does the model see the caption's own subject
    template = "{% for m in messages %}{{ m['content'].replace('fish', 'truck') }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    plain, chat = LocalModel(str(language_model), 2), LocalModel(str(folder), 2)
    assert plain.identity != chat.identity
    assert rewritten(chat, ["fish"]) == [("a vehicle", None)]


def test_a_prompt_longer_than_the_model_is_a_cause(tmp_path: Path, language_model: Path) -> None:
    config = json.loads((language_model / "config.json").read_text())
    answers = rewritten(LocalModel(str(language_model), 2), ["a dog " * 150, "a dog"])
    assert answers[1] == ("an animal", None)
    if config["model_type"] == "gpt2":  # the other one has no end of positions
        assert answers[0] == (None, "too_many_tokens")


def test_another_model_at_the_same_place_is_another_rewriter(language_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(language_model, tmp_path / "writer"))
    assert LocalModel(str(folder), 8).identity == LocalModel(str(language_model), 8).identity
    before = LocalModel(str(folder), 8).identity
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert LocalModel(str(folder), 8).identity != before


def test_models_that_cannot_be_used_are_refused_in_one_line(language_model: Path, tmp_path: Path, run: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no model of transformers: it has no config\.json"):
        memfilter.generalise(run, settings={"model": str(tmp_path / "nowhere")})
    folder = Path(shutil.copytree(language_model, tmp_path / "writer"))
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.rename(tmp_path / "away")
    with pytest.raises(ModelError, match=r"writer: the model cannot be used: [^\n]+$"):
        memfilter.generalise(run, settings={"model": str(folder)})
    settings = json.loads((folder / "config.json").read_text())
    names = dict.fromkeys(["AutoConfig", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"], "own.Thing")
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"writer: the model cannot be used: [^\n]+$"):
        memfilter.generalise(run, settings={"model": str(folder)})
    assert not (tmp_path / "trace").exists()
    assert memfilter.verify(run) == []


# -- the rule ---------------------------------------------------------------------------------------------------------


def by_rule(captions: list[str], others: list[str]) -> list[tuple[str | None, str | None]]:
    return rewritten(Rule(pa.chunked_array([sorted({*captions, *others})], pa.large_string()), ""), captions)


def test_the_rule_removes_numbers_names_and_rare_words() -> None:
    others = ["A cafe at night by Anna", "a terrace at night near Paris", "The old cafe of Anna, in Paris"]
    captions = [
        "A terrace of a cafe by Anna in 1888, at night",
        "Anna at night",
        "the zyzzogeton near Paris at IMG_7.jpg",
    ]
    assert by_rule(captions, others) == [
        ("A terrace of a cafe by in at night", None),
        ("at night", None),
        ("the near at", None),
    ]


def test_a_word_is_a_name_by_how_the_captions_mostly_write_it() -> None:
    others = ["the rose is red", "one rose and Rose", "we met Rose", "he met Rose", "we met Turner", "he met Turner"]
    assert by_rule(["we met Rose and Turner"], [*others, "a rose", "no rose"]) == [("we met Rose and", None)]
    assert by_rule(["we met Rose and Turner"], others) == [("we met and", None)]


def test_the_first_word_of_a_sentence_tells_nothing_of_its_case() -> None:
    captions = ["Dogs run. Cats sleep", "Dogs sleep. Cats run"]
    assert by_rule(captions, []) == [(None, "unchanged")] * 2


@pytest.mark.parametrize(
    ("captions", "answers"),
    [
        (
            ["一只狗在公园里", "梵高的星空 1889", "第3张照片"],
            [(None, "unchanged"), ("梵高的星空", None), ("第张照片", None)],
        ),
        (["สุนัขวิ่ง ๕ ตัว"], [("สุนัขวิ่ง ตัว", None)]),
        (["كلب في الحديقة ٣", "كلب في البيت"], [("كلب في", None), ("كلب في", None)]),
        (["कुत्ता घर में २", "कुत्ता घर पर"], [("कुत्ता घर", None)] * 2),
        (["собака бежит к Анне", "собака бежит к Олегу"], [("собака бежит к", None)] * 2),
        (["개가 달린다 7", "개가 달린다 공원"], [("개가 달린다", None)] * 2),
        (
            ["🐕🐕", "…", "1234", "#"],
            [(None, "unchanged"), (None, "unchanged"), (None, "nothing_left"), (None, "unchanged")],
        ),
        (["unique", "singular words"], [(None, "nothing_left")] * 2),
        (["x" * 100_000, "a \u202eb\u202c a", "a c"], [(None, "nothing_left"), None, ("a", None)]),
    ],
    ids=["han", "thai", "arabic", "hindi", "cyrillic", "korean", "signs", "rare", "long"],
)
def test_the_rule_works_in_every_script(captions: list[str], answers: list[Any]) -> None:
    for found, expected in zip(by_rule(captions, []), answers, strict=True):
        assert expected is None or found == expected
        assert (found[0] is None) != (found[1] is None)


def test_the_rule_is_the_default_and_the_same_on_every_call(run: Path) -> None:
    manifest = memfilter.generalise(run)
    assert manifest.info["generalised"]["by"] == "rule"
    assert table(run) == {
        PAIRS[0]: ("a dog runs near", None),
        PAIRS[1]: (None, "unchanged"),
        PAIRS[2]: ("a truck", None),
        PAIRS[3]: ("a horse stands in", None),
        PAIRS[4]: (None, "unchanged"),
    }
    whole = tree(run)
    memfilter.generalise(run)
    assert tree(run) == whole


# -- which samples, and their scores ----------------------------------------------------------------------------------


def flagged_captions(folder: Path, **settings: Any) -> set[str]:
    manifest = memfilter.generalise(folder, settings={"joint_count": None, **settings}, trust=True)
    assert manifest.info["generalised"]["flagged"] == len(table(folder))
    return set(table(folder))


def test_samples_are_flagged_by_each_count(run: Path) -> None:
    assert flagged_captions(run) == set()
    assert flagged_captions(run, joint_count=2) == set(PAIRS)
    assert flagged_captions(run, joint_count=3) == {PAIRS[3]}
    assert flagged_captions(run, joint_count=3, image_count=3) == {PAIRS[0], PAIRS[3]}
    assert flagged_captions(run, joint_count=None, image_count=None, caption_count=1) == {*PAIRS, *SINGLES}


def test_null_is_never_flagged_and_low_generality_is() -> None:
    columns = {
        "action": ["keep", "keep", "mask", "drop", "keep", "bad"],
        "joint_count": pa.array([1, 1, 1, 9, 2, 1], pa.int32()),
        "magnitude": pa.array([None, 1.5, None, 9.0, None, None], pa.float32()),
        "generality": pa.array([None, 7.0, 3.1, 1.0, None, None], pa.float32()),
    }
    rows = pa.table(columns)

    def found(threshold: float | None = None, **settings: Any) -> list[int]:
        return np.flatnonzero(flagged(rows, threshold, Generalise(**settings))).tolist()

    assert found() == [4]
    assert found(generality=3.1, joint_count=None) == [2]
    assert found(threshold=1.5) == [1, 4]
    assert found(threshold=1.5, magnitude=2.0) == [4]
    with pytest.raises(ConfigError, match="no sample of the run has a generality score"):
        flagged(rows.drop_columns("generality"), None, Generalise(generality=3.0), rated=False)
    assert not flagged(rows.drop_columns("generality"), None, Generalise(generality=3.0, joint_count=None)).any()


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("denoiser") / "model")


@pytest.fixture
def scored(shards: Path, denoiser: Path, tmp_path: Path) -> Path:
    magnitude = {"model": str(denoiser), "batch_size": 8}
    memfilter.run([str(shards)], tmp_path / "scored", config(magnitude=magnitude), workers=1)
    return tmp_path / "scored"


def test_general_captions_are_scored_apart_and_those_over_the_threshold_stay_out(
    scored: Path, denoiser: Path, serve: Serve, tmp_path: Path
) -> None:
    before = (scored / "scores" / "captions.parquet").read_bytes()
    manifest = memfilter.generalise(scored, settings=serve(class_of).settings, trust=True)
    assert (scored / "scores" / "captions.parquet").read_bytes() == before
    expected = Scorer.load(str(denoiser), batch_size=8).score([class_of(t) for t in sorted(PAIRS)])[:, 0, 0]
    magnitudes = pq.read_table(scored / "scores" / "generalised.parquet")["magnitude"].to_numpy()
    assert np.array_equal(magnitudes, expected)
    assert manifest.info["generalised"]["over_threshold"] == 0
    assert memfilter.verify(scored) == []
    worse = class_of(sorted(PAIRS)[int(expected.argmax())])
    (tmp_path / "c.yaml").write_text(f"magnitude: {{threshold: {expected.max()}}}\npolicy: {{magnitude: record}}\n")
    found = memfilter.rethreshold(scored, tmp_path / "c.yaml", workers=1)
    assert (scored / "scores" / "captions.parquet").read_bytes() == before
    kept = pools(found, scored)
    assert all(worse not in (pool or []) for pool in kept.values())
    better = {text for text in PAIRS if class_of(text) != worse}
    assert better
    assert all((kept[text] or [])[-1:] == [class_of(text)] for text in better)
    assert found.info["generalised"]["over_threshold"] == len(PAIRS) - len(better)
    assert memfilter.verify(scored) == []


def test_samples_are_flagged_by_magnitude_at_the_runs_threshold_or_another(scored: Path, tmp_path: Path) -> None:
    values = Manifest.load(scored).table(["action", "magnitude"]).to_pylist()
    kept = sorted({r["magnitude"] for r in values if r["action"] == "keep"})
    assert len(flagged_captions(scored, magnitude=kept[-2])) == 2
    assert flagged_captions(scored, magnitude=None) == set()
    (tmp_path / "c.yaml").write_text(f"magnitude: {{threshold: {kept[-3]}}}\n")
    manifest = memfilter.generalise(scored, tmp_path / "c.yaml", settings={"joint_count": None}, trust=True)
    assert manifest.info["generalised"]["flagged"] == 3  # masked ones too
    assert manifest.counts["mask"] >= 3


def test_a_masked_keeper_of_a_memorized_caption_trains_on_the_general_one_alone(
    shards: Path, denoiser: Path, serve: Serve, tmp_path: Path
) -> None:
    memorized, *general = Scorer.load(str(denoiser), batch_size=8).score([PAIRS[2], "a vehicle", "an animal"])[:, 0, 0]
    assert memorized > 1.01 * max(general)
    # just below its score, which rounds otherwise beside the run's other captions
    magnitude = {"model": str(denoiser), "batch_size": 8, "threshold": 0.9999 * float(memorized)}
    memfilter.run([str(shards)], tmp_path / "out", config(magnitude=magnitude), workers=1)
    manifest = memfilter.generalise(tmp_path / "out", settings=serve(class_of).settings, trust=True)
    masked = [r for r in manifest.table().to_pylist() if r["action"] == "mask"]
    rows = [r for r in masked if r["magnitude"] == pytest.approx(memorized, rel=1e-5)]
    assert [(r["captions"], r["loss_weight"]) for r in rows] == [(["a vehicle"], 0.0)]
    assert manifest.root is not None
    shard = f"{manifest.root}/{rows[0]['shard']}"
    data = wds.WebDataset(shard, shardshuffle=False).compose(manifest.attach(captions="pool"))
    drawn = [(s["txt"], s["captions"], s["loss_weight"]) for s in data if s["__key__"] == rows[0]["key"]]
    assert drawn == [(b"a vehicle", ["a vehicle"], 1.0)]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_one_line_and_takes_an_endpoint(run: Path, serve: Serve) -> None:
    server = serve(lambda caption: "" if caption == PAIRS[1] else class_of(caption))
    command = ["generalise", str(run), "--endpoint", server.url, "--model", "small", "--workers", "1"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == (
        "general   5 captions of 5 flagged samples: 4 rewritten by endpoint:small, 1 failed (1 empty); "
        "0 over the threshold; in the pools of 4 samples"
    )
    assert "by rule" in CliRunner().invoke(cli, ["generalise", str(run), "--rule"], catch_exceptions=False).output
    assert CliRunner().invoke(cli, ["generalise", str(run), "--rule", "--model", "x"]).exit_code == 2


def test_without_the_client_the_extra_is_named(run: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'memfilter\[generalise\]'$"):
        memfilter.generalise(run, settings=serve(class_of).settings)


def test_a_damaged_table_is_told_and_made_again(run: Path) -> None:
    memfilter.generalise(run)
    whole = tree(run)
    file = run / "generalised" / "captions.parquet"
    file.write_bytes(b"cut off")
    with pytest.raises(RunError, match=r"captions\.parquet: damaged; delete it and run 'memfilter generalise' again"):
        memfilter.rethreshold(run, workers=1)
    file.unlink()
    memfilter.generalise(run)
    assert tree(run) == whole


def test_an_endpoint_needs_a_url_and_the_name_of_its_model(run: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"endpoint": "http://x/v1"}, "name the endpoint's model"),
        ({"endpoint": "x"}, "pattern"),
    ):
        with pytest.raises(ConfigError, match=message):
            memfilter.generalise(run, settings=settings)
    with pytest.raises(RunError, match="holds no run"):
        memfilter.generalise(tmp_path / "nothing")
