"""From the name of a model on the hub to its type in transformers, without a network.

A name is read in words: "Qwen/Qwen3-30B-A3B" is qwen, 3, and a number of active parameters, which says that it has experts. The type
is that whose words the name begins with, the longest of them; of a mixture of experts its `_moe`, where there is one. Families that
go by other names than their types are rows of `FAMILIES`.
"""

import difflib
import re
from collections.abc import Collection, Sequence

_WORD = re.compile(r"[ae]?\d+(?:\.\d+)?(?:x\d+(?:\.\d+)?)?[bkmt](?![a-z0-9])|[a-z]+|\d+")
_SIZE = re.compile(r"[ae]?\d.*[bkmt]$")
_ACTIVE = re.compile(r"a\d+(\.\d+)?b$")
_PUBLISHERS = ("nvidia", "ibm", "facebook", "openai", "google", "meta")  # with which a name may begin once more
_PARTS = ("text", "vision", "audio", "encoder", "decoder", "model", "adapter", "assistant")
# how a name begins, in lower case and without its publisher -> its type, whether this transformers has it or not
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"baichuan", "baichuan"),
    (r"c4ai-command-(a|r7b)", "cohere2"),
    (r"(c4ai-)?command-r", "cohere"),
    (r"aya-(23|expanse)", "cohere"),
    (r"codellama|vicuna|yi-|tinyllama|smollm-|smollm2|falcon3|seed-coder|minicpm5|deepseek-(llm|coder)-", "llama"),
    (r"deepseek-r1-distill-llama|llama-3.*nemotron-nano", "llama"),
    (r"deepseek-r1-distill-qwen|qwq", "qwen2"),
    (r"pythia|gpt-neox", "gpt_neox"),
    (r"deepseek-(r1|v3\.1)|kimi-k2-|moonlight", "deepseek_v3"),
    (r"deepseek-v3\.2", "deepseek_v32"),
    (r"devstral-2|ministral-3-.*base-text", "ministral3"),
    (r"devstral-small-2|ministral-3-|mistral-(medium-3\.5|small-(3\.[12]|4))|magistral", "mistral3"),
    (r"(embedding|function|med)?gemma-?3?-(270m|1b)", "gemma3_text"),
    (r"gemma-4-12b", "gemma4_unified"),
    (r"glm-4\.[567]v", "glm4v_moe"),
    (r"glm-4\.7-flash", "glm4_moe_lite"),
    (r"glm-4\.[567]", "glm4_moe"),
    (r"glm-4\.1v", "glm4v"),
    (r"glm-4-9b-chat", "glm"),
    (r"glm-5\.3-flash", "glm5_next"),
    (r"glm-5", "glm_moe_dsa"),
    (r"hunyuan-.*a\d+b", "hunyuan_v1_moe"),
    (r"hunyuan-\d", "hunyuan_v1_dense"),
    (r"hy3|hy-mt2", "hy_v3"),
    (r"hy4", "hy_v4"),
    (r"inkling-2", "inkling2"),
    (r"inkling", "inkling_mm_model"),
    (r"kimi-k2\.[567]", "kimi_k25"),
    (r"kimi-k3", "kimi_k3"),
    (r"kimi-vl", "kimi_vl"),
    (r"ling-3", "bailing_hybrid"),
    (r"(ling|ring)-", "bailing_moe"),
    (r"llama-3\.2.*vision", "mllama"),
    (r"llama-3.*nemotron-(super|ultra)", "nemotron-nas"),
    (r"llava-onevision-1\.5", "llavaonevision1_5"),
    (r"llava-v1\.6", "llava_next"),
    (r"minimax-m2", "minimax_m2"),
    (r"minimax-m3", "minimax_m3_vl"),
    (r"nemotron-flash", "nemotron_flash"),
    (r"nemotron-parse", "nemotron_parse"),
    (r"nemotron-.*omni", "nemotron_h_omni"),
    (r"nemotron-(3|h|nano)", "nemotron_h"),
    (r"north-micro-vision", "cohere_compass"),
    (r"phi-4-(mini|reasoning|\d)|phi-4$", "phi3"),
    (r"phi-(1|1_5|2)$", "phi"),
    (r"phi-3.*moe", "phimoe"),
    (r"qwen1\.5-moe", "qwen2_moe"),
    (r"qwen1\.5", "qwen2"),
    (r"qwen3\.[5-9].*a\d+b", "qwen3_5_moe"),
    (r"qwen3\.[5-9]", "qwen3_5"),
    (r"step-3\.5", "step3p5"),
    (r"step-3\.7", "step3p7"),
)


class UnknownModel(ValueError):
    """The type of a model is not known, or not to the installed transformers."""


def type_of_name(name: str, types: Collection[str]) -> str:
    """The type of a model by its name.

    Args:
        name: A hub id, or a folder's name.
        types: Those of transformers: the keys of CONFIG_MAPPING.

    Raises:
        UnknownModel: no type goes by such a name (with those that are near), or transformers does not have it.
    """
    last = _without_publisher(name.rstrip("/").rpartition("/")[2].lower())
    found = next((kind for pattern, kind in FAMILIES if re.match(pattern, last)), None) or _longest(last, types)
    if found is None:
        raise UnknownModel(f"{name}: no type of transformers goes by that name. {_near(last, types)}")
    if found not in types:
        from transformers import __version__

        raise UnknownModel(f"{name}: its type is {found!r}, which transformers {__version__} does not have.")
    return found


def words(name: str) -> list[str]:
    """What a name is read as; a size such as 8b, 8x7b, e4b or a3b is one word."""
    return _WORD.findall(name.lower())


def _without_publisher(name: str) -> str:
    for publisher in _PUBLISHERS:
        if name.startswith(publisher + "-"):
            return name.removeprefix(publisher + "-")
    return name


def _longest(name: str, types: Collection[str]) -> str | None:
    has = words(name)
    experts = any(_ACTIVE.fullmatch(word) for word in has) or "moe" in has
    begins: list[tuple[int, bool, str]] = []
    for kind in types:
        of = words(kind)
        plain = of[:-1] if experts and of[-1:] == ["moe"] else of
        if plain and has[: len(plain)] == plain:
            begins.append((len(plain), plain != of, kind))
    return max(begins)[2] if begins else None


def _near(name: str, types: Collection[str]) -> str:
    first = _said(words(name))
    whole = [kind for kind in types if not _PARTS_IN.search(kind)]
    kin = [kind for kind in whole if first and words(kind)[0] == first[0]]
    near = sorted(kin) or difflib.get_close_matches("_".join(first), whole, n=5, cutoff=0.5)
    candidates = f"Near it are {', '.join(near[:8])}; expected" if near else "Expected"
    return f"{candidates} a folder with a config.json, or a hub id whose config is in the cache."


def _said(has: Sequence[str]) -> list[str]:
    return [word for word in has if not _SIZE.match(word)]


_PARTS_IN = re.compile(f"_({'|'.join(_PARTS)})")
