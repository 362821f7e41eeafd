"""What the tests stand on: the comparison with a reference twin, and made-up routings."""

from __future__ import annotations

import pytest
import torch

from cases import ROUTINGS, make_rows, make_topk_ids
from compare import FLOOR, assert_matches_reference, element_error, relative_error

pytestmark = pytest.mark.cpu


def product(rows, weight):
    return rows @ weight


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_few_wrong_elements_among_many_are_noticed(dtype, width):
    """One element, and one vector of a kernel, in place of which stands another: too few for the norm."""
    args = (make_rows(2000, 32, dtype=dtype, seed=1), make_rows(32, 600, dtype=dtype, seed=2))
    assert_matches_reference(product, product, args)
    right = product(*args)

    def wrong(rows, weight):
        output = product(rows, weight)
        output[123, 64 : 64 + width] = output[321, 8 : 8 + width]
        return output

    if dtype == torch.bfloat16:
        assert relative_error(wrong(*args), right) < FLOOR[dtype]
    with pytest.raises(AssertionError, match=r"element is off|relative error"):
        assert_matches_reference(wrong, product, args)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_one_unwritten_element_is_noticed(value):
    args = (make_rows(500, 32, dtype=torch.bfloat16, seed=1), make_rows(32, 600, dtype=torch.bfloat16, seed=2))
    place = product(*args).abs().argmax()

    def wrong(rows, weight):
        output = product(rows, weight)
        output.view(-1)[place] = value
        return output

    with pytest.raises(AssertionError):
        assert_matches_reference(wrong, product, args)


def test_error_of_an_element():
    exact = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert element_error(exact, exact) == 0 and element_error(exact[:0], exact[:0]) == 0
    assert element_error(torch.tensor([3.0, 4.0, 0.5, 0.0]), exact) == pytest.approx(0.5 / 2.5)
    assert element_error(torch.zeros(3), torch.zeros(3)) == 0 and element_error(torch.ones(3), torch.zeros(3)) > 1
    assert not element_error(torch.tensor([torch.nan]), torch.ones(1)) <= 1


@pytest.mark.parametrize("routing", ["cpu", "Uniform", "real"])
def test_an_unknown_routing_names_the_choices(routing):
    with pytest.raises(ValueError, match=f"routing: expected one of {', '.join(ROUTINGS)}, got '{routing}'"):
        make_topk_ids(4, 4, 2, routing)
