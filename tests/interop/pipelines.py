"""What the comparisons with diffusers' pipelines share: the noise of our sampler in theirs."""

from rcm_megatron.diffusion.noise import SeededDraws


class SamplersNoise:
    """The noise of `Sampler` for samples 0, 1, ...: of (seed, sample index) and a purpose."""

    def __init__(self, shape, *, samples, seed=0):
        self.draws, self.shape = SeededDraws(seed, 0, range(samples)), shape

    @property
    def first(self):
        return self.draws.normal("sample_noise", self.shape)

    def into(self, scheduler):
        """`callback_on_step_end` of a pipeline's call, so that RCMScheduler re-noises as `Sampler` does."""

        def give(step):
            purpose = f"sample_renoise/{step}"
            scheduler.generator = [self.draws._generator(purpose, index) for index in self.draws.sample_indices]

        def after_step(pipeline, step, timestep, tensors):
            give(step + 1)
            return tensors

        give(0)
        return after_step
