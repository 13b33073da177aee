"""Processors of vision-language families, built offline: transformers' own image processors (Pillow) and a tokenizer of bytes."""

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}IMAGE{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_GRID: dict[str, Any] = {
    **{"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2},
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}


def chatml(image: str) -> str:
    """A chat template that writes `image` where an image is."""
    return CHATML.replace("IMAGE", image)


def byte_tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A token a byte, and special tokens; `named` ones are attributes of the tokenizer too, as in image_token="<image>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", *special, *named.values()]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in dict.fromkeys(words)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        extra_special_tokens=named,
    )


class _NoVideos:
    """Stands where a processor insists on one for videos, which needs torchvision; it is never called."""

    temporal_patch_size, merge_size, patch_size = 1, 2, 4


def _without_videos(name: str) -> Any:
    """The class of a processor, which takes `_NoVideos`."""
    cls = getattr(transformers, name)

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        return (
            None
            if isinstance(argument, _NoVideos)
            else cls.check_argument_for_proper_class(self, argument_name, argument)
        )

    return type(name, (cls,), {"check_argument_for_proper_class": check})


def picture(color: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, color)


def _pil(name: str, **settings: Any) -> Any:
    return getattr(transformers, f"{name}ImageProcessorPil")(**settings)


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def llava(chat_template: str | None = None) -> Any:
    """8 x 8 patches: 16 tokens an image."""
    images = _pil("CLIP", size={"shortest_edge": 32}, crop_size=_square(32))
    return transformers.LlavaProcessor(
        images,
        byte_tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=chat_template or chatml("<image>"),
    )


def llava_next() -> Any:
    images = _pil("LlavaNext", size={"shortest_edge": 32}, crop_size=_square(32), image_grid_pinpoints=[[32, 64]])
    return transformers.LlavaNextProcessor(
        images,
        byte_tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )


def llava_onevision() -> Any:
    images = _pil("LlavaOnevision", size=_square(32), image_grid_pinpoints=[[32, 64]])
    return _without_videos("LlavaOnevisionProcessor")(
        images,
        byte_tokenizer("<image>", "<video>"),
        _NoVideos(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )


def _qwen(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        images = _pil(
            "Qwen2VL",
            patch_size=4,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 64, "longest_edge": 4096},
        )
        words = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
        return _without_videos(kind)(images, byte_tokenizer(*words), _NoVideos(), chat_template=template)

    return build


def gemma3() -> Any:
    words = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image_soft_token>"}
    images = _pil("Gemma3", size=_square(32))
    return transformers.Gemma3Processor(
        images, byte_tokenizer(**words), image_seq_length=4, chat_template=chatml("<boi>")
    )


def paligemma() -> Any:
    images = _pil("Siglip", size=_square(32))
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(images, byte_tokenizer())


def idefics2() -> Any:
    images = _pil("Idefics2", size={"shortest_edge": 32, "longest_edge": 64}, do_image_splitting=False)
    words = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    return transformers.Idefics2Processor(
        images, byte_tokenizer(*words), image_seq_len=4, chat_template=chatml("<image>")
    )


def _idefics3_tokenizer() -> PreTrainedTokenizerFast:
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows)
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    return byte_tokenizer(*words, **named, end_of_utterance_token="<end_of_utterance>")


def idefics3() -> Any:
    images = _pil("Idefics3", size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return transformers.Idefics3Processor(
        images, _idefics3_tokenizer(), image_seq_len=4, chat_template=chatml("<image>")
    )


def mllama() -> Any:
    images = _pil("Mllama", size=_square(32), max_image_tiles=2)
    tokenizer = byte_tokenizer("<|image|>", "<|python_tag|>", image_token="<|image|>")
    return transformers.MllamaProcessor(images, tokenizer, chat_template="<bos>" + chatml("<|image|>"))


def internvl() -> Any:
    images = _pil("GotOcr2", size=_square(32))
    words = {
        **{"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(**words)
    return _without_videos("InternVLProcessor")(
        images, tokenizer, _NoVideos(), image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>")
    )


def lighton_ocr() -> Any:
    """Pixtral's image processor; Pixtral's own processor asks for torchvision."""
    images = _pil("Pixtral", size={"longest_edge": 32}, patch_size=8)
    words = {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"}
    return transformers.LightOnOcrProcessor(
        images, byte_tokenizer(**words), patch_size=8, spatial_merge_size=1, chat_template=chatml("<image>")
    )


def aya_vision() -> Any:
    images = _pil("GotOcr2", size=_square(32))
    words = (
        "<image>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE",
        "TILE_GLOBAL",
    )
    return transformers.AyaVisionProcessor(
        images, byte_tokenizer(*words), patch_size=8, img_size=32, downsample_factor=2, chat_template=chatml("<image>")
    )


def aria() -> Any:
    images = _pil("Aria", max_image_size=490)
    return transformers.AriaProcessor(
        images, byte_tokenizer(image_token="<image>"), size_conversion={490: 4, 980: 8}, chat_template=chatml("<image>")
    )


def deepseek_vl() -> Any:
    images = _pil("DeepseekVL", size=_square(32))
    return transformers.DeepseekVLProcessor(
        images, byte_tokenizer(image_token="<image>"), num_image_tokens=4, chat_template=chatml("<image>")
    )


def janus() -> Any:
    images = _pil("Janus", size=_square(32))
    words = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    processor = transformers.JanusProcessor(images, byte_tokenizer(**words), chat_template=chatml("<image>"))
    processor.num_image_tokens = 4
    return processor


def ovis2() -> Any:
    words = ("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    images = _pil("Ovis2", size=_square(32))
    return transformers.Ovis2Processor(
        images,
        byte_tokenizer(*words, image_token="<image>"),
        image_token="<image>",
        image_seq_length=4,
        chat_template=chatml("<image>"),
    )


def chameleon() -> Any:
    images = _pil("Chameleon", size={"shortest_edge": 32}, crop_size=_square(32))
    words = {"boi_token": "<boi>", "eoi_token": "<eoi>"}
    processor = transformers.ChameleonProcessor(images, byte_tokenizer("<image>", **words), image_seq_length=4)
    processor.chat_template = chatml("<image>")
    return processor


def glm4v() -> Any:
    images = _pil(
        "Glm4v", patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    words = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>")
    template = chatml("<|begin_of_image|><|image|><|end_of_image|>")
    return _without_videos("Glm4vProcessor")(images, byte_tokenizer(*words), _NoVideos(), chat_template=template)


def granite4_vision() -> Any:
    images = _pil("LlavaNext", size={"shortest_edge": 32}, crop_size=_square(32), image_grid_pinpoints=[[32, 64]])
    return transformers.Granite4VisionProcessor(
        images,
        byte_tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=chatml("<image>"),
    )


def exaone4_5() -> Any:
    words = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = byte_tokenizer("<|vision_start|>", "<|vision_end|>", **words)
    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    return _without_videos("Exaone4_5_Processor")(
        _pil("Qwen2VL", **_GRID), tokenizer, _NoVideos(), chat_template=template
    )


def lfm3_vl() -> Any:
    words = {"image_start_token": "<start>", "image_end_token": "<end>", "video_token": "<video>"}
    tokenizer = byte_tokenizer(image_token="<image>", **words)
    return _without_videos("Lfm3VlProcessor")(
        _pil("Qwen2VL", **_GRID), tokenizer, _NoVideos(), chat_template=chatml("<image>")
    )


def paddleocr_vl() -> Any:
    images = _pil("PaddleOCRVL", patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    tokenizer = byte_tokenizer(image_token="<|IMAGE_PLACEHOLDER|>")
    return transformers.PaddleOCRVLProcessor(images, tokenizer, chat_template=chatml("<|IMAGE_PLACEHOLDER|>"))


def video_llama_3() -> Any:
    images = _pil("VideoLlama3", patch_size=4, merge_size=2, size=_GRID["size"])
    tokenizer = byte_tokenizer(image_token="<image>", video_token="<video>")
    return _without_videos("VideoLlama3Processor")(images, tokenizer, _NoVideos(), chat_template=chatml("<image>"))


def hunyuan_vl() -> Any:
    images = _pil("HunYuanVL", patch_size=4, merge_size=2, size=_GRID["size"])
    tokenizer = byte_tokenizer(image_token="<image>", image_start_token="<start>", image_end_token="<end>")
    return transformers.HunYuanVLProcessor(images, tokenizer, chat_template=chatml("<start><image><end>"))


def deepseek_vl_hybrid() -> Any:
    images = _pil("DeepseekVLHybrid", size=_square(32), high_res_size=_square(64))
    return transformers.DeepseekVLHybridProcessor(
        images, byte_tokenizer(image_token="<image>"), num_image_tokens=4, chat_template=chatml("<image>")
    )


def granite_docling() -> Any:
    tokenizer = byte_tokenizer(image_token="<image>", fake_image_token="<fake>", global_image_token="<global>")
    return transformers.GraniteDoclingProcessor(
        _pil("GraniteDocling"), tokenizer, image_seq_len=4, chat_template=chatml("<image>")
    )


def qianfan_ocr() -> Any:
    words = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return transformers.QianfanOCRProcessor(
        _pil("GotOcr2", size=_square(32)),
        byte_tokenizer(**words),
        image_seq_length=4,
        chat_template=chatml("<image>"),
    )


def video_llava() -> Any:
    images = transformers.VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=_square(32))
    return _without_videos("VideoLlavaProcessor")(
        images,
        _NoVideos(),
        byte_tokenizer("<image>", "<video>"),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )


def blip_2() -> Any:
    """Its template writes nothing for an image: the processor puts the tokens of the image in front."""
    processor = transformers.Blip2Processor(
        _pil("Blip", size=_square(32)), byte_tokenizer("<image>"), num_query_tokens=4
    )
    processor.chat_template = chatml("")
    return processor


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor"),
    "gemma3": gemma3,
    "paligemma": paligemma,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "mllama": mllama,
    "internvl": internvl,
    "lighton_ocr": lighton_ocr,
    "aya_vision": aya_vision,
    "aria": aria,
    "deepseek_vl": deepseek_vl,
    "janus": janus,
    "ovis2": ovis2,
    "chameleon": chameleon,
    "glm4v": glm4v,
    "granite4_vision": granite4_vision,
    "exaone4_5": exaone4_5,
    "lfm3_vl": lfm3_vl,
    "paddleocr_vl": paddleocr_vl,
    "video_llama_3": video_llama_3,
    "hunyuan_vl": hunyuan_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "granite_docling": granite_docling,
    "qianfan_ocr": qianfan_ocr,
    "video_llava": video_llava,
}
