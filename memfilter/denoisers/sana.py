"""Sana: a Gemma 2 that is instructed to enhance the caption, a mask, captions in lower case, and deep latents."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .base import Condition, Family, Flow, Source, packed, square, tokenise

if TYPE_CHECKING:
    import torch

_LENGTH = 300


class Sana(Flow, Family):
    """Sana.  The caption follows the instruction that the pipeline gives by default; the unconditional, like the
    pipeline's, is the empty text without it.
    """

    pipelines = ("SanaPipeline",)
    parts = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer")
    autoencoder = "AutoencoderDC"

    _gives_sigmas = False

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import SanaPipeline, SanaTransformer2DModel
        from transformers import Gemma2Model, GemmaTokenizerFast

        super().__init__(source, device, dtype)
        folder = source.folder
        self._tokenizer = GemmaTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._tokenizer.padding_side = "right"
        self._text_encoder = self._load_language_model(Gemma2Model, folder / "text_encoder")
        self._transformer = self._load_denoiser(SanaTransformer2DModel, folder / "transformer")
        self._read_schedule(folder)
        self.latent_shape = square(self._transformer.config.sample_size, self._transformer.config.in_channels)
        defaults = inspect.signature(SanaPipeline.__call__).parameters
        self._instruction = "\n".join(defaults["complex_human_instruction"].default)
        # the instruction's tokens before the caption's; both counts hold a start token, and one place is the caption's
        self._length = len(self._tokenizer.encode(self._instruction)) + _LENGTH - 2
        self.settings = {"unconditional": "empty, without the instruction", "max_tokens": _LENGTH}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption, in lower case and after the instruction, the ids that Gemma sees, as bytes."""
        return packed(*self._ids(captions))

    def encode(self, captions: list[str]) -> Condition:
        """Return Gemma's states (B, 300, D), the first and the last 299 of the text's, and their mask."""
        ids, mask = self._ids(captions)
        states, masks = self._states(ids, mask)
        places = [0, *range(-_LENGTH + 1, 0)]
        return Condition(states[:, places], mask=masks[:, places])

    def unconditional(self, count: int) -> Condition:
        """Return so many times the condition of the empty text, without the instruction."""
        states, mask = self._states(*tokenise(self._tokenizer, [""] * count, _LENGTH))
        return Condition(states, mask=mask)

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the transformer's velocity (B, C, H, W), without the variance that it may have learnt."""
        out: torch.Tensor = self._transformer(
            x,
            encoder_hidden_states=condition.states,
            encoder_attention_mask=condition.mask,
            timestep=self._times(timestep * self._transformer.config.timestep_scale, len(x)),
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    def _ids(self, captions: list[str]) -> Any:
        # lower case for the caption alone: the pipeline does so before it sets the instruction in front
        texts = [self._instruction + caption.lower().strip() for caption in captions]
        return tokenise(self._tokenizer, texts, self._length)

    def _states(self, ids: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        masks = self._tensor(mask).long()
        return self._text_encoder(self._tensor(ids), attention_mask=masks, use_cache=False)[0].to(self.dtype), masks
