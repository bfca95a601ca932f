import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.components import Constant, Embedding, Head, Mlp, Neuron, Pair, parse
from schemas.errors import ComponentError

numbers = st.integers(0, 10**9 - 1)
components = st.one_of(
    st.builds(Head, numbers, numbers),
    st.builds(Mlp, numbers),
    st.builds(Neuron, numbers, numbers),
    st.builds(Pair, numbers, numbers),
    st.just(Embedding()),
    st.just(Constant()),
)


@given(components)
def test_names_round_trip(component: object) -> None:
    assert parse(str(component)) == component


def test_names_are_written_as_documented() -> None:
    names = ["head:11.3", "mlp:4", "neuron:9.624", "pair:35.2", "embedding", "constant"]
    assert [str(parse(name)) for name in names] == names


@pytest.mark.parametrize(
    "name",
    ["", "head", "head:1", "head:1.2.3", "head:-1.2", "head:01.2", "mlp:1.2", "Head:1.2", "head:1.2 ", "x:1", "٣"],
)
def test_what_names_nothing_is_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(ComponentError, match=r"head:LAYER\.HEAD"):
        parse(name)
