"""python -m engine.calibrate: what it reads, and refuses at once. The authors' files as well."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from tiny import tiny_llm

from engine.calibrate.__main__ import main
from engine.calibrate.prompts import read_prompts
from router.fingerprint import fingerprint
from router.library import RouterLibrary

GOOD = '{"prompt": "x"}\n'


@pytest.fixture
def out(tmp_path):
    return tmp_path / "library.safetensors"


def write_prompts(directory, **domains):
    """A folder with these texts as its DOMAIN.jsonl."""
    directory.mkdir(exist_ok=True)
    for domain, text in domains.items():
        (directory / f"{domain}.jsonl").write_text(text, encoding="utf-8")
    return directory


def refused(capsys, directory, out, *options):
    """The error of a command, which comes before the model is looked for: there is none."""
    arguments = ["--model", "no/such/model", "--prompts", directory, "--out", out, *options]
    assert main([*map(str, arguments)]) == 2 and not out.exists()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1 and len(captured.err) < 500, captured.err
    return captured.err


def test_a_wrong_weights_flag_is_refused(tmp_path, out, capsys):
    directory = write_prompts(tmp_path, a=GOOD)
    error = refused(capsys, directory, out, "--anchors", "1", "--weights", "half")
    assert "weights: got 'half', expected 'auto', 'stored', 'float'" in error


def test_prompts_are_read_by_domain(tmp_path):
    """Whatever else may end a line of text is a part of a prompt; empty lines are none."""
    text = '{"prompt": "a\\nb\u2028c\u0085"}\r\n\n {"prompt": " d ", "id": 5} \n\t\n{"prompt": "e"}'
    directory = write_prompts(tmp_path, b=f"\ufeff{GOOD}", a=text)
    (tmp_path / "other.json").write_text("{")
    assert read_prompts(directory, None) == {"a": ["a\nb\u2028c\u0085", " d ", "e"], "b": ["x"]}
    assert list(read_prompts(directory, None)) == ["a", "b"]
    assert list(read_prompts(directory, ["b"])) == ["b"]
    assert list(read_prompts(directory, ["b", "a"])) == ["b", "a"]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", '"prompt"', "null", '{"text": "x"}', '{"prompt": ""}', '{"prompt": " \\n"}',
     '{"prompt": 5}', '{"prompt": ["x"]}', '{"prompt": "\\ud800"}', "[" * 99999, "\x00"],
    ids=lambda line: line[:20],
)  # fmt: skip
def test_a_bad_prompt_is_named_by_its_file_and_line(tmp_path, out, line, capsys):
    directory = write_prompts(tmp_path, chat=GOOD, math=f"{GOOD}\n{GOOD}{line}\n{GOOD}")
    assert f"{directory}/math.jsonl, line 4: " in refused(capsys, directory, out)


def test_folders_without_prompts_are_refused(tmp_path, out, capsys):
    (tmp_path / "file").write_text("x")
    for name in ("none", "file"):
        assert f"{tmp_path}/{name}: is no folder" in refused(capsys, tmp_path / name, out)
    assert "has no *.jsonl" in refused(capsys, tmp_path, out)
    directory = write_prompts(tmp_path, a=GOOD, b="\n \n")
    assert "b.jsonl: has no prompts" in refused(capsys, directory, out)
    assert "c.jsonl: cannot be read" in refused(capsys, directory, out, "--domains", "a,c")
    (directory / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert "b.jsonl: cannot be read" in refused(capsys, directory, out)
    (directory / "b.jsonl").unlink()
    os.mkfifo(directory / "b.jsonl")
    assert "b.jsonl: is no regular file" in refused(capsys, directory, out)


@pytest.mark.parametrize("names", [["mix"], ["mix-int8"], ["a", "a-int8"], [" "], ["\x1b[31m"]])
def test_domains_that_a_library_cannot_hold_are_refused_at_once(tmp_path, out, names, capsys):
    """And not when all has been measured."""
    directory = write_prompts(tmp_path, **dict.fromkeys(names, GOOD))
    assert refused(capsys, directory, out).startswith(f"error: domain {names[-1]!r}: ")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--anchors", "0"], "--anchors: got 0, expected at least 1"),
        (["--anchors", "x"], "--anchors: invalid int value: 'x'"),
        (["--trace-tokens", "-3"], "--trace-tokens: got -3"),
        (["--iterations", "0"], "--iterations: got 0"),
        (["--seed", "-1"], "--seed: got -1, expected 0 to 4294967295"),
        (["--seed", str(2**32)], "--seed: got 4294967296"),
        (["--max-minutes", "nan"], "--max-minutes: got nan"),
        (["--max-minutes", "-1"], "--max-minutes: got -1.0"),
        (["--max-minutes", "inf"], "--max-minutes: got inf"),
        (["--method", "random"], "--method: invalid choice: 'random'"),
        (["--import-knn-ssd", "x"], "give --prompts DIR to calibrate, or --import-knn-ssd DIR"),
        (["--out", "."], "--out: got ., which is a folder"),
    ],
    ids=str,
)
def test_bad_options_end_with_the_usage(options, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["--prompts", "p", "--out", "o", *options])
    assert left.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit) as left:
        main(["--out", "o"])
    assert left.value.code == 2 and "give --prompts DIR" in capsys.readouterr().err


@pytest.fixture
def llm(monkeypatch):
    """The model of the command: two layers of size 64."""
    llm = tiny_llm(speculative="off")
    monkeypatch.setattr("engine.llm.LLM", lambda model, **options: llm)
    return llm


def write_authors_files(directory, hidden_size=64, layer=1):
    directory.mkdir()
    np.save(directory / "hidden_vector.npy", np.random.standard_normal((3, hidden_size)))
    np.save(directory / "label.npy", np.array(["sql-1", "sql-2", "math"]))
    sets = {f"{name}_tiny": {"attention": [layer], "mlp": [0]} for name in ("sql", "math")}
    (directory / "skip.json").write_text(json.dumps(sets))
    return directory


def convert(directory, out):
    return main(["--import-knn-ssd", str(directory), "--out", str(out)])


def test_the_authors_files_become_a_library(llm, tmp_path, out, capsys):
    state = out.with_name(f"{out.name}.calibration")
    state.write_text("of a calibration that is not finished")
    assert convert(write_authors_files(tmp_path / "files"), out) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and json.loads(captured.out)["anchors"] == 3
    library = RouterLibrary.load(out)
    assert library.domains == ("sql-1", "sql-2", "math")
    assert library.fingerprint == fingerprint(llm.model)
    llm.use_library(library)
    assert state.exists()


def test_authors_files_of_another_model_are_refused(llm, tmp_path, out, capsys):
    wide, deep = (tmp_path / name for name in ("wide", "deep"))
    write_authors_files(wide, hidden_size=32)
    write_authors_files(deep, layer=7)
    for directory, message in (
        (wide, "2 layers and hidden size 32, expected 2 and 64"),
        (deep, "skip.json: plan 'sql_tiny': attention: got layer 7"),
        (tmp_path, "got 0 files *vector*.npy, expected one"),
    ):
        assert convert(directory, out) == 2 and not out.exists()
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("error: ") and message in captured.err
    files = write_authors_files(tmp_path / "files")
    assert convert(files, tmp_path / "none" / "x") == 2
    assert "x: cannot be written: No such file" in capsys.readouterr().err
