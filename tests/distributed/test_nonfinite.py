"""NaN and Inf never become a video, a preview or a sample of a dataset: what holds them is named and the process ends."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcm_megatron.data.media import to_frames
from rcm_megatron.datasets.ranks import built_sample
from rcm_megatron.finite import NonFiniteError
from rcm_megatron.requests import BuildRequest
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command

WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLE = [
    "sample",
    "model_configs/quickstart.yaml",
    "--weights",
    "teacher",
    "--steps",
    "2",
    "--prompt",
    "two moving left",
]


def teacher(folder, changes):
    """The quick start's teacher with other values in some tensors."""
    shutil.copytree("model_configs/quickstart_teacher", folder)
    tensors = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return f"networks.teacher.init={folder}"


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[7] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"blocks.1.attn2.norm_k.weight": with_nan},
            "'blocks.1.attn2.norm_k.weight' holds nan at [7], 1 of 128 values",
        ),
        ({"proj_out.weight": lambda tensor: tensor.sign() * 3e38}, "sample 0 ('two moving left'): latent holds "),
    ],
    ids=["weights", "latent"],
)
def test_sample_stops_and_names_what_it_was(tmp_path, changes, match):
    argv = [*SAMPLE, "--output", str(tmp_path / "out"), teacher(tmp_path / "teacher", changes)]
    ((status, stderr),) = run_ranks(command, 1, argv)
    assert status == 1 and match in stderr, stderr
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def preview_on_a_rank():
    """The message that this rank ends with; rank 1 alone has made a NaN."""
    import torch.distributed as dist

    from rcm_megatron.training.preview import _require_finite_everywhere

    latents = {"student_1_steps": torch.zeros(2, 1, 3, 4, 4), "ema_4_steps": torch.zeros(2, 1, 3, 4, 4)}
    if dist.get_rank() == 1:
        latents["ema_4_steps"][1, 0, 2, 1, 3] = float("inf")
    try:
        _require_finite_everywhere(latents, 30)
    except NonFiniteError as error:
        return str(error)


def test_a_preview_stops_all_ranks():
    messages = run_ranks(preview_on_a_rank, 2)
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        "preview of iteration 30, ema_4_steps, sample 1: latent holds inf at [0, 2, 1, 3], 1 of 48 values"
    )


def test_no_frame_is_made_of_nan():
    video = torch.zeros(3, 2, 4, 4)
    video[1, 1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"a video holds nan at \[1, 1, 2, 3\]"):
        to_frames(video)


@pytest.mark.parametrize("member", ["latent", "embed", "image_embed_LD"])
def test_a_dataset_takes_no_such_sample(member):
    tensors = {"latent": torch.zeros(1, 2, 3, 3), "embed": torch.ones(4, 5), "image_embed_LD": torch.ones(2, 5)}
    tensors[member].view(-1)[3] = float("nan")
    request = BuildRequest(output=Path("data"))
    with pytest.raises(NonFiniteError, match=rf"sample 12 \('a cat'\): {member} holds nan at"):
        built_sample(
            request, 12, *list(tensors.values())[:2], "a cat", text_len=4, image_embed_LD=tensors["image_embed_LD"]
        )
