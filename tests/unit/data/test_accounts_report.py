import pytest

from segalign.data.accounts import RunAccounts
from segalign.data.limits import BadSampleLimits
from segalign.errors import FullDiskError


def test_a_report_that_another_rank_cannot_write_ends_this_one_too(tmp_path, monkeypatch):
    def fail_elsewhere(work):
        work()
        raise FullDiskError("no room on another rank")

    monkeypatch.setattr("segalign.data.accounts.together", fail_elsewhere)
    with pytest.raises(FullDiskError, match="another rank"):
        RunAccounts(BadSampleLimits()).close(tmp_path, None)
