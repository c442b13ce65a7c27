import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hessian import (
    NonFiniteError,
    Objective,
    Operator,
    block_diagonal_operator,
    block_operator,
    hessian_operator,
    layer_slices,
    layer_table,
    leading_eigenspace,
)
from tests.cases import TiedAutoencoder, cases, seeded
from tests.oracles import dense, dense_derivatives, with_spectrum

A = with_spectrum([4.0, -3.0, 2.0, 1.0, 0.5])
F64 = torch.float64
CHOICES = {
    "slice": slice(1, 4),
    "strided slice": slice(None, None, 2),
    "open slice": slice(-2, None),
    "indices": torch.tensor([3, 0, 4]),
    "mask": torch.tensor([True, False, False, True, True]),
    "all": slice(None),
}


def slow(matrix):
    return Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, matrix.device)


@pytest.mark.parametrize("wrap", [slow, Operator.from_matrix])
@pytest.mark.parametrize("rows", CHOICES.values(), ids=CHOICES)
def test_blocks_are_the_principal_submatrices(rows, wrap):
    block = block_operator(wrap(A), rows)
    expected = A[rows][:, rows]
    torch.testing.assert_close(dense(block), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(block @ torch.eye(block.size, dtype=F64), expected)
    assert (block.columns is None) == (wrap is slow)


def test_a_block_has_its_own_eigenspace():
    block = block_operator(Operator.from_matrix(A), slice(1, 4))
    found = leading_eigenspace(block, k=3).values.sort().values
    torch.testing.assert_close(found, torch.linalg.eigvalsh(A[1:4, 1:4]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (slice(2, 2), "at least one row"),
        (slice(None, None, -1), "must go forwards"),
        (torch.tensor([0, 5]), "between 0 and 4, got 0 to 5"),
        (torch.tensor([-1, 2]), "between 0 and 4, got -1 to 2"),
        (torch.tensor([1, 1]), "must not choose a row twice"),
        (torch.tensor([[0, 1]]), r"at least one row, got shape \[1, 2\]"),
        (torch.zeros(5, dtype=torch.bool), "at least one row"),
        (torch.ones(4, dtype=torch.bool), r"5 truth values, got shape \[4\]"),
    ],
)
def test_rows_that_choose_no_block_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        block_operator(Operator.from_matrix(A), rows)


def test_rows_that_are_no_indices_are_refused():
    with pytest.raises(TypeError, match=r"integers or truth values, got torch\.float32"):
        block_operator(Operator.from_matrix(A), torch.tensor([1.0]))


def objective_of(model, width=4, outputs=3, **options):
    data = torch.zeros(2, width, dtype=F64), torch.zeros(2, outputs, dtype=F64)
    return Objective(model, nn.MSELoss(), data, **options)


def test_layers_are_the_modules_in_order():
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2, bias=False), nn.LayerNorm(2))
        )
    )
    objective = objective_of(model, outputs=2)
    assert layer_slices(objective) == {
        "0": slice(0, 15),
        "1.0": slice(15, 21),
        "1.1": slice(21, 25),
    }
    named = objective.unflatten(objective.weights())
    torch.testing.assert_close(objective.weights()[15:21], named["1.0.weight"].flatten())


def test_a_model_that_is_one_layer_is_the_root():
    assert layer_slices(objective_of(seeded(lambda: nn.Linear(4, 3)))) == {"(root)": slice(0, 15)}


def test_a_parametrized_weight_belongs_to_its_layer():
    model = seeded(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))))
    assert layer_slices(objective_of(model)) == {"0": slice(0, 18)}
    bare = seeded(lambda: parametrizations.weight_norm(nn.Linear(4, 3)))
    assert layer_slices(objective_of(bare)) == {"(root)": slice(0, 18)}


def test_tied_weights_count_once_where_they_come_first():
    objective = objective_of(seeded(TiedAutoencoder), outputs=4)
    assert layer_slices(objective) == {"encoder": slice(0, 20)}


def test_frozen_and_deselected_layers_are_left_out():
    objective = cases()["one layer by pattern"].objective()
    assert layer_slices(objective) == {"2": slice(0, 18)}


class Split(nn.Module):
    """A parametrized weight comes behind the child module that was there before it."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.child = nn.Linear(4, 3)
        parametrizations.weight_norm(self, "weight")

    def forward(self, x):
        return self.child(x) * self.weight + self.shift


def test_weights_of_a_module_that_are_apart_form_two_slices_that_do_not_overlap():
    objective = objective_of(seeded(Split))
    slices = layer_slices(objective)
    assert list(slices) == ["(root)", "child", "parametrizations.weight.original0"]
    covered = [i for s in slices.values() for i in range(s.start, s.stop)]
    assert covered == list(range(objective.size))


BLOCKED = [
    "tanh MLP",
    "CNN with frozen batch norm",
    "tied weights",
    "mapping batches",
    "two inputs",
]


@pytest.mark.parametrize("name", BLOCKED)
def test_block_diagonal_hessian_is_the_hessian_without_its_couplings(name):
    case = cases()[name]
    H = dense_derivatives(name)[3]
    expected = torch.zeros_like(H)
    objective = case.objective([8, 4])
    for s in layer_slices(objective).values():
        expected[s, s] = H[s, s]
    B = block_diagonal_operator(objective)
    torch.testing.assert_close(dense(B), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B @ torch.eye(B.size, dtype=F64), expected, rtol=1e-10, atol=1e-10)


def test_blocks_and_the_point_can_be_chosen():
    case = cases()["tanh MLP"]
    objective = case.objective()
    w = 0.5 * objective.weights()
    H = dense(hessian_operator(objective, w))
    expected = torch.zeros_like(H)
    halves = {"a": slice(0, 20), "b": slice(20, 43)}
    for s in halves.values():
        expected[s, s] = H[s, s]
    B = block_diagonal_operator(objective, w, blocks=halves)
    torch.testing.assert_close(dense(B), expected, rtol=1e-10, atol=1e-10)
    whole = block_diagonal_operator(objective, w, blocks={"all": slice(0, 43)})
    torch.testing.assert_close(dense(whole), H, rtol=1e-10, atol=1e-10)


def test_a_block_equals_the_hessian_of_the_objective_restricted_to_the_layer():
    case = cases()["tanh MLP"]
    s = layer_slices(case.objective())["2"]
    block = block_operator(hessian_operator(case.objective()), s)
    restricted = hessian_operator(cases()["one layer by pattern"].objective())
    torch.testing.assert_close(dense(block), dense(restricted), rtol=1e-10, atol=1e-12)


def test_the_regulariser_has_blocks_too():
    case = cases()["tanh MLP"]

    def coupling(named):
        return sum(p.sum() for p in named.values()) ** 2

    plain = dense(block_diagonal_operator(case.objective()))
    objective = Objective(case.model, case.criterion, case.data, regularizer=coupling)
    expected = torch.zeros_like(plain)
    for s in layer_slices(objective).values():
        expected[s, s] = 2.0
    torch.testing.assert_close(dense(block_diagonal_operator(objective)), plain + expected)


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"a": slice(0, 20)},
        {"a": slice(0, 20), "b": slice(21, 43)},
        {"a": slice(0, 20), "b": slice(19, 43)},
        {"b": slice(20, 43), "a": slice(0, 20)},
        {"a": slice(0, 43, 2)},
        {"a": slice(0, 20), "b": slice(20, 44)},
        {"a": slice(0, 20), "b": slice(20, 20), "c": slice(20, 43)},
    ],
)
def test_blocks_that_do_not_cover_the_weights_are_refused(blocks):
    with pytest.raises(ValueError, match="cover all 43 weights"):
        block_diagonal_operator(cases()["tanh MLP"].objective(), blocks=blocks)


def test_infinite_second_derivatives_are_refused():
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1e-300)
    data = torch.ones(2, 1).double(), torch.zeros(2, 1).double()
    objective = Objective(model, lambda o, t: o.pow(0.5).sum(dim=1), data)
    with pytest.raises(NonFiniteError):
        block_diagonal_operator(objective) @ torch.ones(1).double()


def test_a_block_keeps_the_rows_that_it_was_given():
    A = Operator.from_matrix(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    rows = torch.tensor([0, 2], dtype=torch.uint8)  # to torch's indexing, a mask
    block = block_operator(A, rows)
    rows[1] = 1
    assert (block @ torch.ones(2)).tolist() == [1.0, 3.0]


def test_parameters_without_entries_are_in_no_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model.insert(0, nn.Identity())
    model[0].register_parameter("nothing", nn.Parameter(torch.empty(0, dtype=F64)))
    objective = objective_of(model)
    assert list(layer_slices(objective)) == ["1", "3"]
    H, B = dense(hessian_operator(objective)), dense(block_diagonal_operator(objective))
    torch.testing.assert_close(B[:25, :25], H[:25, :25])
    assert [row.size for row in layer_table(objective, num_probes=2).rows] == [25, 18]
