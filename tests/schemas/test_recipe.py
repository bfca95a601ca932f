import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import PlanError
from schemas.recipe import Recipe


def recipe(*capture: str, level: str = "coefficients") -> Recipe:
    return Recipe.of(capture, dtype="float16", precision="fp32", level=level)


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
        (["neurons:"], "float16", "fp32", "neurons: names no layers: write neurons:9, neurons:8-10"),
        (["neurons:9-8"], "float16", "fp32", "neurons:9-8 names no layers"),
        (["neurons:-1"], "float16", "fp32", "neurons:-1 names no layers"),
        (["direct:x"], "float16", "fp32", "direct:x names no layers"),
        (["heads:3"], "float16", "fp32", "heads is captured of all layers, without ':3'"),
    ],
)
def test_what_cannot_be_done_is_named(capture: list[str], dtype: str, precision: str, wrong: str) -> None:
    with pytest.raises(PlanError, match=wrong):
        Recipe.of(capture, dtype=dtype, precision=precision)


@given(layers=st.sets(st.integers(0, 40), min_size=1))
def test_any_set_of_layers_has_one_name_that_is_read_back(layers: set[int]) -> None:
    one = recipe("neurons:" + "+".join(map(str, layers)))
    assert one.layers("neurons") == tuple(sorted(layers))
    assert one == recipe(*(f"neurons:{layer}" for layer in layers))
    assert Recipe.from_json(one.to_json()) == one
    assert one.output_layers == one.layers("neurons")
    assert one.layers("direct") == ()


def test_all_layers_are_spelt_out_once_the_model_is_known() -> None:
    one = recipe("heads", "neurons", "direct:all").resolved({"neurons": 11, "direct": 12})
    assert one.capture == ("heads", "neurons:0-10", "direct:0-11")
    assert one == recipe("heads", "neurons:0-10", "direct:0-11").resolved({"neurons": 11, "direct": 12})
    with pytest.raises(PlanError, match="cannot capture neurons:9-11: layers 0 to 10 of this model have such neurons"):
        recipe("neurons:9-11").resolved({"neurons": 11, "direct": 12})


def test_levels_are_of_neurons() -> None:
    with pytest.raises(PlanError, match="only neurons can be kept as scores: add neurons:LAYERS"):
        recipe("direct:1", level="scores")
    with pytest.raises(PlanError, match="cannot keep neurons as 'sums': choose from coefficients, scores, significant"):
        recipe("neurons:1", level="sums")
