"""The shapes of published models, for benchmarks that draw their weights at random.

Names are those of the models whose config.json the numbers come from. No file is read: speed
depends on the shapes alone, acceptance does not, so nothing here may stand in for a real model
where tokens are judged.
"""

from __future__ import annotations

from models.config import LlamaConfig

SHAPES: dict[str, LlamaConfig] = {
    "llama-2-7b": LlamaConfig(
        architecture="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_size=11008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_positions=4096,
        norm_eps=1e-5,
        rope_theta=10_000.0,
    ),
    "llama-2-13b": LlamaConfig(
        architecture="llama",
        num_layers=40,
        hidden_size=5120,
        ffn_size=13824,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        vocab_size=32000,
        max_positions=4096,
        norm_eps=1e-5,
        rope_theta=10_000.0,
    ),
    "llama-3-8b": LlamaConfig(
        architecture="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_positions=8192,
        norm_eps=1e-5,
        rope_theta=500_000.0,
    ),
    "qwen2.5-1.5b": LlamaConfig(
        architecture="qwen2",
        num_layers=28,
        hidden_size=1536,
        ffn_size=8960,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        vocab_size=151936,
        max_positions=32768,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        has_qkv_bias=True,
        tie_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        architecture="llama",
        num_layers=30,
        hidden_size=576,
        ffn_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_positions=8192,
        norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
}
