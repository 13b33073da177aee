"""What a field of a configuration means, by its name: the classes of names that all of transformers uses."""

import re


def _names(*patterns: str) -> re.Pattern[str]:
    return re.compile("^(?:" + "|".join(patterns) + ")$")


TOKEN = _names(
    *(r".*_token_id", r".*_token_index", r".*_token_ids", r".*_token_id_.*", r".*_token_id_list"),
    r"(bos|eos|pad|sep|unk|mask|cls)_index",
)
VOCABULARY = _names(
    *(r"(.*_)?vocab_size(_per_layer_input)?", r"n_vocab"),
    *(r"(padded|unpadded|decoder)_vocab_size", r"ngram_vocab_size_base", r".*hash.*vocab"),
)
LAYERS = _names(
    *(r".*num_hidden_layers.*", r"n_layers?", r"num_layers", r"depth", r".*_depth", r"layers", r"num_blocks"),
    *(r"(encoder|decoder)_layers", r"num_(encoder|decoder)_(layers|blocks)", r"num_global_layers"),
    *(r"num_layers_per_stack", r"n_layers_per_attn_res_block", r"[ed]_layers", r"num_local_(encoder|decoder)_layers"),
)
KV_HEADS = _names(
    *(r".*num_key_value_heads", r"num_kv_heads", r"kv_n_heads", r".*kv_heads?", r".*num_key_heads"),
    r"multi_query_group_num",
)
HEADS = _names(
    *(r".*num_attention_heads.*", r"n_heads?", r"num_heads", r"(encoder|decoder|cross)_attention_heads"),
    *(r"attention_heads", r".*num_heads", r".*n_heads", r".*num_value_heads", r"linear_num_heads"),
)
HEAD_DIM = _names(
    *(r".*head_dim", r"kv_channels", r"d_kv", r"dim_head", r".*d_head", r"qk_.*_dim", r"rotary_dim", r"d_rel"),
)
HIDDEN = _names(
    *(r"(.*_)?hidden_size", r"hidden_size_.*", r"d_model", r"n_embd", r"emb_dim", r".*_?embed_dim", r".*hidden_dim"),
    *(r"embedding_size", r"word_embed_proj_dim", r".*projection_dim", r"hidden_units", r"model_dim", r"lru_width"),
    *(r".*(input|output|in|out)_dim", r"dim_model_base", r"cond_dim", r"width", r"dim", r"proj_dim"),
)
INNER = _names(
    *(r".*intermediate_size.*", r".*ffn_dim", r"d_ff|dff|d_inner|n_inner|dim_ff|mlp_dim", r".*ffn_hidden_size"),
    *(r".*_ffn_.*size", r"intermediate_dim", r"inner_dim"),
)
EXPERTS = _names(
    *(r"num_experts", r"n_routed_experts", r"num_local_experts", r"moe_num_experts", r"zero_expert_num"),
    *(r".*num_.*experts$", r"n_.*experts"),
)
CHOSEN_EXPERTS = _names(
    *(r"num_experts_per_tok(en)?", r"moe_top_?k", r"moe_k", r"top_k", r"num_selected_experts", r"top_k_experts"),
    r"n_activated_experts",
)
RANK = _names(r".*lora_rank", r".*_rank", r".*_lowrank")
POSITIONS = _names(
    *(r".*max_.*position.*", r"n_positions", r"n_ctx", r"max_seq_len", r"model_max_length", r"max_sequence_length"),
    *(r".*num_position_embeddings", r"seq_length", r"max_source_positions"),
)
WINDOW = _names(
    *(r"sliding_window(_size)?", r"attention_window.*", r"local_attention_window_len", r"attention_chunk_size"),
    *(r"attention_window_size", r"keep_window_size", r"rel_extent", r"local_window"),
)
STATE = _names(r".*d_state", r".*state_size", r"feat_dim")
CHUNK = _names(r".*chunk_size", r"chunk_length", r".*attn_chunk_length")
IMAGE = _names(r".*image_size", r"img_size", r"initial_image_size")
IMAGE_FEATURES = _names(r"mm_tokens_per_image", r"latent_query_num", r"num_query_tokens")
CHANNELS = _names(r"base_channels")
CODES = _names(r"num_embeddings", r"codebook_size")  # of an image
PATCH = _names(r"patch_size")
PERIOD = _names(
    *(r".*_layer_period", r".*layer_interval", r"interleave_moe_layer_step", r".*_every_n_layers"),
    *(r"layer_group_size", r"_?sliding_window_pattern", r"full_attention_interval", r"cross_attention_frequency"),
)
OFFSET = _names(
    *(r".*_layer_offset", r"first_k_dense_replace", r"num_dense_layers", r"moe_layer_start_index"),
    *(r"num_kv_shared_layers", r"max_window_layers"),
)
RANDOM = re.compile("drop|jitter")  # what would make two steps differ; anywhere in the name
LAYER_COUNTS = ("num_hidden_layers", "decoder_layers", "n_layer", "n_layers", "num_layers", "depth")
WIDTHS = ("hidden_size", "d_model", "n_embd")
