"""What the terminal shows: statistics in words, and streams that fail or are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_llm import DRAFTED

from engine.terminal import drafts_line, print_stats
from engine.types import RequestStats


def test_drafts_line() -> None:
    line = "drafts int8+ngram: 77% of 9 accepted, 2.75 tokens/round; by position 1.0 .66 .66"
    assert drafts_line(DRAFTED) == line
    assert drafts_line(DRAFTED, 310_400_000) == f"{line}, int8 310 MB"
    long = replace(
        DRAFTED,
        plan="p\u202e" * 40,
        generated_tokens=2001,
        rounds=200,
        drafted=16_000,
        accepted=15_999,
        drafted_by_position=(1000,) * 16,
        accepted_by_position=(1000, 999, *range(13, 0, -1), 0),
    )
    shown = drafts_line(long, 12_000_000_000)
    assert "99% of 16000" in shown and "1.0 .99 .01 .01 .01.., int8 12000 MB" in shown
    assert len(shown) <= 120
    assert len(drafts_line(replace(long, plan="int8+ngram"))) <= 100


def test_statistics_take_a_second_line_only_for_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    plain = RequestStats(5, 2, 12, 0.25, 0.5, 22.0, plan="ngram", rounds=11)
    for stats, num_lines in ((DRAFTED, 2), (plain, 1), (replace(DRAFTED, drafted=0), 1), (None, 1)):
        print_stats(stats, 1_000_000)
        err = capsys.readouterr().err
        assert err.count("\n") == num_lines, err
        assert ("int8 1 MB" in err) == (num_lines == 2)
        assert all(len(line) <= 105 for line in err.splitlines())
