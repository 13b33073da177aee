"""What no rule reaches: a row a type, with the reason. At most eight."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from transformers import PreTrainedConfig

_CODES = 16  # of an image, as many as `shrink` leaves


def _chameleon(config: PreTrainedConfig) -> None:
    """The words of the image codes are in no default configuration."""
    config.vocabulary_map = {"<image>": 40, **{f"IMGIMG{_in_letters(code)}Z": 41 + code for code in range(_CODES)}}
    config.image_token_id = 40


def _emu3(config: PreTrainedConfig) -> None:
    """The words of the image codes are in no default configuration."""
    codes = {f"<|visual token {code:06}|>": 41 + code for code in range(_CODES)}
    config.vocabulary_map = {"<image>": 40, "<|extra_200|>": 39, **codes}
    config.image_token_id = 40


def _granite4_vision(config: PreTrainedConfig) -> None:
    """Which layers see the image is in no default configuration, nor how far it is scaled down."""
    config.deepstack_layer_map, config.spatial_target_layers, config.downsample_rate = [(-1, 0)], [1, 1, 1, 1], "2/4"


def _hunyuan_vl(config: PreTrainedConfig) -> None:
    """The default configuration has no rotary parameters; the model insists on three sections or more."""
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}


def _reformer(config: PreTrainedConfig) -> None:
    """Axial positions train on one length only, the product of their shape."""
    config.axial_pos_embds = False


def _in_letters(code: int) -> str:
    return "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code))


EXCEPTIONS: Mapping[str, Callable[[PreTrainedConfig], None]] = MappingProxyType(
    {
        "chameleon": _chameleon,
        "emu3": _emu3,
        "granite4_vision": _granite4_vision,
        "hunyuan_vl": _hunyuan_vl,
        "reformer": _reformer,
    }
)
