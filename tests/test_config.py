"""Configurations check the type, the choices and the bounds of every field, wherever the values come from."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pytest

from common.config import Config, InputError, report_lengths, setting


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    name: str
    count: int = setting(3, ge=1, le=9)
    share: float = setting(0.5, gt=0, lt=1)
    scale: float = setting(1.0, ge=0)
    free: float = 0.0
    kind: Literal["a", "b"] = setting("a")
    flag: bool = False
    lengths: list[int] | None = setting(None, ge=1, unique=True)


def test_allowed_values_are_kept_and_numbers_of_numpy_become_python_s():
    made = Example(name="x", count=np.uint16(9), scale=np.float32(2), lengths=(np.int64(1), 4), free=math.inf)
    assert asdict(made) == {
        "name": "x", "count": 9, "share": 0.5, "scale": 2.0, "free": math.inf, "kind": "a", "flag": False,
        "lengths": [1, 4],
    }  # fmt: skip
    assert [type(value) for value in (made.count, made.scale, made.lengths[0])] == [int, float, int]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0; it must be in [1, 9]"),
        ({"count": 10}, "count is 10; it must be in [1, 9]"),
        ({"count": 2.0}, "count is 2.0; it must be of type int"),
        ({"count": True}, "count is True; it must be of type int"),
        ({"count": "2"}, "count is '2'; it must be of type int"),
        ({"share": 0}, "share is 0; it must be in (0, 1)"),
        ({"share": 1.0}, "share is 1.0; it must be in (0, 1)"),
        ({"scale": -0.1}, "scale is -0.1; it must be at least 0"),
        ({"scale": math.inf}, "scale is inf; it must be finite and at least 0"),
        ({"scale": math.nan}, "scale is nan; it must be finite and at least 0"),
        ({"count": 10**400}, f"count is {10**400}; it must be in [1, 9]"),
        ({"scale": None}, "scale is None; it must be of type float"),
        ({"kind": "c"}, "kind is 'c'; allowed: a, b"),
        ({"flag": 1}, "flag is 1; it must be of type bool"),
        ({"name": None}, "name is None; it must be of type str"),
        ({"lengths": 3}, "lengths is 3; it must be a list"),
        ({"lengths": []}, "lengths is []; give one or more values, each once"),
        ({"lengths": [2, 2]}, "lengths is [2, 2]; give one or more values, each once"),
        ({"lengths": [2, 0]}, "lengths is 0; it must be at least 1"),
    ],
)
def test_other_values_are_refused(change, message):
    with pytest.raises(InputError) as error:
        Example(**{"name": "x"} | change)
    assert str(error.value) == message


def test_lengths_of_a_report():
    assert report_lengths(None, 64, (1, 32, 128)) == [1, 32, 64]
    assert report_lengths([9, 2], 64, (1,)) == [2, 9]
    with pytest.raises(InputError, match=r"num_tokens has 65; this model has 1\.\.64"):
        report_lengths([65], 64, ())
