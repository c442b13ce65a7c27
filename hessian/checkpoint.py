"""The state of a Krylov iteration in a folder, so that a killed run goes on where it was."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hessian.distributed import Ranks
from hessian.iteration_state import State
from hessian.lanczos import KrylovBasis, Remainder
from hessian.missed_eigenvalues import Search

FORMAT = 1
NEWEST, PREVIOUS = "checkpoint.json", "previous.json"
SLACK = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far A q may be from what it was, of the size of A, for the same operator."""


@dataclass
class Checkpoint:
    """A folder with one file of T and the open directions, and files of basis vectors.

    Vectors are only ever added, in a file for those that are new, until the basis is compressed;
    so a write costs what was added. ``checkpoint.json`` names the files that belong together and
    is replaced in one step after they are on the disk: whenever the process dies, the folder
    holds a state that was.

    Ranks that share a basis have a folder each inside of it, ``rank-0``, ``rank-1``, …. A rank may
    die when others have written already, so every rank keeps the state before the last one until
    all have written, and they go on from the newest that all of them hold.

    Args:
        folder: Where; made if needed.
        problem: What must be equal for the state to be of use.
        every: Products between two writes.
        ranks: Those that the basis is spread over; they call every method together.
    """

    folder: Path
    problem: dict[str, Any]
    every: int
    ranks: Ranks
    _written: int = 0
    _saves: int = 0
    _generation: int = 0
    _compressions: int = 0
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._whole = self.folder
        if self.ranks.size > 1:
            self.folder = self._whole / f"rank-{self.ranks.rank}"
            self.problem["ranks"] = self.ranks.size

    def save(self, basis: KrylovBasis, state: State, *, at_once: bool = False) -> None:
        """Write the state, if enough products were made since the last time."""
        if state.products - self._written < self.every and not at_once:
            return
        with self.ranks.in_step():
            keep = self._write_all(basis, state)
        # All ranks have written: none will go back to what was before.
        for path in self.folder.iterdir():
            ours = ("vectors-", "state-", "previous", ".partial-")
            if path.name not in keep and path.name.startswith(ours):
                path.unlink(missing_ok=True)

    def _write_all(self, basis: KrylovBasis, state: State) -> set[str]:
        """Write the state, and return the names of the files that belong to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if basis.compressions != self._compressions:
            self._compressions = basis.compressions
            self._rows, self._generation = [], state.products
        saved = sum(entry["rows"] for entry in self._rows)
        if saved < len(basis):
            name = f"vectors-{self._generation:06}-{saved:06}.safetensors"
            added = torch.stack([basis.rows[i] for i in range(saved, len(basis))])
            digest = self._write(name, save({"rows": added.cpu()}))
            self._rows.append({"file": name, "rows": len(added), "sha256": digest})
        name = f"state-{state.products:06}.safetensors"
        digest = self._write(name, save(_tensors(basis)))
        self._saves += 1
        text = json.dumps(
            {
                "format": FORMAT,
                "problem": dict(self.problem),
                "products": state.products,
                "saves": self._saves,
                "vectors": self._rows,
                "state": {"file": name, "sha256": digest},
                "basis": {
                    "tridiagonal": basis.tridiagonal,
                    "largest_alpha": basis.largest_alpha,
                    "largest_beta": basis.largest_beta,
                    "generation": self._generation,
                    "compressions": basis.compressions,
                    "exhausted": basis.exhausted,
                    "norms": [r.norm for r in _remainders(basis)],
                },
                "iteration": asdict(state),
            },
            indent=1,
        )
        if self.ranks.size > 1 and (self.folder / NEWEST).exists():
            self._write(PREVIOUS, (self.folder / NEWEST).read_bytes())
        self._write(NEWEST, text.encode())
        self._written = state.products
        return {NEWEST, name, *(entry["file"] for entry in self._rows)}

    def resume(self, basis: KrylovBasis, state: State) -> bool:
        """Bring a fresh basis and state to what the folder holds; False if it holds nothing.

        Makes one product, uncounted, to see that the operator is the same one.

        Raises:
            ValueError: If the folder holds another problem, or a file in it is damaged.
        """
        record = self._common_record()
        if record is None:
            return False
        with self.ranks.in_step():
            self._restore(record, basis, state)
            if (self.folder / PREVIOUS).exists():  # others have nothing newer than this one
                self._write(NEWEST, json.dumps(record, indent=1).encode())
        self._require_same_operator(basis)
        return True

    def recorded_basis(self) -> int | None:
        """Return the size of the basis that the folder was written for, None if it is empty.

        Raises:
            ValueError: If the folder holds another problem, or is damaged.
        """
        with self.ranks.in_step():
            records = self._records()
        size = records[0]["problem"].get("max_basis") if records else None
        largest = int(self.ranks.gather([-1.0 if size is None else float(size)]).max())
        return None if largest < 0 else largest

    def _common_record(self) -> dict[str, Any] | None:
        """Return the newest record that all ranks hold, None if there is none."""
        with self.ranks.in_step():
            records = self._records()
        newest = [float(record["products"]) for record in records]
        table = self.ranks.gather([*newest, -1.0, -1.0][:2])
        saves = self.ranks.gather([float(records[0].get("saves", 1)) if records else 0.0])
        everywhere = [n for n in newest if bool((table == n).any(dim=1).all())]
        if everywhere:
            return records[newest.index(max(everywhere))]
        if float(saves.max()) > 1:
            raise ValueError(
                f"`checkpoint` must hold the states of all {self.ranks.size} ranks, but those in "
                f"{self._whole} do not fit together. Give every rank the same folder, or remove "
                "it to begin anew."
            )
        return None  # nothing was written, or a rank died in the first write

    def _records(self) -> list[dict[str, Any]]:
        """Read what this rank has written, newest first, and hold it against the problem."""
        if self._whole.exists() and not self._whole.is_dir():
            raise ValueError(f"`checkpoint` must be a folder, got the file {self._whole}.")
        others = [self._whole] if self.ranks.size > 1 else sorted(self._whole.glob("rank-*"))
        for other in others:
            if (other / NEWEST).exists():
                found = "one process" if self.ranks.size > 1 else f"{len(others)} ranks"
                raise ValueError(
                    f"`checkpoint` must be of as many ranks as there are now, {self.ranks.size}, "
                    f"but {self._whole} was written by {found}. Use another folder, or remove it."
                )
        paths = [self.folder / name for name in (NEWEST, PREVIOUS)]
        records = [self._record(path) for path in paths if path.exists()]
        return sorted(records, key=lambda record: -int(record["products"]))

    def _record(self, path: Path) -> dict[str, Any]:
        """Read what belongs together and hold it against the problem."""
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            theirs, form = record["problem"], record["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(path.name) from error
        if form != FORMAT:
            raise ValueError(
                f"`checkpoint` must be of format {FORMAT}, got {form} in {self.folder}. Remove "
                "the folder, or go on with the version that wrote it."
            )
        for key, ours in self.problem.items():
            if theirs.get(key) != ours:
                raise ValueError(
                    f"`checkpoint` must belong to this problem, but {self.folder} was written for "
                    f"{key}={theirs.get(key)}, got {key}={ours}. Use another folder, or remove it."
                )
        return record

    def _restore(self, record: dict[str, Any], basis: KrylovBasis, state: State) -> None:
        about = record["basis"]
        for entry in record["vectors"]:
            for row in self._read(entry)["rows"]:
                basis.rows.append(row)
        tensors = self._read(record["state"])
        basis.restore_projection(tensors["T"].numpy())
        # Copies, because vectors inside of a file's bytes lie at any address.
        found = [
            Remainder(
                tensors[f"vector{i}"].clone().to(basis.rows.device),
                tensors[f"couplings{i}"].numpy().copy(),
                norm,
            )
            for i, norm in enumerate(about["norms"])
        ]
        basis.current = None if about["exhausted"] else found.pop(0)
        basis.abandoned = found
        basis.tridiagonal, basis.compressions = about["tridiagonal"], about["compressions"]
        basis.largest_alpha, basis.largest_beta = about["largest_alpha"], about["largest_beta"]
        for key, value in record["iteration"].items():
            setattr(state, key, Search(**value) if key == "search" and value else value)
        self._rows, self._written = record["vectors"], record["products"]
        self._saves = record.get("saves", 1)
        self._generation, self._compressions = about["generation"], about["compressions"]

    def _require_same_operator(self, basis: KrylovBasis) -> None:
        q = basis.rows[0]
        expected = basis.rows.combine(np.ascontiguousarray(basis.T[:, 0]))
        for remainder in _remainders(basis):
            expected += float(remainder.couplings[0]) * remainder.vector
        scale = basis.largest_alpha + basis.largest_beta
        difference = basis.norm(basis.product(q) - expected)
        if not difference <= SLACK.get(basis.operator.dtype, 1e-3) * scale:
            raise ValueError(
                f"`operator` must be the one that {self.folder} was written for, but a product "
                f"differs from what it was by {difference:.2e}, where A is about {scale:.2e}. "
                "Use another folder, or remove it."
            )

    def _read(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        try:
            data = (self.folder / entry["file"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise self._damaged(entry["file"])
            return dict(load(data))
        except (OSError, SafetensorError) as error:
            raise self._damaged(entry["file"]) from error

    def _damaged(self, name: str) -> ValueError:
        return ValueError(
            f"`checkpoint` must hold whole files, but {name} in {self.folder} is missing or "
            "damaged. Remove the folder to begin anew."
        )

    def _write(self, name: str, data: bytes) -> str:
        """Write a file, whole or not at all, and return its SHA-256."""
        handle, partial = tempfile.mkstemp(dir=self.folder, prefix=".partial-")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(self.folder / name)
        entry = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(entry)  # the new name, too, before another file refers to it
        finally:
            os.close(entry)
        return hashlib.sha256(data).hexdigest()


def fingerprint(v: Tensor | None) -> str | None:
    """Return a short digest of a tensor's numbers, None for none."""
    if v is None:
        return None
    return hashlib.sha256(v.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _remainders(basis: KrylovBasis) -> list[Remainder]:
    return [*([] if basis.current is None else [basis.current]), *basis.abandoned]


def _tensors(basis: KrylovBasis) -> dict[str, Tensor]:
    tensors = {"T": torch.from_numpy(np.ascontiguousarray(basis.T))}
    for i, remainder in enumerate(_remainders(basis)):
        tensors[f"vector{i}"] = remainder.vector.cpu()
        tensors[f"couplings{i}"] = torch.from_numpy(np.ascontiguousarray(remainder.couplings))
    return tensors
