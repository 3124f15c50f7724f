"""A target names a vendor, a chip and a choice of kernels, and says what stands behind them."""

import pytest

from sagellm import backends
from sagellm.backends.aten.codegen import STOCK
from sagellm.errors import UserError


@pytest.mark.parametrize("target", ["dcu", "dcu:K100_AI", "xpu"])
def test_stock_torch_is_the_default_where_only_call_sites_are_known(target):
    backend = backends.load(target)
    assert backend.kernels() == STOCK and backend.contract.calls == ()
    assert any("confidence D" in note and "+kernels" in note for note in backend.capability.notes)


@pytest.mark.parametrize("target", ["dcu+kernels", "dcu:BW1100+kernels", "xpu+kernels", "xpu:P800+kernels"])
def test_a_vendors_kernels_are_a_choice(target):
    backend = backends.load(target)
    assert backend.kernels() != STOCK and backend.contract.calls
    assert {call.confidence for call in backend.contract.calls} >= {"D"}
    assert any("confidence D" in note for note in backend.capability.notes)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mlu:290", "unknown Cambricon MLU chip 'MLU290'; accepted: MLU370, MLU370-X8, MLU590"),
        ("dcu:BW1+kernels", "unknown Hygon DCU chip 'BW1'; accepted: K100_AI, BW1000, BW1100"),
        ("xpu:R200", "unknown Kunlun XPU chip 'R200'; accepted: P800"),
        ("dcu+fast", "unknown choice in target 'dcu+fast' 'fast'; accepted: kernels"),
        ("mlu+kernels", "target 'mlu+kernels': cambricon has no kernels to choose from; accepted: cambricon"),
        ("null:x", "target 'null:x': null has no chips to choose from; accepted: null"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(target, message):
    with pytest.raises(UserError, match="accepted") as error:
        backends.load(target)
    assert str(error.value).startswith(message)


def test_caches_lie_as_each_vendors_kernels_read_them():
    layouts = {t: backends.load(t).layout for t in ("ascend", "mlu", "dcu+kernels", "xpu+kernels")}
    assert layouts == {"ascend": "NHD", "mlu": "HND", "dcu+kernels": "NHD", "xpu+kernels": "HND"}
