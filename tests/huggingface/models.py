"""Small models of transformers, from configs with random weights, for the tests and for docs/make_coverage.py."""

from __future__ import annotations

import torch
import transformers as T

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**SIZES, "vocab_size": 200, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BOTH = {"d_model": 64, "vocab_size": 200, **TOKENS}
for _side in ("encoder", "decoder"):
    BOTH |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 4, f"{_side}_ffn_dim": 128}


def words(length=12):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    return {"input_ids": torch.randint(5, 200, (2, length)), "attention_mask": mask}


def pairs():
    return {"input_ids": torch.randint(5, 200, (2, 12)), "decoder_input_ids": torch.randint(5, 200, (2, 6))}


def pixels(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def clip():
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    return T.CLIPModel(T.CLIPConfig(text_config={**TEXT, **TOKENS}, vision_config=vision, projection_dim=32))


def detr():
    stages = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
    backbone = T.ResNetConfig(embedding_size=16, layer_type="basic", **stages)
    sizes = {name: value for name, value in BOTH.items() if name not in ("vocab_size", *TOKENS)}
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone}
    return T.DetrForObjectDetection(T.DetrConfig(**own, **sizes, num_queries=10, num_labels=5))


def whisper():
    audio = {"num_mel_bins": 20, "max_source_positions": 50, "max_target_positions": 64}
    words = {"decoder_start_token_id": 1, "begin_suppress_tokens": None, "suppress_tokens": None}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**BOTH, **audio, **words))


def wav2vec2():
    convolutions = {"conv_dim": (32,) * 3, "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return T.Wav2Vec2ForCTC(
        T.Wav2Vec2Config(**SIZES, vocab_size=32, num_feat_extract_layers=3, **convolutions, **positions)
    )


def distilbert():
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    config = T.DistilBertConfig(**sizes, vocab_size=200, max_position_embeddings=64)
    return T.DistilBertForSequenceClassification(config)


def t5():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return T.T5ForConditionalGeneration(T.T5Config(**sizes, vocab_size=200, decoder_start_token_id=0))


def bart():
    config = T.BartConfig(**BOTH, max_position_embeddings=64, forced_eos_token_id=2, decoder_start_token_id=2)
    return T.BartForConditionalGeneration(config)


def gpt2():
    config = T.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=64, **TOKENS)
    return T.GPT2LMHeadModel(config)


def qwen():
    config = T.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True, **TOKENS)
    return T.Qwen2ForCausalLM(config)


MODELS = {
    "BERT": (lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)), words),
    "DistilBERT": (distilbert, words),
    "RoBERTa": (lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**TEXT, **TOKENS)), words),
    "T5": (t5, pairs),
    "BART": (bart, pairs),
    "GPT-2": (gpt2, words),
    "Llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT, num_key_value_heads=2, **TOKENS)), words),
    "Qwen2": (qwen, words),
    "Whisper": (
        whisper,
        lambda: {"input_features": torch.randn(2, 20, 100), "decoder_input_ids": torch.randint(5, 200, (2, 6))},
    ),
    "Wav2Vec2": (wav2vec2, lambda: {"input_values": torch.randn(2, 1600)}),
    "ViT": (lambda: T.ViTForImageClassification(T.ViTConfig(**SIZES, image_size=32, patch_size=8)), pixels),
    "CLIP": (clip, lambda: {**words(), **pixels()}),
    "DETR": (detr, lambda: pixels(64)),
}
"""Each model by its name: what makes it, and what makes one call's arguments."""


def float_outputs(model, inputs):
    """Return the tensors that a model's call returns, without caches."""
    with torch.no_grad():
        outputs = model(**inputs)
    return [tensor for tensor in outputs.values() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]


def prompt_of(inputs):
    """Return the arguments of `generate` for those of a call."""
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
