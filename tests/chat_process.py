"""The chat command as a process of its own, with the stand-in for the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAKE = [sys.executable, str(Path(__file__).parent / "fake_llm.py")]


def chat_env(tmp_path: Path) -> dict[str, str]:
    """The environment of a chat: its own state folder, no colour settings of the machine."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    chosen = {
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "FAKE_LOG": str(tmp_path / "asked.jsonl"),
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    return {**kept, **chosen}


def run(
    command: list[str], env: dict[str, str], text: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, input=text, env=env, cwd=ROOT, capture_output=True, timeout=60)


def asked(env: dict[str, str]) -> list[list[str]]:
    """The contents of the messages of each request so far."""
    lines = Path(env["FAKE_LOG"]).read_text(encoding="utf-8").splitlines()
    return [[message["content"] for message in json.loads(line)] for line in lines]
