"""The prompts of a calibration: a file for each domain, and the names that domains may have."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from engine.chat.conversation import check_text
from models.messages import cause_of, quoted
from models.model_files import read_bounded

MIX = "mix"  # the mixture of all domains; no domain may have this name
MAX_BYTES = 256 << 20  # of a domain's file


def read_prompts(directory: Path, domains: Sequence[str] | None) -> dict[str, list[str]]:
    """Prompts by domain from DOMAIN.jsonl files, one {"prompt": ...} per line.

    Raises ValueError, naming file and line, for anything else, and for a domain without a file.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: is no folder; expected one with DOMAIN.jsonl files")
    names = domains or sorted(path.stem for path in directory.glob("*.jsonl"))
    if not names:
        raise ValueError(f"{directory}: has no *.jsonl; expected DOMAIN.jsonl for each domain")
    return {name: _read_domain(directory / f"{name}.jsonl") for name in names}


def _read_domain(path: Path) -> list[str]:
    try:
        # Not splitlines: JSON strings may hold other characters at which that splits.
        lines = read_bounded(path, MAX_BYTES).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {cause_of(error)}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{where}: got {quoted(line)}, expected an object with "prompt"'
            ) from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty or no text")
        prompts.append(check_text(where, prompt))
    if not prompts:
        raise ValueError(f"{path}: has no prompts; expected one JSON object per line")
    return prompts


def check_domains(domains: Collection[str]) -> None:
    """Raises ValueError for names that a library, with plans named after domains, cannot hold."""
    if MIX in domains:
        raise ValueError(f"domain {MIX!r}: is the name of all of them together; use another")
    names = {MIX, *domains}
    for name in sorted(names):
        if not name.strip() or not name.isprintable():
            raise ValueError(f"domain {quoted(name)}: is blank or not printable; rename its file")
        if f"{name}-int8" in names:
            raise ValueError(
                f"domain '{name}-int8': its plans would have the names of the int8 plans of "
                f"{name!r}; rename its file"
            )
