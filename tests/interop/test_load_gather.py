"""Files into tensor-parallel models and out again."""

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.models import gather_full, load_into, local_parameters, write_checkpoint
from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor, open_checkpoint
from rcm_megatron.checkpoint.translate import to_internal
from rcm_megatron.errors import CheckpointError
from tests.distributed.harness import run_ranks
from tests.interop.conversion import convert
from tests.interop.wan_networks import CONFIG, RankModel, assert_same_tensors, split_dim


@pytest.fixture(scope="module")
def sources(tiny, tmp_path_factory):
    folder, path = tiny[0], tmp_path_factory.mktemp("sources")
    convert(folder, path / "wan", to="wan")
    convert(folder, path / "internal", to="internal")
    return {"diffusers": folder, "wan": path / "wan", "internal": path / "internal"}


def loaded(source, *, tp_size, dtype=torch.float32):
    models = [RankModel(tp_size=tp_size, dtype=dtype) for _ in range(tp_size)]
    for rank, model in enumerate(models):
        load_into(model, source, model_config=CONFIG, tp_rank=rank, tp_size=tp_size)
    return [dict(local_parameters(model)) for model in models]


@pytest.mark.parametrize("form", ["diffusers", "wan", "internal"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_slices_reassemble(sources, form, tp_size):
    full = dict(to_internal(open_checkpoint(sources["diffusers"]), CONFIG))
    ranks = loaded(open_checkpoint(sources[form]), tp_size=tp_size)
    for name, tensor in full.items():
        parts, dim = [parameters[name] for parameters in ranks], split_dim(name)
        for part in parts[1:] if dim is None else []:
            assert torch.equal(part, parts[0]), f"{name}: replicas differ"
        assert torch.equal(parts[0] if dim is None else torch.cat(parts, dim), tensor), name


def test_every_rank_reads_only_its_slice(sources):
    source, read = open_checkpoint(sources["diffusers"]), {}

    def spy(name, tensor):
        def reader(index):
            value = tensor.read(index)
            read[name] = read.get(name, 0) + value.numel()
            return value

        return LazyTensor(tensor.shape, reader)

    spied = CheckpointSource(
        source.where, {name: spy(name, tensor) for name, tensor in source.tensors.items()}, source.config
    )
    load_into(RankModel(tp_size=4), spied, model_config=CONFIG, tp_rank=3, tp_size=4)
    assert set(read) == set(source)
    for name in ("blocks.1.attn1.to_k.weight", "blocks.0.attn2.to_v.bias", "blocks.0.ffn.net.2.weight"):
        assert read[name] * 4 == source[name].numel(), name
    assert read["blocks.1.attn1.to_out.0.bias"] == 24


def test_values_are_cast_to_the_parameter(sources):
    (parameters,) = loaded(open_checkpoint(sources["internal"]), tp_size=1, dtype=torch.bfloat16)
    full = dict(to_internal(open_checkpoint(sources["internal"]), CONFIG))
    assert_same_tensors(
        {name: tensor.bfloat16() for name, tensor in full.items()}, {n: p.data for n, p in parameters.items()}
    )


def test_pipeline_stage_and_wrapped_module(sources):
    source, stage = open_checkpoint(sources["wan"]), torch.nn.Module()
    stage.module = RankModel(only="blocks.1.")
    with pytest.raises(CheckpointError, match="in the file, absent from the model"):
        load_into(stage, source, model_config=CONFIG)
    load_into(stage, source, model_config=CONFIG, partial=True)
    assert all(torch.isfinite(parameter).all() for parameter in stage.parameters())
    assert set(local_parameters(stage)) == {
        name for name, _ in to_internal(source, CONFIG) if name.startswith("blocks.1.")
    }


def test_misfits_name_the_parameter_and_leave_the_model_alone(sources):
    source, model = open_checkpoint(sources["internal"]), RankModel(tp_size=2)
    model.blocks.get_submodule("1").register_parameter("modulatoin", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"'blocks.1.modulatoin' \(nearest: 'blocks.1.modulation'\)"):
        load_into(model, source, model_config=CONFIG, tp_size=2)
    model = RankModel()
    model.head.linear.weight = torch.nn.Parameter(torch.zeros(11, 24))
    with pytest.raises(CheckpointError, match=r"'head.linear.weight'.*\[11, 24\].*\[12, 24\]"):
        load_into(model, source, model_config=CONFIG)
    assert torch.isnan(model.patch_embedding.weight).all()
    model = RankModel(tp_size=8)
    with pytest.raises(CheckpointError, match="4 heads of dimension 0 do not divide over 8 tensor-parallel ranks"):
        load_into(model, open_checkpoint(sources["diffusers"]), model_config=CONFIG, tp_size=8)
    assert torch.isnan(model.patch_embedding.weight).all()


def gather_on_rank(path, target):
    """Load a slice, gather weights in bf16 and as they are, export; runs on each of two ranks."""
    model, rank = RankModel(tp_size=2), dist.get_rank()
    load_into(model, open_checkpoint(path), model_config=CONFIG, tp_rank=rank, tp_size=2)
    write_checkpoint(gather_full(model, tp_group=dist.group.WORLD), CONFIG, target, is_writer=rank == 0)
    low = dict(gather_full(model, tp_group=dist.group.WORLD, getter=lambda parameter: parameter.bfloat16() * 2))
    return low if rank == 0 else sum(value is not None for value in low.values())


def test_two_ranks_gather_and_export(tiny, sources, tmp_path):
    gathered, on_rank_1 = run_ranks(gather_on_rank, 2, str(sources["internal"]), str(tmp_path / "out"))
    assert on_rank_1 == 0
    assert_same_tensors(tiny[1], dict(open_checkpoint(tmp_path / "out")))
    full = dict(to_internal(open_checkpoint(sources["internal"]), CONFIG))
    assert_same_tensors({name: tensor.bfloat16() * 2 for name, tensor in full.items()}, gathered)
    with pytest.raises(CheckpointError, match="getter returned None"):
        list(gather_full(RankModel(), tp_group=None, getter=lambda parameter: parameter.grad))


def test_export_holds_no_alias_of_the_model(sources, tmp_path):
    model = RankModel()
    load_into(model, open_checkpoint(sources["internal"]), model_config=CONFIG)
    metadata = {"step": 7}
    options = WriteOptions(dtype=torch.float16, metadata=metadata)
    write_checkpoint(gather_full(model, tp_group=None), CONFIG, tmp_path / "out", options)
    source = open_checkpoint(tmp_path / "out")
    assert source.metadata == {"format": "pt", "step": "7"}
    assert source["proj_out.weight"].dtype == torch.float16
