"""While serving, steps are evaluated before and after each pass; a pass that changes the meaning is named."""

import logging

from checkpoints import make_core, random_tokens, serve, tokens_of

from sagellm import passes
from sagellm.batch import SamplingParams

pytest_plugins = ["checkpoints"]

PROMPTS = [random_tokens(20, 1), random_tokens(20, 1) + [5, 6], random_tokens(7, 2)]
BROKEN = '''
from dataclasses import dataclass
from typing import ClassVar

from sagellm.ir.dialects import nn
from sagellm.ir.edit import erase, replace
from sagellm.passes.driver import Pass, rewrites


@dataclass(frozen=True)
class Forgets(Pass):
    """Leaves the up projection out. Declines nothing."""

    name: ClassVar[str] = "forgets"
    graph: ClassVar[str] = "model"

    @rewrites(nn.Mul)
    def forget(self, op, graph, context):
        self.applied(context, op, "gone")
        replace(op, [op.x])
'''


def test_every_second_step_is_checked_and_found_equal(checkpoint, caplog):
    core = make_core(checkpoint("Qwen3ForCausalLM"), max_length=64, check_passes=2)
    how = SamplingParams(max_tokens=7, ignore_eos=True)
    checked = tokens_of(serve(core, PROMPTS, how))
    assert core.stats().checked == {"equal": 4} and core.counters.steps == 7
    assert not [record for record in caplog.records if record.name.startswith("sagellm")]
    assert checked == tokens_of(serve(make_core(checkpoint("Qwen3ForCausalLM"), max_length=64), PROMPTS, how))


def test_a_pass_that_changes_the_meaning_is_named_with_the_operation(
    checkpoint, caplog, tmp_path, monkeypatch
):
    (tmp_path / "broken_pass.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(passes.PASSES, "forgets", "broken_pass:Forgets")
    core = make_core(checkpoint("LlamaForCausalLM"), max_length=64, check_passes=1, pipeline="forgets")
    with caplog.at_level(logging.ERROR):
        serve(core, [[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert core.stats().checked == {"different": 2}
    assert "step 0: pass forgets changed " in caplog.text and "%" in caplog.text
