"""Models that are no causal language models pass through the same engine, to the bit."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.checkpoint import read_checkpoint
from modeling.describe import describe
from modeling.skeleton import build_skeleton
from modeling.streaming import Passage
from modeling.weights import Streamed
from tests.coverage import whole_forward

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
Case = tuple[Any, dict[str, torch.Tensor]]


def text_encoder() -> Case:
    from transformers import BertConfig, BertModel

    inputs = {"input_ids": torch.randint(3, 96, (2, 9))}
    return BertModel(BertConfig(vocab_size=96, **SMALL)), inputs


def image_encoder() -> Case:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(image_size=16, patch_size=4, **SMALL)
    return SiglipVisionModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def video_encoder() -> Case:
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, tubelet_size=2, **SMALL)
    return VideoMAEModel(config), {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def speech_encoder() -> Case:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        conv_dim=(16, 16), conv_kernel=(4, 4), conv_stride=(4, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SMALL,
    )  # fmt: skip
    return Wav2Vec2Model(config), {"input_values": torch.randn(2, 400)}


def speech_encoder_decoder() -> Case:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=20, num_mel_bins=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 8, 40)}
    return WhisperModel(config), {**inputs, "decoder_input_ids": torch.randint(3, 96, (2, 5))}


def text_encoder_decoder() -> Case:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=96, d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=48)
    inputs = {"input_ids": torch.randint(3, 96, (2, 9))}
    return T5Model(config), {**inputs, "decoder_input_ids": torch.randint(3, 96, (2, 5))}


CASES = [
    (text_encoder, 3, ("text",)), (image_encoder, 3, ()), (video_encoder, 3, ()),
    (speech_encoder, 3, ()), (speech_encoder_decoder, 5, ("text",)),
    (text_encoder_decoder, 6, ("text",)),
]  # fmt: skip


@pytest.mark.parametrize(("build", "blocks", "modalities"), CASES)
def test_every_block_and_the_result_are_those_of_a_normal_forward(
    build: Callable[[], Case], blocks: int, modalities: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        whole = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        expected, (result,) = whole_forward(whole, [inputs], read=lambda out: out.last_hidden_state)
        checkpoint = read_checkpoint(folder)
        skeleton = build_skeleton(type(model), whole.config, checkpoint, torch.float32)
        weights = Streamed(skeleton, checkpoint)
        passage = Passage(skeleton.model, skeleton.blocks, weights, [inputs])
        found = {(a.block, a.batch): a.hidden.clone() for a in passage.run() if a.block >= 0}
        facts = describe(folder)
    assert set(found) == set(expected) and len(found) == facts.blocks == blocks
    for place, hidden in expected.items():
        assert torch.equal(found[place], hidden), place
    assert torch.equal(passage.forwards[0].output.last_hidden_state, result)
    assert not facts.is_causal_language_model
    assert facts.model_class == type(model).__name__
    assert set(modalities) <= set(facts.modalities)
