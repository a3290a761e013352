"""Shape and constants of a LLaMA-family model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.config_values import check_number, check_size, is_integer
from models.families import FAMILIES
from models.messages import quoted

_ROPE_KINDS = ("linear", "llama3", "factors")
MAX_HIDDEN_SIZE = 1 << 17
MAX_VOCAB_SIZE = 1 << 22  # the largest published vocabularies have 262,144 tokens
# Some times the largest published model of the family: a larger value is a damaged file, and
# would otherwise become an allocation. The context holds a prompt and one token of an answer.
_SIZES = {
    "num_layers": (1, 1024),
    "hidden_size": (1, MAX_HIDDEN_SIZE),
    "ffn_size": (1, 1 << 20),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "vocab_size": (1, MAX_VOCAB_SIZE),
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

    architecture: str  # a name in `FAMILIES`
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
        if self.architecture not in FAMILIES:
            raise ValueError(
                f"architecture is {quoted(self.architecture)}; expected one of "
                f"{', '.join(FAMILIES)}; choose a model of the LLaMA family"
            )
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
