"""Shape and constants of a LLaMA-family model, and how to read them from config.json and GGUF.

Only this file knows the key names of the two formats. A feature that the forward pass does not
compute (sliding windows, biases, other activations) is refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from models.config_values import (
    check_number,
    check_size,
    flag,
    integer,
    is_integer,
    number,
    refuse,
    text,
    token_ids,
)
from models.messages import quoted

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]

_ARCHITECTURES: tuple[Architecture, ...] = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_KINDS = ("linear", "llama3", "factors")
_DEFAULT_THETA = 10_000.0
# What transformers takes where a config.json is silent: constants of its classes, not H or C / H.
_QWEN3_HEAD_DIM = 128
_NUM_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
MAX_HIDDEN_SIZE = 1 << 17
# Some times the largest published model of the family: a larger value is a damaged file, and
# would otherwise become an allocation. The context holds a prompt and one token of an answer.
_SIZES = {
    "num_layers": (1, 1024),
    "hidden_size": (1, MAX_HIDDEN_SIZE),
    "ffn_size": (1, 1 << 20),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "vocab_size": (1, 1 << 22),
    "max_positions": (2, 1 << 27),
}
# Within these no rotary angle and no norm of a finite row is infinite or NaN in float32.
_NORM_EPS = (1e-15, 0.5)
_THETA = (1.0, 1e18)
_SCALING = (1e-6, 1e9)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides low frequencies by
    `factor`, keeps high ones, and blends between the two wavelength bounds
    `original_max_positions / low_freq_factor` and `original_max_positions / high_freq_factor`.
    `factors` divides frequency i by `factors[i]` (D/2 of them): GGUF files store llama3 this way.
    Raises ValueError for an unknown kind and for values outside these meanings.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _ROPE_KINDS:
            raise ValueError(
                f"rope scaling kind is {quoted(self.kind)}; expected one of "
                f"{', '.join(_ROPE_KINDS)}"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(f"rope scaling {name}", getattr(self, name), *_SCALING)
        largest = _SIZES["max_positions"][1]
        check_size("rope scaling original_max_positions", self.original_max_positions, 1, largest)
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope scaling low_freq_factor is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; expected low < high"
            )
        if not isinstance(self.factors, tuple) or (self.kind == "factors") != bool(self.factors):
            raise ValueError(
                f"rope scaling of kind {self.kind!r} has factors {quoted(self.factors)}; expected "
                "a tuple of D/2 divisors for kind 'factors' and () for the others"
            )
        for value in self.factors:
            check_number("a rope scaling factor", value, *_SCALING)


@dataclass(frozen=True)
class LlamaConfig:
    """One LLaMA-family model. Letters in brackets are those of the project's shape legend.

    Raises ValueError naming the field when a value cannot belong to such a model.
    """

    architecture: Architecture
    num_layers: int  # [L]
    hidden_size: int  # [C]
    ffn_size: int  # [F]
    num_heads: int  # [H]
    num_kv_heads: int  # [H_kv]
    head_dim: int  # [D]
    vocab_size: int  # [V]
    max_positions: int  # the context the model was made for, in tokens
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_architecture(self.architecture)
        for name, (smallest, largest) in _SIZES.items():
            check_size(name, getattr(self, name), smallest, largest)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; expected "
                "num_heads to be a multiple of num_kv_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary pairs need an even number")
        check_number("norm_eps", self.norm_eps, *_NORM_EPS)
        check_number("rope_theta", self.rope_theta, *_THETA)
        for name in ("has_qkv_bias", "has_qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {quoted(getattr(self, name))}; expected true or false")
        self._check_rope_factors()
        self._check_special_tokens()

    def _check_rope_factors(self) -> None:
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        if factors and len(factors) != self.head_dim // 2:
            raise ValueError(
                f"rope scaling has {len(factors)} factors; expected head_dim / 2 = "
                f"{self.head_dim // 2} of them"
            )

    def _check_special_tokens(self) -> None:
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids is {quoted(self.eos_token_ids)}; expected a tuple")
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for token_id in bos + self.eos_token_ids:
            if not is_integer(token_id) or not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"a bos or eos token id is {quoted(token_id)}; expected a whole number from 0 "
                    f"to vocab_size - 1 = {self.vocab_size - 1}"
                )

    @classmethod
    def from_hf(cls, d: Mapping[str, object]) -> LlamaConfig:
        """The configuration in a Hugging Face `config.json`; `auto_map` is never followed.

        Raises ValueError naming the key for another model type, an unsupported feature, and a
        missing or impossible value.
        """
        architecture = _hf_architecture(d)
        _refuse_hf_features(d, architecture)
        num_heads = integer(d, "num_attention_heads")
        rope_theta, rope_scaling = _hf_rope(d)
        # Null means H in every family.
        kv_default = num_heads if "num_key_value_heads" in d else _NUM_KV_HEADS.get(architecture)
        hidden_size = integer(d, "hidden_size")
        head_dim = _even_split(hidden_size, num_heads, d)
        if architecture == "qwen3":
            head_dim = None if "head_dim" in d else _QWEN3_HEAD_DIM
        return cls(
            architecture=architecture,
            num_layers=integer(d, "num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_size=integer(d, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=integer(d, "num_key_value_heads", kv_default or num_heads),
            head_dim=integer(d, "head_dim", head_dim),
            vocab_size=integer(d, "vocab_size"),
            max_positions=integer(d, "max_position_embeddings"),
            norm_eps=number(d, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            has_qkv_bias=architecture == "qwen2",
            has_qk_norm=architecture == "qwen3",
            tie_embeddings=flag(d, "tie_word_embeddings"),
            bos_token_id=None if d.get("bos_token_id") is None else integer(d, "bos_token_id"),
            eos_token_ids=token_ids(d, "eos_token_id"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> LlamaConfig:
        """The configuration in a GGUF file's metadata.

        Two facts are tensors there and must be filled in by the caller: tied embeddings (no
        `output.weight`) and llama3 rope scaling (`rope_freqs.weight`). Mistral files say llama.
        Raises ValueError naming the key, as `from_hf` does.
        """
        architecture = _gguf_architecture(metadata)
        values = {
            key.removeprefix(f"{architecture}."): value
            for key, value in metadata.items()
            if key.startswith(f"{architecture}.")
        }
        num_heads = integer(values, "attention.head_count")
        hidden_size = integer(values, "embedding_length")
        split = _even_split(hidden_size, num_heads, values, "attention.key_length")
        head_dim = integer(values, "attention.key_length", split)
        _refuse_gguf_features(values, head_dim)
        tokens = metadata.get("tokenizer.ggml.tokens")
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        stops = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
        return cls(
            architecture=architecture,
            num_layers=integer(values, "block_count"),
            hidden_size=hidden_size,
            ffn_size=integer(values, "feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=integer(values, "attention.head_count_kv", num_heads),
            head_dim=head_dim,
            vocab_size=integer(
                values, "vocab_size", len(tokens) if isinstance(tokens, list) else None
            ),
            max_positions=integer(values, "context_length"),
            norm_eps=number(values, "attention.layer_norm_rms_epsilon"),
            rope_theta=number(values, "rope.freq_base", _DEFAULT_THETA),
            rope_scaling=_gguf_rope_scaling(values),
            has_qkv_bias=architecture == "qwen2",
            has_qk_norm=architecture == "qwen3",
            bos_token_id=None if bos is None else integer(metadata, "tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(
                dict.fromkeys(i for key in stops for i in token_ids(metadata, key))
            ),
        )


def _check_architecture(value: object) -> None:
    if value not in _ARCHITECTURES:
        raise ValueError(
            f"architecture is {quoted(value)}; expected one of {', '.join(_ARCHITECTURES)}; choose "
            "a model of the LLaMA family"
        )


def _even_split(
    hidden_size: int, num_heads: int, d: Mapping[str, object], key: str = "head_dim"
) -> int | None:
    """C / H, the default head size; None where the file gives its own or C / H is not whole."""
    heads = max(num_heads, 1)  # no heads is an error with its own message
    return None if d.get(key) is not None or hidden_size % heads else hidden_size // heads


def _hf_architecture(d: Mapping[str, object]) -> Architecture:
    model_type = d.get("model_type")
    for name in _ARCHITECTURES:
        if model_type == name:
            classes = d.get("architectures")
            expected = f"{name}forcausallm"
            names = classes if isinstance(classes, list) else [classes]
            if classes is None or any(isinstance(c, str) and c.lower() == expected for c in names):
                return name
            raise refuse("architectures", classes, f"{name.capitalize()}ForCausalLM")
    raise refuse("model_type", model_type, f"one of {', '.join(_ARCHITECTURES)}")


def _refuse_hf_features(d: Mapping[str, object], architecture: str) -> None:
    only: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu", "swish"),
        "mlp_bias": (False,),
        # Qwen2 has its Q, K and V biases whatever this key says.
        "attention_bias": (False, True) if architecture == "qwen2" else (False,),
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
    # An absent key means 4096 to transformers' Mistral, and null means no window.
    if architecture == "mistral" and d.get("sliding_window", 4096) is not None:
        window = integer(d, "sliding_window", 4096)
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


def _gguf_architecture(metadata: Mapping[str, object]) -> Architecture:
    name = text(metadata, "general.architecture", "")
    for known in _ARCHITECTURES:
        if name == known != "mistral":
            return known
    raise refuse("general.architecture", name or None, "llama, qwen2 or qwen3")


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
