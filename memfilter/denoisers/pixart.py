"""PixArt Alpha and Sigma: a T5 with a mask, captions in lower case, and a transformer that may learn its variance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .autoencoder import vae_scale
from .base import Condition, Diffusion, Family, Source, Token, packed, spans, square, tokenise

if TYPE_CHECKING:
    import torch

_LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


class PixArt(Diffusion, Family):
    """PixArt Alpha, which cuts a caption at 120 tokens, and Sigma, at 300."""

    pipelines = tuple(_LENGTHS)
    parts = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae/config.json")

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import PixArtTransformer2DModel
        from transformers import T5EncoderModel, T5TokenizerFast

        super().__init__(source, device, dtype)
        folder, index = source.folder, source.index
        self._tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._text_encoder = self._load(T5EncoderModel, folder / "text_encoder")
        self._transformer = self._load_denoiser(PixArtTransformer2DModel, folder / "transformer")
        self._read_schedule(folder)
        self.latent_shape = square(self._transformer.config.sample_size, self._transformer.config.in_channels)
        self._scale = vae_scale(folder)
        self._length = _LENGTHS[index["_class_name"]]
        self.settings = {"unconditional": "empty", "max_tokens": self._length}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption, in lower case and stripped, the ids that the text encoder sees, as bytes."""
        return packed(*self._ids(captions))

    def encode(self, captions: list[str]) -> Condition:
        """Return the T5's states (B, L, D) and their mask."""
        ids, mask = (self._tensor(part) for part in self._ids(captions))
        return Condition(self._text_encoder(ids, attention_mask=mask.long())[0].to(self.dtype), mask=mask.long())

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the transformer's raw prediction (B, C, H, W), without the variance that it may have learnt."""
        out: torch.Tensor = self._transformer(
            x,
            encoder_hidden_states=condition.states,
            encoder_attention_mask=condition.mask,
            timestep=self._times(timestep, len(x)).long(),
            added_cond_kwargs=self._size(x),
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    def tokens(self, caption: str) -> tuple[list[Token], int]:
        """Return the caption's tokens among the T5's, and how many of its characters were read."""
        lower = caption.lower()
        # of each character in lower case, the caption's: one may become two
        places = [i for i, character in enumerate(caption) for _ in character.lower()]
        places = places[len(lower) - len(lower.lstrip()) :]
        tokens, read = spans(self._tokenizer, lower.strip(), self._length)
        found = [Token(token.row, places[token.start], places[token.end - 1] + 1) for token in tokens]
        return found, places[read] if read < len(lower.strip()) else len(caption)

    def _size(self, x: torch.Tensor) -> dict[str, Any]:
        # the 1024-pixel Alpha model alone is told of the image's size
        if not self._transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self._scale for side in x.shape[-2:])
        return {
            "resolution": x.new_tensor([[height, width]]).expand(len(x), -1),
            "aspect_ratio": x.new_tensor([[height / width]]).expand(len(x), -1),
        }

    def _ids(self, captions: list[str]) -> Any:
        return tokenise(self._tokenizer, [caption.lower().strip() for caption in captions], self._length)
