"""Their datasets: each class has arguments of its own, which mean what a kind of ours says with its own keys."""

from collections.abc import Mapping
from typing import Any

from automodel_accel.recipes.nemo.contract import Ignored, Rule, To, Unmapped

DATA, HELD_OUT = "data", "validation.validation"
IMAGES = ("medpix", "rdr", "cord_v2", "llava", "image_chat", "captions", "mock_images")
TOKENIZED = Ignored(
    "how rows are tokenised and padded: ours by the chat template, cut or left out at batching.seq_length"
)

# of every kind
COMMON: dict[str, Rule] = {
    "path_or_dataset": To("path"),
    "path_or_dataset_id": To("path"),
    "dataset_name": To("path"),
    "split": To("split"),
    "name": To("name"),
    "limit_dataset_samples": To("limit"),
    "num_samples_limit": To("limit"),
    "seq_length": To("/batching.seq_length"),
    "seq_len": To("/batching.seq_length"),
    "max_length": To("/batching.seq_length"),
    "shuffle_seed": To("seed"),
    "seed": To("seed"),
    "chat_template": To("chat_template"),
    "use_hf_chat_template": Ignored("the template that the tokenizer has"),
    "tokenizer.pretrained_model_name_or_path": To("/model.tokenizer"),
    "tokenizer.trust_remote_code": To("/model.trust_remote_code"),
    "pad_to_max_length": TOKENIZED,
    "padding": TOKENIZED,
    "truncation": To("too_long", lambda value: "truncate" if value else "drop"),
    "truncate": To("too_long", lambda value: "truncate" if value else "drop"),
    "mask_reasoning_content": To("mask_reasoning"),
    "pretokenize": Ignored("ours tokenises before the first step, or while it streams"),
    "inject_fake_images": Ignored("batches without images are batches without images here"),
}
OF_KIND: dict[str, dict[str, Rule]] = {
    "instruction": {
        "column_mapping.question": To("columns.question"),
        "column_mapping.answer": To("columns.answer"),
        "column_mapping.context": To("columns.context"),
        "answer_only_loss_mask": To("answer_only"),
        "start_of_turn_token": Ignored("the answer is found by the chat template's own text"),
    },
    "mock": {
        "vocab_size": To("vocab_size"),
        "num_samples": To("samples"),
        "num_sentences": To("samples"),
        "mean_len": Ignored("mock samples have random lengths, or fill the row"),
        "std_len": Ignored("mock samples have random lengths, or fill the row"),
        "max_sentence_len": To("/batching.seq_length"),
        "tokenizer": Ignored("mock data are tokens"),
    },
    "mock_images": {
        "num_samples": To("samples"),
        "num_images_per_sample": To("images_per_sample"),
        "image_size": To("side", lambda size: size[0] if isinstance(size, list) else size),
        "max_length": To("words"),
        "truncate": TOKENIZED,
    },
    "chat": {
        "filter_no_assistant": Ignored("conversations without an answer are counted and left out"),
        "filter_overlong": Ignored("conversations that are too long are counted and left out"),
        "trim_incomplete_last_turn": Ignored("what follows the last answer is cut off"),
    },
    "bins": {"file_pattern": To("path"), "bos_token": To("document_end"), "shuffle_files": To("shuffle")},
}
NOT_SAID = {"rdr": "quintend/rdr-items", "cord_v2": "naver-clova-ix/cord-v2", "medpix": "medpix-dataset/medpix-dataset"}
ONLY_TEXT = ("chat_template", "name", "too_long", "mask_reasoning", "streaming")  # that images do not have


def dataset_rule(kind: str | None, key: str, value: Any) -> Rule:
    """What an argument of a dataset means.

    Args:
        kind: Of ours; None where its class has none.
        key: Under the dataset's section.
        value: Theirs.
    """
    if kind is None:
        return Ignored("of a dataset that has no kind here")
    rule = OF_KIND.get(kind, {}).get(key) or COMMON.get(key)
    if rule is None:
        return Unmapped(f"an argument that the kind {kind} does not have")
    if isinstance(rule, To) and rule.ours in ONLY_TEXT and kind in IMAGES:
        return TOKENIZED if rule.ours == "too_long" else Unmapped(f"an argument that the kind {kind} does not have")
    if isinstance(rule, To) and rule.ours == "mask_reasoning" and value is False:
        return Ignored("what ours does without being told")
    return rule


def finished(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A section of data, in order: the kind first."""
    found = {"kind": settings["kind"], **settings}
    if found["kind"] == "mock":
        found.pop("path", None)
        found.setdefault("vocab_size", 32_000)
    elif "path" not in found and found["kind"] in NOT_SAID:
        found["path"] = NOT_SAID[found["kind"]]
    return found
