"""Image inputs of a vision-language model: pixels in the shape that it takes, and as many image tokens as it makes of them."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from automodel_accel.patches.probe import PROBE_ERRORS
from automodel_accel.recipes.tiny.configuration import is_size
from automodel_accel.recipes.tiny.text import TOKEN_TYPES

_VISION = ("vision_config", "vision_encoder_config", "encoder", "image_config", "vq_config")
_PIXELS = ("pixel_values", "flattened_patches", "pixel_values_images", "image_patches")
_IMAGE_TOKENS = (
    "image_token_id",
    "image_token_index",
    "image_token",
    "img_context_token_id",
    "image_patch_id",
    "video_token_index",
)
_QUERIES = ("latent_query_num", "num_query_tokens", "num_image_tokens")
_FEATURES_WANTED = re.compile(r"tokens: \d+.*?features:? (\d+)")
_BEFORE = 2  # tokens of text before an image


@dataclass(frozen=True, slots=True)
class Eye:
    """What a vision tower takes: pictures of a fixed size, or any number of patches."""

    rows: int
    channels: int
    size: int
    patch: int
    frames: int
    merge: int
    tiles: int
    values: int

    @property
    def side(self) -> int:
        """Patches on a side of a picture of free size."""
        return 2 * self.merge

    @property
    def patches(self) -> int:
        """Patches of a picture of free size."""
        return self.side**2


@dataclass(frozen=True, slots=True)
class Look:
    """How images are given to a model.

    Attributes:
        layout: The shape of the pixels, a name in `LAYOUTS`.
        bare: Without the inputs beside the pixels that the forward does not insist on.
        tokens: Image tokens for each image.
    """

    layout: str
    bare: bool = False
    tokens: int = 0


LAYOUTS: Mapping[str, Callable[[Eye], tuple[int, ...]]] = MappingProxyType(
    {
        "grid of cubes as rows": lambda e: (e.rows * e.patches, e.values * e.frames),
        "grid of patches": lambda e: (e.rows * e.patches, e.channels, e.patch, e.patch),
        "grid of patches as rows": lambda e: (e.rows * e.patches, e.values),
        "grid of cubes": lambda e: (e.rows * e.patches, e.channels, e.frames, e.patch, e.patch),
        "picture": lambda e: (e.rows, e.channels, e.size, e.size),
        "free picture": lambda e: (e.rows, e.channels, e.side * e.patch, e.side * e.patch),
        "tile": lambda e: (e.rows, 1, e.channels, e.size, e.size),
        "tiles": lambda e: (e.rows, e.tiles, e.channels, e.size, e.size),
        "tile of a picture": lambda e: (e.rows, 1, 1, e.channels, e.size, e.size),
        "tiles of a picture": lambda e: (e.rows, 1, e.tiles, e.channels, e.size, e.size),
        "patches as rows": lambda e: (e.rows, e.patches, e.values),
        "picture of patches as rows": lambda e: (e.rows, 1, e.patches, e.values),
        "patches with their place": lambda e: (e.rows, e.patches, 2 + e.values),
        "pooled patches as rows": lambda e: (e.rows, e.patches, e.values * e.merge**2),
        "grid of merged patches": lambda e: (e.rows * 4, e.merge * e.patch, e.merge * e.patch, e.channels),
        "grid of merged cubes": lambda e: (e.rows * 4, e.frames, e.merge * e.patch, e.merge * e.patch, e.channels),
        "strip of patches": lambda e: (1, e.channels, e.patch, e.rows * e.patches * e.patch),
    }
)
_FREE_FIRST = (
    "image_grid_thw",
    "image_grid_hw",
    "spatial_shapes",
    "target_sizes",
    "image_position_ids",
    "flattened_patches",
)


def with_image(model: PreTrainedModel, text: Mapping[str, Any], look: Look, seed: int) -> dict[str, Any]:
    """A batch with an image in each row: image tokens after the first words, their labels ignored."""
    batch = _with_tokens(model, text, look.tokens)
    inputs = _image_inputs(model, look, batch, seed)
    return _asked_for(model, batch, inputs)


def _asked_for(model: PreTrainedModel, batch: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    asked = inspect.signature(model.forward).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked.values())
    if "input_ids" not in asked:  # the words are those of the decoder, which gets them from the labels
        batch = {name: value for name, value in batch.items() if name == "labels"}
        if "attention_mask" in asked:
            batch["attention_mask"] = torch.ones(inputs["flattened_patches"].shape[:2])
    return {**batch, **{name: value for name, value in inputs.items() if free or name in asked}}


def find_look(model: PreTrainedModel, text: Mapping[str, Any]) -> Look:
    """Search for the inputs whose pixels reach the loss. Raises the error of the try that came nearest."""
    nearest: BaseException | None = None
    model = copy.deepcopy(model)
    for layout in _layouts(model):
        for bare in (False, True):
            wanted = [_count(model, layout, bare, text)]
            while wanted:
                found = wanted.pop()
                if isinstance(found, BaseException):
                    nearest = nearest or found
                    continue
                look = Look(layout, bare, found)
                try:
                    _assert_seen(model, text, look)
                except PROBE_ERRORS as error:
                    nearest = nearest or error
                    if found == 0:
                        wanted.extend(_wanted(model, error, len(text["input_ids"])))
                else:
                    return look
    raise nearest or ValueError("the forward takes no pixels")


def _layouts(model: PreTrainedModel) -> list[str]:
    asked = _asked(model)
    if not any(name in asked for name in _PIXELS):
        return []
    free = any(name in asked for name in _FREE_FIRST)
    return sorted(LAYOUTS, key=lambda name: ("grid" in name or "patches" in name) != free)


def _asked(model: PreTrainedModel) -> dict[str, inspect.Parameter]:
    """Parameters of the forward and of the method that makes features of images."""
    asked: dict[str, inspect.Parameter] = {}
    part: Any
    for part in (model, model.base_model):
        if hasattr(part, "get_image_features"):
            asked.update(inspect.signature(part.get_image_features).parameters)
    return {**asked, **inspect.signature(model.forward).parameters}


def eye_of(config: PreTrainedConfig, rows: int) -> Eye:
    """Read from the configuration of the vision tower what it takes."""
    vision = next(
        (part for name in _VISION if isinstance(part := getattr(config, name, None), PreTrainedConfig)), config
    )

    def read(*names: str, default: int) -> int:
        for owner in (vision, config):
            for name in names:
                value = getattr(owner, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if is_size(value) and value > 0:
                    return value
        return default

    channels = read("num_channels", "in_channels", "in_chans", default=3)
    patch = read("patch_size", "encoder_patch_size", default=4)
    return Eye(
        rows,
        channels,
        size=read("image_size", "img_size", default=32),
        patch=patch,
        frames=read("temporal_patch_size", "patch_temporal", default=1),
        merge=read("spatial_merge_size", "merge_size", "pooling_kernel_size", "downsample_factor", default=2),
        tiles=read("max_num_tiles", default=3),
        values=read("patch_embed_hidden_size", default=channels * patch**2),
    )


def _image_inputs(model: PreTrainedModel, look: Look, batch: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The pixels, and what the model takes beside them."""
    eye = eye_of(model.config, len(batch["input_ids"]))
    generator = torch.Generator().manual_seed(seed)
    asked = _asked(model)
    shape = LAYOUTS[look.layout](eye)
    pixels = torch.randn(shape, generator=generator).to(model.dtype)
    if look.layout == "patches with their place":
        pixels[..., :2] = _places(eye) + 1
    inputs: dict[str, Any] = {next(name for name in _PIXELS if name in asked): pixels}
    beside = _beside(eye, pixels, batch["input_ids"], look.tokens)
    for name, parameter in asked.items():
        if name in beside and not (look.bare and parameter.default is not inspect.Parameter.empty):
            inputs[name] = beside[name]()
    return inputs


def _places(eye: Eye) -> torch.Tensor:
    """Row and column of each patch."""
    at = torch.arange(eye.side)
    return torch.cartesian_prod(at, at).repeat(eye.rows, 1, 1)


def _beside(
    eye: Eye, pixels: torch.Tensor, input_ids: torch.Tensor, tokens: int
) -> Mapping[str, Callable[[], torch.Tensor]]:
    """Inputs beside the pixels, by the names that all of transformers uses."""
    rows, sides = eye.rows, torch.tensor([[eye.side, eye.side]] * eye.rows)
    size = pixels.shape[-1] if pixels.dim() > 3 else eye.side * eye.patch
    tiles = pixels.shape[-4] if pixels.dim() > 4 else 1
    at = torch.arange(input_ids.shape[1])
    is_image = ((at >= _BEFORE) & (at < _BEFORE + tokens)).expand(rows, -1)
    tile_mask = (rows, tiles) if pixels.dim() == 5 else pixels.shape[:2]
    return {
        "image_grid_thw": lambda: torch.tensor([[1, eye.side, eye.side]] * rows),
        "image_grid_hw": lambda: sides,
        "spatial_shapes": lambda: sides,
        "target_sizes": lambda: sides,
        "image_sizes": lambda: torch.tensor([[size, size]] * rows),
        "image_merge_sizes": lambda: torch.tensor([eye.merge] * rows),
        "image_position_ids": lambda: _places(eye).flip(-1),
        "pixel_attention_mask": lambda: torch.ones(tile_mask, dtype=torch.bool),
        "aspect_ratio_ids": lambda: torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": lambda: torch.ones(rows, 1, tiles, dtype=torch.long),
        "qformer_input_ids": lambda: input_ids[:, -5:],
        "image_attention_mask": lambda: torch.ones(*input_ids.shape, 1, dtype=torch.long),
        "image_embeds_position_mask": lambda: is_image,
        "high_res_pixel_values": lambda: pixels,
    }


def _count(model: PreTrainedModel, layout: str, bare: bool, text: Mapping[str, Any]) -> int | BaseException:
    """Features that the model makes of one image; an error where it does not take this layout."""
    inputs = _image_inputs(model, Look(layout, bare), text, 0)
    owner: Any = next((part for part in (model.base_model, model) if hasattr(part, "get_image_features")), None)
    if owner is None or _image_token(model.config) is None:
        return next((count for name in _QUERIES if is_size(count := getattr(model.config, name, None))), 0)
    asked = inspect.signature(owner.get_image_features).parameters
    try:
        with torch.no_grad():
            made = owner.get_image_features(**{name: value for name, value in inputs.items() if name in asked})
    except PROBE_ERRORS as error:
        return error
    features = list(_tensors(getattr(made, "pooler_output", made)))
    return sum(each.numel() // each.shape[-1] for each in features) // len(text["input_ids"])


def _tensors(made: Any) -> Iterator[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        yield made
    elif isinstance(made, (list, tuple)):
        for each in made:
            yield from _tensors(each)


def _wanted(model: PreTrainedModel, error: BaseException, rows: int) -> list[int]:
    """Counts of image tokens that an error's text may mean: it names features or the numbers in them."""
    found = _FEATURES_WANTED.search(str(error))
    width = getattr(model.config.get_text_config(), "hidden_size", 1) or 1
    counts = [int(found[1]) // rows // width, int(found[1]) // rows] if found else []
    return [count for count in counts if count]


def _image_token(config: PreTrainedConfig) -> int | None:
    return next((token for name in _IMAGE_TOKENS if is_size(token := getattr(config, name, None))), None)


def _with_tokens(model: PreTrainedModel, text: Mapping[str, Any], count: int) -> dict[str, Any]:
    token = _image_token(model.config)
    token = 0 if token is None else token  # then a mask of its own says where the image is
    if count == 0:
        return dict(text)
    fills = {"input_ids": token, "labels": -100, "attention_mask": 1, **dict.fromkeys(TOKEN_TYPES, 1)}
    batch = dict(text)
    for name, value in text.items():
        image = value.new_full((len(value), count, *value.shape[2:]), fills.get(name, 0))
        batch[name] = torch.cat([value[:, :_BEFORE], image, value[:, _BEFORE:]], 1)
    return batch


def _assert_seen(model: PreTrainedModel, text: Mapping[str, Any], look: Look) -> None:
    """Raise unless the loss depends on the pixels: their gradient, or where they are rounded to codes, the loss."""
    batches = [with_image(model, text, look, seed) for seed in (0, 1)]
    pixels = next(batches[0][name] for name in _PIXELS if name in batches[0]).requires_grad_()
    losses = []
    for batch in batches:
        torch.manual_seed(0)
        losses.append(model(**batch).loss)
    if torch.equal(*losses):
        losses[0].backward()
        if pixels.grad is None or not pixels.grad.any():
            raise ValueError("the pixels do not reach the loss")
