"""Captions for a dataset that is to be built: prompt files, and files beside videos."""

import json

import pytest

from rcm_megatron.data.manifest import DatasetError
from rcm_megatron.datasets.captions import CaptionError, read_caption, read_prompts


def test_prompts_of_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("  a cat \n\nun café\na cat\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == ["a cat", "un café", "a cat"]
    lines = [json.dumps({"prompt": "two\nlines", "id": 7}), "", json.dumps({"prompt": "b"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "a.jsonl") == ["two\nlines", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a", r"need a .txt or .jsonl file"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b'{"prompt": "a"}\n{broken', "line 2: no JSON"),
        ("a.jsonl", b'{"caption": "a"}', 'line 1: got .*, need {"prompt"'),
        ("a.jsonl", b'{"prompt": " "}', "line 1"),
        ("a.jsonl", b"[1]", "line 1"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_prompts(tmp_path / name)


def test_captions_beside_videos(tmp_path):
    (tmp_path / "a.txt").write_text(" a cat\n and a dog \n")
    (tmp_path / "b.json").write_text(json.dumps({"caption": "a boat", "fps": 3}))
    assert read_caption(tmp_path / "a.mp4") == "a cat and a dog"
    assert read_caption(tmp_path / "b.webm") == "a boat"
    (tmp_path / "b.txt").write_text("the text file comes first")
    assert read_caption(tmp_path / "b.webm") == "the text file comes first"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", b"a", "no caption; need a.txt, or a.json"),
        ("a.txt", b"\n", "the caption is empty"),
        ("a.txt", b"\xff", "cannot be read"),
        ("a.json", b"{", "cannot be read"),
        ("a.json", b'{"text": "a"}', "the caption is empty"),
        ("a.json", b"[]", "the caption is empty"),
    ],
)
def test_bad_captions_say_what_is_needed(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptionError, match=message):
        read_caption(tmp_path / "a.mp4")
