"""One tiny model with random weights of every causal-LM class that transformers knows.

    for model_type in MODEL_TYPES:
        model = tiny_model(model_type)                  # float32, evaluation mode, on the CPU
        logits = model(**tiny_inputs(model, rows=2, tokens=12, seed=0)).logits

The sizes come from the default configuration: every known attribute is cut to the value that SIZES
gives for its name, in nested configurations too, and every list with one entry per block is cut to
BLOCKS entries. What that general rule cannot know stands in OVERRIDES.
"""

from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

BLOCKS = 4
WIDTH = 32
VOCABULARY = 128
NOISE = 0.05
ORDINARY_IDS = range(8, 96)  # ids of text: the special ids lie below and above
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

SIZES: dict[str, int] = {
    name: size
    for size, names in {
        VOCABULARY: """vocab_size vocab_size_per_layer_input codebook_size shape_vocab_size
            pronunciation_vocab_size audio_vocab_size unpadded_vocab_size
            encoder_hash_byte_group_vocab""",
        64: """max_position_embeddings n_positions max_seq_len n_ctx context_length
            max_target_positions max_source_positions original_max_position_embeddings
            rel_extent position_bias_max_distance""",
        WIDTH: """hidden_size d_model n_embd emb_dim embedding_size hidden_size_global
            input_embedding_size output_embedding_size output_channels image_size
            ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels dim_model_base""",
        48: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff d_inner
            ffn_hidden_size expert_ffn_hidden_size feed_forward_size dim_ff
            intermediate_size_mlp shared_intermediate_size dense_intermediate_size mlp_dim
            shared_expert_intermediate_size shared_experts_intermediate_size
            moe_shared_expert_intermediate_size moe_intermediate_size""",
        16: """q_lora_rank kv_lora_rank o_lora_rank router_hidden_size pronunciation_embed_dim
            shape_embed_dim hidden_size_per_layer_input hc_lowrank laurel_rank adapter_rank
            position_bias_num_buckets num_filters codebook_dim prompt_mid_dim
            ngram_vocab_size_base make_ngram_vocab_size_divisible_by
            vector_quantization_hidden_dimension upsample_groups num_mel_bins""",
        8: """head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim dim_head kv_channels
            index_head_dim swa_head_dim linear_head_dim linear_key_head_dim
            linear_value_head_dim attention_head_size mamba_head_dim mamba_d_state
            ssm_state_size state_size rotary_dim time_step_rank mamba_dt_rank chunk_size
            mamba_chunk_size block_size d_rel patch_size prompt_length sliding_window
            sliding_window_size attention_window_size local_attention window_size
            attention_chunk_size keep_window_size local_attention_window_len index_topk
            index_block_size floor_scale zero_expert_num""",
        BLOCKS: """num_decoder_layers num_attention_heads n_head n_heads num_heads
            decoder_attention_heads attention_heads num_decoder_attention_heads
            swa_num_attention_heads linear_num_heads index_n_heads linear_num_value_heads
            mamba_n_heads mamba_num_heads n_mamba_heads heads_per_ngram num_experts
            num_local_experts n_routed_experts moe_num_experts num_blocks""",
        1: "topk_group",
        2: """encoder_layers num_encoder_layers encoder_attention_heads
            num_encoder_attention_heads num_key_value_heads swa_num_key_value_heads
            linear_num_key_heads num_experts_per_tok moe_k moe_topk n_group n_groups o_groups
            max_window_layers num_kv_shared_layers first_k_dense_replace
            global_attn_every_n_layers hc_sinkhorn_iters split_ngram_parts""",
    }.items()
    for name in names.split()
}

LOCAL_FULL = ["sliding_attention", "full_attention"] * 2
LINEAR_FULL = ["linear_attention", "full_attention"] * 2
CONV_FULL = ["conv", "full_attention"] * 2
_DOTS3_SLIDING = {  # the sliding blocks have sizes of their own, which are not declared
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QWEN4_INDEXER = {  # without defaults, though its indexed attention needs them
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "eos_token_id": 2,
}
_GEMMA4_EXPERTS = {  # as in its 26B model; global_head_dim is not declared
    "global_head_dim": 16,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
# What the general rule cannot know, by model type; a dictionary inside is a nested configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "cohere_compass_text": {
        "layer_types": LOCAL_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        # its 128 tokens per compressed entry would never fill
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": _DOTS3_SLIDING,
    "dots3_note_text": _DOTS3_SLIDING,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma4": {"text_config": _GEMMA4_EXPERTS},
    # as in its 2B model: the last blocks reuse the keys and values of earlier ones
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": LINEAR_FULL, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {"layer_types": LOCAL_FULL, "num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"layer_types": CONV_FULL, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": CONV_FULL},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": LOCAL_FULL},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2": {"use_sliding_window": True, "layer_types": LOCAL_FULL},
    "qwen4_exp": _QWEN4_INDEXER,
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {
        "attention_head_size": 8,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,  # else every forward draws its hashes anew
        "num_buckets": 4,
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": 8},
}

_GEMMA4_ASSISTANT = (
    "it shares the keys and values of all its blocks, which its text configuration refuses "
    "(kv_sharing_modes); it reads another model's hidden states, not text"
)
REFUSALS: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm, and has 300 million parameters",
    "gemma4_assistant": _GEMMA4_ASSISTANT,
    "gemma4_unified_assistant": _GEMMA4_ASSISTANT,
}


class CannotBuild(ValueError):
    """No tiny model of this type can be built here."""

    def __init__(self, model_type: str, reason: str):
        super().__init__(f"{model_type}: {reason}")
        self.model_type = model_type
        self.reason = reason


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of BLOCKS blocks and width WIDTH, of the class the causal-LM class takes.

    Where the model type is that of a composite model with a causal LM over its text part alone, it
    is the text part's configuration.
    """
    if model_type in REFUSALS:
        raise CannotBuild(model_type, REFUSALS[model_type])
    kind = _model_class(model_type).config_class
    overrides = deepcopy(OVERRIDES.get(model_type, {}))
    if "is_decoder" in {field.name for field in fields(kind)}:
        overrides = {"is_decoder": True} | overrides  # else those that can be encoders look ahead
    return _shrunk(kind, overrides)


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The causal-LM class of this type with random weights: float32, evaluation mode, CPU.

    Noise moves every parameter off its initial value, so that a bias or a norm that a loader leaves
    at zero or one shows.
    """
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    model = _model_class(model_type)(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the others are computed, not stored
                parameter.add_(NOISE * torch.randn_like(parameter))
    return model


def tiny_inputs(
    model: PreTrainedModel, rows: int, tokens: int, seed: int
) -> dict[str, torch.Tensor | bool]:
    """The keyword arguments of a text-only forward of a tiny_model, for up to 60 tokens.

    No id is a special one. The rows are all of one length and have no padding.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type.startswith("musicgen"):  # folds one row per codebook into one
        rows *= model.config.num_codebooks
    ids = torch.randint(ORDINARY_IDS.start, ORDINARY_IDS.stop, (rows, tokens), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def _model_class(model_type: str) -> type[PreTrainedModel]:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _shrunk(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of this class with every known attribute cut to its size."""
    nested = _nested(kind)
    values = _small_values(kind) | {k: v for k, v in overrides.items() if k not in nested}
    for name, inner in nested.items():
        values[name] = _shrunk(inner, overrides.get(name, {}))
    return kind(**values)


def _nested(kind: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """The classes of the nested configurations that are not left out by default."""
    specs = {k: v for k, v in kind.sub_configs_defaults.items() if not v.optional}
    named = {k: v.get_config_class(v.model_type) for k, v in specs.items()}
    exact = {k: v.config_class for k, v in specs.items()} or dict(kind.sub_configs)
    return {k: v if issubclass(v, PreTrainedConfig) else named[k] for k, v in exact.items()}


def _small_values(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    declared = {field.name: field.default for field in fields(kind)}
    filled = vars(kind())
    count = next((filled[name] for name in BLOCK_COUNTS if name in filled), None)
    values = {}
    for name, default in declared.items():
        value = filled.get(name, default)
        if isinstance(value, PreTrainedConfig) or (default is None and isinstance(value, int)):
            continue  # a number that is not declared derives from the others
        small = _small(name, value, count)
        if small != value:
            values[name] = small
    if "kv_lora_rank" in declared:  # multi-head latent attention: as many keys as queries
        values["num_key_value_heads"] = BLOCKS
    return values


def _small(name: str, value: Any, blocks: int | None) -> Any:
    """The value of an attribute cut to its size; blocks is how many the default model has."""
    if isinstance(value, list | tuple):
        entries = [_small(name, entry, None) for entry in value]
        return type(value)(_one_per_block(entries) if len(entries) == blocks else entries)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in BLOCK_COUNTS:
        return BLOCKS
    if name.endswith(("_token_id", "_token_index")) and value >= ORDINARY_IDS.start:
        return SPECIAL_IDS.get(name, VOCABULARY - 1)
    return min(value, SIZES.get(name, value))


def _one_per_block(entries: list[Any]) -> list[Any]:
    """BLOCKS entries that keep the order of the kinds: a, a, b, a, a, b becomes a, b, a, b."""
    kinds = [entry for i, entry in enumerate(entries) if i == 0 or entry != entries[i - 1]]
    return (kinds + kinds[-1:] * BLOCKS)[:BLOCKS]
