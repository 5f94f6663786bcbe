"""Architecture of the tokenizer; imports no torch."""

from dataclasses import dataclass
from typing import Any

from common.config import Config, InputError, setting

SSIM_WINDOW = 11  # pixels
LATENT_UPSAMPLINGS = {4: 2, 8: 1}  # to 16, by the side of the latent
GROUPS = 32  # of every GroupNorm, so every width is a multiple of it


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """Architecture of a `ChannelTokenizer`; the defaults are the tokenizer that the paper's generator uses.

    Encoder: space-to-depth by `patch_size`, then len(encoder_widths) - 1 stages with a halving between
    neighbours, then halvings at latent width down to `latent_size`. Decoder: doublings at the last
    width up to 16, then len(decoder_widths) stages with a doubling between neighbours, then
    depth-to-space by `patch_size`. `patch_size` 1 without `linear_paths` is the published network; 2 or 4 makes a
    small one that trains on a CPU. (Paul, Bansal, Goldstein, 2026, arXiv 2606.04461, section 3 and appendix.)

    Raises:
        InputError: sizes that do not fit one another; the line says which and what is allowed.
    """

    image_size: int = setting(256, "height and width of an image, in pixels", ge=1, le=2**13)
    num_channels: int = setting(256, "C: channels of the latent, and tokens of an image", ge=1, le=2**16)
    latent_size: int = setting(4, "height and width of the latent", ge=1, le=2**10)
    num_bits: int = setting(14, "bits of a token; latent_size**2 means no projections", ge=1, le=16)
    patch_size: int = setting(1, "space-to-depth factor around the network; 1 = none", ge=1, le=2**10)
    encoder_widths: list[int] = setting([128, 128, 128, 256, 256, 512], "channels of each stage", ge=1, le=2**14)
    decoder_widths: list[int] = setting([128, 128, 256, 256, 512], "channels of each stage", ge=1, le=2**14)
    encoder_attention_sizes: list[int] = setting([], "map sizes at which encoder blocks are followed by attention")
    decoder_attention_sizes: list[int] = setting([], "map sizes at which decoder blocks are followed by attention")
    middle_attention: bool = setting(True, "attention between the two middle blocks")
    linear_paths: bool = setting(False, "linear maps beside encoder and decoder, for small, briefly trained networks")
    num_heads: int = setting(8, "attention heads", ge=1, le=2**10)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, widths, least in (("encoder", self.encoder_widths, 2), ("decoder", self.decoder_widths, 1)):
            if len(widths) < least or any(width % GROUPS or width % self.num_heads for width in widths):
                raise InputError(
                    f"{name}_widths is {widths}; give {least} or more multiples of {GROUPS} (GroupNorm) and of "
                    f"num_heads = {self.num_heads}"
                )
        smallest = self.latent_size * 2 ** (len(self.encoder_widths) - 2) * self.patch_size
        ratio, rest = divmod(self.image_size, smallest)
        if rest or ratio < 1 or ratio & (ratio - 1):
            raise InputError(
                f"image_size {self.image_size} does not fit the encoder: latent_size, the number of encoder_widths and "
                f"patch_size allow {smallest} times a power of two"
            )
        if self.output_size != self.image_size:
            raise InputError(
                f"the decoder gives {self.output_size} pixels for image_size {self.image_size}; "
                "change the number of decoder_widths or patch_size (each further width doubles the output)"
            )
        if self.linear_paths and self.patches_per_latent < 2:
            raise InputError(
                f"linear_paths overlap by half a patch, which patch_size {self.patch_size} leaves no room for at "
                f"image_size {self.image_size} and latent_size {self.latent_size}; take a smaller patch_size"
            )

    @property
    def codebook_size(self) -> int:
        """Number of different tokens, 2**num_bits."""
        return 2**self.num_bits

    @property
    def patches_per_latent(self) -> int:
        """Patches of the space-to-depth along one side of the area of one latent entry."""
        return self.image_size // self.patch_size // self.latent_size

    @property
    def latent_upsamplings(self) -> int:
        """Doublings before the decoder's first stage."""
        return LATENT_UPSAMPLINGS.get(self.latent_size, 0)

    @property
    def output_size(self) -> int:
        """Height and width of a decoded image, in pixels."""
        doublings = self.latent_upsamplings + len(self.decoder_widths) - 1
        return self.latent_size * 2**doublings * self.patch_size


def fit_widths(values: dict[str, Any]) -> None:
    """Change encoder_widths, decoder_widths and patch_size, in place, to what image_size needs.

    A larger image adds stages of the first width. A smaller one removes the first stages; if one is left, it halves
    patch_size.

    Args:
        values: fields of `TokenizerConfig`, not checked yet; sizes that fit nothing are left for its check.
    """
    encoder, decoder = list(values["encoder_widths"]), list(values["decoder_widths"])
    latent, patch, size = (values[name] for name in ("latent_size", "patch_size", "image_size"))
    if min(len(encoder), len(decoder), latent, patch) < 1:
        return
    output = latent * 2 ** (LATENT_UPSAMPLINGS.get(latent, 0) + len(decoder) - 1) * patch
    while output < size:
        encoder, decoder, output = encoder[:1] + encoder, decoder[:1] + decoder, output * 2
    while output > size and len(decoder) > 1:
        encoder, decoder, output = encoder[1:] if len(encoder) > 2 else encoder, decoder[1:], output // 2
    while output > size and patch % 2 == 0:
        patch, output = patch // 2, output // 2
    values |= {"encoder_widths": encoder, "decoder_widths": decoder, "patch_size": patch}


def evaluation_lengths(num_channels: int) -> list[int]:
    """1, 4, 16, 64, ... and num_channels: the k at which quality is reported."""
    return [4**i for i in range(8) if 4**i < num_channels] + [num_channels]


def check_ssim_size(image_size: int) -> None:
    """Refuse pictures in which no window of SSIM has a place."""
    if image_size < SSIM_WINDOW:
        raise InputError(f"pictures have {image_size} pixels a side; SSIM needs at least {SSIM_WINDOW}")
