"""Where compensated pruning begins: at the dense network, or at what surgery leaves of it.

The dense network, calibration images and images held out are those of the plan that chooses
settings for LeNet-300-100 in ``pruning_tables.py``, whose folder is used. OBC (relative allocation,
pruned inputs) first takes a share of the weights away; compensated pruning goes on from there, in
the same stages as from the dense network beyond that share, and so with fewer products.
"""

import copy
from pathlib import Path

import torch
from pruning_tables import PLANS
from timing import report, say
from torch import Tensor

from flatvalley.dense_network import DenseNetwork, Measured, load_dense
from flatvalley.pruning_runs import stages_through
from flatvalley.studies.compare_cell import dense_config, training_folder
from flatvalley.train_config import file_name
from hessian import Objective
from pruning import KrylovSolver, compensated_prune
from pruning.obc import obc_traces

PLAN, SEED = "lenet-300-100", 100
SHARES = (0.0, 0.7, 0.85)
STAGES, PRODUCTS, TEMPERATURE = 24, 25, 4.0


def dense_network() -> DenseNetwork:
    """Return the dense network of the plan that chooses."""
    config = PLANS[PLAN].config(choosing=True)
    training = dense_config(config.training, SEED)
    folder = training_folder(Path("runs") / "pruning_tables" / f"choose-{PLAN}", training)
    return load_dense(
        training,
        folder / file_name(training.runs[0]) / "weights.safetensors",
        trained=training.specs[0],
        calibration=config.calibration,
        calibration_batch=config.calibration_batch,
    )


def main() -> None:
    """Print and keep the table."""
    torch.set_num_threads(1)
    dense = dense_network()
    problem = dense.problem()
    assert dense.data.validation is not None
    sparsities = PLANS[PLAN].sparsities
    heads = "".join(f"{share:>14.0%}" for share in sparsities)
    lines = [
        f"Accuracy in % and KL divergence on the images held out, seed {SEED}; "
        f"T={TEMPERATURE:g}, rows, {STAGES} stages in all, {PRODUCTS} products a stage.",
        "",
        f"  {'start':28}{heads}{'products':>10}",
    ]
    say("surgery")
    traces = obc_traces(problem.objective, problem.w)
    stages = stages_through(sparsities, STAGES)
    for share in SHARES:
        w = problem.w
        if share:
            w = traces.prune(share, "relative", inputs="pruned").weights
        say(f"from {share:.0%}")
        looked: dict[float, Measured] = {}

        def look(stage: object, w: Tensor, looked: dict[float, Measured] = looked) -> None:
            found = float((w == 0).double().mean())
            wanted = next((s for s in sparsities if abs(s - found) < 1e-4), None)
            if wanted is not None:
                model = copy.deepcopy(dense.model)
                Objective(model, dense.criterion, dense.batches).write_(w)
                looked[wanted] = dense.measure(model, dense.data.validation)

        pruned = compensated_prune(
            w,
            problem.distance(TEMPERATURE),
            sparsity=sparsities[-1],
            solver=KrylovSolver(preconditioner="rows", products=PRODUCTS),
            stages=[stage for stage in stages if stage > share + 0.01],
            on_stage=look,
        )
        cells = "".join(
            f"{100 * (looked[s].accuracy or 0.0):7.2f} {looked[s].distance:.4f}" for s in sparsities
        )
        title = f"OBC at {share:.0%}" if share else "the dense network"
        lines.append(f"  {title:28}{cells}{pruned.num_products:10}")
    report("pruning_start", [*(__doc__ or "").strip().splitlines(), "", *lines])


if __name__ == "__main__":
    main()
