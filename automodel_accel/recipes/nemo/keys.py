"""What their keys mean here: patterns of dotted keys, the first that fits counts."""

from fnmatch import fnmatchcase
from typing import Any

from automodel_accel.recipes.nemo.contract import Chosen, Differs, Ignored, Rule, To, Unmapped
from automodel_accel.recipes.nemo.targets import RECIPES, target_rule

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
ATTENTION = Ignored("which backend of attention: `accel.attention` takes the fastest that is proved exact")
STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "wsd": "wsd"}

SPEED = Ignored("how fast, not what: `accel` chooses kernels")
LAYOUT = Ignored("how it lies on ranks: the same result, by FSDP2")
LOADING = Ignored("how rows are loaded: ours makes batches ahead in a thread")
PADDING = Ignored("how rows are padded: ours pads to the longest of a batch, or packs")
TESTS = Ignored("of their own tests")
PACKING = Ignored("how rows are packed: ours by first fit, and no sample sees another")
COMPILING = Ignored("how torch compiles, which changes nothing of what is computed")
PLACE = Ignored("of another way to start a job; see `automodel-accel launch`")
MTP = Differs(
    "transformers' model has no heads for further tokens (multi-token prediction): it is trained without their loss"
)


def _number(value: Any) -> Any:
    return None if value in ("none", "None", None) else value


def _dtype(value: Any) -> str:
    bare = str(value).removeprefix("torch.")
    return DTYPES.get(bare, bare)


def _when(is_so: Any, ours: Rule, other: Rule) -> Chosen:
    return lambda value: ours if is_so(value) else other


def _true(value: Any) -> bool:
    return value is True


def _above(least: float) -> Any:
    return lambda value: isinstance(value, int | float) and value > least


def _size(ours: str) -> Chosen:
    return _when(_above(1), To(ours), Ignored("1, as ours is without"))


def _nothing(why: str = "what ours does without being told") -> Ignored:
    return Ignored(why)


def _recompute(value: Any) -> Any:
    return {True: "full", "full": "full", "selective": "selective"}.get(value)


def _style(value: Any) -> Rule:
    name = str(value).lower()
    return (
        To("schedule.kind", lambda _: STYLES[name])
        if name in STYLES
        else Unmapped("a schedule that ours does not have")
    )


def _recipe(value: Any) -> Rule:
    last = str(value).split(".")[-1]
    return RECIPES.get(last, Unmapped("a loop that ours does not have"))


def _quantized(value: Any) -> Rule:
    return To("model.quantize", lambda _: "nf4") if value else Ignored("not asked for")


KEYS: tuple[tuple[str, Chosen], ...] = (
    ("recipe", _recipe),
    ("recipe._target_", _recipe),
    *((f"{name}.*", TESTS) for name in ("ci", "benchmark")),
    *((f"{name}.*", PLACE) for name in ("skypilot", "slurm", "k8s", "nemo_run")),
    ("tool_call_eval.*", Ignored("an evaluation beside the training; see `automodel-accel eval`")),
    ("prewarm.*", SPEED),
    ("nvtx", Ignored("marks for a profiler")),
    ("longalign", _when(_true, Unmapped("a way of weighting rows that ours does not have"), _nothing())),
    ("_*", Ignored("a section that their program does not read either: its name begins with _")),
    ("step_scheduler.global_batch_size", To("training.global_batch_size")),
    ("step_scheduler.local_batch_size", To("batching.batch_size")),
    ("step_scheduler.ckpt_every_steps", To("checkpoint.every", _number)),
    ("step_scheduler.val_every_steps", To("training.validate_every", _number)),
    ("step_scheduler.max_steps", To("training.steps", _number)),
    ("step_scheduler.num_epochs", To("training.epochs", _number)),
    ("step_scheduler.log_remote_every_steps", To("logging.every")),
    ("step_scheduler.gc_every_steps", SPEED),
    ("step_scheduler.loss_average_window_steps", Ignored("of a line on the console")),
    (
        "step_scheduler.save_checkpoint_every_epoch",
        _when(_true, Ignored("ours saves every so many steps, and at the end"), _nothing()),
    ),
    ("rng.seed", To("training.seed")),
    ("seed", To("training.seed")),
    ("rng.ranked", _nothing("dropout differs between ranks here as well")),
    ("rng.deterministic", _nothing("gradients are deterministic here: no atomics")),
    ("dist_env.backend", Ignored("follows from the device")),
    (
        "dist_env.timeout_minutes",
        Ignored("when a run that hangs is an error: ours after 30 minutes; see mesh.timeout_minutes"),
    ),
    # where it lies
    ("distributed*.strategy", lambda value: _nothing() if value == "fsdp2" else To("mesh.strategy")),
    ("distributed*.tp_size", _size("mesh.tensor")),
    ("distributed*.cp_size", _size("mesh.context")),
    ("distributed*.dp_replicate_size", _size("mesh.replicate")),
    ("distributed*.dp_size", Ignored("what the number of processes leaves")),
    ("distributed*.sequence_parallel", _when(_true, To("mesh.sequence_parallel"), _nothing())),
    ("distributed*.activation_checkpointing", _when(bool, To("accel.recompute", _recompute), _nothing())),
    ("parallelizer.activation_checkpointing", _when(bool, To("accel.recompute", _recompute), _nothing())),
    ("distributed*.mp_policy.param_dtype", To("mesh.param_dtype", _dtype)),
    ("distributed*.mp_policy.reduce_dtype", To("mesh.reduce_dtype", _dtype)),
    ("distributed*.offload_policy*", To("mesh.offload", bool)),
    ("distributed*.reshard_after_forward", To("mesh.reshard")),
    ("distributed*", LAYOUT),
    ("parallelizer.*", LAYOUT),
    ("autopipeline.*", LAYOUT),
    # the model
    ("model.pretrained_model_name_or_path", To("model.path")),
    ("model.config", To("model.path")),
    ("model.config.pretrained_model_name_or_path", To("model.path")),
    ("model.config.name_or_path", To("model.path")),
    ("model.config.trust_remote_code", To("model.trust_remote_code")),
    ("model.trust_remote_code", To("model.trust_remote_code")),
    ("model.torch_dtype", To("model.dtype", _dtype)),
    ("model.dtype", To("model.dtype", _dtype)),
    ("model.revision", To("model.revision")),
    ("model.attn_implementation", ATTENTION),
    ("model.config.attn_implementation*", ATTENTION),
    ("model.config._attn_implementation", ATTENTION),
    (
        "model.backend.fake_balanced_gate",
        _when(_true, Unmapped("sends tokens to experts by turns, to measure speed"), _nothing()),
    ),
    ("model.backend.te_fp8.recipe", Unmapped("a format of 8 bits that ours does not have; see fp8.recipe")),
    ("model.backend*", SPEED),
    *(
        (f"model.{name}", SPEED)
        for name in ("use_liger_kernel", "use_sdpa_patching", "sdpa_method", "kda_mode", "force_hf")
    ),
    ("model.load_base_model", To("model.weights", lambda value: "pretrained" if value else "random")),
    *((f"*{name}", Ignored("of their loss without logits")) for name in ("output_hidden_states",)),
    *(
        (f"model.*{name}", _when(_above(0), MTP, _nothing()))
        for name in ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers")
    ),
    ("model.*mtp_*", MTP),
    ("model.drafter_*", Unmapped("of a drafter that is trained beside the model")),
    ("model.base_activation_checkpointing", _when(bool, To("accel.recompute", _recompute), _nothing())),
    ("model*use_cache", Ignored("training makes no cache")),
    ("model.*cp_full_attn_backend", SPEED),
    ("model.config.architectures", Ignored("follows from the type of the config")),
    ("model.config.kda_*", SPEED),
    ("model.config.*", lambda _: To("", None)),  # type: ignore[arg-type]  # a setting of the config, by translation.py
    ("model.text_config.*", lambda _: To("", None)),  # type: ignore[arg-type]
    # adapters
    ("peft.target_modules", To("lora.target_modules")),
    ("peft.match_all_linear", _when(_true, To("lora.target_modules", lambda _: "all-linear"), _nothing())),
    ("peft.exclude_modules", To("lora.exclude_modules")),
    ("peft.dim", To("lora.r")),
    ("peft.alpha", To("lora.lora_alpha")),
    ("peft.dropout", To("lora.lora_dropout")),
    ("peft.use_dora", To("lora.use_dora")),
    (
        "peft.dropout_position",
        _when(lambda value: value == "pre", _nothing(), Unmapped("PEFT drops the adapter's input, not its output")),
    ),
    ("peft.lora_A_init", Ignored("adapters begin as PEFT draws them")),
    ("peft.moe_rank_scaling", _when(_true, Unmapped("ranks of experts that are cut to share one"), _nothing())),
    ("peft.use_*", SPEED),
    ("freeze_config.freeze_vision_tower", To("model.freeze.vision_tower")),
    ("freeze_config.freeze_audio_tower", To("model.freeze.audio_tower")),
    ("freeze_config.freeze_embeddings", To("model.freeze.embeddings")),
    ("freeze_config.freeze_language_model", To("model.freeze.language_model")),
    ("quantization.load_in_4bit", _quantized),
    ("quantization.load_in_8bit", _when(_true, To("model.quantize", lambda _: "int8"), Ignored("not asked for"))),
    ("quantization.bnb_4bit_quant_type", _when(lambda value: value == "nf4", _nothing(), Unmapped("ours has nf4"))),
    ("quantization.bnb_4bit_*", _nothing("double quantisation, computed in the model's dtype")),
    ("fp8.enabled", _when(_true, To("fp8.recipe", lambda _: "tensorwise"), Ignored("not asked for"))),
    (
        "fp8.recipe_name",
        lambda value: (
            To("fp8.recipe", lambda _: str(value))
            if value in ("tensorwise", "rowwise")
            else Unmapped("a recipe of scales that ours does not have")
        ),
    ),
    (
        "fp8.filter_fqns",
        _when(
            lambda value: value == ["lm_head"],
            _nothing("heads are left out here as well"),
            Unmapped("name the layers that are to have it: fp8.layers"),
        ),
    ),
    ("fp8.*", SPEED),
    ("qat.*", Unmapped("quantisation-aware training, which ours does not have")),
    ("compile.enabled", _when(_true, To("mesh.compile"), _nothing())),
    ("compile.*", COMPILING),
    # loss, optimizer, schedule
    ("loss_fn", lambda value: target_rule("loss_fn", value)),  # type: ignore[arg-type, return-value]
    *(
        (f"loss_fn.{name}", _nothing("the model's own; what it adds to logits is kept"))
        for name in ("logit_softcapping", "reduction", "ignore_index")
    ),
    ("loss_fn.fp32_upcast", _nothing("softmax in float32")),
    *((f"loss_fn.{name}", SPEED) for name in ("chunk_len", "compile", "num_chunks")),
    ("loss_fn.*", Unmapped("of a loss that ours does not have")),
    ("kd_ratio", To("distillation.weight")),
    ("temperature", To("distillation.temperature")),
    ("kd_loss_fn.temperature", To("distillation.temperature")),
    ("kd_loss_fn.*", SPEED),
    ("teacher_model.pretrained_model_name_or_path", To("distillation.teacher.path")),
    ("teacher_model.torch_dtype", To("distillation.teacher.dtype", _dtype)),
    ("teacher_model.trust_remote_code", To("distillation.teacher.trust_remote_code")),
    ("teacher_model.*", SPEED),
    ("optimizer.lr", To("optimizer.lr", float)),
    ("optimizer.betas", To("optimizer.betas")),
    ("optimizer.eps", To("optimizer.eps", float)),
    ("optimizer.epsilon", To("optimizer.eps", float)),
    ("optimizer.weight_decay", To("", None)),  # type: ignore[arg-type]  # of all parameters; by translation.py
    *((f"optimizer.{name}", SPEED) for name in ("foreach", "fused", "flatten", "use_triton", "capturable")),
    *(
        (f"optimizer.{name}", Ignored("in which dtype its states are kept: float32 here"))
        for name in ("master_*", "exp_avg*", "store_param_remainders")
    ),
    *((f"optimizer.{name}", _nothing()) for name in ("adam_w_mode", "bias_correction")),
    ("optimizer.*", Unmapped("of an optimizer that ours does not have")),
    ("lr_scheduler.lr_decay_style", _style),
    ("lr_scheduler.lr_warmup_steps", To("schedule.warmup", _number)),
    ("lr_scheduler.min_lr", To("", None)),  # type: ignore[arg-type]  # by the rate; translation.py
    ("lr_scheduler.*", Unmapped("of a schedule that ours does not have")),
    ("clip_grad_norm.max_norm", To("training.max_grad_norm")),
    ("neftune.noise_alpha", To("training.neftune_noise_alpha")),
    # saving, logging
    ("checkpoint.enabled", lambda value: _nothing() if value else To("checkpoint.export", lambda _: False)),
    ("checkpoint.checkpoint_dir", To("output")),
    (
        "checkpoint.restore_from",
        Unmapped("a checkpoint of theirs, which ours does not read; export it and name it as model.path"),
    ),
    ("checkpoint.dequantize_base_checkpoint", Ignored("the model is loaded in model.dtype")),
    ("checkpoint.*", Ignored("how it is saved: safetensors, and a folder for transformers at the end")),
    ("wandb.enable", lambda value: Ignored("not asked for") if value is False else To("", lambda _: None)),
    ("wandb.project", To("logging.project")),
    ("wandb.*", To("", None)),  # type: ignore[arg-type]
    ("mlflow.*", To("", None)),  # type: ignore[arg-type]
    ("comet.*", Ignored("a tracker that ours does not have")),
    ("logger.*", Ignored("how much is said")),
    # data that has no kind of ours is told by its _target_
    ("packed_sequence.packed_sequence_size", To("", None)),  # type: ignore[arg-type]
    ("packed_sequence.pack_size", To("", None)),  # type: ignore[arg-type]
    ("packed_sequence.*", PACKING),
    ("dataloader.shuffle", To("data.shuffle")),
    ("dataloader.collate_fn", lambda value: target_rule("dataloader.collate_fn", value)),  # type: ignore[arg-type, return-value]
    ("dataloader.collate_fn.max_length", To("batching.seq_length")),
    ("dataloader.batch_size", LOADING),
    ("dataloader.*", LOADING),
    ("validation_dataloader.collate_fn", lambda value: target_rule("validation_dataloader.collate_fn", value)),  # type: ignore[arg-type, return-value]
    ("validation_dataloader*", LOADING),
    ("processor.pretrained_model_name_or_path", To("model.tokenizer")),
    ("processor.trust_remote_code", To("model.trust_remote_code")),
    ("processor.padding_side", PADDING),
    *((f"processor.{name}", To(f"model.processor.{name}")) for name in ("min_pixels", "max_pixels")),
    ("processor.*", Unmapped("a setting of the processor; save one with it, and name its folder as model.tokenizer")),
    ("tokenizer.pretrained_model_name_or_path", To("model.tokenizer")),
    ("tokenizer.trust_remote_code", To("model.trust_remote_code")),
    ("tokenizer.add_*_token", _nothing("special tokens are those of the tokenizer's own template")),
)


def rule_of(key: str, value: Any) -> Rule:
    """What becomes of a leaf; of a `_target_`, by its name."""
    if key.endswith("_target_") and key != "recipe._target_" and not key.startswith(("ci.", "_", "skypilot.")):
        return _decided(target_rule(key, value), value)
    for pattern, chosen in KEYS:
        if fnmatchcase(key, pattern):
            return _decided(chosen, value)
    return Unmapped("a key that is not known here")


def _decided(chosen: Any, value: Any) -> Rule:
    while not isinstance(chosen, To | Ignored | Differs | Unmapped):
        chosen = chosen(value)
    return chosen
