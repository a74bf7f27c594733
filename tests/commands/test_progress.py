"""How long work says it will take."""

import pytest

from lowbit.commands.progress import spoken


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (59.6 * 60, "1 h 0 min"),
        (3600 * 3 + 60 * 20, "3 h 20 min"),
        (3600 * 84, "84 h 0 min"),
    ],
)
def test_durations_as_people_say_them(seconds: float, said: str) -> None:
    assert spoken(seconds) == said
