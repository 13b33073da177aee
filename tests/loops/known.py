"""Failures of kernels for training that were reported in public, and the test that shows each not to be ours.

A row that no CPU can show has the reason in place of tests.
"""

from dataclasses import dataclass

LIGER, TRL, UNSLOTH, HF = "linkedin/Liger-Kernel", "huggingface/trl", "unslothai/unsloth", "huggingface/transformers"
CCE, FACTORY, AXOLOTL = "apple/ml-cross-entropy", "hiyouga/LLaMA-Factory", "axolotl-ai-cloud/axolotl"
LOSS, MODELS, TRAINERS = (
    "tests.loops.test_known_failures",
    "tests.loops.test_known_failures_models",
    "tests.loops.test_trl",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One pain.

    Attributes:
        threads: Numbers by repository, or what is known of kernels that have no thread.
        tests: Module and name of each test that shows it.
        why_not: Where there is none: why a CPU cannot show it.
    """

    threads: dict[str, tuple[int, ...]]
    tests: dict[str, tuple[str, ...]] | None = None
    why_not: str = ""


ROWS: dict[str, Row] = {
    "an adapter on the head is ignored": Row(
        {TRL: (4612, 5977, 6159, 6277)},
        {LOSS: ("test_lora_on_the_head_is_not_ignored",)},
    ),
    "a head that is trained alone has no gradient": Row(
        {LIGER: ()}, {LOSS: ("test_head_only_training_has_a_gradient",)}
    ),
    "a second backward multiplies the gradient": Row({LIGER: ()}, {LOSS: ("test_second_backward_with_retain_graph",)}),
    "the gradient of a loss that is not reduced": Row(
        {LIGER: (968,)}, {LOSS: ("test_a_loss_that_is_not_reduced_has_the_right_gradient",)}
    ),
    "chunks and their memory": Row(
        {
            LIGER: (227, 509, 1190, 1323, 1324, 1339, 1356, 1371, 1414, 1422, 1439, 1472),
            "pytorch/pytorch": (124480,),
            "meta-pytorch/tritonbench": (35,),
            "pytorch/helion": (1268,),
        },
        {
            LOSS: ("test_chunks_are_not_tiny", "test_memory_of_the_loss_does_not_grow_with_the_tokens"),
            "tests.ops.test_linear_cross_entropy_host": ("test_length_of_chunks",),
        },
    ),
    "gradient accumulation": Row(
        {
            LIGER: (512, 827, 802, 322, 767),
            HF: (35438,),
            UNSLOTH: (1134, 3253, 1953, 3482, 3527, 4616),
        },
        {
            LOSS: (
                "test_gradient_accumulation_is_normalised_by_label_tokens",
                "test_num_items_in_batch_is_accepted",
                "test_training_from_scratch_does_not_diverge",
            ),
            "tests.loops.test_matrix": ("test_exact", "test_as_exact_as_vanilla_in_bfloat16"),
        },
    ),
    "the wrong object, or everybody's, is changed": Row(
        {LIGER: (920, 242, 772, 170, 115), UNSLOTH: (1713, 2587, 2076)},
        {
            MODELS: (
                "test_other_models_of_the_process_are_untouched",
                "test_a_model_that_was_built_before_is_swapped_whole",
                "test_a_model_that_is_built_after_liger_has_changed_everything",
                "test_a_cross_entropy_that_is_replaced_after_apply",
            ),
        },
    ),
    "a norm in place": Row(
        {LIGER: (370, 376, 1305, 764), "huggingface/kernels-community": (105,)},
        {
            MODELS: (
                "test_in_place_norm_does_not_corrupt_gradients",
                "test_a_model_that_was_built_before_is_swapped_whole",
                "test_logits_in_bfloat16_are_as_near",
            )
        },
    ),
    "a head that is sharded": Row(
        {
            LIGER: (332, 631, 1048),
            FACTORY: (5941, 5879),
            TRL: (3368, 5891, 6372, 4544),
            "huggingface/accelerate": (3870,),
            CCE: (55, 42),
        },
        {
            MODELS: ("test_fsdp2_head", "test_zero3_head", "test_offloaded_head", "test_norms_that_peft_saves"),
            "tests.swap.test_wrappers": ("test_fully_shard", "test_apply_after_fully_shard"),
        },
    ),
    "logits in evaluation": Row(
        {LIGER: (328, 888), TRL: (5069, 4730), HF: (43039, 44981)},
        {
            LOSS: (
                "test_evaluation_has_logits",
                "test_evaluation_needs_no_logits_when_only_the_loss_is_wanted",
                "test_shift_labels_have_a_loss_in_evaluation",
            ),
            TRAINERS: ("test_evaluation",),
            "tests.loops.test_matrix_trainer": ("test_evaluate_and_predict",),
        },
    ),
    "a release of transformers": Row(
        {AXOLOTL: (2767,), LIGER: (978, 958, 1019, 1045, 1079, 1109, 1123, 1192, 925)},
        {
            MODELS: (
                "test_a_transformers_release_cannot_break_imports",
                "test_no_architecture_is_imported_by_name",
                "test_experts_of_fused_weights",
            ),
            LOSS: ("test_return_dict_false",),
            "tests.day0.test_custom_model": ("test_every_fusion_serves_it",),
        },
    ),
    "torch.compile": Row(
        {LIGER: (174, 1327, 1338)},
        {
            LOSS: ("test_torch_compile_with_ignored_labels",),
            "tests.swap.test_wrappers": ("test_compiled_whole", "test_model_compiled_before_it_is_applied"),
        },
    ),
    "norms that do not train": Row(
        {UNSLOTH: (45, 832, 4533, 4550)},
        {MODELS: ("test_norms_train_in_full_fine_tuning",)},
    ),
    "more than one GPU": Row(
        {UNSLOTH: (1707, 3915, 1074, 2735), FACTORY: (5635,)},
        {
            MODELS: ("test_replicas_of_data_parallel",),
            "tests.loops.test_distributed": ("test_two_processes",),
        },
    ),
    "small gradients are dropped": Row(
        {CCE: (14, 18), "meta-pytorch/torchtune": (2507,), TRL: (5575,)},
        {LOSS: ("test_small_gradients_are_not_dropped", "test_equal_bits_of_equal_steps")},
    ),
    "labels out of range": Row({}, {LOSS: ("test_labels_out_of_range",)}),
    "benchmarks that are not fair": Row(
        {"Dao-AILab/quack": (9,), LIGER: (1479, 1272)},
        why_not="speed is measured on a GPU; how ours is measured is in bench/",
    ),
    "fp8": Row(
        {"pytorch/ao": (4300,), "pytorch/pytorch": (133334,), "triton-lang/triton": (11111,)},
        why_not="no CPU multiplies in fp8, and no kernel here does",
    ),
    "others leave Liger": Row(
        {TRL: (7059,), "volcengine/verl": (7945,), "pytorch/pytorch": (176338, 175039, 195829, 196134)},
        why_not="decisions, no failures",
    ),
}
