"""Every shipped configuration of the Triton kernels through Triton's compiler and its ptxas, for GPUs that are not here.

No spills, no serialised wgmma, shared memory and tensor memory within the limits of the GPU.
"""

import pytest

pytest.importorskip("triton")
try:
    from triton.backends.nvidia.compiler import get_ptxas

    get_ptxas(90)
except (ImportError, RuntimeError) as error:
    pytest.skip(f"no NVIDIA compiler in this Triton: {error}", allow_module_level=True)

import torch

from rcm_kernels.compile_report import (
    BEGIN,
    END,
    JVP_OF_TRAINING,
    README,
    VARIANTS,
    compile_entry,
    compile_launch,
    row,
    versions,
)
from rcm_kernels.configs import SHARED_MEMORY, TABLE, Config, config_for, table_key
from rcm_kernels.fused.launches import launches

MAIN = ("jvp", 90, 128, "half")


def check(key, variants):
    wrong = []
    for variant in variants:
        report = compile_entry(key, TABLE[key], variant)
        wrong += [f"{key} {variant}: {problem} ({report})" for problem in report.problems(key[1])]
    assert not wrong, f"with {versions()}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("variant", ["main", *JVP_OF_TRAINING])
def test_the_kernel_of_training_on_hopper(variant):
    check(MAIN, [variant])


@pytest.mark.parametrize("generation", [80, 100])
def test_the_kernel_of_training_on_other_gpus(generation):
    check(("jvp", generation, 128, "half"), ["main"])


def test_cross_attention_has_four_matmuls_where_self_attention_has_six():
    """Instructions in the loop over keys, which is compiled once."""
    own, cross = (compile_entry(MAIN, TABLE[MAIN], variant).matmuls for variant in ("one rank", "cross"))
    assert (own % 6, cross) == (0, own * 4 // 6)


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_the_plain_kernels_on_hopper(kernel):
    check((kernel, *MAIN[1:]), ["main"])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("generation", SHARED_MEMORY)
def test_every_launch_of_the_fused_kernels(generation):
    found = launches()
    assert len(found) == 36, "108 binaries over three generations, as kernels/rcm_kernels/fused/README.md says"
    for launch in found:
        wrong = compile_launch(launch, generation).problems(generation, multiplies=False)
        assert not wrong, f"with {versions()}: {launch[0].__name__} {launch[3]}: {wrong}"


def test_the_table_in_the_readme_is_of_these_compilers_and_configurations():
    first, *lines = README.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert first.startswith(f"{versions()}; limits: "), "python -m rcm_kernels.compile_report --write"
    rows = [line for line in lines if line.startswith(("| jvp", "| forward", "| dq", "| dkdv"))]
    for key, found in zip(TABLE, rows, strict=True):
        report = compile_entry(key, TABLE[key]) if key == MAIN else None
        expected = row(key, TABLE[key], "main", report)
        assert found.startswith(expected), f"{found}\nis not what is shipped: {expected}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("generation", SHARED_MEMORY)
@pytest.mark.parametrize("kernel", VARIANTS)
def test_every_shipped_configuration(kernel, generation):
    for key in TABLE:
        if key[:2] == (kernel, generation):
            check(key, VARIANTS[kernel] if key[3] == "half" else ("main", "odd head dim"))


def test_a_bad_configuration_is_found():
    """The check itself: too many stages for Hopper, too many accumulators for Blackwell, of which ptxas makes an empty kernel."""
    found = compile_entry(MAIN, Config(128, 64, 128, 128, 8, 4)).problems(90)
    assert any("of shared memory, limit 232448" in problem for problem in found), found
    found = compile_entry(("jvp", 100, 128, "half"), Config(128, 64, 128, 128, 8, 1)).problems(100)
    assert any("columns of tensor memory, limit 512" in problem for problem in found), found


def test_the_table_is_complete():
    for kernel in VARIANTS:
        for generation in SHARED_MEMORY:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for head_dim in (8, 16, 40, 64, 128, 256):
                    assert table_key(kernel, generation, head_dim, dtype) in TABLE


def test_a_head_dim_that_fills_no_tile_takes_smaller_steps(monkeypatch):
    monkeypatch.setattr("rcm_kernels.configs.generation", lambda index: 90)

    class Q:
        shape, dtype = (1, 1, 1, 96), torch.bfloat16
        device = torch.device("cuda", 0)

    assert config_for("jvp", Q).block_n < TABLE[MAIN].block_n
    Q.shape = (1, 1, 1, 128)
    assert config_for("jvp", Q) == TABLE[MAIN]
