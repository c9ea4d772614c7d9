"""In a guest, at length, after `accept`: Ctrl-C in the middle of `gpunvme accept`."""

from __future__ import annotations

import signal

from accept import data_on_it, driver, signalled
from checking import check


@check(seconds=400)
def interrupted_it_is_given_back_and_empty() -> None:
    status, text = signalled(signal.SIGINT)
    assert (status, driver()) == (130, "nvme"), text
    assert "give back" in text, text
    # What the steps had written is gone, too: it can be begun again.
    assert not data_on_it(), text
