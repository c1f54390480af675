"""`python -m rcm_megatron train` with an interruption: `RCM_TEST_FAULT=KIND:ITERATION python -m tests.distributed.interrupted train …`.

Before that iteration of the first attempt (later ones run undisturbed):
    wait     every rank waits until a signal reaches it, five minutes at most
    signal   rank 1 sends itself two SIGUSR1
    hang     rank 1 sleeps for ever
    slow     every rank takes five minutes, whatever signals come
"""

import os
import signal
import sys
import time

ATTEMPTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def wait(trainer):
    end = time.monotonic() + 300
    while not trainer.stop.noted and time.monotonic() < end:
        time.sleep(0.05)


def signal_twice(trainer):
    if os.environ["RANK"] == "1":
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)


def hang_in_step(trainer):
    while os.environ["RANK"] == "1":
        time.sleep(3600)


def slow(trainer):
    print("a slow step begins", flush=True)
    end = time.monotonic() + 300
    while time.monotonic() < end:
        time.sleep(0.05)


KINDS = {"wait": wait, "signal": signal_twice, "hang": hang_in_step, "slow": slow}


def main():
    from rcm_megatron import __main__
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.training.trainer import Trainer

    kind, iteration = os.environ.get("RCM_TEST_FAULT", "none:0").split(":")
    if kind != "none" and all(int(os.environ.get(name, "0")) == 0 for name in ATTEMPTS):
        iterate = Trainer.iterate

        def interrupted(trainer):
            if trainer.progress.iteration == int(iteration):
                KINDS[kind](trainer)
            iterate(trainer)

        Trainer.iterate = interrupted
    sys.exit(__main__.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
