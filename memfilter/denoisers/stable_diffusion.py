"""Stable Diffusion 1, 2, XL, 3 and 3.5: CLIP text encoders, with a T5 beside them in the third."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .autoencoder import vae_scale
from .base import (
    Condition,
    Diffusion,
    Family,
    Flow,
    Source,
    Token,
    Tokens,
    has,
    packed,
    spans,
    square,
    tokenise,
)

if TYPE_CHECKING:
    import torch


class StableDiffusion(Diffusion, Family):
    """Stable Diffusion 1 and 2: one CLIP text encoder and a UNet with cross-attention."""

    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline")
    parts = ("scheduler", "text_encoder", "tokenizer", "unet")

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        super().__init__(source, device, dtype)
        folder = source.folder
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._text_encoder = self._load(CLIPTextModel, folder / "text_encoder")
        self._unet = self._load_denoiser(UNet2DConditionModel, folder / "unet")
        # Stable Diffusion counts its steps from 1, as its own pipeline insists
        self._read_schedule(folder, steps_offset=1)
        self.latent_shape = _latent_shape(self._unet.config)
        self.settings = {"unconditional": "empty", "max_tokens": _length(self._text_encoder)}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the text encoder sees, as bytes."""
        return packed(self._ids(captions))

    def encode(self, captions: list[str]) -> Condition:
        """Return the text encoder's states (B, 77, D)."""
        return Condition(self._text_encoder(self._tensor(self._ids(captions)))[0])

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the UNet's raw prediction (B, C, H, W)."""
        out: torch.Tensor = self._unet(x, timestep, encoder_hidden_states=condition.states, return_dict=False)[0]
        return out

    def tokens(self, caption: str) -> tuple[list[Token], int]:
        """Return the caption's tokens among the text encoder's 77, and how many of its characters were read."""
        return spans(self._tokenizer, caption, _length(self._text_encoder))

    def _ids(self, captions: list[str]) -> Tokens:
        return tokenise(self._tokenizer, captions, _length(self._text_encoder))[0]


class _TwoClips(Family):
    """A pair of CLIP text encoders whose last states but one are set side by side."""

    def _read_clips(self, folder: Path, first: Any, second: Any) -> None:
        from transformers import CLIPTokenizer

        self._tokenizers = [CLIPTokenizer.from_pretrained(folder / t, local_files_only=True) for t in _TOKENIZERS]
        self._text_encoders = [
            self._load(first, folder / "text_encoder"),
            self._load(second, folder / "text_encoder_2"),
        ]
        self._clip_length = _length(self._text_encoders[0])

    def _clip_ids(self, captions: list[str]) -> list[Tokens]:
        return [tokenise(tokenizer, captions, self._clip_length)[0] for tokenizer in self._tokenizers]

    def _clips(self, captions: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the states (B, 77, D1 + D2), and what each encoder gives first: its pooled state, or else no such."""
        import torch

        outs = [
            encoder(self._tensor(ids), output_hidden_states=True)
            for encoder, ids in zip(self._text_encoders, self._clip_ids(captions), strict=True)
        ]
        return torch.cat([out.hidden_states[-2] for out in outs], dim=-1), [out[0] for out in outs]


class StableDiffusionXL(Diffusion, _TwoClips):
    """SDXL: two CLIP text encoders, the pooled state of the second, and the image's size, given as the model's own.

    Its unconditional is that of its pipeline: all zeros, or the empty caption where model_index.json says so.
    """

    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetPipeline")
    parts = (
        *("model_index.json", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"),
        "vae/config.json",
    )

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        super().__init__(source, device, dtype)
        folder, index = source.folder, source.index
        self._read_clips(folder, CLIPTextModel, CLIPTextModelWithProjection)
        self._unet = self._load_denoiser(UNet2DConditionModel, folder / "unet")
        self._read_schedule(folder, steps_offset=1)
        self.latent_shape = _latent_shape(self._unet.config)
        self._scale = vae_scale(folder)
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        self.settings = {"unconditional": "zeros" if zeros else "empty", "max_tokens": self._clip_length}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the two text encoders see, as bytes."""
        first, second = self._clip_ids(captions)
        return [one + other for one, other in zip(packed(first), packed(second), strict=True)]

    def encode(self, captions: list[str]) -> Condition:
        """Return the text encoders' states (B, 77, D1 + D2) and the second's pooled state."""
        states, (_, pooled) = self._clips(captions)
        return Condition(states, pooled)

    def unconditional(self, count: int) -> Condition:
        """Return so many times the pipeline's own: zeros, or the condition of the empty caption."""
        empty = self.encode([""] * count)
        if self.settings["unconditional"] == "empty" or empty.pooled is None:
            return empty
        return Condition(empty.states.new_zeros(empty.states.shape), empty.pooled.new_zeros(empty.pooled.shape))

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the UNet's raw prediction (B, C, H, W) for an uncropped image of the latents' size."""
        height, width = (side * self._scale for side in x.shape[-2:])
        sizes = x.new_tensor([[height, width, 0, 0, height, width]]).expand(len(x), -1)
        added = {"text_embeds": condition.pooled, "time_ids": sizes}
        out: torch.Tensor = self._unet(
            x, timestep, encoder_hidden_states=condition.states, added_cond_kwargs=added, return_dict=False
        )[0]
        return out

    def tokens(self, caption: str) -> tuple[list[Token], int]:
        """Return the caption's tokens among the text encoders' 77, and how many of its characters were read.

        Raises ModelError where the two tokenizers cut the caption in different places.
        """
        first, second = (spans(tokenizer, caption, self._clip_length) for tokenizer in self._tokenizers)
        if first != second:
            raise ModelError("its two tokenizers cut this caption differently: its words have no weights")
        return first


class StableDiffusion3(Flow, _TwoClips):
    """SD3 and 3.5: two CLIP text encoders, and a T5, or zeros in its place where the pipeline has none."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    parts = (
        *("model_index.json", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "transformer"),
    )
    optional = ("text_encoder_3", "tokenizer_3")

    _gives_sigmas = False
    _max_shift = 1.16
    _T5_LENGTH = 256  # the pipeline's own; nothing masks the padding, so the length shapes the prediction

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection, T5EncoderModel, T5TokenizerFast

        super().__init__(source, device, dtype)
        folder, index = source.folder, source.index
        self._read_clips(folder, CLIPTextModelWithProjection, CLIPTextModelWithProjection)
        self._t5 = None
        if has(index, "text_encoder_3"):
            self._t5_tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer_3", local_files_only=True)
            self._t5 = self._load(T5EncoderModel, folder / "text_encoder_3")
        self._transformer = self._load_denoiser(SD3Transformer2DModel, folder / "transformer")
        self._read_schedule(folder)
        self.latent_shape = square(self._transformer.config.sample_size, self._transformer.config.in_channels)
        lengths = [self._clip_length, self._T5_LENGTH if self._t5 else 0]
        self.settings = {"unconditional": "empty", "max_tokens": lengths}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the text encoders see, as bytes."""
        rows = [packed(ids) for ids in self._clip_ids(captions)]
        if self._t5:
            rows.append(packed(tokenise(self._t5_tokenizer, captions, self._T5_LENGTH)[0]))
        return [b"".join(ids) for ids in zip(*rows, strict=True)]

    def encode(self, captions: list[str]) -> Condition:
        """Return the CLIPs' states, padded to the T5's width, before the T5's: (B, 77 + 256, D), and both pooled."""
        import torch

        clips, pooled = self._clips(captions)
        width = self._transformer.config.joint_attention_dim
        if self._t5:
            ids = tokenise(self._t5_tokenizer, captions, self._T5_LENGTH)[0]
            t5 = self._t5(self._tensor(ids))[0].to(clips.dtype)
        else:
            t5 = clips.new_zeros((len(captions), self._T5_LENGTH, width))
        clips = torch.nn.functional.pad(clips, (0, width - clips.shape[-1]))
        return Condition(torch.cat([clips, t5], dim=1), torch.cat(pooled, dim=-1))

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the transformer's velocity (B, C, H, W)."""
        out: torch.Tensor = self._transformer(
            hidden_states=x,
            timestep=self._times(timestep, len(x)),
            encoder_hidden_states=condition.states,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]
        return out

    def _image_tokens(self) -> int:
        patch = int(self._transformer.config.patch_size)
        _, height, width = self.latent_shape
        return (height // patch) * (width // patch)


_TOKENIZERS = ("tokenizer", "tokenizer_2")


def _length(clip: Any) -> int:
    return int(clip.config.max_position_embeddings)


def _latent_shape(unet: Any) -> tuple[int, int, int]:
    size = unet.sample_size if isinstance(unet.sample_size, (list, tuple)) else (unet.sample_size,) * 2
    if unet.in_channels != unet.out_channels or None in size:
        raise ModelError(
            f"the UNet takes {unet.in_channels} channels of size {unet.sample_size} and returns {unet.out_channels}; "
            "a text-to-image model's are equal and its size is set"
        )
    return square(unet.sample_size, unet.in_channels)
