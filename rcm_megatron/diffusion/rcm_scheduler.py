"""The student's few-step sampling as a scheduler of diffusers, for WanPipeline, WanImageToVideoPipeline and the Cosmos2 pipelines.

Needs torch and diffusers alone: `export` puts a copy of this file beside the weights, where it works without rcm_megatron.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class RCMScheduler(SchedulerMixin, ConfigMixin):
    """rCM's multistep consistency sampling (arXiv 2510.08431): denoise, re-noise to the next time, denoise again.

    Use it without guidance (`guidance_scale=1.0`): `pipeline.scheduler = RCMScheduler(...)`. `pipeline.save_pretrained` puts this file
    beside the configuration, and `from_pretrained(..., trust_remote_code=True)` of the pipeline's class loads it from there.

    The Wan pipelines give the network their first noise as it is, while the sampler starts a little below pure noise: give them
    `latents=scheduler.init_noise_sigma * noise`, or make the scheduler with `sigma_max=None`. The Cosmos2 pipelines scale it themselves.

    No pipeline gives `step` its generator: for noise that can be had again set `scheduler.generator`, one torch.Generator, or a
    list of one for each sample; None is torch's global one.

    Args:
        mid_times: TrigFlow times between the steps; n steps use the first n - 1.
        sigma_max: noise level of the first step, t = atan(sigma_max); None: pure noise, t = pi/2 (space "flow" only).
        space: how the pipeline holds its noisy latents. "flow" (Wan): (1 - s) x0 + s noise. "edm" (Cosmos2): x0 + sigma noise.
        num_train_timesteps: the network sees s times this.
        sigma_data, final_sigmas_type: read by the Cosmos2 pipelines, of no effect here.
    Raises ValueError for another space, and for space "edm" without sigma_max.
    """

    order = 1
    __module__ = "rcm_scheduler"  # what a saved pipeline names, wherever this was imported from: the file beside the configuration

    @register_to_config
    def __init__(
        self,
        mid_times: Sequence[float] = (1.5, 1.4, 1.0),
        sigma_max: float | None = 80.0,
        space: str = "flow",
        num_train_timesteps: int = 1000,
        sigma_data: float = 1.0,
        final_sigmas_type: str = "zero",
    ) -> None:
        if space not in ("flow", "edm"):
            raise ValueError(f"got space={space!r}, need 'flow' (Wan) or 'edm' (Cosmos2)")
        if sigma_max is None and space == "edm":
            raise ValueError("got sigma_max=None with space='edm', need a number: x0 + sigma noise has no pure noise")
        self.generator: torch.Generator | list[torch.Generator] | None = None
        self.set_timesteps(1)

    def register_to_config(self, **kwargs: Any) -> None:
        """Once, as it is made: the Cosmos2 pipelines would write their own sigma_max, 80, over that of a student."""
        if not hasattr(self, "_internal_dict"):
            super().register_to_config(**kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration, and this file beside it."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        target = Path(save_directory) / "rcm_scheduler.py"
        if target.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, target)

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied by to be the first latents."""
        return self._levels()[0]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Begin a sample of that many steps. Of `sigmas`, in which the Cosmos2 pipelines say the same, only the number counts.

        Raises ValueError for more steps than there are times.
        """
        steps = num_inference_steps if sigmas is None else len(sigmas)
        most = len(self.config.mid_times) + 1
        if steps is None or not 1 <= steps <= most:
            raise ValueError(
                f"got num_inference_steps={steps}, need 1 to {most}; mid_times={list(self.config.mid_times)} has one time for every step "
                "but the first"
            )
        self.num_inference_steps, self._index = steps, 0
        rf_times = torch.tensor([_rf_time(t) for t in self._times()[:steps]], dtype=torch.float64)
        self.timesteps = (self.config.num_train_timesteps * rf_times).float().to(device)
        self.sigmas = torch.tensor([*self._levels()[:steps], 0.0], dtype=_widest(device), device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step that is next."""
        self._index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x0 = sample - sigma model_output with new noise at the next level; after the last step x0 itself.

        `model_output` is the direction of the sample's noise: the network's velocity ("flow"), or (sample - x0) / sigma ("edm").
        Raises ValueError past the last step.
        """
        if self._index >= self.num_inference_steps:
            raise ValueError(
                f"got step {self._index + 1} of {self.num_inference_steps}; call set_timesteps before a sample"
            )
        levels, wide = self._levels(), _widest(sample.device)
        result = sample.to(wide) - levels[self._index] * model_output.to(wide)
        self._index += 1
        if self._index < self.num_inference_steps:
            generator = self.generator if generator is None else generator
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            level = levels[self._index]
            result = (1.0 - level if self.config.space == "flow" else 1.0) * result + level * noise.to(wide)
        result = result.to(sample.dtype)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _times(self) -> list[float]:
        """TrigFlow times of all steps."""
        sigma_max = self.config.sigma_max
        return [math.pi / 2 if sigma_max is None else math.atan(sigma_max), *self.config.mid_times]

    def _levels(self) -> list[float]:
        """Of each step, what the noise in its latents is multiplied by."""
        level = _rf_time if self.config.space == "flow" else math.tan
        return [level(t) for t in self._times()]


def _rf_time(t: float) -> float:
    """Rectified-flow time s of a TrigFlow time."""
    return math.sin(t) / (math.cos(t) + math.sin(t))


def _widest(device: str | torch.device | None) -> torch.dtype:
    """The widest dtype that a device computes in."""
    return torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64
