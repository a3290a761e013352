"""What a server allows: the limits that a request meets, each with a safe default."""

from __future__ import annotations

from dataclasses import dataclass

from engine.params import MAX_STOPS


@dataclass(frozen=True)
class ServeOptions:
    """Limits of one server.

    model_names: what requests may call the model, the first being its id; () is the LLM's own name.
    api_keys: of which a request must show one; () asks for none.
    hosts: names by which requests may call the server; () is any.
    max_prompt_tokens: of one prompt; None is what the context holds.
    max_tokens: of one answer: requests that ask for more, or do not say, get so many at most; None
        is the rest of the context.
    max_choices: answers of one request: its prompts times `n`, of which `n` is at most 8.
    max_stops: stop strings of a request.
    max_schema_bytes: of a JSON schema, a regular expression, or the tools of a request together.
    max_body_bytes, max_requests_per_key: of a request's body; requests of one key (or, without
        keys, of one address) that run at once.
    timeout: seconds a request may take, waiting included; None is as long as it asks for.
    stall_timeout: seconds that a reader may take nothing before its request is ended.
    log_text: whether prompts and answers may stand in logs.
    """

    model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_choices: int = 32
    max_stops: int = MAX_STOPS
    max_schema_bytes: int = 1 << 16
    max_body_bytes: int = 1 << 20
    max_requests_per_key: int = 64
    timeout: float | None = None
    stall_timeout: float = 30.0
    log_text: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_prompt_tokens", "max_tokens", "max_choices", "max_stops", "max_schema_bytes",
            "max_body_bytes", "max_requests_per_key", "timeout", "stall_timeout",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        if self.max_stops > MAX_STOPS:
            raise ValueError(f"max_stops: got {self.max_stops}, expected at most {MAX_STOPS}")
