"""Tiny configurations of many families of transformers: what they share, and what distinguishes each.

Some keys mean nothing to some families, which ignore them.
"""

from __future__ import annotations

from typing import Any

VOCABULARY, LENGTH, IMAGE = 96, 12, 32
Config = dict[str, Any]

COMMON: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Config = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
"""A decoder of today: grouped queries."""
EXPERTS: Config = {
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT: Config = {
    **EXPERTS,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
WORDS: Config = {key: COMMON[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
SEQUENCE: Config = {
    **WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: Config = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VIT: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": 10,
}
AUDIO: Config = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "vocab_size": 32,
    "num_labels": 10,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
DECODER = "model.layers.*"

CAUSAL: dict[str, tuple[Config, Config, str | None]] = {
    "Llama": (GROUPED, {}, DECODER),
    "Mistral": (GROUPED, {}, DECODER),
    "Qwen2": (GROUPED, {}, DECODER),
    "Qwen3": (GROUPED, {}, DECODER),
    "Gemma": (GROUPED, {}, DECODER),
    "Gemma2": (GROUPED, {}, DECODER),
    "Gemma3": (GROUPED, {"sliding_window": 8}, DECODER),
    "Phi": (COMMON, {}, DECODER),
    "Phi3": (GROUPED, {}, DECODER),
    "Olmo2": (GROUPED, {}, DECODER),
    "StableLm": (GROUPED, {}, DECODER),
    "Starcoder2": (GROUPED, {}, DECODER),
    "Cohere": (GROUPED, {}, DECODER),
    "Granite": (GROUPED, {}, DECODER),
    "Glm": (GROUPED, {}, DECODER),
    "Glm4": (GROUPED, {}, DECODER),
    "Helium": (GROUPED, {}, DECODER),
    "Nemotron": (GROUPED, {}, DECODER),
    "Persimmon": (COMMON, {}, DECODER),
    "SmolLM3": (GROUPED, {}, DECODER),
    "Ernie4_5": (GROUPED, {}, DECODER),
    "Lfm2": (
        GROUPED,
        {"full_attn_idxs": [1, 3], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
        DECODER,
    ),
    "DiffLlama": (GROUPED, {}, DECODER),
    "ModernBertDecoder": (COMMON, {}, DECODER),
    "Mixtral": (EXPERTS, {}, DECODER),
    "Qwen2Moe": (EXPERTS, {}, DECODER),
    "Qwen3Moe": (EXPERTS, {}, DECODER),
    "Olmoe": (EXPERTS, {}, DECODER),
    "Phimoe": (EXPERTS, {}, DECODER),
    "GraniteMoe": (EXPERTS, {}, DECODER),
    "GptOss": (EXPERTS, {}, DECODER),
    "DeepseekV2": (LATENT, {}, DECODER),
    "DeepseekV3": (LATENT, {"head_dim": 4}, DECODER),
    "Jamba": (EXPERTS, {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}, DECODER),
    "Mamba": (COMMON, {"state_size": 4}, "backbone.layers.*"),
    "FalconMamba": (COMMON, {"state_size": 4}, "backbone.layers.*"),
    "Mamba2": (
        COMMON,
        {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 4},
        "backbone.layers.*",
    ),
    "RecurrentGemma": (
        COMMON,
        {"lru_width": 32, "attention_window_size": 8, "num_key_value_heads": 1, "conv1d_width": 2},
        DECODER,
    ),
    "Falcon": (COMMON, {"ffn_hidden_size": 48}, "transformer.h.*"),
    "Bloom": (COMMON, {"n_layer": 4, "n_head": 4}, "transformer.h.*"),
    "GPT2": (COMMON, {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}, "transformer.h.*"),
    "GPTBigCode": (COMMON, {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}, "transformer.h.*"),
    "GPTNeo": (
        COMMON,
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4},
        "transformer.h.*",
    ),
    "GPTNeoX": (COMMON, {}, "gpt_neox.layers.*"),
    "GPTJ": (
        COMMON,
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        "transformer.h.*",
    ),
    "CodeGen": (
        COMMON,
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        "transformer.h.*",
    ),
    "OPT": (
        COMMON,
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers.*",
    ),
    "XGLM": (COMMON, {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4}, DECODER),
    "BioGpt": (COMMON, {}, "biogpt.layers.*"),
    "Mpt": (COMMON, {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64}, "transformer.blocks.*"),
    "Rwkv": (COMMON, {"context_length": 64, "attention_hidden_size": 32}, "rwkv.blocks.*"),
    "CTRL": (
        COMMON,
        {"n_embd": 32, "dff": 48, "n_layer": 4, "n_head": 4, "n_positions": 64},
        "transformer.h.*",
    ),
}

CLASSIFIERS: dict[str, tuple[Config, Config, str | None]] = {
    "Bert": (COMMON, {}, "bert.encoder.layer"),
    "Roberta": (COMMON, {}, "roberta.encoder.layer"),
    "Electra": (COMMON, {"embedding_size": 32}, "electra.encoder.layer"),
    "Albert": (COMMON, {"embedding_size": 16}, None),
    "DistilBert": (
        COMMON,
        {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4},
        "distilbert.transformer.layer.*",
    ),
    "Deberta": (
        COMMON,
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 32},
        "deberta.encoder.layer.*",
    ),
    "DebertaV2": (
        COMMON,
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 32},
        "deberta.encoder.layer.*",
    ),
    "MPNet": (COMMON, {}, "mpnet.encoder.layer.*"),
    "ModernBert": (COMMON, {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}, "model.layers.*"),
    "XLNet": (WORDS, {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48}, "transformer.layer.*"),
    "Funnel": (
        WORDS,
        {"block_sizes": [2, 2], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        None,
    ),
    "BigBird": (COMMON, {"attention_type": "original_full"}, "bert.encoder.layer.*"),
    "Longformer": (COMMON, {"attention_window": [4, 4, 4, 4]}, "longformer.encoder.layer.*"),
    "Nystromformer": (
        COMMON,
        {"segment_means_seq_len": 12, "num_landmarks": 4},
        "nystromformer.encoder.layer.*",
    ),
    "FNet": (COMMON, {}, "fnet.encoder.layer.*"),
    "ConvBert": (COMMON, {"embedding_size": 32}, "convbert.encoder.layer.*"),
    "SqueezeBert": (
        COMMON,
        {"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "output_groups": 2},
        "transformer.encoder.layers.*",
    ),
    "MobileBert": (
        COMMON,
        {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        "mobilebert.encoder.layer.*",
    ),
    "RoFormer": (COMMON, {"embedding_size": 32}, "roformer.encoder.layer.*"),
    "RemBert": (COMMON, {"input_embedding_size": 16, "output_embedding_size": 16}, "rembert.encoder.layer.*"),
    "Canine": (
        COMMON,
        {
            "num_hash_buckets": 16,
            "num_hash_functions": 4,
            "downsampling_rate": 2,
            "local_transformer_stride": 4,
        },
        "canine.encoder.layer.*",
    ),
    "MegatronBert": (COMMON, {}, "bert.encoder.layer.*"),
    "XLM": (COMMON, {"emb_dim": 32, "n_layers": 4, "n_heads": 4}, None),
    "Esm": (COMMON, {"mask_token_id": 3, "position_embedding_type": "rotary"}, "esm.encoder.layer.*"),
    "LayoutLM": (COMMON, {}, "layoutlm.encoder.layer.*"),
    "Yoso": (COMMON, {"use_expectation": True, "hash_code_len": 4}, "yoso.encoder.layer.*"),
}

TRANSLATORS: dict[str, tuple[str, Config, Config, str | None]] = {
    "T5": ("T5ForConditionalGeneration", T5, {}, "*coder.block.*"),
    "MT5": ("MT5ForConditionalGeneration", T5, {"feed_forward_proj": "gated-gelu"}, "*coder.block.*"),
    "UMT5": ("UMT5ForConditionalGeneration", T5, {}, "*coder.block.*"),
    "LongT5": ("LongT5ForConditionalGeneration", T5, {"local_radius": 3}, "*coder.block.*"),
    "SwitchTransformers": (
        "SwitchTransformersForConditionalGeneration",
        T5,
        {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "*coder.block.*",
    ),
    "Bart": ("BartForConditionalGeneration", SEQUENCE, {}, "model.*coder.layers.*"),
    "MBart": ("MBartForConditionalGeneration", SEQUENCE, {}, "model.*coder.layers.*"),
    "Pegasus": ("PegasusForConditionalGeneration", SEQUENCE, {}, "model.*coder.layers.*"),
    "Marian": ("MarianMTModel", SEQUENCE, {}, "model.*coder.layers.*"),
    "Blenderbot": ("BlenderbotForConditionalGeneration", SEQUENCE, {}, "model.*coder.layers.*"),
    "M2M100": ("M2M100ForConditionalGeneration", SEQUENCE, {}, "model.*coder.layers.*"),
    "LED": (
        "LEDForConditionalGeneration",
        SEQUENCE,
        {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        None,
    ),
    "ProphetNet": (
        "ProphetNetForConditionalGeneration",
        WORDS,
        {
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "ngram": 2,
        },
        None,
    ),
}

IMAGES: dict[str, tuple[Config, Config, str | None]] = {
    "ViT": (VIT, {}, "vit.layers.*|vit.encoder.layer.*"),
    "DeiT": (VIT, {}, "deit.layers.*|deit.encoder.layer.*"),
    "Beit": (VIT, {}, "beit.layers.*|beit.encoder.layer.*"),
    "Data2VecVision": (VIT, {}, "data2vec_vision.encoder.layer.*"),
    "Dinov2": (VIT, {}, "dinov2.layers.*|dinov2.encoder.layer.*"),
    "ViTMSN": (VIT, {}, "vit.layers.*|vit.encoder.layer.*"),
    "IJepa": (VIT, {}, "ijepa.layers.*|ijepa.encoder.layer.*"),
    "Siglip": ({"num_labels": 10}, {"vision_config": VIT}, "vision_model.encoder.layers.*"),
    "CLIP": ({"num_labels": 10}, {"vision_config": VIT}, "vision_model.encoder.layers.*"),
    "Swin": (
        {"num_labels": 10, "image_size": IMAGE, "patch_size": 2, "window_size": 4},
        {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 2]},
        "swin.encoder.layers.*",
    ),
    "Swinv2": (
        {"num_labels": 10, "image_size": IMAGE, "patch_size": 2, "window_size": 4},
        {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 2]},
        "swinv2.encoder.layers.*",
    ),
    "ConvNext": (
        {"num_labels": 10},
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        "convnext.encoder.stages.*",
    ),
    "ConvNextV2": (
        {"num_labels": 10},
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        "convnextv2.encoder.stages.*",
    ),
    "ResNet": (
        {"num_labels": 10},
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1]},
        "resnet.encoder.stages.*",
    ),
    "RegNet": (
        {"num_labels": 10},
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
        "regnet.encoder.stages.*",
    ),
    "Bit": (
        {"num_labels": 10},
        {"embedding_size": 32, "hidden_sizes": [128, 128, 128, 128], "depths": [1, 1, 1, 1]},
        "bit.encoder.stages.*",
    ),
    "PoolFormer": (
        {"num_labels": 10},
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        None,
    ),
    "PvtV2": (
        {"num_labels": 10},
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
        "pvt_v2.encoder.layers.*",
    ),
    "MobileNetV2": ({"num_labels": 10}, {"depth_multiplier": 0.35}, None),
    "MobileViT": (
        {"num_labels": 10, "image_size": 64},
        {"hidden_sizes": [16, 24, 32]},
        "mobilevit.encoder.layer.*",
    ),
    "MobileViTV2": (
        {"num_labels": 10, "image_size": 64},
        {"width_multiplier": 0.25},
        "mobilevitv2.encoder.layer.*",
    ),
    "Levit": (
        {"num_labels": 10, "image_size": 64},
        {
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        "levit.encoder.stages.*",
    ),
    "Cvt": (
        {"num_labels": 10},
        {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        "cvt.encoder.stages.*",
    ),
    "Hiera": (
        {"num_labels": 10, "image_size": [64, 64]},
        {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
        "hiera.encoder.stages.*",
    ),
    "Segformer": (
        {"num_labels": 10},
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        None,
    ),
    "SwiftFormer": (
        {"num_labels": 10},
        {"depths": [1, 1, 2, 1], "embed_dims": [8, 16, 24, 32]},
        "swiftformer.encoder.network.*",
    ),
    "EfficientNet": (
        {"num_labels": 10},
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        None,
    ),
    "FocalNet": (
        {"num_labels": 10, "image_size": IMAGE},
        {
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "focal_levels": [1, 1, 1, 1],
            "focal_windows": [3, 3, 3, 3],
        },
        "focalnet.encoder.stages.*",
    ),
    "ImageGPT": (
        {"vocab_size": VOCABULARY, "num_labels": 10},
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
        "transformer.h.*",
    ),
    "Timesformer": (VIT, {"num_frames": 2}, "timesformer.encoder.layer.*"),
    "Vivit": (VIT, {"num_frames": 4, "tubelet_size": [2, 8, 8]}, "vivit.layers.*|vivit.encoder.layer.*"),
    "VideoMAE": (VIT, {"num_frames": 4}, "videomae.encoder.layer.*"),
}

SOUNDS: dict[str, tuple[Config, Config, str | None]] = {
    "Wav2Vec2": (AUDIO, {}, "wav2vec2.encoder.layers.*"),
    "Hubert": (AUDIO, {}, "hubert.encoder.layers.*"),
    "WavLM": (AUDIO, {}, "wavlm.encoder.layers.*"),
    "UniSpeech": (AUDIO, {"num_ctc_classes": 16}, "unispeech.encoder.layers.*"),
    "SEW": (AUDIO, {"squeeze_factor": 2}, "sew.encoder.layers.*"),
    "Data2VecAudio": (AUDIO, {}, "data2vec_audio.encoder.layers.*"),
    "AST": (
        {**VIT, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        {},
        "audio_spectrogram_transformer.layers.*|audio_spectrogram_transformer.encoder.layer.*",
    ),
    "Whisper": (
        {**SEQUENCE, "num_labels": 10},
        {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16},
        "encoder.layers.*",
    ),
}

HEARERS = {"AST": "ForAudioClassification", "Whisper": "ForAudioClassification"}
"""What the rest of the name of a model for sounds is, where it is not ForSequenceClassification."""
