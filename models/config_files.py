"""The configuration of a model in config.json, or in the metadata of a GGUF file.

Only this file knows the keys of the two. A feature that the forward pass does not compute (sliding
windows, biases, other activations) is refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import MAX_VOCAB_SIZE, LlamaConfig, RopeScaling
from models.config_values import flag, integer, number, refuse, text, token_ids
from models.families import FAMILIES, GGUF_FAMILIES, Family
from models.messages import quoted

_DEFAULT_THETA = 10_000.0
# Fields of LlamaConfig: their keys in config.json, and in GGUF what follows the architecture.
_SIZES = {
    "num_layers": ("num_hidden_layers", "block_count"),
    "hidden_size": ("hidden_size", "embedding_length"),
    "ffn_size": ("intermediate_size", "feed_forward_length"),
    "num_heads": ("num_attention_heads", "attention.head_count"),
    "num_kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "max_positions": ("max_position_embeddings", "context_length"),
}


def config_from_hf(
    d: Mapping[str, object], generation: Mapping[str, object] | None = None
) -> LlamaConfig:
    """The configuration in a Hugging Face `config.json`; `auto_map` is never followed.

    `generation` is the model's generation_config.json, which may name further end tokens. Raises
    ValueError naming the key for another model type, an unsupported feature, and a missing or
    impossible value.
    """
    family = _hf_family(d)
    d = {**family.hf_defaults, **d}
    _refuse_hf_features(d, family)
    rope_theta, rope_scaling = _hf_rope(d)
    stops = token_ids(d, "eos_token_id") + token_ids(generation or {}, "eos_token_id")
    return _config(
        family,
        # Where a family has a head size of its own, null does not mean C / H.
        _sizes(d, 0, {"head_dim": None} if "head_dim" in family.hf_defaults else {}),
        norm_eps=number(d, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=flag(d, "tie_word_embeddings"),
        bos_token_id=None if d.get("bos_token_id") is None else integer(d, "bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(stops)),
    )


def config_from_gguf(metadata: Mapping[str, object]) -> LlamaConfig:
    """The configuration in a GGUF file's metadata.

    Two facts are tensors there and must be filled in by the caller: tied embeddings (no
    `output.weight`) and llama3 rope scaling (`rope_freqs.weight`). Raises ValueError naming the
    key, as `config_from_hf` does.
    """
    name = text(metadata, "general.architecture", "")
    if name not in GGUF_FAMILIES:
        *names, last = GGUF_FAMILIES
        raise refuse("general.architecture", name or None, f"{', '.join(names)} or {last}")
    prefix = f"{name}."
    values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    tokens = metadata.get("tokenizer.ggml.tokens")
    sizes = _sizes(values, 1, {"vocab_size": len(tokens) if isinstance(tokens, list) else None})
    _refuse_gguf_features(values, sizes["head_dim"])
    bos = "tokenizer.ggml.bos_token_id"
    stops = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return _config(
        GGUF_FAMILIES[name],
        sizes,
        norm_eps=number(values, "attention.layer_norm_rms_epsilon"),
        rope_theta=number(values, "rope.freq_base", _DEFAULT_THETA),
        rope_scaling=_gguf_rope_scaling(values),
        bos_token_id=None if metadata.get(bos) is None else integer(metadata, bos),
        eos_token_ids=tuple(dict.fromkeys(i for key in stops for i in token_ids(metadata, key))),
    )


def known_vocab_size(d: Mapping[str, object]) -> int:
    """The size of the vocabulary in config.json or GGUF metadata, 0 where it is not said."""
    architecture = d.get("general.architecture")
    size = d.get("vocab_size" if architecture is None else f"{architecture}.vocab_size")
    return size if type(size) is int and 0 <= size <= MAX_VOCAB_SIZE else 0


def _config(family: Family, sizes: Mapping[str, Any], **values: Any) -> LlamaConfig:
    return LlamaConfig(
        architecture=family.name,
        has_qkv_bias=family.has_qkv_bias,
        has_qk_norm=family.has_qk_norm,
        **sizes,
        **values,
    )


def _sizes(
    d: Mapping[str, object], column: int, defaults: Mapping[str, int | None]
) -> dict[str, int]:
    """Every size by its field; H_kv is H and D is C / H where the file is silent."""
    keys = {field: names[column] for field, names in _SIZES.items()}
    hidden_size, num_heads = integer(d, keys["hidden_size"]), integer(d, keys["num_heads"])
    heads = max(num_heads, 1)  # no heads is an error with its own message
    split = None if hidden_size % heads else hidden_size // heads
    defaults = {"num_kv_heads": num_heads, "head_dim": split, **defaults}
    return {field: integer(d, key, defaults.get(field)) for field, key in keys.items()}


def _hf_family(d: Mapping[str, object]) -> Family:
    model_type = d.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise refuse("model_type", model_type, f"one of {', '.join(FAMILIES)}")
    classes = d.get("architectures")
    names = classes if isinstance(classes, list) else [classes]
    expected = family.hf_class.lower()
    if classes is None or any(isinstance(c, str) and c.lower() == expected for c in names):
        return family
    raise refuse("architectures", classes, family.hf_class)


def _refuse_hf_features(d: Mapping[str, object], family: Family) -> None:
    only: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu", "swish"),
        "mlp_bias": (False,),
        # Qwen2 has its Q, K and V biases whatever this key says.
        "attention_bias": (False, True) if family.has_qkv_bias else (False,),
        "partial_rotary_factor": (1.0,),
        "use_sliding_window": (False,),
    }
    for key, allowed in only.items():
        if d.get(key) is not None and d[key] not in allowed:
            raise refuse(key, d[key], f"{allowed[0]!r}")
    if d.get("quantization_config") is not None:
        raise refuse("quantization_config", d["quantization_config"], "unquantised safetensors")
    layer_types = d.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise refuse("layer_types", layer_types, "full_attention in every layer")
    # Other families have the key too, and no window unless use_sliding_window says so.
    if "sliding_window" in family.hf_defaults and d["sliding_window"] is not None:
        window = integer(d, "sliding_window")
        if window < integer(d, "max_position_embeddings"):
            raise refuse("sliding_window", window, "null, or at least max_position_embeddings")


def _hf_rope(d: Mapping[str, object]) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 writes `rope_parameters`, 4 wrote `rope_scaling`.

    What is said in several places must mean the same in each.
    """
    thetas = {"rope_theta": d["rope_theta"]} if d.get("rope_theta") is not None else {}
    scalings = {}
    for key in ("rope_parameters", "rope_scaling"):
        rules = d.get(key)
        if rules is None or rules == {}:
            continue
        if not isinstance(rules, Mapping) or any(isinstance(v, Mapping) for v in rules.values()):
            raise refuse(key, rules, "one set of values for all layers")
        if rules.get("partial_rotary_factor") not in (None, 1.0):
            raise refuse("partial_rotary_factor", rules["partial_rotary_factor"], "1.0")
        scalings[key] = _hf_rope_scaling(rules, integer(d, "max_position_embeddings"))
        if rules.get("rope_theta") is not None:
            thetas[f"rope_theta of {key}"] = rules["rope_theta"]
    first, *others = thetas or [""]
    for key in others:
        if number(thetas, key) != number(thetas, first):
            raise refuse(key, thetas[key], f"{quoted(thetas[first])} as {first}, or none")
    if len(scalings) == 2 and scalings["rope_parameters"] != scalings["rope_scaling"]:
        raise refuse("rope_scaling", d["rope_scaling"], "what rope_parameters means, or none")
    return number(thetas, first, _DEFAULT_THETA), next(iter(scalings.values()), None)


def _hf_rope_scaling(rules: Mapping[str, object], max_positions: int) -> RopeScaling | None:
    kind = text(rules, "rope_type", text(rules, "type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", number(rules, "factor"))
    if kind != "llama3":
        raise refuse("rope scaling rope_type", kind, "default, linear or llama3")
    return RopeScaling(
        "llama3",
        number(rules, "factor"),
        number(rules, "low_freq_factor"),
        number(rules, "high_freq_factor"),
        integer(rules, "original_max_position_embeddings", max_positions),
    )


def _refuse_gguf_features(values: Mapping[str, object], head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(values, key, head_dim) != head_dim:
            raise refuse(key, values[key], f"the head dimension, {head_dim}")
    if integer(values, "expert_count", 0):
        raise refuse("expert_count", values["expert_count"], "0, a dense model")
    window = integer(values, "attention.sliding_window", 0)
    if 0 < window < integer(values, "context_length"):
        raise refuse("attention.sliding_window", window, "none, or at least context_length")


def _gguf_rope_scaling(values: Mapping[str, object]) -> RopeScaling | None:
    kind = text(values, "rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise refuse("rope.scaling.type", kind, "none or linear")
    factor = number(values, "rope.scale_linear", 1.0)
    if kind == "linear":
        factor = number(values, "rope.scaling.factor")
    return None if factor == 1.0 else RopeScaling("linear", factor)
