"""A minute of tests/faults/campaign.py: a few faults of each kind."""

from tests.faults.campaign import run_campaign

FAULTS = {"kills": 1, "kills_while_saving": 2, "torn": 1, "full_disk": 1, "shards": 1, "nan_gradients": 1}


def test_runs_survive_a_sample_of_faults(tmp_path):
    tallies = run_campaign(tmp_path, seed=1, faults=FAULTS, seconds=250)
    assert sum(tally.faults for tally in tallies.values()) >= sum(FAULTS.values()), tallies
    for kind, tally in tallies.items():
        assert tally.survived == tally.faults and tally.wrong == 0, f"{kind}: {tally}"
