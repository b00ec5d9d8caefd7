"""Z-Image: a Qwen 3 that reads the caption as a chat, and a transformer from noise at 0 to the image at 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .autoencoder import latent_side
from .base import Condition, Family, Flow, Source, packed, tokenise

if TYPE_CHECKING:
    import torch

_LENGTH = 512


class ZImage(Flow, Family):
    """Z-Image.  Its unconditional is a chat in which nothing was said."""

    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline")
    parts = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae/config.json")

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import ZImageTransformer2DModel
        from transformers import Qwen2TokenizerFast, Qwen3Model

        super().__init__(source, device, dtype)
        folder = source.folder
        self._tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._text_encoder = self._load_but_last_layer(Qwen3Model, folder / "text_encoder")
        self._transformer = self._load_denoiser(ZImageTransformer2DModel, folder / "transformer")
        self._read_schedule(folder)
        side = latent_side(folder)
        self.latent_shape = (int(self._transformer.config.in_channels), side, side)
        self.settings = {"unconditional": "empty", "max_tokens": _LENGTH}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption, as a chat, the ids that the text encoder sees, as bytes."""
        return packed(*self._ids(captions))

    def encode(self, captions: list[str]) -> Condition:
        """Return the text encoder's last states but one (B, 512, D) and their mask."""
        ids, mask = self._ids(captions)
        masks = self._tensor(mask)
        out = self._text_encoder(input_ids=self._tensor(ids), attention_mask=masks, use_cache=False)
        return Condition(out.last_hidden_state.to(self.dtype), mask=masks.long())

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the velocity (B, C, H, W) from image to noise, against the transformer's own direction."""
        import torch

        assert condition.mask is not None
        texts = [states[kept] for states, kept in zip(condition.states, condition.mask.bool(), strict=True)]
        # it takes lists of pictures of one frame and of texts without padding
        out = self._transformer(
            list(x.unsqueeze(2)), self._times(1 - timestep / 1000, len(x)), texts, return_dict=False
        )[0]
        return -torch.stack(list(out)).squeeze(2)

    def _ids(self, captions: list[str]) -> Any:
        chats = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for caption in captions
        ]
        return tokenise(self._tokenizer, chats, _LENGTH)
