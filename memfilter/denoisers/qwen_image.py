"""Qwen-Image: a Qwen 2.5 VL that is asked to describe the image, and latents in packets of 2 by 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Condition, Family, Flow, Source, packed, tokenise
from .flux import pack, unpack

if TYPE_CHECKING:
    import torch

_LENGTH = 512
_SIDE = 128  # the transformer takes any size; the pipeline's own is 1024 pixels


class QwenImage(Flow, Family):
    """Qwen-Image.  Its unconditional is the empty caption in the pipeline's template.

    Texts are padded to one length, where the pipeline pads to the longest of the batch: masked, that changes nothing.
    """

    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")
    parts = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer")
    autoencoder = "AutoencoderKLQwenImage"

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

        super().__init__(source, device, dtype)
        folder = source.folder
        self._tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
        # without its head, which would hold a number a token for every word there is
        self._text_encoder = self._load_language_model(
            Qwen2_5_VLForConditionalGeneration, folder / "text_encoder"
        ).model
        self._transformer = self._load_denoiser(QwenImageTransformer2DModel, folder / "transformer")
        self._read_schedule(folder)
        self.latent_shape = (self._transformer.config.in_channels // 4, _SIDE, _SIDE)
        empty = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
        pipeline = QwenImagePipeline(**empty)
        self._template: str = pipeline.prompt_template_encode
        self._skipped: int = pipeline.prompt_template_encode_start_idx
        self.settings = {"unconditional": "empty", "max_tokens": _LENGTH}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption, in the template, the ids that the text encoder sees, as bytes."""
        return packed(*self._ids(captions))

    def encode(self, captions: list[str]) -> Condition:
        """Return the text encoder's states (B, 512, D) after those of the template's opening, and their mask."""
        ids, mask = self._ids(captions)
        out = self._text_encoder(input_ids=self._tensor(ids), attention_mask=self._tensor(mask).long(), use_cache=False)
        states = out.last_hidden_state.to(self.dtype)
        kept = states.new_zeros((len(captions), _LENGTH, states.shape[-1]))
        masks = kept.new_zeros(kept.shape[:2]).long()
        for i, row in enumerate(mask):
            tokens = states[i, self._tensor(row)][self._skipped :]
            kept[i, : len(tokens)], masks[i, : len(tokens)] = tokens, 1
        return Condition(kept, mask=masks)

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the transformer's velocity (B, C, H, W)."""
        rows, columns = (side // 2 for side in x.shape[-2:])
        out = self._transformer(
            hidden_states=pack(x),
            timestep=self._times(timestep / 1000, len(x)),
            encoder_hidden_states=condition.states,
            encoder_hidden_states_mask=condition.mask,
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(out, rows, columns)

    def _ids(self, captions: list[str]) -> Any:
        texts = [self._template.format(caption) for caption in captions]
        return tokenise(self._tokenizer, texts, self._skipped + _LENGTH)
