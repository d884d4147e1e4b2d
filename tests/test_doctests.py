"""The examples in docstrings print what they say they print."""
import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["mindrlhf.data.template", "mindrlhf.data.encode", "mindrlhf.errors",
                                  "mindrlhf.models.glm4.dimensions", "mindrlhf.report", "mindrlhf.score"])
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0, f"{name} has no example any more: take it off this list"
    assert result.failed == 0
