"""The loop of a training: steps, readings, evaluations, checkpoints; and how it goes on."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flatvalley.checkpoints import Checkpoints, content
from flatvalley.divergence import all_finite, locate
from flatvalley.evaluation import evaluate
from flatvalley.process_group import sum_over_ranks
from flatvalley.run import Row, Run
from flatvalley.schedules import horizon_by_time, schedule
from flatvalley.snapshots import snapshot_steps, write_snapshot
from flatvalley.starts import start_trainees, try_out
from flatvalley.surroundings import everything_put_back, seed_noise, warnings_noted
from flatvalley.train_config import TrainConfig
from flatvalley.train_data import Part, TrainData
from flatvalley.train_logs import TrainLog
from flatvalley.trainees import Trainee
from hessian import NonFiniteError

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with the steps done, the steps in all, and each run's loss when it was last read."""


class Training:
    """The state of a training between two steps.

    Args:
        config: Settings, with the device of this process.
        data: The samples.
        make_model: Returns the same freshly started model at every call.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If the model cannot be evaluated on the data, or starts elsewhere at each call.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainData,
        make_model: Callable[[], nn.Module],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.data, self._make_model = config, data, make_model
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(data.train.batches)
        self.num_steps = config.epochs * self.steps_per_epoch
        self._epoch_samples = min(data.train.num_samples, self.steps_per_epoch * config.batch_size)
        self._factor = schedule(
            config.schedule,
            epochs=config.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup=config.warmup,
        )
        self.step = 0
        self.notes: list[str] = []
        self.log = TrainLog(None)
        self.threads = config.threads or torch.get_num_threads()
        self._checkpoints: Checkpoints | None = None
        self._checkpoint_seconds = math.inf
        self._run: Run | None = None
        self._snapshots = snapshot_steps(config, self.num_steps)
        with self.everything_put_back():
            self.trainees = self._start()
            self._classifies = try_out(self.trainees[0], config, data)
        count = len(self.trainees)
        # Sums since the last reading, on the device: of losses and of right answers.
        self._sums = torch.zeros(count, 2, dtype=torch.float64, device=config.device)
        self._cells = [(self._sums[i, 0], self._sums[i, 1]) for i in range(count)]
        self._read_step = 0
        self._epoch_sums = [[0.0, 0.0] for _ in range(count)]
        self._losses: dict[str, float] = {}
        self._seconds = 0.0
        self._began = self._saved = time.monotonic()
        self._last_factor = math.nan

    def keep_in(
        self,
        run: Run | None,
        checkpoints: Checkpoints | None,
        checkpoint_seconds: float,
        *,
        tensorboard: bool = False,
    ) -> None:
        """Write into a folder from now on, and go on from the state that it holds, if any.

        Raises:
            ValueError: If the checkpoint belongs to another training, or the processes do not
                see the same folder.
            DamagedFileError: If there are checkpoints, but none is whole.
        """
        self.log = TrainLog(run, tensorboard=tensorboard)
        self._run, self._checkpoints = run, checkpoints
        self._checkpoint_seconds = checkpoint_seconds
        found = None if checkpoints is None else checkpoints.latest()
        if found is not None:
            self._load(found.state)
            for damaged in found.damaged:
                self._note(f"Passed over a damaged checkpoint: {damaged}.")
        steps = torch.zeros(self.world_size, device=self.config.device)
        steps[self.rank] = self.step
        found_steps = sum_over_ranks(steps).tolist()
        if len(set(found_steps)) > 1:
            raise ValueError(
                "`folder` must be one that all processes can read, but they found checkpoints of "
                f"steps {', '.join(f'{step:.0f}' for step in found_steps)}. Use a shared folder."
            )

    def go_on(self, progress: Progress | None = None) -> None:
        """Train from where the state is to the end.

        Raises:
            NonFiniteError: If a loss, a gradient or a weight is not finite.
            StorageError: If a file cannot be written.
        """
        if self.step == 0:
            self._snapshot()
        self._began = self._saved = time.monotonic()
        while self.step < self.num_steps:
            try:
                self._advance()
                self._after_step()
            except NonFiniteError as error:
                raise self._located(error) from error
            if progress is not None and self.rank == 0:
                progress(self.step, self.num_steps, self._losses)
        self.log.write(at_once=True)
        self.log.close()

    def last_row(self, name: str) -> Row:
        """Return the newest row of a run in the table ``epochs``."""
        return next(row for row in reversed(self.log.tables["epochs"]) if row["run"] == name)

    def start_digest(self) -> str:
        """Return a short digest of the weights that all runs start from."""
        found = hashlib.sha256()
        for t in self.trainees[0].weights().values():
            found.update(content(t))
        return found.hexdigest()[:16]

    @contextmanager
    def everything_put_back(self) -> Iterator[None]:
        """Set what the training needs of torch's global state; put it back afterwards."""
        with everything_put_back(self.config, self.threads), warnings_noted(self._note):
            yield

    def _start(self) -> list[Trainee]:
        return start_trainees(
            self.config,
            self._make_model,
            num_steps=self.num_steps,
            horizon=horizon_by_time(self._factor, self.num_steps),
            world_size=self.world_size,
        )

    def _advance(self) -> None:
        """Make one step of every run on the same batch."""
        x, y = self.data.train.batches.batch(self.step)
        factor = self._factor(self.step)
        if factor != self._last_factor:
            self._last_factor = factor
            for trainee in self.trainees:
                trainee.set_rate(factor)
        for trainee, (losses, right) in zip(self.trainees, self._cells, strict=True):
            seed_noise(self.config, self.step, self.rank)
            loss, out = trainee.step(x, y)
            # Nothing is read here, so nothing waits for the device.
            losses.add_(loss, alpha=len(y))
            if self._classifies:
                right.add_((out.argmax(1) == y).sum())
        self.step += 1

    def _after_step(self) -> None:
        """Read, evaluate, write: what is due after this step, in an order a kill cannot tear."""
        ends = self.step % self.steps_per_epoch == 0
        reads = ends or self.step == 1 or self.step % self.config.log_every == 0
        save = self._read() if reads else False
        if ends:
            self._end_epoch()
        if self.step in self._snapshots:
            self._snapshot()
        if save or self.step == self.num_steps:
            self._save()

    def _read(self) -> bool:
        """Bring the sums to the host, and a row for every run; tell whether to save."""
        due = self.rank == 0 and time.monotonic() - self._saved >= self._checkpoint_seconds
        shared = torch.cat([self._sums.flatten(), self._sums.new_tensor([float(due)])])
        *values, wanted = sum_over_ranks(shared).tolist()
        self._sums.zero_()
        samples = self._samples_between(self._read_step, self.step)
        self._read_step = self.step
        for i, trainee in enumerate(self.trainees):
            loss, right = values[2 * i : 2 * i + 2]
            if not math.isfinite(loss):
                raise NonFiniteError(f"The loss of {trainee.name} is not finite.")
            self._epoch_sums[i][0] += loss
            self._epoch_sums[i][1] += right
            self._losses[trainee.name] = loss / samples
            threshold, c = trainee.threshold()
            self.log.add(
                "steps",
                {
                    "run": trainee.name,
                    "step": self.step,
                    "epoch": self.step / self.steps_per_epoch,
                    "lr": trainee.base_lr * self._last_factor,
                    "train_loss": loss / samples,
                    "train_accuracy": self._share(right, samples),
                    "sparsity": trainee.sparsity(),
                    "threshold": threshold,
                    "c": c,
                },
            )
        return bool(wanted > 0)

    def _samples_between(self, first: int, last: int) -> int:
        """Samples of some steps of one epoch, over all processes."""
        size, total = self.config.batch_size, self._epoch_samples
        start = first % self.steps_per_epoch
        return min((start + last - first) * size, total) - start * size

    def _share(self, right: float, samples: int) -> float | None:
        return right / samples if self._classifies else None

    def _end_epoch(self) -> None:
        """Evaluate every run, and write the tables."""
        epoch, total = self.step // self.steps_per_epoch, self._epoch_samples
        last = self.step == self.num_steps
        look = last or epoch % self.config.eval_every == 0
        seconds = self._elapsed()
        for i, trainee in enumerate(self.trainees):
            loss, right = self._epoch_sums[i]
            row: dict[str, Any] = {
                "run": trainee.name,
                "epoch": epoch,
                "step": self.step,
                "lr": trainee.base_lr * self._last_factor,
                "train_loss": loss / total,
                "train_accuracy": self._share(right, total),
            }
            held_out = self.data.validation
            if held_out is not None:
                row |= self._evaluated(trainee, "validation", held_out if look else None)
            # Where settings are chosen by the validation samples, the test waits for the end.
            shown = last or (look and held_out is None)
            row |= self._evaluated(trainee, "test", self.data.test if shown else None)
            threshold, c = trainee.threshold()
            row |= {"sparsity": trainee.sparsity(), "threshold": threshold, "c": c}
            self.log.add("epochs", row)
        self._epoch_sums = [[0.0, 0.0] for _ in self.trainees]
        self.log.add(
            "time",
            {
                "epoch": epoch,
                "step": self.step,
                "training_seconds": seconds,
                "evaluation_seconds": self._elapsed() - seconds,
                "samples_per_second": total * len(self.trainees) / max(seconds, 1e-9),
            },
        )
        self._seconds, self._began = 0.0, time.monotonic()
        self.log.write()

    def _elapsed(self) -> float:
        """Seconds of this epoch, those before a kill included."""
        return self._seconds + time.monotonic() - self._began

    def _evaluated(self, trainee: Trainee, name: str, part: Part | None) -> dict[str, Any]:
        """Loss and accuracy on some samples; None for not now."""
        loss, accuracy = None, None
        if part is not None:
            loss, accuracy = evaluate(
                trainee.model,
                trainee.criterion,
                part,
                classifies=self._classifies,
                autocast=trainee.autocast(),
            )
        return {f"{name}_loss": loss, f"{name}_accuracy": accuracy}

    def _snapshot(self) -> None:
        if self._run is not None and self._snapshots:
            write_snapshot(self._run, self.step, self.trainees)

    def _save(self) -> None:
        """Write a checkpoint, of good weights only."""
        for trainee in self.trainees:
            if not all_finite(trainee):
                raise NonFiniteError(f"A weight of {trainee.name} is not finite.")
        if self._checkpoints is not None and self.rank == 0:
            self._checkpoints.save(self.step, self._state())
        self._saved = time.monotonic()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "threads": self.threads,
            "epoch_sums": self._epoch_sums,
            "losses": self._losses,
            "seconds": self._elapsed(),
            "tables": self.log.state(),
            "notes": self.notes,
            "runs": {trainee.name: trainee.state() for trainee in self.trainees},
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.step = self._read_step = state["step"]
        self.threads = self.config.threads or state["threads"]
        self._epoch_sums, self._losses = state["epoch_sums"], dict(state["losses"])
        self._seconds = state["seconds"]
        self.log.load(state["tables"])
        self.notes = list(state["notes"])
        for trainee in self.trainees:
            trainee.load(state["runs"][trainee.name])
        self._last_factor = math.nan
        self._sums.zero_()

    def _located(self, error: NonFiniteError) -> NonFiniteError:
        """Go back to the last good state and forward again to see where it went wrong first."""
        end, kept = self.step, "There is no checkpoint before it."
        found = None if self._checkpoints is None else self._checkpoints.latest()
        if found is None:
            self.step, self.trainees = 0, self._start()
        else:
            self._load(found.state)
            assert self._checkpoints is not None
            folder = self._checkpoints.folder
            kept = f"The last good checkpoint, of step {found.step}, is in {folder}."
        steps = range(self.step, min(end + 1, self.num_steps))
        batch = self.data.train.batches.batch
        where = locate(self.trainees, batch, self._factor, self.config, steps)
        if where is None:
            where = (
                f"{str(error).rstrip('.')}. It happened before step {end + 1}, and not again when "
                "those steps were repeated"
            )
        return NonFiniteError(
            f"{where}. Lower the learning rate of this run, or what prunes it, and use another "
            f"folder. {kept}"
        )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
