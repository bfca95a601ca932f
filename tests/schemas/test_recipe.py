import pytest

from schemas.errors import PlanError
from schemas.recipe import Recipe


def test_recipes_that_mean_the_same_are_equal() -> None:
    one = Recipe.of(["mlps", "heads", "mlps"], dtype="float16", precision="fp32")
    assert one == Recipe.of(["heads", "mlps"], dtype="float16", precision="fp32")
    assert Recipe.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("capture", "dtype", "precision", "wrong"),
    [
        (["heads", "feet"], "float16", "fp32", "feet"),
        ([], "float16", "fp32", "nothing"),
        (["heads"], "int8", "fp32", "int8"),
        (["heads"], "float16", "fp8", "fp8"),
    ],
)
def test_what_cannot_be_done_is_named(capture: list[str], dtype: str, precision: str, wrong: str) -> None:
    with pytest.raises(PlanError, match=wrong):
        Recipe.of(capture, dtype=dtype, precision=precision)
