"""What their `_target_` names mean. A name is looked up here, and never imported."""

from automodel_accel.recipes.nemo.contract import Chosen, Ignored, To, Unmapped

PREFIX = "nemo_automodel."
OWN_CODE = "a class of its own, which is not imported; bring its rows into one of our kinds of data"
CUSTOM_MODEL = "a model class that transformers does not have; see whether transformers has the model by now"
SAME_LOSS = Ignored("the same loss; ours builds no logits")
RECIPES = {
    "TrainFinetuneRecipeForNextTokenPrediction": Ignored("what `train` does"),
    "FinetuneRecipeForVLM": Ignored("what `train` does where the data has images"),
    "KnowledgeDistillationRecipeForNextTokenPrediction": Ignored("what `train` does where there is a teacher"),
}

# the last words of a name -> what it is; for datasets, the `kind` of ours
TARGETS: dict[str, Chosen] = {
    "NeMoAutoModelForCausalLM.from_pretrained": To("", lambda _: None),
    "NeMoAutoModelForCausalLM.from_config": To("model.weights", lambda _: "random"),
    "NeMoAutoModelForImageTextToText.from_pretrained": To("model.task", lambda _: "image_text_to_text"),
    "NeMoAutoModelForImageTextToText.from_config": To(
        "", lambda _: {"model.task": "image_text_to_text", "model.weights": "random"}
    ),
    "NeMoAutoModelForMultimodalLM.from_pretrained": To("model.task", lambda _: "image_text_to_text"),
    "NeMoAutoModelForSeq2SeqLM.from_pretrained": Unmapped("an encoder-decoder, which recipes do not train"),
    "Gemma4WithDrafter.from_pretrained": Unmapped("a model and its drafter, trained together; ours trains one model"),
    "BackendConfig": Ignored("kernels, which `accel` chooses and proves"),
    "AutoConfig.from_pretrained": To("", lambda _: None),
    "squad.make_squad_dataset": To("data.kind", lambda _: "squad"),
    "hellaswag.HellaSwag": To("data.kind", lambda _: "hellaswag"),
    "ChatDataset": To("data.kind", lambda _: "chat"),
    "ColumnMappedTextInstructionDataset": To("data.kind", lambda _: "instruction"),
    "ColumnMappedTextInstructionIterableDataset": To(
        "", lambda _: {"data.kind": "instruction", "data.streaming": True}
    ),
    "make_medpix_dataset": To("data.kind", lambda _: "medpix"),
    "make_rdr_dataset": To("data.kind", lambda _: "rdr"),
    "make_cord_v2_dataset": To("data.kind", lambda _: "cord_v2"),
    "make_tulu3_dataset": To("", lambda _: {"data.kind": "chat", "data.path": "allenai/tulu-3-sft-mixture"}),
    "make_shopify_product_catalogue_dataset": To(
        "",
        lambda _: {
            "data.kind": "captions",
            "data.path": "Shopify/product-catalogue",
            "data.image": "product_image",
            "data.text": "ground_truth_category",
            "data.prompt": "What product category does this item belong to?",
        },
    ),
    "build_mock_vlm_dataset": To("data.kind", lambda _: "mock_images"),
    "agent_chat.make_agent_chat_dataset": To("data.kind", lambda _: "chat"),
    "nanogpt_dataset.NanogptDataset": To("data.kind", lambda _: "bins"),
    "MockIterableDataset": To("data.kind", lambda _: "mock"),
    "mock.build_unpacked_dataset": To("data.kind", lambda _: "mock"),
    "mock_packed.build_packed_dataset": To("data.kind", lambda _: "mock"),
    "torch.optim.Adam": To("optimizer.kind", lambda _: "adam"),
    "torch.optim.AdamW": To("optimizer.kind", lambda _: "adamw"),
    "torch.optim.SGD": To("optimizer.kind", lambda _: "sgd"),
    "fused_adam.FusedAdam": To("optimizer.kind", lambda _: "adamw"),
    "optimizers.FusedAdam": To("optimizer.kind", lambda _: "adamw"),
    "flashoptim.FlashAdamW": To("optimizer.kind", lambda _: "adamw"),
    "lora.PeftConfig": To("", lambda _: None),
    "MaskedCrossEntropy": SAME_LOSS,
    "FusedLinearCrossEntropy": SAME_LOSS,
    "TEParallelCrossEntropy": SAME_LOSS,
    "ChunkedCrossEntropy": SAME_LOSS,
    "Gemma4TensorParallelFusedLinearCrossEntropy": SAME_LOSS,
    "kd_loss.KDLoss": To("", lambda _: None),
    "StatefulDataLoader": Ignored("ours goes on to the sample as well"),
    "torch.utils.data.DataLoader": Ignored("ours goes on to the sample as well"),
    "StatefulRNG": To("", lambda _: None),
    "FSDP2Manager": To("", lambda _: None),
    "FSDP2Config": To("", lambda _: None),
    "MegatronFSDPManager": To("mesh.strategy", lambda _: "megatron_fsdp"),
    "DDPManager": To("mesh.strategy", lambda _: "ddp"),
    "MixedPrecisionPolicy": To("", lambda _: None),
    "PipelineConfig": Ignored("stages of a pipeline: the same result, by FSDP2"),
    "parallelizer.parallelize_model": Ignored("how experts lie on ranks: the same result, by FSDP2"),
    "AutoTokenizer.from_pretrained": To("", lambda _: None),
    "NeMoAutoTokenizer.from_pretrained": To("", lambda _: None),
    "AutoProcessor.from_pretrained": To("", lambda _: None),
    "ToolCallAccuracyEvaluator": Ignored("an evaluation beside the training; see `automodel-accel eval`"),
}


def target_rule(key: str, name: object) -> Chosen:
    """What a `_target_` under `key` means, or that it means nothing here."""
    text = str(name)
    for known, rule in TARGETS.items():
        if text == known or text.endswith("." + known):
            return rule
    section = key.split(".")[0]
    if key == "model.config._target_" and text.endswith(".from_pretrained"):
        return Ignored("transformers reads the config by the type that it names")
    if key == "model.config._target_":
        return Unmapped(
            f"{text}: sizes of a config of their own; save such a config, and name its folder as model.path"
        )
    if key == "processor._target_":
        return Ignored("transformers' AutoProcessor reads what the model brings")
    if key.endswith("collate_fn._target_") or key.endswith("collate_fn"):
        if text.startswith(PREFIX + "components.datasets"):
            return Ignored("ours asks the processor, or pads or packs")
        return Unmapped(f"{text}: a collate function of its own, which is not imported")
    if section in ("dataset", "validation_dataset"):
        return Unmapped(f"{text}: {OWN_CODE}")
    if section == "model" or section == "processor":
        return Unmapped(f"{text}: {CUSTOM_MODEL}")
    return Unmapped(f"{text}: has no counterpart, and is not imported")
