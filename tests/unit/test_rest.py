"""Work that can be put off rests in proportion to the CPU time that it needed."""

import pytest

from fedmoe.util.rest import Rest


def test_the_rest_is_in_proportion_to_the_work() -> None:
    now, cpu = [100.0], [5.0]
    rest = Rest(9.0, clock=lambda: now[0], cpu_clock=lambda: cpu[0])
    assert rest.is_over
    with rest.after():
        cpu[0] += 0.5
        now[0] += 2.0
    assert not rest.is_over
    now[0] += 4.4
    assert not rest.is_over
    now[0] += 0.1
    assert rest.is_over


def test_work_that_fails_needs_its_rest_too() -> None:
    cpu = iter([0.0, 1.0])
    rest = Rest(9.0, clock=lambda: 0.0, cpu_clock=lambda: next(cpu))
    with pytest.raises(ValueError, match="broke"), rest.after():
        raise ValueError("broke")
    assert not rest.is_over
