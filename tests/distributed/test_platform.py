"""Megatron-Core on CPU/Gloo: a single process, the counted replacements, and configurations that are refused."""

import os
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.config import ParallelConfig
from rcm_megatron.errors import InstallationError
from rcm_megatron.parallel.transformer_config import transformer_config
from rcm_megatron.platform import MEGATRON_VERSION, megatron_cpu
from rcm_megatron.platform.megatron import prepare_megatron
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is replaced is replaced only without CUDA")
MODEL = types.SimpleNamespace(num_layers=3, hidden_size=24, num_heads=4, ffn_hidden_size=48, eps=1e-6)


def config(parallel=None, **options):
    return transformer_config(MODEL, parallel or ParallelConfig(), **{"params_dtype": torch.bfloat16} | options)


# ---- failing loudly: in fresh ranks, because install() acts on the process


def install_twice():
    prepare_megatron()
    before = torch.cuda.current_device
    prepare_megatron()
    from megatron.core.optimizer import distrib_optimizer

    code = distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups.__code__
    return (
        torch.cuda.current_device is before,
        torch.ones(2).cuda().device.type,
        "torch.cuda.FloatTensor" in code.co_consts,
    )


def test_install_is_idempotent():
    assert run_ranks(install_twice, 1) == [(True, "cpu", False)]


def install_another_version():
    import megatron.core

    megatron.core.__version__ = "0.17.0"
    return _error_of_install()


def install_in_a_checkout():
    """From 0.19 on Megatron adds the commit of the checkout under which its environment lies, such as this program's."""
    import megatron.core

    megatron.core.__version__ = f"{MEGATRON_VERSION}+44a65c4"
    prepare_megatron()


def install_with_other_counts():
    megatron_cpu.REWRITTEN_FUNCTIONS[MEGATRON_VERSION]["megatron.core.optimizer.clip_grads"] = 4
    first, second = _error_of_install(), _error_of_install()
    return first, second, torch.cuda.synchronize.__module__


def install_without_a_function():
    from megatron.core.tensor_parallel import random

    del random._get_cuda_rng_state
    return _error_of_install()


def _error_of_install():
    with pytest.raises(InstallationError) as caught:
        prepare_megatron()
    return str(caught.value)


def test_another_megatron_is_an_error_with_the_fix():
    [message] = run_ranks(install_another_version, 1)
    assert message.startswith(f"got megatron-core 0.17.0; need {MEGATRON_VERSION} on Python 3.")
    assert f"pip install megatron-core=={MEGATRON_VERSION}" in message


def test_the_same_megatron_under_a_checkout_is_taken():
    run_ranks(install_in_a_checkout, 1)


def test_another_number_of_places_is_an_error_that_names_the_module_and_changes_nothing():
    [(message, again, module_of_synchronize)] = run_ranks(install_with_other_counts, 1)
    assert message.startswith("megatron.core.optimizer.clip_grads: got 3 functions with CUDA literals; need 4")
    assert message == again
    assert module_of_synchronize == "torch.cuda"


def test_a_missing_function_is_an_error():
    assert (
        "megatron.core.tensor_parallel.random: got no _get_cuda_rng_state"
        in run_ranks(install_without_a_function, 1)[0]
    )


# ---- random state


def random_states():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    from rcm_megatron.parallel.groups import initialize_parallel

    prepare_megatron()
    initialize_parallel(ParallelConfig(tp=2))
    model_parallel_cuda_manual_seed(3)
    outside = torch.rand(2)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(2)
    model_parallel_cuda_manual_seed(3)
    with get_cuda_rng_tracker().fork():
        again = torch.rand(2)
    return outside, inside, again, torch.rand(2)


def test_the_tracker_forks_the_cpu_generator():
    first, second = run_ranks(random_states, 2)
    for outside, inside, again, outside_again in (first, second):
        assert torch.equal(inside, again), "the forked stream restarts with its seed"
        assert torch.equal(outside, outside_again), "forking leaves the default stream alone"
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1]), "tensor-parallel ranks draw different numbers inside"


# ---- one process, no torchrun

SINGLE = """
from rcm_megatron.platform.device import backend, init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron
init_distributed()
init_distributed()
prepare_megatron()
import torch, torch.distributed as dist
x = torch.ones(1)
dist.all_reduce(x)
print(dist.get_world_size(), dist.get_backend(), backend(), this_device(), x.item())
"""


def test_a_single_process_without_torchrun_and_without_import_warnings():
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run([sys.executable, "-c", SINGLE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "gloo", "gloo", "cpu", "1.0"]
    assert "Apex" not in done.stderr


# ---- configuration


def configured():
    dense, staged = config(), config(ParallelConfig(tp=2, ring=2, pp=3), variable_seq_lengths=True)
    return vars(dense), vars(staged), dist.get_world_size()


def test_one_policy_for_megatrons_configuration():
    [(dense, staged, _)] = run_ranks(configured, 1)
    assert (dense["sequence_parallel"], staged["sequence_parallel"]) == (False, True)
    assert staged["pipeline_dtype"] == torch.bfloat16
    assert staged["moe_token_dispatcher_type"] == "alltoall"
    assert staged["context_parallel_size"] == 2
    assert (dense["has_cond_embedder"], staged["has_cond_embedder"]) == (False, True)
    for values in (dense, staged):
        off = ("batch_p2p_comm", "overlap_p2p_comm", "calculate_per_token_loss", "gradient_accumulation_fusion")
        assert not any(values[name] for name in (*off, "qk_layernorm", "hidden_dropout", "attention_dropout"))
        assert values["bf16"]


def refused():
    cases = {
        "overlap": lambda: config(overlap_p2p_comm=True, deallocate_pipeline_outputs=True),
        "dtype": lambda: config(params_dtype=torch.float16),
        "heads": lambda: config(ParallelConfig(tp=3)),
        "virtual": lambda: config(ParallelConfig(vpp=2)),
        "stages": lambda: config(ParallelConfig(pp=2, vpp=2)),
    }
    messages = {}
    for name, build in cases.items():
        with pytest.raises(ValueError) as caught:
            build()
        messages[name] = str(caught.value)
    return messages


def test_unsafe_combinations_are_refused_with_got_need_fix():
    [messages] = run_ranks(refused, 1)
    assert "freed while it is being sent" in messages["overlap"]
    assert "got params_dtype=torch.float16" in messages["dtype"]
    assert "got num_heads=4, tp=3" in messages["heads"]
    assert "got vpp=2, pp=1" in messages["virtual"]
    assert "got pp*vpp=4 stages for num_layers=3" in messages["stages"]
    for message in messages.values():
        assert "need" in message and "fix:" in message


def test_megatron_is_imported_without_the_compiler():
    """In a process of its own: the compiler and wandb are there for whoever asks afterwards."""
    program = """
import sys
import torch

compile = torch.compile
import rcm_megatron.platform.megatron
import megatron.core.timers

print("torch._inductor.compile_fx" in sys.modules, "wandb" in sys.modules, torch.compile is compile)
import wandb
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "False False True\n", done
