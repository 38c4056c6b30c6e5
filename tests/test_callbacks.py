"""Callbacks in real, short trainings: the training stays the same to the bit, and what is logged is right."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfn as hf
from hessfn.core.errors import MissingExtra
from hessfn.training.budget import Budget
from hessfn.training.figures import density_figure, log_figure
from hessfn.training.monitor import Monitor
from hessfn.training.present_loss import PresentLoss, evaluating

INPUTS = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (96,), generator=torch.Generator().manual_seed(1))
BATCH = INPUTS[:40], TARGETS[:40]


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
        )


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
    optimizer.step()


def dense_hessian(model: nn.Module, batch: Any = BATCH) -> Tensor:
    """By torch's own second derivatives, in float64: BatchNorm as in training, no dropout."""
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    buffers = {name: b.double() if b.is_floating_point() else b.clone() for name, b in model.named_buffers()}
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                stack.callback(setattr, module, "training", module.training)
                module.training = False

        def loss(flat: Tensor) -> Tensor:
            pieces = flat.split([p.numel() for p in parameters.values()])
            given = {name: x.view_as(p) for (name, p), x in zip(parameters.items(), pieces, strict=True)}
            state = {**given, **{name: b.clone() for name, b in buffers.items()}}
            return nn.functional.cross_entropy(torch.func.functional_call(model, state, (batch[0].double(),)), batch[1])

        flat = torch.cat([p.reshape(-1) for p in parameters.values()])
        return torch.autograd.functional.hessian(loss, flat)


def everything(model: nn.Module) -> list[Any]:
    """What a measurement must leave as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        *(x.detach().clone() for x in tensors),
        *(x.data_ptr() for x in tensors),
        *(x._version for x in tensors),
        *(None if p.grad is None else p.grad.clone() for p in model.parameters()),
        *(module.training for module in model.modules()),
        *(len(module._forward_hooks) for module in model.modules()),
        torch.get_rng_state(),
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


# What all callbacks share.


def test_a_measurement_is_that_of_the_dense_hessian_and_changes_nothing() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = Monitor(BATCH, nn.CrossEntropyLoss(), every=1, max_share=None, k=2, num_probes=20)
    for step in (1, 2):
        for _ in range(5):
            step_of(model, optimizer)
        before = everything(model)
        measured = monitor.measure(model, [optimizer], step)
        assert same(before, everything(model))
        found = measured.scalars
        dense = dense_hessian(model)
        values = torch.linalg.eigvalsh(dense).flip(0)
        assert found["curvature/sharpness"] == pytest.approx(float(values[0]), rel=0.01)
        assert found["curvature/sharpness_2"] == pytest.approx(float(values[1]), rel=0.02)
        assert found["curvature/sharpness_others"] >= float(values[2])
        assert abs(found["curvature/trace"] - float(dense.trace())) <= 5 * found["curvature/trace_stderr"]
        v = torch.cat([optimizer.state[p]["exp_avg_sq"].double().reshape(-1) for p in model.parameters()])
        t = 5 * step
        P = ((v / (1 - 0.999**t)).sqrt() + 1e-8) * (1 - 0.9**t)
        top = float(torch.linalg.eigvalsh(dense / (P[:, None] * P).sqrt())[-1])
        assert found["curvature/preconditioned_sharpness"] == pytest.approx(top, rel=0.01)
        for name in ("sharpness", "preconditioned_sharpness"):
            assert 0 <= found[f"curvature/{name}_residual"] <= 0.011 * found[f"curvature/{name}"]


def test_a_loss_is_traced_once_and_follows_whatever_changes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = net(), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    def top(model: nn.Module) -> float:
        _, params, matvec, _ = loss.at(model)
        return float(hf.eigsh(matvec, hf.gaussian(params, 1)[0], which="LA", rtol=1e-4).values[0])

    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = PresentLoss(BATCH, nn.CrossEntropyLoss())
    counted: list[None] = []
    model.net[0].register_forward_hook(lambda *_: counted.append(None))
    calls = []
    for i in range(4):
        if i > 1:
            step_of(model, optimizer)
        counted.clear()
        assert top(model) == pytest.approx(float(torch.linalg.eigvalsh(dense_hessian(model))[-1]), rel=1e-3)
        calls.append(len(counted))
    # A trace and a check run the model; a kept trace does not, whether or not parameters and buffers have changed.
    assert calls[0] > calls[1] == calls[2] == calls[3]
    # What no version counter tells of: a number in the model, and memory that has been swapped.
    model.scale = 2.0
    assert top(model) == pytest.approx(float(torch.linalg.eigvalsh(dense_hessian(model))[-1]), rel=1e-3)
    model.net[4].weight.data = torch.randn(3, 8)
    assert top(model) == pytest.approx(float(torch.linalg.eigvalsh(dense_hessian(model))[-1]), rel=1e-3)
    model.double()  # as trainers do, and with the batch
    assert top(model) == pytest.approx(float(torch.linalg.eigvalsh(dense_hessian(model))[-1]), rel=1e-4)
    model.net[0].weight.requires_grad_(False)
    _, params, _, live = loss.at(model)
    assert set(params) == set(live) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_training_mode_of_its_own_is_not_touched() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("called")

    model = nn.Sequential(Merging(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[2].training = True
    before = [module.training for module in model.modules()]
    with contextlib.suppress(KeyError), evaluating(model):
        assert [module.training for module in model.modules()] == [False, False, False, True]
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_measurements_keep_within_their_share_of_the_time() -> None:
    now = [0.0]
    monitor = Monitor(BATCH, nn.CrossEntropyLoss(), every=10, max_share=0.05)
    monitor.budget = Budget(0.05, clock=lambda: now[0])
    monitor.start()
    shares, steps = [], []
    for step in range(1, 20001):
        now[0] += 0.01
        if monitor.is_due(step):
            steps.append(step)
            with monitor.budget.measuring():
                now[0] += 4.0 if len(steps) == 1 else 0.5
            shares.append(monitor.budget.spent_share())
    assert steps[0] == 10 and all(step % 10 == 0 for step in steps)
    assert max(shares[1:]) <= 0.05
    assert 0.045 < monitor.budget.spent_share() <= 0.05  # it is used, too
    assert Budget(None).allows()


def test_a_diverged_training_goes_on_with_a_warning_and_a_first_error_is_raised() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(BATCH, nn.CrossEntropyLoss(), every=1, max_share=None)
    step_of(model, optimizer)
    assert monitor.measure(model, [optimizer], 1) is not None
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="no curvature at step 2"):
        assert monitor.measure(model, [optimizer], 2) is None
    with pytest.raises(hf.HessfnError):
        Monitor(BATCH, nn.CrossEntropyLoss(), every=1).measure(model, [optimizer], 2)


def test_what_cannot_be_monitored_is_refused() -> None:
    for options in ({"every": 0}, {"k": 0}, {"num_probes": 1}, {"density_matvecs": -1}, {"max_share": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Monitor(BATCH, nn.CrossEntropyLoss(), **options)
    model = net()
    model[0].weight.ds_id = 3  # as DeepSpeed marks what lies in parts
    with pytest.raises(ValueError, match="sharded over processes"):
        Monitor(BATCH, nn.CrossEntropyLoss()).measure(model, [], 1)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    spec = importlib.util.find_spec(f"hessfn.training.{name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # it can be imported, as by a type checker
    with pytest.raises(MissingExtra, match=rf'pip install "hessfn\[{name}\]"'):
        module.CurvatureCallback(None, BATCH)


def test_figures_go_where_figures_are_taken(tmp_path: Path) -> None:
    class Holder:
        def __init__(self, **attributes: Any) -> None:
            vars(self).update(attributes)

    got: list[Any] = []

    def sink(*args: Any, **kwargs: Any) -> None:
        got.append((*args, *kwargs.values()))

    found = hf.density(hf.slq(lambda v: torch.arange(50.0) * v, hf.gaussian(torch.zeros(50), 1), 20))
    figure, name = density_figure(found, 7), "curvature/density"
    figure.savefig(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 5000
    # As each of them is called by its own documentation.
    board, file = Holder(add_figure=sink), "curvature_density_7.png"
    takers = {
        "TensorBoard in Lightning": (Holder(experiment=board), (name, figure, 7)),
        "TensorBoard in transformers": (Holder(tb_writer=board), (name, figure, 7)),
        "W&B in Lightning": (Holder(experiment=object(), log_image=sink), (name, [figure], 7)),
        "W&B in transformers": (
            Holder(_wandb=Holder(log=sink, Image=lambda x: [x])),
            ({name: [figure], "train/global_step": 7},),
        ),
        "MLflow in Lightning": (Holder(experiment=Holder(log_figure=sink), run_id="run"), ("run", figure, file)),
        "MLflow in transformers": (Holder(_ml_flow=Holder(log_figure=sink)), (figure, file)),
        "Comet in Lightning": (Holder(experiment=Holder(log_figure=sink)), (name, figure, 7)),
    }
    for holder, expected in takers.values():
        assert log_figure(holder, name, figure, 7)
        assert got.pop() == expected
    assert not log_figure(Holder(experiment=object()), name, figure, 7)
    assert not log_figure(Holder(), name, figure, 7)
    assert not got


# Real trainings.

CHANGING = ("seconds", "share_of_time")


def curvature(rows: list[tuple[int, dict[str, Any]]]) -> dict[int, dict[str, float]]:
    """By step, what does not depend on the machine's speed."""
    return {
        step: {name.removeprefix("curvature/"): value for name, value in row.items() if name.startswith("curvature/")}
        for step, row in rows
        if "curvature/sharpness" in row
    }


def without_times(found: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: {name: x for name, x in row.items() if name not in CHANGING} for step, row in found.items()}


def events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[int]]]:
    """What a reader of TensorBoard's files sees: scalars and images."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    (file,) = folder.rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(file), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    tags = read.Tags()
    return (
        {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags["scalars"]},
        {tag: [e.step for e in read.Images(tag)] for tag in tags["images"]},
    )


class WithLightning:
    """A training of Lightning, of which every random number counts: dropout, shuffling, BatchNorm, Adam."""

    def __init__(self, package: str, folder: Path) -> None:
        self.L = pytest.importorskip(package)
        self.folder = folder

        class Module(self.L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

            def training_step(self, batch: Any, index: int) -> Tensor:
                loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                self.log("train_loss", loss, on_step=True)
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=0.01)

        class Recorder(self.L.loggers.CSVLogger):
            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                rows.append((step, dict(metrics)))

        rows: list[tuple[int, dict[str, Any]]] = []
        self.Module, self.recorder, self.rows = Module, Recorder(str(folder / "csv")), rows

    def train(self, *callbacks: Any, resume: str | None = None, loggers: Any = (), shuffle: bool = True) -> Any:
        self.rows.clear()
        torch.manual_seed(5)
        data = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(INPUTS, TARGETS), batch_size=12, shuffle=shuffle
        )
        keep = self.L.callbacks.ModelCheckpoint(dirpath=self.folder / "kept", filename="{epoch}", save_top_k=-1)
        trainer = self.L.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[*callbacks, keep], logger=[self.recorder, *loggers],
            log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = self.Module()
        trainer.fit(module, data, ckpt_path=resume)
        optimizer = trainer.optimizers[0].state_dict()["state"]
        left = [*everything(module), *(x for state in optimizer.values() for x in state.values())]
        return [x for x in left if not (isinstance(x, int) and x > 10**6)], list(self.rows)  # no addresses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_trains_the_same_to_the_bit_and_logs(package: str, tmp_path: Path) -> None:
    training = WithLightning(package, tmp_path)
    pytest.importorskip("tensorboard")
    module = importlib.import_module("hessfn.training.lightning")
    plain, plain_rows = training.train()
    board = training.L.loggers.TensorBoardLogger(str(tmp_path / "board"))
    options = {"every": 3, "max_share": None, "k": 2}
    watched, rows = training.train(
        module.CurvatureCallback(BATCH, nn.CrossEntropyLoss(), density_matvecs=20, **options),
        module.CurvatureCallback(BATCH, nn.CrossEntropyLoss(), module="net", prefix="net/", **options),
        loggers=[board],
    )
    assert same(plain, watched)
    losses = [[row["train_loss"] for _, row in of if "train_loss" in row] for of in (plain_rows, rows)]
    assert losses[0] == losses[1] and len(losses[0]) == 16
    found = curvature(rows)
    assert list(found) == [3, 6, 9, 12, 15]
    for row in found.values():
        assert 0 < row["sharpness_residual"] <= 0.011 * row["sharpness"] and row["trace_stderr"] > 0
        assert row["seconds"] > 0 and 0 < row["share_of_time"] < 1
        assert row["preconditioned_sharpness"] > row["sharpness"]
    assert [row["net/sharpness"] for _, row in rows if "net/sharpness" in row] == [
        row["sharpness"] for row in found.values()
    ]
    scalars, images = events(tmp_path / "board")
    assert [step for step, _ in scalars["curvature/sharpness"]] == list(found)
    torch.testing.assert_close([x for _, x in scalars["curvature/trace"]], [row["trace"] for row in found.values()])
    assert images == {"curvature/density": list(found)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_the_following(tmp_path: Path) -> None:
    training = WithLightning("lightning.pytorch", tmp_path)
    module = importlib.import_module("hessfn.training.lightning")

    class Seeded(training.L.Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            torch.manual_seed(trainer.global_step)  # of dropout: it is no part of a checkpoint

    def train(**options: Any) -> dict[int, dict[str, float]]:
        callback = module.CurvatureCallback(BATCH, nn.CrossEntropyLoss(), every=2, max_share=None)
        return curvature(training.train(callback, Seeded(), shuffle=False, **options)[1])

    whole = train()
    kept = str(tmp_path / "kept" / "epoch=0.ckpt")
    callbacks = torch.load(kept, weights_only=True)["callbacks"]
    (state,) = [value for key, value in callbacks.items() if "Curvature" in key]
    assert set(state["followed"]) == {"sharpness", "preconditioned"}
    resumed = train(resume=kept)
    assert list(resumed) == [10, 12, 14, 16]
    # From the same vectors and random directions: the same numbers and counts of products, to the bit.
    assert without_times(resumed) == {step: row for step, row in without_times(whole).items() if step > 8}
    assert resumed[10]["share_of_time"] > state["time"]["spent"] / (state["time"]["elapsed"] + 60)
    other = module.CurvatureCallback((INPUTS[:20], TARGETS[:20]), nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="another batch"):
        other.load_state_dict(state)


class WithTransformers:
    def __init__(self) -> None:
        self.package = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        ids = torch.randint(20, (24, 8), generator=torch.Generator().manual_seed(0))
        self.data = [{"input_ids": row, "labels": row} for row in ids]
        self.batch = {name: torch.stack([one[name] for one in self.data[:6]]) for name in self.data[0]}

    def model(self) -> nn.Module:
        small = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        special = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.package.GPT2LMHeadModel(self.package.GPT2Config(**small, **special))

    def train(
        self, folder: Path, *, watch: bool, resume: Path | None = None, report: str = "none", **options: Any
    ) -> Any:
        model = self.model()
        arguments = self.package.TrainingArguments(
            output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, logging_steps=1, save_steps=3, seed=3,
            report_to=report, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = self.package.Trainer(model, arguments, train_dataset=self.data)
        if watch:
            module = importlib.import_module("hessfn.training.transformers")
            trainer.add_callback(module.CurvatureCallback(trainer, self.batch, every=2, max_share=None, **options))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        optimizer = trainer.optimizer.state_dict()["state"]
        left = [*everything(model), *(x for state in optimizer.values() for x in state.values())]
        rows = [(row["step"], row) for row in trainer.state.log_history]
        return [x for x in left if not (isinstance(x, int) and x > 10**6)], rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_trains_the_same_to_the_bit_logs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = WithTransformers()
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    plain, plain_rows = training.train(tmp_path / "a", watch=False)
    watched, rows = training.train(tmp_path / "b", watch=True, density_matvecs=10, report="tensorboard")
    assert same(plain, watched)
    losses = [[row["loss"] for _, row in of if "loss" in row] for of in (plain_rows, rows)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    found = curvature(rows)
    assert list(found) == [2, 4, 6]
    for row in found.values():
        assert 0 < row["sharpness_residual"] <= 0.011 * row["sharpness"] and row["trace_stderr"] > 0
        assert row["preconditioned_sharpness_residual"] <= 0.011 * row["preconditioned_sharpness"]
    scalars, images = events(tmp_path / "board")
    assert [step for step, _ in scalars["train/curvature/sharpness"]] == list(found)
    assert images == {"curvature/density": list(found)}

    resumed_left, resumed = training.train(
        tmp_path / "b", watch=True, density_matvecs=10, resume=tmp_path / "b" / "checkpoint-3"
    )
    assert same(*([x for x in left if isinstance(x, Tensor)] for left in (watched, resumed_left)))
    # From the same vectors: the same numbers and counts of products, to the bit.
    again = curvature(resumed)
    assert list(again) == [2, 4, 6]  # the log of before the interruption is the trainer's own
    assert without_times(again) == without_times(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "transformers", "accelerate"):
        pytest.importorskip(package)
    page = (Path(__file__).parents[1] / "docs" / "howto" / "callbacks.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
            exec(code, names)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["curvature/sharpness"]]
    told = set(re.findall(r"`curvature/(\w+)`", page))
    for row in (rows[0], names["logged"][0]):
        assert {f"curvature/{name}" for name in told} <= {name for name, value in row.items() if value != ""}
