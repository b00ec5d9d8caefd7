"""Small real pipelines of every family with seeded random weights, saved as a user would save one."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from memfilter.magnitude import Scorer

WIDTH = 32
LATENT_SIDE = 16
_MERGES = [("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("o", "n</w>")]


def write_pipeline(folder: Path, prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any) -> Path:
    """Save a Stable Diffusion pipeline of a few million weights, the same for the same seed, and return its folder.

    `scheduler` goes to the DDIM scheduler, whose other settings are those of Stable Diffusion 1.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    pipe = StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_scheduler(prediction_type, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer() -> CLIPTokenizer:
    symbols = [*_byte_symbols(), *(f"{symbol}</w>" for symbol in _byte_symbols())]
    tokens = [*symbols, *("".join(pair) for pair in _MERGES), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=_MERGES, model_max_length=77)


def _byte_symbols() -> list[str]:
    # the printable character that stands for each byte in a byte-level vocabulary
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _text_encoder(tokenizer: CLIPTokenizer, kind: Any = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=WIDTH,
    )
    return kind(config).eval()


def _unet(**settings: Any) -> UNet2DConditionModel:
    shape = {
        "sample_size": LATENT_SIDE,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(shape | settings)).eval()


def _autoencoder(**settings: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=2 * LATENT_SIDE,
        **settings,
    )
    return vae.eval()


def _flow_autoencoder() -> AutoencoderKL:
    return _autoencoder(scaling_factor=0.3611, shift_factor=0.1159)


def _deep_autoencoder() -> Any:
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )
    return vae.eval()


def _frames_autoencoder() -> Any:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.1, 2.2, 1.3, 0.4],
    )
    return vae.eval()


def _scheduler(prediction_type: str, **settings: Any) -> DDIMScheduler:
    stable_diffusion = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(prediction_type=prediction_type, **(stable_diffusion | settings))


def rounding(scorer: Scorer) -> float:
    """Return how far the captions of its batch may move a score in float32, as `Scorer` promises."""
    return 1e-6 * float(Scorer(scorer.denoiser, batch_size=1).unconditional[0].norm())


# -- the other families -----------------------------------------------------------------------------------------------


def write_family(folder: Path, family: str, seed: int = 0, **settings: Any) -> Path:
    """Save a small pipeline of one of FAMILIES, the same for the same seed, and return its folder.

    `settings` go to the function that builds it.
    """
    torch.manual_seed(seed)
    FAMILIES[family](**settings).save_pretrained(folder, safe_serialization=True)
    return folder


def _sdxl(zeros: bool = True, **scheduler: Any) -> Any:
    tokenizer = _tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=_autoencoder(scaling_factor=0.13025),
        text_encoder=_text_encoder(tokenizer),
        text_encoder_2=_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=_scheduler("epsilon", **scheduler),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def _sd3(t5: bool = True) -> Any:
    tokenizer = _tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_autoencoder(),
        text_encoder=_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(2 * WIDTH) if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None,
    )


def _flux(guidance: bool = True) -> Any:
    tokenizer = _tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=_flow_autoencoder(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(WIDTH),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer.eval(),
    )


def _pixart(kind: str = "Sigma", sizes: bool = False) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8 if not sizes else 12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32 if not sizes else 48,
        caption_channels=WIDTH,
        sample_size=LATENT_SIDE,
        use_additional_conditions=sizes,
    )
    return getattr(diffusers, f"PixArt{kind}Pipeline")(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(WIDTH),
        vae=_autoencoder(),
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=LATENT_SIDE,
        timestep_scale=0.5,
    )
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return diffusers.SanaPipeline(
        tokenizer=_gemma_tokenizer(),
        text_encoder=_gemma(),
        vae=_deep_autoencoder(),
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**flow),
    )


def _lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_flow_autoencoder(),
        text_encoder=_gemma(),
        tokenizer=_gemma_tokenizer(),
    )


def _z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    tokenizer = _qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_autoencoder(),
        text_encoder=transformers.Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def _qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer = _qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
        "rope_theta": 1000000.0,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    ids = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=_frames_autoencoder(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "sana": _sana,
    "lumina2": _lumina2,
    "z_image": _z_image,
    "qwen_image": _qwen_image,
}


def _t5_tokenizer() -> Any:
    letters = string.ascii_letters + string.digits + ",."
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{letter}" for letter in letters), "▁dog", "ing"]
    scores = [(piece, 0.0 if i < 3 else -2.0 - i / 100) for i, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)


def _t5(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=len(_t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config).eval()


def _gemma_tokenizer() -> Any:
    # with the words of Sana's instruction, so that it is no longer than real ones make it
    call = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    words = "".join(call["complex_human_instruction"].default).split()
    merges = list(dict.fromkeys(("\u2581" + word[:i], word[i]) for word in words for i in range(len(word))))
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*string.ascii_letters, *string.digits, "\u2581", *",.:-'<>()\n", *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*specials, *pieces]))}
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=4096)
    start = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    tokenizer._tokenizer.post_processor = start
    return tokenizer


def _gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(_gemma_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return transformers.Gemma2Model(config).eval()


def _qwen_tokenizer() -> Any:
    vocabulary = {symbol: i for i, symbol in enumerate([*_byte_symbols(), "<|endoftext|>"])}
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=4096)
