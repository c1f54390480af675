"""VBench: names of its videos by its published protocol, and its result files with the total by hand."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcm_megatron.cli.main import main
from rcm_megatron.errors import InputError
from rcm_megatron.evaluation.prompts import distinct_prompts, prompt_of, read_clips
from rcm_megatron.evaluation.vbench import DIMENSIONS, QUALITY, SEMANTIC, read_scores

UKIYO = "A beautiful coastal beach in spring, waves lapping on sand by Hokusai, in the style of Ukiyo"
BUND = "The bund Shanghai, oil painting"


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def published(tmp_path):
    """A list as VBench's: 946 lines, of which two come twice; its longer ones line for line, without an end of line as theirs."""
    short = [f"a cat number {i}" for i in range(942)] + [UKIYO, BUND]
    short = [*short[:500], UKIYO, *short[500:942], BUND, UKIYO, BUND]
    assert len(short) == 946 and len(set(short)) == 944
    longer = tmp_path / "longer.txt"
    longer.write_text("\n".join(f"{text}, in great detail, line {i}" for i, text in enumerate(short)))
    return write(tmp_path / "all_dimension.txt", short), longer


def test_946_lines_are_944_prompts_of_5_samples_with_25_of_some(tmp_path):
    prompts, longer = published(tmp_path)
    flickering = write(tmp_path / "temporal_flickering.txt", [f"a cat number {i}" for i in range(75)])
    clips = read_clips(prompts, long_prompts=longer, samples=5, more=flickering, more_samples=25)
    assert len(read_clips(prompts, samples=5)) == 944 * 5 and len(clips) == 944 * 5 + 75 * 20
    names = [f"{clip.stem}.mp4" for clip in clips]
    assert len(set(names)) == len(names)
    # as VBench looks for them: f'{prompt}-{index}.mp4', index 0 to 4
    assert {f"{prompt}-{i}.mp4" for prompt in set(prompts.read_text().splitlines()) for i in range(5)} <= set(names)
    assert "a cat number 74-24.mp4" in names and "a cat number 75-5.mp4" not in names
    twice = [clip for clip in clips if clip.short == UKIYO]
    assert {clip.prompt for clip in twice} == {f"{UKIYO}, in great detail, line 500"}, "the first of two"
    assert len(distinct_prompts(clips)) == 944


def test_noise_is_of_its_own_and_more_samples_change_none(tmp_path):
    prompts = write(tmp_path / "p.txt", ["one", "two"])
    few, many = ({clip.stem: clip.noise for clip in read_clips(prompts, samples=n)} for n in (5, 25))
    assert len(set(many.values())) == 50 and few.items() <= many.items()


def test_names_of_prompts_that_no_file_can_have(tmp_path):
    clips = read_clips(write(tmp_path / "p.txt", ["AC/DC, 24/7", "Ein Hund läuft – 猫", 'say "a: b?"']), samples=1)
    assert [clip.stem for clip in clips] == ["AC-DC, 24-7-0", "Ein Hund läuft – 猫-0", 'say "a: b?"-0']
    assert [prompt_of(Path(f"{clip.stem}.mp4")) for clip in clips] == [
        "AC-DC, 24-7",
        "Ein Hund läuft – 猫",
        'say "a: b?"',
    ]


def test_prompts_of_what_rcm_sample_wrote(tmp_path):
    """Its names are cut at 60 characters: the file beside says the caption, and without it two are not taken for one."""
    long, name = "a cat " * 20, "0003_" + "a-cat-" * 10
    save_file({"latent": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata={"prompt": long})
    assert prompt_of(tmp_path / f"{name}.mp4") == long
    assert prompt_of(tmp_path / "absent" / f"{name}.mp4") == name
    (tmp_path / "0004_seven-moving-left.safetensors").write_bytes(b"torn")
    assert prompt_of(tmp_path / "0004_seven-moving-left.mp4") == "seven-moving-left"
    assert prompt_of(tmp_path / "clip.mp4") == "clip"


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a/b", "a-b"], {}, "got 'a/b' and 'a-b', whose videos would have one name, a-b-0.mp4; fix"),
        (["x" * 300], {}, "got a prompt of 300 characters .* need at most 255; fix: give short prompts as --prompts"),
        (["猫" * 90], {}, "got a prompt of 90 characters .* would have 285 bytes"),
        ([".hidden"], {}, "would be hidden; fix"),
        (["a"], {"samples": 0}, "got --samples 0, need 1 to 1000"),
        (["a"], {"long": ["b", "c"]}, "got 2 prompts in .*long.txt and 1 in .*, need as many; fix"),
        (["a"], {"more": ["b"]}, "got 'b' in .*more.txt, need prompts of .*; 1 are not in it; fix"),
    ],
)
def test_prompts_that_do_not_fit(tmp_path, lines, options, message):
    files = {name: write(tmp_path / f"{name}.txt", options[name]) for name in ("long", "more") if name in options}
    with pytest.raises(InputError, match=message):
        read_clips(
            write(tmp_path / "p.txt", lines),
            long_prompts=files.get("long"),
            samples=options.get("samples", 5),
            more=files.get("more"),
            more_samples=25,
        )


# ---- results


def results(value=0.5, *, names=("a cat-0.mp4", "a cat-1.mp4"), **changes):
    """As VBench writes them: {dimension: [score, [{"video_path", "video_results"}]]}."""
    details = [{"video_path": f"/data/teacher/{name}", "video_results": value} for name in names]
    return {dimension: [changes.get(dimension, value), details] for dimension in DIMENSIONS}


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


BY_HAND = {
    "subject_consistency": 0.9,
    "dynamic_degree": 0.4,
    "scene": 0.41110,
    "appearance_style": 0.2,
    "temporal_style": 0.182,
}


def test_the_total_by_hand(tmp_path):
    """Every dimension 0.5 but five; normalised one by one from the table of the repository."""
    assert len(QUALITY) == 7 and len(SEMANTIC) == 9
    scores = read_scores(str(save(tmp_path / "teacher_eval_results.json", results(**BY_HAND))))
    quality = [
        (0.9 - 0.1462) / 0.8538,  # subject consistency
        (0.5 - 0.2615) / 0.7385,  # background consistency
        (0.5 - 0.6293) / 0.3707,  # temporal flickering
        (0.5 - 0.706) / 0.2915,  # motion smoothness
        0.5,
        0.5,
        0.5 * 0.4,  # dynamic degree
    ]
    semantic = [0.5] * 5 + [0.5, (0.2 - 0.0009) / 0.2846, 0.5, 0.5 / 0.364]
    expected_quality, expected_semantic = sum(quality) / 6.5, sum(semantic) / 9
    assert scores.name == "teacher" and scores.missing == []
    assert scores.quality == pytest.approx(expected_quality) and scores.semantic == pytest.approx(expected_semantic)
    assert scores.total == pytest.approx(0.8 * expected_quality + 0.2 * expected_semantic)
    perfect = read_scores(
        str(save(tmp_path / "best.json", {name: [high, []] for name, (_, high) in DIMENSIONS.items()}))
    )
    assert (perfect.quality, perfect.semantic, perfect.total) == pytest.approx((1.0, 1.0, 1.0))


def test_side_by_side_over_files_of_single_dimensions(tmp_path, capsys):
    """A folder as several runs of VBench leave it, with its own list of videos and a Mac's dot files beside."""
    teacher = save(tmp_path / "teacher_eval_results.json", results(**BY_HAND))
    for number, (dimension, entry) in enumerate(results(0.6, **BY_HAND).items()):
        save(tmp_path / "student" / f"results_{number}_eval_results.json", {dimension: entry})
    save(tmp_path / "student" / "results_0_full_info.json", [{"prompt_en": "a cat"}])
    (tmp_path / "student" / "._results_0_eval_results.json").write_bytes(b"\0\5\x16\7")
    argv = [
        "evaluate",
        "vbench-scores",
        str(teacher),
        f"ours={tmp_path / 'student'}",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(argv) == 0
    text, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "| color" in text and "+10.00" in text and "difference" in text
    gained = record["ours"]["total"] - record["teacher"]["total"]
    # ten dimensions rose by 0.1: four of quality that are normalised, two that are not; object class to spatial relationship, overall
    quality = (0.1 / 0.7385 + 0.1 / 0.3707 + 0.1 / 0.2915 + 0.2) / 6.5
    assert gained == pytest.approx(0.8 * quality + 0.2 * (0.5 + 0.1 / 0.364) / 9)


def test_without_all_dimensions_there_is_no_total(tmp_path, capsys):
    quality = dict.fromkeys(QUALITY, 0.7)
    assert main(["evaluate", "vbench-scores", str(save(tmp_path / "x.json", quality))]) == 0
    text = capsys.readouterr().out
    assert "| quality" in text and "no score of object_class" in text and "do not say which videos" in text
    assert read_scores(str(tmp_path / "x.json")).total is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"colour": [0.5, []]}, "got the dimension colour .nearest: 'color'.*need those of VBench's 16; fix"),
        ({"imaging_quality": [67.2, []]}, "as imaging_quality, need a share between 0 and 1; fix"),
        ({"color": ["high", []]}, "need a share between 0 and 1"),
        ({"color": [float("nan"), []]}, "need a share between 0 and 1"),
        ([], "need VBench's results; fix"),
    ],
)
def test_results_that_are_none(tmp_path, capsys, content, message):
    assert main(["evaluate", "vbench-scores", str(save(tmp_path / "x.json", content))]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_other_videos_and_empty_folders_are_refused(tmp_path, capsys):
    teacher = save(tmp_path / "teacher.json", results())
    other = save(tmp_path / "student.json", results(names=("a cat-0.mp4",)))
    assert main(["evaluate", "vbench-scores", str(teacher), str(other)]) == 1
    said = capsys.readouterr().err
    assert (
        "subject_consistency: got 2 videos of teacher.json and 1 of student.json" in said
        and "'a cat-1.mp4'" in said
        and "fix" in said
    )
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", "vbench-scores", str(tmp_path / "empty")]) == 1
    assert "need VBench's results; fix" in capsys.readouterr().err
    both = tmp_path / "both"
    for value in (0.4, 0.5):
        save(both / f"{value}_eval_results.json", {"color": [value, []]})
    assert main(["evaluate", "vbench-scores", str(both)]) == 1
    assert "holds two scores of color" in capsys.readouterr().err
