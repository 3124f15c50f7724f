"""What each vendor's code generator emits is what was reviewed; python tests/conformance/golden.py accepts a change."""

import ast

import golden

from sagellm.backends.kunlun.contract import STUBS
from sagellm.conformance.size import sizes


def test_emitted_text_is_the_reviewed_one():
    for file, emitted in golden.texts():
        assert emitted == file.read_text(encoding="utf-8"), file.name


def test_operators_with_empty_bodies_are_never_emitted():
    for target in golden.TARGETS:
        names = {
            node.attr for node in ast.walk(ast.parse(golden.text(target))) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("torch.ops._C", "torch.ops._moe_C")
        }  # fmt: skip
        assert not names & set(STUBS), target
        assert bool(names) == (target == "xpu+kernels")


def test_vendors_stay_within_the_bar():
    found = sizes()
    assert {size.target for size in found} >= {"ascend", "cambricon", "cuda", "hygon", "kunlun"}
    for size in found:
        assert size.within and (size.entries > 0) == (size.target != "cuda"), size
