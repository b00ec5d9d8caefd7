"""Lumina Image 2: a Gemma 2 behind a system prompt, and a transformer that goes from noise at 0 to the image at 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Condition, Family, Flow, Source, packed, square, tokenise

if TYPE_CHECKING:
    import torch

_LENGTH = 256  # the pipeline's own, of which the system prompt takes its share


class Lumina2(Flow, Family):
    """Lumina Image 2.  Its unconditional, like its pipeline's, is the empty text without the system prompt; that
    difference is in every magnitude.
    """

    pipelines = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    parts = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer")

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
        from transformers import Gemma2Model, GemmaTokenizerFast

        super().__init__(source, device, dtype)
        folder = source.folder
        self._tokenizer = GemmaTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._tokenizer.padding_side = "right"
        self._text_encoder = self._load_but_last_layer(Gemma2Model, folder / "text_encoder")
        self._transformer = self._load_denoiser(Lumina2Transformer2DModel, folder / "transformer")
        self._read_schedule(folder)
        self.latent_shape = square(self._transformer.config.sample_size, self._transformer.config.in_channels)
        empty = dict.fromkeys(("transformer", "scheduler", "vae", "text_encoder", "tokenizer"))
        self._system_prompt = Lumina2Pipeline(**empty).system_prompt
        self.settings = {"unconditional": "empty, without the system prompt", "max_tokens": _LENGTH}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption, after the system prompt, the ids that Gemma sees, as bytes."""
        return packed(*self._ids(captions))

    def encode(self, captions: list[str]) -> Condition:
        """Return Gemma's last states but one (B, 256, D) and their mask."""
        return self._states(*self._ids(captions))

    def unconditional(self, count: int) -> Condition:
        """Return so many times the condition of the empty text, without the system prompt."""
        return self._states(*tokenise(self._tokenizer, [""] * count, _LENGTH))

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the velocity (B, C, H, W) from image to noise, against the transformer's own direction."""
        out: torch.Tensor = self._transformer(
            hidden_states=x,
            timestep=self._times(1 - timestep / 1000, len(x)),
            encoder_hidden_states=condition.states,
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]
        return -out

    def _image_tokens(self) -> int:
        return self.latent_shape[0]  # as the pipeline counts them: its latents are not in packets

    def _ids(self, captions: list[str]) -> Any:
        texts = [f"{self._system_prompt} <Prompt Start> {caption}" for caption in captions]
        return tokenise(self._tokenizer, texts, _LENGTH)

    def _states(self, ids: Any, mask: Any) -> Condition:
        masks = self._tensor(mask).long()
        out = self._text_encoder(self._tensor(ids), attention_mask=masks, use_cache=False)
        return Condition(out.last_hidden_state.to(self.dtype), mask=masks)
