"""Captions for a dataset that is to be built: prompt files, and files beside videos."""

import json

import pytest

from rcm_megatron.data.captions import CaptionError, read_caption, read_prompts
from rcm_megatron.errors import InputError


def test_prompts_of_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("  a cat \n\nun café\na cat\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == ["a cat", "un café", "a cat"]
    lines = [json.dumps({"prompt": "two\nlines", "id": 7}), "", json.dumps({"prompt": "b"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "a.jsonl") == ["two\nlines", "b"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_line_is_a_prompt_whatever_characters_it_holds(tmp_path, end, mark):
    """Everything but these two ends that str.splitlines takes for one, and a lone carriage return, is a character of a prompt."""
    prompts = [f"{char}: before{char}after, last".strip() for char in "\v\f\x1c\x1d\x1e\x85\u2028\u2029\r"] + [
        "un café",
        "静态",
    ]
    (tmp_path / "a.txt").write_bytes(mark + end.join([*prompts, ""]).encode())
    assert read_prompts(tmp_path / "a.txt") == prompts
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "a.JSONL").write_bytes(mark + end.join(lines).encode())
    assert read_prompts(tmp_path / "a.JSONL") == prompts


def test_captions_with_a_mark_or_separators(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n")
    (tmp_path / "b.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"caption": "a\u2028b"}, ensure_ascii=False).encode()
    )
    assert [read_caption(tmp_path / name) for name in ("a.mov", "b.mov")] == ["a cat", "a b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a", r"need a .txt or .jsonl file"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"ok\n\xff", "a.txt, line 2: got the byte 0xff, need UTF-8"),
        ("a.txt", "a dog\n".encode("utf-16"), "got UTF-16, need UTF-8"),
        ("a.txt", "a dog\n".encode("utf-32"), "got UTF-32, need UTF-8"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16-be"), "as UTF-16 and binary files have them"),
        ("missing.txt", None, "missing.txt cannot be read: No such file"),
        ("a.jsonl", b'{"prompt": "half \\ud83d"}', 'line 1: got .*, need {"prompt"'),
        ("a.jsonl", b'{"prompt": "a"}\n{broken', "line 2: no JSON"),
        ("a.jsonl", b'{"caption": "a"}', 'line 1: got .*, need {"prompt"'),
        ("a.jsonl", b'{"prompt": " "}', "line 1"),
        ("a.jsonl", b"[1]", "line 1"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
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
        ("a.txt", "un café".encode("utf-16-le"), "as UTF-16"),
        ("a.json", b'{"caption": "\\udc00"}', "empty or no text"),
        ("a.json", b"{", "cannot be read"),
        ("a.json", b'{"text": "a"}', "the caption is empty"),
        ("a.json", b"[]", "the caption is empty"),
    ],
)
def test_bad_captions_say_what_is_needed(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptionError, match=message):
        read_caption(tmp_path / "a.mp4")
