"""Updates refused in a row: how many, and until which iteration checkpoints are good."""

import pytest

from rcm_megatron.training.divergence import DIVERGED, Diverged, Refusals


def after(*outcomes):
    """Refusals after iterations 0, 1, ...: S/F a student or fake score update, s/f a refused one."""
    refusals = Refusals()
    for iteration, letter in enumerate("".join(outcomes)):
        role = {"s": "student", "f": "fake_score"}[letter.lower()]
        refusals.note(role, iteration, updated=letter.isupper())
    return refusals


@pytest.mark.parametrize(
    ("outcomes", "most", "calm", "good_until"),
    [
        ("", 0, True, None),
        ("SFSF", 0, True, None),
        ("SSs", 1, False, 1),
        ("SFsfsf", 4, False, 0),
        ("SFSFfff", 3, False, 3),
        ("SSsFsFsF", 3, False, 1),  # one network alone: the other's updates do not hide it
        ("SFsFS", 0, True, None),
        ("ssss", 4, False, None),
    ],
)
def test_rows_of_one_network_and_of_all(outcomes, most, calm, good_until):
    refusals = after(outcomes)
    assert (refusals.most, refusals.calm, refusals.good_until) == (most, calm, good_until)


def test_what_a_checkpoint_keeps_is_which_updates_it_holds():
    kept = Refusals(**after("SFSff").plain())
    assert kept.calm and kept.last_update == {"student": 2, "fake_score": 1}
    kept.note("student", 5, updated=False)
    assert kept.good_until == 2


def test_the_message_and_the_status():
    message = after("SFss").message(4, newest="runs/a/checkpoints/iter_0000001")
    assert (
        "last 2 updates up to iteration 3 (student)" in message
        and "iter_0000001; fix:" in message
        and "\n" not in message
    )
    assert Diverged(message).status == DIVERGED == 88
