"""Flux.1, dev and schnell: a CLIP for the pooled state and a T5 for the states, and latents in packets of 2 by 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .autoencoder import latent_side
from .base import Condition, Family, Flow, Source, Token, Tokens, packed, spans, tokenise

if TYPE_CHECKING:
    import torch

_GUIDANCE = 3.5


class Flux(Flow, Family):
    """Flux.1.  The dev model is distilled and takes its guidance as an input: the pipeline's default, 3.5."""

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    parts = (
        *("model_index.json", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        *("transformer", "vae/config.json"),
    )

    _T5_LENGTH = 512  # the pipeline's own; nothing masks the padding, so the length shapes the prediction

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        super().__init__(source, device, dtype)
        folder = source.folder
        self._clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._t5_tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer_2", local_files_only=True)
        self._clip = self._load(CLIPTextModel, folder / "text_encoder")
        self._t5 = self._load(T5EncoderModel, folder / "text_encoder_2")
        self._transformer = self._load_denoiser(FluxTransformer2DModel, folder / "transformer")
        self._read_schedule(folder)
        side = latent_side(folder)
        self.latent_shape = (self._transformer.config.in_channels // 4, side, side)
        self._clip_length = int(self._clip.config.max_position_embeddings)
        self._guidance = _GUIDANCE if self._transformer.config.guidance_embeds else None
        lengths = [self._clip_length, self._T5_LENGTH]
        self.settings = {"unconditional": "empty", "max_tokens": lengths, "guidance": self._guidance}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the two text encoders see, as bytes."""
        clip, t5 = self._ids(captions)
        return [one + other for one, other in zip(packed(clip), packed(t5), strict=True)]

    def encode(self, captions: list[str]) -> Condition:
        """Return the T5's states (B, 512, D) and the CLIP's pooled state."""
        clip, t5 = self._ids(captions)
        pooled = self._clip(self._tensor(clip)).pooler_output
        return Condition(self._t5(self._tensor(t5))[0].to(self.dtype), pooled)

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the transformer's velocity (B, C, H, W)."""
        rows, columns = (side // 2 for side in x.shape[-2:])
        out = self._transformer(
            hidden_states=pack(x),
            timestep=self._times(timestep / 1000, len(x)),
            guidance=None if self._guidance is None else self._times(self._guidance, len(x)),
            encoder_hidden_states=condition.states,
            pooled_projections=condition.pooled,
            txt_ids=x.new_zeros((condition.states.shape[1], 3)),
            img_ids=_places(rows, columns, x),
            return_dict=False,
        )[0]
        return unpack(out, rows, columns)

    def tokens(self, caption: str) -> tuple[list[Token], int]:
        """Return the caption's tokens among the T5's 512, and how many of its characters were read."""
        return spans(self._t5_tokenizer, caption, self._T5_LENGTH)

    def _ids(self, captions: list[str]) -> tuple[Tokens, Tokens]:
        clip, _ = tokenise(self._clip_tokenizer, captions, self._clip_length)
        t5, _ = tokenise(self._t5_tokenizer, captions, self._T5_LENGTH)
        return clip, t5


def pack(x: torch.Tensor) -> torch.Tensor:
    """Return latents (B, C, H, W) as (B, H/2 * W/2, 4 C): a row for each 2 by 2 square."""
    count, channels, height, width = x.shape
    squares = x.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(count, height * width // 4, channels * 4)


def unpack(packets: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the latents that were packed."""
    count, _, channels = packets.shape
    squares = packets.reshape(count, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(count, channels // 4, 2 * rows, 2 * columns)


def _places(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return (rows * columns, 3): of each packet a zero, its row and its column."""
    import torch

    grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return grid.to(like)
