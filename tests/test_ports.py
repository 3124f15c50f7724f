"""One table of ports, which the environment may change."""

import pytest

from sagellm.errors import UserError
from sagellm.ports import SagePorts

pytestmark = pytest.mark.contract


def test_the_environment_goes_before_the_defaults():
    assert SagePorts.load({}) == SagePorts()
    assert SagePorts.load({"SAGELLM_PORT_SERVE": "9", "SAGELLM_MODEL": "x"}) == SagePorts(serve=9)


@pytest.mark.parametrize("text", ["", "x", "0", "65536", "-1"])
def test_what_is_no_port_is_refused(text):
    with pytest.raises(
        UserError, match=f"^SAGELLM_PORT_GATEWAY is '{text}'; accepted: a port from 1 to 65535$"
    ):
        SagePorts.load({"SAGELLM_PORT_GATEWAY": text})
