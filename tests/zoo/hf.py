"""HuggingFace models built from configs: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.case import BATCH, Case, case, classes, normal, token_loss, tokens

VOCABULARY = 19
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None

TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, use_cache=False, **TOKENS)
    )


def gpt2_with_cache() -> nn.Module:
    model = gpt2()
    model.config.use_cache = True  # type: ignore[union-attr]
    return model


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=1, max_position_embeddings=16, use_cache=False, **SIZES, **TOKENS)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=4, **SIZES)
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=4, **SIZES))


def masked() -> dict[str, Any]:
    mask = torch.ones(BATCH, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": tokens(6, VOCABULARY)(), "attention_mask": mask}


def token_logits(output: Any, target: Tensor) -> Tensor:
    return token_loss(output.logits, target)


def class_logits(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target)


_LM = classes(VOCABULARY, 6)

CASES: list[Case] = [] if not HAS_TRANSFORMERS else [
    case("hf_gpt2", gpt2, tokens(6, VOCABULARY), _LM,
         [["transformer.h.0"], ["transformer.wte", "transformer.h.0", "transformer.h.1"]],
         token_logits, "hf tied dropout tokens", ("concrete", "concrete")),
    case("hf_llama", llama, masked, _LM, [["model.layers.0"], ["model.layers.0", "model.layers.1"]],
         token_logits, "hf tokens multi-input", ("concrete", "concrete")),
    case("hf_bert", bert, masked, classes(4),
         [["bert.encoder.layer.0"], ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]],
         class_logits, "hf dropout tokens multi-input", ("concrete",)),
    case("hf_vit", vit, normal(3, 8, 8), classes(4), [["vit.layers.0"], ["vit.embeddings", "vit.layers.0"]],
         class_logits, "hf image"),
]  # fmt: skip
