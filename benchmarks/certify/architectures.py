"""Tiny models of ``transformers`` of many architectures, each with a batch that it can be trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

LAYERS = 6
WIDTH = 32
HEADS = 4
VOCABULARY = 99
SEQUENCES = 2
LENGTH = 12

Batch = dict[str, Tensor]
Made = tuple[nn.Module, Batch]

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": WIDTH,
    "first_k_dense_replace": 1,
}
LAYERED = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
    **TOKENS,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": 2 * WIDTH,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
    **TOKENS,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, **TOKENS}
IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}

CAUSAL: dict[str, dict[str, Any]] = {
    "apertus": SIZES | GROUPED,
    "arcee": SIZES | GROUPED,
    "bamba": SIZES | GROUPED | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "attn_layer_indices": [2]},
    "biogpt": SIZES | TOKENS,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "codegen": GPT2 | {"rotary_dim": 4, "n_ctx": 64},
    "cohere": SIZES | GROUPED,
    "cohere2": SIZES | GROUPED,
    "deepseek_v2": SIZES | LATENT | {"topk_method": "greedy"},
    "deepseek_v3": SIZES | LATENT,
    "ernie4_5": SIZES | GROUPED,
    "exaone4": SIZES | GROUPED | {"sliding_window": 8},
    "falcon": SIZES,
    "falcon_mamba": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4},
    "gemma": SIZES | GROUPED | {"head_dim": 8},
    "gemma2": SIZES | GROUPED | {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": SIZES | GROUPED | {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 3},
    "glm": SIZES | GROUPED | TOKENS | {"head_dim": 8},
    "glm4": SIZES | GROUPED | TOKENS | {"head_dim": 8},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], LAYERS // 2]],
        "max_position_embeddings": 64,
    },
    "gpt_neox": SIZES,
    "gpt_oss": SIZES | GROUPED | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 8},
    "gptj": GPT2 | {"rotary_dim": 4},
    "granite": SIZES | GROUPED,
    "granitemoe": SIZES | GROUPED | {"num_local_experts": 4},
    "helium": SIZES | GROUPED | {"head_dim": 8},
    "jamba": SIZES
    | GROUPED
    | {
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "num_experts": 4,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": SIZES | GROUPED | {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "llama": SIZES | GROUPED,
    "llama4_text": SIZES | GROUPED | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": WIDTH},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4},
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "state_size": 4,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
    },
    "mistral": SIZES | GROUPED | {"sliding_window": 8},
    "mixtral": SIZES | GROUPED | {"num_local_experts": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64},
    "nemotron": SIZES | GROUPED,
    "olmo": SIZES | GROUPED,
    "olmo2": SIZES | GROUPED,
    "olmo3": SIZES | GROUPED | {"sliding_window": 8},
    "olmoe": SIZES | GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": SIZES | {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH},
    "persimmon": SIZES,
    "phi": SIZES,
    "phi3": SIZES | GROUPED | TOKENS,
    "qwen2": SIZES | GROUPED | {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 8},
    "qwen2_moe": SIZES | GROUPED | EXPERTS | {"shared_expert_intermediate_size": WIDTH, "mlp_only_layers": [0, 3]},
    "qwen3": SIZES | GROUPED | {"head_dim": 8},
    "qwen3_moe": SIZES | GROUPED | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 2},
    "qwen3_next": SIZES
    | GROUPED
    | EXPERTS
    | {
        "head_dim": 8,
        "shared_expert_intermediate_size": WIDTH,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": SIZES
    | {"num_key_value_heads": 1, "head_dim": 8, "lru_width": WIDTH, "attention_window_size": 8},
    "seed_oss": SIZES | GROUPED | {"head_dim": 8},
    "smollm3": SIZES | GROUPED | TOKENS | {"no_rope_layer_interval": 3},
    "stablelm": SIZES | GROUPED,
    "starcoder2": SIZES | GROUPED,
    "xglm": {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "num_layers": LAYERS,
        "attention_heads": HEADS,
        "ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 64,
        **TOKENS,
    },
}
MASKED: dict[str, dict[str, Any]] = {
    "albert": SIZES | {"embedding_size": 16},
    "bert": SIZES,
    "big_bird": SIZES | {"attention_type": "original_full"},
    "camembert": SIZES | {"pad_token_id": 0},
    "convbert": SIZES | {"embedding_size": WIDTH},
    "deberta": SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dim": 2 * WIDTH,
        "max_position_embeddings": 64,
    },
    "electra": SIZES | {"embedding_size": 16},
    "ernie": SIZES,
    "esm": SIZES | {"pad_token_id": 0, "mask_token_id": 3},
    "fnet": SIZES,
    "funnel": {
        "vocab_size": VOCABULARY,
        "block_sizes": [LAYERS, LAYERS],
        "d_model": WIDTH,
        "n_head": HEADS,
        "d_head": WIDTH // HEADS,
        "d_inner": 2 * WIDTH,
    },
    "layoutlm": SIZES,
    "longformer": SIZES | {"attention_window": [4] * LAYERS, "pad_token_id": 0},
    "megatron-bert": SIZES,
    "mobilebert": SIZES | {"embedding_size": WIDTH, "intra_bottleneck_size": WIDTH, "true_hidden_size": WIDTH},
    "modernbert": SIZES | TOKENS | {"cls_token_id": 3, "sep_token_id": 4, "local_attention": 8},
    "mpnet": SIZES | TOKENS,
    "nystromformer": SIZES | {"segment_means_seq_len": 4, "num_landmarks": 4},
    "rembert": SIZES | {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": SIZES | {"pad_token_id": 0},
    "roformer": SIZES,
    "squeezebert": SIZES | {"embedding_size": WIDTH},
    "xlm-roberta": SIZES | {"pad_token_id": 0},
    "xmod": SIZES | {"pad_token_id": 0, "languages": ["en_XX"], "default_language": "en_XX"},
}
TRANSLATED: dict[str, dict[str, Any]] = {
    "bart": LAYERED,
    "bigbird_pegasus": LAYERED | {"attention_type": "original_full"},
    "blenderbot": LAYERED,
    "fsmt": LAYERED | {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    "led": LAYERED
    | {"attention_window": [4] * LAYERED["encoder_layers"], "max_encoder_position_embeddings": 64}
    | {"max_decoder_position_embeddings": 64},
    "longt5": T5 | {"local_radius": 3, "global_block_size": 4, "encoder_attention_type": "local"},
    "m2m_100": LAYERED,
    "marian": LAYERED,
    "mbart": LAYERED,
    "mt5": T5,
    "pegasus": LAYERED,
    "prophetnet": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_encoder_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_encoder_attention_heads": HEADS,
        "num_decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 64,
        **TOKENS,
    },
    "switch_transformers": T5 | {"num_experts": 4, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3},
    "t5": T5,
    "umt5": T5,
}
PICTURES: dict[str, dict[str, Any]] = {
    "beit": IMAGE,
    "convnext": {"hidden_sizes": [16, WIDTH], "depths": [LAYERS, LAYERS], "num_stages": 2, "num_labels": 3},
    "deit": IMAGE | {"architectures": ["DeiTForImageClassification"]},
    "dinov2": IMAGE,
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, WIDTH], "depths": [LAYERS, LAYERS], "num_labels": 3},
    "swin": {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [LAYERS, LAYERS], "num_heads": [2, 4]}
    | {"window_size": 2, "num_labels": 3},
    "vit": IMAGE,
}

EXPERTS_IN_FLOAT32 = {
    *("deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "llama4_text", "mixtral", "olmoe"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next"),
}
NOT_IN_FLOAT64 = EXPERTS_IN_FLOAT32 | {"fsmt", "prophetnet", "xglm"}  # these mask by constants of float32


def architectures() -> dict[str, Callable[[], Made]]:
    """By model type, what makes a model of 6 layers and a batch whose ``model(**batch).loss`` is a scalar."""
    return {
        **{kind: partial(_made, "AutoModelForCausalLM", kind, sizes, _tokens) for kind, sizes in CAUSAL.items()},
        **{kind: partial(_made, "AutoModelForMaskedLM", kind, sizes, _tokens) for kind, sizes in MASKED.items()},
        **{kind: partial(_made, "AutoModelForSeq2SeqLM", kind, sizes, _tokens) for kind, sizes in TRANSLATED.items()},
        **{
            kind: partial(_made, "AutoModelForImageClassification", kind, sizes, _pictures)
            for kind, sizes in PICTURES.items()
        },
        "xlnet": partial(
            _made,
            "AutoModelForSequenceClassification",
            "xlnet",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 2 * WIDTH},
            _classes,
        ),
    }


def configuration(kind: str, sizes: dict[str, Any]) -> Any:
    """The configuration of an architecture, without dropout.

    Args:
        kind: Model type, as ``transformers`` names it.
        sizes: Numbers of layers and heads, widths and other keywords.
    """
    config: Any = transformers.AutoConfig.for_model(kind, **sizes)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config


def _made(head: str, kind: str, sizes: dict[str, Any], batch: Callable[[], Batch]) -> Made:
    return getattr(transformers, head).from_config(configuration(kind, sizes)), batch()


def _tokens() -> Batch:
    ids = torch.randint(5, VOCABULARY, (SEQUENCES, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}  # each [sequences, length]


def _classes() -> Batch:
    return {**_tokens(), "labels": torch.arange(SEQUENCES) % 2}  # labels: [sequences]


def _pictures() -> Batch:
    pixels = torch.randn(SEQUENCES, 3, 16, 16)  # [images, channels, height, width]
    return {"pixel_values": pixels, "labels": torch.arange(SEQUENCES) % 2}  # labels: [images]
