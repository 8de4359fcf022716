"""What llama.cpp calls the parts of a model, in which order it keeps their rows, and its facts.

Names come from the gguf package's own map. Two things are not a matter of names:

    rope    transformers turns element i of a head together with element i + d/2; llama.cpp's
            "llama" turns neighbours. So the rows of q and k (and their biases) are interleaved.
    A_log   llama.cpp keeps A = -exp(A_log), in float32.

Whatever of a configuration the format cannot say, or llama.cpp would not honour, is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROTATIONS = ("default", "linear", "llama3")  # of transformers' rope_type; what is written here
MAMBA_CONTEXT = 1 << 20  # tokens; any number, as a state has no positions. What llama.cpp writes


@dataclass(frozen=True)
class Layout:
    """How one kind of model is written."""

    architecture: MODEL_ARCH
    check: Callable[[PreTrainedConfig], None]  # raises ValueError for what cannot be written
    describe: Callable[[GGUFWriter, PreTrainedConfig], None]
    convert: Callable[[str, Tensor, PreTrainedConfig], Tensor]  # a tensor by transformers' name
    in_float32: tuple[str, ...] = ()  # ends of names that llama.cpp takes as float32 alone


def layout_of(config: PreTrainedConfig) -> Layout:
    """How to write a model. Raises ValueError, naming what is in the way."""
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"a {config.model_type} cannot be written as GGUF here, only {', '.join(LAYOUTS)}; "
            "llama.cpp's convert_hf_to_gguf.py knows more kinds"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantised already; export the student before that")
    layout = LAYOUTS[config.model_type]
    layout.check(config)
    return layout


def extra_tensors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Tensors that a checkpoint does not have, by llama.cpp's name: Llama 3's slower rotations."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_width(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    return {"rope_freqs.weight": plain / slowed}


# --- attention: llama, mistral, qwen2 ---------------------------------------------------------


def _check_attention(config: PreTrainedConfig) -> None:
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    wrong = {
        f"hidden_act is {config.hidden_act}, not silu": config.hidden_act not in ("silu", "swish"),
        f"rope_type is {rope['rope_type']}": rope["rope_type"] not in ROTATIONS,
        "only a part of each head is rotated": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"attention is cut at a window of {window} tokens":
            window is not None and window < config.max_position_embeddings,
    }  # fmt: skip
    _refuse(config, wrong)


def _describe_attention(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    rope, width = config.rope_parameters, _head_width(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _head_width(config: PreTrainedConfig) -> int:
    width = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def _interleave(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """Bring rows i and i + d/2 of each head of q and k side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return tensor
    return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _as_it_is(_name: str, tensor: Tensor, _config: PreTrainedConfig) -> Tensor:
    return tensor


# --- state space: mamba -----------------------------------------------------------------------


def _check_mamba(config: PreTrainedConfig) -> None:
    inner, width = config.intermediate_size, config.hidden_size
    wrong = {
        f"the inner width is {inner}, not twice {width}": inner != 2 * width,
        f"hidden_act is {config.hidden_act}, not silu": config.hidden_act != "silu",
        "its projections have biases (use_bias)": config.use_bias,
        "its convolution has no bias (use_conv_bias)": not config.use_conv_bias,
    }
    _refuse(config, wrong)


def _describe_mamba(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(MAMBA_CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(0)  # llama.cpp wants these two to be there
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(int(config.time_step_rank))
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def _convert_mamba(name: str, tensor: Tensor, _config: PreTrainedConfig) -> Tensor:
    if name.endswith(".A_log"):
        return -tensor.float().exp()
    return tensor.squeeze(1) if name.endswith(".conv1d.weight") else tensor


def _refuse(config: PreTrainedConfig, wrong: dict[str, bool]) -> None:
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise ValueError(
            f"this {config.model_type} cannot be written for llama.cpp: {'; '.join(found)}"
        )


_attention = partial(Layout, check=_check_attention, describe=_describe_attention)
LAYOUTS = {  # by transformers' model_type
    "llama": _attention(MODEL_ARCH.LLAMA, convert=_interleave),
    "mistral": _attention(MODEL_ARCH.LLAMA, convert=_interleave),
    "qwen2": _attention(MODEL_ARCH.QWEN2, convert=_as_it_is),
    "mamba": Layout(MODEL_ARCH.MAMBA, _check_mamba, _describe_mamba, _convert_mamba,
                    in_float32=("ssm_a", "ssm_conv1d.weight")),
}  # fmt: skip
