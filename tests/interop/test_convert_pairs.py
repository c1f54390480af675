"""Every pair of formats of every kind of network: the same weights and network, to the bit, whichever way they went."""

from dataclasses import replace

import pytest

from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.registries import FORMATS, family_of
from tests.interop.conversion import convert
from tests.interop.test_cosmos_checkpoints import CONFIG as COSMOS
from tests.interop.test_cosmos_checkpoints import save_tiny as save_cosmos
from tests.interop.test_wan_image_checkpoints import KINDS as IMAGE_KINDS
from tests.interop.test_wan_image_checkpoints import save as save_wan_image
from tests.interop.wan_networks import CONFIG as WAN
from tests.interop.wan_networks import assert_same_tensors, save_tiny

FILES = ("nvlabs", "nvidia")
KINDS = ("wan2.1_t2v", *IMAGE_KINDS, "cosmos_t2i", "cosmos_v2w")


def save(kind, folder):
    """(state dict, our configuration) of a diffusers folder."""
    if kind in IMAGE_KINDS:
        return save_wan_image(kind, folder)[2:]
    if kind == "wan2.1_t2v":
        return save_tiny(folder), WAN
    if kind == "cosmos_v2w":
        return save_cosmos(folder), COSMOS
    own = {"max_size": (128, 240, 240)}
    state = save_cosmos(folder, in_channels=3, extra_pos_embed_type=None, **own)
    return state, replace(COSMOS, conditional_frames=False, learnable_positions=False, rope_max_seq_len=128, **own)


@pytest.fixture(scope="module", params=KINDS)
def network(request, tmp_path_factory):
    """State dict, our configuration, and the path of the network in each format of its family."""
    home = tmp_path_factory.mktemp(request.param)
    state, config = save(request.param, home / "diffusers")
    paths = {"diffusers": home / "diffusers"}
    for form in FORMATS:
        if form != "diffusers" and FORMATS[form].naming(family_of(config)) is not None:
            paths[form] = home / (f"{form}.pt" if form in FILES else form)
            run(paths["diffusers"], paths[form], form, config)
    return state, config, paths


def run(source, target, form, config):
    """Convert, giving what a file without config.json does not say; the network must be the one that it was."""
    overrides = {}
    if source.suffix:
        overrides = {"num_heads": 4} if config.family == "wan" else {"rope_scale": config.rope_scale}
    got = convert(source, target, to=form, **overrides)
    if config.family == "cosmos":
        got = replace(got, qk_norm_eps=config.qk_norm_eps)
    assert got == config


def test_every_pair_gives_the_same_weights(network, tmp_path):
    _, config, paths = network
    assert len(paths) == (5 if config.family == "wan" else 4)
    for source in paths:
        for target in paths:
            written = tmp_path / f"{source}_to_{target}{'.safetensors' if target in FILES else ''}"
            run(paths[source], written, target, config)
            expected, got = open_checkpoint(paths[target]), open_checkpoint(written)
            assert got.format == expected.format
            assert_same_tensors(dict(expected), dict(got))


def test_the_way_back_from_every_format_is_bit_exact(network, tmp_path):
    state, config, paths = network
    original = open_checkpoint(paths["diffusers"]).config
    for source in paths:
        run(paths[source], tmp_path / source, "diffusers", config)
        back = open_checkpoint(tmp_path / source)
        assert_same_tensors(state, dict(back))
        different = {key for key in back.config if key[0] != "_" and back.config[key] != original[key]}
        assert not different, source


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtypes_that_are_asked_for(network, tmp_path, dtype):
    state, config, paths = network
    for source in paths:
        target = tmp_path / source
        overrides = {"num_heads": 4} if config.family == "wan" else {"rope_scale": config.rope_scale}
        overrides = overrides if paths[source].suffix else {}
        convert(paths[source], target, to="diffusers", dtype=dtype, **overrides)
        assert_same_tensors(
            {name: value.to(DTYPES[dtype]) for name, value in state.items()}, dict(open_checkpoint(target))
        )
