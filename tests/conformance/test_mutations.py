"""Random errors in emitted programs are caught by the layers of proof."""

import re

import forked
import pytest
from strategies import examples


@pytest.mark.parametrize("target", ["ascend"])
def test_of_100_random_errors_95_are_caught(target):
    count = max(100, examples(100).max_examples)
    done = forked.sagellm("verify-backend", target, "--mutations", count, timeout=3000)
    print(done.stdout)
    caught = re.search(r"(\d+) of (\d+) errors caught", done.stdout)
    assert caught, done.stderr
    assert done.returncode == 0 and int(caught[1]) >= 0.95 * count
