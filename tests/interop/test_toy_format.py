"""A new format, defined here alone: recognised, converted there and back to the bit, verified, and named where a file is wrong.

docs/EXTENDING.md has the list of places; the class and its value here are all of them.
"""

from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from rcm_megatron.checkpoint.formats.base import Format
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.checkpoint.writers import SafetensorsFolder
from rcm_megatron.cli.main import main
from rcm_megatron.config import as_dict
from rcm_megatron.errors import CheckpointError
from rcm_megatron.families.family import Naming
from rcm_megatron.families.key_map import KeyMap, Row
from rcm_megatron.registries import FORMATS
from tests.interop.conversion import convert
from tests.interop.test_convert_pairs import save
from tests.interop.wan_networks import assert_same_tensors


def toy_row(row):
    """diffusers' names, said otherwise; q, k and v stay apart."""
    return Row((*row.names, " ".join(f"toy_{name}" for name in row.names[1].split())), row.shapes)


class Toy(Format):
    """One more column of names for any family, blocks called `layers`, and a config.json that holds our settings."""

    def naming(self, family):
        table = family.namings["internal"].key_map.table
        scopes = {scope: tuple(map(toy_row, getattr(table, scope))) for scope in ("before", "block", "after")}
        table = replace(table, columns=(*table.columns, "toy"), **scopes)
        return Naming(
            key_map=KeyMap(table, "toy", prefix="t.", blocks="layers", conv_patch=family.name == "wan"),
            is_used_by=lambda shapes: any(name.startswith("toy_") for name in shapes) and self._is_of(family, shapes),
            is_config=lambda config: "toy" in config,
            read_config=lambda config, shapes: config["toy"],
            write_config=lambda model: {"toy": as_dict(model)},
        )

    @staticmethod
    def _is_of(family, shapes):
        return any(name.startswith("toy_condition_embedder.") for name in shapes) == (family.name == "wan")


@pytest.fixture(autouse=True)
def toy():
    with FORMATS.registered("toy", Toy("toy", SafetensorsFolder("toy"))):
        yield


@pytest.mark.parametrize("kind", ["wan2.1_t2v", "flf2v", "cosmos_v2w"])
def test_it_converts_there_and_back_to_the_bit(kind, tmp_path):
    state, config = save(kind, tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "toy", to="toy") == config
    written = load_file(tmp_path / "toy" / "toy.safetensors")
    assert all(name.startswith("t.") for name in written) and len(written) == len(state)
    opened = open_checkpoint(tmp_path / "toy")
    assert (opened.format, opened.model_config()) == ("toy", config)
    for form in ("internal", "torch_dist", "diffusers"):
        assert convert(tmp_path / "toy", tmp_path / form, to=form) == config
        assert convert(tmp_path / form, tmp_path / f"{form}_toy", to="toy") == config
        assert_same_tensors(written, load_file(tmp_path / f"{form}_toy" / "toy.safetensors"))
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "diffusers")))


def test_the_command_line_knows_it_and_verifies_it(tmp_path, capsys):
    save("wan2.1_t2v", tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "toy"), "--to", "toy", "--verify"]) == 0
    assert "verified the target in rcm_megatron against the source in diffusers" in capsys.readouterr().out


def test_what_a_file_lacks_is_named(tmp_path):
    save("cosmos_v2w", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "toy", to="toy")
    (file,) = (tmp_path / "toy").glob("*.safetensors")
    tensors = load_file(file)
    tensors["t.toy_proj_uot.weight"] = tensors.pop("t.toy_proj_out.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing \(1\): 'toy_proj_out.weight' .nearest: 'toy_proj_uot.weight'"):
        convert(tmp_path / "toy", tmp_path / "out", to="diffusers")
    tensors["t.toy_proj_out.weight"] = tensors.pop("t.toy_proj_uot.weight")[:, :-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"'toy_proj_out.weight': got shape \[12, 47\], need \[12, 48\]"):
        convert(tmp_path / "toy", tmp_path / "out", to="diffusers")


def test_one_that_is_not_registered_is_refused():
    from rcm_megatron.errors import UserError

    with pytest.raises(UserError, match=r"unknown checkpoint format 'tyo'; did you mean toy\?"):
        convert("nowhere", "out", to="tyo")
