import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: f"block{BLOCKS.index(code)}")
def test_examples_run(code):
    exec(compile(code, str(README), "exec"), {})


def test_there_are_examples():
    assert len(BLOCKS) >= 2
