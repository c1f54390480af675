"""Text encoders from the `text_encoder/` and `tokenizer/` folders of a diffusers checkpoint: Wan's UMT5-XXL, Cosmos' T5-11B.

Embeddings equal those of diffusers' pipelines (`encode_prompt`). Shapes: B batch, L text positions, D width.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rcm_megatron.models.encoders.base import EncoderError
from rcm_megatron.models.encoders.pretrained import free_memory, load_pretrained

log = logging.getLogger(__name__)

TEXT_LEN = 512
"""Both families'."""
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The Wan release's own (`sample_neg_prompt`), in the language it was tuned in."""

COSMOS_NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, over-saturation, shaky footage, "
    "low resolution, grainy texture, pixelated images, poorly lit areas, underexposed and overexposed scenes, poor color balance, "
    "washed out colors, choppy sequences, jerky movements, low frame rate, artifacting, color banding, unnatural transitions, "
    "outdated special effects, fake elements, unconvincing visuals, poorly edited content, jump cuts, visual noise, and flickering. "
    "Overall, the video is of poor quality."
)
"""The Cosmos-Predict2 release's own."""


def clean_prompt(text: str) -> str:
    """Mojibake, curly quotes and full-width characters repaired, HTML entities resolved, white space single.

    As Wan and diffusers' `prompt_clean` do; there ftfy may be missing, which changes tokens (Wan's negative prompt has full-width
    commas), so here it may not.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class PretrainedTextEncoder:
    """An encoder of transformers with its tokenizer, on one device until `close`; subclasses say which.

    Every caption is encoded by itself, padded to text_len, so its embedding is the same in any batch; 512 tokens fill a GPU.
    """

    architecture: str
    """transformers' class."""
    default_negative_prompt: str

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        text_len: int = TEXT_LEN,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        negative_prompt: str | None = None,
    ) -> None:
        """`checkpoint` holds `text_encoder/` and `tokenizer/`. `negative_prompt` None: the model family's.

        EncoderError for files that cannot be used.
        """
        import transformers

        self.text_len = text_len
        self.negative_prompt = self.default_negative_prompt if negative_prompt is None else negative_prompt
        self._device = torch.device(device)
        self._tokenizer = _load_tokenizer(Path(checkpoint) / "tokenizer")
        # device_map: straight to the GPU, never whole in host memory
        placed = {"device_map": {"": self._device}} if self._device.type != "cpu" else {}
        model_class = getattr(transformers, self.architecture)
        self._model = load_pretrained(model_class, Path(checkpoint) / "text_encoder", dtype=dtype, **placed)
        self.text_dim = self._model.config.d_model
        if self._model.encoder.embed_tokens.weight is not self._model.shared.weight:
            raise RuntimeError(
                f"this transformers release leaves {self.architecture}'s encoder.embed_tokens without the checkpoint's shared.weight "
                "(its issue 43992); install the one of requirements.txt"
            )

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D] on the CPU; a caption of more than text_len tokens is cut, as WanPipeline does, and named.

        Raises RuntimeError after `close`.
        """
        if self._model is None:
            raise RuntimeError("got a caption after close(), need an open encoder; build a new one")
        if not captions:
            return torch.zeros(0, self.text_len, self.text_dim, dtype=self._model.dtype)
        return torch.stack([self._encode_one(self.clean(caption)) for caption in captions])

    def close(self) -> None:
        """Free the weights, on the GPU too."""
        self._model = self._tokenizer = None
        free_memory(self._device)

    @staticmethod
    def clean(caption: str) -> str:
        """The caption as it is tokenized."""
        return caption

    def _encode_one(self, caption: str) -> Tensor:
        whole = len(self._tokenizer(caption).input_ids)
        if whole > self.text_len:
            log.warning("a caption of %d tokens is cut to %d: %.60s...", whole, self.text_len, caption)
        tokens = self._tokenizer(
            [caption], padding="max_length", max_length=self.text_len, truncation=True, return_tensors="pt"
        )
        mask_1L = tokens.attention_mask.to(self._device)
        hidden_1LD = self._model(tokens.input_ids.to(self._device), mask_1L).last_hidden_state
        # where, not a product: whatever the encoder makes of padding, zeros replace it
        return torch.where(mask_1L[..., None] > 0, hidden_1LD, 0)[0].cpu()


class UMT5TextEncoder(PretrainedTextEncoder):
    """Wan2.1's and Wan2.2's."""

    architecture, default_negative_prompt = "UMT5EncoderModel", WAN_NEGATIVE_PROMPT
    clean = staticmethod(clean_prompt)


class T5TextEncoder(PretrainedTextEncoder):
    """Cosmos-Predict2's. It takes captions as they are."""

    architecture, default_negative_prompt = "T5EncoderModel", COSMOS_NEGATIVE_PROMPT


def _load_tokenizer(folder: Path):
    """The tokenizer as `tokenizer.json` says.

    Not by AutoTokenizer: since transformers 5 it rebuilds a T5Tokenizer, Wan's `tokenizer_class`, from the vocabulary and rules of
    T5's own (unknown pieces get id 2, most normalizers are dropped).
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise EncoderError(f"{folder}/tokenizer.json is missing; take the tokenizer/ folder of a diffusers checkpoint")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises bare Exceptions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EncoderError(f"{folder} holds no usable tokenizer: {reason}; copy the folder again") from error
    if tokenizer.pad_token_id is None:
        raise EncoderError(f"{folder}: got no pad_token, need one; restore tokenizer_config.json beside tokenizer.json")
    return tokenizer
