"""The change table of docs/architecture.md is literally true."""

from __future__ import annotations

import pytest

from tests.harness.launch import launch


@pytest.mark.compile
@pytest.mark.ranks
def test_a_mask_a_layout_an_exchange_and_a_kernel_from_outside_the_package() -> None:
    said = launch("tests.extension_program")
    assert said.count("a mask, a layout, an exchange and a kernel from outside") == 2
