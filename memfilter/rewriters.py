"""Three ways to rewrite a caption as a general one: a local language model, one at an endpoint, and a rule.

The models are asked for what Li et al. ask for, *Mitigate Replication and Copying in Diffusion Models with Generalized
Caption and Dual Fusion Enhancement*: an extremely general caption of fewer than five words.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from .captions import normalise
from .config import Generalise, digest_of
from .denoisers import quiet
from .errors import ConfigError, ModelError, in_one_line, without_secrets
from .store import file_digest

if TYPE_CHECKING:
    import torch

PROMPT = (
    "Rewrite this image caption as an extremely general one of fewer than five words. Leave out names, numbers, brands "
    "and details. Answer with the new caption alone.\n\nCaption: {}\nGeneral caption:"
)

Answer = tuple[str | None, str | None]
"""The general caption, or None and the code of the cause."""

_SEEN = 1000  # characters of a caption that a model is shown
_MOST_WORDS, _MOST_CHARACTERS = 6, 60  # of an answer: fewer than five words are asked for
_USELESS = ("empty", "too_long", "unchanged")  # answers that are none, of an endpoint that does answer
_MOST_READ = 300  # characters of a line of an answer
_NEW_TOKENS = 24
_BUCKET = 32  # prompts are padded to a multiple of so many tokens
_GIVE_UP = 50  # requests in a row without an answer, after which an endpoint is asked no more
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")


class Rewriter(Protocol):
    """A way to rewrite captions.  `name` is told in results, `identity` is a digest of all that shapes an answer."""

    name: str
    identity: str

    def rewrite(self, captions: list[str]) -> Iterator[tuple[int, Answer]]:
        """Yield of every caption its place and its answer, in any order, each as soon as it is there."""
        ...


def find_rewriter(settings: Generalise, texts: pa.ChunkedArray, captions_digest: str) -> Rewriter:
    """Return the rewriter that is asked for; raises ModelError and ConfigError for one that cannot be had.

    `texts` are the run's distinct captions, by which the rule judges words.
    """
    if settings.model is None:
        if settings.endpoint is not None:
            raise ConfigError(
                f"{without_secrets(settings.endpoint)}: name the endpoint's model with --model or generalise.model"
            )
        return Rule(texts, captions_digest)
    if settings.endpoint is not None:
        return Endpoint(settings.endpoint, settings.model, settings.timeout, settings.batch_size)
    return LocalModel(settings.model, settings.batch_size)


def checked(caption: str, answer: Any) -> Answer:
    """Return what a model said as a caption: its first line, without quotes, a label or control characters.

    The causes are `no_answer` for what is no text, `empty`, `too_long` (over six words or 60 characters) and
    `unchanged` (but for case and punctuation).
    """
    if not isinstance(answer, str):
        return None, "empty" if answer is None else "no_answer"
    text = answer.encode("utf-8", "ignore").decode().rsplit("</think>", 1)[-1]
    line = next((found for found in map(_unwrapped, text.splitlines()) if found), "")
    if not any(map(str.isalnum, line)):
        return None, "empty"
    if len(line.split()) > _MOST_WORDS or len(line) > _MOST_CHARACTERS:
        return None, "too_long"
    return (None, "unchanged") if normalise(line) == normalise(caption) else (line, None)


def _unwrapped(line: str) -> str:
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line[:_MOST_READ])
    line = re.sub(r"^[\W_]*(?:\w+ ){0,3}caption[\W_]*:", "", line, flags=re.IGNORECASE)
    return " ".join(line.split()).strip("\"'`*_“”‘’«»「」 ")


# -- a local model ----------------------------------------------------------------------------------------------------


class LocalModel:
    """A causal or sequence-to-sequence language model in a folder of transformers, decoding greedily.

    Only safetensors are read and no code in the folder runs.  Every prompt is padded to a length of its own and every
    batch filled up, so that the captions that are rewritten with it change an answer only where rounding decides:
    between two tokens that the model finds equally likely.
    """

    def __init__(self, spec: str, batch_size: int) -> None:
        self.folder, self.batch_size = Path(spec), batch_size
        if not (self.folder / "config.json").is_file():
            raise ModelError(f"{spec}: no model of transformers: it has no config.json (save one with save_pretrained)")
        files = {p.name: file_digest(p) for p in sorted(self.folder.iterdir()) if p.suffix in _SUFFIXES}
        libraries = {name: version(name) for name in ("tokenizers", "torch", "transformers")}
        self.name = f"transformers:{self.folder.resolve().name}"
        self.identity = digest_of(["transformers-1", files, PROMPT, batch_size, _device(), libraries])

    def rewrite(self, captions: list[str]) -> Iterator[tuple[int, Answer]]:
        """Yield of every caption its place and its answer; raises ModelError for a model that cannot be used.

        A cause beside those of `checked` is `too_many_tokens`: more than the model has positions for.
        """
        import torch

        try:
            with quiet():
                self._load()
                yield from self._answers(captions)
        except ModelError as e:
            raise ModelError(f"{self.folder}: {e}") from e
        except torch.cuda.OutOfMemoryError as e:
            raise ModelError(f"{self.folder}: out of memory; lower generalise.batch_size") from e
        except Exception as e:  # transformers raises what it likes
            cause = f"{type(e).__name__}: {in_one_line(e)[:200]}"
            raise ModelError(f"{self.folder}: the model cannot be used: {cause}") from e

    def _load(self) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        options = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(self.folder, **options)
        self.is_causal = not config.is_encoder_decoder
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, **options)
        kind = AutoModelForCausalLM if self.is_causal else AutoModelForSeq2SeqLM
        model, info = kind.from_pretrained(self.folder, use_safetensors=True, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            raise ModelError(f"it lacks {len(missing)} weights, such as {missing[0]}; save or fetch it again")
        on_gpu = torch.cuda.is_available()
        self.model = model.to("cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32).eval()
        self.positions = getattr(config, "max_position_embeddings", None)
        end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0
        self.padding = next(token for token in end if token is not None)

    def _answers(self, captions: list[str]) -> Iterator[tuple[int, Answer]]:
        room = self.positions and self.positions - _NEW_TOKENS * self.is_causal
        buckets: dict[int, list[tuple[int, list[int]]]] = {}
        for i, caption in enumerate(captions):
            ids = self._ids(caption)
            if room and len(ids) > room:
                yield i, (None, "too_many_tokens")
                continue
            length = -(-len(ids) // _BUCKET) * _BUCKET
            buckets.setdefault(min(length, room or length), []).append((i, ids))
        for length, rows in sorted(buckets.items()):
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                said = self._generate([ids for _, ids in batch], length)
                for (i, _), text in zip(batch, said, strict=True):
                    yield i, checked(captions[i], text)

    def _ids(self, caption: str) -> list[int]:
        text = PROMPT.format(caption[:_SEEN])
        is_chat = self.tokenizer.chat_template is not None
        if is_chat:
            messages = [{"role": "user", "content": text}]
            template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            text = self.tokenizer.apply_chat_template(messages, **template)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        return ids

    def _generate(self, prompts: list[list[int]], length: int) -> list[str]:
        import torch

        rows = prompts + [prompts[-1]] * (self.batch_size - len(prompts))
        ids = torch.full((len(rows), length), self.padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(rows):
            place = slice(length - len(prompt), None) if self.is_causal else slice(len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), 1
        with torch.inference_mode():
            made: torch.Tensor = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=_NEW_TOKENS,
                pad_token_id=self.padding,
            )
        made = made[: len(prompts), length if self.is_causal else 0 :]
        said: list[str] = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return said


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# -- an endpoint ------------------------------------------------------------------------------------------------------


class Endpoint:
    """A model behind a URL that speaks OpenAI's chat completions; `batch_size` requests are in flight at a time.

    A request asks for one caption, so that an answer cannot end up with another's.  The key is OPENAI_API_KEY.
    """

    def __init__(self, url: str, model: str, timeout: float, batch_size: int) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as e:
            raise ConfigError("generalise.endpoint needs openai: pip install 'memfilter[generalise]'") from e
        self.url, self.model, self.timeout, self.batch_size = url, model, timeout, batch_size
        self.name = f"endpoint:{model}"
        self.identity = digest_of(["endpoint-1", without_secrets(url), model, PROMPT])

    def rewrite(self, captions: list[str]) -> Iterator[tuple[int, Answer]]:
        """Yield of every caption its place and its answer; raises ModelError where the endpoint refuses key or model.

        Causes beside those of `checked` are `timeout`, `no_connection`, `http_503` and the like, each after the
        client's own retries, and `not_asked`, for what was left when 50 requests in a row had had no answer.
        """
        import openai

        key = os.environ.get("OPENAI_API_KEY") or "none"
        client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout)
        waiting, failures = iter(range(len(captions))), 0
        pool = ThreadPoolExecutor(self.batch_size)
        asked: dict[Future[Answer], int] = {}
        try:
            while True:
                while len(asked) < self.batch_size and failures < _GIVE_UP and (i := next(waiting, None)) is not None:
                    asked[pool.submit(self._ask, client, captions[i])] = i
                if not asked:
                    break
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    answer = future.result()
                    failures = 0 if answer[1] in (None, *_USELESS) else failures + 1
                    yield asked.pop(future), answer
            yield from ((i, (None, "not_asked")) for i in waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, client: Any, caption: str) -> Answer:
        import openai

        messages = [{"role": "user", "content": PROMPT.format(caption[:_SEEN])}]
        try:
            reply = client.chat.completions.create(model=self.model, messages=messages, temperature=0)
            return checked(caption, reply.choices[0].message.content)
        except openai.APITimeoutError:
            return None, "timeout"
        except openai.APIConnectionError:
            return None, "no_connection"
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
            cause = f"{without_secrets(self.url)}: refuses {self.model!r} with status {e.status_code}"
            raise ModelError(f"{cause}; check OPENAI_API_KEY, generalise.endpoint and generalise.model") from e
        except openai.APIStatusError as e:
            return None, f"http_{e.status_code}"
        except Exception:  # what is no answer at all fails wherever the client first misses something
            return None, "no_answer"


# -- a rule -----------------------------------------------------------------------------------------------------------

# scripts that put no space between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(rf"(?:(?!\d)[{_UNSPACED}])+|[^\s{_UNSPACED}]+|\d+")
_SENTENCE_END = tuple(".!?:;…。！？।؟")


class Rule:
    """Numbers, names and rare words removed, by what the run's distinct captions hold.

    A caption is split at white space; a stretch in a script without spaces (Han, kana, Thai and the like) is one word,
    and digits beside it another.  Words are compared in the captions' normal form.  Of a caption are removed

    * numbers: words with a digit of any script;
    * names: words that begin with a capital and that the captions' sentences hold, but for their first words, more
      often with a capital than all captions hold them without one;
    * rare words: those in fewer than 2 of the captions, or in fewer than 1 of 10,000 where that is more; never signs
      or a stretch in a script without spaces, which are no words.

    What stands between the words that are left is a space where the caption had one.  Where every word goes the cause
    is `nothing_left`, and `unchanged` where none does.  A language that writes all nouns with capitals, as German
    does, or captions in Title Case lose more than names: use a model for these.
    """

    name = "rule"

    def __init__(self, texts: pa.ChunkedArray, captions_digest: str) -> None:
        self.texts = texts
        self.identity = digest_of(["rule-1", captions_digest])

    def rewrite(self, captions: list[str]) -> Iterator[tuple[int, Answer]]:
        """Yield of every caption its place and its answer, in order."""
        names, rare = self._judged({_word(token)[0] for caption in captions for token in _TOKEN.findall(caption)})
        for i, caption in enumerate(captions):
            yield i, _without(caption, names, rare)

    def _judged(self, wanted: set[str]) -> tuple[set[str], set[str]]:
        """Return which of the wanted words are names, and which are rare."""
        holding: Counter[str] = Counter()  # of each word, the captions that hold it
        large: Counter[str] = Counter()  # its uses with a capital inside a sentence
        small: Counter[str] = Counter()
        for batch in self.texts.chunks:
            for caption in _strings(batch):
                words = set()
                starts = True  # a sentence
                for token in _TOKEN.findall(caption):
                    word, is_large = _word(token)
                    if word in wanted:
                        words.add(word)
                        small[word] += not is_large
                        large[word] += is_large and not starts
                    starts = token.rstrip("\"'”’)»」").endswith(_SENTENCE_END)
                holding.update(words)
        enough = max(2, len(self.texts) / 10_000)
        no_word = re.compile(f"[{_UNSPACED}]|[^\\w]*$")
        rare = {word for word in wanted if holding[word] < enough and not no_word.match(word)}
        return {word for word in wanted if large[word] > small[word]}, rare


def _strings(texts: pa.Array) -> Iterable[str]:
    for start in range(0, len(texts), 8192):
        yield from texts.slice(start, 8192).to_pylist()


def _without(caption: str, names: set[str], rare: set[str]) -> Answer:
    """Return a caption without its numbers, names and rare words."""
    kept, end, has_words, spaced = "", 0, False, False
    removed = False
    for match in _TOKEN.finditer(caption):
        word, is_large = _word(token := match[0])
        spaced = spaced or match.start() > end
        end = match.end()
        if any(map(str.isdigit, token)) or word in rare or (is_large and word in names):
            removed = True
            continue
        kept += " " * (spaced and bool(kept)) + token
        has_words, spaced = has_words or any(map(str.isalnum, token)), False
    if not removed:
        return None, "unchanged"
    return (kept, None) if has_words else (None, "nothing_left")


@lru_cache(1 << 18)
def _word(token: str) -> tuple[str, bool]:
    """Return the normal form of a word, and whether its first letter is a capital."""
    first = next(filter(str.isalpha, token), "")
    return normalise(token), first.isupper() or first.istitle()
