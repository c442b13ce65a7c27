"""``flatvalley prune`` as a user runs it, against plain torch and hand-made rankings."""

import contextlib
import itertools
import json
import math
import os
import re
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from flatvalley.dense_network import load_dense
from flatvalley.fine_tuning import fine_tune_
from flatvalley.pruners import alternatives, pruner
from flatvalley.pruning_methods import METHODS
from flatvalley.pruning_problem import PruningProblem
from flatvalley.pruning_runs import SUPPORTS, stages_through
from flatvalley.sparse_weights import load_sparse_weights
from flatvalley.studies.prune_sources import from_train_run
from flatvalley.train_config import TrainConfig
from flatvalley.training import train
from hessian import ConvergenceWarning, NonFiniteError
from pruning import CalibrationWarning, net_trim, net_trim_to_sparsities
from tests.program import flatvalley, rows

MODULE = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3))


def other():
    return nn.Sequential(nn.Linear(6, 21), nn.BatchNorm1d(21), nn.Tanh(), nn.Linear(21, 3))


def samples():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    return (x[:200], y[:200]), (x[200:], y[200:])


def exploding():
    return lambda output, target: float("inf") * output.sum()
"""
NET = "own_prune:net"
DATA = "--data=own_prune:samples"
SIZE = 6 * 20 + 20 + 20 + 20 + 20 * 3 + 3
FAST = "krylov:products=8,stages=3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the user's module, as the current one."""
    path = tmp_path_factory.mktemp("user")
    (path / "own_prune.py").write_text(MODULE)
    with contextlib.chdir(path), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield path
    sys.modules.pop("own_prune", None)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Only those of the folder that all tests share."""
    monkeypatch.setattr("flatvalley.commands.prune.draw_pruning", lambda findings, run: [])


@pytest.fixture(scope="module")
def trained(folder):
    """The folder of a training: of a small network with batch norm, by SGD and by gRDA."""
    config = TrainConfig(
        model=NET,
        data=DATA.removeprefix("--data="),
        runs=("grda:c=0.01", "sgd"),
        epochs=20,
        batch_size=20,
        lr=0.2,
    )
    train(config, folder / "trained")
    return folder / "trained"


@pytest.fixture(scope="module")
def pruned(folder, trained):
    """The folder of a pruning of it, and what was printed."""
    out = folder / "pruned"
    status, printed, errors = flatvalley(
        "prune", trained, f"--method={FAST}", "--sparsity=0.7", f"--out={out}"
    )
    assert status == 0, errors
    return out, printed


def network(path):
    import own_prune

    model = own_prune.net()
    model.load_state_dict(load_file(path))
    return model.eval()


def samples():
    import own_prune

    return own_prune.samples()


def flat(path):
    return torch.cat([p.detach().flatten() for p in network(path).parameters()])


def test_the_weights_are_a_plain_state_with_exactly_the_zeros_wanted(trained, pruned):
    out, _ = pruned
    w = flat(out / "weights.safetensors")
    assert len(w) == SIZE
    assert int((w == 0).sum()) == math.ceil(0.7 * SIZE)
    plain, compact = load_file(out / "weights.safetensors"), out / "sparse.safetensors"
    assert all(torch.equal(t, plain[name]) for name, t in load_sparse_weights(compact).items())
    assert load_sparse_weights(compact).keys() == plain.keys()


def test_the_network_that_was_pruned_is_left_as_it_was(folder, trained):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    status, _, errors = flatvalley(
        "prune", trained, "--method=magnitude", f"--out={folder / 'untouched'}"
    )
    assert status == 0, errors
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_loss_accuracy_and_distance_are_those_of_the_files(trained, pruned):
    out, _ = pruned
    results = json.loads((out / "run.json").read_text())["results"]
    _, (x, y) = samples()
    with torch.no_grad():
        z_dense = network(trained / "sgd" / "weights.safetensors")(x)
        z = network(out / "weights.safetensors")(x)
    for name, logits in (("dense", z_dense), ("pruned", z)):
        assert results[name]["loss"] == pytest.approx(float(cross_entropy(logits, y)), rel=1e-5)
        assert results[name]["accuracy"] == float((logits.argmax(1) == y).double().mean())
    expected = kl_div(
        z.log_softmax(1), z_dense.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert results["pruned"]["distance"] == pytest.approx(float(expected), rel=1e-4)
    assert results["dense"]["distance"] == 0.0
    assert results["pruned"]["sparsity"] == pytest.approx(math.ceil(0.7 * SIZE) / SIZE)


def test_report_and_summary_say_what_the_tables_say(pruned):
    out, printed = pruned
    html = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    table = {row["network"]: row for row in rows(out / "tables" / "networks.csv")}
    for network_row in table.values():
        shown = f"{100 * float(network_row['accuracy']):.2f} %"
        assert shown in printed
        assert shown in html
    assert int(table["pruned"]["products"]) == sum(
        int(row["num_products"]) for row in rows(out / "tables" / "stages.csv")
    )
    layers = rows(out / "tables" / "layers.csv")
    left = {name: int((p != 0).sum()) for name, p in network_parameters(out)}
    assert {row["parameter"]: int(row["left"]) for row in layers} == left
    for name in ("layers", "stages"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (out / "figures" / f"{name}.pdf").exists()
    assert "It saw 200 training samples, without their labels." in html


def network_parameters(out):
    return network(out / "weights.safetensors").named_parameters()


def test_statistics_of_batch_norm_are_renewed_unless_one_says_no(folder, trained):
    (x, _), _ = samples()
    kept = ["--method=magnitude", "--sparsity=0.6"]
    for name, options in (("renewed", []), ("kept", ["--no-recalibrate"])):
        status, _, errors = flatvalley("prune", trained, *kept, *options, f"--out={folder / name}")
        assert status == 0, errors
    dense = network(trained / "sgd" / "weights.safetensors")
    renewed, old = (network(folder / name / "weights.safetensors") for name in ("renewed", "kept"))
    assert torch.equal(old[1].running_mean, dense[1].running_mean)
    assert torch.equal(renewed[0].weight, old[0].weight)
    with torch.no_grad():
        torch.testing.assert_close(renewed[1].running_mean, renewed[0](x).mean(0))
        torch.testing.assert_close(renewed[1].running_var, renewed[0](x).var(0))


def test_magnitude_keeps_the_largest_as_they_are(folder, trained):
    w = flat(trained / "sgd" / "weights.safetensors")
    found = flat(folder / "renewed" / "weights.safetensors")
    kept = w.abs().argsort(descending=True)[: SIZE - math.ceil(0.6 * SIZE)]
    expected = torch.zeros_like(w)
    expected[kept] = w[kept]
    assert torch.equal(found, expected)


def test_a_model_of_the_users_own_gives_what_its_run_gives(folder, trained):
    out = folder / "own"
    weights = trained / "sgd" / "weights.safetensors"
    options = ["--method=magnitude", "--sparsity=0.6", f"--weights={weights}", DATA]
    status, _, errors = flatvalley("prune", NET, *options, f"--out={out}")
    assert status == 0, errors
    assert torch.equal(
        flat(out / "weights.safetensors"), flat(folder / "renewed" / "weights.safetensors")
    )


def test_excluded_parameters_and_shares_by_pattern_are_kept(folder, trained):
    out = folder / "shares"
    status, _, errors = flatvalley(
        "prune",
        trained,
        "--method=magnitude",
        "--sparsity=0.5",
        "--exclude=*.bias",
        "--exclude=1.*",
        "--allocation=3.weight=0.25",
        f"--out={out}",
    )
    assert status == 0, errors
    zeros = {name: int((p == 0).sum()) for name, p in network_parameters(out)}
    assert zeros["3.weight"] == 15
    assert sum(zeros.values()) == math.ceil(0.5 * SIZE) == zeros["0.weight"] + 15


def test_another_run_of_the_folder_can_be_named(folder, trained):
    out = folder / "from_grda"
    status, printed, errors = flatvalley(
        "prune", trained, "--run=grda:c=0.01", "--method=magnitude", f"--out={out}"
    )
    assert status == 0, errors
    dense = flat(trained / "grda_c0.01" / "weights.safetensors")
    already = float((dense == 0).double().mean())
    assert 0 < already < 0.9
    assert f"{100 * already:.2f} %" in printed


def test_few_calibration_samples_are_told(folder, trained):
    status, printed, errors = flatvalley(
        "prune",
        trained,
        f"--method={FAST}",
        "--calibration=4",
        "--sparsity=0.3",
        f"--out={folder / 'few'}",
    )
    assert status == 0, errors
    assert "fewer calibration rows" in printed.replace("\n", " ")
    assert "fewer calibration rows" in (folder / "few" / "report.html").read_text()


def test_what_is_cut_off_leaves_no_weights(folder, trained, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("flatvalley.studies.prune.model_state", interrupted)
    out = folder / "cut"
    status, _, errors = flatvalley("prune", trained, "--method=magnitude", f"--out={out}")
    assert status == 130
    assert "interrupted" in errors
    assert not list(out.rglob("*.safetensors"))
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    monkeypatch.undo()
    assert flatvalley("prune", trained, "--method=magnitude", f"--out={out}")[0] == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--sparsity=-0.1"], 2, "`sparsity` must be in (0, 1), the share of zeros, got -0.1"),
        (["--sparsity=1"], 2, "`sparsity` must be in (0, 1)"),
        (["--method=nonsense"], 2, "`method` must begin with one of random, magnitude"),
        (["--method=krylov:colour=3"], 2, "`method` krylov takes"),
        (["--method=krylov:products=x"], 2, "`method` needs a whole number for products"),
        (["--method=krylov:temperature=-1"], 2, "`temperature` must be positive and finite"),
        (["--method=net-trim:refit=yes"], 2, "`method` needs true or false for refit"),
        (["--method=net-trim:mode=serial"], 2, "`mode` must be one of parallel, cascade, got"),
        (["--method=net-trim:ball=big"], 2, "`ball` must be one of split, joint, got"),
        (["--method=net-trim:precision=half"], 2, "`precision` must be one of full, mixed, got"),
        (["--method=net-trim:gamma=0.9"], 2, "`gamma` must be finite and at least 1"),
        (["--method=net-trim:within=-1"], 2, "`within` must be finite and at least 0"),
        (["--method=net-trim:max_tries=0"], 2, "`max_tries` must be positive"),
        (["--method=net-trim"], 2, "`sparsity` must be at most 0.7407407407"),
        (["--method=net-trim", "--allocation=uniform"], 2, "`allocation` cannot go with net-trim"),
        (["--method=eigenspace:k=0"], 2, "`k` must be at least 1, got 0"),
        (["--method=dp-projector:k=500"], 2, "needs k at most 243, the number of weights, got 500"),
        (["--method=path:k=5", "--exclude=*.bias"], 2, "`exclude` cannot go with path"),
        (["--method=wanda", "--allocation=uniform"], 2, "`allocation` cannot go with wanda"),
        (["--method=magnitude", "--allocation=*=x"], 2, "PATTERN=SHARE"),
        (["--method=magnitude", "--exclude=nothing"], 2, '`exclude` pattern "nothing" matches'),
        (["--method=magnitude", "--exclude=0.weight"], 2, "`sparsity` must be at most 0.506"),
        (["--method=path:k=100", "--sparsity=0.99"], 2, "Take fewer eigenpairs"),
        (["--calibration=201"], 2, "`calibration` must be at most 200"),
        (["--calibration=0"], 2, "`calibration` must be at least 1, got 0"),
        (["--run=adam"], 2, "`run` must be one of grda:c=0.01, sgd, got adam"),
        ([DATA], 2, "`data` cannot go with the folder of a run"),
        (["--device=nowhere"], 2, "`device` must be one that is here"),
        (["--fine-tune=-1"], 2, "`fine_tune` must be at least 0"),
        (["--fine-tune-lr=0.1"], 2, "and go with `fine_tune`"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    folder, trained, tmp_path, options, status, message
):
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an eigenspace may stop early on its way to a refusal
        found, _, errors = flatvalley("prune", trained, *options, f"--out={out}")
    assert found == status, errors
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_prune:net"], "`data` must be given with a model"),
        (["own_prune:net", DATA, "--weights=nothing.safetensors"], "there is no file nothing"),
        (["own_prune:other", DATA, "--weights=WEIGHTS"], "does not fit the model"),
        (["own_prune:nothing", DATA], "which has no `nothing`"),
        (["nonsense", DATA], "or one of digits-mlp, lenet-300-100"),
        (["own_prune:net", "--data=digits"], "must be able to evaluate `data` digits"),
        (["own_prune:net", DATA, "--run=sgd"], "`run` names a run of a folder"),
        (["EMPTY"], "there is no"),
        (["OTHER"], "is one of the study 'verify'"),
        (["DAMAGED"], "is damaged"),
        (["UNFINISHED"], "Let `flatvalley train` finish"),
    ],
)
def test_a_network_that_cannot_be_pruned_is_one_line_too(
    folder, trained, tmp_path, arguments, message
):
    for name in ("EMPTY", "OTHER", "DAMAGED", "UNFINISHED"):
        (tmp_path / name).mkdir()
    (tmp_path / "OTHER" / "run.json").write_text('{"study": "verify", "config": {}}')
    (tmp_path / "DAMAGED" / "run.json").write_text('{"study"')
    (tmp_path / "UNFINISHED" / "run.json").write_text((trained / "run.json").read_text())
    places = {name: str(tmp_path / name) for name in ("EMPTY", "OTHER", "DAMAGED", "UNFINISHED")}
    places["--weights=WEIGHTS"] = f"--weights={trained / 'sgd' / 'weights.safetensors'}"
    status, _, errors = flatvalley(
        "prune", *[places.get(a, a) for a in arguments], f"--out={tmp_path / 'out'}"
    )
    assert status == 2, errors
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_weights_that_are_not_finite_end_with_status_3(folder, trained, tmp_path):
    weights = load_file(trained / "sgd" / "weights.safetensors")
    weights["0.weight"][1, 2] = math.nan
    save_file(weights, tmp_path / "nan.safetensors")
    status, _, errors = flatvalley(
        "prune", NET, DATA, f"--weights={tmp_path / 'nan.safetensors'}", f"--out={tmp_path / 'out'}"
    )
    assert status == 3
    assert "`weights` must be finite, but 0.weight holds a NaN" in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_pruning_is_refused(pruned, trained):
    out, _ = pruned
    before = (out / "weights.safetensors").read_bytes()
    status, _, errors = flatvalley(
        "prune", trained, f"--method={FAST}", "--sparsity=0.6", f"--out={out}"
    )
    assert status == 2
    assert "holds a run with other settings (sparsity differ)" in errors
    assert (out / "weights.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def dense(trained):
    source = from_train_run(trained)
    return load_dense(source.config, source.weights, trained=source.trained, calibration_batch=90)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reaches_every_sparsity_and_leaves_everything_as_it_was(dense, name):
    before = [t.clone() for t in dense.model.state_dict().values()]
    state = torch.get_rng_state()
    small = {"k": "k=6", "stages": "stages=2", "products": "products=6"}
    small |= {"tol": "tol=0.1"} if name == "dp-filter" else {}
    settings = ",".join(v for key, v in small.items() if key in METHODS[name].settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        found = list(pruner(f"{name}:{settings}").prune(dense.problem(), [0.3, 0.6]))
    assert [point.sparsity for point in found] == [0.3, 0.6]
    for point in found:
        assert int((point.weights == 0).sum()) == math.ceil(point.sparsity * SIZE)
        assert point.seconds >= 0.0
    if METHODS[name].calibrates and name not in ("obc", "wanda"):
        counts = [point.products + point.gradients + point.iterations for point in found]
        assert counts[1] > 0
        assert found[1].products >= found[0].products
        assert (counts[1] == found[1].iterations) == (name == "net-trim")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, dense.model.state_dict().values(), before))
    assert not dense.model.training
    assert all(p.grad is None for p in dense.model.parameters())


def test_net_trim_takes_its_settings_and_those_of_the_problem(dense):
    problem = dense.problem(exclude=("0.*",))
    given = {"ball": "joint", "within": 0.1, "tol": 1e-3, "precision": "mixed"}
    inputs = [(x,) for x, _ in problem.batches]
    for text, settings in (
        ("net-trim:ball=joint,within=0.1", {"mode": "cascade", "refit": True}),
        (
            "net-trim:ball=joint,within=0.1,mode=parallel,refit=false,max_tries=1",
            {"mode": "parallel", "refit": False, "max_tries": 1},
        ),
    ):
        tries = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            found = list(pruner(text).prune(problem, [0.1, 0.2]))
            direct = net_trim_to_sparsities(
                problem.model,
                inputs,
                [0.1, 0.2],
                exclude="0.*",
                on_try=tries.append,
                **(given | settings),
            )
            assert all(
                torch.equal(a.weights, b.weights) for a, b in zip(found, direct, strict=True)
            )
        assert found[1].trim.trim.mode == settings["mode"]
        # All tries up to there count, not only that which was taken.
        counts = [sum(own.iterations for own in trim.layers[0].trims) for trim in tries]
        assert found[1].iterations == sum(counts)
        assert found[1].seconds > found[0].seconds


def test_more_zeros_than_wanted_are_told(dense):
    sparse = dense.with_weights(dense.problem().w, recalibrate=False)
    with torch.no_grad():
        sparse[0].weight[:15] = 0.0  # outputs that are always the same
        sparse[0].weight[:15, 0] = 1e-9
    problem = PruningProblem(sparse.eval(), dense.criterion, dense.batches)
    with pytest.warns(ConvergenceWarning, match=r"gave a share of 0\.\d+ zeros where 0\.35 was"):
        (found,) = pruner("net-trim:refit=false,max_tries=2").prune(problem, [0.35])
    assert int((found.weights == 0).sum()) > math.ceil(0.35 * SIZE)


def test_what_net_trim_measured_is_in_tables_and_report(folder, trained):
    out = folder / "trimmed"
    status, printed, errors = flatvalley(
        "prune", trained, "--method=net-trim:max_tries=1", "--sparsity=0.6", f"--out={out}"
    )
    assert status == 0, errors
    record = json.loads((out / "run.json").read_text())
    evidence = record["net_trim"]
    table = {row["weight"]: row for row in rows(out / "tables" / "trimmed_layers.csv")}
    assert list(table) == ["0.weight", "3.weight"]
    source = from_train_run(trained)
    dense = load_dense(source.config, source.weights, trained=source.trained)
    trim = net_trim(
        dense.model,
        [(x,) for x, _ in dense.batches],
        epsilon=evidence["epsilon"],
        mode="cascade",
        refit=True,
        precision="mixed",
        tol=1e-3,
    )
    for layer in trim.layers:
        row = table[layer.weight]
        for name in ("epsilon", "discrepancy", "output_discrepancy", "violation", "density"):
            expected = getattr(layer, name)
            assert float(row[name]) == pytest.approx(expected, rel=1e-4, abs=1e-6), name
        assert row["reason"] == layer.reason and row["converged"] == "True"
    assert evidence["discrepancy"] == pytest.approx(trim.discrepancy, rel=1e-4)
    assert evidence["output_norm"] == pytest.approx(trim.output_norm, rel=1e-6)
    assert trim.bound is not None and trim.discrepancy <= trim.bound
    assert evidence["bound"] == pytest.approx(trim.bound, rel=1e-4)
    x = torch.cat([inputs for inputs, _ in dense.batches])
    cut = dense.with_weights(flat(out / "weights.safetensors"), recalibrate=False)
    with torch.no_grad():
        off = float((cut(x) - dense.model(x)).norm())
    assert evidence["discrepancy_after_cut"] == pytest.approx(off, rel=1e-4)
    assert evidence["weights_cut"] == math.ceil(0.6 * SIZE) - int((~trim.mask).sum()) > 0
    html = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    assert "What Net-Trim measured on every layer" in html
    assert "prove that it is at most" in html
    assert "Iterations of the layers' programs" in html.replace("&#x27;", "'").replace("&#39;", "'")
    networks = {row["network"]: row for row in rows(out / "tables" / "networks.csv")}
    iterations = int(networks["pruned"]["iterations"])
    assert iterations >= sum(int(row["iterations"]) for row in table.values())
    assert iterations == record["cost"]["iterations"]
    assert f"{iterations:,}" in printed


@pytest.mark.parametrize("after", SUPPORTS)
def test_compensated_weights_have_the_zeros_of_the_method_before_and_come_nearer(dense, after):
    problem = dense.problem()
    first, how = SUPPORTS[after]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        before = list(first(problem, [0.3, 0.6], how))
        found = list(pruner(f"compensated:after={after},products=6").prune(problem, [0.3, 0.6]))
    distance = problem.distance()
    for was, moved in zip(before, found, strict=True):
        assert torch.equal(moved.weights == 0, was.weights == 0)
        assert distance.loss(moved.weights) < distance.loss(was.weights)
        assert moved.products - was.products in range(1, 7)
        assert moved.gradients == was.gradients
        assert moved.iterations == was.iterations
        assert moved.trim is None


def test_another_method_before_is_refused():
    with pytest.raises(ValueError, match="`after` must be one of magnitude, net-trim, obc"):
        pruner("compensated:after=krylov")


def test_calibration_samples_are_all_the_training_samples_once(dense):
    (x, y), _ = samples()
    seen = torch.cat([inputs for inputs, _ in dense.batches])
    assert dense.problem().num_samples == len(x) == len(seen)
    assert torch.equal(seen.sort(0).values, x.sort(0).values)
    labels = dict(zip(map(tuple, x.tolist()), y.tolist(), strict=True))
    drawn = torch.cat([targets for _, targets in dense.batches]).tolist()
    assert [labels[tuple(row)] for row in seen.tolist()] == drawn


def test_the_filter_takes_the_time_that_the_training_had(dense):
    assert dense.training_time == pytest.approx(0.2 * 20 * 10)
    problem = dense.problem()
    by_default, by_hand = (
        next(iter(pruner(text).prune(problem, [0.4]))).weights
        for text in ("dp-filter:tol=0.1", "dp-filter:tol=0.1,time=40,mu=0.6")
    )
    assert torch.equal(by_default, by_hand)
    unknown = PruningProblem(dense.model, dense.criterion, dense.batches)
    with pytest.raises(ValueError, match="Give it: dp-filter:time="):
        list(pruner("dp-filter").prune(unknown, [0.4]))


def test_compensation_stays_nearer_to_the_dense_outputs_than_magnitude(dense):
    problem = dense.problem()
    distance = problem.distance()
    krylov, magnitude = (
        distance.loss(next(iter(pruner(text).prune(problem, [0.6]))).weights)
        for text in ("krylov:products=30,stages=4", "magnitude")
    )
    assert krylov < 0.5 * magnitude


def test_sparsities_must_increase_and_not_go_below_the_zeros_there_are(dense):
    problem = dense.problem()
    with pytest.raises(ValueError, match=r"`sparsities` must increase, got 0\.6, 0\.3"):
        pruner("magnitude").prune(problem, [0.6, 0.3])
    with pytest.raises(ValueError, match="one or more shares"):
        pruner("magnitude").prune(problem, [])
    sparse = dense.with_weights(
        torch.where(problem.w.abs() > problem.w.abs().median(), problem.w, 0.0), recalibrate=False
    )
    half = PruningProblem(sparse.eval(), dense.criterion, dense.batches)
    with pytest.raises(ValueError, match=r"`sparsity` must be at least 0\.50.*do not come back"):
        pruner("magnitude").prune(half, [0.4])


@pytest.mark.parametrize(
    ("sparsities", "count"),
    [([0.9], 1), ([0.9], 7), ([0.5, 0.9, 0.99], 12), ([0.3, 0.31, 0.95], 4), ([0.999], 3)],
)
def test_no_stage_removes_more_than_equal_stages_would(sparsities, count):
    found = stages_through(sparsities, count)
    assert set(sparsities) <= set(found)
    assert found == sorted(set(found))
    assert len(found) <= count + len(sparsities) - 1
    most = 1 - (1 - sparsities[-1]) ** (1 / count)
    left = [1.0] + [1 - share for share in found]
    removed = [1 - b / a for a, b in itertools.pairwise(left)]
    assert max(removed) <= most + 1e-9


def test_alternatives_are_every_combination_in_order():
    assert alternatives("magnitude") == ["magnitude"]
    assert alternatives("krylov:temperature=1|4,products=20|50") == [
        "krylov:temperature=1,products=20",
        "krylov:temperature=1,products=50",
        "krylov:temperature=4,products=20",
        "krylov:temperature=4,products=50",
    ]


def test_a_network_with_shared_weights_keeps_them_shared(folder, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)
            self.b = nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    import own_prune

    own_prune.tied = Tied
    options = ["--method=magnitude", "--sparsity=0.5"]
    status, _, errors = flatvalley("prune", "own_prune:tied", DATA, *options, f"--out={tmp_path}/o")
    assert status == 0, errors
    found = load_file(tmp_path / "o" / "weights.safetensors")
    assert set(found) == {"a.weight"}
    assert int((found["a.weight"] == 0).sum()) == 18


def test_fine_tuning_keeps_the_zeros_and_lowers_the_loss(folder, trained):
    out = folder / "tuned"
    common = ["--method=magnitude", "--sparsity=0.8", "--fine-tune=3"]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    status, printed, errors = flatvalley("prune", trained, *common, f"--out={out}")
    assert status == 0, errors
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    networks = {row["network"]: row for row in rows(out / "tables" / "networks.csv")}
    assert float(networks["tuned"]["loss"]) < float(networks["pruned"]["loss"])
    assert f"{100 * float(networks['tuned']['accuracy']):.2f} %" in printed
    w = flat(trained / "sgd" / "weights.safetensors")
    found = flat(out / "weights.safetensors")
    gone = w.abs().argsort()[: math.ceil(0.8 * SIZE)]
    assert torch.equal((found == 0).nonzero()[:, 0], gone.sort().values)
    assert not torch.equal(found[found != 0], w[found != 0])
    _, (x, y) = samples()
    with torch.no_grad():
        loss = float(cross_entropy(network(out / "weights.safetensors")(x), y))
    assert float(networks["tuned"]["loss"]) == pytest.approx(loss, rel=1e-5)
    assert "trained on for 3 epochs" in (out / "report.html").read_text()


def test_fine_tuning_that_explodes_is_told_and_leaves_nothing_behind(folder, dense):
    config = TrainConfig(
        model=NET,
        data=DATA.removeprefix("--data="),
        runs=("sgd",),
        criterion="own_prune:exploding",
        schedule="step:at=8",
        epochs=10,
    )
    model = dense.with_weights(dense.problem().w, recalibrate=False)
    threads = torch.get_num_threads()
    with pytest.raises(NonFiniteError, match=r"`.*` did not stay finite in fine-tuning\. Give a"):
        fine_tune_(model, config, None, epochs=1)
    assert torch.get_num_threads() == threads
    assert not model.training
