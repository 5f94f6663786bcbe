"""`ChannelTokenizer`: images to tokens and any prefix of tokens back to whole images."""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import SavedModel, fingerprint, load_foreign_state
from common.config import InputError
from tokenizer.autoencoder import Decoder, Encoder
from tokenizer.bsq import BinarySphericalQuantizer, pack_bits, signs_to_codes, straight_through, unpack_bits
from tokenizer.config import TokenizerConfig
from tokenizer.published import rename_published_keys
from tokenizer.tail_drop import drop_tail, prefix_mask


class ChannelTokenizer(SavedModel):
    """Autoencoder whose latent channels are binary tokens, ordered coarse to fine.

    Example: `tokens = tokenizer.tokenize(images)`, then `tokenizer.detokenize(tokens[:, :32])` is the
    whole picture in 32 tokens. (ChannelTok, arXiv 2606.04461, sections 3.1 to 3.3.)
    """

    config_class = TokenizerConfig
    model_type = "channeltok"
    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quantizer = BinarySphericalQuantizer(config.latent_size, config.num_bits)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor, keep: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruct through the quantizer with gradients, channels outside `keep` dropped.

        Args:
            images: (b 3 H W) in [-1, 1].
            keep: (b c) bool, from `tail_drop.prefix_mask`.
            flips: (b c n), multiplied with the codes before decoding, so -1 flips a bit; None for no flips.

        Returns:
            images (b 3 H W) in [-1, 1], and vectors (b c n) on the unit sphere, not quantized.
        """
        vectors = self.quantizer.to_sphere(self.encode(images))
        codes = straight_through(vectors)
        quantized = self.quantizer.to_latents(codes if flips is None else codes * flips)
        return self.decode(drop_tail(quantized, keep)), vectors

    def encode(self, images: Tensor) -> Tensor:
        """Images (b 3 H W) in [-1, 1] -> latents (b c h w), before quantization."""
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise InputError(f"images are {tuple(images.shape)}; this tokenizer takes (b, 3, {size}, {size})")
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Quantized latents (b c h w), dropped channels exactly 0 -> images (b 3 H W) in [-1, 1]."""
        return self.decoder(latents.to(self.dtype))

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents (b c h w) -> codes (b c n), entries +-1/sqrt(n), float32."""
        return signs_to_codes(self.quantizer.to_sphere(latents))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (b 3 H W) in [-1, 1] -> tokens (b c), int64 in [0, codebook_size)."""
        return pack_bits(self.quantize(self.encode(images)))

    @property
    def token_layers(self) -> nn.ModuleDict:
        """The layers that determine tokens: the encoder and the projection to bits."""
        return nn.ModuleDict({"encoder": self.encoder, "project_in": self.quantizer.project_in})

    def token_fingerprint(self) -> str:
        """Hash of the weights that determine tokens: 16 hexadecimal digits."""
        return fingerprint(self.token_layers)

    def lookup(self, tokens: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Tokens (b k) -> the latents (b c h w) that the decoder receives, missing channels exactly 0.

        Args:
            tokens: (b k) integers in [0, codebook_size), 1 <= k <= C; entries at and beyond a row's
                own length are ignored.
            num_tokens: (b,) a length for each row, in [1, k]; None uses all k of every row.

        Raises:
            InputError: a shape, a length or a token outside these ranges. The range of tokens on a GPU is not checked,
                since that would wait for it.
        """
        channels, codes = self.config.num_channels, self.config.codebook_size
        if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise InputError(f"tokens are {tokens.dtype}; they must be integers in 0..{codes - 1}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= channels:
            raise InputError(f"tokens are {tuple(tokens.shape)}; this tokenizer takes (b, k) with k in 1..{channels}")
        # all C rows are projected whatever k is: a product of another shape may differ in its last bits
        padded = F.pad(tokens.long(), (0, channels - tokens.shape[1]))
        latents = self.quantizer.to_latents(unpack_bits(padded, self.config.num_bits))
        if num_tokens is None:
            num_tokens = torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
        elif num_tokens.shape != tokens.shape[:1] or not ((num_tokens >= 1) & (num_tokens <= tokens.shape[1])).all():
            raise InputError(
                f"num_tokens is {num_tokens.tolist()}; give one length in 1..{tokens.shape[1]} for each row"
            )
        keep = prefix_mask(num_tokens.to(tokens.device), channels)
        if tokens.device.type == "cpu":
            used = padded[keep]
            if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < codes:
                raise InputError(f"tokens range from {used.min()} to {used.max()}; allowed are 0..{codes - 1}")
        return drop_tail(latents, keep)

    @torch.no_grad()
    def detokenize(self, tokens: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Tokens (b k) of any 1 <= k <= C -> whole images (b 3 H W) in [-1, 1].

        `num_tokens` (b,) gives every row its own length; see `lookup` for ranges and errors.
        """
        return self.decode(self.lookup(tokens, num_tokens))

    @classmethod
    def from_published(
        cls, path: str | Path, config: TokenizerConfig, *, prefix: str = "", state_key: str | None = None
    ) -> Self:
        """Read a checkpoint with the key names of the paper's public implementation.

        Args:
            path: a .safetensors, .ckpt or .pt file; the last two are read without running any code in them.
            config: the architecture; nothing is guessed from the file.
            prefix: what stands before every key, for example "module." or "model._orig_mod.".
            state_key: the entry of a .ckpt or .pt file that holds the weights, for example "state_dict".

        Raises:
            InputError: an unreadable file, or a key or shape that is missing, unknown or different.
        """
        model = cls(config)
        state = rename_published_keys(load_foreign_state(path, state_key), prefix, path)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise InputError(f"{path} does not fit the configuration that is given for it ({reason})") from error
        return model.eval()
